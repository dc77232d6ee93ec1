"""Bytes between machines that each hold all rows: gradients to whoever adds a row up, sums back, and what is told.
What is otherwise where machines own rows: :mod:`meft.planner.traffic.owned`.

Rank ``i`` of machine ``m`` adds up part ``m`` of the rows of range ``i``. After every message it sends its mates, the
ranks ``i`` of the other machines, what the machine's landings hold of their parts: a row is its int64 number and its
gradient in the adapter's dtype, and before them go ``N`` int64 counts. At a window's end it sends each mate the touched
rows of its part with their fp32 sums, after one count. With Key-Experts the routers' gradients go the same way, all of
them; and in each round the machines' first ranks tell each other every rank's loss and wish to stop, 16 bytes a rank.

All is counted where it is sent, over all machines together. Headers of the network itself are not.

Letters: ``M`` machines, ``N`` ranks on each, ``W = M * N``, ``L`` layers, ``D`` hidden size, ``R`` adapter rows per
layer, ``E`` experts. A *round* is one micro-batch of each rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from meft.planner.base.quantities import ADAPTER_DTYPE_BYTES, MASTER_BYTES, Ints
from meft.planner.records.plan import Decision, Request
from meft.planner.traffic.owned import COUNT_BYTES, SQUARE_BYTES, owned_bytes

TOLD_BYTES = 16
"""A rank's loss and its wish to stop, fp64 each."""

NetworkCategories: TypeAlias = dict[tuple[str, Literal["step", "optimizer_step"]], int]
"""Bytes by category and by what they belong to."""

BECAUSE = {
    "row_gradients": "several machines: gradients of rows that another machine adds up, with their numbers",
    "row_sums": "several machines: the window's touched rows and their sums, to every other machine",
    "router_gradients": "several machines: the routers' gradients to the machine that adds them up",
    "router_sums": "several machines: sums of the routers' gradients, to every other machine",
    "rounds": "several machines: every rank's loss, and whether it was asked to stop",
    "queries": "rows owned by machines: hidden states and probed experts, to the rows' owners",
    "scores": "rows owned by machines: scores of the probed experts' rows, from their owners",
    "rows": "rows owned by machines: numbers of active rows to their owners, and the rows from them",
    "row_squares": "rows owned by machines: each row's gradient's sum of squares, to every machine",
    "router_means": "rows owned by machines: means of each machine's experts' keys, to the others",
}


@dataclass(frozen=True)
class NetworkUse:
    """What machines did together: so many rounds and windows, and the rows that crossed, over all layers."""

    rounds: int
    windows: int
    foreign_rows: int
    """Of all messages, those that another machine adds up."""
    summed_rows: int
    """Touched in a window, added over windows."""
    steps: int = 0
    """Micro-batches; this and what follows is of rows that machines own."""
    asked_rows: int = 0
    """That other machines sent."""
    scored_pairs: int = 0
    """Of a token and an expert whose rows another machine scored."""


def foreign_row_bytes(*, hidden_size: int, adapter_dtype_bytes: int) -> int:
    """A row on its way to who adds it up: number and gradient."""
    return COUNT_BYTES + 2 * hidden_size * adapter_dtype_bytes


def summed_row_bytes(*, hidden_size: int) -> int:
    """A touched row on its way to another machine: number and fp32 sum."""
    return COUNT_BYTES + 2 * hidden_size * MASTER_BYTES


def messages_per_window(decision: Decision) -> int:
    """Of a layer, beside one for each micro-batch: those with sums that were made on the device."""
    return -(-decision.cached_rows // decision.active_rows_cap) if decision.gradients_on_device else 0


def network_bytes(request: Request, decision: Decision, use: NetworkUse) -> NetworkCategories:
    """All machines together, by category; nothing for one machine."""
    machines, ranks, num_layers = request.nodes, request.gpus, request.model.num_layers
    if machines == 1:
        return {}
    others, hidden_size = machines - 1, request.model.hidden_size
    routers = num_layers * decision.needs.router_rows(decision.num_experts) * hidden_size * MASTER_BYTES
    messages = num_layers * (use.rounds + use.windows * messages_per_window(decision))
    counts = machines * ranks * others * ranks * COUNT_BYTES
    row = foreign_row_bytes(hidden_size=hidden_size, adapter_dtype_bytes=ADAPTER_DTYPE_BYTES[request.adapter_dtype])
    return {
        ("row_gradients", "step"): messages * counts + use.foreign_rows * row,
        **_of_rows(request, decision, use),
        ("router_gradients", "step"): (routers > 0) * use.rounds * (counts + ranks * others * routers),
        ("router_sums", "optimizer_step"): use.windows * others * routers,
        ("rounds", "step"): use.rounds * machines * others * ranks * TOLD_BYTES,
    }


def _of_rows(request: Request, decision: Decision, use: NetworkUse) -> NetworkCategories:
    """What goes besides gradients: sums to all machines, or rows from their owners."""
    if decision.rows == "owned":
        return owned_bytes(
            request,
            decision,
            rounds=use.rounds,
            windows=use.windows,
            steps=use.steps,
            asked_rows=use.asked_rows,
            scored_pairs=use.scored_pairs,
        )
    others = request.nodes - 1
    counts = request.ranks * request.model.num_layers * others * COUNT_BYTES * use.windows
    row = summed_row_bytes(hidden_size=request.model.hidden_size)
    return {("row_sums", "optimizer_step"): counts + use.summed_rows * others * row}


def expected_use(
    request: Request,
    decision: Decision,
    *,
    gradient_rows: int,
    kept_rows: int,
    window_rows: int,
    fetched_rows: int = 0,
) -> NetworkUse:
    """Of one window: of the rows whose gradients leave a device (``gradient_rows`` in a micro-batch, ``kept_rows`` more
    of each rank at the end where sums are made there) all but a machine's share are another's to add up; and of those
    ``fetched_rows`` that a micro-batch brings, in forward and again, and of what its tokens probe, another's to give.
    """
    sent = request.grad_accum * gradient_rows + request.ranks * kept_rows * decision.gradients_on_device
    foreign = round(sent * foreign_share(request.nodes))
    use = NetworkUse(rounds=request.rounds, windows=1, foreign_rows=foreign, summed_rows=window_rows)
    if decision.rows != "owned":
        return use
    share, pairs = foreign_share(request.nodes), request.model.num_layers * request.tokens_per_step
    return replace(
        use,
        summed_rows=0,
        steps=request.grad_accum,
        asked_rows=round(request.grad_accum * fetched_rows * share),
        scored_pairs=round(request.grad_accum * pairs * decision.num_probes * share),
    )


def foreign_share(machines: int) -> float:
    """Of rows spread evenly, those that another machine adds up: ``(M - 1) / M``."""
    return (machines - 1) / machines


def buffer_bytes_per_rank(
    *,
    machines: int,
    ranks: int,
    slots: Ints,
    active_rows_cap: Ints,
    adapter_width: Ints,
    hidden_size: int,
    adapter_dtype_bytes: int,
    router_numbers: Ints,
    owned: bool = False,
) -> Ints:
    """What a rank sends from and receives in: rows of ``slots`` messages, touched rows of a part (or, of rows that
    machines own, their squares), routers' numbers."""
    others, world = machines - 1, machines * ranks
    largest: Ints = -(-adapter_width // world)
    smaller: Ints = active_rows_cap + (largest - active_rows_cap) * (largest < active_rows_cap)
    row = foreign_row_bytes(hidden_size=hidden_size, adapter_dtype_bytes=adapter_dtype_bytes)
    messages: Ints = slots * 2 * others * ranks * smaller * row
    of_a_sum = SQUARE_BYTES if owned else summed_row_bytes(hidden_size=hidden_size)
    sums: Ints = 2 * others * largest * of_a_sum
    routers: Ints = 2 * others * (ranks + 1) * -(-router_numbers // world) * MASTER_BYTES
    return messages + sums + routers
