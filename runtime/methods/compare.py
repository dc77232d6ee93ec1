"""Every method that fits a budget, trained at the best of a small stated grid, over seeds: one line of JSON per run.

A method trains at every learning rate of its grid with the first seed, then at the best of them with the other seeds.
What the results file has is not run again, so a comparison that was stopped goes on. Device memory is counted over the
first steps (every step allocates the same), traffic over all.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from meft.planner.base.errors import DeviceOutOfMemory, MeftError
from meft.planner.base.units import format_bytes, format_seconds
from meft.planner.base.version import VERSION
from meft.planner.records.plan import Plan, Request
from meft.planner.records.setup import TrainingSetup
from meft.runtime.data.examples import Batch, Example, pad_token_id
from meft.runtime.data.metrics import MAIN_SCORE
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.methods.generating import generator_of
from meft.runtime.methods.opening import load_model, open_method
from meft.runtime.session.baselines import BaselineSession
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import Session, open_session
from meft.runtime.training.training import Trainer, TrainingOptions
from meft.runtime.use.evaluation import Evaluator, mean_loss, session_loss
from meft.runtime.use.generation import SessionGenerator

BOOKED_STEPS = 3
"""Two whole optimizer steps and the forward and backward after them."""
PROSE_BATCH, PROSE_TOKENS = 4, 64


@dataclass(frozen=True)
class Candidate:
    """One method of a comparison. ``predicted_bytes`` is the allocated peak, by the planner; ``refused`` says why it is
    not run, if it is not; ``model`` is its base where that is another than the workload's."""

    name: str
    size: str
    rates: tuple[float, ...] = ()
    setup: TrainingSetup | None = None
    plan: Plan | None = None
    predicted_bytes: int | None = None
    refused: str | None = None
    model: Path | None = None


@dataclass(frozen=True)
class Run:
    """One training run of a candidate."""

    candidate: Candidate
    learning_rate: float
    seed: int

    def key(self, workload: str) -> str:
        """Identifies the run in a results file: by what is trained, so that a plan whose prediction became another is
        not trained again."""
        plan, setup = self.candidate.plan, self.candidate.setup
        parts = [setup] if plan is None else [_of_any_host(plan.request), plan.decision]
        digest = " ".join("none" if part is None else part.content_digest()[:16] for part in parts)
        return f"{self.candidate.name} {digest} lr {self.learning_rate:g} seed {self.seed} {workload}"


def _of_any_host(request: Request) -> Request:
    """The request without what its machine has, which changes nothing that is learnt."""
    return request.model_copy(update={"host_mem_bytes": 1, "host_mem_basis": "given"})


@dataclass(frozen=True)
class Workload:
    """What all methods of a comparison share."""

    model: Path
    examples: Sequence[Example]
    evaluator: Evaluator
    prose: Sequence[Example]
    """Ordinary text whose loss shows what was forgotten; may be empty."""
    tokenizer: Any
    steps: int
    budget_bytes: int
    digest: str


Say = Callable[[str], None]


def compare(candidates: Sequence[Candidate], work: Workload, seeds: Sequence[int], results: Path, *, say: Say) -> None:
    """Run what the results file lacks, and append each line when it is done; the second stage is a seed at a time."""
    first = [Run(each, rate, seeds[0]) for each in candidates for rate in each.rates if each.refused is None]
    later = len(seeds[1:]) * sum(each.refused is None for each in candidates)
    perform(first, work, results, say=say, further=later)
    done = read_results(results)
    for place, seed in enumerate(seeds[1:], start=2):
        best = [run for each in candidates if (run := _best(each, work, seeds[0], done)) is not None]
        further = (len(seeds) - place) * len(best)
        perform([replace(run, seed=seed) for run in best], work, results, say=say, further=further)


def perform(runs: Sequence[Run], work: Workload, results: Path, *, say: Say, further: int = 0) -> None:
    """Run those that the file lacks; ``further`` runs will follow these, for the time that is left."""
    done = read_results(results)
    lacking = [run for run in runs if run.key(work.digest) not in done]
    seconds = [record["seconds"] for record in done.values() if record.get("seconds")]
    for place, run in enumerate(lacking, start=1):
        left = (len(lacking) - place + 1 + further) * statistics.fmean(seconds) if seconds else None
        told = "" if left is None else f", about {format_seconds(left)} left"
        name = f"{run.candidate.name} lr {run.learning_rate:g} seed {run.seed}"
        say(f"run {place} of {len(lacking)}{f' and {further} more' if further else ''}: {name}{told}")
        started = time.monotonic()
        try:
            record = run_one(run, work)
        except MeftError as error:
            kind = "out_of_memory" if isinstance(error, DeviceOutOfMemory) else "failed"
            record = {kind: str(error)}
        gc.collect()  # sessions refer to themselves in circles, which hold gigabytes of tables in few objects
        record |= {"seconds": round(time.monotonic() - started, 1)}
        seconds.append(record["seconds"])
        line: dict[str, Any] = {"key": run.key(work.digest), "method": run.candidate.name, "size": run.candidate.size}
        line |= {"learning_rate": run.learning_rate, "seed": run.seed, "predicted": run.candidate.predicted_bytes}
        _append(results, json.dumps(line | record))
        say(f"  {_said(record)}")


def _append(results: Path, line: str) -> None:
    """On a line of its own, also where a kill has cut the last one off."""
    cut_off = results.exists() and results.stat().st_size > 0 and not results.read_bytes().endswith(b"\n")
    with results.open("a", encoding="utf-8") as file:
        file.write(f"{chr(10) if cut_off else ''}{line}\n")


def run_one(run: Run, work: Workload) -> dict[str, Any]:
    """Train and score one run."""
    torch.manual_seed(run.seed)
    with closing(_opened(run, work)) as session:
        trainer = _train(run, work, session)
        sparse = isinstance(session, Session)
        generator = SessionGenerator(session) if sparse else generator_of(session.model)
        scored = work.evaluator.evaluate(generator, optimizer_steps=work.steps)
        main = MAIN_SCORE[scored.metric]
        loss = partial(session_loss, session) if sparse else session.loss
        pad_id = pad_token_id(work.tokenizer)
        prose = (
            mean_loss(loss, work.prose, batch_size=PROSE_BATCH, seq_len=PROSE_TOKENS, pad_id=pad_id)
            if work.prose
            else None
        )
        steps = max(1, trainer.measured.steps) if trainer is not None else 1
        peaks = session.device.peaks() if trainer is None else trainer.measured.peaks
        return {
            "score": scored.scores[main],
            "metric": main,
            "prose_loss": prose,
            "trainable_parameters": 0 if trainer is None else trainable_of(session),
            "peak_allocated_bytes": peaks.allocated_bytes,
            "traffic_bytes_per_step": sum(session.engine.bytes_in(way, "step") for way in ("h2d", "d2h")) // steps,
            "seconds_per_step": statistics.median(trainer.measured.window_seconds) if trainer is not None else 0.0,
            "final_loss": trainer.history.losses[-1] if trainer is not None else None,
        }


def _opened(run: Run, work: Workload) -> Any:
    device = EmulatedDevice(work.budget_bytes)
    folder = run.candidate.model or work.model
    if run.candidate.plan is not None:
        plan = run.candidate.plan
        model = load_frozen_model(plan, folder, device_kind="emulated")
        return open_session(plan, model, device, seed=run.seed)
    assert run.candidate.setup is not None
    model = load_model(run.candidate.setup, folder, device_kind="emulated")
    return open_method(run.candidate.setup, model, device, seed=run.seed)


def _train(run: Run, work: Workload, session: Any) -> Trainer | None:
    if run.candidate.name == "none":
        return None
    close_books(session)
    options = TrainingOptions(steps=work.steps, learning_rate=run.learning_rate, seed=run.seed)
    pad_id = pad_token_id(work.tokenizer)
    trainer = Trainer(session, work.examples, options, pad_id=pad_id, meft_version=VERSION)
    trainer.run()
    return trainer


def close_books(session: Any, *, after: int = BOOKED_STEPS) -> None:
    """Count the device's memory during the first steps only: the books cost a third of the time."""
    step, done = session.step, [0]

    def counted(batch: Batch, **options: Any) -> Any:
        done[0] += 1
        if done[0] > after:
            session.device.scope = nullcontext
        return step(batch, **options)

    session.step = counted


def trainable_of(session: Any) -> int:
    """How many numbers a session trains."""
    if isinstance(session, BaselineSession):
        return session.trainable_parameters
    rows = sum(tables.weights.numel() for tables in session.store.layers)
    return int(rows + sum(weight.numel() for weight in session.router_weights))


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The records so far by their key; a last line cut off by a kill is left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["key"]] = record
    return found


def _best(candidate: Candidate, work: Workload, seed: int, done: dict[str, dict[str, Any]]) -> Run | None:
    """The candidate's run of the grid with the best score; none where no run ended well."""
    runs = [Run(candidate, rate, seed) for rate in candidate.rates]
    scored = [run for run in runs if "score" in done.get(run.key(work.digest), {})]
    if candidate.refused is not None or not scored:
        return None
    return max(scored, key=lambda run: _rank(done[run.key(work.digest)]))


def _rank(record: dict[str, Any]) -> tuple[float, float]:
    """The better score; of equal ones the lower loss at the end."""
    return record["score"], -(record["final_loss"] or 0.0)


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One method at its best rate, means over seeds."""

    method: str
    size: str
    learning_rate: float | None = None
    seeds: int = 0
    score: float = 0.0
    spread: float = 0.0
    """Standard deviation over seeds; 0 of a single one."""
    prose_loss: float | None = None
    peak_bytes: int = 0
    predicted_bytes: int | None = None
    traffic_bytes: int = 0
    seconds_per_step: float = 0.0
    trainable: int = 0
    reason: str | None = None
    """Why there is nothing to show."""


def rows_of(candidates: Sequence[Candidate], work: Workload, seeds: Sequence[int], results: Path) -> list[Row]:
    """A row for every candidate, in their order; one that was not run, or failed, has its reason."""
    done = read_results(results)
    return [_row(each, work, seeds, done) for each in candidates]


def _row(candidate: Candidate, work: Workload, seeds: Sequence[int], done: dict[str, dict[str, Any]]) -> Row:
    if candidate.refused is not None:
        return Row(shown(candidate.name), candidate.size, reason=candidate.refused)
    best = _best(candidate, work, seeds[0], done)
    if best is None:
        tried = [done.get(Run(candidate, rate, seeds[0]).key(work.digest), {}) for rate in candidate.rates]
        said = [each.get("out_of_memory") or each.get("failed") for each in tried]
        return Row(shown(candidate.name), candidate.size, reason=next((text for text in said if text), "not run yet"))
    found = [done[key] for seed in seeds if (key := replace(best, seed=seed).key(work.digest)) in done]
    found = [each for each in found if "score" in each]
    scores = [each["score"] for each in found]
    prose = [each["prose_loss"] for each in found if each["prose_loss"] is not None]
    return Row(
        method=shown(candidate.name),
        size=candidate.size,
        learning_rate=best.learning_rate,
        seeds=len(found),
        score=statistics.fmean(scores),
        spread=statistics.stdev(scores) if len(scores) > 1 else 0.0,
        prose_loss=statistics.fmean(prose) if prose else None,
        peak_bytes=max(each["peak_allocated_bytes"] for each in found),
        predicted_bytes=candidate.predicted_bytes,
        traffic_bytes=found[0]["traffic_bytes_per_step"],
        seconds_per_step=statistics.median(each["seconds_per_step"] for each in found),
        trainable=found[0]["trainable_parameters"],
    )


def shown(name: str) -> str:
    """A method's name for people: of a model's folder the last part."""
    return re.sub(r"(model=)[^:]*/(?=[^:])", r"\1", name)


def markdown(rows: Sequence[Row]) -> str:
    """The table, a line per method; a method without numbers has its reason."""
    lines = [
        "| method | size | trained | device memory | predicted | traffic a step | step | rate | seeds | score | prose "
        "loss |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row.reason is not None:
            lines.append(f"| {row.method} | {row.size} | {row.reason} | | | | | | | | |")
            continue
        spread = f" ± {100 * row.spread:.1f}" if row.seeds > 1 else ""
        prose = "-" if row.prose_loss is None else f"{row.prose_loss:.3f}"
        predicted = "-" if row.predicted_bytes is None else format_bytes(row.predicted_bytes)
        memory = format_bytes(row.peak_bytes) if row.peak_bytes else "-"
        rate = "-" if not row.learning_rate else f"{row.learning_rate:g}"
        lines.append(
            f"| {row.method} | {row.size} | {row.trainable:,} | {memory} | {predicted} | "
            f"{format_bytes(row.traffic_bytes)} | {format_seconds(row.seconds_per_step)} | {rate} | {row.seeds} | "
            f"{100 * row.score:.1f} %{spread} | {prose} |"
        )
    return "\n".join(lines) + "\n"


def _said(record: dict[str, Any]) -> str:
    if "score" not in record:
        return str(record.get("out_of_memory") or record.get("failed"))
    prose = "" if record["prose_loss"] is None else f", prose loss {record['prose_loss']:.3f}"
    peak = format_bytes(record["peak_allocated_bytes"])
    return f"{record['metric']} {record['score']:.3f}{prose}, {peak}, {record['seconds']:.0f} s"
