"""Several ranks train what one does, bit for bit; what they move is what the plan says; and none outlives another."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from processes import run
from rank_checks import (
    STEPS,
    Runs,
    kill_when_saved,
    learnt,
    require_counted,
    require_equal,
    shared_memory,
    until,
    write_facts,
)
from rank_runs import ended, start_ranks
from sessions import CENTROIDS, EXPERTS, STABLE, SWITCH

from meft.planner.base.errors import UsageError
from meft.planner.records.report import Report
from meft.runtime.cli.run import command
from meft.runtime.session.checkpoint import list_checkpoints

CHOICES: dict[str, dict[str, object]] = {
    "experts": {**EXPERTS, "top_k": 16},
    "ahead": {**EXPERTS, "top_k": 16, "prefetch_depth": 1},
    "centroid": {**CENTROIDS, "top_k": 16},
    "switch": {**SWITCH, "prefetch_depth": 1},
    "stable": STABLE,
    "retained": {"top_k": 16, "rows_in_backward": "retained"},
    "bf16": {"top_k": 16, "bf16_copy": True},
}
REQUESTS: dict[str, dict[str, object]] = {"bf16": {"adapter_dtype": "bf16"}}
OPTIONS = {"retained": ("--max-grad-norm", 0)}
"""Without clipping one rank updates rows in the midst of backward."""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_facts(tmp_path_factory.mktemp("data") / "facts.jsonl")


@pytest.fixture(scope="module", params=CHOICES)
def runs(request, tmp_path_factory, glass_folder, facts) -> Runs:
    name = request.param
    folder, options = tmp_path_factory.mktemp(name), OPTIONS.get(name, ())
    return Runs(folder, glass_folder, facts, CHOICES[name], options, **REQUESTS.get(name, {}))


@pytest.fixture(scope="module")
def of_one(runs: Runs) -> dict[str, torch.Tensor]:
    """What one rank learns."""
    return learnt(runs.ranks(1, "one"))


@pytest.mark.parametrize("schedule", ["overlapped", "sequential"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_learn_what_one_does_bit_for_bit(runs, of_one, size, schedule):
    output = runs.ranks(size, f"ranks-{size}-{schedule}", "--schedule", schedule)
    require_equal(of_one, learnt(output))
    report = Report.load(output / "report.json")
    assert report.observed.steps == STEPS
    assert [rank.steps for rank in report.ranks] == ([5, 5] if size == 2 else [3, 3, 2, 2])
    require_counted(runs.plan, report)


def test_with_cached_rows_every_schedule_learns_the_same(tmp_path, glass_folder, facts):
    """What one rank alone has cached differs, and with it the order of rows in a product: equal up to rounding."""
    for name, choice in {"kept": {}, "summed": {"gradients_on_device": True}}.items():
        folder = tmp_path / name
        folder.mkdir()
        runs = Runs(folder, glass_folder, facts, {"top_k": 16, "cached_rows": 24, "active_rows_cap": 96, **choice})
        one = learnt(runs.ranks(1, "one"))
        overlapped, sequential = (runs.ranks(2, kind, "--schedule", kind) for kind in ("overlapped", "sequential"))
        require_equal(learnt(overlapped), learnt(sequential))
        torch.testing.assert_close(learnt(overlapped)["loss_per_step"], one["loss_per_step"], rtol=1e-4, atol=0)
        require_counted(runs.plan, Report.load(overlapped / "report.json"))


def test_a_rank_that_dies_ends_all_and_other_numbers_of_ranks_go_on(tmp_path, glass_folder, facts):
    """Two ranks, then four, and then one, as if it had been one all along."""
    runs, long = Runs(tmp_path, glass_folder, facts, CHOICES["experts"]), 80
    for size, victim in ((2, 0), (4, 2)):
        resumed = ["--resume"] if list_checkpoints(tmp_path / "out") else []
        ranks = kill_when_saved(runs, "out", size, victim, "--steps", long, *resumed)
        assert ended(ranks, seconds=30) == [-signal.SIGKILL if rank == victim else 1 for rank in range(size)]
        assert shared_memory(ranks[0].pid) == []
    going = learnt(runs.ranks(1, "out", "--resume", steps=long))
    require_equal(learnt(runs.ranks(1, "whole", steps=long)), going)


def test_a_signal_to_one_rank_ends_all_after_their_window_with_a_checkpoint(tmp_path, glass_folder, facts):
    runs = Runs(tmp_path, glass_folder, facts, CHOICES["experts"])
    ranks = start_ranks(2, runs.words("out", "--steps", 100_000, "--save-every", 1), tmp_path / "said")
    until(lambda: len(list_checkpoints(tmp_path / "out")) > 0)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert ended(ranks) == [0, 128 + signal.SIGTERM]
    report = Report.load(tmp_path / "out" / "report.json")
    assert report.training.steps % 4 == 0
    assert list_checkpoints(tmp_path / "out")[-1].name == f"checkpoint-{report.training.steps:08d}"


@pytest.mark.parametrize(
    ("choice", "options", "message"),
    [
        ({}, ["--gpus", 3], "--gpus 3: the plan's 4 micro-batches of an optimizer step do not divide among 3 ranks"),
        ({"hot_rows": 8}, ["--gpus", 2], "--gpus 2: the plan keeps 8 hot rows on the device"),
        (
            {"token_chunks": 2, "rows_in_backward": "refetched"},
            ["--gpus", 2],
            "--gpus 2: the plan takes tokens in 2 chunks",
        ),
        ({}, ["--gpus", 4, "--steps", 2], "--steps 2: less than the 4 ranks have micro-batches at once"),
    ],
)
def test_what_ranks_cannot_do_is_refused_before_any_begins(tmp_path, glass_folder, facts, choice, options, message):
    runs = Runs(tmp_path, glass_folder, facts, choice)
    with pytest.raises(UsageError, match=re.escape(message)):
        command.main([str(word) for word in runs.words("out", *options)], standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_the_command_launches_its_ranks(tmp_path, glass_folder, facts):
    runs = Runs(tmp_path, glass_folder, facts, CHOICES["experts"])
    one = learnt(runs.ranks(1, "one", steps=4))
    done = run("meft-run", *runs.words("two", "--steps", 4, "--gpus", 2, "--json"))
    assert Report.from_json(done.stdout, source="stdout").gpus == 2
    require_equal(one, learnt(tmp_path / "two"))
