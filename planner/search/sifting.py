"""Every decision of a request sifted: how many keep all limits, and the seconds of those that do.

What :func:`meft.planner.search.weighing.weigh` says of a grid, found with less work: memory is compared along the axes
on which it depends (:mod:`meft.planner.search.grid_memory`), and step seconds are close to the program's rather than
the program's own (:mod:`meft.planner.search.cost_table`). Where so small a difference could decide anything, the
program itself is asked, so what comes out is the same to the bit.
"""

from __future__ import annotations

import copy
import functools
import math
from functools import cached_property, partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from meft.planner.memory.budget import host_budget_bytes
from meft.planner.predict.prediction import ProfileSet, adapter_parameters
from meft.planner.records.plan import Decision, ParetoPoint, Request
from meft.planner.search.cost_table import Cells, CostTable
from meft.planner.search.grid_costs import grid_hot_rows, grid_window_bytes, grid_window_rows
from meft.planner.search.grid_memory import device_sum, host_sum
from meft.planner.search.grid_timing import COPY_PAYS
from meft.planner.search.space import CAP_AXIS, enumerate_space
from meft.planner.timing.apart import WITHIN, Seconds
from meft.planner.timing.cores import binding_pays

Index: TypeAlias = tuple[int, ...]


class Sifted:
    """A request's decisions. A *cell* is a decision without its cap: arrays of cells have the axes of
    :class:`~meft.planner.search.space.Space` without the caps'."""

    def __init__(self, request: Request, profiles: ProfileSet) -> None:
        self.request, self.profiles = request, profiles
        self.space = enumerate_space(request, profiles.sparsity, bind_cores=binding_pays(profiles.gpu, profiles.host))
        self.device = device_sum(self.space, request, profiles)
        self.host, self.copy_bytes = host_sum(self.space, request)
        self.within, self.has_room = self._fits(profiles)
        """``[..., caps, routings]``: first what memory allows, in the end what every limit does; and, ``[caches,
        depths, caps, routings]``, where the host has room for a copy."""
        self.fits_at_all = np.logical_or.reduce(self.within, axis=CAP_AXIS)
        """Cells of which some cap fits."""
        self.table = CostTable(self.space, request, profiles)
        self.seconds = self._quick_seconds()
        """Of cells, by copy: close, or exact once :meth:`make_exact` was asked; infinite where no limit can be kept."""
        self.pays = self._decided()
        """Cells that a copy makes faster by enough, where there is room for it."""

    # --- limits ------------------------------------------------------------------------------------------------------

    def _fits(self, profiles: ProfileSet) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Where device and host memory suffice, and for ``speed`` enough is trained."""
        space, request = self.space, self.request
        self.most_allocated = request.gpu_mem_bytes - profiles.gpu.context.high_bytes
        budget = host_budget_bytes(request)
        host_bytes = [budget - self.copy_bytes * copied for copied in space.bf16_copies]
        fits = np.empty(space.shape, np.bool_)
        room = np.zeros((*space.shape[:2], *space.shape[CAP_AXIS:]), np.bool_)
        for depth in range(space.shape[1]):
            on_device = self.device.rest_of(self.most_allocated, depth)
            on_host = [self.host.rest_of(most, depth) for most in host_bytes]
            for place in range(len(fits)):
                np.logical_and(on_device(place), on_host[0](place), out=fits[place, depth])
                if len(on_host) > 1:
                    room[place, depth] = on_host[1](place)[0, 0]
        if request.objective == "speed":
            fits &= self.trainable_parameters / request.model.num_parameters >= request.min_trainable_fraction
        return fits, room

    def allocating_at_most(self, num_bytes: int) -> Sifted:
        """The same decisions, those that allocate more on the device left out."""
        if num_bytes >= self.most_allocated:
            return self
        allowed = copy.copy(self)  # seconds that are made exact are so for both
        allowed.most_allocated, allowed.within = num_bytes, self.within.copy()
        for depth in range(self.space.shape[1]):
            on_device = self.device.rest_of(num_bytes, depth)
            for place in range(len(allowed.within)):
                allowed.within[place, depth] &= on_device(place)
        return allowed

    @property
    def trainable_parameters(self) -> NDArray[np.int64]:
        """Of each routing."""
        return np.asarray(adapter_parameters(self.request, self.space.candidates))

    def _quick_seconds(self) -> list[Seconds]:
        """Of cells that fit and that may keep the slowdown: a step takes no less than its busiest lane."""
        space, table = self.space, self.table
        num_caches, num_routings = len(space.gradients_on_device), len(space.top_k)
        fits = self.fits_at_all.any(axis=1)  # [C, checkpointing, backward, routings]
        members = np.flatnonzero(fits.any(axis=(1, 2)))
        least_forward, least_backward = table.least_seconds(members)
        forward = np.full((num_caches, num_routings), math.inf)
        forward.flat[members] = least_forward
        most = self.request.max_slowdown * table.baseline * (1 + WITHIN)
        backward = np.moveaxis(least_backward.reshape(*least_backward.shape[:2], num_caches, -1), 2, 0)
        fits &= forward[:, None, None] + backward.take(table.kind_of, axis=-1) <= most
        may_pay = [own.reshape(num_caches, 1, 1, -1).take(table.kind_of, axis=-1) for own in table.may_pay]
        return [self._seconds_of(0, fits), *(self._seconds_of(1, fits & pays) for pays in may_pay)]

    def _seconds_of(self, copied: int, wanted: NDArray[np.bool_]) -> Seconds:
        """Seconds ``[C, depths, checkpointing, backward, routings]``; ``wanted`` has no axis of depths."""
        table, num_depths = self.table, len(self.space.prefetch_depths)
        num_caches, *variants, num_routings = wanted.shape
        members = np.flatnonzero(wanted.any(axis=(1, 2)))
        forward = np.full((num_depths, num_caches * num_routings), math.inf)
        forward[:, members] = table.quick_forward(copied, members)
        kinds = np.moveaxis(np.logical_or.reduceat(wanted, table.first_of_kind, axis=-1), 0, 2)
        backward = table.quick_backward(copied, kinds.reshape(*variants, -1)).reshape(
            num_depths, *variants, num_caches, -1
        )
        forward = forward.reshape(num_depths, num_caches, 1, 1, -1)
        seconds = np.empty((num_caches, num_depths, *variants, num_routings))
        for cache, depth in np.ndindex(num_caches, num_depths):
            of_routings = backward[depth, :, :, cache].take(table.kind_of, axis=-1)
            np.add(forward[depth, cache], of_routings, out=seconds[cache, depth])
        return seconds

    def _decided(self) -> NDArray[np.bool_]:
        """Cut :attr:`within` to what keeps the slowdown; returns where copies pay."""
        space = self.space
        pays = np.zeros(self.seconds[0].shape, np.bool_)
        for place in np.ndindex(space.shape[:2]):
            self._settle(place)
            without = self.seconds[0][place]
            keeps = without / self.table.baseline <= self.request.max_slowdown
            if len(self.seconds) == 1:
                self.within[place] &= keeps[..., None, :]
                continue
            copied = self.seconds[1][place]
            pays[place] = (copied <= (1 - COPY_PAYS) * without) & np.isfinite(copied)
            keeps_too = pays[place] & (copied / self.table.baseline <= self.request.max_slowdown)
            self.within[place] &= keeps[..., None, :] | (keeps_too[..., None, :] & self.has_room[place])
        return pays

    def _settle(self, place: tuple[int, ...]) -> None:
        """Ask the program for seconds that are too close to a limit, or to where a copy pays, to say."""
        near = np.zeros(self.fits_at_all[place].shape, np.bool_)
        limit = self.request.max_slowdown * self.table.baseline
        for seconds in self.seconds:
            near |= ~(np.abs(seconds[place] - limit) > WITHIN * limit)
        if len(self.seconds) > 1:
            without, copied = (seconds[place] for seconds in self.seconds)
            with np.errstate(invalid="ignore"):
                off = np.abs(copied - (1 - COPY_PAYS) * without) > WITHIN * without
            near |= ~off & ~np.isinf(copied)
        near &= self.fits_at_all[place]
        if near.any():
            checkpointing, backward, routing = np.nonzero(near)
            self.make_exact(*(np.full(len(routing), each) for each in place), checkpointing, backward, routing)

    def make_exact(self, *cells: NDArray[np.int64]) -> None:
        """Put the program's seconds in for these cells, given by their places along each axis: those with a copy and
        those without together."""
        known = [np.flatnonzero(~np.isinf(seconds[cells])) for seconds in self.seconds]
        copied = np.repeat(np.arange(len(known)), [len(each) for each in known])
        places = np.concatenate(known)
        if len(places):
            found = self.table.exact_seconds(Cells(copied, *(axis[places] for axis in cells)))
            for copy, seconds in enumerate(self.seconds):
                seconds[tuple(axis[known[copy]] for axis in cells)] = found[copied == copy]

    @cached_property
    def window_bytes(self) -> NDArray[np.int64] | None:
        """Over the link in an accumulation window, ``[caches, depths, 1, backward, 1, routings]``; for ``traffic``."""
        if self.request.objective != "traffic":
            return None
        return grid_window_bytes(
            self.space,
            self.request,
            functools.cache(partial(grid_window_rows, self.space, self.request, self.profiles)),
            grid_hot_rows(self.space, self.request, self.profiles),
        )

    # --- decisions ---------------------------------------------------------------------------------------------------

    @property
    def num_feasible(self) -> int:
        """Candidates that keep every limit."""
        both = zip(self.within, self.space.is_new, strict=True)
        return sum(int(np.count_nonzero(within & new)) for within, new in both)

    @property
    def leading_routings(self) -> NDArray[np.int64]:
        """All but those that only have more probes than another, which for all else alike keeps the limits wherever
        they do, in no more time, memory and traffic.

        Where a bf16 copy pays for more probes and not for fewer, it may be untrue. Kinds of which it is are here whole.
        """
        first, kind_of = self.table.first_of_kind, self.table.kind_of
        leads = np.zeros(len(kind_of), np.bool_)
        leads[first] = True
        if len(self.seconds) > 1:
            *cell, before = np.nonzero(self.pays[..., 1:] & ~self.pays[..., :-1] & ~leads[1:])
            without, copied = self.seconds[0][(*cell, before)], self.seconds[1][(*cell, before + 1)]
            whole = np.zeros(len(first), np.bool_)
            whole[kind_of[before[copied < without * (1 + WITHIN)]]] = True
            leads |= whole[kind_of]
        return np.flatnonzero(leads)

    def most_capable(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Routings of the widest adapter with which some candidate keeps every limit; and the candidates that do,
        ``[caches, depths, checkpointing, backward, caps, of these]``. Some candidate must."""
        widths = self.space.adapter_width
        for width in sorted(set(widths.tolist()), reverse=True):
            routings = np.flatnonzero(widths == width)
            feasible = self.within.take(routings, axis=-1) & self.space.is_new.take(routings, axis=-1)
            if feasible.any():
                return routings, feasible
        raise ValueError("no candidate keeps every limit")

    def seconds_at(self, index: Index) -> float:
        """Step seconds of a decision."""
        copied = int(self.is_copied(index))
        seconds: float = self.seconds[copied][self._cell(index)].item()
        return seconds

    def seconds_on(self, cache: int, depth: int, cap: int, routings: NDArray[np.int64]) -> Seconds:
        """Step seconds at a cache, a prefetch depth and a cap with some routings, ``[checkpointing, backward, n]``."""
        seconds: Seconds = self.seconds[0][cache, depth].take(routings, axis=-1)
        pays = self.pays[cache, depth].take(routings, axis=-1) & self.has_room[cache, depth, cap, routings]
        if pays.any():
            return np.where(pays, self.seconds[1][cache, depth].take(routings, axis=-1), seconds)
        return seconds

    def is_copied(self, index: Index) -> bool:
        """Whether a copy pays and the host has room for it."""
        cache, depth, _, _, cap, routing = index
        return bool(self.pays[self._cell(index)] and self.has_room[cache, depth, cap, routing])

    @staticmethod
    def _cell(index: Index) -> Index:
        return (*index[:CAP_AXIS], index[-1])

    def decision(self, index: Index) -> Decision:
        """The decision at a grid index, with its bf16 copy if it has one."""
        return self.space.decision(index, bf16_copy=self.space.bf16_copies[int(self.is_copied(index))])

    def host_bytes_at(self, index: Index) -> int:
        """Host bytes of a decision, with its copy if it has one."""
        return self.host.at(index) + int(self.copy_bytes[index[-1]]) * self.decision(index).bf16_copy

    def trainable_at(self, index: Index) -> int:
        """Trainable parameters of a decision."""
        return int(self.trainable_parameters[index[-1]])

    def window_bytes_at(self, index: Index) -> int | None:
        """Bytes over the link in a window, where they are counted."""
        cache, depth, _, backward, _, routing = index
        return None if self.window_bytes is None else int(self.window_bytes[cache, depth, 0, backward, 0, routing])

    def point(self, index: Index, *, unused_bytes: int) -> ParetoPoint:
        """The decision at a grid index with what it brings and costs; ``unused_bytes`` is what the allocator is taken
        to hold beyond what is allocated."""
        moved = self.window_bytes_at(index)
        return ParetoPoint(
            decision=self.decision(index),
            moved_bytes_per_step=None if moved is None else round(moved / self.request.rounds),
            trainable_parameters=self.trainable_at(index),
            step_seconds=self.seconds_at(index),
            peak_reserved_bytes=self.device.at(index) + unused_bytes,
            host_bytes=self.host_bytes_at(index),
        )
