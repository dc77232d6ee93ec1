"""Weighing: what each decision of a request needs, which of them keep every limit, and which the objective prefers.

Cheap limits come first: memory is computed for the whole grid of :mod:`meft.planner.search.space`, and only what fits
is simulated. This is the search to read. :mod:`meft.planner.search.sifting` comes to the same with a fraction of the
work, and tests compare the two; where nothing fits, the verdict is drawn from here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from meft.planner.memory.budget import host_budget_bytes
from meft.planner.predict.prediction import ProfileSet, adapter_parameters
from meft.planner.records.plan import Decision, ParetoPoint, Request
from meft.planner.search.grid_costs import (
    grid_allocated_bytes,
    grid_host_bytes,
    grid_hot_rows,
    grid_window_bytes,
    grid_window_rows,
)
from meft.planner.search.grid_timing import grid_step_seconds, with_copies_that_pay
from meft.planner.search.infeasible import Limit
from meft.planner.search.pareto import (
    PARETO_NEAR,
    PARETO_POINTS,
    Values,
    first_in_order,
    pareto_front,
    ranks,
    thinned,
)
from meft.planner.search.space import CAP_AXIS, Space, enumerate_space
from meft.planner.timing.cores import binding_pays


@dataclass(frozen=True)
class Weighed:
    """A request's decisions with what each needs. Arrays have the axes of
    :class:`~meft.planner.search.space.Space`, of length 1 where a choice makes no difference."""

    space: Space
    limits: tuple[Limit, ...]
    within: NDArray[np.bool_]
    """Where every limit is kept."""
    allocated_bytes: NDArray[np.int64]
    """At the cap. What the allocator reserves for that is no less, and known once the step is replayed."""
    host_bytes: NDArray[np.int64]
    trainable_parameters: NDArray[np.int64]
    step_seconds: NDArray[np.float64]
    """Infinite for decisions that were not simulated, as they do not fit."""
    bf16_copied: NDArray[np.bool_]
    """Whether the host keeps a bf16 copy of the rows; bytes and seconds are with it."""
    window_bytes: NDArray[np.int64] | None = None
    """Over the link in an accumulation window; counted for the objective ``traffic``."""

    @property
    def feasible(self) -> NDArray[np.bool_]:
        """The candidates that keep every limit."""
        return self.within & self.space.is_new

    def allocating_at_most(self, num_bytes: int) -> Weighed:
        """The same decisions, those that allocate more on the device left out."""
        return replace(self, within=self.within & (self.allocated_bytes <= num_bytes))

    def ranked_seconds(self, request: Request) -> NDArray[np.float64]:
        """Step time as the objective counts it: as it is, or for ``capacity`` over the recall of looking ahead."""
        if request.objective == "speed":
            return self.step_seconds
        seconds: NDArray[np.float64] = self.step_seconds / self.space.recall_axis
        return seconds

    def ranked_bytes(self) -> list[NDArray[np.float64]]:
        """Traffic as its objective counts it, over the recall of looking ahead; nothing for the others."""
        return [] if self.window_bytes is None else [self.window_bytes / self.space.recall_axis]

    def decision(self, index: tuple[int, ...]) -> Decision:
        """The decision at a grid index, with its bf16 copy if it has one."""
        return self.space.decision(index, bf16_copy=bool(self.at(self.bf16_copied, index)))

    def at(self, values: Values, index: tuple[int, ...]) -> float:
        """One decision's value."""
        value: float = np.broadcast_to(values, self.space.shape)[index].item()
        return value

    def best(self, request: Request) -> tuple[int, ...]:
        """Grid index of the feasible decision that the objective prefers."""
        widest, most_rows_per_token = -self.space.adapter_width, -self.space.top_k
        order: list[Values] = [widest, most_rows_per_token, *self.ranked_bytes(), self.ranked_seconds(request)]
        if request.objective == "speed":
            order = [order[-1], *order[:-1]]
        return first_in_order(self.feasible, [*order, -self.space.caps, self.allocated_bytes])

    def front(self, winner: tuple[int, ...], request: Request) -> list[tuple[int, ...]]:
        """Grid indices of decisions that no other beats in capacity (width, then K), time (for ``traffic``: bytes, then
        time) and device memory at once, thinned: the winner first, then its neighbours. All leave as much room for
        active rows as the winner, that is, their caps are at its place of the cap axis; otherwise the smallest caps
        would always win.
        """
        cap = winner[CAP_AXIS]
        index = np.nonzero(self.within[:, :, :, :, cap])
        routing, top_k = index[-1], self.space.top_k
        capacity = (self.space.adapter_width * (1 + top_k.max()) + top_k)[routing]
        costs = [*self.ranked_bytes(), self.ranked_seconds(request)]
        cost = ranks([np.broadcast_to(each, self.space.shape)[:, :, :, :, cap][index] for each in costs])
        front = pareto_front(capacity, cost, self.allocated_bytes[:, :, :, :, cap][index])
        order = [(*(int(axis[place]) for axis in index[:-1]), cap, int(routing[place])) for place in front]
        near = order.index(winner)
        return [order[place] for place in thinned(len(order), near=near, most=PARETO_POINTS, neighbours=PARETO_NEAR)]

    def point(self, index: tuple[int, ...], request: Request, *, unused_bytes: int) -> ParetoPoint:
        """The decision at a grid index with what it brings and costs; ``unused_bytes`` is what the allocator is taken
        to hold beyond what is allocated."""
        moved = None if self.window_bytes is None else self.at(self.window_bytes, index) / request.rounds
        return ParetoPoint(
            decision=self.decision(index),
            moved_bytes_per_step=None if moved is None else round(moved),
            trainable_parameters=int(self.at(self.trainable_parameters, index)),
            step_seconds=self.at(self.step_seconds, index),
            peak_reserved_bytes=int(self.at(self.allocated_bytes, index)) + unused_bytes,
            host_bytes=int(self.at(self.host_bytes, index)),
        )


def weigh(request: Request, profiles: ProfileSet, *, simulate_all: bool = False) -> Weighed:
    """Compute what every decision needs; step times only of those that fit unless ``simulate_all``."""
    space = enumerate_space(request, profiles.sparsity, bind_cores=binding_pays(profiles.gpu, profiles.host))
    allocated = grid_allocated_bytes(space, request, profiles)
    host = [grid_host_bytes(space, request, bf16_copy=copied) for copied in space.bf16_copies]
    trainable = np.asarray(adapter_parameters(request, space.candidates))
    limits = _cheap_limits(request, profiles, allocated=allocated, host=host[0], trainable=trainable)
    fits = np.ones(space.shape, np.bool_)
    for limit in limits:
        fits &= limit.holds()
    wanted = np.ones_like(fits) if simulate_all else fits
    has_room = [np.asarray(num_bytes <= host_budget_bytes(request)) for num_bytes in host[1:]]
    rows_of = cache(lambda place: grid_window_rows(space, request, profiles, place))
    hot = grid_hot_rows(space, request, profiles)
    seconds, baseline = grid_step_seconds(
        space,
        request,
        profiles,
        rows_of,
        hot,
        wanted=np.stack([np.any(wanted & room, axis=CAP_AXIS) for room in (np.array(True), *has_room)]),
    )
    copied, seconds, host_bytes = with_copies_that_pay(space, seconds, host, has_room)
    slowdown = Limit("slowdown", "max_slowdown", seconds / baseline, request.max_slowdown)
    return Weighed(
        space=space,
        limits=(*limits, slowdown),
        within=fits & slowdown.holds(),
        allocated_bytes=allocated,
        host_bytes=host_bytes,
        trainable_parameters=trainable,
        step_seconds=seconds,
        bf16_copied=copied,
        window_bytes=grid_window_bytes(space, request, rows_of, hot) if request.objective == "traffic" else None,
    )


def _cheap_limits(
    request: Request,
    profiles: ProfileSet,
    *,
    allocated: NDArray[np.int64],
    host: NDArray[np.int64],
    trainable: NDArray[np.int64],
) -> tuple[Limit, ...]:
    """All but the slowdown. The device must hold the context besides what is allocated."""
    device = Limit("device memory", "gpu_mem_bytes", allocated + profiles.gpu.context.high_bytes, request.gpu_mem_bytes)
    limits = (device, Limit("host memory", "host_mem_bytes", host, host_budget_bytes(request)))
    if request.objective != "speed":
        return limits
    share = trainable / request.model.num_parameters
    least = request.min_trainable_fraction
    return (*limits, Limit("trainable share", "min_trainable_fraction", share, least, at_least=True))
