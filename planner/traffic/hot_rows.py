"""Hot rows: how much of a micro-batch's activity is theirs, and what they cost on the device and over the link.

The ``H`` most often active rows of every layer live on the device with their optimizer state; see
:mod:`meft.runtime.exchange.hot_rows`. How much they carry is for the sparsity profile to say (its ``popularity``).
Where it does not, they are taken to be as active as any other row: rows chosen because they are active are no less.

Letters: ``R`` adapter rows per layer, ``H`` hot ones, ``L`` layers, ``D`` hidden size, ``e`` bytes of an adapter
element. A row is a key and a value, ``2D`` numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.quantities import INDEX_BYTES, MASTER_BYTES, Floats, Ints
from meft.planner.records.profiles import SparsityProfile

HOT_CHUNK_ROWS = 256
"""Rows are updated so many at a time (:mod:`meft.runtime.exchange.hot_tables`): AdamW's temporaries are that much
smaller."""
HOT_STATES = 3
"""Beside the weights: two moments and the window's gradient sum."""
HOT_COUNTS = 2
"""int32 per row: updates, and micro-batches of the window."""
UPDATE_TEMPORARIES = 4
"""fp32 copies of some rows while they are updated: weights, two moments, AdamW's denominator."""
HOT_NORM_BYTES = 8


@dataclass(frozen=True, eq=False, repr=False)
class HotRows:
    """Hot rows among those that are active, ``[L, ...]``: in a micro-batch, and in an accumulation window."""

    per_layer: Ints
    """``H``."""
    active: NDArray[np.int64]
    in_window: NDArray[np.int64]


def hot_share(profile: SparsityProfile, *, hot_rows: Ints, adapter_width: Ints) -> Floats:
    """Share of the active rows that are hot, by the profile's popularity, straight between its points; or ``H / R``."""
    rows = np.true_divide(hot_rows, adapter_width)
    if not profile.popularity:
        return rows
    known = [0.0, *(point.rows for point in profile.popularity), 1.0]
    carried = [0.0, *(point.traffic for point in profile.popularity), 1.0]
    share: Floats = np.interp(rows, known, carried)
    return share


def hot_active_rows(active_rows: Ints, *, hot_rows: Ints, share: Floats) -> NDArray[np.int64]:
    """How many of ``active_rows`` are hot."""
    return np.minimum(hot_rows, np.rint(np.multiply(active_rows, share))).astype(np.int64)


# --- device memory ---------------------------------------------------------------------------------------------------


def hot_rows_bytes(*, num_layers: int, hidden_size: int, hot_rows: Ints, e: int) -> Ints:
    """Rows that the adapter computes with, ``[H, 2D]`` per layer."""
    return num_layers * hot_rows * 2 * hidden_size * e


def hot_states_bytes(*, num_layers: int, hidden_size: int, hot_rows: Ints, e: int) -> Ints:
    """fp32 moments, gradient sums, and where the rows are not fp32 themselves master weights; two int32 per row."""
    tables = HOT_STATES + (e != MASTER_BYTES)
    return num_layers * hot_rows * (tables * 2 * hidden_size * MASTER_BYTES + HOT_COUNTS * INDEX_BYTES)


def hot_update_bytes(*, hidden_size: int, hot_rows: Ints) -> Ints:
    """What the update holds for a while."""
    rows = np.minimum(hot_rows, HOT_CHUNK_ROWS)
    temporaries: Ints = UPDATE_TEMPORARIES * rows * 2 * hidden_size * MASTER_BYTES
    return int(temporaries) if np.ndim(temporaries) == 0 else temporaries


# --- the link --------------------------------------------------------------------------------------------------------


def hot_key_bytes(*, num_layers: int, hidden_size: int, hot_rows: Ints) -> Ints:
    """Keys of all hot rows, fp32: once per optimizer step, since the host chooses rows by them."""
    return num_layers * hot_rows * hidden_size * MASTER_BYTES
