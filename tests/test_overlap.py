"""Overlapped, a run is the sequential one bit for bit, however long the lanes take; and what goes wrong is told."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from sessions import AMPLE_BYTES, EXPERTS, small_plan, small_trainer

from meft.planner.errors import UsageError
from meft.runtime.device import EmulatedDevice
from meft.runtime.engine import TransferEngine
from meft.runtime.lanes import Overlapped, Sequential
from meft.runtime.model_loading import load_frozen_model
from meft.runtime.session import Session, open_session

STEPS = 50
LONGEST_DELAY_SECONDS = 4e-4
LATE = {"h2d": ("h2d",), "d2h": ("d2h",), "cpu": ("cpu",), "all": ("h2d", "d2h", "cpu", "gpu"), "gpu": ("gpu",)}
"""Lanes that are delayed: a slow lane lets all others run ahead of it."""
SLOW_TASK_SECONDS = 1e-2
SLOW = ("adamw", "accumulate", "row gradients", "gather", "queries")
"""Tasks that in one run each are slower than all else, so that whoever should have waited for them does not."""
CACHED = {"cached_rows": 40, "gradients_on_device": True}


class Delays:
    """Random delays before the tasks of some lanes, the same for the same seed and order of tasks."""

    def __init__(self, lanes: tuple[str, ...], seed: int, slow: str = "nothing") -> None:
        self.lanes, self.slow = lanes, slow
        self.random = {lane: random.Random(f"{seed} {lane}") for lane in lanes}

    def __call__(self, lane: str, name: str) -> float:
        if name.startswith(self.slow):
            return SLOW_TASK_SECONDS
        if lane not in self.lanes or self.random[lane].random() < 0.7:
            return 0.0
        return self.random[lane].random() * LONGEST_DELAY_SECONDS

    def slow_down(self, model: torch.nn.Module) -> None:
        if "gpu" in self.lanes:
            for block in model.model.layers:
                block.register_forward_pre_hook(lambda *_: time.sleep(self("gpu", "")))


def open_with(plan, folder, schedule, **options) -> Session:
    model = load_frozen_model(plan, folder)
    return open_session(plan, model, EmulatedDevice(AMPLE_BYTES), seed=0, schedule=schedule, **options)


def trained(plan, folder, schedule, *, delays: Delays | None = None, steps: int = STEPS, **options):
    session = open_with(plan, folder, schedule)
    if delays is not None:
        delays.slow_down(session.model)
    try:
        trainer = small_trainer(session, steps=steps, **options)
        trainer.run()
    finally:
        session.close()
    return trainer


def assert_bit_equal(own, other) -> None:
    assert own.history.losses == other.history.losses
    assert own.history.gradient_norms == other.history.gradient_norms
    assert own.measured.active_rows == other.measured.active_rows
    assert own.session.engine.counted_bytes == other.session.engine.counted_bytes
    for mine, theirs in zip(own.session.store.layers, other.session.store.layers, strict=True):
        for name in ("weights", "first_moment", "second_moment", "step_counts", "gradients", "touched"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    for mine, theirs in zip(own.session.router_weights, other.session.router_weights, strict=True):
        assert torch.equal(mine, theirs)


CHOICES = [
    ({"prefetch_depth": 0, "rows_in_backward": "refetched"}, "all", 1.0),
    ({"prefetch_depth": 1, "rows_in_backward": "retained", **EXPERTS, **CACHED}, "cpu", 1.0),
    ({"prefetch_depth": 2, "rows_in_backward": "refetched", **EXPERTS}, "h2d", None),
    ({"prefetch_depth": 1, "rows_in_backward": "refetched", "activation_checkpointing": True, **CACHED}, "d2h", None),
]


@pytest.mark.parametrize(("choice", "late", "max_norm"), CHOICES)
def test_fifty_steps_are_the_sequential_ones_bit_for_bit(glass_folder, choice, late, max_norm) -> None:
    plan = small_plan(glass_folder, choice=choice, grad_accum=3, seq_len=8, batch_size=1)
    delays = Delays(LATE[late], seed=len(str(choice)))
    overlapped = trained(plan, glass_folder, Overlapped(delay=delays), delays=delays, max_norm=max_norm)
    sequential = trained(plan, glass_folder, Sequential(), max_norm=max_norm)
    assert_bit_equal(overlapped, sequential)
    rows = [row for step in sequential.measured.active_rows for row in step]
    assert len(set(rows)) > 1
    if choice.get("cached_rows"):
        assert sum(map(sum, sequential.measured.missing_rows)) < sum(rows)


@pytest.mark.parametrize("slow", SLOW)
def test_whoever_needs_a_slow_task_waits_for_it(glass_folder, slow) -> None:
    choice = {"prefetch_depth": 1, "rows_in_backward": "refetched", **CACHED, "cached_rows": 20}
    plan = small_plan(glass_folder, choice=choice, grad_accum=2, seq_len=8, batch_size=1)
    overlapped = trained(plan, glass_folder, Overlapped(delay=Delays((), 0, slow)), steps=4)
    assert_bit_equal(overlapped, trained(plan, glass_folder, Sequential(), steps=4))


def test_device_memory_peaks_do_not_depend_on_the_lanes_luck(glass_folder) -> None:
    plan = small_plan(glass_folder, choice={"prefetch_depth": 1, **EXPERTS}, seq_len=16)
    peaks = set()
    for seed in (1, 2, 3):
        delays = Delays(LATE["all"], seed)
        trainer = trained(plan, glass_folder, Overlapped(delay=delays), delays=delays, steps=4)
        peaks.add(trainer.measured.peaks.allocated_bytes)
    assert len(peaks) == 1


def threads_of_lanes() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("meft-")]


@pytest.mark.parametrize("lane", ["cpu", "h2d", "d2h"])
def test_an_exception_in_a_lane_reaches_the_caller_and_leaves_no_thread(glass_folder, lane) -> None:
    plan = small_plan(glass_folder, choice={"prefetch_depth": 1}, seq_len=16)
    others = set(threads_of_lanes())
    calls = 0

    def fail(given: str, name: str) -> float:
        nonlocal calls
        calls += given == lane
        if calls == 20:
            raise OSError(f"no luck with {name}")
        return 0.0

    with pytest.raises(OSError, match="no luck with"):
        trained(plan, glass_folder, Overlapped(delay=fail))
    assert set(threads_of_lanes()) == others


def test_closing_amid_a_slow_copy_ends_at_once(glass_folder) -> None:
    plan = small_plan(glass_folder, choice={"prefetch_depth": 1}, seq_len=16)
    session = open_with(plan, glass_folder, Overlapped(), link_gbps=1e-6)
    host = torch.zeros(1 << 20)
    with session.device.scope():
        device = torch.empty(1 << 20)
    session.engine.to_device(host, device, category="inputs")
    started = time.perf_counter()
    session.close()
    assert time.perf_counter() - started < 60  # the copy alone would take more than an hour
    with pytest.raises(RuntimeError, match="closed"):
        session.engine.to_device(host, device, category="inputs")


def test_a_throttled_link_takes_its_time(glass_folder) -> None:
    engine = TransferEngine(EmulatedDevice(AMPLE_BYTES), link_gbps=0.01)
    host, device = torch.zeros(250_000), torch.empty(250_000)
    engine.to_device(host, device, category="rows")
    assert engine.busy_seconds()["h2d"] >= 0.1
    assert torch.equal(host, device)


def test_a_real_link_is_not_throttled() -> None:
    device = EmulatedDevice(AMPLE_BYTES)
    device.kind = "cuda"
    with pytest.raises(UsageError, match="--link-gbps throttles the emulated"):
        TransferEngine(device, link_gbps=3.0)


def test_a_loss_that_is_not_finite_updates_nothing_even_early(glass_folder) -> None:
    plan = small_plan(glass_folder, choice={"prefetch_depth": 1}, seq_len=16)
    session = open_with(plan, glass_folder, Overlapped())
    before = [tables.weights.clone() for tables in session.store.layers]
    with torch.no_grad():
        session.model.model.norm.weight.fill_(float("nan"))
    try:
        with pytest.raises(Exception, match="nothing of this window was applied"):
            small_trainer(session, steps=1, max_norm=None).run()
        session.drain()
    finally:
        session.close()
    for tables, weights in zip(session.store.layers, before, strict=True):
        assert torch.equal(tables.weights, weights)


# --- the lanes by themselves -----------------------------------------------------------------------------------------


def test_the_cpu_lane_takes_the_most_urgent_job_that_can_run() -> None:
    gate, done = threading.Event(), []
    with Overlapped() as lanes:
        first = lanes.submit("cpu", "first", gate.wait)
        copy = lanes.submit("h2d", "copy", gate.wait)
        jobs = [
            lanes.submit("cpu", "later", lambda: done.append("later"), urgency=2),
            lanes.submit("cpu", "waits", lambda: done.append("waits"), after=[first, copy], urgency=0),
            lanes.submit("cpu", "soon", lambda: done.append("soon"), urgency=1),
            lanes.submit("cpu", "urgent", lambda: done.append("urgent"), urgency=0),
        ]
        gate.set()
        for job in jobs:
            job.result()
    assert [name for name in done if name != "waits"] == ["urgent", "soon", "later"]


def test_copy_lanes_keep_the_order_of_issue() -> None:
    gate, done = threading.Event(), []
    with Overlapped() as lanes:
        blocked = lanes.submit("cpu", "gate", gate.wait)
        lanes.submit("h2d", "first", lambda: done.append(1), after=[blocked])
        second = lanes.submit("h2d", "second", lambda: done.append(2))
        assert not second.done
        gate.set()
        second.result()
    assert done == [1, 2]


def test_results_and_drain() -> None:
    with Overlapped() as lanes:
        assert lanes.submit("cpu", "sum", lambda: 1 + 1).result() == 2
        slow = lanes.submit("d2h", "slow", lambda: lanes.pause(0.02))
        lanes.drain()
        assert slow.done
    assert Sequential().submit("cpu", "sum", lambda: 3).result() == 3
