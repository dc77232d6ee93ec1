"""The figure of a comparison: device memory against the score, and against what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meft.runtime.methods.compare import Row

MIB = 1 << 20
NAME_GAP = 0.045
"""Between two names, of a panel's height: a line of them."""


def draw(rows: Sequence[Row], path: Path, *, metric: str) -> None:
    """One marker per method at its best rate, its spread over seeds as a bar, its name beside it; methods that were not
    run are in the table."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    trained = [row for row in rows if row.reason is None and row.peak_bytes]
    before = next((row for row in rows if row.method == "none" and row.prose_loss is not None), None)
    figure, (by_score, by_loss) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    for axes, heights, spreads in (
        (by_score, [row.score for row in trained], [row.spread or None for row in trained]),
        (by_loss, [row.prose_loss for row in trained], [None] * len(trained)),
    ):
        for index, (row, height, spread) in enumerate(zip(trained, heights, spreads, strict=True)):
            if height is not None:
                style: dict[str, Any] = {"color": f"C{index % 10}", "marker": "o", "linestyle": "none", "capsize": 3}
                axes.errorbar(row.peak_bytes / MIB, height, yerr=spread, **style)
        axes.set_xlabel("device memory, allocated peak, MiB")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda size, _: f"{size:,.0f}"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(alpha=0.3)
        axes.margins(x=0.08, y=0.06)
        _name(axes, trained, heights)
    by_score.set_ylabel({"em": "exact match"}.get(metric, metric.replace("_", " ")))
    by_score.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    by_loss.set_ylabel("loss on other prose (lower: less forgotten)")
    if before is not None:
        by_loss.axhline(before.prose_loss, color="black", linestyle=":", linewidth=1)
        by_loss.annotate("before training", (0.02, before.prose_loss), xycoords=("axes fraction", "data"), fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _name(axes: Any, rows: Sequence[Row], heights: Sequence[float | None]) -> None:
    """Names in a column beside the panel, from top to bottom as their markers are, each with a line to its own."""
    placed = [(height, index) for index, height in enumerate(heights) if height is not None]
    low, high = axes.get_ylim()
    wanted = sorted(((height - low) / (high - low), index) for height, index in placed)
    for place, index in zip(spread_out([each for each, _ in wanted]), (index for _, index in wanted), strict=True):
        axes.annotate(
            rows[index].method,
            (rows[index].peak_bytes / MIB, heights[index]),
            xytext=(1.06, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=f"C{index % 10}",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": f"C{index % 10}", "alpha": 0.6},
        )


def spread_out(wanted: Sequence[float], *, gap: float = NAME_GAP) -> list[float]:
    """Places from 0 to 1, ascending, at least ``gap`` apart (or as far as there is room), near those that are wanted,
    which ascend too."""
    gap = min(gap, 1.0 / max(len(wanted) - 1, 1))
    places: list[float] = []
    for each in wanted:
        places.append(max(each, places[-1] + gap) if places else max(each, 0.0))
    for back in range(len(places)):  # what was pushed beyond the top goes down again
        at = len(places) - 1 - back
        places[at] = min(places[at], 1.0 - back * gap)
    return places
