"""Long runs, runs side by side, and a machine with one core.

    python campaigns/load.py --count 10000 --json campaigns/results/load.json

Parts, each of which passes or fails:

- ``long run``: ``--count`` steps of a tiny model in this process. Resident memory, open files, threads, objects that
  the garbage collector knows and the longest lists are sampled on the way; from the first tenth to the end they stay
  what they were, but for the three lists that the report is made of (loss of each step, rate and norm of each optimizer
  step). The last tenth's steps take the processor as long as the first's, and the report has at most so many bytes a
  step.
- ``two at once``: two processes train side by side from an empty cache folder, so that both compile the host's kernels
  and write them there at once. A third that wants one of their folders is refused and told who holds it.
- ``one core``: a run that may use one processor alone.

The last two end with what a run alone ends with, bit for bit, and the run alone finds the kernels that the two
compiled. Exit code 1 if a part fails.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import click
import psutil
import torch
from tiny import make_tiny

from meft.planner.records.plan import Plan
from meft.planner.records.report import Report
from meft.runtime.host.optimizer import AdamWSettings
from meft.runtime.training.options import Display, RunOptions
from meft.runtime.training.output import LOCK
from meft.runtime.training.runner import run_training
from meft.runtime.training.training import Progress, TrainingOptions

SAMPLES = 40
BYTES_PER_STEP = 80
"""Of the report: three numbers in JSON, two of them per optimizer step."""
BYTES_BESIDE = 64 << 10
GROWTH_BYTES = 16 << 20
"""Of resident memory after the first tenth: what the allocator keeps, and eight bytes for each number of the lists."""
GROWTH_OBJECTS = 500
SLOWER = 1.25
WEIGHTS = "adapter/meft_adapter.safetensors"
LEAST_TIMED_STEPS = 2000
"""A tenth of fewer is too short to tell a slower run from a busier machine."""
HISTORY_LISTS = 3


@dataclass(frozen=True)
class Sample:
    """The process at one moment."""

    step: int
    resident_bytes: int
    open_files: int
    threads: int
    objects: int
    longest_lists: list[int]

    @classmethod
    def now(cls, step: int) -> Sample:
        """Of this process."""
        gc.collect()
        process, tracked = psutil.Process(), gc.get_objects()
        longest = sorted((len(each) for each in tracked if type(each) is list and each is not tracked), reverse=True)
        memory = process.memory_info().rss
        return cls(step, memory, process.num_fds(), process.num_threads(), len(tracked), longest[:8])


@dataclass
class Watch:
    """Samples a run on its way, and notes what each step takes of the processor."""

    steps: int
    samples: list[Sample] = field(default_factory=list)
    seconds: array[float] = field(default_factory=lambda: array("d"))
    _before: float = field(default_factory=time.process_time)

    def on_step(self, progress: Progress) -> None:
        """Called after each step."""
        now = time.process_time()
        self.seconds.append(now - self._before)
        if progress.step % max(1, self.steps // SAMPLES) == 0:
            self.samples.append(Sample.now(progress.step))
        self._before = time.process_time()

    def problems(self) -> list[str]:
        """What did not stay as it was from the first tenth on."""
        tenth = max(1, len(self.samples) // 10)
        first, last = self.samples[tenth], self.samples[-1]
        found = []
        if last.resident_bytes > first.resident_bytes + GROWTH_BYTES:
            found.append(f"resident memory {first.resident_bytes:,} -> {last.resident_bytes:,} bytes")
        if last.objects > first.objects + GROWTH_OBJECTS:
            found.append(f"objects {first.objects:,} -> {last.objects:,}")
        for name in ("open_files", "threads"):
            if getattr(first, name) != getattr(last, name):
                found.append(f"{name} {getattr(first, name)} -> {getattr(last, name)}")
        longer = [size for size in last.longest_lists if size > first.longest_lists[0]]
        if len(longer) > HISTORY_LISTS or any(size > self.steps for size in longer):
            found.append(f"longest lists {first.longest_lists} -> {last.longest_lists}")
        before, after = self.tenths()
        if self.steps >= LEAST_TIMED_STEPS and after > SLOWER * before:
            found.append(f"processor seconds of a step {before:.5f} -> {after:.5f}")
        return found

    def tenths(self) -> tuple[float, float]:
        """Median processor seconds of a step in the first tenth, without its first steps, and in the last."""
        tenth = len(self.seconds) // 10
        return statistics.median(self.seconds[tenth // 10 : tenth]), statistics.median(self.seconds[-tenth:])


def long_run(work: Path, steps: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """A run of so many steps, in this process."""
    watch, folder = Watch(steps), work / "long"
    options = RunOptions(
        training=TrainingOptions(steps=steps, seed=seed, save_every=100),
        settings=AdamWSettings(),
        model=str(work / "model"),
        data=(work / "facts.jsonl",),
        output_dir=folder,
        device="emulated",
    )
    run_training(Plan.load(work / "plan.json"), options, Display(say, watch.on_step))
    size, problems = (folder / "report.json").stat().st_size, watch.problems()
    if size > BYTES_BESIDE + BYTES_PER_STEP * steps:
        problems.append(f"a report of {size:,} bytes")
    shown = [watch.samples[index] for index in (len(watch.samples) // 10, len(watch.samples) // 2, -1)]
    before, after = watch.tenths()
    return {
        "problems": problems,
        "steps": steps,
        "samples": [vars(sample) for sample in shown],
        "processor_seconds_of_a_step": {"first tenth": round(before, 6), "last tenth": round(after, 6)},
        "report_bytes": size,
    }


@dataclass(frozen=True)
class Beside:
    """Runs of ``meft-run`` in processes of their own; all but the refused one are to end as the one alone does."""

    work: Path
    steps: int
    seed: int

    def start(self, name: str, *, cores: set[int] | None = None) -> subprocess.Popen[str]:
        """A run into the folder ``name``, with the cache folder that all share."""
        words = [self.work / "plan.json", "--model", self.work / "model", "--data", self.work / "facts.jsonl"]
        words += ["--output-dir", self.work / name, "--steps", self.steps, "--seed", self.seed, "--device", "emulated"]
        return subprocess.Popen(
            [sys.executable, "-m", "meft.runtime.cli", *map(str, words)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(self.work / "cache")},
            preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
        )

    def two_at_once(self) -> dict[str, Any]:
        """Two with an empty cache, a third in the way, and one alone afterwards."""
        first, second = self.start("first"), self.start("second")
        while first.poll() is None and not (self.work / "first" / LOCK).exists():
            time.sleep(0.05)
        refused = self.start("first")
        said = {
            name: run.communicate()[1] for name, run in (("refused", refused), ("first", first), ("second", second))
        }
        problems = [f"{name}: exit {run.returncode}: {said[name]}" for name, run in
                    (("first", first), ("second", second)) if run.returncode]  # fmt: skip
        if refused.returncode != 4 or f"process {first.pid} " not in said["refused"]:
            problems.append(f"the third: exit {refused.returncode}: {said['refused']}")
        alone = self.start("alone")
        told = alone.communicate()[1]
        if alone.returncode or "compiling" in told:
            problems.append(f"alone, with the two's kernels: exit {alone.returncode}: {told}")
        compiled = [name for name in ("first", "second") if "compiling" in said[name]]
        return {"problems": problems + self.differences("first", "second"), "compiled_by": compiled}

    def one_core(self) -> dict[str, Any]:
        """A run on the first processor that this process may use."""
        core = min(os.sched_getaffinity(0))
        run = self.start("one-core", cores={core})
        said = run.communicate()[1]
        problems = [f"exit {run.returncode}: {said}"] if run.returncode else self.differences("one-core")
        return {"problems": problems}

    def differences(self, *names: str) -> list[str]:
        """What is not as the run alone left it."""
        found = []
        for name in names:
            ours, theirs = self.work / name, self.work / "alone"
            if not ((ours / WEIGHTS).exists() and (theirs / WEIGHTS).exists()):
                found.append(f"{name}: no adapter")
            elif (ours / WEIGHTS).read_bytes() != (theirs / WEIGHTS).read_bytes():
                found.append(f"{name}: another adapter than alone")
            elif self._losses(ours) != self._losses(theirs):
                found.append(f"{name}: other losses than alone")
        return found

    def _losses(self, folder: Path) -> tuple[float, ...]:
        return Report.load(folder / "report.json").training.loss_per_step


@click.command()
@click.option("--count", type=click.IntRange(min=100), default=10_000, show_default=True, help="Steps of the long run.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the runs.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the result there.")
def main(count: int, seed: int, path: Path | None) -> None:
    """Long runs, runs side by side, and a machine with one core."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="meft-load-") as folder:
        work = Path(folder)
        make_tiny(work)
        beside = Beside(work, steps=40, seed=seed)
        parts = {
            "two at once": beside.two_at_once(),
            "one core": beside.one_core(),
            "long run": long_run(work, count, seed, lambda text: click.echo(text, err=True)),
        }
    failed = [name for name, part in parts.items() if part["problems"]]
    result = {
        "campaign": "load",
        "command": f"python campaigns/load.py --count {count} --seed {seed}",
        "counts": {"tried": len(parts), "passed": len(parts) - len(failed), "failed": len(failed)},
        "parts": parts,
        "versions": {name: version(name) for name in ("meft", "torch", "transformers", "numba")},
    }
    text = json.dumps(result, indent=1) + "\n"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    click.echo(text, nl=False)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
