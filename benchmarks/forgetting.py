"""What is forgotten once so many facts are learnt? Each method in one run, asked at points on its way.

    python benchmarks/forgetting.py run --results forgetting.jsonl --on bits|airports [--ways meft,lora] [--seeds 0,1,2]
    python benchmarks/forgetting.py report --results forgetting.jsonl

A method that learns more forgets more, so ends of runs do not compare. Here a run is asked every so many steps, and
what it has forgotten where it first knew a share of the facts (:data:`LEVELS`) is read off the line between the two
points around it. A lower learning rate forgets less until it no longer learns: each way trains at every rate of its
method's grid with the first seed, then with the others at the one that had forgotten least where 95 % were known.

``--on bits``: the tests' tiny LLaMA and facts of 24 random bits (``benchmarks/capacity.py``); *prose* is the loss on
text that the untouched model wrote itself, sampled, so that no more than what it knew is asked. ``--on airports``:
SmolLM2 and airports' cities (``benchmarks/knowledge.py``); prose is the factbook's, *capitals* are those it still
names. A fact or a capital is known if every token of the answer is the likeliest after the ones before it, which is
what greedy decoding says; MEFT is asked as it is served. Replayed text is of the prose's kind, and none of the prose.

``run`` goes on where the file stands. ``--quick`` takes seconds. Committed: ``benchmarks/forgetting_results.jsonl``.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import capacity
import click
import torch
from capacity import facts_of
from knowledge import Run as KnowledgeRun
from knowledge import (
    airports,
    books_of,
    capitals,
    close_books,
    lines_of,
    listed,
    opened,
    plan_of,
    read_results,
    shape_of,
    smollm2_folder,
)

from meft.planner.records.report import Evaluation
from meft.runtime.data.examples import IGNORE_INDEX, Example, collate, pad_token_id, tokenize_record
from meft.runtime.data.records import Text
from meft.runtime.data.task_sources import factbook_prose
from meft.runtime.session.model_folder import load_causal_lm
from meft.runtime.session.model_loading import load_tokenizer
from meft.runtime.session.session import Session
from meft.runtime.training.replay import mixed
from meft.runtime.training.training import Trainer, TrainingOptions
from meft.runtime.use.evaluation import mean_loss, session_loss
from meft.runtime.use.inference import Serving, serving

LEVELS = (0.5, 0.75, 0.95)
"""Shares of the facts at which ways are compared; a way's rate is the one that had forgotten least at the last."""
PROSE_TOKENS, PROSE_BATCH = 64, 8


@dataclass(frozen=True)
class Way:
    """A method, and what is done against forgetting."""

    name: str
    method: str = "meft"
    tokens_see: str = "union"
    replay_share: float = 0.0
    known_token_weight: float = 1.0
    rows_met: int | None = None
    """At inference a token meets its best rows alone, so many times K; None: as training says."""


WAYS = {
    "lora": Way("LoRA", "lora"),
    "lora-replay": Way("LoRA, a tenth of ordinary text", "lora", replay_share=0.1),
    "dense": Way("dense adapter", "parallel"),
    "meft": Way("MEFT, tokens see the union"),
    "meft-few": Way("MEFT, union, asked with a token's best 4 K rows", rows_met=4),
    "meft-own": Way("MEFT, tokens see their own rows", tokens_see="own"),
    "meft-replay": Way("MEFT, union, a tenth of ordinary text", replay_share=0.1),
    "meft-known": Way("MEFT, union, known tokens weigh 0", known_token_weight=0.0),
}
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "bits": {
        "meft": (2e-2, 1e-2, 5e-3, 2.5e-3),
        "lora": (5e-3, 2.5e-3, 1.25e-3),
        "parallel": (2e-2, 1e-2, 5e-3, 2.5e-3),
    },
    "airports": {"meft": (8e-3, 4e-3), "lora": (1e-2, 5e-3), "parallel": (8e-3, 4e-3)},
}
"""Of each method; the highest are the best at learning in ``capacity_results.jsonl`` and ``knowledge_results.jsonl``,
but LoRA's of bits, which is one above that."""


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's result; ``every`` so many steps it is asked."""

    way: str
    learning_rate: float
    seed: int
    on: str = "bits"
    facts: int = 128
    epochs: int = 24
    every: int = 12
    batch_size: int = 16
    seq_len: int = 16
    width: int = 256
    top_k: int = 8
    active_rows_cap: int = 72
    rank: int = 8
    texts: int = 32
    """Of prose, and as many others to replay for each hundred facts or a part of it."""
    capitals: int = 0

    @property
    def key(self) -> str:
        """Identifies the run in a results file."""
        return json.dumps(asdict(self), sort_keys=True)


BITS = Run("", 0.0, 0)
AIRPORTS = replace(
    BITS, on="airports", facts=80, epochs=11, every=5, seq_len=11, width=1024, top_k=32, active_rows_cap=512, rank=1,
    texts=8, capitals=60,
)  # fmt: skip


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """What is learnt, what should be left alone, and what is replayed."""

    facts: Sequence[Example]
    prose: Sequence[Example]
    replayed: Sequence[Example]
    capitals: Sequence[Example]
    pad_id: int


@dataclass
class Points:
    """Asks a session every so many optimizer steps."""

    ask: Callable[[Any], dict[str, float]]
    every: int
    found: list[dict[str, float]] = field(default_factory=list)
    results: list[Evaluation] = field(default_factory=list)

    def due(self, optimizer_steps: int, *, last: bool) -> bool:
        """Whether to ask after so many optimizer steps."""
        return last or optimizer_steps % self.every == 0

    def evaluate(self, session: Any, optimizer_steps: int) -> None:
        """Ask, and keep what was found."""
        started = time.perf_counter()
        point = self.ask(session)
        self.found.append({"step": optimizer_steps} | point)
        result = Evaluation(
            task="facts", metric="em", optimizer_steps=optimizer_steps, items=1, left_out=0,
            scores={"exact_match": point["exact_match"]}, max_new_tokens=1, seconds=time.perf_counter() - started,
        )  # fmt: skip
        self.results.append(result)
        click.echo(f"  step {optimizer_steps}: {_said(point)}", err=True)


def perform(run: Run, folder: Path) -> dict[str, Any]:
    """Train, asking on the way; returns the run and its points, the first of them before training."""
    way, cpu = WAYS[run.way], time.process_time
    torch.manual_seed(run.seed)
    material, known = material_of(run, folder), _knowledge_run(run)
    examples = list(material.facts)
    if way.replay_share:
        examples = list(mixed(examples, material.replayed, share=way.replay_share, seed=run.seed))
    steps = run.epochs * -(-len(examples) // run.batch_size)
    options = TrainingOptions(
        steps=steps,
        learning_rate=run.learning_rate,
        seed=run.seed,
        divergence_factor=0,
        known_token_weight=way.known_token_weight,
    )
    points = Points(partial(asked, run, material), run.every)
    with closing(opened(known, plan_of(known, shape_of(folder)), folder)) as session:
        points.evaluate(session, 0)
        close_books(session, after=3)
        trainer = Trainer(session, examples, options, pad_id=material.pad_id, meft_version="benchmark")  # type: ignore[arg-type]
        trainer.evaluation, started = points, cpu()
        trainer.run()
        spent = {"points": points.found, "cpu_seconds": round(cpu() - started, 1)}
        return asdict(run) | spent | books_of(session, trainer)


def _knowledge_run(run: Run) -> KnowledgeRun:
    """The same run as ``benchmarks/knowledge.py`` knows it, which opens sessions."""
    way = WAYS[run.way]
    return KnowledgeRun(
        way.method,
        run.learning_rate,
        run.seed,
        run.facts,
        run.epochs,
        width=run.width,
        top_k=run.top_k,
        rank=run.rank,
        batch_size=run.batch_size,
        seq_len=run.seq_len,
        active_rows_cap=run.active_rows_cap,
        tokens_see=way.tokens_see,
    )


def material_of(run: Run, folder: Path) -> Material:
    """The same for every way and seed."""
    replayed = run.texts * -(-run.facts // 100)
    if run.on == "bits":
        texts = _own_words(folder, run.texts + replayed)
        cut = [each.truncated(run.seq_len) for each in texts[run.texts :]]
        return Material(facts_of(run.facts), texts[: run.texts], cut, (), 0)
    tokenizer = load_tokenizer(folder)
    paragraphs = factbook_prose(run.texts + replayed)
    texts = [each for text in paragraphs for each in tokenize_record(Text(text), tokenizer, raw=True)]
    items = airports(_knowledge_run(run), tokenizer).items
    return Material(
        facts=[example for item in items for example in lines_of(item, tokenizer)],
        prose=[each.truncated(PROSE_TOKENS) for each in texts[: run.texts]],
        replayed=[each.truncated(run.seq_len) for each in texts[run.texts :]],
        capitals=[
            _unended(each, tokenizer) for item in capitals(run.capitals).items for each in lines_of(item, tokenizer)
        ],
        pad_id=pad_token_id(tokenizer),
    )


def _own_words(folder: Path, count: int) -> list[Example]:
    """Texts that the model writes when nothing is asked of it."""
    model = load_causal_lm(folder, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        begun = torch.randint(4, 1024, (count, 1))
        how = {"max_new_tokens": PROSE_TOKENS - 1, "do_sample": True, "top_k": 0, "eos_token_id": None}
        said = model.generate(begun, pad_token_id=0, **how).tolist()
    return [Example(tuple(ids), (IGNORE_INDEX, *ids[1:])) for ids in said]


def _unended(example: Example, tokenizer: Any) -> Example:
    """Without loss on the end of text: a capital that is named may be followed by anything."""
    ends = example.input_ids[-1] == tokenizer.eos_token_id
    return replace(example, labels=(*example.labels[:-1], IGNORE_INDEX)) if ends else example


def asked(run: Run, material: Material, session: Any) -> dict[str, float]:
    """The share of facts that it knows, its loss on prose, and the share of capitals where they are asked for."""
    sparse = isinstance(session, Session)
    batch_loss = partial(session_loss, session, how=_serving(run)) if sparse else session.loss
    prose = mean_loss(batch_loss, material.prose, batch_size=PROSE_BATCH, seq_len=PROSE_TOKENS, pad_id=material.pad_id)
    point = {"exact_match": known_share(session, material.facts, run, material.pad_id), "prose_loss": prose}
    if material.capitals:
        point["capitals"] = known_share(session, material.capitals, run, material.pad_id)
    return point


def _serving(run: Run) -> Serving:
    rows_met = WAYS[run.way].rows_met
    return Serving(None if rows_met is None else rows_met * run.top_k)


def known_share(session: Any, examples: Sequence[Example], run: Run, pad_id: int) -> float:
    """Of examples, those whose every labelled token is the likeliest."""
    longest, known = max(len(each.input_ids) for each in examples), 0
    training = session.model.training
    session.model.eval()
    with serving(session, _serving(run)) if isinstance(session, Session) else nullcontext():
        for first in range(0, len(examples), 2 * run.batch_size):
            batch = collate(examples[first : first + 2 * run.batch_size], seq_len=longest, pad_id=pad_id)
            with session.device.host(), torch.no_grad():  # not in the books
                said = session.model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].argmax(dim=2)
            labels = batch.labels[:, 1:]
            known += int(((said == labels) | (labels == IGNORE_INDEX)).all(dim=1).sum())
    session.model.train(training)
    return known / len(examples)


def _said(point: dict[str, float]) -> str:
    rest = f", capitals {point['capitals']:.1%}" if "capitals" in point else ""
    return f"{point['exact_match']:.1%} of the facts, loss on prose {point['prose_loss']:.3f}{rest}"


# --- the result ------------------------------------------------------------------------------------------------------


def at_level(points: Sequence[dict[str, float]], level: float) -> dict[str, float] | None:
    """What was found, on the line between two points, where ``level`` of the facts was first known; None if never."""
    for before, after in pairwise(points):
        low, high = before["exact_match"], after["exact_match"]
        if low < level <= high:
            share = (level - low) / (high - low)
            return {name: before[name] + share * (after[name] - before[name]) for name in after}
    return None


def table(records: Sequence[dict[str, Any]], *, every_rate: bool = False) -> list[str]:
    """Markdown: a line for each way at its rate, means over seeds where all reached a level, and their range."""
    lines = [
        "| on | facts | way | rate | seeds | device memory | "
        + " | ".join(f"prose, {level:.0%} known" for level in LEVELS)
        + " |",
        "|---|---:|---|---:|---:|---:|" + "---:|" * len(LEVELS),
    ]
    for (on, facts), some in sorted(_grouped(records, "on", "facts").items()):
        begun = [record["points"][0] for record in some]
        before = f"{statistics.fmean(point['prose_loss'] for point in begun):.2f}{_capitals_text(begun)}"
        lines.append(f"| {on} | {facts} | before training | | | | " + " | ".join([before] * len(LEVELS)) + " |")
        for way in WAYS:
            groups = _grouped([record for record in some if record["way"] == way], "learning_rate")
            shown = sorted(groups.values(), key=_rank)
            lines += [_line(of_rate) for of_rate in (shown if every_rate else shown[-1:])]
    return lines


def _line(records: Sequence[dict[str, Any]]) -> str:
    """Of one way at one rate, over seeds."""
    first = records[0]
    cells = [_cell([at_level(record["points"], level) for record in records]) for level in LEVELS]
    seeds = ", ".join(str(record["seed"]) for record in records)
    return (
        f"| {first['on']} | {first['facts']} | {WAYS[first['way']].name} | {first['learning_rate']:g} | {seeds} "
        f"| {first['method_bytes'] / 2**20:.1f} MiB | " + " | ".join(cells) + " |"
    )


def _rank(records: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """What is shown of a way: the rate with the most seeds, of these the one that had forgotten least."""
    found = [at_level(record["points"], LEVELS[-1]) for record in records]
    losses = [math.inf if each is None else each["prose_loss"] for each in found]
    return len(records), -statistics.fmean(losses)


def _grouped(records: Sequence[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return groups


def _cell(found: Sequence[dict[str, float] | None]) -> str:
    reached = [each for each in found if each is not None]
    if len(reached) < len(found):
        return "-"
    losses = [each["prose_loss"] for each in reached]
    spread = f" ({min(losses):.2f} to {max(losses):.2f})" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.2f}{spread}" + _capitals_text(reached)


def _capitals_text(found: Sequence[dict[str, float]]) -> str:
    return f", {statistics.fmean(each['capitals'] for each in found):.0%}" if "capitals" in found[0] else ""


# --- commands --------------------------------------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Compare methods by what they forget at equal facts learnt."""


@main.command("run")
@click.option("--results", type=click.Path(path_type=Path), required=True, help="One JSON line per run.")
@click.option("--on", type=click.Choice(["bits", "airports"]), default="bits")
@click.option("--model", type=click.Path(path_type=Path), help="The model's folder [default: as --on says].")
@click.option("--ways", default=",".join(WAYS))
@click.option("--seeds", default="0,1,2")
@click.option("--learning-rates", help="In the place of each method's grid.")
@click.option("--facts", type=int, help="[default: 128 of bits, 80 airports]")
@click.option("--epochs", type=int, help="[default: 24, 11]")
@click.option("--every", type=int, help="Optimizer steps between two points.  [default: 12, 5]")
@click.option("--max-runs", type=int, help="Stop after so many.")
@click.option("--quick", is_flag=True, help="16 facts, 4 epochs, little prose.")
def run_command(
    results: Path, on: str, model: Path | None, ways: str, seeds: str, learning_rates: str | None,
    max_runs: int | None, quick: bool, **given: Any
) -> None:  # fmt: skip
    """Perform what is missing: each rate of the grids with the first seed, then the best with the others."""
    base = BITS if on == "bits" else AIRPORTS
    if quick:
        base = replace(base, facts=16, epochs=4, every=2, texts=4, capitals=min(base.capitals, 4))
    base = replace(base, **{name: value for name, value in given.items() if value is not None})
    first, *others = listed(seeds, int)
    grid = [
        replace(base, way=way, learning_rate=rate, seed=first)
        for way in listed(ways, str)
        for rate in _rates(on, way, learning_rates)
    ]
    with tempfile.TemporaryDirectory() as made:
        folder = model or (capacity.tiny_model(Path(made) / "glass") if on == "bits" else smollm2_folder(click.echo))
        performed = perform_missing(grid, results, folder, max_runs)
        left = None if max_runs is None else max_runs - performed
        perform_missing(second_stage(grid, read_results(results), others), results, folder, left)


def perform_missing(runs: Sequence[Run], results: Path, folder: Path, max_runs: int | None) -> int:
    """Perform what the results file lacks, append each line when it is done; how many that were."""
    done = {record["key"] for record in read_results(results)}
    missing = [run for run in runs if run.key not in done][:max_runs]
    click.echo(f"{len(runs)} runs, {len(missing)} to do now")
    for run in missing:
        click.echo(f"{run.on}, {run.facts} facts: {WAYS[run.way].name}, rate {run.learning_rate:g}, seed {run.seed}")
        record = perform(run, folder)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": run.key, **record}) + "\n")
        click.echo(f"  {_said(record['points'][-1])}, {record['cpu_seconds']:.0f} CPU s")
    return len(missing)


def second_stage(grid: Sequence[Run], records: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[Run]:
    """The best rate of each way whose grid is done, with other seeds, seed by seed."""
    done, best = {record["key"]: record for record in records}, []
    for way in dict.fromkeys(run.way for run in grid):
        runs = [run for run in grid if run.way == way]
        if all(run.key in done for run in runs):
            best.append(max(runs, key=lambda run: _rank([done[run.key]])))
    return [replace(run, seed=seed) for seed in seeds for run in best]


def _rates(on: str, way: str, given: str | None) -> tuple[float, ...]:
    if way not in WAYS:
        raise click.ClickException(f"--ways {way}: none of {', '.join(WAYS)}")
    return RATES[on][WAYS[way].method] if given is None else listed(given, float)


@main.command("report")
@click.option("--results", type=click.Path(path_type=Path), required=True)
@click.option("--every-rate", is_flag=True, help="Not only each way's best.")
def report_command(results: Path, every_rate: bool) -> None:
    """One table."""
    for line in table(read_results(results), every_rate=every_rate):
        click.echo(line)


if __name__ == "__main__":
    main()
