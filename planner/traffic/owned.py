"""Bytes between machines that own rows: what a rank asks their owners for, and what comes back.

Machine ``m`` owns the ``m``-th part of every layer's rows. For a layer each rank tells its mates (the ranks with its
place on the other machines) how many tokens it has, an int64, and sends each of them all hidden states and int32
probes; back come the fp32 scores of the probed experts that they own. Then go an int64 count and the int64 numbers of
the rows that it wants, in forward and where rows are fetched again, and the rows in the adapter's dtype come back. Row
gradients go to the owner as where all machines have all rows; instead of sums, each row's fp64 square goes to all at a
window's end. With centroids each rank gives its mates the means of its machine's experts, fp32, once per window.

Letters: as in :mod:`meft.planner.traffic.network`; ``T`` tokens, ``P`` probes, ``p`` prefetch depth.
"""

from __future__ import annotations

from typing import Literal

from meft.planner.base.quantities import (
    ADAPTER_DTYPE_BYTES,
    COMPUTE_DTYPE_BYTES,
    INDEX_BYTES,
    MASTER_BYTES,
    Flags,
    Ints,
    smaller,
)
from meft.planner.records.plan import Decision, Request

COUNT_BYTES = 8
"""Of a row's number, and of a count, between machines."""
SQUARE_BYTES = 8


def asked_token_bytes(*, hidden_size: int, num_probes: Ints, compute_dtype_bytes: int) -> Ints:
    """A token on its way to a machine that may own rows of its experts: hidden state and probes."""
    return hidden_size * compute_dtype_bytes + num_probes * INDEX_BYTES


def pair_bytes(*, rows_per_expert: Ints) -> Ints:
    """Scores of a token with an expert's rows."""
    return rows_per_expert * MASTER_BYTES


def asked_row_bytes(*, hidden_size: int, adapter_dtype_bytes: int) -> int:
    """A row that another machine owns: its number there, and the row back."""
    return COUNT_BYTES + 2 * hidden_size * adapter_dtype_bytes


def fetches_per_round(decision: Decision, num_layers: int) -> int:
    """How often rows are asked for: for each layer, and again in backward for those that have left the ring."""
    again = max(num_layers - min(decision.prefetch_depth, num_layers - 1) - 1, 0)
    return num_layers + again * (decision.rows_in_backward == "refetched")


def owned_bytes(
    request: Request,
    decision: Decision,
    *,
    rounds: int,
    windows: int,
    steps: int,
    asked_rows: int,
    scored_pairs: int,
) -> dict[tuple[str, Literal["step", "optimizer_step"]], int]:
    """All machines together, by category, over so many rounds, windows and micro-batches (``steps``)."""
    machines, ranks, num_layers = request.nodes, request.gpus, request.model.num_layers
    others, hidden_size = machines - 1, request.model.hidden_size
    counts = rounds * machines * ranks * others * COUNT_BYTES
    token = asked_token_bytes(
        hidden_size=hidden_size,
        num_probes=decision.num_probes,
        compute_dtype_bytes=COMPUTE_DTYPE_BYTES[request.weights_dtype],
    )
    row = asked_row_bytes(hidden_size=hidden_size, adapter_dtype_bytes=ADAPTER_DTYPE_BYTES[request.adapter_dtype])
    means = decision.needs.means * ranks * decision.num_experts * hidden_size * MASTER_BYTES
    queries = steps * others * request.tokens_per_step * int(token)
    return {
        ("queries", "step"): num_layers * (counts + queries),
        ("scores", "step"): scored_pairs * int(pair_bytes(rows_per_expert=_rows_per_expert(decision))),
        ("rows", "step"): fetches_per_round(decision, num_layers) * counts + asked_rows * row,
        ("row_squares", "optimizer_step"): windows * num_layers * others * decision.adapter_width * SQUARE_BYTES,
        ("router_means", "optimizer_step"): windows * num_layers * others * means,
    }


def _rows_per_expert(decision: Decision) -> int:
    return decision.adapter_width // decision.num_experts


def owner_buffer_bytes(
    *,
    machines: int,
    tokens: int,
    num_probes: Ints,
    num_experts: Ints,
    active_rows_cap: Ints,
    adapter_width: Ints,
    hidden_size: int,
    adapter_dtype_bytes: int,
    compute_dtype_bytes: int,
    means: Flags,
) -> Ints:
    """What a rank asks and answers from: queries, scores, rows, and with centroids means, each way."""
    others = machines - 1
    token = asked_token_bytes(hidden_size=hidden_size, num_probes=num_probes, compute_dtype_bytes=compute_dtype_bytes)
    pairs = tokens * num_probes * pair_bytes(rows_per_expert=adapter_width // num_experts)
    answered = others * smaller(active_rows_cap, adapter_width // machines)
    row = asked_row_bytes(hidden_size=hidden_size, adapter_dtype_bytes=adapter_dtype_bytes)
    of_means = 2 * others * means * (num_experts // machines) * hidden_size * MASTER_BYTES
    found: Ints = 2 * others * tokens * token + (others + 1) * pairs + (active_rows_cap + answered) * row + of_means
    return found
