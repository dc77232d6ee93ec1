"""Products of a mixture of experts under fake tensors: torch knows their shapes for bf16 alone.

Letters: ``T`` rows (tokens times chosen experts), ``E`` experts, ``I`` inputs, ``O`` outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class GroupedProduct(torch.autograd.Function):
    """``inputs [T, I]`` times each row's expert of ``weights [E, I, O]``: what it keeps and gives, without numbers."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``[T, O]``; of the inputs only their size is kept where weights are frozen."""
        ctx.save_for_backward(inputs if weights.requires_grad else None, weights)
        ctx.input_shape = inputs.shape
        return torch.empty((inputs.shape[0], weights.shape[-1]), dtype=inputs.dtype, device=inputs.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients like inputs and weights."""
        _, weights = ctx.saved_tensors
        of_inputs = of_weights = None
        if ctx.needs_input_grad[0]:
            of_inputs = torch.empty(ctx.input_shape, dtype=grad_output.dtype, device=grad_output.device)
        if ctx.needs_input_grad[1]:
            of_weights = torch.empty_like(weights)
        return of_inputs, of_weights


@contextmanager
def grouped_products() -> Iterator[None]:
    """Inside, ``torch.nn.functional.grouped_mm`` is :class:`GroupedProduct`; a torch without it has nothing to do."""
    if not hasattr(F, "grouped_mm"):
        yield
        return
    with mock.patch.object(F, "grouped_mm", _grouped_mm):
        yield


def _grouped_mm(inputs: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor, **_: Any) -> torch.Tensor:
    del offs
    output: torch.Tensor = GroupedProduct.apply(inputs, weights)
    return output
