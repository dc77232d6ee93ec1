"""The figure of a comparison: device memory against the score, and against what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meft.runtime.methods.compare import Row

MIB = 1 << 20


def draw(rows: Sequence[Row], path: Path, *, metric: str) -> None:
    """One marker per method at its best rate, its spread over seeds as a bar, its name beside it; methods that were not
    run are in the table."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    trained = [row for row in rows if row.reason is None and row.peak_bytes]
    before = next((row for row in rows if row.method == "none" and row.prose_loss is not None), None)
    figure, (by_score, by_loss) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for index, row in enumerate(trained):
        style: dict[str, Any] = {"color": f"C{index % 10}", "marker": "o", "linestyle": "none", "capsize": 3}
        memory = row.peak_bytes / MIB
        by_score.errorbar(memory, row.score, yerr=row.spread or None, **style)
        if row.prose_loss is not None:
            by_loss.errorbar(memory, row.prose_loss, **style)
    for axes, heights in (
        (by_score, [row.score for row in trained]),
        (by_loss, [row.prose_loss for row in trained]),
    ):
        _name(axes, trained, heights)
        axes.set_xlabel("device memory, allocated peak, MiB")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda size, _: f"{size:g}"))
        axes.xaxis.set_minor_formatter(ticker.FuncFormatter(lambda size, _: f"{size:g}"))
        axes.tick_params(axis="x", which="minor", labelsize="x-small")
        axes.grid(alpha=0.3)
        axes.margins(x=0.25, y=0.15)
    by_score.set_ylabel(metric.replace("_", " "))
    by_score.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    by_loss.set_ylabel("loss on other prose (lower: less forgotten)")
    if before is not None:
        by_loss.axhline(before.prose_loss, color="black", linestyle=":", linewidth=1)
        by_loss.annotate("before training", (0.02, before.prose_loss), xycoords=("axes fraction", "data"), fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _name(axes: Any, rows: Sequence[Row], heights: Sequence[float | None]) -> None:
    """Names beside the markers, on alternating sides, so that neighbours do not lie on one another."""
    placed = sorted(
        (height, row.peak_bytes, row.method) for row, height in zip(rows, heights, strict=True) if height is not None
    )
    for place, (height, memory, name) in enumerate(placed):
        right = place % 2 == 0
        axes.annotate(
            name,
            (memory / MIB, height),
            xytext=(7 if right else -7, 3),
            textcoords="offset points",
            ha="left" if right else "right",
            fontsize=8,
        )
