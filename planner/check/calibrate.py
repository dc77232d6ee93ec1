"""Correcting profiles by what runs observed, and saying how much better predictions get.

Each run is a plan with the report of its run. *Sparsity*: the level of every layer's law moves so that it gives the
observed active rows; how it changes with ``T`` and ``K/R`` moves only if the runs differ in them, and no further than
they make likely. The share of positions that hold tokens is counted, and follows from the lengths of the data's
sequences where the reports have them. *Time*: the rates of each lane, and of each kind of work on the host,
are divided by one factor, the geometric mean of observed over predicted busy seconds, both for the rows that were
active; the gpu lane's launches get a factor of their own, which runs of different sizes tell from that of its work.

Errors are judged by leaving one run out: profiles corrected by the others predict it.

Letters: ``L`` layers, ``T`` tokens, ``K`` rows per token, ``R`` adapter rows per layer, ``q`` effective tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.errors import UsageError
from meft.planner.base.schema import Basis
from meft.planner.check.audit import check_belongs
from meft.planner.check.rates import (
    Run,
    gpu_factors,
    host_factors,
    lane_factors,
    slower_gpu,
    slower_host,
    slower_link,
)
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import LANES, Plan, Prediction
from meft.planner.records.profiles import (
    TYPICAL_SHARE,
    TYPICAL_TOKENS,
    LayerSparsity,
    SparsityProfile,
)
from meft.planner.records.report import Report
from meft.planner.traffic.sparsity import check_layers, profile_laws

LEAST_RANGE = math.log(1.2)
"""Runs must differ by a fifth in ``T`` or ``K/R`` before anything is said of how rows change with it."""
RUN_SPREAD = 0.015
"""Standard deviation taken of a run's mean ``ln q`` about the law: 0.008 in eight runs of SmolLM2 on airport facts."""
TREND_SPREAD: dict[Basis, float] = {"counted": 0.1, "measured": 0.1, "assumed": 0.25}
"""Standard deviation taken of how far the old profile may be off in what Key-Experts routing and exponents of ``T`` and
``K/R`` do, by its basis. Both keep few runs from bending the law: with 0.25 throughout, five runs of SmolLM2 at 98 to
194 tokens put a run of 382 tokens, that its measured profile had 4 % low, 29 % low; with 0.1, 22 %."""
SETTLED_STEPS = 100
"""Optimizer steps after which the first ones, in which active rows fall, are a small part of a run's mean:
``docs/learning.md``."""
_MOST_FRACTION = 1 - 1e-6


@dataclass(frozen=True)
class ErrorRow:
    """One quantity of one run: relative errors of predictions before and after, by profiles that never saw this run."""

    run: int
    quantity: str
    observed: float
    before: float
    after: float


@dataclass(frozen=True)
class Calibration:
    """Corrected profiles, what was done and what could not be, and the errors of leaving one run out."""

    profiles: ProfileSet
    notes: tuple[str, ...]
    errors: tuple[ErrorRow, ...]


def calibrate(runs: Sequence[Run], profiles: ProfileSet) -> Calibration:
    """Correct ``profiles``, on which every plan rests, by the runs.

    Raises :class:`UsageError` for a report of another plan, a rehearsal, a plan with hot rows or token chunks, plans of
    different models or profiles, and reports of different devices.
    """
    _check(runs)
    corrected, notes = _correct(runs, profiles)
    return Calibration(corrected, tuple(notes), tuple(_left_out(runs, profiles)))


def _check(runs: Sequence[Run]) -> None:
    if not runs:
        raise UsageError("no runs: give plan.json report.json, once or several times")
    first = runs[0]
    for number, run in enumerate(runs, start=1):
        check_belongs(run.plan, run.report)
        if run.report.rehearsal or run.report.observed.step_seconds is None:
            raise UsageError(f"report {number}: it is a rehearsal, which measured nothing; give reports of training")
        if run.plan.decision.hot_rows:
            raise UsageError(
                f"plan {number}: hot_rows {run.plan.decision.hot_rows}: what such rows carry is not told from a report "
                f"yet; calibrate runs with --hot-rows 0"
            )
        if run.plan.decision.token_chunks > 1:
            raise UsageError(
                f"plan {number}: token_chunks {run.plan.decision.token_chunks}: its report has sums over chunks, which "
                f"do not tell what one activates; calibrate runs with --token-chunks 1"
            )
        if run.plan.request.model != first.plan.request.model:
            raise UsageError(
                f"plan {number}: its model is {run.plan.request.model.name}, that of the first is "
                f"{first.plan.request.model.name}; calibrate one model at a time"
            )
        if run.report.device.kind != first.report.device.kind or run.report.device.name != first.report.device.name:
            raise UsageError(
                f"report {number}: it ran on {run.report.device.name}, the first on "
                f"{first.report.device.name}; calibrate one device at a time"
            )
        used, expected = (_digests(each.plan) for each in (run, first))
        different = [kind for kind in expected if used.get(kind) != expected[kind]]
        if different:
            raise UsageError(
                f"plan {number}: it rests on another {' and '.join(different)} profile than the first; "
                f"calibrate plans of the same profiles together"
            )


def _digests(plan: Plan) -> dict[str, str]:
    return {used.kind: used.digest for used in plan.inputs.profiles}


def _correct(runs: Sequence[Run], profiles: ProfileSet) -> tuple[ProfileSet, list[str]]:
    sparsity, notes = corrected_sparsity(runs, profiles.sparsity)
    factors = lane_factors(runs, replace(profiles, sparsity=sparsity))
    by_work = host_factors(runs, replace(profiles, sparsity=sparsity))
    if len(runs) == 1:
        notes.append("one run: each lane's factor is a single observation, and nothing is left to judge it by")
    how = f"calibrated by {len(runs)} run{'s' * (len(runs) > 1)} on the {runs[0].report.device.name}"
    notes += [f"{lane} lane: {factor:.3f} times the predicted seconds" for lane, factor in factors.items()]
    notes += [f"{lane} lane: not observed, its rates stay" for lane in LANES if lane not in factors]
    notes += [f"{work} on the host: {factor:.3f} times the predicted seconds" for work, factor in by_work.items()]
    computing, launching = gpu_factors(runs, replace(profiles, sparsity=sparsity))
    if "gpu" in factors:
        notes.append(f"gpu lane: its work {computing:.3f} times, its launches {launching:.3f} times as long")
    corrected = replace(
        profiles,
        sparsity=sparsity,
        host=slower_host(profiles.host, factors.get("cpu", 1.0), how, by_work=by_work),
        gpu=slower_gpu(profiles.gpu, computing, how, launching=launching),
        link=slower_link(profiles.link, factors, how),
    )
    return corrected, notes


# --- sparsity ------------------------------------------------------------------------------------------------------


def corrected_sparsity(runs: Sequence[Run], profile: SparsityProfile) -> tuple[SparsityProfile, list[str]]:
    """The profile with levels, and where the runs tell growth, moved to the observed rows; and notes."""
    num_layers = runs[0].plan.request.model.num_layers
    check_layers(profile, num_layers)
    layers = profile.layers * (num_layers if len(profile.layers) == 1 else 1)
    offsets = np.array([math.log(run.share / TYPICAL_SHARE) for run in runs])
    log_tokens = np.array([math.log(run.tokens / TYPICAL_TOKENS) for run in runs])
    residuals = np.stack([_log_residuals(run, profile) for run in runs], axis=1)
    experts = np.array([float(run.plan.decision.needs.in_experts) for run in runs])
    trend_spread = TREND_SPREAD[profile.basis]
    (slope, growth, of_experts), notes = _shared_trends(residuals, offsets, log_tokens, experts, trend_spread)
    level = (residuals - slope * offsets - growth * log_tokens - of_experts * experts).mean(axis=1)
    moved = tuple(_moved(layer, float(by), slope, growth) for layer, by in zip(layers, level, strict=True))
    update: dict[str, Any] = {
        "key": f"{profile.key}-calibrated",
        "basis": "measured",
        "source": f"calibrated by {len(runs)} runs at {_places(runs)}; before: {profile.source}",
        "layers": moved,
        "key_experts_level": float(np.clip(profile.key_experts_level + of_experts, -5.0, 5.0)),
        "filled_fraction": min(1.0, statistics.fmean(run.tokens / run.plan.request.tokens_per_step for run in runs)),
        "sequence_tokens": _sequence_tokens(runs),
        "spread_fraction": _observed_spread(runs),
        "prefetch_recall_by_depth": _recalls(runs, profile),
    }
    if any(run.report.observed.dropped_rows for run in runs):
        notes.append("active_rows_cap dropped rows in a run: observed rows are the cap's there, and the law lies low")
    notes += _unsettled(runs)
    return profile.model_copy(update=update), notes


def _unsettled(runs: Sequence[Run]) -> list[str]:
    """Says so where active rows were observed while they still fell."""
    steps = [run.report.training.optimizer_steps for run in runs]
    if min(steps) >= SETTLED_STEPS:
        return []
    how_many = f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"
    apart = "" if max(steps) <= 1.2 * min(steps) else ", and runs of unequal length are not alike in them"
    return [
        f"runs of {how_many} optimizer steps: active rows fall in the first twenty or so of training, so that a longer "
        f"run has fewer than these{apart}; calibrate runs of {SETTLED_STEPS} or more, or of the length you plan for"
    ]


def _log_residuals(run: Run, profile: SparsityProfile) -> NDArray[np.float64]:
    """Observed less predicted ``ln q`` per layer, for the tokens that were there."""
    laws, experts = profile_laws(profile), run.plan.decision.needs.in_experts
    expected = np.log(laws.effective_tokens(tokens=run.tokens, share=run.share, key_experts=experts))
    fraction = np.clip(run.mean_rows / run.plan.decision.adapter_width, run.share, _MOST_FRACTION)
    observed = np.log(np.maximum(np.log1p(-fraction) / math.log1p(-min(run.share, _MOST_FRACTION)), 1.0))
    return np.asarray(observed - expected)


def _shared_trends(
    residuals: NDArray[np.float64],
    offsets: NDArray[np.float64],
    log_tokens: NDArray[np.float64],
    experts: NDArray[np.float64],
    trend_spread: float,
) -> tuple[tuple[float, float, float], list[str]]:
    """Change of the residual with ``ln(K/R)``, with ``ln T`` and with Key-Experts, the same for all layers; 0 where the
    runs do not tell."""
    names = {"K/R": offsets, "T": log_tokens, "routing": experts}
    varied = [name for name, values in names.items() if np.ptp(values) > LEAST_RANGE]
    notes = [
        f"the runs do not differ in {name}: how active rows change with it is the old profile's, and a plan elsewhere "
        f"extrapolates by it"
        for name in names
        if name not in varied
    ]
    if not varied:
        return (0.0, 0.0, 0.0), notes
    columns = np.stack([names[name] - names[name].mean() for name in varied], axis=1)
    if np.linalg.matrix_rank(columns) < len(varied):
        notes.append(f"{', '.join(varied)} change together in these runs: their effects cannot be told apart")
    mean = residuals.mean(axis=0)
    trends = dict(zip(varied, likely_trends(columns, mean - mean.mean(), spread=trend_spread), strict=True))
    return (trends.get("K/R", 0.0), trends.get("T", 0.0), trends.get("routing", 0.0)), notes


def likely_trends(columns: NDArray[np.float64], values: NDArray[np.float64], *, spread: float) -> list[float]:
    """The most likely slopes of ``values [runs]`` along ``columns [runs, trends]``, all normal: the old profile's (0)
    and the runs' weighed by ``spread`` and :data:`RUN_SPREAD`."""
    held = np.eye(columns.shape[1]) * (RUN_SPREAD / spread) ** 2
    return [float(slope) for slope in np.linalg.solve(columns.T @ columns + held, columns.T @ values)]


def _moved(layer: LayerSparsity, level: float, slope: float, growth: float) -> LayerSparsity:
    before = layer.alpha * math.log(TYPICAL_TOKENS) if layer.log_level is None else layer.log_level
    return layer.model_copy(
        update={
            "log_level": max(0.0, before + level),
            "level_slope": layer.level_slope + slope,
            "alpha": float(np.clip(layer.alpha + growth, 1e-4, 1.0)),
        }
    )


def _places(runs: Sequence[Run]) -> str:
    places = [(round(run.tokens), run.plan.decision.top_k, run.plan.decision.adapter_width) for run in runs]
    return "; ".join(f"T={tokens}, K={top_k}, R={width}" for tokens, top_k, width in dict.fromkeys(places))


def _sequence_tokens(runs: Sequence[Run]) -> tuple[int, ...]:
    """Lengths of the data's sequences, each quantile's mean over the runs; none unless every run's report has them."""
    lengths = [run.report.training.sequence_tokens for run in runs]
    if len({len(each) for each in lengths}) > 1:
        return ()
    return tuple(round(statistics.fmean(quantile)) for quantile in zip(*lengths, strict=True))


def _observed_spread(runs: Sequence[Run]) -> float:
    """How far above its layer's mean 99 of 100 batches lay at the most, over layers and runs."""
    layers = [layer for run in runs for layer in run.report.observed.active_rows if layer.mean]
    above = [(layer.p99 if layer.p99 is not None else layer.max) / layer.mean - 1 for layer in layers]
    return float(np.clip(np.quantile(above, 0.99) if above else 0.0, 0.0, 1.0))


def _recalls(runs: Sequence[Run], profile: SparsityProfile) -> tuple[float, ...]:
    """Recall by depth: the mean of what was observed; depths that were not move as the next shallower one did, and none
    is above a shallower one."""
    seen: dict[int, list[float]] = {}
    for run in runs:
        if run.report.observed.prefetch_recall is not None:
            seen.setdefault(run.plan.decision.prefetch_depth, []).append(run.report.observed.prefetch_recall)
    recalls, moved = [1.0], 1.0
    for depth, before in enumerate(profile.prefetch_recall_by_depth[1:], start=1):
        if depth in seen:
            moved = statistics.fmean(seen[depth]) / before if before else 1.0
        found = statistics.fmean(seen[depth]) if depth in seen else before * moved
        recalls.append(min(found, recalls[-1]))
    return tuple(recalls)


# --- judging -------------------------------------------------------------------------------------------------------


_QUANTITIES: dict[str, tuple[Callable[[Prediction], float], Callable[[Report], float | None]]] = {
    "h2d_bytes_per_step": (
        lambda prediction: prediction.transfer.h2d_bytes_per_step,
        lambda report: report.observed.transfer.h2d_bytes_per_step,
    ),
    "d2h_bytes_per_step": (
        lambda prediction: prediction.transfer.d2h_bytes_per_step,
        lambda report: report.observed.transfer.d2h_bytes_per_step,
    ),
    "active_rows_per_layer": (
        lambda prediction: statistics.fmean(prediction.sparsity.active_rows_per_layer),
        lambda report: statistics.fmean(layer.mean for layer in report.observed.active_rows),
    ),
    "step_seconds": (
        lambda prediction: prediction.timing.step_seconds,
        lambda report: report.observed.step_seconds,
    ),
}


def _left_out(runs: Sequence[Run], profiles: ProfileSet) -> Iterator[ErrorRow]:
    """Each run predicted by profiles that the others corrected; nothing for a single run."""
    if len(runs) < 2:
        return
    for place, run in enumerate(runs):
        others = [*runs[:place], *runs[place + 1 :]]
        after, _ = _correct(others, profiles)
        yield from errors_of(run, place + 1, before=profiles, after=after)


def errors_of(run: Run, number: int, *, before: ProfileSet, after: ProfileSet) -> Iterator[ErrorRow]:
    """Relative errors of one run's quantities by two sets of profiles, neither of which is told its rows."""
    old, new = (predict(run.plan.request, run.plan.decision, profiles) for profiles in (before, after))
    for name, (predicted, observed) in _QUANTITIES.items():
        seen = observed(run.report)
        if seen:
            yield ErrorRow(number, name, seen, predicted(old) / seen - 1, predicted(new) / seen - 1)
