"""Ranks on several machines, that is in groups that share no memory, train what one rank does, bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
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
from rank_runs import ended, said, start_ranks
from sessions import EXPERTS

from meft.planner.base.errors import MeftError, UsageError
from meft.planner.records.report import Report
from meft.runtime.cli.run import command
from meft.runtime.host.store import HostStore
from meft.runtime.ranks.machines import FAREWELL, accept, left_in_good_order
from meft.runtime.ranks.peers import Peers, Place
from meft.runtime.session.session import Session

CHOICES: dict[str, dict[str, object]] = {
    "experts": {**EXPERTS, "top_k": 16},
    "ahead": {"top_k": 16, "prefetch_depth": 1},
}
"""In fp32: sums of a few bf16 numbers are exact, whatever their order."""
LAYOUTS = {"experts": ((2, 1, "sequential"), (2, 2, "overlapped")), "ahead": ((4, 1, "overlapped"),)}
"""Machines, ranks on each, schedule."""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_facts(tmp_path_factory.mktemp("data") / "facts.jsonl")


@pytest.mark.parametrize("name", CHOICES)
def test_machines_learn_what_one_rank_does_bit_for_bit(tmp_path, glass_folder, facts, name):
    runs = Runs(tmp_path, glass_folder, facts, CHOICES[name])
    one = learnt(runs.ranks(1, "one"))
    for machines, gpus, schedule in LAYOUTS[name]:
        output = runs.ranks(machines * gpus, f"{machines}x{gpus}", "--schedule", schedule, machines=machines)
        require_equal(one, learnt(output))
        report = Report.load(output / "report.json")
        assert (report.nodes, report.gpus, report.observed.steps) == (machines, gpus, STEPS)
        require_counted(runs.plan, report)
        crossed = {entry.category for entry in report.observed.transfer.entries if entry.direction == "network"}
        routers = {"router_gradients", "router_sums"} if name == "experts" else set()
        assert crossed == {"row_gradients", "row_sums", "rounds"} | routers


def test_sums_made_on_the_device_cross_too(tmp_path, glass_folder, facts):
    """What is cached differs from one rank alone, and with it the order of rows in a product."""
    choice = {"top_k": 16, "cached_rows": 24, "active_rows_cap": 96, "gradients_on_device": True, "bf16_copy": True}
    runs = Runs(tmp_path, glass_folder, facts, choice, adapter_dtype="bf16")
    here, machines = runs.ranks(2, "here"), runs.ranks(2, "machines", machines=2)
    require_equal(learnt(here), learnt(machines))
    require_counted(runs.plan, Report.load(machines / "report.json"))


def test_a_rank_that_dies_ends_those_of_all_machines_and_others_go_on(tmp_path, glass_folder, facts):
    runs, long = Runs(tmp_path, glass_folder, facts, CHOICES["experts"]), 80
    ranks = kill_when_saved(runs, "out", 4, 3, "--steps", long, machines=2)
    assert ended(ranks, seconds=30) == [1, 1, 1, -signal.SIGKILL]
    assert [shared_memory(ranks[first].pid) for first in (0, 2)] == [[], []]
    going = runs.ranks(2, "out", "--resume", steps=long, machines=2)
    require_equal(learnt(runs.ranks(1, "whole", steps=long)), learnt(going))


def test_two_launchers_of_torchrun_train_together(tmp_path, glass_folder, facts):
    runs = Runs(tmp_path, glass_folder, facts, CHOICES["experts"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = [str(word) for word in runs.words("out", "--steps", 4)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    launchers = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(node), "-m", "meft.run", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for node in range(2)
    ]
    said_by = [launcher.communicate()[1].decode() for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(said_by)
    require_equal(learnt(runs.ranks(1, "one", steps=4)), learnt(tmp_path / "out"))


def test_machines_with_other_data_are_refused(tmp_path, glass_folder, facts):
    runs, other = Runs(tmp_path, glass_folder, facts, {"top_k": 16}), tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "The queen said to", "completion": " nobody"}) + "\n")
    words = runs.words("out", "--steps", 4)
    elsewhere = [other if word == facts else word for word in words]
    ranks = start_ranks(2, words, tmp_path / "said", machines=2, elsewhere=elsewhere)
    assert ended(ranks)[0] == 2
    assert "--data: machine 1 was given another than machine 0; give all the same" in said(tmp_path / "said")


def test_the_first_machine_alone_keeps_the_best_adapter(tmp_path, glass_folder, facts):
    task = ("--eval", facts, "--metric", "em", "--eval-every", 1, "--max-new-tokens", 2, "--patience", 1)
    runs = Runs(tmp_path, glass_folder, facts, {"top_k": 16}, ("--steps", 8, *task))
    ranks = start_ranks(2, runs.words("out"), tmp_path / "said", machines=2, elsewhere=runs.words("other"))
    assert ended(ranks) == [0, 0]
    assert (tmp_path / "out" / "adapter-best" / "meft_config.json").is_file()
    assert not list(tmp_path.glob("other/adapter*"))


@pytest.mark.parametrize("options", [["--nodes", 2], ["--nodes", 2, "--gpus", 2]])
def test_several_machines_are_begun_by_torchrun(tmp_path, glass_folder, facts, options):
    runs = Runs(tmp_path, glass_folder, facts, {})
    words = [str(word) for word in runs.words("out", *options)]
    start = f"torchrun --nnodes 2 --nproc-per-node {len(options) // 2}"
    with pytest.raises(UsageError, match=re.escape(start)):
        command.main(words, standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_machines_whose_rows_differ_are_told():
    store = HostStore(num_layers=2, adapter_width=4, hidden_size=3)
    store.initialise(seed=0)
    same = store.checksum()
    store.layers[1].weights[2, 1] += 1e-6
    other = store.checksum()
    assert same[0] == other[0]
    assert same[1] != other[1]

    def session(sums: list[object]) -> SimpleNamespace:
        peers = SimpleNamespace(machines=2, local=0, here=2, of_all=lambda own: [own, None, *sums])
        plan = SimpleNamespace(decision=SimpleNamespace(rows="replicated"))
        return SimpleNamespace(peers=peers, store=store, plan=plan)

    Session.require_replicas(session([other, None]))
    with pytest.raises(MeftError, match="machine 1 no longer has the rows of machine 0"):
        Session.require_replicas(session([same, None]))


def test_a_stranger_is_not_taken_for_another_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        stranger, gone, other = (socket.create_connection(server.getsockname()) for _ in range(3))
        stranger.sendall(b"GET / HTTP/1.1\r\n")
        gone.close()
        other.sendall(b"the word of 16 b")
        (found,) = accept(server, word=b"the word of 16 b", count=1)
        assert found.getpeername() == other.getsockname()
        other.sendall(FAREWELL)
        assert left_in_good_order(found)
        other.close()
        assert not left_in_good_order(found)
        found.close()
        stranger.close()


def test_parts_of_machines_divide_every_range():
    for width, machines, ranks in ((7, 2, 3), (128, 4, 2), (2, 3, 2)):
        found = []
        for rank in range(ranks):
            peers = SimpleNamespace(local=0, here=ranks, machines=machines)
            found += Peers.by_machine(peers, Peers.share_of(peers, width, rank))
        assert [row for part in found for row in part] == list(range(width))
        assert max(map(len, found)) == -(-width // (machines * ranks))
    assert Place(5, 8, 2) == Place(rank=5, size=8, per_machine=2)
    assert (Place(5, 8, 2).machine, Place(5, 8, 2).machines, Place(5, 8, 2).local) == (2, 4, 1)
