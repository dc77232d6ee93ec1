"""Machines that own rows, in groups that share no memory, train what one rank with all rows does, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_checks import STEPS, Runs, learnt, require_counted, require_equal, write_facts
from sessions import EXPERTS

from meft.planner.records.report import Report

OWNED: dict[str, object] = {"rows": "owned", "top_k": 16}
CHOICES: dict[str, dict[str, object]] = {
    "experts": {**EXPERTS, **OWNED},
}
LAYOUTS = {"experts": ((2, 1, "sequential"),)}
"""Machines, ranks on each, schedule."""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_facts(tmp_path_factory.mktemp("data") / "facts.jsonl")


@pytest.mark.parametrize("name", CHOICES)
def test_owners_learn_what_one_rank_does_bit_for_bit(tmp_path, glass_folder, facts, name):
    runs = Runs(tmp_path, glass_folder, facts, CHOICES[name])
    one = learnt(runs.ranks(1, "one"))
    for machines, gpus, schedule in LAYOUTS[name]:
        output = runs.ranks(machines * gpus, f"{machines}x{gpus}", "--schedule", schedule, machines=machines)
        require_equal(one, learnt(output))
        report = Report.load(output / "report.json")
        assert (report.nodes, report.gpus, report.observed.steps) == (machines, gpus, STEPS)
        require_counted(runs.plan, report)
