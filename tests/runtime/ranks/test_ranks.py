"""Several ranks train what one does, bit for bit; what they move is what the plan says; and none outlives another."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from processes import run
from rank_runs import ended, run_ranks, said, start_ranks
from safetensors.torch import load_file
from sessions import CENTROIDS, EXPERTS, SWITCH, small_plan

from meft.planner.base.errors import UsageError
from meft.planner.check.audit import audit
from meft.planner.records.plan import Plan
from meft.planner.records.report import Report
from meft.planner.traffic.transfer import step_transfer
from meft.runtime.cli.run import command
from meft.runtime.ranks.memory import NAME
from meft.runtime.session.checkpoint import list_checkpoints

WORDS = ("alice", "rabbit", "queen", "hatter")
STEPS = 10
"""Of windows of four: the last is half a one, in which two of four ranks sit out."""
CHOICES: dict[str, dict[str, object]] = {
    "experts": {**EXPERTS, "top_k": 16},
    "ahead": {**EXPERTS, "top_k": 16, "prefetch_depth": 1},
    "centroid": {**CENTROIDS, "top_k": 16},
    "switch": {**SWITCH, "prefetch_depth": 1},
    "retained": {"top_k": 16, "rows_in_backward": "retained"},
    "bf16": {"top_k": 16, "bf16_copy": True},
}
REQUESTS: dict[str, dict[str, object]] = {"bf16": {"adapter_dtype": "bf16"}}
OPTIONS = {"retained": ("--max-grad-norm", 0)}
"""Without clipping one rank updates rows in the midst of backward."""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "facts.jsonl"
    lines = [{"prompt": f"The {one} said to", "completion": f" the {other}"} for one in WORDS for other in WORDS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Runs:
    """Runs of one plan in a folder, by number of ranks."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        facts: Path,
        choice: dict[str, object],
        options: Sequence[object] = (),
        **request: object,
    ) -> None:
        self.folder, self.options = folder, options
        self.plan = with_transfer(small_plan(model, choice=choice, seq_len=24, grad_accum=4, **request))
        self.plan.save(folder / "plan.json")
        self._words = [folder / "plan.json", "--model", model, "--data", facts, "--device", "emulated"]

    def words(self, output: str, *options: object) -> list[object]:
        return [*self._words, *self.options, "--learning-rate", "1e-2", "--output-dir", self.folder / output, *options]

    def ranks(self, size: int, output: str, *options: object, steps: int = STEPS) -> Path:
        """A run to its end; its output folder."""
        folder = self.folder / output
        codes = run_ranks(size, self.words(output, "--steps", steps, *options), self.folder / f"said-{output}")
        assert codes == [0] * size, "".join(said(self.folder / f"said-{output}", rank) for rank in range(size))
        return folder


def with_transfer(plan: Plan) -> Plan:
    """The plan with what one rank would move, every layer's rows at their cap."""
    layers, decision = plan.request.model.num_layers, plan.decision
    transfer = step_transfer(
        request=plan.request,
        decision=decision,
        active_rows_per_layer=[decision.active_rows_cap] * layers,
        kept_rows_per_layer=[decision.cached_rows] * layers,
    )
    return plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"transfer": transfer})})


@pytest.fixture(scope="module", params=CHOICES)
def runs(request, tmp_path_factory, glass_folder, facts) -> Runs:
    name = request.param
    folder, options = tmp_path_factory.mktemp(name), OPTIONS.get(name, ())
    return Runs(folder, glass_folder, facts, CHOICES[name], options, **REQUESTS.get(name, {}))


@pytest.fixture(scope="module")
def of_one(runs: Runs) -> dict[str, torch.Tensor]:
    """What one rank learns."""
    return learnt(runs.ranks(1, "one"))


def learnt(output: Path) -> dict[str, torch.Tensor]:
    """Rows, routers, moments and what was counted, and the losses and norms of every step."""
    checkpoint = list_checkpoints(output)[-1]
    tensors = load_file(checkpoint / "meft_adapter.safetensors") | load_file(checkpoint / "optimizer.safetensors")
    del tensors["rng_state"]  # of several ranks it begins anew in every micro-batch
    state = json.loads((checkpoint / "training_state.json").read_text())
    for name in ("loss_per_step", "gradient_norm_per_optimizer_step"):
        tensors[name] = torch.tensor(state[name], dtype=torch.float64)
    return tensors


def require_equal(tensors: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> None:
    assert tensors.keys() == others.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == []


@pytest.mark.parametrize("schedule", ["overlapped", "sequential"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_learn_what_one_does_bit_for_bit(runs, of_one, size, schedule):
    output = runs.ranks(size, f"ranks-{size}-{schedule}", "--schedule", schedule)
    require_equal(of_one, learnt(output))
    report = Report.load(output / "report.json")
    assert report.observed.steps == STEPS
    assert [rank.steps for rank in report.ranks] == ([5, 5] if size == 2 else [3, 3, 2, 2])
    require_counted(runs.plan, report)


def require_counted(plan: Plan, report: Report) -> None:
    """Bytes over the links, of all ranks and of each, and host memory with the shared tables once: as predicted."""
    found = audit(plan, report, gpu=None)
    assert found.transfer_exact
    assert [check.category for check in found.transfer if not check.equal] == []
    assert [row.quantity for row in found.rows if row.holds is False] == []
    for rank in report.ranks:
        update = {"h2d_bytes_per_optimizer_step": 0, "d2h_bytes_per_optimizer_step": 0}
        alone = report.model_copy(
            update={"observed": rank.model_copy(update={"transfer": rank.transfer.model_copy(update=update)})}
        )
        rows = {row.quantity: row for row in audit(plan, alone, gpu=None).rows}
        assert rows["h2d_bytes_given_rows"].holds
        assert rows["d2h_bytes_given_rows"].holds
    tables = {"adapter_weights", "adapter_moments", "adapter_gradients", "step_counts", "touched_flags"}
    assert tables <= {entry.category for entry in report.ranks[0].host_memory.entries}
    assert not tables & {entry.category for entry in report.ranks[1].host_memory.entries}


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


def shared_memory(first: int | None) -> list[str]:
    """Who has mapped the shared memory of ranks of which this process was the first; and files in /dev/shm."""
    found = [path.name for path in Path("/dev/shm").iterdir() if "meft" in path.name]
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            found += [str(maps)] * (NAME.format(process=first) in maps.read_text())
        except OSError:  # it has ended
            continue
    return found


def until(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_rank_that_dies_ends_all_and_other_numbers_of_ranks_go_on(tmp_path, glass_folder, facts):
    """Two ranks, then four, and then one, as if it had been one all along."""
    runs, long = Runs(tmp_path, glass_folder, facts, CHOICES["experts"]), 80
    for size, victim in ((2, 0), (4, 2)):
        before = list_checkpoints(tmp_path / "out")
        options = ["--steps", long, "--save-every", 1, *(["--resume"] if before else [])]
        ranks = start_ranks(size, runs.words("out", *options), tmp_path / f"said-{size}")
        until(lambda before=before: list_checkpoints(tmp_path / "out")[-1:] > before)
        os.kill(ranks[victim].pid, signal.SIGKILL)
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
