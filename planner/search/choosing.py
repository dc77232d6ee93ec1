"""Choosing among the decisions of a grid by several values in turn, the first before the others.

The order is total: what all values leave equal is told apart by its place in the grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Values: TypeAlias = NDArray[np.int64] | NDArray[np.float64] | NDArray[np.bool_]
"""One per decision; the array broadcasts to the grid."""


def first_in_order(feasible: NDArray[np.bool_], order: Sequence[Values]) -> tuple[int, ...]:
    """Grid index of the feasible decision with the least first value, of those the least second, and so on; of what is
    left the first in the grid."""
    index = _best_routings(feasible, order)
    for values in order:
        found = np.broadcast_to(values, feasible.shape)[index]
        least = found == found.min()
        index = tuple(axis[least] for axis in index)
    return tuple(int(axis[0]) for axis in index)


def _best_routings(feasible: NDArray[np.bool_], order: Sequence[Values]) -> tuple[NDArray[np.int64], ...]:
    """Grid indices of the feasible decisions, less those that lose by what only the routing decides, where that comes
    first: a million indices less to make."""
    routings = np.flatnonzero(feasible.any(axis=tuple(range(feasible.ndim - 1))))
    for values in itertools.takewhile(lambda each: each.ndim == 1, order):
        found = values[routings]
        routings = routings[found == found.min()]
    *others, place = np.nonzero(feasible[..., routings])
    return (*others, routings[place])


def ranks(keys: Sequence[Values]) -> NDArray[np.float64]:
    """Numbers that order places as ``keys`` do, the first before the others; a single key is its own rank."""
    if len(keys) == 1:
        return keys[0].astype(np.float64, copy=False)
    order = np.lexsort(tuple(reversed(keys)))
    steps = np.zeros(len(order), np.bool_)
    for key in keys:
        steps[1:] |= np.diff(key[order]) != 0
    ranked = np.empty(len(order))
    ranked[order] = np.cumsum(steps)
    return ranked
