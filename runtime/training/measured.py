"""What a process measures of the steps that it runs: of a window the time is kept, all else in sums and histograms."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from meft.planner.records.plan import Lane
from meft.runtime.device.device import MemoryPeaks


@dataclass(frozen=True)
class Worked:
    """How long the lanes worked in so many steps, and the host at each kind of task."""

    steps: int = 0
    lanes: dict[Lane, float] = field(default_factory=dict)
    host_tasks: dict[str, float] = field(default_factory=dict)

    def since(self, before: Worked) -> Worked:
        """What was done after ``before``."""
        lanes = {lane: seconds - before.lanes.get(lane, 0.0) for lane, seconds in self.lanes.items()}
        tasks = {task: seconds - before.host_tasks.get(task, 0.0) for task, seconds in self.host_tasks.items()}
        return Worked(self.steps - before.steps, lanes, tasks)


@dataclass
class Totals:
    """A sum for each layer."""

    layers: list[int] = field(default_factory=list)

    def add(self, counts: Sequence[int]) -> None:
        """One more of each layer."""
        self.layers = [a + b for a, b in zip(self.layers, counts, strict=True)] if self.layers else list(counts)


@dataclass
class Histograms:
    """For each layer how often each number came: as much as the list of them says of means and quantiles."""

    layers: list[Counter[int]] = field(default_factory=list)

    def add(self, counts: Sequence[int]) -> None:
        """One more of each layer."""
        self.layers = self.layers or [Counter() for _ in counts]
        for layer, count in zip(self.layers, counts, strict=True):
            layer[count] += 1


@dataclass
class Measurements:
    """What this process measured."""

    steps: int = 0
    """Steps run by this process."""
    windows: int = 0
    window_seconds: array[float] = field(default_factory=lambda: array("d"))
    """Per step, of each whole window: its steps, its optimizer step, and what the lanes had left of the one before."""
    warm_up: Worked | None = None
    """In the first window, where there are more."""
    active_rows: Histograms = field(default_factory=Histograms)
    missing_rows: Totals = field(default_factory=Totals)
    overflow_rows: Totals = field(default_factory=Totals)
    hot_rows: Totals = field(default_factory=Totals)
    hot_windows: int = 0
    """Windows in which hot rows were on the device."""
    kept_rows: Totals = field(default_factory=Totals)
    """Rows on the device at the end of each window."""
    dropped_rows: int = 0
    tokens: int = 0
    peaks: MemoryPeaks = field(default_factory=lambda: MemoryPeaks(0, 0))
