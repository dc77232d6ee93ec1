"""Step time of every decision of the grid, with a bf16 copy of the rows where one pays.

Where the request leaves the copy open, a step is simulated without one and, where a copy may pay, with one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meft.planner.predict.prediction import ProfileSet
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Request
from meft.planner.search.grid_costs import RowsOfCache
from meft.planner.search.space import CAP_AXIS, Space
from meft.planner.timing.lanes import baseline_seconds, simulate_candidates
from meft.planner.timing.program import StepCosts
from meft.planner.timing.step import step_costs
from meft.planner.traffic.hot_rows import HotRows
from meft.planner.traffic.sparsity import WindowRows

COPY_PAYS = 0.01
"""Least share of the step's time that a bf16 copy must save: rates are not known as well as that, its memory is."""


def grid_step_seconds(
    space: Space,
    request: Request,
    profiles: ProfileSet,
    rows_of: RowsOfCache,
    hot: HotRows | None,
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
            chosen = space.candidates_at(place, backward)
            costs = _routing_costs(space, request, profiles, rows_of(place), hot, chosen)
            baseline = np.asarray(baseline_seconds(costs[0], num_layers=num_layers))
            may_pay = [np.array(True), *(copy_may_pay(costs[0], own, baseline, num_layers) for own in costs[1:])]
            for depth, again in np.ndindex(wanted.shape[2:4]):
                at = (place, depth, again, backward)
                members = [np.flatnonzero(wanted[copy, *at] & pays) for copy, pays in enumerate(may_pay)]
                count = sum(map(len, members))
                found = simulate_candidates(
                    _taken_together(costs, members),
                    num_layers=num_layers,
                    prefetch_depth=np.full(count, space.prefetch_depths[depth]),
                    checkpointing=np.full(count, space.activation_checkpointing[again]),
                    refetched=np.full(count, choice == "refetched"),
                )
                for copy, part in enumerate(np.split(found, [len(members[0])])[: len(members)]):
                    seconds[copy, *at, members[copy]] = part
    return np.expand_dims(seconds, 1 + CAP_AXIS), baseline


def _routing_costs(
    space: Space,
    request: Request,
    profiles: ProfileSet,
    rows: WindowRows | None,
    hot: HotRows | None,
    chosen: Candidates,
) -> list[StepCosts]:
    """Costs of every routing, for each of the copies; they do not depend on the cap."""
    return [
        step_costs(
            request=request,
            gpu=profiles.gpu,
            link=profiles.link,
            host=profiles.host,
            candidates=replace(chosen, bf16_copy=bf16_copy),
            active_rows=space.active_rows,
            window_active_rows=space.window_active_rows,
            cached=rows,
            hot=hot,
        )
        for bf16_copy in space.bf16_copies
    ]


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


def copy_may_pay(
    without: StepCosts, copied: StepCosts, baseline: NDArray[np.float64], num_layers: int
) -> NDArray[np.bool_]:
    """Where a copy may be worth its memory, by routing: it makes a step shorter by no more than what it saves in
    gathers, less what it adds to AdamW, and no step is shorter than the baseline.

    A step ends with the host's AdamW; if the routers' takes longer, hot rows are updated besides, or launching sets the
    pace, the host's may not show at all.
    """
    before, after = without.host, copied.host
    again_before, again_after = before.gather_again, after.gather_again
    saved = (before.gather - after.gather).mean(axis=0)
    if again_before is not None and again_after is not None:
        saved = saved + (again_before - again_after).mean(axis=0)
    beside = without.gpu.hot_adamw is not None or without.launch is not None
    hidden = np.asarray(without.gpu.router_adamw > before.adamw) | beside
    added = np.where(hidden, 0.0, np.subtract(after.adamw, before.adamw))
    pays: NDArray[np.bool_] = num_layers * saved - added >= COPY_PAYS * baseline
    return pays


def with_copies_that_pay(
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
