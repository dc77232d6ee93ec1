"""What launching costs: whose seconds are counted as which task's, and that a measurement has every task."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meft.runtime.profiling import launching
from meft.runtime.profiling.launching import LaunchTimes, launch_times


@pytest.fixture
def worked(monkeypatch) -> Callable[[float], None]:
    """Stands for a thread's work: its processor seconds go on by so many."""
    seconds: dict[int, float] = {}

    def work(more: float) -> None:
        seconds[threading.get_ident()] = seconds.get(threading.get_ident(), 0.0) + more

    monkeypatch.setattr(launching.time, "thread_time", lambda: seconds.get(threading.get_ident(), 0.0))
    return work


def test_what_a_thread_works_until_a_point_is_the_task_s_that_ends_there(worked) -> None:
    times = LaunchTimes()
    times.note("attention 0")  # since when is not known
    for task, taken in (("router 0", 1.0), ("ffn 0", 2.0), ("adapter 0", 4.0), ("ffn 1", 8.0)):
        worked(taken)
        times.note(task)
    assert dict(times.seconds) == {"router": [1.0], "ffn": [2.0, 8.0], "adapter": [4.0]}
    times.restart()
    times.note("ffn 0")
    assert not times.seconds


def test_each_thread_s_own_work_counts(worked) -> None:
    """Autograd has a thread of its own on CUDA: what the calling thread works meanwhile is no task's of it."""
    times = LaunchTimes()
    times.note("adapter 0")

    def backward() -> None:
        worked(100.0)
        times.note("head and loss backward")
        worked(1.0)
        times.note("adapter backward 1")

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    worked(0.5)
    times.note("attention 0")
    assert dict(times.seconds) == {"adapter backward": [1.0], "attention": [0.5]}


@pytest.fixture
def few_steps(monkeypatch) -> None:
    monkeypatch.setattr(launching, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(launching, "STEPS", 3)


def test_every_task_of_a_step_is_measured(few_steps) -> None:
    found = {each.name: each for each in launch_times(torch.device("cpu"))}
    assert sorted(found) == sorted(f"launch {task}" for task in launching.TASKS)
    assert all(each.repetitions == 3 and each.low_quartile > 0 for each in found.values())


class Operators(TorchDispatchMode):
    """Counts operators of the thread that enters it: seconds of a machine that takes one for each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("task", ["attention", "ffn"])
def test_what_a_layer_launches_more_is_its_task_s(few_steps, monkeypatch, task) -> None:
    def operators() -> dict[str, float]:
        with Operators() as mode:
            monkeypatch.setattr(launching.time, "thread_time", lambda: float(mode.count))
            return {each.name.removeprefix("launch "): each.median for each in launch_times(torch.device("cpu"))}

    def with_more(*arguments):
        session = real(*arguments)
        for layer in session.model.model.layers:
            part = layer.self_attn if task == "attention" else layer.mlp.down_proj
            part.register_forward_hook(seven_operators)
        return session

    usual, real = operators(), launching._session
    monkeypatch.setattr(launching, "_session", with_more)
    found = operators()
    assert {each: found[each] - usual[each] for each in usual} == dict.fromkeys(usual, 0.0) | {task: 7.0}


def seven_operators(*_: object) -> None:
    small = torch.ones(4)
    for _ in range(6):
        small.add_(1.0)
