"""Ways to find a token's rows: exact, score-gated (Key-Experts), the MEFT paper's centroids, a switch, and StableMoE
with its two stages; on the tests' model.

    python benchmarks/routers.py run --results benchmarks/routers_results.jsonl [--seeds 0,1,2] [--rates 8e-3,1.6e-2]
    python benchmarks/routers.py report --results benchmarks/routers_results.jsonl

Random facts are learnt by heart: four random tokens ask for two others. Every way trains at each rate with the first
seed, then at its best (by exact match, of equal ones by the last epoch's loss) with the others. Recall is the share of
each token's exact best K rows that are among the active ones, for the last batch of every epoch; host time is the CPU
time of choosing rows, per micro-batch and layer, by the readable code; a dead expert has no row that was ever active.
The device's memory is what the router holds there for good, beside the host's means of centroids. A run that was
stopped goes on.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from knowledge import AMPLE_BYTES, Run, listed, plan_of, read_results, shape_of

from meft.planner.records.plan import Decision
from meft.planner.records.routing import StableOptions, SwitchOptions
from meft.runtime.data.examples import IGNORE_INDEX, Example, collate
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.host.router import Router, Selection
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import Session, open_session
from meft.runtime.training.training import Trainer, TrainingOptions
from meft.runtime.use.inference import serving

WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "score-gated": {"routing": "key-experts", "num_experts": 16, "num_probes": 4},
    "centroid": {"routing": "centroid", "num_experts": 16, "num_probes": 4},
    "switch": {"routing": "switch", "num_experts": 16, "num_probes": 1, "switch": SwitchOptions().model_dump()},
    "stable": {"routing": "stable", "num_experts": 16, "num_probes": 1, "stable": StableOptions().model_dump()},
}
ASKED, ANSWERED, FACTS, EPOCHS, BATCH = 4, 2, 256, 8, 16
WIDTH, TOP_K, EXPERTS = 512, 16, 16
ROUTER_CATEGORIES = ("router_weights", "router_states", "row_indices")


@dataclass
class Watched:
    """A router that is timed, and asked what of the exact choice it found."""

    inner: Router
    seconds: list[float] = field(default_factory=list)
    recalls: list[float] = field(default_factory=list)
    asked: bool = False

    def select(self, layer: int, keys: torch.Tensor, queries: torch.Tensor, probes: torch.Tensor | None) -> Selection:
        """The inner router's choice."""
        started = time.thread_time()
        found = self.inner.select(layer, keys, queries, probes)
        self.seconds.append(time.thread_time() - started)
        if self.asked:
            exact = (queries.to(keys.dtype) @ keys.T).topk(TOP_K, dim=1).indices
            self.recalls.append(float(torch.isin(exact, found.rows).float().mean()))
        return found


def facts_of(seed: int, vocab_size: int) -> list[Example]:
    """Random tokens that ask, and those that answer, which alone carry loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocab_size, (FACTS, ASKED + ANSWERED), generator=generator).tolist()
    return [Example(tuple(each), (*[IGNORE_INDEX] * ASKED, *each[ASKED:])) for each in ids]


def perform(way: str, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train one way and say how it went."""
    torch.manual_seed(seed)
    shape = shape_of(folder)
    sizes = {"facts": FACTS, "epochs": EPOCHS, "width": WIDTH, "top_k": TOP_K, "batch_size": BATCH, "seq_len": 6}
    plan = plan_of(Run("meft", rate, seed, **sizes), shape)
    decision = Decision.model_validate(plan.decision.model_dump() | WAYS[way])
    plan = plan.model_copy(update={"decision": decision})
    device = EmulatedDevice(AMPLE_BYTES)
    model = load_frozen_model(plan, folder)
    with closing(open_session(plan, model, device, seed=seed, around=Watched, compiled=False)) as session:
        router = session.exchange.router
        assert isinstance(router, Watched)
        examples = facts_of(seed, shape.vocab_size)
        steps = EPOCHS * FACTS // BATCH

        def watch(progress: Any) -> None:
            router.asked = (progress.step + 1) % (FACTS // BATCH) == 0  # of the step that follows

        options = TrainingOptions(steps=steps, learning_rate=rate, seed=seed, divergence_factor=0.0)
        trainer = Trainer(session, examples, options, pad_id=0, meft_version="benchmark", on_step=watch)
        trainer.run()
        router.asked = False
        updates = [tables.step_counts.view(EXPERTS, -1).sum(dim=1) for tables in session.store.layers]
        live = device.books._bytes_by_category
        return {
            "way": way,
            "rate": rate,
            "seed": seed,
            "exact_match": exact_match(session, examples),
            "final_loss": statistics.fmean(trainer.history.losses[-FACTS // BATCH :]),
            "recall": statistics.fmean(router.recalls),
            "dead_experts": sum(int((each == 0).sum()) for each in updates),
            "busiest_share": max(float(each.max() / each.sum()) for each in updates),
            "active_rows": statistics.fmean(session.store.use.active_rows()),
            "host_ms": 1e3 * statistics.median(router.seconds),
            "peak_allocated_bytes": trainer.measured.peaks.allocated_bytes,
            "router_bytes": sum(live.get(name, 0) for name in ROUTER_CATEGORIES),
        }


def exact_match(session: Session, examples: list[Example]) -> float:
    """Share of facts all of whose answer's tokens are the likeliest, the adapter as at inference."""
    right = 0
    for first in range(0, len(examples), BATCH):
        batch = collate(examples[first : first + BATCH], seq_len=ASKED + ANSWERED, pad_id=0)
        with serving(session), session.device.host(), torch.no_grad():
            likeliest = session.model(input_ids=batch.input_ids, use_cache=False).logits.argmax(dim=-1)
        told = batch.input_ids[:, ASKED:] == likeliest[:, ASKED - 1 : -1]
        right += int(told.all(dim=1).sum())
    return right / len(examples)


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Compare ways to find rows."""


@main.command("run")
@click.option("--results", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", default="0,1,2")
@click.option("--rates", default="4e-3,8e-3,1.6e-2,3.2e-2,6.4e-2")
@click.option("--ways", default="", help="Some of them, with commas between.  [default: all]")
@click.option("--model", type=click.Path(path_type=Path), help="[default: the tests' tiny model]")
def run_command(results: Path, seeds: str, rates: str, ways: str, model: Path | None) -> None:
    """Perform what the file lacks, a line each."""
    first, *others = listed(seeds, int)
    with tempfile.TemporaryDirectory() as made:
        folder = model or _tiny_model(Path(made) / "glass")
        for way in listed(ways, str) if ways else WAYS:
            for rate in listed(rates, float):
                _perform_once(results, way, rate, first, folder)
            best = _best([each for each in read_results(results) if each["way"] == way and each["seed"] == first])
            for seed in others:
                _perform_once(results, way, best["rate"], seed, folder)


def _perform_once(results: Path, way: str, rate: float, seed: int, folder: Path) -> None:
    """Perform one and write it down, unless the file has it."""
    if any((each["way"], each["rate"], each["seed"]) == (way, rate, seed) for each in read_results(results)):
        return
    record = perform(way, rate, seed, folder)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    click.echo(f"{way} rate {rate:g} seed {seed}: {record['exact_match']:.3f}, recall {record['recall']:.2f}")


def _best(records: list[dict[str, Any]]) -> dict[str, Any]:
    return max(records, key=lambda each: (each["exact_match"], -each["final_loss"]))


@main.command("report")
@click.option("--results", type=click.Path(path_type=Path), required=True)
def report_command(results: Path) -> None:
    """The table of docs/learning.md."""
    records = read_results(results)
    first = min(each["seed"] for each in records)
    names = ("rate", "seeds", "exact match", "recall", "dead experts", "busiest", "active rows", "host time", "router")
    click.echo(f"| | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for way in WAYS:
        tried = [each for each in records if each["way"] == way and each["seed"] == first]
        if not tried:
            continue
        rate = _best(tried)["rate"]
        best = [each for each in records if (each["way"], each["rate"]) == (way, rate)]
        matches = [each["exact_match"] for each in best]
        spread = f" ± {100 * statistics.stdev(matches):.1f}" if len(matches) > 1 else ""
        cells = (
            way,
            f"{best[0]['rate']:g}",
            f"{len(best)}",
            f"{100 * statistics.fmean(matches):.1f} %{spread}",
            f"{_mean(best, 'recall'):.2f}",
            f"{_mean(best, 'dead_experts'):.1f}",
            f"{100 * _mean(best, 'busiest_share'):.0f} %",
            f"{_mean(best, 'active_rows'):.0f}",
            f"{_mean(best, 'host_ms'):.2f} ms",
            f"{_mean(best, 'router_bytes') / 1024:.0f} KiB",
        )
        click.echo(f"| {' | '.join(cells)} |")
    rates = sorted({each["rate"] for each in records})
    click.echo(f"\n| seed {first} | {' | '.join(f'{rate:g}' for rate in rates)} |\n|---|{'---:|' * len(rates)}")
    for way in WAYS:
        found = {each["rate"]: each for each in records if each["way"] == way and each["seed"] == first}
        cells = tuple(f"{100 * found[rate]['exact_match']:.1f} %" if rate in found else "" for rate in rates)
        click.echo(f"| {way} | {' | '.join(cells)} |")


def _mean(records: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(float(record[name]) for record in records)


def _tiny_model(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
    from glass import save_glass

    return save_glass(folder)


if __name__ == "__main__":
    main()
