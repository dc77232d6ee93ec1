"""What a plan says of this machine's GPU against what a few steps of it do, from random weights.

Each plan trains a handful of micro-batches with everything overlapped and again one thing after the other: memory by
the allocator and by the driver, bytes over the link, seconds a step and how long each lane worked. Random weights say
nothing of learning, and all of memory and speed but how many rows a text activates: the rows are the plan's own.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meft.planner.base.units import format_bytes
from meft.planner.records.plan import Direction, Plan
from meft.planner.timing.chrome import chrome_trace
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import Device
from meft.runtime.device.lanes import Overlapped, Sequential
from meft.runtime.device.nvml import NvmlReader, NvmlUnavailable
from meft.runtime.device.timeline import LaneClock
from meft.runtime.host.router import PlannedRouter, Router, Selection
from meft.runtime.session.model_loading import model_from_config
from meft.runtime.session.session import Session, WindowEnd, open_session

MakeDevice = Callable[[int], Device]
"""Of the allocator's budget in bytes."""
WAYS: tuple[Direction, ...] = ("h2d", "d2h")
WARM_UP_STEPS = 2
"""Not timed: kernels are loaded and chosen, buffers pinned."""


@dataclass(frozen=True)
class WorkingRouter:
    """Chooses rows as a run does, for the time that it takes, and gives the plan's, for the bytes that they are."""

    working: Router
    planned: PlannedRouter

    def select(self, layer: int, keys: torch.Tensor, queries: torch.Tensor, probes: torch.Tensor | None) -> Selection:
        """See :class:`Router`."""
        self.working.select(layer, keys, queries, probes)
        return self.planned.select(layer, keys, queries, probes)


@dataclass(frozen=True)
class Measured:
    """One schedule's steps. Lanes are seconds a step; ``process_bytes`` is None where the driver does not tell."""

    step_seconds: float
    lanes_seconds: dict[str, float]
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int | None
    process_source: str
    h2d_bytes_per_step: float
    d2h_bytes_per_step: float


@dataclass(frozen=True)
class PlanCheck:
    """A plan's predictions beside what was measured."""

    model: str
    gpu_mem_bytes: int
    adapter_width: int
    predicted_step_seconds: float
    predicted_baseline_seconds: float
    predicted_allocated_bytes: int
    predicted_reserved_bytes: int
    predicted_process_bytes: int
    """At most."""
    predicted_h2d_bytes_per_step: float
    predicted_d2h_bytes_per_step: float
    overlapped: Measured
    sequential: Measured

    @property
    def practicality(self) -> float:
        """Seconds that the GPU computes over seconds that a step takes: 1 is the speed of all on the GPU."""
        return self.overlapped.lanes_seconds["gpu"] / self.overlapped.step_seconds


@dataclass(frozen=True)
class GpuCheck:
    """All of it. ``skipped`` says what could not be done here and why."""

    machine: str
    versions: dict[str, str]
    plans: tuple[PlanCheck, ...]
    skipped: tuple[str, ...]

    def save(self, path: Path) -> None:
        """As JSON, and beside it the page of text."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".txt").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """One page for people."""
        lines = [self.machine, ", ".join(f"{name} {version}" for name, version in self.versions.items())]
        for check in self.plans:
            lines += ["", *_page(check)]
        lines += ["", *(f"skipped: {what}" for what in self.skipped)]
        return "\n".join(lines).strip() + "\n"


def check_plan(
    plan: Plan,
    config: Mapping[str, Any],
    *,
    make_device: MakeDevice,
    nvml: NvmlReader | NvmlUnavailable,
    steps: int = 4,
    trace: Path | None = None,
) -> PlanCheck:
    """Run ``steps`` timed micro-batches under each schedule; ``trace`` takes the last overlapped one's tasks."""
    prediction, decision = plan.prediction, plan.decision
    memory, transfer = prediction.device_memory, prediction.transfer
    return PlanCheck(
        model=plan.request.model.name,
        gpu_mem_bytes=plan.request.gpu_mem_bytes,
        adapter_width=decision.adapter_width,
        predicted_step_seconds=prediction.timing.step_seconds,
        predicted_baseline_seconds=prediction.timing.baseline_step_seconds,
        predicted_allocated_bytes=memory.peak_allocated_bytes,
        predicted_reserved_bytes=memory.peak_reserved_bytes,
        predicted_process_bytes=memory.process_bytes.high_bytes,
        predicted_h2d_bytes_per_step=transfer.h2d_bytes_per_step,
        predicted_d2h_bytes_per_step=transfer.d2h_bytes_per_step,
        overlapped=_measure(plan, config, make_device, nvml, steps=steps, overlapped=True, trace=trace),
        sequential=_measure(plan, config, make_device, nvml, steps=steps, overlapped=False, trace=None),
    )


def _measure(
    plan: Plan,
    config: Mapping[str, Any],
    make_device: MakeDevice,
    nvml: NvmlReader | NvmlUnavailable,
    *,
    steps: int,
    overlapped: bool,
    trace: Path | None,
) -> Measured:
    planned = PlannedRouter(plan.prediction.sparsity.active_rows_per_layer)
    device = make_device(plan.prediction.device_memory.allocator_budget_bytes)
    with torch.device(device.torch_device):
        model = model_from_config(plan, dict(config))
    session = open_session(
        plan,
        model,
        device,
        seed=0,
        around=lambda working: WorkingRouter(working, planned),
        schedule=Overlapped() if overlapped else Sequential(),
        clock=LaneClock(keep=trace is not None),
    )
    try:
        return _run(session, nvml, steps=steps, trace=trace)
    finally:
        session.close()
        session.adapter.detach()
        del session, model
        gc.collect()
        device.empty_cache()


def _run(session: Session, nvml: NvmlReader | NvmlUnavailable, *, steps: int, trace: Path | None) -> Measured:
    _steps(session, WARM_UP_STEPS)
    before = _worked(session)
    session.device.reset_peaks()
    counted = [session.engine.bytes_in(way, "step") for way in WAYS]
    session.clock.restart()
    seconds = _steps(session, steps)
    after, peaks = _worked(session), session.device.peaks()
    moved = [session.engine.bytes_in(way, "step") - earlier for way, earlier in zip(WAYS, counted, strict=True)]
    if trace is not None:
        trace.write_text(json.dumps(chrome_trace(session.clock.events()), separators=(",", ":")), encoding="utf-8")
    reading = nvml.process_memory(at_least_bytes=peaks.reserved_bytes if session.device.kind == "cuda" else 0)
    return Measured(
        step_seconds=seconds / steps,
        lanes_seconds={lane: (after[lane] - before[lane]) / steps for lane in after},
        allocated_bytes=peaks.allocated_bytes,
        reserved_bytes=peaks.reserved_bytes,
        process_bytes=reading.num_bytes,
        process_source=reading.source,
        h2d_bytes_per_step=moved[0] / steps,
        d2h_bytes_per_step=moved[1] / steps,
    )


def _steps(session: Session, count: int) -> float:
    """Micro-batches of random tokens, each a window of its own; seconds of all, optimizer steps included."""
    request, started = session.plan.request, time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(request.model.vocab_size, (request.batch_size, request.seq_len), generator=generator)
        batch = Batch(ids, torch.ones_like(ids), ids)
        end = WindowEnd(learning_rate=1e-5, max_norm=1.0)
        session.step(batch, loss_scale=1.0, window_end=end)
        session.optimizer_step(learning_rate=end.learning_rate, max_norm=end.max_norm)
    session.drain()
    session.device.synchronize()
    return time.perf_counter() - started


def _worked(session: Session) -> dict[str, float]:
    copies, clock = session.engine.busy_seconds(), session.clock
    clock.settle()
    computing = {"cpu": clock.busy_seconds["cpu"], "gpu": clock.busy_seconds["gpu"]}
    return {"h2d": copies["h2d"], "d2h": copies["d2h"]} | computing


def _page(check: PlanCheck) -> list[str]:
    overlapped, sequential = check.overlapped, check.sequential
    process = "not told" if overlapped.process_bytes is None else format_bytes(overlapped.process_bytes)
    lanes = ", ".join(f"{lane} {seconds * 1e3:.1f}" for lane, seconds in overlapped.lanes_seconds.items())
    return [
        f"{check.model}, width {check.adapter_width:,}, within {format_bytes(check.gpu_mem_bytes)}",
        f"  allocated  {_against(overlapped.allocated_bytes, check.predicted_allocated_bytes)}",
        f"  reserved   {_against(overlapped.reserved_bytes, check.predicted_reserved_bytes)}",
        f"  process    {process} by {overlapped.process_source}; at most {format_bytes(check.predicted_process_bytes)}",
        f"  to device  {_against(overlapped.h2d_bytes_per_step, check.predicted_h2d_bytes_per_step)} a step",
        f"  to host    {_against(overlapped.d2h_bytes_per_step, check.predicted_d2h_bytes_per_step)} a step",
        f"  step       {overlapped.step_seconds * 1e3:.1f} ms overlapped, {sequential.step_seconds * 1e3:.1f} ms one "
        f"thing after the other; predicted {check.predicted_step_seconds * 1e3:.1f} ms",
        f"  lanes      {lanes} ms a step; the GPU computes {check.practicality:.1%} of it",
    ]


def _against(measured: float, predicted: float) -> str:
    return f"{format_bytes(round(measured))}, predicted {format_bytes(round(predicted))}"
