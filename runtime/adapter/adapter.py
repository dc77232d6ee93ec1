"""The sparse parallel adapter on the device, and how it is attached to a Hugging Face causal LM.

    y = FFN(h) + (gate * ReLU(h K_S^T)) V_S        S: the active rows, keys K_S and values V_S ``[A, D]``

With exact routing there is no gate. Where a router is trained the gate of a row is what its expert is to the token
(:mod:`meft.runtime.exchange.gating`), zero where the token does not probe that expert; this is what trains the router.

``S`` serves every token of the micro-batch (``tokens_see = union``), or each token uses its own best ``K`` of it
(``own``): the activations of the others are zero, and so is what goes backward through them.

With token chunks all of it holds of each chunk by itself (:mod:`meft.runtime.adapter.chunked`).

Letters: ``T`` tokens, ``D`` hidden size, ``A`` active rows, ``N`` experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from meft.planner.base.errors import UsageError
from meft.runtime.adapter.blocks import decoder, ffn_modules
from meft.runtime.adapter.chunked import adapted_by_chunks
from meft.runtime.adapter.products import activate, like_rows, plan_dtypes, row_gradients
from meft.runtime.chunks.exchange import ChunkedExchange
from meft.runtime.exchange.exchange import RowExchange


class SparseAdapterFunction(torch.autograd.Function):
    """Adapter output for all tokens from the active rows; in backward the row gradients leave through the exchange.

    ``hidden [T, D]``; ``weight`` is the layer's router ``[N, D]``, or for exact routing a scalar that requires grad
    so that the graph starts here even in the first layer, whose input has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, exchange: RowExchange, layer: int
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Compute the output ``[T, D]`` in the dtype of ``hidden``, and what the routing adds to the loss, if so."""
        with plan_dtypes(hidden.device):
            return SparseAdapterFunction._forward(ctx, hidden, weight, exchange, layer)

    @staticmethod
    def _forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, exchange: RowExchange, layer: int
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        rows = exchange.rows(layer)
        keys, values = rows.tensor_split(2, dim=1)
        inputs = hidden.to(rows.dtype)
        activations, scores, gate_of_row, balance = activate(exchange, layer, inputs, keys, weight)
        ctx.exchange, ctx.layer, ctx.hidden_dtype = exchange, layer, hidden.dtype
        ctx.save_for_backward(inputs, activations, weight, scores)
        gated = activations
        if gate_of_row is not None:
            gated = torch.mul(activations, gate_of_row, out=like_rows(exchange, activations))
            del gate_of_row
        output = (gated @ values).to(hidden.dtype)
        return output if balance is None else (output, balance)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: torch.Tensor, grad_balance: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        """Send the row gradients off; return the gradients of ``hidden`` and ``weight``."""
        with plan_dtypes(grad_output.device):
            return SparseAdapterFunction._backward(ctx, grad_output, grad_balance)

    @staticmethod
    def _backward(
        ctx: Any, grad_output: torch.Tensor, grad_balance: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        exchange, layer, gating = ctx.exchange, ctx.layer, ctx.exchange.gating
        inputs, activations, weight, scores = ctx.saved_tensors
        exchange.before_backward(layer)
        rows = exchange.rows(layer)
        grad_output = grad_output.to(inputs.dtype)
        grads = row_gradients(
            exchange,
            layer,
            rows=rows,
            inputs=inputs,
            activations=activations,
            scores=scores,
            grad_output=grad_output,
            grad_balance=grad_balance,
        )
        exchange.send_gradients(layer)
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = grads.products @ rows.tensor_split(2, dim=1)[0]
            if grads.scores is not None:
                gating.add_input_gradient(layer, grads.scores, weight, grad_hidden)
            grad_hidden = grad_hidden.to(ctx.hidden_dtype)
        if grads.scores is not None and ctx.needs_input_grad[1]:
            grad_weight = gating.weight_gradient(layer, grads.scores, inputs, weight)
        exchange.after_backward(layer)
        return grad_hidden, grad_weight, None, None


@dataclass
class AttachedAdapter:
    """An adapter hooked onto a model; :meth:`detach` restores the model exactly."""

    model: nn.Module
    exchange: RowExchange
    _handles: list[Any]
    _required_grad: list[tuple[nn.Parameter, bool]]
    serving: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    """Where set, it computes a layer's output ``[T, D]`` from ``hidden [T, D]`` instead of the exchange: inference."""

    def detach(self) -> None:
        """Remove every hook and give each parameter its ``requires_grad`` back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter, required in self._required_grad:
            parameter.requires_grad_(required)
        self._required_grad.clear()


def attach(model: nn.Module, exchange: RowExchange, weights: list[nn.Parameter]) -> AttachedAdapter:
    """Freeze ``model`` and put the adapter beside every FFN with forward hooks.

    ``weights`` holds one parameter per layer: the routers of Key-Experts, or scalars (see
    :class:`SparseAdapterFunction`). Raises :class:`UsageError` for a model without one FFN per block.
    """
    blocks = ffn_modules(model)
    if len(blocks) != exchange.store.num_layers:
        raise UsageError(f"the model has {len(blocks)} FFN blocks, the adapter {exchange.store.num_layers} layers")
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    attached = AttachedAdapter(model, exchange, [], required)
    handles: list[Any] = [decoder(model).register_forward_pre_hook(_begin_hook(attached))]
    for layer, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
        handles.append(block.register_forward_pre_hook(_entry_hook(attached, layer), with_kwargs=True))
        hook = _exit_hook(attached, layer, weight)
        handles.append(block.register_forward_hook(hook, with_kwargs=True))
    attached._handles = handles
    return attached


def _begin_hook(attached: AttachedAdapter) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        del module, args
        if attached.serving is None:
            attached.exchange.begin_forward()

    return hook


def _entry_hook(attached: AttachedAdapter, layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if attached.serving is None:
            hidden = ffn_input(module, args, kwargs).flatten(0, -2)
            with plan_dtypes(hidden.device):
                attached.exchange.before_ffn(layer, hidden)

    return hook


def _exit_hook(attached: AttachedAdapter, layer: int, weight: nn.Parameter) -> Callable[..., Any]:
    exchange = attached.exchange

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = ffn_input(module, args, kwargs).flatten(0, -2)
        with plan_dtypes(hidden.device):
            if attached.serving is not None:
                return add_to(output, attached.serving(layer, hidden))
            exchange.before_adapter(layer)
            if isinstance(exchange, ChunkedExchange):
                adapted = adapted_by_chunks(hidden, weight, exchange, layer)
            else:
                adapted = SparseAdapterFunction.apply(hidden, weight, exchange, layer)
            if isinstance(adapted, tuple):
                adapted, balance = adapted
                exchange.note_balance(balance)
            exchange.after_adapter(layer)
            return add_to(output, adapted)

    return hook


def ffn_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states ``[..., D]`` that an FFN was called with: the first tensor of its arguments."""
    found = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
    if found is None:
        raise UsageError(f"{type(module).__name__} was called without a tensor: not supported as an FFN")
    return found


def add_to(output: Any, adapted: torch.Tensor) -> Any:
    """The FFN's output plus the adapter's ``[T, D]``, shaped like the former.

    Of a tuple (a mixture of experts gives its router's logits too) the first element is the output.
    """
    if isinstance(output, torch.Tensor):
        return output + adapted.view_as(output)
    if not isinstance(output, tuple) or not output or not isinstance(output[0], torch.Tensor):
        raise UsageError(f"an FFN returns a {type(output).__name__}, neither a tensor nor a tuple with one first")
    first, *others = output
    return (first + adapted.view_as(first), *others)
