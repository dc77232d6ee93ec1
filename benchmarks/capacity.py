"""How many bits does a method store in a given device memory? Random facts into a tiny LLaMA, in the real runtime.

    python benchmarks/capacity.py run --results capacity.jsonl [--part a|b|long] [--max-runs N] [--quick]
    python benchmarks/capacity.py report --results capacity.jsonl [--figure capacity.png]

A fact is two tokens that name it and three of 256 to remember: 24 bits that nothing but training can bring in. The
model is the tests' (852,608 parameters, frozen; ``tests/helpers/glass.py``). What a method stores is the sum over facts
of 24 bits less the loss in bits, among the 256 values; beside it the same with each fact's at least 0 (``clamped``),
and over the whole vocabulary (``open``). ``exact match`` asks for all three values, greedily. MEFT is asked as it is
served and, beside it, in training's own forward.

Methods: ``meft`` (by its cap, the rows that its two device buffers hold), ``lora`` (by rank), ``lora-streamed`` (the
same with weights and optimizer on the host, whole layers travelling; by rank) and ``dense`` (a parallel adapter, by
rows). *Device bytes* are those of the numbers that adapter and optimizer keep there: 16 for each that is trained on the
device, the two buffers otherwise; ``method_bytes`` what the books counted, blocks of 512 bytes and AdamW's step counts
included. Each method trains at every rate of its grid with seed 0, then at its best one with the other seeds.

``run`` is made to be run in pieces: each run is one JSON line, and what the file holds is left out. Parts: ``b`` is
1,024 facts, in order of what the claim needs; ``a`` 512 facts with more sizes; ``long`` what takes long.
``--quick`` takes seconds. Committed: ``benchmarks/capacity_results.jsonl``, drawn as ``docs/capacity.png``.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from knowledge import AMPLE_BYTES, books_of, close_books, listed, plan_of, read_results, shape_of, trainable_of
from knowledge import Run as KnowledgeRun

from meft.planner.models.architecture import ModelShape
from meft.planner.models.linears import linear_layers
from meft.planner.records.plan import Plan
from meft.runtime.data.examples import IGNORE_INDEX, Example, collate
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.session.baselines import BaselineSession, open_baseline
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import Session, open_session
from meft.runtime.session.streamed import streamed
from meft.runtime.training.training import Progress, Trainer, TrainingOptions
from meft.runtime.use.inference import serving

NAMES = {
    "meft": "MEFT, rows travel",
    "lora-streamed": "LoRA, whole layers travel",
    "lora": "LoRA on the device",
    "dense": "dense adapter on the device",
}
MARKERS: dict[str, dict[str, Any]] = {
    "meft": {"fmt": "o-"},
    "lora-streamed": {"fmt": "s-", "markersize": 11, "fillstyle": "none"},
    "lora": {"fmt": "^-"},
    "dense": {"fmt": "v-"},
}
"""So drawn that points in one place are seen."""
RATES: dict[str, tuple[float, ...]] = {
    "meft": (5e-3, 1e-2, 2e-2),
    "lora": (2.5e-3, 5e-3, 1e-2, 2e-2, 1.25e-3),
    "lora-streamed": (2.5e-3, 5e-3, 1e-2, 2e-2, 1.25e-3),
    "dense": (1e-2, 2e-2, 4e-2),
}
SIZES = {
    "a": {"lora": (1, 2, 4, 8), "lora-streamed": (8,), "dense": (9, 36, 256), "meft": (36, 72)},
    "b": {"meft": (72,), "lora": (1, 2, 8), "lora-streamed": (8,), "dense": (9,)},
}
FACTS = {"a": 512, "b": 1024}
VALUES, FIRST_VALUE, FIRST_KEY = 256, 256, 512
VALUES_PER_FACT, SEQ_LEN = 3, 5
BITS_PER_FACT = VALUES_PER_FACT * math.log2(VALUES)
BYTES_PER_TRAINED = 16
"""fp32: weight, gradient and two moments."""


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's result. ``size`` is meft's cap, LoRA's rank, the dense adapter's rows."""

    method: str
    size: int
    learning_rate: float
    seed: int
    facts: int
    epochs: int = 50
    width: int = 256
    top_k: int = 8
    batch_size: int = 16

    @property
    def key(self) -> str:
        """Identifies the run in a results file."""
        return json.dumps(asdict(self), sort_keys=True)

    def text(self) -> str:
        """For people."""
        return f"{self.facts:,} facts, {self.method} {self.size}, rate {self.learning_rate:g}, seed {self.seed}"


# --- one run ---------------------------------------------------------------------------------------------------------


def facts_of(count: int) -> list[Example]:
    """The same facts for every method and seed."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randperm(VALUES * VALUES, generator=generator)[:count].unsqueeze(1)
    values = torch.randint(FIRST_VALUE, FIRST_VALUE + VALUES, (count, VALUES_PER_FACT), generator=generator)
    lines = torch.cat([FIRST_KEY + keys // VALUES, FIRST_KEY + keys % VALUES, values], dim=1).tolist()
    return [Example(tuple(line), (IGNORE_INDEX, IGNORE_INDEX, *line[2:])) for line in lines]


def perform(run: Run, folder: Path) -> dict[str, Any]:
    """Train and measure; returns the run and what it gave."""
    torch.manual_seed(run.seed)
    shape, facts = shape_of(folder), facts_of(run.facts)
    plan = _plan(run, shape)
    steps = run.epochs * -(-run.facts // run.batch_size)
    options = TrainingOptions(steps=steps, learning_rate=run.learning_rate, seed=run.seed, divergence_factor=0)
    with closing(_open(run, plan, folder)) as session:
        close_books(session, after=3)
        trainer: Any = Trainer(session, facts, options, pad_id=0, meft_version="benchmark", on_step=_teller(run, steps))
        started, cpu_started = time.monotonic(), time.process_time()
        trainer.run()
        seconds = time.monotonic() - started, time.process_time() - cpu_started
        return asdict(run) | {
            **_remembered(session, facts, run.batch_size),
            "bits_offered": run.facts * BITS_PER_FACT,
            "device_bytes": device_bytes(run, shape, trainable_of(session)),
            "training_seconds": round(seconds[0], 1),
            "training_cpu_seconds": round(seconds[1], 1),
            "last_loss": statistics.fmean(trainer.history.losses[-run.facts // run.batch_size :]),
            **books_of(session, trainer),
        }


def _plan(run: Run, shape: ModelShape) -> Plan:
    meft = run.method == "meft"
    width = run.size if run.method == "dense" else run.width
    return plan_of(
        KnowledgeRun(
            "meft",
            run.learning_rate,
            run.seed,
            run.facts,
            run.epochs,
            width=width,
            top_k=min(run.top_k, width),
            batch_size=run.batch_size,
            seq_len=SEQ_LEN,
            active_rows_cap=run.size if meft else None,
        ),
        shape,
    )


def _open(run: Run, plan: Plan, folder: Path) -> Session | BaselineSession:
    model, device = load_frozen_model(plan, folder), EmulatedDevice(AMPLE_BYTES)
    if run.method == "meft":
        return open_session(plan, model, device, seed=run.seed)
    if run.method == "dense":
        return open_baseline("parallel-adapter", plan, model, device, seed=run.seed)
    lora = open_baseline("lora", plan, model, device, seed=run.seed, rank=run.size)
    return streamed(lora) if run.method == "lora-streamed" else lora


def device_bytes(run: Run, shape: ModelShape, trainable: int) -> int:
    """What the numbers of adapter and optimizer take on the device."""
    if run.method == "meft":
        return 2 * run.size * 2 * shape.hidden_size * 4
    if run.method == "lora-streamed":
        return 2 * 4 * run.size * sum(layer.inputs + layer.outputs for layer in linear_layers(shape))
    return BYTES_PER_TRAINED * trainable


def _teller(run: Run, steps: int) -> Any:
    def tell(progress: Progress) -> None:
        if progress.step % max(1, steps // 5) == 0:
            click.echo(f"  {run.text()}: step {progress.step:,} of {steps:,}, loss {progress.loss:.3f}", err=True)

    return tell


def _remembered(session: Any, facts: list[Example], batch_size: int) -> dict[str, Any]:
    """As it is served; for meft in training's own forward too."""
    if not isinstance(session, Session):
        session.model.eval()
        return _measured(session, facts, batch_size)
    trained = _measured(session, facts, batch_size)
    with serving(session):
        return _measured(session, facts, batch_size) | {"as_trained": trained}


def _measured(session: Any, facts: list[Example], batch_size: int) -> dict[str, float]:
    """Bits stored and the share of facts known whole."""
    closed = clamped = vocabulary = known = 0.0
    for first in range(0, len(facts), batch_size):
        ids = collate(facts[first : first + batch_size], seq_len=SEQ_LEN, pad_id=0).input_ids
        with session.device.scope(), torch.no_grad():
            logits = session.model(input_ids=ids, use_cache=False).logits[:, 1:4].double()
        values = ids[:, 2:].unsqueeze(2)
        among = logits[:, :, FIRST_VALUE : FIRST_VALUE + VALUES].log_softmax(2).gather(2, values - FIRST_VALUE)
        bits = BITS_PER_FACT + among.sum(dim=(1, 2)) / math.log(2)
        closed += float(bits.sum())
        clamped += float(bits.clamp(min=0).sum())
        of_all = logits.log_softmax(2).gather(2, values).sum(dim=(1, 2)) / math.log(2)
        vocabulary += float((BITS_PER_FACT + of_all).sum())
        known += int((logits.argmax(2) == values.squeeze(2)).all(1).sum())
    return {
        "bits_stored": closed,
        "bits_stored_clamped": clamped,
        "bits_stored_open": vocabulary,
        "exact_match": known / len(facts),
    }


# --- many runs -------------------------------------------------------------------------------------------------------


def first_stage(part: str) -> Iterator[Run]:
    """Every size at every rate of its grid, with seed 0; first the middle rates of all, then the others."""
    if part == "long":
        yield from (Run("meft", 72, rate, 0, 2048) for rate in RATES["meft"])
        yield from (Run("lora", 1, rate, 0, 2048) for rate in RATES["lora"])
        for rate in RATES["lora"]:
            yield Run("lora", 1, rate, 0, 1024, epochs=400)
        return
    sized = [(method, size) for method, sizes in SIZES[part].items() for size in sizes]
    for place in (1, 0, 2, 3, 4):
        for method, size in sized:
            if place < len(RATES[method]):
                yield Run(method, size, RATES[method][place], 0, FACTS[part])


def second_stage(first: list[Run], records: list[dict[str, Any]], seeds: tuple[int, ...]) -> list[Run]:
    """The best rate of each size whose grid is done, with other seeds."""
    done = {record["key"]: record for record in records}
    groups: defaultdict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in first:
        groups[run.method, run.size, run.facts, run.epochs].append(run)
    whole = [runs for runs in groups.values() if all(run.key in done for run in runs)]
    best = [max(runs, key=lambda run: float(done[run.key]["bits_stored_clamped"])) for runs in whole]
    return [replace(run, seed=seed) for seed in seeds for run in best]


def perform_missing(runs: list[Run], results: Path, folder: Path, max_runs: int | None) -> int:
    """Perform what the results file lacks, append each line when it is done; how many that were."""
    done = {record["key"] for record in read_results(results)}
    missing = [run for run in runs if run.key not in done][:max_runs]
    click.echo(f"{len(runs)} runs, {len(missing)} to do now")
    for run in missing:
        record = perform(run, folder)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": run.key, **record}) + "\n")
        click.echo(f"{run.text()}: {_said(record)}")
    return len(missing)


def _said(record: dict[str, Any]) -> str:
    stored, offered = record["bits_stored"] / 1e3, record["bits_offered"] / 1e3
    return (
        f"{stored:.1f} of {offered:.1f} thousand bits, exact match {record['exact_match']:.1%}, device "
        f"{record['device_bytes'] / 1024:,.0f} KiB, {record['training_cpu_seconds']:.0f} CPU s"
    )


# --- the result ------------------------------------------------------------------------------------------------------


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each method, size, number of facts and length its best rate by the mean, of those with the most seeds."""
    groups: defaultdict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        place = record["facts"], record["epochs"], record["method"], record["size"]
        groups[(*place, record["learning_rate"])].append(record)
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for (*place, _), some in groups.items():
        row = _mean_of(some)
        held = best.get(tuple(place))
        if held is None or _rank(row) > _rank(held):
            best[tuple(place)] = row
    order = list(NAMES)

    def place_of(row: dict[str, Any]) -> tuple[int, ...]:
        return row["facts"], row["epochs"], row["device_bytes"], order.index(row["method"])

    return sorted(best.values(), key=place_of)


def _rank(row: dict[str, Any]) -> tuple[int, float]:
    return len(row["seeds"]), row["bits_stored_clamped"]


def _mean_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("bits_stored", "bits_stored_clamped", "bits_stored_open", "exact_match")
    means = {name: statistics.fmean(record[name] for record in records) for name in names}
    spread = [record["bits_stored"] for record in records]
    return records[0] | means | {"seeds": sorted(each["seed"] for each in records), "range": (min(spread), max(spread))}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a line per row, bits in thousands."""
    lines = [
        "| facts | method | device bytes | trained numbers | rate | seeds | bits stored (thousand) | clamped | open | "
        "exact match |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        epochs = "" if row["epochs"] == Run("", 0, 0.0, 0, 0).epochs else f", {row['epochs']} epochs"
        unit = {"meft": "cap", "dense": "rows"}.get(row["method"], "rank")
        low, high = row["range"]
        spread = f" ({low / 1e3:.1f} to {high / 1e3:.1f})" if len(row["seeds"]) > 1 else ""
        lines.append(
            f"| {row['facts']:,} | {NAMES[row['method']]}, {unit} {row['size']}{epochs} "
            f"| {row['device_bytes'] / 1024:,.0f} KiB | {row['trainable_parameters']:,} | {row['learning_rate']:g} "
            f"| {len(row['seeds'])} | {row['bits_stored'] / 1e3:.1f}{spread} of {row['bits_offered'] / 1e3:.1f} "
            f"| {row['bits_stored_clamped'] / 1e3:.1f} | {row['bits_stored_open'] / 1e3:.1f} "
            f"| {row['exact_match']:.1%} |"
        )
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bits stored against device bytes, a panel for each number of facts; dots are means, bars from least to most."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    counts = sorted({row["facts"] for row in rows})
    size = (1.5 + 4.5 * len(counts), 3.8)
    figure, panels = plt.subplots(1, len(counts), figsize=size, squeeze=False, layout="constrained")
    for axes, count in zip(panels[0], counts, strict=True):
        shown = [row for row in rows if row["facts"] == count and row["epochs"] == min(each["epochs"] for each in rows)]
        for place, (method, name) in enumerate(NAMES.items()):
            some = [row for row in shown if row["method"] == method]
            if not some:
                continue
            stored = [row["bits_stored"] / 1e3 for row in some]
            around = [[s - row["range"][0] / 1e3 for s, row in zip(stored, some, strict=True)],
                      [row["range"][1] / 1e3 - s for s, row in zip(stored, some, strict=True)]]  # fmt: skip
            sizes = [row["device_bytes"] / 1024 for row in some]
            look = {"color": f"C{place}", "label": name, "capsize": 3, "linewidth": 1} | MARKERS[method]
            axes.errorbar(sizes, stored, yerr=around, **look)
        axes.axhline(count * BITS_PER_FACT / 1e3, color="black", linestyle=":", label="bits offered")
        axes.set(title=f"{count:,} facts of 24 bits", xlabel="device bytes of adapter and optimizer, KiB")
        axes.set_xscale("log", base=2)
        sizes = [row["device_bytes"] / 1024 for row in shown]
        axes.set_xlim(min(sizes) / 2, max(sizes) * 2)
        axes.set_ylim(bottom=min(0.0, *(row["range"][0] / 1e3 for row in shown)))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda size, _: f"{size:g}"))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("thousand bits stored")
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels[0]), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- commands --------------------------------------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Compare methods by the bits that they store."""


@main.command("run")
@click.option("--results", type=click.Path(path_type=Path), required=True, help="One JSON line per run.")
@click.option("--model", type=click.Path(path_type=Path), help="The tiny model's folder [default: made anew].")
@click.option("--part", type=click.Choice(["a", "b", "long"]), default="b")
@click.option("--methods", default=",".join(NAMES))
@click.option("--sizes", help="Only these sizes.")
@click.option("--seeds", default="0,1")
@click.option("--max-runs", type=int, help="Stop after so many.")
@click.option("--quick", is_flag=True, help="32 facts, 10 epochs, one seed, one size and rate of each method.")
def run_command(
    results: Path, model: Path | None, part: str, methods: str, sizes: str | None, seeds: str, max_runs: int | None,
    quick: bool,
) -> None:  # fmt: skip
    """Perform what is missing."""
    wanted, only = listed(methods, str), None if sizes is None else listed(sizes, int)
    first = [run for run in first_stage(part) if run.method in wanted and (only is None or run.size in only)]
    others = listed(seeds, int)[1:]
    if quick:
        small = [Run("meft", 72, 1e-2, 0, 32, 10), Run("lora", 1, 1e-2, 0, 32, 10), Run("dense", 9, 1e-2, 0, 32, 10)]
        first, others = [*small, Run("lora-streamed", 8, 5e-3, 0, 32, 10)], ()
    with tempfile.TemporaryDirectory() as made:
        folder = model or tiny_model(Path(made) / "glass")
        performed = perform_missing(first, results, folder, max_runs)
        left = None if max_runs is None else max_runs - performed
        perform_missing(second_stage(first, read_results(results), others), results, folder, left)


def tiny_model(folder: Path) -> Path:
    """Write the tests' model; returns its folder."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    from glass import save_glass

    return save_glass(folder)


@main.command("report")
@click.option("--results", type=click.Path(path_type=Path), required=True)
@click.option("--figure", type=click.Path(path_type=Path))
def report_command(results: Path, figure: Path | None) -> None:
    """One table and one figure."""
    rows = summarise(read_results(results))
    for line in table(rows):
        click.echo(line)
    if figure is not None:
        draw(rows, figure)


if __name__ == "__main__":
    main()
