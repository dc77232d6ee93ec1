"""The search among decisions with token chunks: for a request that asks for them, and where without them nothing fits.

Every number of chunks is a grid of its own (:mod:`meft.planner.search.weighing`), of which the objective's best that
the device holds is taken; of those the objective's best again. Rows of one chunk are fetched while the one before is
computed: the slot that takes them is there in any case.
"""

from __future__ import annotations

import math

from meft.planner.base.errors import UsageError
from meft.planner.memory.replayed import replayed_peaks
from meft.planner.predict.prediction import ProfileSet
from meft.planner.records.plan import Decision, Request
from meft.planner.records.routing import ROUTINGS
from meft.planner.search.fitting import Fitting, best_fitting
from meft.planner.search.weighing import Weighed, weigh
from meft.planner.terms.activations import norms_after_ffn

Index = tuple[int, ...]

LEAST_CHUNK_TOKENS = 256
"""Chunks that nobody asked for are no shorter: what a batch of the paper's has in one sequence."""


def check_chunks(request: Request) -> None:
    """Refuse a request for token chunks that contradicts itself, or that no runtime carries out."""
    chunks, tokens = request.token_chunks or 1, request.tokens_per_step
    if chunks == 1:
        return
    if tokens % chunks:
        near = max(count for count in range(1, chunks) if tokens % count == 0)
        raise UsageError(
            f"token_chunks {chunks}: the {tokens} tokens of a micro-batch (batch_size x seq_len) do not divide into as "
            f"many; give {near}, say"
        )
    if request.routing is not None and (ROUTINGS[request.routing].means or ROUTINGS[request.routing].one_expert):
        raise UsageError(
            f"routing {request.routing} beside token_chunks {chunks}: it chooses for whole micro-batches; give exact "
            f"or key-experts"
        )
    if request.hot_rows:
        raise UsageError(f"hot_rows {request.hot_rows} beside token_chunks {chunks}: give one of them")
    if request.rows_in_backward == "retained":
        raise UsageError(
            f"rows_in_backward retained beside token_chunks {chunks}: it would keep every chunk's rows; give refetched"
        )
    if request.ranks > 1:
        raise UsageError(f"token_chunks {chunks}: several devices do not take them yet; it goes with gpus 1")
    if request.model.measured is not None:
        raise UsageError(
            f"token_chunks {chunks}: the memory of {request.model.name} is known from traces of whole micro-batches; "
            f"it goes with the families that have a closed form"
        )
    if norms_after_ffn(request.model) and request.activation_checkpointing:
        raise UsageError(
            f"token_chunks {chunks}: {request.model.name} has a norm behind its FFN, so that activation checkpointing "
            f"computes the adapter again, without its rows; leave one of them out"
        )


def may_chunk(request: Request) -> bool:
    """Whether chunks may be tried though nobody asked for them."""
    try:
        check_chunks(request.model_copy(update={"token_chunks": _smallest_count(request)}))
    except UsageError:
        return False
    return request.token_chunks is None and _smallest_count(request) > 1


def _smallest_count(request: Request) -> int:
    counts = chunk_counts(request)
    return counts[0] if counts else 1


def chunk_counts(request: Request) -> tuple[int, ...]:
    """Numbers of chunks to try: the one asked for, or powers of two."""
    if request.token_chunks is not None:
        return (request.token_chunks,)
    tokens = request.tokens_per_step
    most = max(tokens // LEAST_CHUNK_TOKENS, 1)
    counts = (1 << power for power in range(1, most.bit_length()))
    return tuple(count for count in counts if tokens % count == 0)


def fitting_chunked(request: Request, profiles: ProfileSet) -> Fitting[tuple[Weighed, Index]]:
    """The best decision with token chunks that the device holds, as a place in the grid of its number of chunks."""
    best: tuple[tuple[float, ...], Fitting[tuple[Weighed, Index]]] | None = None
    nearest: Fitting[tuple[Weighed, Index]] = Fitting()
    for count in chunk_counts(request):
        fitting = _fitting_of_count(_asked(request, count), profiles)
        if fitting.found is None:
            nearest = fitting if nearest.short_bytes is None else nearest
        elif best is None or _rank(request, fitting.found) < best[0]:
            best = _rank(request, fitting.found), fitting
    return nearest if best is None else best[1]


def _asked(request: Request, count: int) -> Request:
    """The request for just so many chunks."""
    update: dict[str, object] = {"token_chunks": count}
    if norms_after_ffn(request.model):
        update["activation_checkpointing"] = False
    return request.model_copy(update=update)


def _fitting_of_count(request: Request, profiles: ProfileSet) -> Fitting[tuple[Weighed, Index]]:
    weighed, context = weigh(request, profiles), profiles.gpu.context.high_bytes

    def best_within(budget_bytes: int) -> tuple[Weighed, Index] | None:
        allowed = weighed.allocating_at_most(budget_bytes - context)
        return (allowed, allowed.best(request)) if allowed.feasible.any() else None

    def short_bytes(found: tuple[Weighed, Index]) -> int:
        peaks = replayed_peaks(request, found[0].decision(found[1]), profiles.gpu)
        return max(peaks.reserved_bytes + context - request.gpu_mem_bytes, 0)

    return best_fitting(request.gpu_mem_bytes, best_within=best_within, short_bytes=short_bytes)


def _rank(request: Request, found: tuple[Weighed, Index]) -> tuple[float, ...]:
    """Less is better by the objective; of equals, fewer chunks."""
    weighed, index = found
    decision: Decision = weighed.decision(index)
    seconds = weighed.at(weighed.step_seconds, index)
    moved = math.inf if weighed.window_bytes is None else weighed.at(weighed.window_bytes, index)
    capacity = (-float(decision.adapter_width), -float(decision.top_k))
    order = (seconds, *capacity) if request.objective == "speed" else (*capacity, moved, seconds)
    return (*order, float(decision.token_chunks))
