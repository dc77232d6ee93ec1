"""The best of what was sifted, and its Pareto front: as :class:`~meft.planner.search.weighing.Weighed` chooses, with
the program asked only for seconds that another candidate's are too close to.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meft.planner.search.pareto import PARETO_NEAR, PARETO_POINTS, thinned
from meft.planner.search.sifting import Index, Sifted
from meft.planner.search.space import CAP_AXIS
from meft.planner.timing.apart import WITHIN, Seconds

APART = 3 * WITHIN
"""Relative difference of two candidates' seconds that tells for certain which is faster."""


@dataclass(frozen=True, eq=False, repr=False)
class Listed:
    """Some decisions as places along the grid's axes, in the grid's order."""

    sifted: Sifted
    axes: tuple[NDArray[np.int64], ...]

    def __len__(self) -> int:
        return len(self.axes[0])

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Listed:
        """Those chosen."""
        return Listed(self.sifted, tuple(axis[chosen] for axis in self.axes))

    def index(self, place: int) -> Index:
        """The grid index of one."""
        return tuple(int(axis[place]) for axis in self.axes)

    @property
    def cells(self) -> tuple[NDArray[np.int64], ...]:
        """Without their caps."""
        return (*self.axes[:CAP_AXIS], self.axes[-1])

    @property
    def is_one_cell(self) -> bool:
        """Whether they differ in nothing but their caps, which their seconds do not depend on."""
        return all((axis == axis[0]).all() for axis in self.cells)

    @property
    def seconds(self) -> Seconds:
        """Step seconds, with a copy where one pays and has room."""
        sifted, (cache, depth, _, _, cap, routing) = self.sifted, self.axes
        seconds = sifted.seconds[0][self.cells]
        if len(sifted.seconds) == 1:
            return seconds
        copied = sifted.pays[self.cells] & sifted.has_room[cache, depth, cap, routing]
        return np.where(copied, sifted.seconds[1][self.cells], seconds)

    @property
    def ranked_seconds(self) -> Seconds:
        """As the objective counts them."""
        if self.sifted.request.objective == "speed":
            return self.seconds
        return self.seconds / self.sifted.space.prefetch_recall[self.axes[1]]

    @property
    def ranked_bytes(self) -> NDArray[np.float64] | None:
        """Traffic as its objective counts it; None for the others."""
        moved = self.sifted.window_bytes
        if moved is None:
            return None
        cache, depth, _, backward, _, routing = self.axes
        recall = self.sifted.space.prefetch_recall[depth]
        ranked: NDArray[np.float64] = moved[cache, depth, 0, backward, 0, routing] / recall
        return ranked

    @property
    def allocated_bytes(self) -> NDArray[np.int64]:
        """Peak allocated device bytes at the cap."""
        return self.sifted.device.of(self.axes)

    def made_exact(self) -> Listed:
        """The same, their seconds now the program's."""
        self.sifted.make_exact(*self.cells)
        return self


def best(sifted: Sifted) -> Index:
    """Grid index of the feasible decision that the objective prefers."""
    found = _fastest_of_all(sifted) if sifted.request.objective == "speed" else _of_most_capacity(sifted)
    moved = found.ranked_bytes
    if moved is not None:
        found = found.where(moved == moved.min())
    seconds = found.ranked_seconds
    found = found.where(seconds <= seconds.min() * (1 + APART))
    if not found.is_one_cell:
        found.made_exact()
    space, (*_, cap, routing) = sifted.space, found.axes
    order = [found.ranked_seconds, -space.adapter_width[routing], -space.top_k[routing], -space.caps[cap, routing]]
    in_grid = np.ravel_multi_index(found.axes, space.shape)
    return found.index(int(np.lexsort((in_grid, found.allocated_bytes, *reversed(order)))[0]))


def _of_most_capacity(sifted: Sifted) -> Listed:
    """The feasible decisions of the widest adapter, and of those of the largest K."""
    routings, feasible = sifted.most_capable()
    *axes, place = np.nonzero(feasible)
    top_k = sifted.space.top_k[routings[place]]
    return Listed(sifted, (*axes, routings[place])).where(top_k == top_k.max())


def _fastest_of_all(sifted: Sifted) -> Listed:
    """The feasible decisions that may be the fastest; with a copy that pays, none is slower than it is without."""
    space, without = sifted.space, sifted.seconds[0]
    feasible = np.stack([(within & new).any(axis=-2) for within, new in zip(sifted.within, space.is_new, strict=True)])
    most = np.min(without, where=feasible, initial=math.inf) * (1 + APART)
    least = without if len(sifted.seconds) == 1 else np.where(sifted.pays, sifted.seconds[1], without)
    *cells, routing = np.nonzero(feasible & (least <= most))
    is_new = space.is_new[cells[0], 0, 0, 0, :, routing]
    place, cap = np.nonzero(np.moveaxis(sifted.within, CAP_AXIS, -1)[(*cells, routing)] & is_new)
    return Listed(sifted, (*(axis[place] for axis in cells), cap, routing[place]))


# --- the Pareto front ------------------------------------------------------------------------------------------------


def front(sifted: Sifted, winner: Index) -> list[Index]:
    """Grid indices of decisions that no other beats; see :meth:`~meft.planner.search.weighing.Weighed.front`."""
    points = _Points.of(_unbeaten_by_far(sifted, winner[CAP_AXIS]))
    kept, unsure = points.swept()
    points.listed.where(unsure).made_exact()
    points = _Points.of(points.listed.where(kept))
    unbeaten = points.listed.where(np.array(points.in_order()))
    near = next(place for place in range(len(unbeaten)) if unbeaten.index(place) == winner)
    places = thinned(len(unbeaten), near=near, most=PARETO_POINTS, neighbours=PARETO_NEAR)
    shown = unbeaten.where(np.array(places)).made_exact()
    return [shown.index(place) for place in range(len(shown))]


@dataclass(frozen=True, eq=False, repr=False)
class _Points:
    """Decisions by what a front weighs, ``[n]``: capacity as a number to be large, cost and memory to be small. Costs
    are ranks, of which :attr:`cost` is equal where the seconds do not tell for certain which is less."""

    listed: Listed
    capacity: NDArray[np.int64]
    cost: NDArray[np.int64]
    exact_cost: NDArray[np.int64]
    memory: NDArray[np.int64]

    @classmethod
    def of(cls, listed: Listed) -> _Points:
        seconds, moved = listed.ranked_seconds, listed.ranked_bytes
        return cls(
            listed=listed,
            capacity=_capacity(listed.sifted)[listed.axes[-1]],
            cost=_ranks(seconds, moved, apart=APART),
            exact_cost=_ranks(seconds, moved, apart=0.0),
            memory=listed.allocated_bytes,
        )

    def swept(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The places of points that no other beats for certain, and of those whose costs are too close to another's to
        say."""
        kept, unsure = [], set[int]()
        stairs = _Stairs()
        for place in self._order(self.cost):
            cost, memory = int(self.cost[place]), int(self.memory[place])
            if stairs.lowest(cost - 1) <= memory:
                continue
            kept.append(place)
            if stairs.lowest(cost) <= memory:
                unsure.add(cost)
            else:
                stairs.add(cost, memory)
        found = np.array(sorted(kept), dtype=np.int64)
        return found, found[[cost in unsure for cost in self.cost[found].tolist()]]

    def in_order(self) -> list[int]:
        """The places of points that no other beats, of equal ones the first: the largest capacity first, then the least
        cost."""
        stairs, kept = _Stairs(), []
        for place in self._order(self.exact_cost):
            cost, memory = int(self.exact_cost[place]), int(self.memory[place])
            if stairs.lowest(cost) > memory:
                stairs.add(cost, memory)
                kept.append(place)
        return kept

    def _order(self, cost: NDArray[np.int64]) -> list[int]:
        order: list[int] = np.lexsort((self.memory, cost, -self.capacity)).tolist()
        return order


class _Stairs:
    """Points of cost and memory, none of which beats another: costs ascend, memory falls."""

    def __init__(self) -> None:
        self._costs: list[int] = []
        self._memory: list[int] = []

    def lowest(self, cost: int) -> float:
        """Least memory at no more than a cost."""
        place = bisect.bisect_right(self._costs, cost)
        return self._memory[place - 1] if place else math.inf

    def add(self, cost: int, memory: int) -> None:
        """Take in a point that none here beats, and let go of those that it beats."""
        first = bisect.bisect_left(self._costs, cost)
        last = first
        while last < len(self._costs) and self._memory[last] >= memory:
            last += 1
        self._costs[first:last], self._memory[first:last] = [cost], [memory]


def _capacity(sifted: Sifted) -> NDArray[np.int64]:
    """Width, then K, of each routing as one number."""
    top_k = sifted.space.top_k
    capacity: NDArray[np.int64] = sifted.space.adapter_width * (1 + top_k.max()) + top_k
    return capacity


def _ranks(seconds: Seconds, moved: NDArray[np.float64] | None, *, apart: float) -> NDArray[np.int64]:
    """Ranks by bytes, if they are counted, then by seconds; equal for seconds that follow each other more closely than
    by the share ``apart``."""
    order = np.argsort(seconds, kind="stable") if moved is None else np.lexsort((seconds, moved))
    ascending = seconds[order]
    steps = np.zeros(len(order), np.bool_)
    steps[1:] = ascending[1:] > ascending[:-1] * (1 + apart)
    if moved is not None:
        steps[1:] |= np.diff(moved[order]) != 0
    ranked = np.empty(len(order), np.int64)
    ranked[order] = np.cumsum(steps)
    return ranked


# --- a first, coarse sieve -------------------------------------------------------------------------------------------

LEVELS = 32
"""Of memory, at least half as many are used."""
FINER_LEVELS = 160
WORTH_ACCUMULATING = 200
"""So many passed that those after them are the fewer for it."""


def _unbeaten_by_far(sifted: Sifted, cap: int) -> Listed:
    """Decisions at a cap but for those that another beats for certain: it has no less capacity, is on a lower level of
    memory, and costs less."""
    sieve = _Sieve(sifted, cap)
    places = np.argwhere(sieve.within.any(axis=(2, 3, 4))).tolist()
    listed = [sieve.passed(*place) for place in places]
    found = Listed(sifted, tuple(np.concatenate(axis) for axis in zip(*listed, strict=True)))
    return found.where(sieve.passes_finer(found))


class _Sieve:
    """Least costs seen so far ``[capacities, levels]``: of all with as much capacity, at a lower level of memory. Costs
    are seconds, or bytes where they come first, as the objective counts them."""

    def __init__(self, sifted: Sifted, cap: int) -> None:
        self.sifted, self.cap = sifted, cap
        self.routings = sifted.leading_routings
        """The others are beaten by these."""
        of_routings = -_capacity(sifted)
        capacities = _distinct(of_routings)
        self.group = np.searchsorted(capacities, of_routings)
        """Of each routing, the largest capacity first."""
        self.first_place = self.group[self.routings] * (LEVELS + 1)
        self.num_groups = len(capacities)
        self.within = sifted.within[:, :, :, :, cap].take(self.routings, axis=-1)
        self.memory = sifted.device.at_cap(cap, self.routings)
        self.lowest = sifted.device.least
        self.level_bits = max((sifted.most_allocated - self.lowest).bit_length() - LEVELS.bit_length() + 1, 0)
        self.least = np.full((self.num_groups, LEVELS + 1), math.inf)

    def passed(self, cache: int, depth: int) -> tuple[NDArray[np.int64], ...]:
        """Those of a cache and a prefetch depth that pass, as places along the grid's axes."""
        cost = self.costs(cache, depth)
        level = (self.memory.on(cache, depth) - self.lowest) >> self.level_bits
        place = self.first_place + np.minimum(level, LEVELS - 1)
        passes = self.within[cache, depth] & ~(self.least.take(place) < cost * (1 - APART))
        again, backward, routing = np.nonzero(passes)
        place, cost = (np.broadcast_to(each, passes.shape)[passes] for each in (place, cost))
        np.minimum.at(self.least.reshape(-1), place + 1, cost)
        if len(routing) > WORTH_ACCUMULATING:
            _accumulate(self.least)
        given = (np.full(len(routing), each) for each in (cache, depth, self.cap))
        cache_axis, depth_axis, cap_axis = given
        return (cache_axis, depth_axis, again, backward, cap_axis, self.routings[routing])

    def costs(self, cache: int, depth: int) -> NDArray[np.float64]:
        """``[checkpointing, backward, leading routings]`` of cells that keep the limits."""
        sifted, recall = self.sifted, self.sifted.space.prefetch_recall[depth]
        if sifted.window_bytes is not None:
            moved = sifted.window_bytes[cache, depth, :, :, 0].take(self.routings, axis=-1)
            ranked: NDArray[np.float64] = moved / recall
            return ranked
        seconds = sifted.seconds_on(cache, depth, self.cap, self.routings)
        return seconds if sifted.request.objective == "speed" else seconds / recall

    def passes_finer(self, listed: Listed) -> NDArray[np.bool_]:
        """Which of the listed pass with more levels, of as many of them each."""
        memory, group = listed.allocated_bytes, self.group[listed.axes[-1]]
        moved = listed.ranked_bytes
        cost = listed.ranked_seconds if moved is None else moved
        between = _distinct(np.sort(memory)[:: max(len(memory) // FINER_LEVELS, 1)])
        level = np.searchsorted(between, memory, side="right")
        least = np.full((self.num_groups, len(between) + 2), math.inf)
        np.minimum.at(least, (group, level + 1), cost)
        _accumulate(least)
        passes: NDArray[np.bool_] = ~(least[group, level] < cost * (1 - APART))
        return passes


def _distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The values, each once, ascending; the first call of :func:`numpy.unique` loads masked arrays, which is slow."""
    ascending = np.sort(values)
    return ascending[np.diff(ascending, prepend=ascending[0] - 1) > 0]


def _accumulate(least: NDArray[np.float64]) -> None:
    """Make the least of each capacity and level that of all capacities and levels before it, too."""
    np.minimum.accumulate(least, axis=0, out=least)
    np.minimum.accumulate(least, axis=1, out=least)
