"""Runs with late lanes against sequential ones, on whichever device: what test_overlap.py and gpu/ share."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sessions import AMPLE_BYTES, EXPERTS, small_plan, small_trainer

from meft.planner.records.plan import Plan
from meft.runtime.device.device import CudaDevice, EmulatedDevice
from meft.runtime.device.lanes import Overlapped, Schedule, Sequential
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import Session, open_session
from meft.runtime.training.training import Trainer

STEPS = 50
LONGEST_DELAY_SECONDS = 4e-4
LATE = {"h2d": ("h2d",), "d2h": ("d2h",), "cpu": ("cpu",), "all": ("h2d", "d2h", "cpu", "gpu"), "gpu": ("gpu",)}
"""Lanes that are delayed: a slow lane lets all others run ahead of it."""
SLOW_TASK_SECONDS = 1e-2
SLOW = ("adamw", "accumulate", "row gradients", "gather", "queries")
"""Tasks that in one run each are slower than all else, so that whoever should have waited for them does not."""
CACHED: dict[str, object] = {"cached_rows": 40, "gradients_on_device": True}
CHOICES: list[tuple[dict[str, object], str, float | None]] = [
    ({"prefetch_depth": 0, "rows_in_backward": "refetched"}, "all", 1.0),
    ({"prefetch_depth": 0, "rows_in_backward": "retained", "gather_chunks": 3, **EXPERTS, **CACHED}, "all", None),
    ({"prefetch_depth": 1, "rows_in_backward": "retained", **EXPERTS, **CACHED}, "cpu", 1.0),
    ({"prefetch_depth": 2, "rows_in_backward": "refetched", **EXPERTS}, "h2d", None),
    ({"prefetch_depth": 1, "rows_in_backward": "refetched", "activation_checkpointing": True, **CACHED}, "d2h", None),
]
"""Decision, late lanes, clipping."""
SPIN_CYCLES_PER_SECOND = 1.5e9
"""Of a GPU's clock, about: how long a delay takes there does not matter much."""

MakeDevice = Callable[[], EmulatedDevice | CudaDevice]


def emulated() -> EmulatedDevice:
    """A device of its own for each run."""
    return EmulatedDevice(AMPLE_BYTES)


class Delays:
    """Random delays before the tasks of some lanes, the same for the same seed and order of tasks.

    The thread that issues a task sleeps. On CUDA that alone would leave the streams as fast as ever, so the task's
    stream spins as long.
    """

    def __init__(self, lanes: tuple[str, ...], seed: int, slow: str = "nothing") -> None:
        self.lanes, self.slow = lanes, slow
        self.random = {lane: random.Random(f"{seed} {lane}") for lane in lanes}
        self.streams: dict[str, Any] = {}

    def __call__(self, lane: str, name: str) -> float:
        seconds = self.seconds(lane, name)
        if seconds and lane in self.streams:
            with torch.cuda.stream(self.streams[lane]):
                spin(seconds)
        return seconds

    def seconds(self, lane: str, name: str) -> float:
        """How late the task is."""
        if name.startswith(self.slow):
            return SLOW_TASK_SECONDS
        if lane not in self.lanes or self.random[lane].random() < 0.7:
            return 0.0
        return self.random[lane].random() * LONGEST_DELAY_SECONDS

    def slow_down(self, session: Session) -> None:
        """Make the session's copy streams late, and its model: a block computes when the delay is over."""
        self.streams = dict(session.engine._streams)
        stall = spin if session.device.kind == "cuda" else time.sleep
        if "gpu" in self.lanes:
            for block in session.model.model.layers:
                block.register_forward_pre_hook(lambda *_: stall(self.seconds("gpu", "")))


def spin(seconds: float) -> None:
    """Keep the current CUDA stream busy, not the host."""
    torch.cuda._sleep(int(seconds * SPIN_CYCLES_PER_SECOND))


def open_with(
    plan: Plan, folder: Path, schedule: Schedule, *, device: MakeDevice = emulated, **options: Any
) -> Session:
    """A session under a schedule."""
    return open_session(plan, load_frozen_model(plan, folder), device(), seed=0, schedule=schedule, **options)


def trained(
    plan: Plan,
    folder: Path,
    schedule: Schedule,
    *,
    delays: Delays | None = None,
    steps: int = STEPS,
    device: MakeDevice = emulated,
    **options: Any,
) -> Trainer:
    """A trainer that has run, its session closed."""
    session = open_with(plan, folder, schedule, device=device)
    if delays is not None:
        delays.slow_down(session)
    try:
        trainer = small_trainer(session, steps=steps, **options)
        trainer.run()
    finally:
        session.close()
    return trainer


def assert_bit_equal(own: Trainer, other: Trainer) -> None:
    """Losses, rows, counted bytes, tables and routers are the same to the last bit."""
    assert own.history.losses == other.history.losses
    assert own.history.gradient_norms == other.history.gradient_norms
    assert own.measured.active_rows.layers == other.measured.active_rows.layers
    assert own.session.engine.counted_bytes == other.session.engine.counted_bytes
    for mine, theirs in zip(own.session.store.layers, other.session.store.layers, strict=True):
        for name in ("weights", "first_moment", "second_moment", "step_counts", "gradients", "touched"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    for mine, theirs in zip(own.session.router_weights, other.session.router_weights, strict=True):
        assert torch.equal(mine, theirs)


def assert_late_lanes_change_nothing(
    folder: Path,
    choice: dict[str, object],
    late: str,
    max_norm: float | None,
    *,
    device: MakeDevice = emulated,
    steps: int = STEPS,
) -> None:
    """Overlapped with late lanes, ``steps`` steps are the sequential ones bit for bit."""
    plan = small_plan(folder, choice=choice, grad_accum=3, seq_len=8, batch_size=1)
    delays = Delays(LATE[late], seed=len(str(choice)))
    overlapped = trained(
        plan, folder, Overlapped(delay=delays), delays=delays, max_norm=max_norm, device=device, steps=steps
    )
    sequential = trained(plan, folder, Sequential(), max_norm=max_norm, device=device, steps=steps)
    assert_bit_equal(overlapped, sequential)
    rows = [row for layer in sequential.measured.active_rows.layers for row in layer.elements()]
    assert len(set(rows)) > 1
    if choice.get("cached_rows"):
        assert sum(sequential.measured.missing_rows.layers) < sum(rows)


def assert_whoever_needs_a_slow_task_waits(folder: Path, slow: str, *, device: MakeDevice = emulated) -> None:
    """With one kind of task slower than all else, four steps are the sequential ones bit for bit."""
    choice = {"prefetch_depth": 1, "rows_in_backward": "refetched", **CACHED, "cached_rows": 20}
    plan = small_plan(folder, choice=choice, grad_accum=2, seq_len=8, batch_size=1)
    delays = Delays((), 0, slow)
    overlapped = trained(plan, folder, Overlapped(delay=delays), delays=delays, steps=4, device=device)
    assert_bit_equal(overlapped, trained(plan, folder, Sequential(), steps=4, device=device))
