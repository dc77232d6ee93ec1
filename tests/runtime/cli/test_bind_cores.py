"""``meft-run --bind-cores``: the same result on bound threads, and a refusal where there are too few cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from small_runs import SmallRuns

from meft.planner.records.report import Report
from meft.runtime.host.cores import bind_thread, shares_of, usable_cores
from meft.runtime.training import options as run_options

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="no two cores to bind threads to"
)


@pytest.fixture
def own_cores() -> Iterator[frozenset[int]]:
    """This thread's, which it gets back."""
    cores = usable_cores()
    yield cores
    os.sched_setaffinity(0, cores)


def test_a_bound_run_ends_as_any_other(glass_folder, tmp_path, own_cores, monkeypatch) -> None:
    where: dict[str, frozenset[int]] = {}

    def noted(cores: frozenset[int]) -> None:
        bind_thread(cores)
        where[threading.current_thread().name] = usable_cores()

    monkeypatch.setattr(run_options, "bind_thread", noted)
    runs = SmallRuns(tmp_path, glass_folder)
    assert runs.run(tmp_path / "free", "--steps", 4)[0] == 0
    code, said = runs.run(tmp_path / "bound", "--steps", 4, "--bind-cores")
    assert (code, "bound: cores " in said) == (0, True)
    shares = shares_of(own_cores)
    assert where["meft-cpu"] == where["MainThread"] == shares.kernels  # the caller computes, on an emulated device
    assert where["meft-h2d"] == where["meft-d2h"] == shares.lanes
    free, bound = (tmp_path / name for name in ("free", "bound"))
    weights = "adapter/meft_adapter.safetensors"
    assert (bound / weights).read_bytes() == (free / weights).read_bytes()
    losses = [Report.load(folder / "report.json").training.loss_per_step for folder in (free, bound)]
    assert losses[0] == losses[1]


def test_one_core_cannot_be_divided(glass_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run_options, "usable_cores", lambda: frozenset({0}))
    code, said = SmallRuns(tmp_path, glass_folder).run(tmp_path / "out", "--steps", 2, "--bind-cores")
    assert code == 2
    assert "--bind-cores: 1 core for 1 rank" in said


def test_a_plan_that_binds_is_run_bound_unless_told_otherwise(glass_folder, tmp_path, own_cores) -> None:
    runs = SmallRuns(tmp_path, glass_folder)
    planned = runs.plan.decision.model_copy(update={"bind_cores": True})
    runs.plan.model_copy(update={"decision": planned}).save(tmp_path / "plan.json")
    _, free = runs.run(tmp_path / "free", "--steps", 2, "--no-bind-cores")
    assert "bound" not in free
    _, bound = runs.run(tmp_path / "bound", "--steps", 2)  # from here this thread is
    assert "bound: cores " in bound


def test_a_plan_that_binds_runs_where_that_cannot_be(glass_folder, tmp_path, monkeypatch) -> None:
    runs = SmallRuns(tmp_path, glass_folder)
    planned = runs.plan.decision.model_copy(update={"bind_cores": True})
    runs.plan.model_copy(update={"decision": planned}).save(tmp_path / "plan.json")
    monkeypatch.setattr(run_options, "usable_cores", lambda: frozenset({0}))
    code, said = runs.run(tmp_path / "out", "--steps", 2)
    assert code == 0
    assert "the plan binds the host's kernels to cores of their own, which is not done" in said
