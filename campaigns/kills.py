"""Kill training, interrupt it, let its disk fail; go on each time, and compare with the run that nothing happened to.

    python campaigns/kills.py --count 1400 --seed 1 --json campaigns/results/kills.json

Kinds, ten kills for two signals and a broken disk: ``moment`` (SIGKILL at a random moment), ``write`` (SIGKILL before
or after a random call that changes the disk, or in the middle of a safetensors file), ``signal`` (SIGINT or SIGTERM at
a random moment) and ``fault`` (such a call fails with ENOSPC, EIO or EROFS, once or from then on). Half of the trials
are hit twice. A trial passes when

- every checkpoint that was reported is still there, or a newer one;
- an interrupted run exits 130 or 143, one whose disk failed exits 4 with one line, and neither writes a traceback;
- the run that goes on to the end exits 0 (2 if it had come to its end, report and all, and says so) and leaves adapter,
  optimizer state, training state and losses equal bit for bit to those of the uninterrupted run, and nothing else in
  the folder.

A run is ``meft-run`` on a tiny model, in a fork of this process, which has loaded everything but started no thread. A
hit that comes after the run's end is not counted. A trial depends on its seed and number; results of several sessions
add up in ``--json FILE``. Exit code 1 if a trial fails.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import click
import torch
from faults import CALLS, ERRORS, FAILING, Fault, Hooks
from record import Record
from tiny import make_tiny
from tqdm import tqdm  # type: ignore[import-untyped]

from meft.planner.records.plan import Plan
from meft.planner.records.report import Report
from meft.runtime.cli import run as cli
from meft.runtime.host import kernels
from meft.runtime.session import model_loading
from meft.runtime.session.checkpoint import list_checkpoints
from meft.runtime.training import runner
from meft.runtime.training.interrupts import Interrupts

KINDS = (*("moment", "write") * 2, "signal", *("moment", "write") * 2, "fault", "moment", "write", "signal")
"""In this order, again and again."""
STEPS = 12
CHECKPOINT = f"checkpoint-{STEPS:08d}"
EQUAL = (
    "adapter/meft_adapter.safetensors",
    f"{CHECKPOINT}/meft_adapter.safetensors",
    f"{CHECKPOINT}/optimizer.safetensors",
    f"{CHECKPOINT}/training_state.json",
)
LEFT = {"adapter", CHECKPOINT, "report.json"}
WRITES = (*CALLS, "save_file")


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code, or the negative signal that killed it, and what it said on standard error."""

    code: int
    said: str
    seconds: float
    calls: tuple[str, ...]

    @property
    def nothing_left(self) -> bool:
        """Whether it went on from the last step, where nothing is left to do."""
        return self.code == 2 and "the run is complete" in self.said

    @property
    def ended(self) -> bool:
        """Whether it came to its end, whatever was to happen to it."""
        return self.code == 0 or self.nothing_left


@dataclass
class Campaign:
    """A tiny model in ``work``, and the uninterrupted run to compare with."""

    work: Path
    record: Record
    straight: Outcome = field(init=False)
    random: random.Random = field(init=False)
    """Of the trial under way."""

    def prepare(self) -> None:
        """Load everything, start no thread, and run once without anything happening."""
        torch.set_num_threads(1)
        tqdm.monitor_interval = 0  # it would start a thread
        make_tiny(self.work)
        warm_up(self.work)
        for _ in range(100):  # transformers loads with threads, and does not wait for them to end
            if threading.active_count() == 1:
                break
            gc.collect()
            time.sleep(0.1)
        else:
            raise RuntimeError(f"forks would not be sound beside {threading.enumerate()}")
        self.run("straight", "--steps", str(STEPS))  # what is loaded late, from disk
        shutil.rmtree(self.work / "straight")
        self.straight = self.run("straight", "--steps", str(STEPS))
        if self.straight.code != 0:
            raise RuntimeError(self.straight.said)

    def run(self, name: str, *options: str, fault: Fault | None = None, watched: tuple[str, ...] = WRITES,
            during: Callable[[int], None] = lambda _: None) -> Outcome:  # fmt: skip
        """``meft-run`` in a child; ``during`` is given its process id once the program begins."""
        said, calls = self.work / "said", self.work / "calls"
        words = [self.work / "plan.json", "--model", self.work / "model", "--data", self.work / "facts.jsonl"]
        words += ["--output-dir", self.work / name, "--log", self.work / f"{name}.jsonl", "--save-every", 1]
        words += ["--device", "emulated", *options]
        begins, told = os.pipe()
        child = os.fork()
        if not child:
            _be_child([str(word) for word in words], said, calls, fault, watched, told)
        os.close(told)
        os.read(begins, 1)
        os.close(begins)
        started = time.perf_counter()
        during(child)
        _, status = os.waitpid(child, 0)
        seconds = time.perf_counter() - started
        return Outcome(
            os.waitstatus_to_exitcode(status), said.read_text(), seconds, tuple(calls.read_text().splitlines())
        )

    def trial(self, number: int) -> None:
        """Hit a run once or twice, let it go on to the end, and compare."""
        name, kind, counts = "trial", KINDS[number % len(KINDS)], self.record.counts
        self.random = random.Random(f"{self.record.seed}:{number}")
        shutil.rmtree(self.work / name, ignore_errors=True)
        (self.work / f"{name}.jsonl").unlink(missing_ok=True)
        problems: list[str] = []
        was_hit = False
        for _ in range(self.random.choice((1, 2))):
            outcome, hit, wrong = getattr(self, f"_{kind}")(name)
            problems += wrong + self._lost(name)
            was_hit = was_hit or hit
            if outcome.ended or problems:
                break
        if not was_hit and not problems:
            counts[f"{kind}: after the end"] += 1
            return
        counts[f"{kind}: tried"] += 1
        problems = problems or self._differences(name, outcome)
        counts[f"{kind}: passed"] += not problems
        for problem in problems:
            self.record.fail(number, f"{kind}: {problem}")

    # --- what happens to a run: its outcome, whether it was hit, and what was wrong about it --------------------------

    def _moment(self, name: str) -> tuple[Outcome, bool, list[str]]:
        outcome = self._hit_later(name, signal.SIGKILL)
        hit = outcome.code == -signal.SIGKILL
        return outcome, self._note("moment", hit), _unless(hit or outcome.ended, outcome)

    def _write(self, name: str) -> tuple[Outcome, bool, list[str]]:
        place = self.random.randrange(len(self.straight.calls))
        what = self.random.choice(("before", "after"))
        outcome = self.run(name, *self._how(name), fault=Fault(place, what))  # type: ignore[arg-type]
        hit = outcome.code == -signal.SIGKILL
        call = outcome.calls[-1] if outcome.calls else ""
        return outcome, self._note(f"{what} {call}", hit), _unless(hit or outcome.ended, outcome)

    def _signal(self, name: str) -> tuple[Outcome, bool, list[str]]:
        number = self.random.choice((signal.SIGINT, signal.SIGTERM))
        outcome = self._hit_later(name, number)
        hit = outcome.code in (128 + number, -number)
        right = outcome.ended or outcome.code == 128 + number
        return outcome, self._note(number.name, hit), _unless(right and "Traceback" not in outcome.said, outcome)

    def _fault(self, name: str) -> tuple[Outcome, bool, list[str]]:
        places = [call for call in self.straight.calls if call in FAILING]
        number = self.random.choice(ERRORS)
        fault = Fault(self.random.randrange(len(places)), self.random.choice(("error", "errors")), number)
        outcome = self.run(name, *self._how(name), fault=fault, watched=FAILING)
        hit = len(outcome.calls) > fault.place
        last = outcome.said.splitlines()[-1:]
        named = bool(last) and str(self.work) in last[0] and os.strerror(number) in last[0]
        right = (outcome.code == 4 and named) if hit else outcome.ended
        call = outcome.calls[fault.place] if hit else ""
        return outcome, self._note(f"{errno.errorcode[number]} in {call}", hit), _unless(right, outcome)

    def _hit_later(self, name: str, number: signal.Signals) -> Outcome:
        delay = self.random.uniform(0, 1.05 * self.straight.seconds)

        def hit(child: int) -> None:
            time.sleep(delay)
            os.kill(child, number)  # not waited for yet, so its number is its own

        return self.run(name, *self._how(name), during=hit)

    # --- what must be so afterwards -----------------------------------------------------------------------------------

    def _how(self, name: str) -> tuple[str, ...]:
        """Go on, if there is something to go on from; else begin, replacing an adapter without a checkpoint."""
        folder = self.work / name
        there = self._reported(name) or bool(list_checkpoints(folder))
        if there:
            return ("--resume",)
        return ("--steps", str(STEPS), "--overwrite")

    def _reported(self, name: str) -> int:
        """The step of the last checkpoint that the run told of; 0 for none."""
        log = self.work / f"{name}.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return max((line["step"] for line in map(json.loads, lines) if line["event"] == "checkpoint"), default=0)

    def _lost(self, name: str) -> list[str]:
        """A folder that was moved aside counts: the next start puts it back."""
        folder, reported = self.work / name, self._reported(name)
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        steps = [int(part[:8]) for each in names if (part := each.partition("checkpoint-")[2])[:8].isdigit()]
        if max(steps, default=0) >= reported:
            return []
        return [f"the checkpoint of step {reported} was told of and is gone: {sorted(names)}"]

    def _differences(self, name: str, ended: Outcome) -> list[str]:
        """Go on to the end, if it is not there, and compare."""
        if not ended.ended:
            ended = self.run(name, *self._how(name))
        if not ended.ended:
            return [f"going on exits {ended.code}: {ended.said}"]
        return compare(self.work / name, self.work / "straight")

    def _note(self, what: str, hit: bool) -> bool:
        if hit:
            self.record.details[f"hit: {what}"] = self.record.details.get(f"hit: {what}", 0) + 1
        return hit


def _unless(right: bool, outcome: Outcome) -> list[str]:
    return [] if right else [f"exit {outcome.code}: {outcome.said}"]


def compare(folder: Path, reference: Path) -> list[str]:
    """What is not as the uninterrupted run left it."""
    left = {path.name for path in folder.iterdir()}
    if left != LEFT:
        return [f"in the folder: {sorted(left)}"]
    found = [f"{name} differs" for name in EQUAL if (folder / name).read_bytes() != (reference / name).read_bytes()]
    losses = [Report.load(each / "report.json").training.loss_per_step for each in (folder, reference)]
    return found + (["the losses differ"] if losses[0] != losses[1] else [])


def warm_up(work: Path) -> None:
    """Load what a run loads, so that a fork has it; nothing that starts a thread."""
    import rich.progress
    import rich.table  # noqa: F401

    plan = Plan.load(work / "plan.json")
    kernels.warm_up(lambda _: None)
    model_loading.load_tokenizer(work / "model")
    model_loading.load_frozen_model(plan, work / "model")
    assert runner.run_training


def _be_child(
    words: list[str], said: Path, calls: Path, fault: Fault | None, watched: tuple[str, ...], begins: int
) -> None:
    """Be a process that runs ``meft-run`` with these words, and say when it begins; never returns."""
    code = 99
    try:
        for descriptor, path in ((1, Path(os.devnull)), (2, said)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        told = os.open(calls, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        sys.argv = ["meft-run", *words]
        Hooks(watched, fault, lambda name: os.write(told, f"{name}\n".encode())).install()  # type: ignore[arg-type]
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            signal.signal(number, handler)  # a fresh process's, not the campaign's
        with Interrupts().installed() as interrupts:  # as meft.runtime.cli.start does
            os.close(begins)
            cli.main(interrupts)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stderr.flush()
        os._exit(code)


@click.command()
@click.option("--count", type=click.IntRange(min=1), default=100, show_default=True, help="Trials in all.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--seconds", type=float, help="Begin no trial after so long; the same command goes on.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where results add up.")
@click.option("--only", type=click.IntRange(0), help="This trial alone, noted nowhere.")
def main(count: int, seed: int, seconds: float | None, path: Path | None, only: int | None) -> None:
    """Kill, interrupt and starve training runs, let them go on, and compare."""
    record = Record("kills", seed, path if only is None else None)
    memory = Path("/dev/shm")  # where there is one: a kill takes what is on its way to a disk no more than there
    with tempfile.TemporaryDirectory(prefix="meft-kills-", dir=memory if memory.is_dir() else None) as work:
        campaign = Campaign(Path(work), record)
        campaign.prepare()
        record.details["calls in a run"] = len(campaign.straight.calls)
        for number in record.numbers(count, seconds=seconds) if only is None else [only]:
            campaign.trial(number)
    record.tell()
    sys.exit(bool(record.failures))


if __name__ == "__main__":
    main()
