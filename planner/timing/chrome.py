"""Tasks of a step, predicted or observed, and how a trace viewer shows them: the same lanes and names for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from meft.planner.records.plan import LANES, Lane, Timing


class Event(NamedTuple):
    """One task of a step."""

    lane: Lane
    name: str
    start_seconds: float
    end_seconds: float


def task_kind(name: str) -> str:
    """What a task does, whatever the layer and however often: ``gather 3 again`` is ``gather``."""
    words = name.removesuffix(" again").split()
    return " ".join(word for word in words if not word.isdecimal())


def chrome_trace(events: Sequence[Event]) -> dict[str, Any]:
    """The events as a Chrome trace (chrome://tracing, Perfetto): one row per lane; tasks that take no time left out."""
    lanes = [*LANES, *sorted({event.lane for event in events} - {*LANES})]
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": lanes.index(lane), "args": {"name": lane}} for lane in lanes
    ]
    tasks = [
        {
            "name": event.name,
            "ph": "X",
            "pid": 0,
            "tid": lanes.index(event.lane),
            "ts": event.start_seconds * 1e6,
            "dur": (event.end_seconds - event.start_seconds) * 1e6,
        }
        for event in events
        if event.end_seconds > event.start_seconds
    ]
    return {"displayTimeUnit": "ms", "traceEvents": [*names, *tasks]}


def lanes_of(timing: Timing) -> tuple[Lane, ...]:
    """The lanes that a step has, in the order in which they are shown."""
    every: tuple[Lane, ...] = (*LANES, "network")
    return tuple(lane for lane in every if lane in timing.busy_seconds)
