"""A plan for the tiny model, data, and one finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import run
from small_runs import SmallRuns

from meft.planner.records.report import Report

WORDS = ("alice", "rabbit", "queen", "hatter", "dormouse", "duchess")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "facts.jsonl"
    lines = [{"prompt": f"The {word} said to", "completion": f" the {other}"} for word in WORDS for other in WORDS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory, glass_folder) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    workload = ["--batch-size", 2, "--seq-len", 24, "--grad-accum", 2]
    run("meft-plan", "--model", glass_folder, "--gpu", "emulated", "--gpu-mem", "24MiB", "--host-mem", "1GB",
        *workload, "--max-slowdown", 20, "--top-k", 16, "-o", path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, plan_path, data) -> tuple[Path, Report]:
    """A run of four steps: its folder and its report."""
    folder = tmp_path_factory.mktemp("output")
    run("meft-run", plan_path, "--data", data, "--steps", 4, "--output-dir", folder, "--learning-rate", "1e-2")
    return folder, Report.load(folder / "report.json")


@pytest.fixture(scope="module")
def small(tmp_path_factory, glass_folder) -> SmallRuns:
    """Runs in this process."""
    return SmallRuns(tmp_path_factory.mktemp("small"), glass_folder)
