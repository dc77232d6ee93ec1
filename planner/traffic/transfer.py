"""Bytes over the link, exact given the active rows.

Per step (one micro-batch, forward and backward), with ``e`` bytes per number of a row and ``q`` of a hidden state:

    h2d  inputs          2 * 8 * T                      token ids and labels, int64
    d2h  queries         (L - p) * T*D*q                hidden states that rows are chosen from
    d2h  probes          L * T*P*4                      Key-Experts: the experts that each token probes, int32
    h2d  rows            sum A_l * 2D*e                 forward
    h2d  row_experts     sum A_l * 4                    Key-Experts: the expert of each active row, int32
    h2d  rows_refetched  sum over l < L-1-p A_l * 2D*e  backward, unless the rows are retained
    d2h  row_gradients   sum A_l * 2D*e
    d2h  loss            4

and per optimizer step, for Key-Experts, d2h ``router_norm``, 4 bytes: the squared norm that global clipping needs of
the gradients that stay on the device. Activation checkpointing changes nothing: its recompute uses rows that are there.

With rows cached through an accumulation window only those *missing* on the device travel as ``rows``; where the others
lie goes with them (``row_positions``, 4 bytes each), and in backward only the *overflow* that was not kept travels
again. With gradients on the device, ``row_gradients`` are the overflow's alone, and the sums of the rows *kept* travel
once per optimizer step: ``window_gradients``, ``2D*e`` each.

Hot rows are on the device for good: they are never missing, and neither they nor their gradients travel in a step; only
their places go with the others. Once per optimizer step the host is told all their keys, by which it chooses rows
(``hot_keys``, ``4*D`` each of the ``H`` per layer), and the squared norm of their gradients (``hot_norm``, 8 bytes).

With token chunks (:mod:`meft.planner.traffic.chunks`) every layer's hidden state goes, ``A_l`` are sums over a layer's
chunks, and of a chunk only rows travel that the chunk before (in backward, the next) does not have; the places of the
others go with them.

Where several ranks train together all of this is over the link of each, and with Key-Experts the routers' gradients go
to the host in every step and their sums come back once per optimizer step: ``router_gradients``, ``L * N*D*4`` either
way. They are summed there, in the order of ranks. What goes between machines: :mod:`meft.planner.traffic.network`.

Letters: ``T`` tokens, ``L`` layers, ``D`` hidden size, ``R`` adapter rows per layer, ``A_l`` active rows of layer
``l``, ``P`` probes, ``p`` prefetch depth. Active rows are ``[L]`` for one decision, ``[L, candidates]`` for many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.quantities import (
    ADAPTER_DTYPE_BYTES,
    COMPUTE_DTYPE_BYTES,
    INDEX_BYTES,
    MASTER_BYTES,
    Flags,
    Ints,
)
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Decision, Direction, Request, Transfer, TransferEntry
from meft.planner.traffic.hot_rows import HOT_NORM_BYTES, hot_key_bytes
from meft.planner.traffic.network import BECAUSE, expected_use, network_bytes
from meft.planner.traffic.sharding import WEIGHTS, gathered_bytes_of

Categories: TypeAlias = dict[tuple[Direction, str], Ints]
"""Bytes by direction and category."""

LOSS_BYTES = 4
NORM_BYTES = 4
INPUT_TENSORS = 2  # input_ids and labels; padding is on the right, so no attention mask is needed
_TOKEN_BYTES = 8  # int64

_BECAUSE = {
    "inputs": "token ids and labels, int64",
    "queries": "hidden states sent to the host to choose rows: one per layer, less the last p that look-ahead serves",
    "probes": "int32 index of each probed expert, per token and layer",
    "rows": "keys and values of the active rows, forward; of those that are not on the device already",
    "row_positions": "int32 place of each active row that is on the device already",
    "row_experts": "int32 expert of each active row, forward",
    "rows_refetched": "active rows again in backward, except those of the last p+1 layers, still in the ring",
    "row_gradients": "gradients of keys and values of the active rows",
    "window_gradients": "gradients summed on the device over the accumulation window",
    "loss": "the loss, one fp32 number",
    "hot_keys": "keys of the hot rows, which the device updates and the host chooses by, fp32",
    "hot_norm": "squared norm of the hot rows' gradients, one fp64 number for global clipping",
    "router_gradients": "several ranks: the routers' gradients, fp32, to be summed on the host, and the sums",
    "router_norm": "squared norm of the routers' gradients, one fp32 number for global clipping",
    "weights": "sharded base: what one card gathers of the layers' weights from the others, and sends as well",
}


def input_bytes(*, tokens: Ints) -> Ints:
    """What a micro-batch brings: ids and labels."""
    return INPUT_TENSORS * _TOKEN_BYTES * tokens


def query_bytes(*, tokens: Ints, hidden_size: Ints, compute_dtype_bytes: Ints) -> Ints:
    """One layer's hidden state ``[T, D]``."""
    return tokens * hidden_size * compute_dtype_bytes


def layers_queried(*, num_layers: Ints, prefetch_depth: Ints, token_chunks: int = 1) -> Ints:
    """Layers whose hidden state goes to the host: ``L - p``, and never less than layer 0; all where tokens come in
    chunks, which look ahead within their layer."""
    queried = np.maximum(num_layers - prefetch_depth, 1) if token_chunks == 1 else num_layers
    return int(queried) if np.ndim(queried) == 0 else queried


def probe_bytes(*, tokens: Ints, num_probes: Ints) -> Ints:
    """One layer's probed experts, int32 ``[T, P]``."""
    return tokens * num_probes * INDEX_BYTES


def row_bytes(*, active_rows: Ints, hidden_size: Ints, adapter_dtype_bytes: Ints) -> Ints:
    """Rows, or gradients of rows, ``[A, 2D]``."""
    return active_rows * 2 * hidden_size * adapter_dtype_bytes


def row_expert_bytes(*, active_rows: Ints) -> Ints:
    """Expert ids of rows, int32 ``[A]``."""
    return active_rows * INDEX_BYTES


def refetched_rows(*, active_rows: NDArray[np.int64], prefetch_depth: Ints, refetched: Flags) -> Ints:
    """Rows that travel again in backward: those of layers ``l < L-1-p``, summed; 0 where rows are retained.

    ``active_rows`` is ``[L, ...]``.
    """
    num_layers = active_rows.shape[0]
    layers = np.arange(num_layers).reshape(-1, *(1,) * (active_rows.ndim - 1))
    left_the_ring = (layers < num_layers - 1 - prefetch_depth) & refetched
    rows = np.where(left_the_ring, active_rows, 0).sum(axis=0)
    return int(rows) if rows.ndim == 0 else rows


def router_gradient_bytes(
    *, num_layers: Ints, num_experts: Ints, hidden_size: Ints, key_experts: Flags, ranks: int
) -> Ints:
    """The routers' gradients, fp32 ``[N, D]`` per layer, one way; none for one rank, whose device keeps them."""
    return (ranks > 1) * key_experts * num_layers * num_experts * hidden_size * MASTER_BYTES


def router_gradients_of(request: Request, decision: Decision) -> int:
    """The same of a decision."""
    return int(_router_gradients(request, Candidates.of(decision)))


def _router_gradients(request: Request, candidates: Candidates) -> Ints:
    shape = request.model
    return router_gradient_bytes(
        num_layers=shape.num_layers,
        num_experts=candidates.router_rows,
        hidden_size=shape.hidden_size,
        key_experts=candidates.key_experts,
        ranks=request.ranks,
    )


def whole_adapter_bytes(*, num_layers: Ints, adapter_width: Ints, hidden_size: Ints, adapter_dtype_bytes: Ints) -> Ints:
    """Moving all ``M = 2*R*D*L`` numbers of the adapter to the device and their gradients back, once per step."""
    return (
        2
        * num_layers
        * row_bytes(active_rows=adapter_width, hidden_size=hidden_size, adapter_dtype_bytes=adapter_dtype_bytes)
    )


@dataclass(frozen=True, eq=False, repr=False)
class StepRows:
    """Active rows of a micro-batch, and which of them are where; all ``[L, ...]``.

    Without cached rows all but the hot ones are missing, and overflow: so they are where nothing else is given.
    """

    active: NDArray[np.int64]
    missing: NDArray[np.int64] | None = None
    overflow: NDArray[np.int64] | None = None
    hot: NDArray[np.int64] | None = None


def step_bytes_by_category(*, request: Request, candidates: Candidates, rows: StepRows) -> Categories:
    """Every category of a step, zeros included."""
    cold_rows = rows.active if rows.hot is None else rows.active - rows.hot
    missing_rows = cold_rows if rows.missing is None else rows.missing
    overflow_rows = cold_rows if rows.overflow is None else rows.overflow
    prefetch_depth, key_experts = candidates.prefetch_depth, candidates.key_experts
    num_layers, hidden_size, tokens = request.model.num_layers, request.model.hidden_size, request.tokens_per_step
    row_dtype, query_dtype = ADAPTER_DTYPE_BYTES[request.adapter_dtype], COMPUTE_DTYPE_BYTES[request.weights_dtype]
    active: Ints = rows.active.sum(axis=0)
    missing: Ints = missing_rows.sum(axis=0)
    overflow: Ints = overflow_rows.sum(axis=0)
    again = overflow  # of chunks, counted where the ring is known
    if candidates.token_chunks == 1:
        again = refetched_rows(active_rows=overflow_rows, prefetch_depth=prefetch_depth, refetched=candidates.refetched)
    cold: Ints = cold_rows.sum(axis=0)
    gradients: Ints = cold + (overflow - cold) * candidates.gradients_on_device
    query = query_bytes(tokens=tokens, hidden_size=hidden_size, compute_dtype_bytes=query_dtype)
    queried = layers_queried(num_layers=num_layers, prefetch_depth=prefetch_depth, token_chunks=candidates.token_chunks)
    return {
        ("h2d", "inputs"): input_bytes(tokens=tokens),
        ("h2d", "rows"): row_bytes(active_rows=missing, hidden_size=hidden_size, adapter_dtype_bytes=row_dtype),
        ("h2d", "row_positions"): (active - missing) * INDEX_BYTES,
        ("h2d", "row_experts"): row_expert_bytes(active_rows=active) * key_experts,
        ("h2d", "rows_refetched"): row_bytes(active_rows=again, hidden_size=hidden_size, adapter_dtype_bytes=row_dtype),
        ("d2h", "queries"): queried * query,
        ("d2h", "probes"): num_layers * probe_bytes(tokens=tokens, num_probes=candidates.num_probes) * key_experts,
        ("d2h", "row_gradients"): row_bytes(
            active_rows=gradients, hidden_size=hidden_size, adapter_dtype_bytes=row_dtype
        ),
        ("d2h", "router_gradients"): _router_gradients(request, candidates),
        ("d2h", "loss"): LOSS_BYTES,
    }


def step_bytes(categories: Categories) -> tuple[Ints, Ints]:
    """``(h2d, d2h)`` bytes of :func:`step_bytes_by_category`."""
    h2d: Ints = sum(size for (direction, _), size in categories.items() if direction == "h2d")
    d2h: Ints = sum(size for (direction, _), size in categories.items() if direction == "d2h")
    return h2d, d2h


def optimizer_step_bytes(
    *, key_experts: Flags, window_gradients: Ints = 0, hot_keys: Ints = 0, router_gradients: Ints = 0
) -> dict[tuple[Direction, str], Ints]:
    """Bytes of one optimizer step by category, zeros included; all but the first in bytes."""
    return {
        ("h2d", "router_gradients"): router_gradients,
        ("d2h", "router_norm"): NORM_BYTES * key_experts,
        ("d2h", "window_gradients"): window_gradients,
        ("d2h", "hot_keys"): hot_keys,
        ("d2h", "hot_norm"): HOT_NORM_BYTES * (hot_keys > 0),
    }


def hot_keys_of(*, request: Request, decision: Decision) -> int:
    """The hot rows' keys that go to the host once per window, in bytes."""
    shape = request.model
    keys = hot_key_bytes(num_layers=shape.num_layers, hidden_size=shape.hidden_size, hot_rows=decision.hot_rows)
    return int(keys)


def window_gradient_bytes(*, request: Request, decision: Decision, kept_rows_per_layer: Sequence[int]) -> int:
    """The gradient sums that leave the device once per window."""
    rows = sum(kept_rows_per_layer) if decision.gradients_on_device else 0
    e = ADAPTER_DTYPE_BYTES[request.adapter_dtype]
    return int(row_bytes(active_rows=rows, hidden_size=request.model.hidden_size, adapter_dtype_bytes=e))


def window_bytes(
    *,
    request: Request,
    candidates: Candidates,
    rows: StepRows,
    kept_rows: NDArray[np.int64] | None = None,
) -> Ints:
    """Both directions of a rank's accumulation window, its optimizer step included, for the search; rows ``[L, ...]``.

    ``kept_rows`` are those that the window keeps on the device.
    """
    num_layers, hidden_size = request.model.num_layers, request.model.hidden_size
    categories = step_bytes_by_category(request=request, candidates=candidates, rows=rows)
    summed: Ints = 0 if kept_rows is None else kept_rows.sum(axis=0) * candidates.gradients_on_device
    e = ADAPTER_DTYPE_BYTES[request.adapter_dtype]
    sums = row_bytes(active_rows=summed, hidden_size=hidden_size, adapter_dtype_bytes=e)
    keys = hot_key_bytes(num_layers=num_layers, hidden_size=hidden_size, hot_rows=candidates.hot_rows)
    step = step_bytes(categories)
    once = step_bytes(
        optimizer_step_bytes(
            key_experts=candidates.key_experts,
            window_gradients=sums,
            hot_keys=keys,
            router_gradients=_router_gradients(request, candidates),
        )
    )
    total: Ints = request.rounds * (step[0] + step[1]) + once[0] + once[1]
    return total


def expected_step_bytes(
    *,
    request: Request,
    decision: Decision,
    active_rows_per_layer: Sequence[int],
    missing_rows_per_layer: Sequence[int] = (),
    overflow_rows_per_layer: Sequence[int] = (),
    hot_rows_per_layer: Sequence[int] = (),
) -> tuple[int, int]:
    """``(h2d, d2h)`` bytes of one micro-batch that activated these rows: what the runtime's counters must show.

    With cached rows, of which those missing travelled, and the overflow was not kept; and with hot ones among them.
    """
    rows = (active_rows_per_layer, missing_rows_per_layer, overflow_rows_per_layer, hot_rows_per_layer)
    categories = _decided(request, decision, *rows)
    h2d, d2h = step_bytes(categories)
    return int(h2d), int(d2h)


def step_transfer(
    *,
    request: Request,
    decision: Decision,
    active_rows_per_layer: Sequence[int],
    missing_rows_per_layer: Sequence[int] = (),
    overflow_rows_per_layer: Sequence[int] = (),
    kept_rows_per_layer: Sequence[int] = (),
    hot_rows_per_layer: Sequence[int] = (),
    window_rows_per_layer: Sequence[int] = (),
) -> Transfer:
    """The ledger of a decision, without the categories that carry nothing; rows as :func:`expected_step_bytes`.

    ``window_rows_per_layer`` are those that a window touches; several machines need them.
    """
    rows = (active_rows_per_layer, missing_rows_per_layer, overflow_rows_per_layer, hot_rows_per_layer)
    categories = _decided(request, decision, *rows)
    h2d, d2h = step_bytes(categories)
    once = optimizer_step_bytes(
        key_experts=decision.needs.gated,
        window_gradients=window_gradient_bytes(
            request=request, decision=decision, kept_rows_per_layer=kept_rows_per_layer
        ),
        hot_keys=hot_keys_of(request=request, decision=decision),
        router_gradients=router_gradients_of(request, decision),
    )
    optimizer_h2d, optimizer_d2h = step_bytes(once)
    whole = whole_adapter_bytes(
        num_layers=request.model.num_layers,
        adapter_width=decision.adapter_width,
        hidden_size=request.model.hidden_size,
        adapter_dtype_bytes=ADAPTER_DTYPE_BYTES[request.adapter_dtype],
    )
    network = _network(
        request,
        decision,
        gradient_rows=int(categories["d2h", "row_gradients"]) // _bytes_of_a_row(request),
        kept_rows=sum(kept_rows_per_layer),
        window_rows=sum(window_rows_per_layer),
        fetched_rows=sum(int(categories["h2d", name]) for name in ("rows", "rows_refetched"))
        // _bytes_of_a_row(request),
    )
    cards = _cards(request, decision)
    return Transfer(
        entries=(*_entries(categories, "step"), *_entries(once, "optimizer_step"), *network, *cards),
        cards_bytes_per_step=sum(entry.num_bytes for entry in cards),
        network_bytes_per_step=sum(entry.num_bytes for entry in network if entry.per == "step"),
        network_bytes_per_optimizer_step=sum(entry.num_bytes for entry in network if entry.per == "optimizer_step"),
        h2d_bytes_per_step=int(h2d),
        d2h_bytes_per_step=int(d2h),
        h2d_bytes_per_optimizer_step=int(optimizer_h2d),
        d2h_bytes_per_optimizer_step=int(optimizer_d2h),
        whole_adapter_offload_ratio=float(whole / (h2d + d2h + (optimizer_h2d + optimizer_d2h) / request.rounds)),
    )


def _bytes_of_a_row(request: Request) -> int:
    e = ADAPTER_DTYPE_BYTES[request.adapter_dtype]
    return int(row_bytes(active_rows=1, hidden_size=request.model.hidden_size, adapter_dtype_bytes=e))


def _network(request: Request, decision: Decision, **rows: int) -> tuple[TransferEntry, ...]:
    """Between machines: a micro-batch's share of a window's steps, and what the window's end costs; ``rows`` as
    :func:`~meft.planner.traffic.network.expected_use` has them."""
    use = expected_use(request, decision, **rows)
    divisors = {"step": request.grad_accum, "optimizer_step": 1}
    return tuple(
        TransferEntry(
            direction="network", category=name, per=per, num_bytes=round(size / divisors[per]), because=BECAUSE[name]
        )
        for (name, per), size in network_bytes(request, decision, use).items()
        if size
    )


def _cards(request: Request, decision: Decision) -> tuple[TransferEntry, ...]:
    """Between a machine's cards: weights, where the base is sharded."""
    received = gathered_bytes_of(request, decision)
    if not received:
        return ()
    because = "sharded base: what one card gathers of the layers' weights from the others, and sends as well"
    return (TransferEntry(direction="cards", category=WEIGHTS, per="step", num_bytes=received, because=because),)


def _entries(categories: Categories, per: Literal["step", "optimizer_step"]) -> tuple[TransferEntry, ...]:
    """Those that carry something."""
    return tuple(
        TransferEntry(direction=direction, category=name, per=per, num_bytes=int(num_bytes), because=_BECAUSE[name])
        for (direction, name), num_bytes in categories.items()
        if num_bytes
    )


def _decided(
    request: Request,
    decision: Decision,
    active: Sequence[int],
    missing: Sequence[int],
    overflow: Sequence[int],
    hot: Sequence[int],
) -> Categories:
    for name, rows in {"active": active, "missing": missing, "overflow": overflow, "hot": hot}.items():
        if len(rows) != request.model.num_layers and (rows or name == "active"):
            raise ValueError(f"{name} rows are given for {len(rows)} layers, the model has {request.model.num_layers}")
    rows_of = StepRows(
        active=np.array(active, dtype=np.int64),
        missing=np.array(missing, dtype=np.int64) if missing else None,
        overflow=np.array(overflow, dtype=np.int64) if overflow else None,
        hot=np.array(hot, dtype=np.int64) if hot else None,
    )
    return step_bytes_by_category(request=request, candidates=Candidates.of(decision), rows=rows_of)
