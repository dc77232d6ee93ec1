"""Rows of a micro-batch in token chunks: each chunk has a union of its own, and shares rows with its neighbours.

With ``u(t)`` the rows that ``t`` tokens activate (:mod:`meft.planner.traffic.sparsity`), a chunk of ``T/C`` tokens
activates ``A = u(T/C)``, and two neighbours together ``u(2T/C)``, so that ``M = 2*A - u(2T/C)`` rows are both's. They
stay on the device from one to the next. Over a layer's ``C`` chunks, in forward,

    active   C*A              missing   C*A - (C-1)*M

and in backward, where the last ``s`` chunks of all ``L*C`` are still in the ring and chunks come in the opposite order,
those of the others travel again that the next chunk of the layer does not have: ``A - M`` of each, but all ``A`` of a
layer's last chunk.

Letters: ``T`` tokens, ``C`` chunks, ``L`` layers, ``A`` active rows of a chunk, ``s`` ring slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.quantities import Ints, chunk_tokens
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Decision, Request, Sparsity
from meft.planner.records.profiles import SparsityProfile
from meft.planner.traffic.sparsity import (
    active_rows_per_layer,
    at_seq_len,
    capped,
    expected_active_rows,
    highest_active_rows,
    spread_at,
)


@dataclass(frozen=True, eq=False, repr=False)
class ChunkRows:
    """Of one chunk in each layer, ``[L, ...]``: active rows, and those that its neighbour has too."""

    active: NDArray[np.int64]
    shared: NDArray[np.int64]


def chunk_ring_slots(*, prefetch_depth: Ints, num_layers: int) -> Ints:
    """Chunks whose rows are on the device: ``max(p, 1) + 1``, one beside that in use for what both have."""
    slots = np.maximum(np.minimum(prefetch_depth, num_layers - 1), 1) + 1
    return int(slots) if np.ndim(slots) == 0 else slots


def chunk_rows(
    profile: SparsityProfile, num_layers: int, *, tokens: int, token_chunks: int, candidates: Candidates
) -> ChunkRows:
    """What the profile expects of a micro-batch's ``tokens`` in chunks, under the candidates' caps."""
    size = chunk_tokens(tokens, token_chunks)

    def union(some: int) -> NDArray[np.int64]:
        return active_rows_per_layer(
            profile,
            num_layers,
            tokens=some,
            top_k=candidates.top_k,
            adapter_width=candidates.adapter_width,
            key_experts=candidates.key_experts,
        )

    active = np.minimum(union(size), candidates.active_rows_cap)
    return ChunkRows(active, np.clip(2 * active - union(2 * size), 0, active))


def summed(rows: ChunkRows, *, token_chunks: int, prefetch_depth: Ints) -> tuple[NDArray[np.int64], ...]:
    """Active, missing, and travelling again in backward, ``[L, ...]`` over a layer's chunks."""
    num_layers, alone = rows.active.shape[0], rows.active - rows.shared
    slots = chunk_ring_slots(prefetch_depth=prefetch_depth, num_layers=num_layers)
    axes = max(rows.active.ndim - 1, np.ndim(slots))
    first = (np.arange(num_layers) * token_chunks).reshape(-1, *(1,) * axes)
    again = np.clip(num_layers * token_chunks - slots - first, 0, token_chunks)
    active, missing = token_chunks * rows.active, rows.active + (token_chunks - 1) * alone
    return active, missing, again * alone + (again == token_chunks) * rows.shared


def predict_chunked_sparsity(profile: SparsityProfile, *, request: Request, decision: Decision) -> Sparsity:
    """Active rows summed over a micro-batch's chunks, per layer, and those of a window; ``quantile_rows`` are of one
    chunk, which is what the cap holds. Rows are chosen from their own hidden states: recall is 1."""
    profile_here = at_seq_len(profile, request.seq_len)
    num_layers, chunks = request.model.num_layers, decision.token_chunks
    candidates = Candidates.of(decision)
    rows = chunk_rows(
        profile_here, num_layers, tokens=request.tokens_per_step, token_chunks=chunks, candidates=candidates
    )
    active, missing, again = summed(rows, token_chunks=chunks, prefetch_depth=decision.prefetch_depth)
    window = expected_active_rows(profile, request=request, decision=decision, micro_batches=request.grad_accum)
    window = capped(window, cap=decision.active_rows_cap * chunks * request.grad_accum)
    uncapped = active_rows_per_layer(
        profile_here,
        num_layers,
        tokens=chunk_tokens(request.tokens_per_step, chunks),
        top_k=decision.top_k,
        adapter_width=decision.adapter_width,
        key_experts=decision.needs.gated,
    )
    quantile = request.active_rows_quantile
    spread = spread_at(profile.spread_fraction, quantile=quantile)
    highest = highest_active_rows(active_rows=uncapped, spread_fraction=spread, adapter_width=decision.adapter_width)
    return Sparsity(
        quantile=quantile,
        quantile_rows_per_layer=tuple(np.asarray(highest).tolist()),
        active_rows_per_layer=tuple(active.tolist()),
        window_active_rows_per_layer=tuple(window.tolist()),
        missing_rows_per_layer=tuple(missing.tolist()),
        overflow_rows_per_layer=tuple(again.tolist()),
        prefetch_recall=1.0,
        basis=profile.basis,
    )
