"""One picture of a plan: device memory against the budget, the trade-offs, and what the lanes do during a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meft.planner.base.errors import UsageError
from meft.planner.base.units import GIB, MIB, format_bytes, format_seconds
from meft.planner.records.plan import Lane, ParetoPoint, Plan
from meft.planner.render.details import grouped_bytes
from meft.planner.render.tables import count
from meft.planner.terms.ledger import STEP_PHASES
from meft.planner.timing.chrome import Event, lanes_of

if TYPE_CHECKING:  # matplotlib is loaded only when there is something to draw
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
LABEL_ROOM = 0.12
"""Share of an axis that a label of a point takes."""
_COLORS = ("#4c6a92", "#d98032", "#7a5195", "#59a14f", "#9c9c9c", "#c44e52", "#e3c35d", "#bdbdbd")
_LANE_COLORS: dict[Lane, str] = {"gpu": "#4c6a92", "h2d": "#d98032", "d2h": "#59a14f", "cpu": "#7a5195"}
_LANE_COLORS["network"] = "#c44e52"
_LANE_TITLES: dict[Lane, str] = {"gpu": "GPU", "h2d": "host to device", "d2h": "device to host", "cpu": "CPU"}
_LANE_TITLES["network"] = "network"


def check_format(path: Path) -> None:
    """Refuse a picture file that is none of :data:`FORMATS`."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path}: the name must end in one of {', '.join(FORMATS)}")


def plot_plan(plan: Plan, events: Sequence[Event], path: Path) -> None:
    """Draw ``plan`` into ``path``; ``events`` are the tasks of its simulated step."""
    check_format(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplot_mosaic([["memory", "pareto"], ["lanes", "lanes"]], height_ratios=(3, 2), width_ratios=(5, 4))
    _draw_memory(axes["memory"], plan)
    _draw_pareto(axes["pareto"], plan)
    _draw_lanes(axes["lanes"], plan, events)
    request, decision = plan.request, plan.decision
    figure.suptitle(
        f"{request.model.name}, {request.batch_size} x {request.seq_len} tokens on {request.gpu}: "
        f"width {decision.adapter_width:,}, K {decision.top_k}, prefetch depth {decision.prefetch_depth}",
        fontsize=13,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UsageError(f"--plot {path}: cannot be written ({error.strerror})") from None


def _draw_memory(axes: Axes, plan: Plan) -> None:
    """The ledger's groups stacked for each phase, under the allocator's budget."""
    memory = plan.prediction.device_memory
    unit, name = (GIB, "GiB") if memory.allocator_budget_bytes >= GIB else (MIB, "MiB")
    below = dict.fromkeys(STEP_PHASES, 0.0)
    labels = [phase.replace("_", " ") for phase in STEP_PHASES]
    for color, (group, by_phase) in zip(_COLORS, grouped_bytes(memory.entries).items(), strict=False):
        heights = [by_phase[phase] / unit for phase in STEP_PHASES]
        axes.bar(labels, heights, bottom=list(below.values()), color=color, width=0.62, label=group)
        below = {phase: below[phase] + height for phase, height in zip(STEP_PHASES, heights, strict=True)}
    budget = memory.allocator_budget_bytes / unit
    reserved = memory.peak_reserved_bytes / unit
    axes.axhline(budget, color="#c44e52", linewidth=1.6)
    axes.text(3.45, budget, f"budget {budget:.2f}", color="#c44e52", ha="right", va="bottom")
    axes.axhline(reserved, color="#555555", linewidth=1.2, linestyle="--")
    axes.text(3.45, reserved * 0.995, f"reserved peak {reserved:.2f}", color="#555555", ha="right", va="top")
    axes.set(title="Device memory by phase", ylabel=name, ylim=(0, max(budget, reserved) * 1.1))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, reverse=True)
    _quiet(axes)


def _draw_pareto(axes: Axes, plan: Plan) -> None:
    """Capacity against step time of what no other choice beats, width and K of each, with the chosen one marked."""
    points = plan.search.pareto
    milliseconds = [point.step_seconds * 1e3 for point in points]
    parameters = [point.trainable_parameters / 1e6 for point in points]
    device = [point.peak_reserved_bytes / GIB for point in points]
    if points:
        drawn = axes.scatter(milliseconds, parameters, c=device, cmap="viridis", s=32, label="what nothing else beats")
        axes.figure.colorbar(drawn, ax=axes, label="device memory, GiB reserved")
    prediction = plan.prediction
    step, trainable = prediction.timing.step_seconds * 1e3, prediction.trainable_parameters / 1e6
    axes.scatter(
        [step], [trainable], marker="*", s=230, color="#c44e52", edgecolor="white", label="this plan", zorder=3
    )
    for point in labelled_points(points):
        place = point.step_seconds * 1e3, point.trainable_parameters / 1e6
        text = f"R {point.decision.adapter_width:,}\nK {point.decision.top_k}"
        axes.annotate(text, place, xytext=(0, -9), textcoords="offset points", ha="center", va="top", fontsize=8)
    axes.set(
        title=f"Trade-offs: {count(prediction.trainable_parameters)} trainable "
        f"({prediction.trainable_fraction:.1%}), {format_bytes(prediction.host_memory.total_bytes)} host memory",
        xlabel="step, ms",
        ylabel="trainable parameters, millions",
    )
    axes.margins(x=0.12, y=0.1)
    axes.set_ylim(bottom=-0.12 * max([trainable, *parameters]))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8, frameon=False)
    _quiet(axes)


def labelled_points(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """Those that get a label: of points with the same width and K the fastest, of points in nearly one place one."""
    if not points:
        return []
    slowest, largest = max(point.step_seconds for point in points), max(point.trainable_parameters for point in points)
    quickest = min(point.step_seconds for point in points)
    chosen: list[ParetoPoint] = []
    for point in sorted(points, key=lambda point: (-point.trainable_parameters / largest // 0.05, point.step_seconds)):
        crowded = any(
            abs(point.step_seconds - other.step_seconds) < LABEL_ROOM * (slowest - quickest)
            and abs(point.trainable_parameters - other.trainable_parameters) < LABEL_ROOM * largest
            for other in chosen
        )
        same = any(_choice(point) == _choice(other) for other in chosen)
        if not crowded and not same:
            chosen.append(point)
    return chosen


def _choice(point: ParetoPoint) -> tuple[int, int]:
    return point.decision.adapter_width, point.decision.top_k


def _draw_lanes(axes: Axes, plan: Plan, events: Sequence[Event]) -> None:
    """What each lane does, from the simulation."""
    timing = plan.prediction.timing
    lanes = lanes_of(timing)
    for index, lane in enumerate(lanes):
        spans = [
            (event.start_seconds * 1e3, (event.end_seconds - event.start_seconds) * 1e3)
            for event in events
            if event.lane == lane and event.end_seconds > event.start_seconds
        ]
        axes.broken_barh(spans, (index - 0.36, 0.72), color=_LANE_COLORS[lane], linewidth=0.4)
    busy = [timing.busy_seconds.get(lane, 0.0) / timing.step_seconds for lane in lanes]
    axes.set_yticks(
        range(len(lanes)), [f"{_LANE_TITLES[lane]}\n{share:.0%} busy" for lane, share in zip(lanes, busy, strict=True)]
    )
    axes.invert_yaxis()
    axes.set(
        title=f"One step: {format_seconds(timing.step_seconds)}, {timing.slowdown:.2f} times the "
        f"{format_seconds(timing.baseline_step_seconds)} of the same adapter all on the GPU",
        xlabel="ms",
        xlim=(0, timing.step_seconds * 1e3),
    )
    _quiet(axes)


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(11)
