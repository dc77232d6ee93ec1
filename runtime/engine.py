"""The transfer engine: the one door between host and device, which counts every byte that passes.

On CUDA each direction has its own stream and the copies are asynchronous, so their host side must be pinned; on the
emulated device a copy is a real copy, done when the call returns. Busy seconds per direction are measured with
events (CUDA) or the clock (emulated).
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch

from meft.planner.plan import Direction
from meft.runtime.device import Device

Per = Literal["step", "optimizer_step", "probe"]


@dataclass(frozen=True)
class Copy:
    """A copy under way. ``done`` is a CUDA event, or None when the copy is already done."""

    done: Any = None

    def wait_on_device(self) -> None:
        """Make the device's current stream wait for the copy; the host goes on."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)

    def wait_on_host(self) -> None:
        """Block the host until the copy is done."""
        if self.done is not None:
            self.done.synchronize()


COPY_DONE = Copy()


class TransferEngine:
    """Copies between host and device tensors, counting bytes by direction, category and kind of step."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.per: Per = "step"
        self.counted_bytes: Counter[tuple[Direction, str, Per]] = Counter()
        self._seconds: dict[Direction, float] = {"h2d": 0.0, "d2h": 0.0}
        self._timed: list[tuple[Direction, Any, Any]] = []
        self._streams: dict[Direction, Any] = {}
        if device.kind == "cuda":
            self._streams = {"h2d": torch.cuda.Stream(), "d2h": torch.cuda.Stream()}

    def host_empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A host staging buffer: pinned on CUDA."""
        with self.device.host():
            return torch.empty(shape, dtype=dtype, pin_memory=self.device.kind == "cuda")

    def mark(self) -> Copy:
        """A point in the device's work: done when everything queued so far is done."""
        if not self._streams:
            return COPY_DONE
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream())
        return Copy(event)

    def to_device(self, host: torch.Tensor, device: torch.Tensor, *, category: str, after: Copy | None = None) -> Copy:
        """Copy ``host`` into ``device`` (same shape and dtype) after ``after``, by default all work queued so far."""
        return self._copy(host, device, "h2d", category, after or self.mark())

    def to_host(self, device: torch.Tensor, host: torch.Tensor, *, category: str) -> Copy:
        """Copy ``device`` into ``host`` (same shape and dtype) once the device's work so far is done."""
        return self._copy(device, host, "d2h", category, self.mark())

    def bring_scalar(self, value: torch.Tensor, *, category: str) -> torch.Tensor:
        """Bring one number to the host, ``[1]``, and wait for it."""
        host = self.host_empty(1, dtype=value.dtype)
        self.to_host(value.detach().reshape(1), host, category=category).wait_on_host()
        return host

    def read_scalar(self, value: torch.Tensor, *, category: str) -> float:
        """Bring one number to the host as a float."""
        host = self.bring_scalar(value, category=category)
        with self.device.host():
            return float(host.item())

    def bytes_in(self, direction: Direction, per: Per) -> int:
        """Bytes counted so far in one direction and kind of step."""
        return sum(size for (way, _, kind), size in self.counted_bytes.items() if (way, kind) == (direction, per))

    def busy_seconds(self) -> dict[Direction, float]:
        """Seconds each direction was copying so far; waits for copies under way."""
        for direction, start, end in self._timed:
            end.synchronize()
            self._seconds[direction] += start.elapsed_time(end) / 1e3
        self._timed.clear()
        return dict(self._seconds)

    def _copy(
        self, source: torch.Tensor, target: torch.Tensor, direction: Direction, category: str, after: Copy
    ) -> Copy:
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(f"{category}: {source.shape} {source.dtype} does not fit {target.shape} {target.dtype}")
        self.counted_bytes[direction, category, self.per] += source.numel() * source.element_size()
        if self._streams:
            return self._copy_on_stream(source, target, direction, after)
        started = time.perf_counter()
        with self.device.host():
            target.copy_(source)
        self._seconds[direction] += time.perf_counter() - started
        return COPY_DONE

    def _copy_on_stream(self, source: torch.Tensor, target: torch.Tensor, direction: Direction, after: Copy) -> Copy:
        stream = self._streams[direction]
        if after.done is not None:
            stream.wait_event(after.done)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            start.record(stream)
            target.copy_(source, non_blocking=True)
            end.record(stream)
        on_device = source if direction == "d2h" else target
        on_device.record_stream(stream)
        self._timed.append((direction, start, end))
        return Copy(end)
