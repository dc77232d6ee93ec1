"""When each lane worked: totals for the report, and for ``--trace`` every task of the observed steps.

The cpu lane and the emulated device's copies report their jobs. The emulated device computes in the thread that issues
the jobs; what passes there between the points where the exchange looks in is the gpu lane's, less the waits. On CUDA
events mark the same points in the compute stream: what passes there from one to the next is the gpu lane's, and with it
the gaps in which the GPU waits for the host to tell it what to do.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

from meft.planner.records.plan import Lane
from meft.planner.timing.chrome import Event as Task
from meft.planner.timing.chrome import task_kind
from meft.runtime.device.streams import Event, Streams


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
        self._streams: Streams | None = None
        self._mark: Event | None = None
        self._marked: deque[tuple[str, Event, Event]] = deque()
        """Tasks of a device with streams that may be under way."""
        self._origin: tuple[Event, float] | None = None
        """A point of the stream, and the time then."""

    def follow(self, streams: Streams | None) -> None:
        """Take the gpu lane's time from the compute stream, where the device has one."""
        self._streams = streams
        self.restart()
        self.resume()

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
        """The device has computed ``name`` since :meth:`resume` or the last call."""
        if self._streams is not None:
            before, self._mark = self._mark, self._point(self._streams)
            if not self._paused and before is not None:
                self._marked.append((name, before, self._mark))
                self._add_up()
            return
        now = time.perf_counter()
        self("gpu", name, self._since, now)
        self._since = now

    def resume(self) -> None:
        """The device goes on computing now."""
        if self._streams is not None:
            self._mark = self._point(self._streams)
        self._since = time.perf_counter()

    def settle(self) -> None:
        """Wait until the tasks so far are over, and count them."""
        if self._marked:
            self._marked[-1][2].synchronize()
        self._add_up()

    def _point(self, streams: Streams) -> Event:
        event = streams.new_event(timed=True)
        event.record()
        return event

    def _add_up(self) -> None:
        """Count the tasks that are over."""
        while self._marked and self._marked[0][2].query():
            name, before, after = self._marked.popleft()
            seconds = before.elapsed_time(after) / 1e3
            origin, at = self._origin or (before, 0.0)
            started = at + origin.elapsed_time(before) / 1e3
            self("gpu", name, started, started + seconds)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no part of the steps. No lane may have anything to do at its beginning and end."""
        self.settle()
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before
            self.resume()

    def restart(self) -> None:
        """Forget the tasks so far: those of the next step are wanted."""
        if self._streams is not None and self.keep:
            self.settle()
            origin = self._point(self._streams)
            origin.synchronize()
            self._origin = origin, time.perf_counter()
        self._tasks = []

    def events(self) -> list[Task]:
        """The tasks kept, in order of their beginning, from 0 s on."""
        ordered = sorted(self._tasks, key=lambda task: task[2])
        origin = ordered[0][2] if ordered else 0.0
        return [Task(lane, name, started - origin, ended - origin) for lane, name, started, ended in ordered]
