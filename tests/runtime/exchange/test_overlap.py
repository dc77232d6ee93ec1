"""Overlapped, a run is the sequential one bit for bit, however long the lanes take; and what goes wrong is told."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext

import pytest
import torch
from late_lanes import (
    CHOICES,
    LATE,
    LONGEST_DELAY_SECONDS,
    SLOW,
    SLOW_TASK_SECONDS,
    Delays,
    assert_bit_equal,
    assert_late_lanes_change_nothing,
    assert_whoever_needs_a_slow_task_waits,
    open_with,
    trained,
)
from sessions import AMPLE_BYTES, EXPERTS, small_plan, small_trainer

from meft.planner.base.errors import UsageError
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.device.engine import TransferEngine
from meft.runtime.device.lanes import Overlapped, Sequential
from meft.runtime.training.training import Trainer


@pytest.mark.parametrize(("choice", "late", "max_norm"), CHOICES)
def test_fifty_steps_are_the_sequential_ones_bit_for_bit(glass_folder, choice, late, max_norm) -> None:
    assert_late_lanes_change_nothing(glass_folder, choice, late, max_norm)


@pytest.mark.parametrize("choice", [{"rows_in_backward": "refetched"}, {"cached_rows": 40, **EXPERTS}])
def test_rows_that_leave_in_parts_are_the_same_rows_to_the_bit(glass_folder, choice) -> None:
    """And the same bytes: seven parts of each layer's rows, late, against one."""

    def run(schedule: Overlapped | Sequential, chunks: int) -> Trainer:
        chosen = choice | {"prefetch_depth": 0, "gather_chunks": chunks}
        plan = small_plan(glass_folder, choice=chosen, grad_accum=3, seq_len=8, batch_size=1)
        return trained(plan, glass_folder, schedule, steps=9, max_norm=1.0)

    assert_bit_equal(run(Overlapped(delay=Delays(LATE["all"], seed=7)), 7), run(Sequential(), 1))


@pytest.mark.parametrize("slow", SLOW)
def test_whoever_needs_a_slow_task_waits_for_it(glass_folder, slow) -> None:
    assert_whoever_needs_a_slow_task_waits(glass_folder, slow)


def test_on_cuda_a_delay_holds_up_the_stream_of_its_lane_too(monkeypatch) -> None:
    # What tests/gpu relies on, where there is no GPU to see it.
    entered, spun = [], []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", spun.append)
    delays = Delays(LATE["d2h"], seed=0, slow="gather")
    delays.streams = {"d2h": "the d2h stream", "h2d": "the h2d stream"}
    seconds = [delays("d2h", "row gradients 1") for _ in range(50)]
    late = [each for each in seconds if each]
    assert 0 < len(late) < 50
    assert max(late) <= LONGEST_DELAY_SECONDS
    assert (entered, len(spun)) == (["the d2h stream"] * len(late), len(late))
    assert delays("h2d", "rows 1") == 0
    assert delays("cpu", "gather 1") == SLOW_TASK_SECONDS  # host work has no stream
    assert len(spun) == len(late)


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
