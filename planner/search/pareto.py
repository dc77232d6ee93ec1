"""Choosing among the decisions of a grid: by several values in turn, and Pareto fronts of three objectives.

The order of values in turn is total: what all leave equal is told apart by its place in the grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

PARETO_POINTS = 12
"""That a plan shows."""
PARETO_NEAR = 6
"""Of them at the winner and around it; the others spread over the rest of the front."""


def pareto_front(
    most: NDArray[np.int64], least: NDArray[np.float64], also_least: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Indices of the points that no other beats: none has as much of ``most`` with as little of both others and is
    better in one. Of equal points the first counts. Sorted by ``most`` descending, then ``least`` ascending."""
    front: list[NDArray[np.int64]] = []
    best = _Staircase()
    for members in _descending_groups(most):
        order = np.lexsort((members, also_least[members], least[members]))
        members = members[order]
        members = members[_strict_descents(also_least[members])]
        members = members[~best.covers(least[members], also_least[members])]
        best.add(least[members], also_least[members])
        front.append(members)
    return np.concatenate(front) if front else np.empty(0, np.int64)


def _descending_groups(values: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Indices of equal values, the largest value first."""
    if not len(values):
        return []
    order = np.argsort(-values, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1)


def _strict_descents(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True where a value is below every one before it."""
    lowest_before = np.minimum.accumulate(values[:-1])
    return np.concatenate([[True], values[1:] < lowest_before])


class _Staircase:
    """Points of two objectives, both to be small, none of which beats another: the first ascends, the second falls."""

    def __init__(self) -> None:
        self.first: NDArray[np.float64] = np.empty(0)
        self.second: NDArray[np.int64] = np.empty(0, np.int64)

    def covers(self, first: NDArray[np.float64], second: NDArray[np.int64]) -> NDArray[np.bool_]:
        """True where some point here is as small in both."""
        place = np.searchsorted(self.first, first, side="right")
        lowest = np.concatenate([[np.iinfo(np.int64).max], self.second])[place]
        return lowest <= second

    def add(self, first: NDArray[np.float64], second: NDArray[np.int64]) -> None:
        """Take in points and let go of those they beat."""
        first, second = np.concatenate([self.first, first]), np.concatenate([self.second, second])
        order = np.lexsort((second, first))
        first, second = first[order], second[order]
        keep = _strict_descents(second)
        self.first, self.second = first[keep], second[keep]


def thinned(length: int, *, near: int, most: int, neighbours: int) -> list[int]:
    """At most ``most`` positions of a list: the ``neighbours`` at and around ``near``, the nearest first, then
    positions spread evenly over the rest, both ends among them."""
    by_distance = sorted(range(length), key=lambda position: (abs(position - near), position))
    close = by_distance[: min(neighbours, most)]
    rest = sorted(by_distance[len(close) :])
    count = min(most - len(close), len(rest))
    return close + [rest[round(step * (len(rest) - 1) / max(count - 1, 1))] for step in range(count)]


# --- by several values in turn ----------------------------------------------------------------------------------------

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
