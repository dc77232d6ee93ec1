"""The search: every decision of a request weighed, the best that fits found, and its prediction made exactly.

A decision is feasible if the reserved peak with every layer's active rows *at the cap*, which no batch exceeds, fits
the allocator's budget; if tables and buffers fit the host; and if a step takes no more than ``max_slowdown`` times the
baseline's. For the objective ``speed`` the trainable share has a least value too.

``capacity`` looks for the widest adapter, then the largest K, then the least time per row that is chosen as exact
routing would (step time over the recall of looking ahead: fetching sooner must save more than it misses). ``traffic``
looks for the same width and K, then the fewest bytes over the link per row so chosen, then that time; ``speed`` for the
shortest step. Ties go on through the rest, so the order is total: the same request and profiles give the same plan.

Where the request leaves it open whether the host keeps a bf16 copy of the rows, each decision has one if it fits the
host and makes the step faster by :data:`COPY_PAYS`. That is no further candidate: the one without it is slower for all
objectives, and only host memory tells them apart.

Cheap limits come first: memory is computed for the whole grid of :mod:`meft.planner.space`, and only what fits is
simulated. The winner is predicted again by the functions of a single decision, and that is what the plan reports.
Device memory that it leaves over goes to hot rows, where the sparsity profile knows how much they carry and a step is
the shorter for them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from meft.planner.errors import UsageError
from meft.planner.host_memory import host_total_bytes
from meft.planner.hot_rows import HotRows
from meft.planner.infeasible import Infeasible, Limit, explain
from meft.planner.lanes import StepCosts, baseline_seconds, simulate_candidates
from meft.planner.memory import peak_allocated_bytes, reserved_bytes
from meft.planner.pareto import pareto_front, thinned
from meft.planner.plan import Decision, ParetoPoint, Plan, Prediction, Request, SearchSummary
from meft.planner.prediction import ProfileSet, inputs_used, predict, trainable_parameters
from meft.planner.space import CAP_AXIS, Space, enumerate_space
from meft.planner.sparsity import WindowRows, at_seq_len, hot_rows_among, window_rows
from meft.planner.timing import step_costs
from meft.planner.transfer import window_bytes

WITHOUT_MLP_MODULE = ("opt",)
"""Model types whose FFN is linear layers among the block's others."""
HOT_PARTS = 16
"""Hot rows are tried as so many parts of the width."""
PARETO_POINTS = 12
PARETO_NEAR = 6
"""Points of the front kept at the winner and around it; the others spread over the rest of it."""
COPY_PAYS = 0.01
"""Least share of the step's time that a bf16 copy must save: rates are not known as well as that, its memory is."""
SAME_SECONDS = 1e-9
"""Relative difference that summing in another order may make."""

_Values: TypeAlias = NDArray[np.int64] | NDArray[np.float64] | NDArray[np.bool_]
_RowsOfCache: TypeAlias = Callable[[int], WindowRows | None]
"""What a window's rows do under the cache at a place of its axis, of every routing; None where none is cached."""

__all__ = ["Infeasible", "ProfileSet", "Weighed", "make_plan", "predict", "weigh"]


def make_plan(request: Request, profiles: ProfileSet, *, meft_version: str) -> Plan | Infeasible:
    """The best plan for ``request``, or why there is none.

    Pure and deterministic. Raises :class:`UsageError` for a request that contradicts itself or that the runtime would
    refuse, and for a sparsity profile of another number of layers.
    """
    check_request(request)
    weighed = weigh(request, profiles)
    if not weighed.feasible.any():
        return _infeasible(request, profiles)
    winner = weighed.best(request)
    decision = weighed.decision(winner)
    prediction = predict(request, decision, profiles)
    _check_consistent(weighed, winner, request, prediction)
    decision, prediction = with_hot_rows(request, profiles, decision, prediction)
    return Plan(
        meft_version=meft_version,
        request=request,
        decision=decision,
        prediction=prediction,
        inputs=inputs_used(request, decision, profiles),
        search=SearchSummary(
            candidates=weighed.space.num_candidates,
            feasible=int(weighed.feasible.sum()),
            pareto=tuple(weighed.point(index, request) for index in weighed.front(winner, request)),
        ),
    )


def check_request(request: Request) -> None:
    """Refuse what contradicts itself and what the runtime does not train; raises :class:`UsageError`."""
    shape, width, top_k = request.model, request.adapter_width, request.top_k
    if request.weights_dtype in ("fp16", "int8"):
        raise UsageError(
            f"weights_dtype {request.weights_dtype}: the runtime trains beside fp32, bf16 or nf4 weights; give one of "
            f"them"
        )
    if shape.model_type in WITHOUT_MLP_MODULE:
        raise UsageError(
            f"model {shape.name}: its blocks have no FFN module of their own, which the runtime's adapter sits beside; "
            f"plan for another model (meft-plan estimate prices this one)"
        )
    if request.bf16_copy and request.adapter_dtype != "bf16":
        raise UsageError(
            f"bf16_copy: the adapter's rows travel in {request.adapter_dtype}, as they are kept; leave it out, or give "
            f"adapter_dtype bf16"
        )
    if width is not None and top_k is not None and top_k > width:
        raise UsageError(
            f"top_k {top_k} is above adapter_width {width}: a token cannot choose more rows than there are"
        )
    if width is not None and request.hot_rows is not None and request.hot_rows > width:
        raise UsageError(f"hot_rows {request.hot_rows} is above adapter_width {width}: give at most that")
    if request.prefetch_depth is not None and request.prefetch_depth >= shape.num_layers:
        raise UsageError(
            f"prefetch_depth {request.prefetch_depth}: {shape.name} has {shape.num_layers} layers; give at most "
            f"{shape.num_layers - 1}"
        )


def with_hot_rows(
    request: Request, profiles: ProfileSet, decision: Decision, prediction: Prediction
) -> tuple[Decision, Prediction]:
    """The decision with as many hot rows as make its step shortest (for ``traffic``: as move the fewest bytes), of
    sixteenths of the width, and its prediction.

    As it is where the request says how many, or the profile does not know how popular rows are. Rows that are hot need
    not be cached: the two together are no more than the width.
    """
    found = (decision, prediction)
    if request.hot_rows is not None or not profiles.sparsity.popularity:
        return found
    width = decision.adapter_width
    for part in range(1, HOT_PARTS + 1):
        hot_rows = width * part // HOT_PARTS
        cached_rows = min(decision.cached_rows, width - hot_rows)
        update = {
            "hot_rows": hot_rows,
            "cached_rows": cached_rows,
            "gradients_on_device": decision.gradients_on_device and cached_rows > 0,
        }
        tried = decision.model_copy(update=update)
        predicted = predict(request, tried, profiles)
        if not _fits(request, profiles, predicted):
            break
        if _cost(request, predicted) < _cost(request, found[1]):
            found = (tried, predicted)
    return found


def _cost(request: Request, prediction: Prediction) -> float:
    """What hot rows are to lessen."""
    if request.objective == "traffic":
        return prediction.transfer.window_bytes(request.grad_accum)
    return prediction.timing.step_seconds


def _fits(request: Request, profiles: ProfileSet, prediction: Prediction) -> bool:
    """Whether device memory at the cap, host memory and the slowdown are within the limits."""
    reserved = prediction.device_memory.peak_reserved_bytes_at_cap or 0
    on_device = reserved + profiles.gpu.context.high_bytes <= request.gpu_mem_bytes
    on_host = prediction.host_memory.total_bytes <= request.host_mem_bytes
    return on_device and on_host and prediction.timing.slowdown <= request.max_slowdown


# --- weighing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighed:
    """A request's decisions with what each needs. Arrays have the axes of :class:`~meft.planner.space.Space`, of length
    1 where a choice makes no difference."""

    space: Space
    limits: tuple[Limit, ...]
    within: NDArray[np.bool_]
    """Where every limit is kept."""
    reserved_bytes: NDArray[np.int64]
    """At the cap."""
    allocated_bytes: NDArray[np.int64]
    """At the cap."""
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

    def at(self, values: _Values, index: tuple[int, ...]) -> float:
        """One decision's value."""
        value: float = np.broadcast_to(values, self.space.shape)[index].item()
        return value

    def best(self, request: Request) -> tuple[int, ...]:
        """Grid index of the feasible decision that the objective prefers."""
        widest, most_rows_per_token = -self.space.adapter_width, -self.space.top_k
        order: list[_Values] = [widest, most_rows_per_token, *self.ranked_bytes(), self.ranked_seconds(request)]
        if request.objective == "speed":
            order = [order[-1], *order[:-1]]
        return _first(self.feasible, [*order, -self.space.caps, self.reserved_bytes])

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
        cost = _ranks([np.broadcast_to(each, self.space.shape)[:, :, :, :, cap][index] for each in costs])
        front = pareto_front(capacity, cost, self.reserved_bytes[:, :, :, :, cap][index])
        order = [(*(int(axis[place]) for axis in index[:-1]), cap, int(routing[place])) for place in front]
        near = order.index(winner)
        return [order[place] for place in thinned(len(order), near=near, most=PARETO_POINTS, neighbours=PARETO_NEAR)]

    def point(self, index: tuple[int, ...], request: Request) -> ParetoPoint:
        """The decision at a grid index with what it brings and costs."""
        moved = None if self.window_bytes is None else self.at(self.window_bytes, index) / request.grad_accum
        return ParetoPoint(
            decision=self.decision(index),
            moved_bytes_per_step=None if moved is None else round(moved),
            trainable_parameters=int(self.at(self.trainable_parameters, index)),
            step_seconds=self.at(self.step_seconds, index),
            peak_reserved_bytes=int(self.at(self.reserved_bytes, index)),
            host_bytes=int(self.at(self.host_bytes, index)),
        )


def weigh(request: Request, profiles: ProfileSet, *, simulate_all: bool = False) -> Weighed:
    """Compute what every decision needs; step times only of those that fit unless ``simulate_all``."""
    space = enumerate_space(request, profiles.sparsity)
    allocated = _allocated_bytes(space, request, profiles)
    reserved = np.asarray(reserved_bytes(allocated))
    host = [_host_bytes(space, request, profiles, bf16_copy=copied) for copied in space.bf16_copies]
    trainable = np.asarray(
        trainable_parameters(
            request,
            adapter_width=space.adapter_width,
            num_experts=space.num_experts,
            key_experts=space.key_experts,
        )
    )
    limits = _cheap_limits(request, profiles, reserved=reserved, host=host[0], trainable=trainable)
    fits = np.ones(space.shape, np.bool_)
    for limit in limits:
        fits &= limit.holds()
    wanted = np.ones_like(fits) if simulate_all else fits
    has_room = [np.asarray(num_bytes <= request.host_mem_bytes) for num_bytes in host[1:]]
    rows_of = cache(lambda place: _window_rows(space, request, profiles, place))
    seconds, baseline = _step_seconds(
        space,
        request,
        profiles,
        rows_of,
        wanted=np.stack([np.any(wanted & room, axis=CAP_AXIS) for room in (np.array(True), *has_room)]),
    )
    copied, seconds, host_bytes = _with_copies(space, seconds, host, has_room)
    slowdown = Limit("slowdown", "max_slowdown", seconds / baseline, request.max_slowdown)
    return Weighed(
        space=space,
        limits=(*limits, slowdown),
        within=fits & slowdown.holds(),
        reserved_bytes=reserved,
        allocated_bytes=allocated,
        host_bytes=host_bytes,
        trainable_parameters=trainable,
        step_seconds=seconds,
        bf16_copied=copied,
        window_bytes=_window_bytes(space, request, rows_of, _hot_rows(space, request, profiles))
        if request.objective == "traffic"
        else None,
    )


def _allocated_bytes(space: Space, request: Request, profiles: ProfileSet) -> NDArray[np.int64]:
    """Peak allocated device bytes with every layer's rows at the cap, over the whole grid."""
    num_layers = request.model.num_layers
    peak = peak_allocated_bytes(
        request=request,
        gpu=profiles.gpu,
        active_rows=np.broadcast_to(space.caps, (num_layers, *space.caps.shape)),
        active_rows_cap=space.caps,
        prefetch_depth=space.depth_axis,
        num_experts=space.num_experts,
        num_probes=space.num_probes,
        key_experts=space.key_experts,
        retained=space.retained_axis,
        activation_checkpointing=space.checkpointing_axis,
        cached_rows=space.cached_axis,
        gradients_on_device=space.on_device_axis,
        hot_rows=space.hot_rows,
    )
    return np.broadcast_to(peak, space.shape)


def _host_bytes(space: Space, request: Request, profiles: ProfileSet, *, bf16_copy: bool) -> NDArray[np.int64]:
    return np.asarray(
        host_total_bytes(
            request=request,
            adapter_width=space.adapter_width,
            active_rows_cap=space.caps,
            prefetch_depth=space.depth_axis,
            num_probes=space.num_probes,
            key_experts=space.key_experts,
            pinned=profiles.pinned,
            cached_rows=space.cached_axis,
            hot_rows=space.hot_rows,
            bf16_copy=bf16_copy,
        )
    )


def _cheap_limits(
    request: Request,
    profiles: ProfileSet,
    *,
    reserved: NDArray[np.int64],
    host: NDArray[np.int64],
    trainable: NDArray[np.int64],
) -> tuple[Limit, ...]:
    """All but the slowdown. The device must hold the context besides what the allocator reserves."""
    device = Limit("device memory", "gpu_mem_bytes", reserved + profiles.gpu.context.high_bytes, request.gpu_mem_bytes)
    limits = (device, Limit("host memory", "host_mem_bytes", host, request.host_mem_bytes))
    if request.objective != "speed":
        return limits
    share = trainable / request.model.num_parameters
    least = request.min_trainable_fraction
    return (*limits, Limit("trainable share", "min_trainable_fraction", share, least, at_least=True))


def _step_seconds(
    space: Space,
    request: Request,
    profiles: ProfileSet,
    rows_of: _RowsOfCache,
    *,
    wanted: NDArray[np.bool_],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Step seconds, with the cap's axis, along which they do not change, of length 1; and the baseline of each routing.

    Infinite where not ``wanted`` (``[copies, caches, depths, checkpointing, backward, routings]``), and where a copy
    cannot pay. Both with and without a copy are simulated together: that is fewer and larger arrays.
    """
    num_layers = request.model.num_layers
    seconds = np.full(wanted.shape, math.inf)
    baseline = np.empty(0)
    for place in range(len(space.gradients_on_device)):
        if baseline.size and not wanted[:, place].any():
            continue
        for backward, choice in enumerate(space.rows_in_backward):
            refetched = choice == "refetched"
            costs = _routing_costs(space, request, profiles, rows_of(place), cache_place=place, refetched=refetched)
            baseline = np.asarray(baseline_seconds(costs[0], num_layers=num_layers))
            may_pay = [np.array(True), *(_may_pay(costs[0], own, baseline, num_layers) for own in costs[1:])]
            for depth, again in np.ndindex(wanted.shape[2:4]):
                at = (place, depth, again, backward)
                members = [np.flatnonzero(wanted[copy, *at] & pays) for copy, pays in enumerate(may_pay)]
                count = sum(map(len, members))
                found = simulate_candidates(
                    _taken_together(costs, members),
                    num_layers=num_layers,
                    prefetch_depth=np.full(count, space.prefetch_depths[depth]),
                    checkpointing=np.full(count, space.activation_checkpointing[again]),
                    refetched=np.full(count, refetched),
                )
                for copy, part in enumerate(np.split(found, [len(members[0])])[: len(members)]):
                    seconds[copy, *at, members[copy]] = part
    return np.expand_dims(seconds, 1 + CAP_AXIS), baseline


def _may_pay(
    without: StepCosts, copied: StepCosts, baseline: NDArray[np.float64], num_layers: int
) -> NDArray[np.bool_]:
    """Where a copy may be worth its memory, by routing: it makes a step shorter by no more than what it saves in
    gathers, less what it adds to AdamW, and no step is shorter than the baseline.

    A step ends with the host's AdamW; if the routers' takes longer, or hot rows are updated besides, the host's may not
    show at all.
    """
    before, after = without.host, copied.host
    again_before, again_after = before.gather_again, after.gather_again
    saved = (before.gather - after.gather).mean(axis=0)
    if again_before is not None and again_after is not None:
        saved = saved + (again_before - again_after).mean(axis=0)
    hidden = np.asarray(without.gpu.router_adamw > before.adamw) | (without.gpu.hot_adamw is not None)
    added = np.where(hidden, 0.0, np.subtract(after.adamw, before.adamw))
    pays: NDArray[np.bool_] = num_layers * saved - added >= COPY_PAYS * baseline
    return pays


def _taken_together(costs: Sequence[StepCosts], members: Sequence[NDArray[np.int64]]) -> StepCosts:
    """The costs of these routings without a copy, then of those with one, which differ on the host alone."""
    if len(costs) == 1:
        return costs[0].take(members[0])
    parts = [own.host.take(routings) for own, routings in zip(costs, members, strict=True)]
    together = costs[0].take(np.concatenate(members))
    again = [part.gather if part.gather_again is None else part.gather_again for part in parts]
    host = replace(
        together.host,
        gather=np.concatenate([part.gather for part in parts], axis=-1),
        gather_again=np.concatenate(again, axis=-1),
        adamw=np.concatenate([np.asarray(part.adamw) for part in parts], axis=-1),
    )
    return replace(together, host=host)


def _with_copies(
    space: Space,
    seconds: NDArray[np.float64],
    host: Sequence[NDArray[np.int64]],
    has_room: Sequence[NDArray[np.bool_]],
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.int64]]:
    """Which decisions have a bf16 copy; seconds and host bytes with it. Given are both without and with one."""
    if len(space.bf16_copies) == 1:
        return np.array(space.bf16_copies[0]), seconds[0], host[0]
    copied = (seconds[1] <= (1 - COPY_PAYS) * seconds[0]) & np.isfinite(seconds[1]) & has_room[0]
    if not copied.any():
        return np.array(False), seconds[0], host[0]
    return copied, np.where(copied, seconds[1], seconds[0]), np.where(copied, host[1], host[0])


def _window_rows(space: Space, request: Request, profiles: ProfileSet, cache_place: int) -> WindowRows | None:
    """No cap is below the active rows, so the cap is not among what a window's rows depend on."""
    if not space.cached_rows[cache_place].any():
        return None
    return window_rows(
        at_seq_len(profiles.sparsity, request.seq_len),
        request.model.num_layers,
        tokens=request.tokens_per_step,
        top_k=space.top_k,
        adapter_width=space.adapter_width,
        grad_accum=request.grad_accum,
        cached_rows=space.cached_rows[cache_place],
        active_rows_cap=space.adapter_width,
        key_experts=space.key_experts,
        hot_rows=space.hot_rows,
    )


def _routing_costs(
    space: Space,
    request: Request,
    profiles: ProfileSet,
    rows: WindowRows | None,
    *,
    cache_place: int,
    refetched: bool,
) -> list[StepCosts]:
    """Costs of every routing, for each of the copies; they do not depend on the cap."""
    hot = _hot_rows(space, request, profiles)
    return [
        step_costs(
            request=request,
            gpu=profiles.gpu,
            link=profiles.link,
            host=profiles.host,
            adapter_width=space.adapter_width,
            num_experts=space.num_experts,
            num_probes=space.num_probes,
            key_experts=space.key_experts,
            refetched=refetched,
            active_rows=space.active_rows,
            window_active_rows=space.window_active_rows,
            cached=rows,
            gradients_on_device=space.gradients_on_device[cache_place],
            hot=hot,
            bf16_copy=bf16_copy,
        )
        for bf16_copy in space.bf16_copies
    ]


def _hot_rows(space: Space, request: Request, profiles: ProfileSet) -> HotRows | None:
    """What the hot rows that the request asks for carry, of every routing."""
    return hot_rows_among(
        at_seq_len(profiles.sparsity, request.seq_len),
        hot_rows=space.hot_rows,
        adapter_width=space.adapter_width,
        active_rows=space.active_rows,
        window_active_rows=space.window_active_rows,
    )


def _window_bytes(space: Space, request: Request, rows_of: _RowsOfCache, hot: HotRows | None) -> NDArray[np.int64]:
    """Bytes over the link in a window, ``[caches, depths, 1, backward, 1, routings]``: no other choice moves any."""
    lengths = (len(space.gradients_on_device), len(space.prefetch_depths), 1, len(space.rows_in_backward), 1)
    moved = np.empty((*lengths, len(space.adapter_width)), np.int64)
    for place, depth, _, backward, _ in np.ndindex(lengths):
        rows = rows_of(place)
        moved[place, depth, 0, backward, 0] = window_bytes(
            request=request,
            prefetch_depth=space.prefetch_depths[depth],
            num_probes=space.num_probes,
            key_experts=space.key_experts,
            refetched=space.rows_in_backward[backward] == "refetched",
            active_rows=space.active_rows,
            missing_rows=None if rows is None else rows.missing,
            overflow_rows=None if rows is None else rows.overflow,
            kept_rows=None if rows is None else rows.kept,
            gradients_on_device=space.gradients_on_device[place],
            hot=hot,
        )
    return moved


# --- choosing --------------------------------------------------------------------------------------------------------


def _first(feasible: NDArray[np.bool_], order: Sequence[_Values]) -> tuple[int, ...]:
    """Grid index of the feasible decision with the least first value, of those the least second, and so on; of what is
    left the first in the grid."""
    index = _best_routings(feasible, order)
    for values in order:
        found = np.broadcast_to(values, feasible.shape)[index]
        least = found == found.min()
        index = tuple(axis[least] for axis in index)
    return tuple(int(axis[0]) for axis in index)


def _best_routings(feasible: NDArray[np.bool_], order: Sequence[_Values]) -> tuple[NDArray[np.int64], ...]:
    """Grid indices of the feasible decisions, less those that lose by what only the routing decides, where that comes
    first: a million indices less to make."""
    routings = np.flatnonzero(feasible.any(axis=tuple(range(feasible.ndim - 1))))
    for values in itertools.takewhile(lambda each: each.ndim == 1, order):
        found = values[routings]
        routings = routings[found == found.min()]
    *others, place = np.nonzero(feasible[..., routings])
    return (*others, routings[place])


def _ranks(keys: Sequence[_Values]) -> NDArray[np.float64]:
    """Numbers that order places as ``keys`` do, the first before the others; a single key is its own rank."""
    if len(keys) == 1:
        return keys[0].astype(np.float64, copy=False)
    order = np.lexsort(tuple(reversed(keys)))
    steps = np.zeros(len(order), np.bool_)
    for key in keys:
        steps[1:] |= np.diff(key[order]) != 0
    ranks = np.empty(len(order))
    ranks[order] = np.cumsum(steps)
    return ranks


def _infeasible(request: Request, profiles: ProfileSet) -> Infeasible:
    weighed = weigh(request, profiles, simulate_all=True)

    def best(changed: Request) -> Decision | None:
        found = weigh(changed, profiles)
        return found.decision(found.best(changed)) if found.feasible.any() else None

    return explain(request, weighed.limits, weighed.space.is_new, gpu=profiles.gpu, best=best)


def _check_consistent(weighed: Weighed, winner: tuple[int, ...], request: Request, prediction: Prediction) -> None:
    """The search's arrays and the prediction of the winner are the same terms; a difference is a bug."""
    pairs: dict[str, tuple[float, float | None]] = {
        "peak allocated at the cap": (
            weighed.at(weighed.allocated_bytes, winner),
            prediction.device_memory.peak_allocated_bytes_at_cap,
        ),
        "host memory": (weighed.at(weighed.host_bytes, winner), prediction.host_memory.total_bytes),
        "trainable parameters": (
            weighed.at(weighed.trainable_parameters, winner),
            prediction.trainable_parameters,
        ),
        "step seconds": (weighed.at(weighed.step_seconds, winner), prediction.timing.step_seconds),
    }
    if weighed.window_bytes is not None:
        moved = prediction.transfer.window_bytes(request.grad_accum)
        pairs["bytes per window"] = (weighed.at(weighed.window_bytes, winner), moved)
    for name, (searched, predicted) in pairs.items():
        if predicted is None or not math.isclose(searched, predicted, rel_tol=SAME_SECONDS):
            raise RuntimeError(f"the search found {name} {searched} where the prediction says {predicted}")
