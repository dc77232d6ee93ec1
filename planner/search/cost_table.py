"""Seconds of every task of the grid's candidates, each worked out once, and step seconds that follow.

Most tasks know nothing of most choices: none of the cap, nearly none of the number of probes, few of look-ahead and
checkpointing. So costs are kept by *kind*, that is by width, K, experts and how rows are routed, for each cache, with
and without a bf16 copy, and for rows refetched or retained; what depends on the probes is kept by routing.

:meth:`CostTable.quick_seconds` gives every candidate's step to within :data:`~meft.planner.timing.apart.WITHIN`,
:meth:`CostTable.exact_seconds` some candidates' as the program says, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from meft.planner.predict.prediction import ProfileSet
from meft.planner.records.plan import Request
from meft.planner.search.grid_timing import copy_may_pay
from meft.planner.search.space import Space
from meft.planner.timing.apart import (
    Forward,
    Seconds,
    backward_seconds,
    backward_tasks,
    forward_seconds,
    forward_tasks,
    least_backward,
    least_forward,
)
from meft.planner.timing.lanes import baseline_seconds, simulate_candidates
from meft.planner.timing.program import GpuSeconds, HostSeconds, LinkSeconds, StepCosts
from meft.planner.timing.step import step_costs_of_choices
from meft.planner.traffic.sparsity import WindowRows, at_seq_len, distinct_layers, hot_rows_among, window_rows

Part = TypeVar("Part", GpuSeconds, LinkSeconds, HostSeconds)


@dataclass(frozen=True, eq=False, repr=False)
class Cells:
    """Candidates without their caps, as lists of equal length of places on the grid's axes. ``copied``: 0 without a
    bf16 copy, 1 with one, as places in :attr:`~meft.planner.search.space.Space.bf16_copies`."""

    copied: NDArray[np.int64]
    cache: NDArray[np.int64]
    depth: NDArray[np.int64]
    checkpointing: NDArray[np.int64]
    backward: NDArray[np.int64]
    routing: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.routing)

    def where(self, chosen: NDArray[np.int64]) -> Cells:
        """Those chosen."""
        return Cells(*(getattr(self, each.name)[chosen] for each in fields(self)))


class CostTable:
    """Costs of all of a grid. Letters: ``C`` caches, ``U`` kinds."""

    def __init__(self, space: Space, request: Request, profiles: ProfileSet) -> None:
        self.space = space
        self.num_layers = request.model.num_layers
        self.first_of_kind, self.kind_of = _kinds(space)
        one_choice = replace(space, bf16_copies=space.bf16_copies[:1], rows_in_backward=space.rows_in_backward[:1])
        self.route, self.probes = _Terms(one_choice, request, profiles).of_probes()
        """Of each routing."""
        self.costs = _Terms(space, request, profiles).of_kinds(self.first_of_kind)
        """By copy and by rows in backward; arrays ``[C * U]``."""
        whole = np.asarray(baseline_seconds(self.costs[0][0], num_layers=self.num_layers))
        self.baseline = whole[: len(self.first_of_kind)][self.kind_of]
        """Of each routing."""
        self.may_pay = [copy_may_pay(self.costs[0][0], own[0], whole, self.num_layers) for own in self.costs[1:]]
        """``[C * U]``: where a copy may pay."""

    # --- every candidate -----------------------------------------------------------------------------------------

    def _forward(self, costs: StepCosts, members: NDArray[np.int64]) -> Forward:
        """Forward of ``members``, places in ``[C * routings]``."""
        cache, routing = np.divmod(members, len(self.kind_of))
        tasks = forward_tasks(costs).take(cache * len(self.first_of_kind) + self.kind_of[routing])
        return replace(tasks, host=tasks.host + self.route[routing], probes=self.probes[routing])

    def least_seconds(self, members: NDArray[np.int64]) -> tuple[Seconds, Seconds]:
        """No step is shorter, whatever is copied and however deep it looks ahead: forward of ``members``, places in
        ``[C * routings]``; and backward ``[checkpointing, backward, C * U]``."""
        of_kinds = [_quickest(each) for each in zip(*self.costs, strict=True)]
        choices = self.space.rows_in_backward
        backward = [
            backward_tasks(costs, refetched=choice == "refetched")
            for costs, choice in zip(of_kinds, choices, strict=True)
        ]
        return least_forward(self._forward(of_kinds[0], members), num_layers=self.num_layers), np.stack(
            [
                [least_backward(tasks, num_layers=self.num_layers, checkpointing=again) for tasks in backward]
                for again in self.space.activation_checkpointing
            ]
        )

    def quick_forward(self, copied: int, members: NDArray[np.int64]) -> Seconds:
        """Seconds to the end of forward ``[depths, members]``; members are places in ``[C * routings]``. Where weights
        are gathered or launching takes its time, which only the program knows of, they are doubtful: nan."""
        depths = self.space.prefetch_depths
        if self.costs[0][0].gpu.unpack is not None or self.costs[0][0].launch is not None:
            return np.full((len(depths), len(members)), math.nan)
        tasks = self._forward(self.costs[copied][0], members)
        return np.stack([forward_seconds(tasks, num_layers=self.num_layers, prefetch_depth=depth) for depth in depths])

    def quick_backward(self, copied: int, wanted: NDArray[np.bool_]) -> Seconds:
        """Seconds from the end of forward ``[depths, *wanted.shape]``, where ``wanted``, which is ``[checkpointing,
        backward, C * U]``; nan where doubtful, elsewhere infinite."""
        depths = self.space.prefetch_depths
        seconds = np.full((len(depths), *wanted.shape), math.inf)
        for again, backward in np.ndindex(wanted.shape[:2]):
            refetched = self.space.rows_in_backward[backward] == "refetched"
            checkpointing = self.space.activation_checkpointing[again]
            members = np.flatnonzero(wanted[again, backward])
            tasks = backward_tasks(self.costs[copied][backward], refetched=refetched).take(members)
            known: dict[int, Seconds] = {}
            for place, depth in enumerate(depths):
                differs = depth if refetched else min(depth, 1)  # how far it looks ahead is forward's, but for a slot
                if differs not in known:
                    known[differs] = backward_seconds(
                        tasks,
                        num_layers=self.num_layers,
                        prefetch_depth=depth,
                        checkpointing=checkpointing,
                        refetched=refetched,
                    )
                seconds[place, again, backward, members] = known[differs]
        return seconds

    # --- some candidates ---------------------------------------------------------------------------------------------

    def exact_seconds(self, cells: Cells) -> Seconds:
        """Step seconds of these, as :func:`~meft.planner.timing.lanes.simulate` says."""
        place = cells.cache * len(self.first_of_kind) + self.kind_of[cells.routing]
        members = [
            np.flatnonzero((cells.copied == copied) & (cells.backward == backward))
            for copied, backward in np.ndindex(len(self.costs), len(self.costs[0]))
        ]
        of_choices = [costs for by_backward in self.costs for costs in by_backward]
        taken = [costs.take(place[each]) for costs, each in zip(of_choices, members, strict=True) if len(each)]
        order = np.concatenate(members)
        seconds = np.empty(len(cells))
        seconds[order] = self._simulated(_together(taken), cells.where(order))
        return seconds

    def _simulated(self, costs: StepCosts, cells: Cells) -> Seconds:
        space, routing = self.space, cells.routing
        link, host = replace(costs.link, probes=self.probes[routing]), replace(costs.host, route=self.route[routing])
        return simulate_candidates(
            replace(costs, link=link, host=host),
            num_layers=self.num_layers,
            prefetch_depth=np.array(space.prefetch_depths)[cells.depth],
            checkpointing=np.array(space.activation_checkpointing)[cells.checkpointing],
            refetched=np.array([choice == "refetched" for choice in space.rows_in_backward])[cells.backward],
        )


def _kinds(space: Space) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first routing of each kind ``[U]``, and the kind of each routing."""
    return _told_apart(space.adapter_width, space.top_k, space.num_experts, space.key_experts)


def _told_apart(*values: NDArray[np.int64] | NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places where a list goes on with other values, and for each place the number of the values there; those alike
    follow each other."""
    is_first = np.ones(len(values[0]), np.bool_)
    is_first[1:] = np.any([each[1:] != each[:-1] for each in values], axis=0)
    return np.flatnonzero(is_first), np.cumsum(is_first) - 1


def _quickest(by_copy: Sequence[StepCosts]) -> StepCosts:
    """Costs with the shorter of the host's tasks, with a bf16 copy or without."""
    if len(by_copy) == 1:
        return by_copy[0]
    hosts = [costs.host for costs in by_copy]
    again = [host.gather if host.gather_again is None else host.gather_again for host in hosts]
    host = replace(
        hosts[0],
        gather=np.minimum(hosts[0].gather, hosts[1].gather),
        gather_again=np.minimum(again[0], again[1]),
        adamw=np.minimum(hosts[0].adamw, hosts[1].adamw),
    )
    return replace(by_copy[0], host=host)


def _alike_caches(space: Space) -> Iterator[slice]:
    """Places of caches whose tasks are of the same sort: none is cached; rows are; their gradients are summed too."""
    sorts = [(bool(rows.any()), sums) for rows, sums in zip(space.cached_rows, space.gradients_on_device, strict=True)]
    place = 0
    for _, members in groupby(sorts):
        first, place = place, place + len(list(members))
        yield slice(first, place)


class _Terms:
    """The functions of a single decision, given lists of routings."""

    def __init__(self, space: Space, request: Request, profiles: ProfileSet) -> None:
        self.space, self.request, self.profiles = space, request, profiles
        self.sparsity = at_seq_len(profiles.sparsity, request.seq_len)

    def of_probes(self) -> tuple[Seconds, Seconds]:
        """Routing on the host, and sending the probed experts, of each routing."""
        costs = self._step_costs(slice(0, 1), slice(None), None)[0][0]
        return np.asarray(costs.host.route).reshape(-1), np.asarray(costs.link.probes).reshape(-1)

    def of_kinds(self, kinds: NDArray[np.int64]) -> list[list[StepCosts]]:
        """Everything else ``[C * U]``, but routing, by copy and by rows in backward; ``kinds`` are places of
        routings."""
        groups = list(_alike_caches(self.space))
        parts = [self._step_costs(caches, kinds, self._window(caches, kinds)) for caches in groups]
        shapes = [(caches.stop - caches.start, len(kinds)) for caches in groups]
        gpu = _flat([part[0][0].gpu for part in parts], shapes)
        links = [
            _flat([choice.link for choice in same], shapes) for same in zip(*(part[0] for part in parts), strict=True)
        ]
        hosts = [_flat([choice[0].host for choice in same], shapes) for same in zip(*parts, strict=True)]
        launch = parts[0][0][0].launch
        return [[StepCosts(gpu, link, replace(host, route=0.0), launch=launch) for link in links] for host in hosts]

    def _window(self, caches: slice, kinds: NDArray[np.int64]) -> WindowRows | None:
        """What a window's rows do under some caches, ``[L, caches, U]``; None where these cache none."""
        if not self.space.cached_rows[caches].any():
            return None
        rows, sort = self._all_windows

        def of_kinds(per_layer: NDArray[np.int64]) -> NDArray[np.int64]:
            distinct = distinct_layers(per_layer)[:, caches][..., sort[kinds]]
            return np.broadcast_to(distinct, (len(per_layer), *distinct.shape[1:]))

        return WindowRows(missing=of_kinds(rows.missing), overflow=of_kinds(rows.overflow), kept=of_kinds(rows.kept))

    @cached_property
    def _all_windows(self) -> tuple[WindowRows, NDArray[np.int64]]:
        """What a window's rows do under every cache, ``[L, C, sorts]``, and the sort of each routing: experts make no
        difference."""
        space = self.space
        first, sort = _told_apart(space.adapter_width, space.top_k, space.key_experts)
        width = space.adapter_width[None, first]
        candidates = replace(
            space.candidates,
            adapter_width=width,
            active_rows_cap=width,
            top_k=space.top_k[None, first],
            key_experts=space.key_experts[None, first],
            cached_rows=space.cached_rows[:, first],
        )
        rows = window_rows(
            self.sparsity,
            self.request.model.num_layers,
            tokens=self.request.tokens_per_step,
            grad_accum=self.request.rounds,
            candidates=candidates,
        )
        return rows, sort

    def _step_costs(
        self,
        caches: slice,
        routings: NDArray[np.int64] | slice,
        window: WindowRows | None,
    ) -> list[list[StepCosts]]:
        """Costs ``[L, caches, routings]`` of alike caches with some routings, by copy and by rows in backward; layers
        that are alike are one."""
        space = self.space
        width = space.adapter_width[routings]
        active, in_window = (_by_cache(rows, routings) for rows in (space.active_rows, space.window_active_rows))
        candidates = replace(
            space.candidates_at(caches.start),
            adapter_width=width,
            num_experts=space.num_experts[routings],
            num_probes=space.num_probes[routings],
            key_experts=space.key_experts[routings],
        )
        return step_costs_of_choices(
            request=self.request,
            gpu=self.profiles.gpu,
            link=self.profiles.link,
            host=self.profiles.host,
            candidates=candidates,
            active_rows=active,
            window_active_rows=in_window,
            cached=window,
            hot=hot_rows_among(
                self.sparsity,
                hot_rows=space.hot_rows,
                adapter_width=width,
                active_rows=active,
                window_active_rows=in_window,
            ),
            copied=space.bf16_copies,
            retained=[choice == "retained" for choice in space.rows_in_backward],
        )


def _by_cache(rows: NDArray[np.int64], routings: NDArray[np.int64] | slice) -> NDArray[np.int64]:
    """Rows ``[L, routings]`` of some routings with an axis of caches, ``[L, 1, routings]``; layers that are one by
    construction stay one."""
    distinct = distinct_layers(rows)[:, None, routings]
    return np.broadcast_to(distinct, (len(rows), *distinct.shape[1:]))


def _together(parts: Sequence[StepCosts]) -> StepCosts:
    """The costs of some candidates, then of others."""

    def joined(name: str) -> Any:
        of_parts = [getattr(part, name) for part in parts]
        values = [[getattr(part, each.name) for part in of_parts] for each in fields(of_parts[0])]
        arrays = (np.concatenate(same, axis=-1) if np.ndim(same[0]) else same[0] for same in values)
        return type(of_parts[0])(*arrays)

    if len(parts) == 1:
        return parts[0]
    return StepCosts(joined("gpu"), joined("link"), joined("host"), launch=parts[0].launch)


def _flat(parts: Sequence[Part], shapes: Sequence[tuple[int, int]]) -> Part:
    """Costs of all caches one after the other: every array ``[C * U]``, or ``[L, C * U]``; numbers stay numbers.
    ``shapes`` are the parts' caches and kinds."""

    def joined(name: str, values: list[Any]) -> Any:
        if all(np.ndim(value) == 0 for value in values):
            return values[0]
        layers: tuple[int, ...] = values[0].shape[:1] if name in parts[0].PER_LAYER else ()
        whole = [_whole(value, layers, shape) for value, shape in zip(values, shapes, strict=True)]
        return np.concatenate(whole, axis=-2).reshape(*layers, -1)

    names = [each.name for each in fields(parts[0])]
    return replace(parts[0], **{name: joined(name, [getattr(part, name) for part in parts]) for name in names})


def _whole(value: Seconds, layers: tuple[int, ...], shape: tuple[int, int]) -> Seconds:
    """Seconds of every cache and kind; what does not depend on the layer has an axis of one in its place, or none."""
    return np.broadcast_to(value if layers else np.reshape(value, np.shape(value)[-2:]), (*layers, *shape))
