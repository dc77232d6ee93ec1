"""The sparse adapter beside an FFN where tokens come in chunks: each chunk's output from its own active rows.

    y[c] = FFN(h)[c] + (gate * ReLU(h[c] K_c^T)) V_c        c: a chunk of tokens, K_c and V_c its rows ``[A, D]``

Nothing that is as large as tokens times rows outlives its chunk: backward computes a chunk's activations once more,
for which its rows are there anyway.

Letters: ``T`` tokens, ``D`` hidden size, ``A`` active rows of a chunk, ``N`` experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from meft.runtime.adapter.products import activate, plan_dtypes, row_gradients
from meft.runtime.chunks.exchange import ChunkedExchange


def adapted_by_chunks(
    hidden: torch.Tensor, weight: torch.Tensor, exchange: ChunkedExchange, layer: int
) -> torch.Tensor:
    """The adapter's output ``[T, D]`` for ``hidden [T, D]``; ``weight`` as the whole adapter's function has it.

    What backward needs is kept *before* anything is computed: a recompute of activation checkpointing, which ends with
    the last tensor that is kept, then needs no rows.
    """
    output: torch.Tensor = ChunkedAdapterFunction.apply(hidden, weight, exchange, layer)
    with torch.no_grad():
        _fill(output.detach(), hidden.detach(), weight.detach(), exchange, layer)
    return output


def _fill(
    output: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, exchange: ChunkedExchange, layer: int
) -> None:
    """Write the output, chunk by chunk."""
    for tokens in exchange.chunks_of(layer):
        _fill_chunk(output[tokens], hidden[tokens], weight, exchange, layer)


def _fill_chunk(
    output: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, exchange: ChunkedExchange, layer: int
) -> None:
    rows = exchange.rows(layer)
    keys, values = rows.tensor_split(2, dim=1)
    activations, _, gate_of_row, _ = activate(exchange, layer, hidden.to(rows.dtype), keys, weight)
    if gate_of_row is not None:
        activations.mul_(gate_of_row)
        del gate_of_row
    if output.dtype == rows.dtype:
        torch.mm(activations, values, out=output)
    else:
        output.copy_(activations @ values)


class ChunkedAdapterFunction(torch.autograd.Function):
    """The adapter's output, still to be filled; in backward row gradients leave through the exchange, by chunks."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, exchange: ChunkedExchange, layer: int
    ) -> torch.Tensor:
        """Memory for the output ``[T, D]``."""
        ctx.exchange, ctx.layer = exchange, layer
        ctx.save_for_backward(hidden, weight)
        return torch.empty_like(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        """Send the row gradients off; return the gradients of ``hidden`` and ``weight``."""
        exchange, layer = ctx.exchange, ctx.layer
        hidden, weight = ctx.saved_tensors
        with plan_dtypes(grad_output.device):
            exchange.before_backward(layer)
            of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            of_weight = torch.zeros_like(weight) if weight.dim() == 2 and ctx.needs_input_grad[1] else None
            for tokens in exchange.chunks_again(layer):
                _chunk_backward(
                    exchange,
                    layer,
                    hidden[tokens],
                    grad_output[tokens],
                    weight=weight,
                    of_hidden=None if of_hidden is None else of_hidden[tokens],
                    of_weight=of_weight,
                )
            exchange.after_backward(layer)
        return of_hidden, of_weight, None, None


def _chunk_backward(
    exchange: ChunkedExchange,
    layer: int,
    hidden: torch.Tensor,
    grad_output: torch.Tensor,
    *,
    weight: torch.Tensor,
    of_hidden: torch.Tensor | None,
    of_weight: torch.Tensor | None,
) -> None:
    """Send a chunk's row gradients; write its part of the hidden state's gradient, and add to the router's."""
    rows = exchange.rows(layer)
    inputs, keys = hidden.to(rows.dtype), rows.tensor_split(2, dim=1)[0]
    activations, scores, gate_of_row, _ = activate(exchange, layer, inputs, keys, weight)
    del gate_of_row
    grads = row_gradients(
        exchange,
        layer,
        rows=rows,
        inputs=inputs,
        activations=activations,
        scores=scores,
        grad_output=grad_output.to(rows.dtype),
    )
    exchange.send_gradients(layer)
    if of_hidden is not None:
        same_dtype = of_hidden.dtype == rows.dtype
        part = torch.mm(grads.products, keys, out=of_hidden if same_dtype else None)
        if grads.scores is not None:
            part.addmm_(grads.scores, weight.to(rows.dtype))
        if not same_dtype:
            of_hidden.copy_(part)
    if of_weight is not None and grads.scores is not None:
        of_weight.add_(grads.scores.T @ inputs)
