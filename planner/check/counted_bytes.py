"""Bytes over the link, and between machines: what a plan means for the rows that a run saw, and what the run counted.

Letters: ``L`` layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.schema import Bytes, Record
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Direction, Plan, Way
from meft.planner.records.report import Report
from meft.planner.traffic.network import NetworkCategories, NetworkUse, network_bytes
from meft.planner.traffic.sharding import WEIGHTS, gathered_bytes_of
from meft.planner.traffic.transfer import (
    Categories,
    StepRows,
    router_gradients_of,
    step_bytes_by_category,
    window_gradient_bytes,
)

DIRECTIONS: tuple[Direction, ...] = ("h2d", "d2h")


class CategoryCheck(Record):
    """Bytes of one category over the link: predicted from the observed active rows, and counted; means per ``per``."""

    direction: Way
    category: str
    per: Literal["step", "optimizer_step"]
    predicted_bytes: Bytes
    counted_bytes: Bytes
    equal: bool


def bytes_given_rows(
    plan: Plan,
    *,
    rows_total: Iterable[int],
    steps: int,
    missing_total: Iterable[int] | None = None,
    overflow_total: Iterable[int] | None = None,
    hot_total: Iterable[int] | None = None,
) -> dict[tuple[Direction, str], int]:
    """Bytes by category over ``steps`` micro-batches whose active rows, summed over them, are ``rows_total [L]``.

    A step's bytes are a constant plus a multiple of each layer's rows, so sums of rows give sums of bytes. Without
    cached rows all that are not hot are missing, and overflow.
    """
    active = np.array(list(rows_total), dtype=np.int64)
    nothing = np.zeros_like(active)
    hot = nothing if hot_total is None else np.array(list(hot_total), dtype=np.int64)
    missing, overflow = (
        active - hot if given is None else np.array(list(given), dtype=np.int64)
        for given in (missing_total, overflow_total)
    )
    with_rows = _categories(plan, active, missing, overflow, hot)
    without = _categories(plan, nothing, nothing, nothing, nothing)
    return {key: int(with_rows[key]) + (steps - 1) * int(without[key]) for key in with_rows}


def bytes_of_report(plan: Plan, report: Report, steps: int) -> dict[tuple[Direction, str], int]:
    """Bytes by category over the ``steps`` micro-batches of a report, for the rows that it saw active."""
    layers, plan = report.observed.active_rows, as_run(plan, report)
    hot = [layer.hot_total or 0 for layer in layers]
    cold = [layer.total - of_layer for layer, of_layer in zip(layers, hot, strict=True)]
    missing, overflow = [layer.missing_total for layer in layers], [layer.overflow_total for layer in layers]
    return bytes_given_rows(
        plan,
        rows_total=[layer.total for layer in layers],
        missing_total=[rows if seen is None else seen for rows, seen in zip(cold, missing, strict=True)],
        overflow_total=[rows if seen is None else seen for rows, seen in zip(cold, overflow, strict=True)],
        hot_total=hot,
        steps=steps,
    )


def as_run(plan: Plan, report: Report) -> Plan:
    """The plan for as many ranks as ran it: what is predicted of a step and of host memory depends on that."""
    ranks = {"gpus": report.gpus, "nodes": report.nodes}
    return plan.model_copy(update={"request": plan.request.model_copy(update=ranks)})


def windows_of(plan: Plan, report: Report) -> int:
    """Accumulation windows that the report measured; the last may be incomplete."""
    return -(-report.observed.steps // plan.request.grad_accum)


def rounds_of(plan: Plan, report: Report) -> int:
    """Rounds of the ranks: in the last some may have had no micro-batch."""
    windows, grad_accum = windows_of(plan, report), plan.request.grad_accum
    rest = report.observed.steps - (windows - 1) * grad_accum
    return (windows - 1) * (grad_accum // report.num_ranks) - (-rest // report.num_ranks)


def bytes_between_cards(plan: Plan, report: Report) -> int:
    """Weights that all ranks gathered: those without a micro-batch in a round as those with one."""
    return rounds_of(plan, report) * report.num_ranks * gathered_bytes_of(as_run(plan, report).request, plan.decision)


def bytes_between_machines(plan: Plan, report: Report) -> NetworkCategories:
    """Over the network, of all that the report measured, for the rows that it saw cross."""
    steps, windows, rounds = report.observed.steps, windows_of(plan, report), rounds_of(plan, report)
    layers, run = report.observed.active_rows, as_run(plan, report)
    use = NetworkUse(
        rounds=rounds,
        windows=windows,
        foreign_rows=sum(layer.foreign_total or 0 for layer in layers),
        summed_rows=sum(layer.summed_total or 0 for layer in layers),
        steps=steps,
        asked_rows=sum(layer.asked_total or 0 for layer in layers),
        scored_pairs=sum(layer.scored_total or 0 for layer in layers),
    )
    return network_bytes(run.request, plan.decision, use)


def bytes_of_optimizer_steps(plan: Plan, report: Report) -> dict[tuple[Way, str], int]:
    """Bytes by category over all optimizer steps: as predicted for each, but the gradient sums of the rows that were
    kept, and what hot rows cost from when they were chosen; of all ranks together."""
    windows = windows_of(plan, report)
    with_hot = windows if report.rehearsal else report.observed.hot_windows
    entries = [entry for entry in plan.prediction.transfer.entries if entry.per == "optimizer_step"]
    found: dict[tuple[Way, str], int] = {
        (entry.direction, entry.category): entry.num_bytes
        * (with_hot if entry.category.startswith("hot_") else windows * report.num_ranks)
        for entry in entries
        if entry.category != "router_gradients" and entry.direction in DIRECTIONS
    }
    routers = router_gradients_of(as_run(plan, report).request, plan.decision)
    if routers:
        found["h2d", "router_gradients"] = routers * windows * report.num_ranks
    kept = [layer.kept_total for layer in report.observed.active_rows if layer.kept_total is not None]
    if kept and plan.decision.gradients_on_device:
        total = window_gradient_bytes(request=plan.request, decision=plan.decision, kept_rows_per_layer=kept)
        found["d2h", "window_gradients"] = total
    return found


def category_checks(plan: Plan, report: Report, steps: int) -> tuple[CategoryCheck, ...]:
    """Every category that was predicted or counted, per step and per optimizer step."""
    totals = bytes_of_report(plan, report, steps)
    predicted: dict[tuple[Way, str, Literal["step", "optimizer_step"]], int] = {
        (way, name, "step"): round(size / steps) for (way, name), size in totals.items()
    }
    for (way, name), size in bytes_of_optimizer_steps(plan, report).items():
        predicted[way, name, "optimizer_step"] = round(size / windows_of(plan, report))
    divisors = {"step": steps, "optimizer_step": windows_of(plan, report)}
    for (name, per), size in bytes_between_machines(plan, report).items():
        predicted["network", name, per] = round(size / divisors[per])
    predicted["cards", WEIGHTS, "step"] = round(bytes_between_cards(plan, report) / steps)
    counted = {
        (entry.direction, entry.category, entry.per): entry.num_bytes
        for entry in report.observed.transfer.entries
        if entry.per != "run"
    }
    return tuple(
        CategoryCheck(
            direction=key[0],
            category=key[1],
            per=key[2],
            predicted_bytes=predicted.get(key, 0),
            counted_bytes=counted.get(key, 0),
            equal=predicted.get(key, 0) == counted.get(key, 0),
        )
        for key in {**predicted, **counted}
        if predicted.get(key) or counted.get(key)
    )


def by_direction(totals: Mapping[tuple[Way, str], int] | Mapping[tuple[Direction, str], int]) -> list[int]:
    """Sums of each of :data:`DIRECTIONS`."""
    return [sum(size for (way, _), size in totals.items() if way == direction) for direction in DIRECTIONS]


def _categories(
    plan: Plan,
    rows: NDArray[np.int64],
    missing: NDArray[np.int64],
    overflow: NDArray[np.int64],
    hot: NDArray[np.int64],
) -> Categories:
    rows_of = StepRows(active=rows, missing=missing, overflow=overflow, hot=hot)
    return step_bytes_by_category(request=plan.request, candidates=Candidates.of(plan.decision), rows=rows_of)
