"""What becomes of a micro-batch's active rows: which travel, which are on the device, whose gradients are where.

Letters: ``L`` layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meft.planner.traffic.hot_rows import HotRows
from meft.planner.traffic.sparsity import WindowRows, distinct_layers


@dataclass(frozen=True, eq=False, repr=False)
class MovedRows:
    """Rows of a micro-batch ``[L, ...]``, or ``[1, ...]`` where all layers are alike, by what becomes of them."""

    active: NDArray[np.int64]
    missing: NDArray[np.int64]
    overflow: NDArray[np.int64]
    gradients: NDArray[np.int64]
    """Whose gradients travel in the step."""
    summed: NDArray[np.int64]
    """Whose gradient sums travel at the window's end: a step's share."""
    hot: NDArray[np.int64]
    is_cached: bool
    gradients_on_device: bool
    in_chunks: bool = False
    """Of one chunk of tokens, in the mean."""

    @property
    def assembled(self) -> NDArray[np.int64]:
        """Copied on the device: all where rows are cached, else the hot ones; of a chunk's those that its neighbour
        has."""
        if self.in_chunks:
            return self.active - self.missing
        return self.active if self.is_cached else self.hot

    @property
    def added(self) -> NDArray[np.int64]:
        """Whose gradients are summed on the device."""
        return self.active if self.gradients_on_device else self.hot

    @property
    def has_places(self) -> bool:
        """Whether some rows are on the device before they are needed."""
        return self.is_cached or bool(self.hot.any())


def moved_in_chunks(active_rows: NDArray[np.int64], travelling: WindowRows, token_chunks: int) -> MovedRows:
    """Rows of one chunk in the mean, from sums over a layer's."""

    def mean(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.rint(distinct_layers(rows) / token_chunks).astype(np.int64)

    active, nothing = mean(active_rows), np.zeros_like(mean(active_rows))
    return MovedRows(
        active=active,
        missing=np.minimum(mean(travelling.missing), active),
        overflow=np.minimum(mean(travelling.overflow), active),
        gradients=active,
        summed=nothing,
        hot=nothing,
        is_cached=True,
        gradients_on_device=False,
        in_chunks=True,
    )


def moved_rows(
    active_rows: NDArray[np.int64],
    cached: WindowRows | None,
    gradients_on_device: bool,
    grad_accum: int,
    hot_rows: HotRows | None,
) -> MovedRows:
    """Of all active rows, those of a window that are cached, and hot ones."""
    active = distinct_layers(active_rows)
    hot = np.zeros_like(active) if hot_rows is None else distinct_layers(hot_rows.active)
    cold = active - hot
    if cached is None:
        nothing = np.zeros_like(active)
        return MovedRows(active, cold, cold, cold, nothing, hot, is_cached=False, gradients_on_device=False)
    missing, overflow = np.minimum(distinct_layers(cached.missing), cold), distinct_layers(cached.overflow)
    kept = np.rint(distinct_layers(cached.kept) / grad_accum).astype(np.int64)
    return MovedRows(
        active=active,
        missing=missing,
        overflow=overflow,
        gradients=overflow if gradients_on_device else cold,
        summed=kept if gradients_on_device else np.zeros_like(kept),
        hot=hot,
        is_cached=True,
        gradients_on_device=gradients_on_device,
    )
