"""Queues of work that a device does behind the host's back, and the points in them that others wait for.

On CUDA they are torch's streams and events. The emulated device has none: it computes in the thread that asks. Tests
put other ones behind :class:`~meft.runtime.device.device.Device`, which know who has waited for whom.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a stream. Of a device's current stream unless one is named."""

    def record(self, stream: Any = None) -> None:
        """Be the point after everything that the stream was given so far."""
        ...

    def wait(self, stream: Any = None) -> None:
        """Let the stream go on only when the point is passed; the host does not wait."""
        ...

    def synchronize(self) -> None:
        """Let the host wait until the point is passed."""
        ...

    def query(self) -> bool:
        """Whether the point is passed."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this point to another; both are passed and were made to be timed."""
        ...


class Streams(Protocol):
    """A device's streams."""

    def new_stream(self) -> Any:
        """One more queue beside the current one."""
        ...

    def new_event(self, *, timed: bool = False) -> Event:
        """A point that nothing has recorded yet."""
        ...

    def use(self, stream: Any) -> AbstractContextManager[object]:
        """What this thread gives to the device inside goes to ``stream``."""
        ...


class CudaEvent:
    """One of torch's events; the current stream is its device's, whichever device is the thread's current one."""

    def __init__(self, device: torch.device, *, timed: bool) -> None:
        self._device = device
        self._event = torch.cuda.Event(enable_timing=timed)

    def record(self, stream: Any = None) -> None:
        """See :class:`Event`."""
        self._event.record(stream or torch.cuda.current_stream(self._device))

    def wait(self, stream: Any = None) -> None:
        """See :class:`Event`."""
        (stream or torch.cuda.current_stream(self._device)).wait_event(self._event)

    def synchronize(self) -> None:
        """See :class:`Event`."""
        self._event.synchronize()

    def query(self) -> bool:
        """See :class:`Event`."""
        return bool(self._event.query())

    def elapsed_time(self, end_event: Any) -> float:
        """See :class:`Event`."""
        return float(self._event.elapsed_time(end_event._event))


class CudaStreams:
    """Torch's streams of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_stream(self) -> Any:
        """See :class:`Streams`."""
        return torch.cuda.Stream(self._device)

    def new_event(self, *, timed: bool = False) -> Event:
        """See :class:`Streams`."""
        return CudaEvent(self._device, timed=timed)

    def use(self, stream: Any) -> AbstractContextManager[object]:
        """See :class:`Streams`."""
        context: AbstractContextManager[object] = torch.cuda.stream(stream)
        return context
