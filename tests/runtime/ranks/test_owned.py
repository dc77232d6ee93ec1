"""Machines that own rows, in groups that share no memory, train what one rank with all rows does, bit for bit."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rank_checks import (
    STEPS,
    Runs,
    kill_when_saved,
    learnt,
    require_counted,
    require_equal,
    shared_memory,
    write_facts,
)
from rank_runs import ended
from sessions import CENTROIDS, EXPERTS, STABLE, SWITCH

from meft.planner.base.errors import UsageError
from meft.planner.records.plan import Plan
from meft.planner.records.report import Report
from meft.runtime.host.store import HostStore
from meft.runtime.session.checkpoint import list_checkpoints
from meft.runtime.session.tensor_files import Pieces, load_tensors, save_tensors
from meft.runtime.training.together import check, check_evaluation

OWNED: dict[str, object] = {"rows": "owned", "top_k": 16}
CHOICES: dict[str, dict[str, object]] = {
    "experts": {**EXPERTS, **OWNED, "rows_in_backward": "refetched"},
    "switch": {**SWITCH, **OWNED, "top_k": 8, "prefetch_depth": 1, "bf16_copy": True, "rows_in_backward": "refetched"},
    "centroid": {**CENTROIDS, **OWNED, "prefetch_depth": 1},
    "stable": {**STABLE, **OWNED, "prefetch_depth": 1, "rows_in_backward": "refetched"},
}
REQUESTS: dict[str, dict[str, object]] = {"switch": {"adapter_dtype": "bf16"}}
LAYOUTS = {
    "experts": ((2, 1, "sequential"), (2, 2, "overlapped")),
    "switch": ((2, 1, "overlapped"),),
    "centroid": ((4, 1, "overlapped"),),
    "stable": ((2, 1, "sequential"),),
}
"""Machines, ranks on each, schedule."""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_facts(tmp_path_factory.mktemp("data") / "facts.jsonl")


@pytest.mark.parametrize("name", CHOICES)
def test_owners_learn_what_one_rank_does_bit_for_bit(tmp_path, glass_folder, facts, name):
    runs = Runs(tmp_path, glass_folder, facts, CHOICES[name], **REQUESTS.get(name, {}))
    one = learnt(runs.ranks(1, "one"))
    for machines, gpus, schedule in LAYOUTS[name]:
        output = runs.ranks(machines * gpus, f"{machines}x{gpus}", "--schedule", schedule, machines=machines)
        require_equal(one, learnt(output))
        report = Report.load(output / "report.json")
        assert (report.nodes, report.gpus, report.observed.steps) == (machines, gpus, STEPS)
        require_counted(runs.plan, report)


def test_a_rank_that_dies_ends_all_and_one_machine_goes_on_with_what_two_saved(tmp_path, glass_folder, facts):
    """One machine, then two, and then one, as if it had been one all along."""
    runs, long = Runs(tmp_path, glass_folder, facts, CHOICES["experts"]), 60
    for machines, victim in ((1, 0), (2, 1)):
        resumed = ["--resume"] if list_checkpoints(tmp_path / "out") else []
        ranks = kill_when_saved(runs, "out", machines, victim, "--steps", long, *resumed, machines=machines)
        assert ended(ranks, seconds=30) == [1] * victim + [-signal.SIGKILL]
        assert [shared_memory(rank.pid) for rank in ranks] == [[]] * machines
    going = runs.ranks(1, "out", "--resume", steps=long)
    require_equal(learnt(runs.ranks(1, "whole", steps=long)), learnt(going))


def test_what_owners_cannot_do_is_refused(tmp_path, glass_folder, facts):
    runs = Runs(tmp_path, glass_folder, facts, CHOICES["experts"])
    with pytest.raises(
        UsageError, match="--nodes 3 --gpus 1: the plan's 16 experts, which machines own, do not divide"
    ):
        check(with_windows_of(runs.plan, 3), 1, machines=3, steps=None)
    with pytest.raises(UsageError, match="--eval: machine 0 of 2 has its own rows alone"):
        check_evaluation(runs.plan, SimpleNamespace(machines=2))
    check_evaluation(runs.plan, SimpleNamespace(machines=1))


def with_windows_of(plan: Plan, micro_batches: int) -> Plan:
    return plan.model_copy(update={"request": plan.request.model_copy(update={"grad_accum": micro_batches})})


def test_a_machine_draws_the_rows_that_it_has_as_one_that_has_all():
    whole = HostStore(num_layers=2, adapter_width=12, hidden_size=5)
    part = HostStore(num_layers=2, adapter_width=12, hidden_size=5, held=range(4, 8), own_rows=range(6, 8))
    whole.initialise(seed=3)
    part.initialise(seed=3)
    for mine, all_rows in zip(part.layers, whole.layers, strict=True):
        assert torch.equal(mine.weights, all_rows.weights[4:8])
    rows, gradients = torch.tensor([5, 7]), torch.ones(2, 10)
    part.accumulate(1, rows, gradients)
    assert part.touched_rows(1).tolist() == [3]  # of its own rows, by their place
    assert part.squares_of(1)[0].tolist() == [7]
    out = torch.empty(2, 10)
    part.gather(1, rows, out)
    assert torch.equal(out, whole.layers[1].weights[rows])


def test_tensors_in_pieces_are_saved_as_whole_ones_are(tmp_path):
    tensors = {"a": torch.randn(5, 3), "b": torch.arange(4, dtype=torch.int32), "c": torch.tensor([7])}
    pieces = {name: Pieces(tuple(each.shape), each.dtype, partial(each.split, 2)) for name, each in tensors.items()}
    save_tensors(pieces | {"c": tensors["c"]}, tmp_path / "pieces")
    found = load_tensors(tmp_path / "pieces")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors.items())
