"""The host's part of the exchange: its jobs, and the buffers that copies leave from and arrive at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from meft.runtime.device.device import Device
from meft.runtime.device.engine import TransferEngine
from meft.runtime.device.lanes import Job
from meft.runtime.exchange.device_rows import Landing


@dataclass
class HostSide:
    """Issues host work, and holds the buffers whose size depends on the micro-batch."""

    device: Device
    engine: TransferEngine
    _buffers: dict[tuple[str, int], Landing] = field(default_factory=dict)

    def job(
        self,
        name: str,
        work: Callable[[], Any],
        *,
        after: tuple[Job | None, ...],
        urgency: int = 0,
        lane: Literal["cpu", "network"] = "cpu",
    ) -> Job:
        """A job of the host: outside the emulated device's books, without gradients."""
        schedule = self.engine.schedule

        def in_lane() -> Any:
            with torch.no_grad():
                return work()

        def in_place() -> Any:
            with self.device.host():
                return in_lane()

        jobs = [job for job in after if job is not None]
        return schedule.submit(lane, name, in_lane if schedule.overlapped else in_place, after=jobs, urgency=urgency)

    def buffer(self, name: str, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Landing:
        """A reused buffer; made anew when the shape or type changes."""
        landing = self._buffers.get((name, slot))
        if landing is None or landing.buffer.shape != shape or landing.buffer.dtype != dtype:
            landing = self._buffers[name, slot] = Landing(self.engine.host_buffer(*shape, dtype=dtype))
        return landing

    def existing(self, name: str, slot: int) -> Landing | None:
        """The buffer of that name, if one was made."""
        return self._buffers.get((name, slot))

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every buffer with its category."""
        for (name, _), landing in self._buffers.items():
            yield name, landing.buffer
