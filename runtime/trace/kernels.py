"""Fused kernels of Liger, Unsloth and others in a traced model: what they keep and write over, without the kernels.

Their own code runs on GPUs alone. Each stands where its library puts it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from meft.planner.models.kernels import NORM_OUT_OF_PLACE, KernelName
from meft.runtime.adapter.blocks import decoder_blocks


class FusedRMSNorm(torch.autograd.Function):
    """Keeps its input and an fp32 factor per row; the gradient is written over the incoming one if that may be."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, in_place: bool) -> torch.Tensor:
        """Like ``x``."""
        ctx.in_place = in_place
        output = torch.empty_like(x)
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of input and weight."""
        _, weight, _ = ctx.saved_tensors
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        return (grad if ctx.in_place else torch.zeros_like(grad)), of_weight, None


class FusedGate(torch.autograd.Function):
    """``act(gate) * up``; the gradients are written over gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Like ``gate``, without gaps."""
        ctx.save_for_backward(gate, up)
        return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The kept tensors themselves."""
        del grad
        gate, up = ctx.saved_tensors
        return gate, up


class Rotation(torch.autograd.Function):
    """Rotated where it lies: laid out by token, or copied so first."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """The same storage."""
        ctx.save_for_backward(cosines, sines)
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The incoming gradient's."""
        del ctx
        return grad.transpose(1, 2).contiguous().transpose(1, 2), None, None


def use_kernels(model: nn.Module, kernels: Collection[KernelName]) -> None:
    """Put norms and FFNs in the place of a model's own."""
    in_place = getattr(model.config, "model_type", None) not in NORM_OUT_OF_PLACE
    for module in model.modules():
        if "rms-norm" in kernels and type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module, in_place)
        if "swiglu" in kernels and hasattr(module, "down_proj"):
            module.forward = partial(_gated, module)


def _norm(module: nn.Module, in_place: bool, hidden_states: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = FusedRMSNorm.apply(hidden_states, module.weight, in_place)
    return output


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    if hasattr(module, "gate_up_proj"):
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = module.gate_proj(x), module.up_proj(x)
    product = FusedGate.apply(gate, up)
    del gate, up
    output: torch.Tensor = module.down_proj(product)
    return output


@contextmanager
def rotations(model: nn.Module, kernels: Collection[KernelName]) -> Iterator[None]:
    """Inside, the model's own module rotates queries and keys in place."""
    if "rope" not in kernels:
        yield
        return
    code = sys.modules[type(decoder_blocks(model)[0]).__module__]
    with mock.patch.object(code, "apply_rotary_pos_emb", _rotated):
        yield


def _rotated(
    query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return Rotation.apply(query, cosines, sines), Rotation.apply(key, cosines, sines)
