"""The sparse parallel adapter on the device, and how it is attached to a Hugging Face causal LM.

    y = FFN(h) + (gate * ReLU(h K_S^T)) V_S        S: the active rows, keys K_S and values V_S ``[A, D]``

With exact routing there is no gate. Where a router is trained the gate of a row is what its expert is to the token
(:mod:`meft.runtime.exchange.gating`), zero where the token does not probe that expert; this is what trains the router.

``S`` serves every token of the micro-batch (``tokens_see = union``), or each token uses its own best ``K`` of it
(``own``): the activations of the others are zero, and so is what goes backward through them.

Whatever is as large as the active rows lies in memory for as many rows as there may ever be (the cap), so that every
step asks the device's allocator for the same sizes: memory that is cut into pieces of ever other sizes could not be
foreseen.

Letters: ``T`` tokens, ``D`` hidden size, ``A`` active rows, ``N`` experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from meft.planner.base.errors import UsageError
from meft.runtime.adapter.blocks import decoder, ffn_modules
from meft.runtime.exchange.exchange import RowExchange


@contextmanager
def plan_dtypes(device: torch.device) -> Iterator[None]:
    """Without autocast, on the device and on the host: the adapter's dtypes are the plan's."""
    if not (torch.is_autocast_enabled(device.type) or torch.is_autocast_enabled("cpu")):
        yield
        return
    with torch.autocast(device.type, enabled=False), torch.autocast("cpu", enabled=False):
        yield


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
        products = _product(exchange, inputs, keys.T)
        gating, scores, gate_of_row, balance = exchange.gating, None, None, None
        if gating is not None:
            probes = exchange.probes(layer)
            scores = gating.scores(layer, inputs, weight, probes)
            balance = gating.balance_loss(scores, probes)
            gate_of_row = _gate_of_row(exchange, layer, gating.gate(scores, probes, inputs.dtype))
        if exchange.decision.tokens_see == "own":
            _leave_own_rows(exchange, products, gate_of_row)
        activations = products.relu_()
        ctx.exchange, ctx.layer, ctx.hidden_dtype = exchange, layer, hidden.dtype
        ctx.save_for_backward(inputs, activations, weight, scores)
        gated = activations
        if gate_of_row is not None:
            gated = torch.mul(activations, gate_of_row, out=_like_rows(exchange, activations))
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
        keys, values = exchange.rows(layer).tensor_split(2, dim=1)
        grad_keys, grad_values = exchange.gradient_buffer(layer).tensor_split(2, dim=1)
        grad_output = grad_output.to(inputs.dtype)
        grad_scores = None
        if gating is None:
            torch.mm(activations.T, grad_output, out=grad_values)
            grad_activations = _product(exchange, grad_output, values.T)
        else:
            probes = exchange.probes(layer)
            gate_of_row = _gate_of_row(exchange, layer, gating.gate(scores, probes, inputs.dtype))
            product = torch.mul(activations, gate_of_row, out=_like_rows(exchange, activations))
            torch.mm(product.T, grad_output, out=grad_values)
            grad_activations = _product(exchange, grad_output, values.T)
            torch.mul(grad_activations, activations, out=product)
            grad_scores = _gradient_of_scores(product, grad_balance, exchange, layer, scores)
            del product
            grad_activations.mul_(gate_of_row)
        grad_products = _like_rows(exchange, activations)
        torch.ops.aten.threshold_backward.grad_input(grad_activations, activations, 0, grad_input=grad_products)
        torch.mm(grad_products.T, inputs, out=grad_keys)
        exchange.send_gradients(layer)
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = grad_products @ keys
            if grad_scores is not None:
                gating.add_input_gradient(layer, grad_scores, weight, grad_hidden)
            grad_hidden = grad_hidden.to(ctx.hidden_dtype)
        if grad_scores is not None and ctx.needs_input_grad[1]:
            grad_weight = gating.weight_gradient(layer, grad_scores, inputs, weight)
        exchange.after_backward(layer)
        return grad_hidden, grad_weight, None, None


def _gradient_of_scores(
    grad_gate_of_row: torch.Tensor,
    grad_balance: torch.Tensor | None,
    exchange: RowExchange,
    layer: int,
    scores: torch.Tensor,
) -> torch.Tensor:
    """Sum ``[T, A]`` over each expert's rows, as a product with the membership matrix: deterministic on a GPU; and from
    the gate's gradient the scores'."""
    rows, gating = exchange.row_experts(layer), exchange.gating
    assert gating is not None
    experts = exchange.for_rows((rows.shape[0],), axis=0, dtype=torch.int64).copy_(rows)
    shape = (rows.shape[0], scores.shape[1])
    membership = exchange.for_rows(shape, axis=0, dtype=grad_gate_of_row.dtype).zero_()
    membership.scatter_(1, experts.unsqueeze(1), 1.0)
    return gating.backward(grad_gate_of_row @ membership, grad_balance, scores, exchange.probes(layer))


def _product(exchange: RowExchange, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a [T, D]`` times ``b [D, A]``."""
    return torch.mm(a, b, out=exchange.for_rows((a.shape[0], b.shape[1]), axis=1, dtype=a.dtype))


def _like_rows(exchange: RowExchange, like: torch.Tensor) -> torch.Tensor:
    """Memory for one more ``[T, A]``."""
    return exchange.for_rows(tuple(like.shape), axis=1, dtype=like.dtype)


def _gate_of_row(exchange: RowExchange, layer: int, gate: torch.Tensor) -> torch.Tensor:
    """The gate ``[T, A]`` of each row's expert, from ``gate [T, N]``."""
    experts = exchange.row_experts(layer)
    out = exchange.for_rows((gate.shape[0], experts.shape[0]), axis=1, dtype=gate.dtype)
    return torch.index_select(gate, 1, experts, out=out)


def _leave_own_rows(exchange: RowExchange, products: torch.Tensor, gate_of_row: torch.Tensor | None) -> None:
    """Leave of ``products [T, A]`` each token's own best ``K``, and make zero of the others.

    With Key-Experts a token chooses among rows of the experts that it probes: those whose gate is not zero.
    """
    top_k = exchange.decision.top_k
    if products.shape[1] <= top_k:
        return
    others = exchange.for_rows(tuple(products.shape), axis=1, dtype=torch.bool)
    if gate_of_row is not None:
        products.masked_fill_(torch.eq(gate_of_row, 0, out=others), -math.inf)
    least = products.topk(top_k, dim=1).values[:, -1:]
    products.masked_fill_(torch.lt(products, least, out=others), 0)


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
