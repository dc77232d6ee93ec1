"""Rates corrected by runs: observed over predicted seconds of every lane and kind of host work, and the profiles that
are slower, or faster, by those factors.

Letters: ``L`` layers, ``K`` rows per token, ``R`` adapter rows per layer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from meft.planner.predict.prediction import ProfileSet, predict, simulated_tasks
from meft.planner.records.plan import Lane, Plan, Prediction
from meft.planner.records.profiles import GpuProfile, HostProfile, LinkProfile, Sourced, sourced_numbers
from meft.planner.records.report import Report
from meft.planner.timing.chrome import Event, task_kind

GPU_SPREAD, FACTOR_SPREAD = 0.03, 1.0
"""Standard deviations taken: of a run's gpu seconds, and of how far work and launches may differ in their factors."""
LEAST_FACTOR = 0.05
"""Of the common factor: neither part takes no time at all."""
T = TypeVar("T", bound=str)
HostWork = Literal["gather", "scatter", "adamw", "route"]
_WORK_OF_TASK: dict[str, HostWork] = {
    "gather": "gather",
    "accumulate": "scatter",
    "adamw": "adamw",
    "gradient norm": "adamw",  # the rate of AdamW is measured with it
}
"""Kinds of the cpu lane's tasks; all others are parts of routing."""
_HOST_RATES: dict[str, HostWork] = {
    "gather_bytes_per_second": "gather",
    "scatter_bytes_per_second": "scatter",
    "adamw_bytes_per_second": "adamw",
    "gemm_flops_per_second": "route",
    "select_scores_per_second": "route",
}
_HOST_SECONDS: dict[str, HostWork] = {"overhead_seconds_per_layer": "route", "overhead_seconds_per_expert": "route"}
_PEAKS = {
    "matmul_efficiency": ("bf16_flops_per_second", "fp16_flops_per_second", "fp32_flops_per_second"),
    "memory_efficiency": ("memory_bytes_per_second",),
}


@dataclass(frozen=True)
class Run:
    """A plan and the report of a run of it."""

    plan: Plan
    report: Report

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch, padding left out, mean over steps."""
        return self.report.training.tokens / self.report.observed.steps

    @property
    def share(self) -> float:
        """``K/R``."""
        return self.plan.decision.top_k / self.plan.decision.adapter_width

    @property
    def mean_rows(self) -> NDArray[np.float64]:
        """Active rows per layer, ``[L]``."""
        return np.array([layer.mean for layer in self.report.observed.active_rows])


def lane_factors(runs: Sequence[Run], profiles: ProfileSet) -> dict[Lane, float]:
    """Observed over predicted busy seconds of each lane that was observed, geometric mean over the runs.

    The rows of a micro-batch are the observed ones, those of an accumulation window the sparsity profile's.
    """
    return _factors((run.report.observed.busy_seconds, given_rows(run, profiles).timing.busy_seconds) for run in runs)


def gpu_factors(runs: Sequence[Run], profiles: ProfileSet) -> tuple[float, float]:
    """What the gpu lane's work takes, and what its launches take, over what is predicted; 1 where it was not observed.

    Runs of different sizes tell them apart: work grows with tokens and rows, launches do not. The most likely two, by
    relative errors of :data:`GPU_SPREAD`, about the one factor for both with :data:`FACTOR_SPREAD`.
    """
    observed = [run.report.observed.busy_seconds.get("gpu", 0.0) for run in runs]
    told = [(run, seconds) for run, seconds in zip(runs, observed, strict=True) if seconds > 0]
    if not told:
        return 1.0, 1.0
    no_launches = replace(profiles, gpu=_without_launches(profiles.gpu))
    both = np.array([given_rows(run, profiles).timing.busy_seconds["gpu"] for run, _ in told])
    work = np.array([given_rows(run, no_launches).timing.busy_seconds["gpu"] for run, _ in told])
    seen = np.array([seconds for _, seconds in told])
    common = math.exp(float(np.log(seen / both).mean()))
    parts = common * np.stack([work, both - work], axis=1) / seen[:, None]  # of 1
    held = np.eye(2) * (GPU_SPREAD / FACTOR_SPREAD) ** 2
    found = 1 + np.linalg.solve(parts.T @ parts + held, parts.T @ (1 - parts.sum(axis=1)))
    computing, launching = (float(factor) for factor in common * np.maximum(found, LEAST_FACTOR))
    return computing, launching


def _without_launches(gpu: GpuProfile) -> GpuProfile:
    return gpu.model_copy(update={"kernel_launch_seconds": gpu.kernel_launch_seconds.model_copy(update={"value": 0.0})})


def host_factors(runs: Sequence[Run], profiles: ProfileSet) -> dict[HostWork, float]:
    """The same for each kind of work on the host, from the reports that tell them apart."""
    return _factors(
        (
            _by_work(run.report.observed.host_task_seconds.items()),
            _by_work(
                (task_kind(task.name), task.end_seconds - task.start_seconds) for task in _host_tasks(run, profiles)
            ),
        )
        for run in runs
    )


def _factors(observed_and_predicted: Iterable[tuple[Mapping[T, float], Mapping[T, float]]]) -> dict[T, float]:
    """Geometric means of observed over predicted seconds, of what took time in both."""
    logs: dict[T, list[float]] = {}
    for observed, predicted in observed_and_predicted:
        for name, seconds in observed.items():
            if seconds > 0 and predicted.get(name, 0.0) > 0:
                logs.setdefault(name, []).append(math.log(seconds / predicted[name]))
    return {name: math.exp(statistics.fmean(values)) for name, values in logs.items()}


def _host_tasks(run: Run, profiles: ProfileSet) -> Iterator[Event]:
    sparsity = given_rows(run, profiles).sparsity
    tasks = simulated_tasks(run.plan.request, run.plan.decision, profiles, sparsity)
    return (task for task in tasks if task.lane == "cpu")


def _by_work(seconds_by_task: Iterable[tuple[str, float]]) -> dict[HostWork, float]:
    totals: dict[HostWork, float] = {}
    for task, seconds in seconds_by_task:
        work = _WORK_OF_TASK.get(task, "route")
        totals[work] = totals.get(work, 0.0) + seconds
    return totals


def given_rows(run: Run, profiles: ProfileSet) -> Prediction:
    """The prediction of a run's decision for the rows that were active in it."""
    rows = np.minimum(np.rint(run.mean_rows).astype(np.int64), run.plan.decision.active_rows_cap)
    return predict(run.plan.request, run.plan.decision, profiles, active_rows_per_layer=rows.tolist())


def slower_host(
    host: HostProfile, factor: float, how: str, *, by_work: Mapping[HostWork, float] | None = None
) -> HostProfile:
    """Every rate divided, every overhead multiplied by the factor of its work in ``by_work``, else by ``factor``."""
    factors = dict.fromkeys(get_args(HostWork), factor) | dict(by_work or {})
    changed = {name: _times(getattr(host, name), 1 / factors[work], how) for name, work in _HOST_RATES.items()}
    changed |= {name: _times(getattr(host, name), factors[work], how) for name, work in _HOST_SECONDS.items()}
    return host.model_copy(update={"key": f"{host.key}-calibrated", **changed})


def slower_gpu(gpu: GpuProfile, factor: float, how: str, *, launching: float | None = None) -> GpuProfile:
    """Efficiencies divided by ``factor`` and launches multiplied by ``launching`` (else by ``factor``); an efficiency
    that passes 1 raises its peaks."""
    of_launch = factor if launching is None else launching
    changed: dict[str, Any] = {"kernel_launch_seconds": _times(gpu.kernel_launch_seconds, of_launch, how)}
    for name, peaks in _PEAKS.items():
        efficiency = getattr(gpu, name).value / factor
        changed[name] = _times(getattr(gpu, name), min(1.0, efficiency) / getattr(gpu, name).value, how)
        if efficiency > 1:
            known = {peak: getattr(gpu, peak) for peak in peaks if getattr(gpu, peak) is not None}
            changed |= {peak: _times(number, efficiency, how) for peak, number in known.items()}
    return gpu.model_copy(update={"key": _calibrated_gpu_key(gpu), **changed})


def _calibrated_gpu_key(gpu: GpuProfile) -> str:
    return gpu.key if gpu.shares_host_cores else f"{gpu.key}-calibrated"


def slower_link(link: LinkProfile, factors: Mapping[Lane, float], how: str) -> LinkProfile:
    """Each direction's rates divided by its lane's factor; the latency multiplied by their mean."""
    changed = {
        name: _times(number, 1 / factors.get("h2d" if "h2d" in name else "d2h", 1.0), how)
        for name, number in sourced_numbers(link)
        if name != "latency_seconds"
    }
    both = statistics.fmean([factors.get("h2d", 1.0), factors.get("d2h", 1.0)])
    changed["latency_seconds"] = _times(link.latency_seconds, both, how)
    return link.model_copy(update={"key": f"{link.key}-calibrated", **changed})


def _times(number: Sourced, factor: float, how: str) -> Sourced:
    if factor == 1.0:
        return number
    before = number.source.split("; before: ")[0]
    source = f"{how}: {factor:.4g} times {number.value:.4g}; before: {before}"
    return Sourced(value=number.value * factor, basis="measured", source=source)
