"""When each lane worked: totals for the report, and for ``--trace`` every task of the observed steps.

The cpu lane and the emulated device's copies report their jobs. The emulated device computes in the thread that issues
the jobs; what passes there between the points where the exchange looks in is the gpu lane's, less the waits.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from meft.planner.records.plan import Lane
from meft.planner.timing.chrome import Event, task_kind


class LaneClock:
    """Collects tasks. ``keep`` holds on to each one; otherwise only the busy seconds are kept."""

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep
        self.busy_seconds: defaultdict[Lane, float] = defaultdict(float)
        self.host_seconds: defaultdict[str, float] = defaultdict(float)
        """Of the cpu lane, by kind of task."""
        self._tasks: list[tuple[Lane, str, float, float]] = []
        self._since = time.perf_counter()
        self._paused = False

    def __call__(self, lane: Lane, name: str, started: float, ended: float) -> None:
        """A task is over. Each lane reports from one thread, so no two write the same number."""
        if self._paused:
            return
        self.busy_seconds[lane] += ended - started
        if lane == "cpu":
            self.host_seconds[task_kind(name)] += ended - started
        if self.keep:
            self._tasks.append((lane, name, started, ended))

    def computed(self, name: str) -> None:
        """The emulated device has computed ``name`` since :meth:`resume` or the last call."""
        now = time.perf_counter()
        self("gpu", name, self._since, now)
        self._since = now

    def resume(self) -> None:
        """The emulated device goes on computing now."""
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no part of the steps. No lane may have anything to do at its beginning and end."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before
            self.resume()

    def restart(self) -> None:
        """Forget the tasks so far: those of the next step are wanted."""
        self._tasks = []

    def events(self) -> list[Event]:
        """The tasks kept, in order of their beginning, from 0 s on."""
        ordered = sorted(self._tasks, key=lambda task: task[2])
        origin = ordered[0][2] if ordered else 0.0
        return [Event(lane, name, started - origin, ended - origin) for lane, name, started, ended in ordered]
