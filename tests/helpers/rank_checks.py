"""Runs of several ranks of one plan, what they learnt, and what must be true of their reports."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from rank_runs import run_ranks, said, start_ranks
from safetensors.torch import load_file
from sessions import small_plan

from meft.planner.check.audit import audit
from meft.planner.memory.host import host_memory
from meft.planner.records.plan import Plan
from meft.planner.records.report import Report
from meft.planner.traffic.transfer import step_transfer
from meft.runtime.ranks.memory import NAME
from meft.runtime.session.checkpoint import list_checkpoints

WORDS = ("alice", "rabbit", "queen", "hatter")
STEPS = 10
"""Of windows of four: the last is half a one, in which two of four ranks sit out."""


def write_facts(path: Path) -> Path:
    """Sixteen short facts."""
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

    def ranks(self, size: int, output: str, *options: object, steps: int = STEPS, machines: int = 1) -> Path:
        """A run to its end; its output folder."""
        folder, words = self.folder / output, self.words(output, "--steps", steps, *options)
        codes = run_ranks(size, words, self.folder / f"said-{output}", machines=machines)
        assert codes == [0] * size, "".join(said(self.folder / f"said-{output}", rank) for rank in range(size))
        return folder


def with_transfer(plan: Plan) -> Plan:
    """The plan with what one rank would move, every layer's rows at their cap, and what the host holds."""
    layers, decision = plan.request.model.num_layers, plan.decision
    transfer = step_transfer(
        request=plan.request,
        decision=decision,
        active_rows_per_layer=[decision.active_rows_cap] * layers,
        kept_rows_per_layer=[decision.cached_rows] * layers,
    )
    host = host_memory(request=plan.request, decision=decision)
    predicted = plan.prediction.model_copy(update={"transfer": transfer, "host_memory": host})
    return plan.model_copy(update={"prediction": predicted})


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
    for place, rank in enumerate(report.ranks):
        has = tables & {entry.category for entry in rank.host_memory.entries}
        assert has == (set() if place % report.gpus else tables)


def kill_when_saved(
    runs: Runs, output: str, size: int, victim: int, *options: object, machines: int = 1
) -> list[ForkServerProcess]:
    """Begin ranks that save after every window, and kill one (SIGKILL) after the next checkpoint."""
    before = list_checkpoints(runs.folder / output)
    words = runs.words(output, "--save-every", 1, *options)
    ranks = start_ranks(size, words, runs.folder / f"said-{output}-{size}", machines=machines)
    until(lambda: list_checkpoints(runs.folder / output)[-1:] > before)
    os.kill(ranks[victim].pid or 0, signal.SIGKILL)
    return ranks


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
