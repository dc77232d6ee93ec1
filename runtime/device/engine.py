"""The transfer engine: the one door between host and device, which counts every byte that passes.

Copies are jobs on the lanes ``h2d`` and ``d2h``. On CUDA each direction has its own stream and the job only issues an
asynchronous copy, so its host side must be pinned; on the emulated device the job is a real copy. ``link_gbps`` makes
the emulated link as slow as one likes: a copy then takes its latency and its bytes over the rate. Busy seconds per
direction are measured with events (CUDA) or the clock (emulated).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from meft.planner.base.errors import UsageError
from meft.planner.records.plan import Direction
from meft.runtime.device.device import Device
from meft.runtime.device.lanes import Job, Schedule, Sequential
from meft.runtime.device.pinned import registered_empty
from meft.runtime.device.streams import Event

Per = Literal["step", "optimizer_step", "run", "probe"]
"""``run``: when there is need, as for a checkpoint, whatever the number of steps."""
Views = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Gives source and target when the copy's turn has come: how many rows travel may not be known before."""

LINK_LATENCY_SECONDS = 10e-6
"""Of a throttled link, per copy: what a PCIe copy of a few bytes takes."""


@dataclass(frozen=True)
class Copy:
    """A copy under way, or a point in the device's work. The job's result is an event; None on the emulated device.

    Whoever gives up the device tensor of a copy first lets the device, or the host, wait for the copy: the allocator
    hands its memory on to what the device computes next, and knows nothing of the copy's stream.
    """

    job: Job | None = None
    event: Any = None

    def wait_on_device(self) -> None:
        """Make the device's current stream wait for the copy; the host goes on once the copy is issued."""
        event = self._issued()
        if event is not None:
            event.wait()

    def wait_on_host(self) -> None:
        """Block the host until the copy is done."""
        event = self._issued()
        if event is not None:
            event.synchronize()

    def _issued(self) -> Any:
        return self.event if self.job is None else self.job.result()


COPY_DONE = Copy()


@dataclass(frozen=True)
class Part:
    """One of the copies that a job makes."""

    category: str
    views: Views


class Pair(NamedTuple):
    """A part whose turn has come."""

    category: str
    source: torch.Tensor
    target: torch.Tensor
    num_bytes: int


class TransferEngine:
    """Copies between host and device tensors, counting bytes by direction, category and kind of step."""

    def __init__(self, device: Device, schedule: Schedule | None = None, *, link_gbps: float | None = None) -> None:
        if link_gbps is not None and device.kind != "emulated":
            raise UsageError("--link-gbps throttles the emulated device's link; a real link has its own speed")
        self.device = device
        self.schedule: Schedule = schedule or Sequential()
        self.link_bytes_per_second = None if link_gbps is None else link_gbps * 1e9
        self.per: Per = "step"
        self.counted_bytes: Counter[tuple[Direction, str, Per]] = Counter()
        self._seconds: dict[Direction, float] = {"h2d": 0.0, "d2h": 0.0}
        self._timed: dict[Direction, deque[tuple[Event, Event]]] = {"h2d": deque(), "d2h": deque()}
        self._streams: dict[Direction, Any] = {}
        if device.streams is not None:
            self._streams = {"h2d": device.streams.new_stream(), "d2h": device.streams.new_stream()}

    def host_empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory for a copy, soon given up: pinned on CUDA, out of torch's cache of pinned memory."""
        with self.device.host():
            return torch.empty(shape, dtype=dtype, pin_memory=self.device.kind == "cuda")

    def host_buffer(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A host staging buffer that stays: pinned on CUDA, not a byte larger than it is."""
        with self.device.host():
            if self.device.kind == "cuda":
                return registered_empty(shape, dtype)
            return torch.empty(shape, dtype=dtype)

    def pin(self, buffer: torch.Tensor) -> None:
        """Make memory that is there, and stays, a staging buffer: pinned on CUDA."""
        if self.device.kind == "cuda":
            with self.device.host():
                size = buffer.numel() * buffer.element_size()
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))

    def mark(self) -> Copy:
        """A point in the device's work: done when everything queued so far is done."""
        if self.device.streams is None:
            return COPY_DONE
        event = self.device.streams.new_event()
        event.record()
        return Copy(event=event)

    def to_device(
        self, host: torch.Tensor, device: torch.Tensor, *, category: str, name: str = "", after: Copy | None = None
    ) -> Copy:
        """Copy ``host`` into ``device`` (same shape and dtype) after ``after``, by default all work queued so far."""
        return self.copy("h2d", lambda: (host, device), category=category, name=name, point=after or self.mark())

    def to_host(self, device: torch.Tensor, host: torch.Tensor, *, category: str, name: str = "") -> Copy:
        """Copy ``device`` into ``host`` (same shape and dtype) once the device's work so far is done."""
        return self.copy("d2h", lambda: (device, host), category=category, name=name, point=self.mark())

    def copy(
        self,
        direction: Direction,
        views: Views,
        *,
        category: str,
        name: str = "",
        point: Copy = COPY_DONE,
        after: Iterable[Job] = (),
        per: Per | None = None,
    ) -> Copy:
        """Issue a copy that begins when the device has passed ``point`` and the jobs ``after`` are over.

        It is counted as ``per``, by default the kind of step that runs now.
        """
        return self.copies(
            direction, [Part(category, views)], name=name or category, points=(point,), after=after, per=per
        )

    def copies(
        self,
        direction: Direction,
        parts: Sequence[Part],
        *,
        name: str,
        points: Sequence[Copy] = (),
        after: Iterable[Job] = (),
        per: Per | None = None,
    ) -> Copy:
        """Issue some copies, one after the other, as one job: see :meth:`copy`."""
        counted_as = per or self.per

        def work() -> Any:
            pairs = [self._counted(part, direction, counted_as) for part in parts]
            timed = counted_as in ("step", "optimizer_step")
            if self._streams:
                return self._copy_on_stream(pairs, direction, points, timed=timed)
            return self._copy_here(pairs, direction, timed=timed)

        return Copy(self.schedule.submit(direction, name, work, after=after))

    def _counted(self, part: Part, direction: Direction, per: Per) -> Pair:
        """Source and target of a copy whose turn has come; its bytes are counted."""
        source, target = part.views()
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(
                f"{part.category}: {source.shape} {source.dtype} does not fit {target.shape} {target.dtype}"
            )
        num_bytes = source.numel() * source.element_size()
        self.counted_bytes[direction, part.category, per] += num_bytes  # a key belongs to one lane, that is, one thread
        return Pair(part.category, source, target, num_bytes)

    def bring_scalar(self, value: torch.Tensor, *, category: str) -> torch.Tensor:
        """Bring one number to the host, ``[1]``, and wait for it."""
        host, copy = self.send_scalar(value, category=category)
        copy.wait_on_host()
        return host

    def send_scalar(self, value: torch.Tensor, *, category: str) -> tuple[torch.Tensor, Copy]:
        """Send one number on its way to the host, to a tensor ``[1]``."""
        host = self.host_empty(1, dtype=value.dtype)
        return host, self.to_host(value.detach().reshape(1), host, category=category, name=category.replace("_", " "))

    def read_scalar(self, value: torch.Tensor, *, category: str) -> float:
        """Bring one number to the host as a float."""
        host = self.bring_scalar(value, category=category)
        with self.device.host():
            return float(host.item())

    def bytes_in(self, direction: Direction, per: Per) -> int:
        """Bytes counted so far in one direction and kind of step, once all copies are done."""
        self.schedule.drain()
        return sum(size for (way, _, kind), size in self.counted_bytes.items() if (way, kind) == (direction, per))

    def busy_seconds(self) -> dict[Direction, float]:
        """Seconds each direction was copying in steps so far; waits for copies under way."""
        self.schedule.drain()
        for direction, copies in self._timed.items():
            if copies:
                copies[-1][1].synchronize()
            self._add_up(direction)
        return dict(self._seconds)

    def _add_up(self, direction: Direction) -> Event | None:
        """Count the copies of one stream that are over; an event that nobody needs any more, if there is one."""
        copies, unused = self._timed[direction], None
        while copies and copies[0][1].query():
            unused, end = copies.popleft()
            self._seconds[direction] += unused.elapsed_time(end) / 1e3
        return unused

    def _copy_here(self, pairs: Sequence[Pair], direction: Direction, *, timed: bool) -> None:
        started = time.perf_counter()
        for pair in pairs:
            self._copy_one_here(pair)
        if timed:
            self._seconds[direction] += time.perf_counter() - started

    def _copy_one_here(self, pair: Pair) -> None:
        started = time.perf_counter()
        if self.schedule.overlapped:  # a lane's thread, where the emulated device's books are not open
            pair.target.copy_(pair.source)
        else:
            with self.device.host():
                pair.target.copy_(pair.source)
        if self.link_bytes_per_second is not None:
            until = started + LINK_LATENCY_SECONDS + pair.num_bytes / self.link_bytes_per_second
            self.schedule.pause(max(0.0, until - time.perf_counter()))

    def _copy_on_stream(
        self, pairs: Sequence[Pair], direction: Direction, points: Sequence[Copy], *, timed: bool
    ) -> Any:
        stream, streams = self._streams[direction], self.device.streams
        assert streams is not None
        for point in points:
            event = point._issued()
            if event is not None:
                event.wait(stream)
        end = streams.new_event(timed=timed)
        start = (self._add_up(direction) or streams.new_event(timed=True)) if timed else None
        with streams.use(stream):
            if start is not None:
                start.record(stream)
            for pair in pairs:
                self._start(pair, direction)
            end.record(stream)
        if start is not None:
            self._timed[direction].append((start, end))
        return end

    def _start(self, pair: Pair, direction: Direction) -> None:
        """Put a copy into its direction's stream, which is the current one."""
        del direction
        pair.target.copy_(pair.source, non_blocking=True)
