"""How much of what it was taught an adapter answers, against K and against the number of experts, beside the paper's.

    python benchmarks/knowledge_curves.py run --results curves.jsonl [--max-runs N]
    python benchmarks/knowledge_curves.py figure --results curves.jsonl --figure curves.png

Committed: ``benchmarks/knowledge_curves_results.jsonl`` and ``docs/knowledge_curves.png``.

Runs are those of ``benchmarks/knowledge.py`` with one number changed: K with exact routing, or the number of experts
with 8 probed, as the MEFT paper probes. The paper's curves are of LLaMA-7B on Natural Questions: another model, task
and width, so shapes can be compared and heights cannot.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from knowledge import Run, listed, perform_missing, read_results

from meft.runtime.data.embedded import smollm2_folder

TOP_KS = (8, 16, 32, 64, 128)
EXPERTS = (16, 32, 64, 128)
PROBES = 8
PAPER_TOP_K = {
    "R = 1024": {4: 0.375, 16: 0.373, 32: 0.383, 64: 0.387, 128: 0.397, 256: 0.385, 512: 0.37, 1024: 0.383},
    "R = 4096": {4: 0.387, 16: 0.421, 32: 0.397, 64: 0.411, 128: 0.425, 512: 0.401, 1024: 0.403, 4096: 0.407},
}
"""MEFT paper (arXiv 2406.04984), figure 6: exact match by K, without Key-Experts."""
PAPER_EXPERTS = {
    "R = 3600": {6: 0.287, 15: 0.261, 30: 0.287, 60: 0.215, 120: 0.261, 240: 0.32, 600: 0.313},
    "R = 6400": {8: 0.317, 20: 0.315, 40: 0.319, 80: 0.311, 160: 0.321, 320: 0.327, 800: 0.325},
}
"""The same, figure 7: exact match by the number of experts, K = 64."""


def curves(base: Run) -> list[Run]:
    """Every K with exact routing, then every number of experts at the base's K."""
    by_k = [replace(base, top_k=top_k) for top_k in TOP_KS]
    return by_k + [replace(base, num_experts=experts, num_probes=PROBES) for experts in EXPERTS]


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Two panels, K and experts: ours from the records (dots: each seed; line: their mean), the paper's behind them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    exact, gated = scores_by(records)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, ours, paper, name in (
        (panels[0], exact, PAPER_TOP_K, "rows that each token chooses, K"),
        (panels[1], gated, PAPER_EXPERTS, "experts, 8 probed"),
    ):
        for label, points in paper.items():
            axes.plot(*zip(*sorted(points.items()), strict=True), "--", alpha=0.6, label=f"paper, NQ, {label}")
        if ours:
            each = [(place, score) for place, scores in ours.items() for score in scores]
            axes.plot(*zip(*each, strict=True), "C2.", alpha=0.5)
            means = [(place, statistics.fmean(scores)) for place, scores in ours.items()]
            axes.plot(*zip(*means, strict=True), "C2o-", label=f"SmolLM2-135M, airport facts, {_seeds(ours)}")
        axes.set(xscale="log", xlabel=name, ylim=(0, 1.05))
        axes.legend(fontsize=8)
    panels[0].set_ylabel("exact match")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def scores_by(records: list[dict[str, Any]]) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """Exact match of every seed, by K with exact routing and by the number of experts."""
    exact = [record for record in records if record["num_experts"] == 1]
    gated = [record for record in records if record["num_experts"] > 1]
    return _by(exact, "top_k"), _by(gated, "num_experts")


def _by(records: list[dict[str, Any]], name: str) -> dict[int, list[float]]:
    """Exact match of every seed at each value of ``name``, values ascending."""
    scores: defaultdict[int, list[float]] = defaultdict(list)
    for record in records:
        scores[record[name]].append(record["exact_match"]["exact_match"])
    return dict(sorted(scores.items()))


def _seeds(scores: dict[int, list[float]]) -> str:
    fewest, most = min(map(len, scores.values())), max(map(len, scores.values()))
    several = f"{most} seeds" if most > 1 else "one seed"
    return several if fewest == most else f"{fewest} to {most} seeds"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Exact match against K and the number of experts."""


@main.command()
@click.option("--results", type=click.Path(path_type=Path), required=True, help="One JSON line per run.")
@click.option("--model", type=click.Path(path_type=Path), help="A model's folder [default: SmolLM2-135M].")
@click.option("--facts", type=int, default=500)
@click.option("--epochs", type=int, default=6)
@click.option("--width", type=int, default=1024)
@click.option("--seq-len", type=int, default=11)
@click.option("--forgetting-texts", type=int, default=16)
@click.option("--forgetting-items", type=int, default=120)
@click.option("--learning-rate", type=float, default=8e-3)
@click.option("--seeds", default="0,1,2")
@click.option("--max-runs", type=int, help="Stop after so many.")
def run(
    results: Path, model: Path | None, learning_rate: float, seeds: str, max_runs: int | None, **given: Any
) -> None:
    """Perform what the results file lacks, seed by seed."""
    runs = [run for seed in listed(seeds, int) for run in curves(Run("meft", learning_rate, seed, **given))]
    perform_missing(runs, results, model or smollm2_folder(click.echo), max_runs)


@main.command("figure")
@click.option("--results", type=click.Path(path_type=Path), required=True)
@click.option("--figure", type=click.Path(path_type=Path), required=True)
def figure_command(results: Path, figure: Path) -> None:
    """Draw what there is, and print the means."""
    records = read_results(results)
    for name, some in zip(("K", "experts"), scores_by(records), strict=True):
        for place, scores in some.items():
            each = ", ".join(f"{score:.3f}" for score in scores)
            click.echo(f"{name:8} {place:5}  {statistics.fmean(scores):.3f}  ({each})")
    draw(records, figure)


if __name__ == "__main__":
    main()
