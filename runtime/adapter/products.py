"""The sparse adapter's arithmetic: products with the active rows, gates, and their gradients.

Whatever is as large as the active rows lies in memory for as many rows as there may ever be (the cap), so that every
step asks the device's allocator for the same sizes: memory that is cut into pieces of ever other sizes could not be
foreseen.

Letters: ``T`` tokens, ``D`` hidden size, ``A`` active rows, ``N`` experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from meft.runtime.exchange.exchange import RowExchange


@contextmanager
def plan_dtypes(device: torch.device) -> Iterator[None]:
    """Without autocast, on the device and on the host: the adapter's dtypes are the plan's."""
    if not (torch.is_autocast_enabled(device.type) or torch.is_autocast_enabled("cpu")):
        yield
        return
    with torch.autocast(device.type, enabled=False), torch.autocast("cpu", enabled=False):
        yield


class Activated(NamedTuple):
    """``ReLU(h K^T)`` of the active rows ``[T, A]``; with a router scores ``[T, N]``, each row's gate ``[T, A]``, and
    what the routing adds to the loss, if so."""

    activations: torch.Tensor
    scores: torch.Tensor | None
    gate_of_row: torch.Tensor | None
    balance: torch.Tensor | None


def activate(
    exchange: RowExchange, layer: int, inputs: torch.Tensor, keys: torch.Tensor, weight: torch.Tensor
) -> Activated:
    """The activations of ``inputs [T, D]`` by ``keys [A, D]``; ``weight`` is the router ``[N, D]``, or a scalar."""
    products = rows_product(exchange, inputs, keys.T)
    gating, scores, gate_of_row, balance = exchange.gating, None, None, None
    if gating is not None:
        probes = exchange.probes(layer)
        scores = gating.scores(layer, inputs, weight, probes)
        balance = gating.balance_loss(scores, probes)
        gate_of_row = gates_of_rows(exchange, layer, gating.gate(scores, probes, inputs.dtype))
    if exchange.decision.tokens_see == "own":
        leave_own_rows(exchange, products, gate_of_row)
    return Activated(products.relu_(), scores, gate_of_row, balance)


class GradientsOfProducts(NamedTuple):
    """Gradients of ``h K^T [T, A]`` and of the gate's scores ``[T, N]``; ``beside`` is what lies there meanwhile."""

    products: torch.Tensor
    scores: torch.Tensor | None
    beside: tuple[torch.Tensor | None, ...]


def row_gradients(
    exchange: RowExchange,
    layer: int,
    *,
    rows: torch.Tensor,
    inputs: torch.Tensor,
    activations: torch.Tensor,
    scores: torch.Tensor | None,
    grad_output: torch.Tensor,
    grad_balance: torch.Tensor | None = None,
) -> GradientsOfProducts:
    """Write the gradients of ``rows [A, 2D]`` to the exchange's buffer, from that of the output ``[T, D]`` and of what
    the routing adds to the loss."""
    values = rows.tensor_split(2, dim=1)[1]
    grad_keys, grad_values = exchange.gradient_buffer(layer).tensor_split(2, dim=1)
    grad_scores = gate_of_row = None
    if exchange.gating is None or scores is None:
        torch.mm(activations.T, grad_output, out=grad_values)
        grad_activations = rows_product(exchange, grad_output, values.T)
    else:
        gate_of_row = gates_of_rows(exchange, layer, exchange.gating.gate(scores, exchange.probes(layer), inputs.dtype))
        product = torch.mul(activations, gate_of_row, out=like_rows(exchange, activations))
        torch.mm(product.T, grad_output, out=grad_values)
        grad_activations = rows_product(exchange, grad_output, values.T)
        torch.mul(grad_activations, activations, out=product)
        grad_scores = gradient_of_scores(product, grad_balance, exchange, layer, scores)
        del product
        grad_activations.mul_(gate_of_row)
    grad_products = like_rows(exchange, activations)
    torch.ops.aten.threshold_backward.grad_input(grad_activations, activations, 0, grad_input=grad_products)
    torch.mm(grad_products.T, inputs, out=grad_keys)
    return GradientsOfProducts(grad_products, grad_scores, (grad_activations, gate_of_row))


def gradient_of_scores(
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
    shape = (rows.shape[0], exchange.decision.num_experts)
    membership = exchange.for_rows(shape, axis=0, dtype=grad_gate_of_row.dtype).zero_()
    membership.scatter_(1, experts.unsqueeze(1), 1.0)
    return gating.backward(grad_gate_of_row @ membership, grad_balance, scores, exchange.probes(layer))


def rows_product(exchange: RowExchange, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a [T, D]`` times ``b [D, A]``."""
    return torch.mm(a, b, out=exchange.for_rows((a.shape[0], b.shape[1]), axis=1, dtype=a.dtype))


def like_rows(exchange: RowExchange, like: torch.Tensor) -> torch.Tensor:
    """Memory for one more ``[T, A]``."""
    return exchange.for_rows(tuple(like.shape), axis=1, dtype=like.dtype)


def gates_of_rows(exchange: RowExchange, layer: int, gate: torch.Tensor) -> torch.Tensor:
    """The gate ``[T, A]`` of each row's expert, from ``gate [T, N]``."""
    experts = exchange.row_experts(layer)
    out = exchange.for_rows((gate.shape[0], experts.shape[0]), axis=1, dtype=gate.dtype)
    return torch.index_select(gate, 1, experts, out=out)


def leave_own_rows(exchange: RowExchange, products: torch.Tensor, gate_of_row: torch.Tensor | None) -> None:
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
