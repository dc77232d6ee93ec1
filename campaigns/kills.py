"""Kill training, interrupt it, let its disk fail; go on each time, and compare with the run that nothing happened to.

    python campaigns/kills.py --count 100 --seed 0 --json campaigns/results/kills.json

Kinds, in turn: ``moment`` (SIGKILL at a random moment), ``write`` (SIGKILL before or after a random call that changes
the disk, or in the middle of a safetensors file), ``signal`` (SIGINT or SIGTERM at a random moment) and ``fault`` (such
a call fails with ENOSPC, EIO or EROFS, once or from then on). Half of the trials are hit twice. A trial passes when

- every checkpoint that was reported is still there, or a newer one;
- an interrupted run exits 130 or 143, one whose disk failed exits 4 with one line, and neither writes a traceback;
- the run that goes on to the end exits 0 (2 if no step was left to do, and it says so) and leaves adapter, optimizer
  state, training state and losses equal bit for bit to those of the uninterrupted run, and nothing else in the folder.

A run is ``meft-run`` on a tiny model, in a fork of this process, which has loaded everything but started no thread. A
hit that comes after the run's end is not counted. Exit code 1 if a trial fails.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import click
import torch
from faults import CALLS, ERRORS, FAILING, Fault, Hooks
from tiny import make_tiny
from tqdm import tqdm  # type: ignore[import-untyped]

from meft.planner.records.plan import Plan
from meft.planner.records.report import Report
from meft.runtime.cli import run as cli
from meft.runtime.host import kernels
from meft.runtime.session import model_loading
from meft.runtime.session.checkpoint import list_checkpoints
from meft.runtime.training import runner

KINDS = ("moment", "write", "signal", "fault")
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
class Counts:
    """Of one kind. ``late``: hits that came after the end, which say nothing."""

    tried: int = 0
    passed: int = 0
    failed: int = 0
    late: int = 0


@dataclass
class Campaign:
    """A tiny model in ``work``, and the uninterrupted run to compare with."""

    work: Path
    random: random.Random
    straight: Outcome = field(init=False)
    counts: dict[str, Counts] = field(default_factory=lambda: {kind: Counts() for kind in KINDS})
    hits: dict[str, int] = field(default_factory=dict)
    """By what was hit."""
    failures: list[str] = field(default_factory=list)

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
        """``meft-run`` in a child; ``during`` is given its process id."""
        said, calls = self.work / "said", self.work / "calls"
        words = [self.work / "plan.json", "--model", self.work / "model", "--data", self.work / "facts.jsonl"]
        words += ["--output-dir", self.work / name, "--log", self.work / f"{name}.jsonl", "--save-every", 1]
        words += ["--device", "emulated", *options]
        started = time.perf_counter()
        child = os.fork()
        if not child:
            _be_child([str(word) for word in words], said, calls, fault, watched)
        during(child)
        _, status = os.waitpid(child, 0)
        seconds = time.perf_counter() - started
        return Outcome(
            os.waitstatus_to_exitcode(status), said.read_text(), seconds, tuple(calls.read_text().splitlines())
        )

    def trial(self, kind: str) -> None:
        """Hit a run once or twice, let it go on to the end, and compare."""
        name = "trial"
        shutil.rmtree(self.work / name, ignore_errors=True)
        (self.work / f"{name}.jsonl").unlink(missing_ok=True)
        counts, problems, was_hit = self.counts[kind], [], False
        for _ in range(self.random.choice((1, 2))):
            outcome, hit, wrong = getattr(self, f"_{kind}")(name)
            problems += wrong + self._lost(name)
            was_hit = was_hit or hit
            if outcome.ended or problems:
                break
        if not was_hit and not problems:
            counts.late += 1
            return
        counts.tried += 1
        problems = problems or self._differences(name, outcome)
        counts.passed += not problems
        counts.failed += bool(problems)
        self.failures += [f"{kind}: {problem}" for problem in problems]

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
        right = (
            outcome.ended
            or outcome.code == 128 + number
            or (outcome.code == -number and not (self.work / name).exists())
        )
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
        """Go on to the end, if it is not there, and compare; a run killed after its last step has no report."""
        if not ended.ended:
            ended = self.run(name, *self._how(name))
        if not ended.ended:
            return [f"going on exits {ended.code}: {ended.said}"]
        return compare(self.work / name, self.work / "straight", with_report=not ended.nothing_left)

    def _note(self, what: str, hit: bool) -> bool:
        if hit:
            self.hits[what] = self.hits.get(what, 0) + 1
        return hit


def _unless(right: bool, outcome: Outcome) -> list[str]:
    return [] if right else [f"exit {outcome.code}: {outcome.said}"]


def compare(folder: Path, reference: Path, *, with_report: bool) -> list[str]:
    """What is not as the uninterrupted run left it."""
    found = [f"{name} differs" for name in EQUAL if (folder / name).read_bytes() != (reference / name).read_bytes()]
    left = {path.name for path in folder.iterdir()}
    if left - {"report.json"} != LEFT - {"report.json"}:
        found.append(f"in the folder: {sorted(left)}")
    if with_report:
        losses = [Report.load(each / "report.json").training.loss_per_step for each in (folder, reference)]
        found += ["the losses differ"] if losses[0] != losses[1] else []
    return found


def warm_up(work: Path) -> None:
    """Load what a run loads, so that a fork has it; nothing that starts a thread."""
    import rich.progress
    import rich.table  # noqa: F401

    plan = Plan.load(work / "plan.json")
    kernels.warm_up(lambda _: None)
    model_loading.load_tokenizer(work / "model")
    model_loading.load_frozen_model(plan, work / "model")
    assert runner.DEFAULT_STEPS


def _be_child(words: list[str], said: Path, calls: Path, fault: Fault | None, watched: tuple[str, ...]) -> None:
    """Be a process that runs ``meft-run`` with these words; never returns."""
    code, begun = 99, False
    try:
        for descriptor, path in ((1, Path(os.devnull)), (2, said)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        told = os.open(calls, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        sys.argv = ["meft-run", *words]
        Hooks(watched, fault, lambda name: os.write(told, f"{name}\n".encode())).install()  # type: ignore[arg-type]
        begun = True
        cli.main()
        code = 0
    except KeyboardInterrupt:  # before the program began, which is the campaign's affair
        code = 99 if begun else 128 + signal.SIGINT
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stderr.flush()
        os._exit(code)


@click.command()
@click.option("--count", type=click.IntRange(min=1), default=100, show_default=True, help="Trials in all.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--seconds", type=float, help="Begin no trial after so long.")
@click.option("--json", "result", type=click.Path(path_type=Path), help="Write the counts there.")
def main(count: int, seed: int, seconds: float | None, result: Path | None) -> None:
    """Kill, interrupt and starve training runs, let them go on, and compare."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="meft-kills-") as work:
        campaign = Campaign(Path(work), random.Random(seed))
        campaign.prepare()
        for number in range(count):
            if seconds is not None and time.monotonic() - started > seconds:
                break
            campaign.trial(KINDS[number % len(KINDS)])
    content = summary(
        campaign,
        " ".join(
            [
                "python campaigns/kills.py",
                f"--count {count} --seed {seed}",
                *([] if seconds is None else [f"--seconds {seconds:g}"]),
            ]
        ),
    )
    text = json.dumps(content, indent=2) + "\n"
    click.echo(text, nl=False)
    if result is not None:
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(text)
    sys.exit(bool(campaign.failures))


def summary(campaign: Campaign, command: str) -> dict[str, Any]:
    """The counts, and with which versions."""
    return {
        "command": command,
        "calls_in_a_run": len(campaign.straight.calls),
        "trials": {kind: vars(counts) for kind, counts in campaign.counts.items()},
        "hits": dict(sorted(campaign.hits.items())),
        "failures": campaign.failures,
        "versions": {name: version(name) for name in ("meft", "torch", "transformers", "safetensors")},
    }


if __name__ == "__main__":
    main()
