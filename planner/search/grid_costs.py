"""What every decision of the grid needs besides time: device memory, host memory, and bytes over the link.

Each is one of the term functions of a single decision, given the grid's axes (:mod:`meft.planner.search.space`) instead
of numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from meft.planner.memory.device import peak_allocated_bytes
from meft.planner.memory.host import host_total_bytes
from meft.planner.predict.prediction import ProfileSet
from meft.planner.records.plan import Request
from meft.planner.search.space import Space
from meft.planner.traffic.chunks import chunk_rows, summed
from meft.planner.traffic.hot_rows import HotRows
from meft.planner.traffic.sparsity import WindowRows, at_seq_len, hot_rows_among, window_rows
from meft.planner.traffic.transfer import StepRows, window_bytes

RowsOfCache: TypeAlias = Callable[[int], WindowRows | None]
""":func:`grid_window_rows` by the cache's place on its axis."""


def grid_allocated_bytes(space: Space, request: Request, profiles: ProfileSet) -> NDArray[np.int64]:
    """Peak allocated device bytes with every layer's rows at the cap, over the whole grid."""
    num_layers = request.model.num_layers
    peak = peak_allocated_bytes(
        request=request,
        gpu=profiles.gpu,
        active_rows=np.broadcast_to(space.caps, (num_layers, *space.caps.shape)),
        candidates=space.candidates,
    )
    return np.broadcast_to(peak, space.shape)


def grid_host_bytes(space: Space, request: Request, *, bf16_copy: bool) -> NDArray[np.int64]:
    """Tables and buffers in host memory, with a bf16 copy of the rows or without."""
    candidates = replace(space.candidates, bf16_copy=bf16_copy)
    return np.asarray(host_total_bytes(request=request, candidates=candidates))


def grid_hot_rows(space: Space, request: Request, profiles: ProfileSet) -> HotRows | None:
    """What the hot rows that the request asks for carry, of every routing."""
    return hot_rows_among(
        at_seq_len(profiles.sparsity, request.seq_len),
        hot_rows=space.hot_rows,
        adapter_width=space.adapter_width,
        active_rows=space.active_rows,
        window_active_rows=space.window_active_rows,
    )


def grid_window_rows(space: Space, request: Request, profiles: ProfileSet, cache_place: int) -> WindowRows | None:
    """What a window's rows do under a cache, of every routing; None where it caches none.

    No cap is below the active rows, so the cap is not among what they depend on. With token chunks, for the only
    prefetch depth of the grid, what of a micro-batch's rows travels.
    """
    if space.token_chunks > 1:
        return _grid_chunk_rows(space, request, profiles)
    if not space.cached_rows[cache_place].any():
        return None
    return window_rows(
        at_seq_len(profiles.sparsity, request.seq_len),
        request.model.num_layers,
        tokens=request.tokens_per_step,
        grad_accum=request.rounds,
        candidates=replace(space.candidates_at(cache_place), active_rows_cap=space.adapter_width),
    )


def _grid_chunk_rows(space: Space, request: Request, profiles: ProfileSet) -> WindowRows:
    chosen = replace(space.candidates_at(0), active_rows_cap=space.adapter_width)
    rows = chunk_rows(
        at_seq_len(profiles.sparsity, request.seq_len),
        request.model.num_layers,
        tokens=request.tokens_per_step,
        token_chunks=space.token_chunks,
        candidates=chosen,
    )
    (depth,) = space.prefetch_depths
    _, missing, again = summed(rows, token_chunks=space.token_chunks, prefetch_depth=depth)
    return WindowRows(missing=missing, overflow=again, kept=np.zeros_like(missing))


def grid_window_bytes(space: Space, request: Request, rows_of: RowsOfCache, hot: HotRows | None) -> NDArray[np.int64]:
    """Bytes over the link in a window, ``[caches, depths, 1, backward, 1, routings]``: no other choice moves any."""
    lengths = (len(space.gradients_on_device), len(space.prefetch_depths), 1, len(space.rows_in_backward), 1)
    moved = np.empty((*lengths, len(space.adapter_width)), np.int64)
    for place, depth, _, backward, _ in np.ndindex(lengths):
        cached = rows_of(place)
        rows = StepRows(
            active=space.active_rows,
            missing=None if cached is None else cached.missing,
            overflow=None if cached is None else cached.overflow,
            hot=None if hot is None else hot.active,
        )
        moved[place, depth, 0, backward, 0] = window_bytes(
            request=request,
            candidates=replace(space.candidates_at(place, backward), prefetch_depth=space.prefetch_depths[depth]),
            rows=rows,
            kept_rows=None if cached is None else cached.kept,
        )
    return moved
