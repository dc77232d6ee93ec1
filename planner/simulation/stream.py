"""The ordered stream of allocations and frees of a training run, and what it amounts to.

A stream is what a trace of a real model records and what the simulated step makes: tensors in the order in which they
come and go. Fed to the caching allocator it gives *allocated* (whole blocks, as ``torch.cuda.memory_allocated``
counts) and *reserved*; grouped at the peak it gives the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from meft.planner.allocator.caching import CachingAllocator
from meft.planner.records.plan import Phase


class StreamEvent(NamedTuple):
    """Tensor ``tensor`` (a number never used twice) comes with ``num_bytes``, or goes, with ``num_bytes`` negative.

    ``phase`` is when; ``category`` and ``label`` (the operator) say what the tensor is, on its allocation; ``stream``
    is the CUDA stream whose pool it comes from.
    """

    tensor: int
    num_bytes: int
    phase: Phase
    category: str
    label: str = ""
    stream: int = 0


@dataclass(frozen=True)
class HostTraffic:
    """What activations that wait on the host take there at most, and over the link in a micro-batch."""

    peak_bytes: int
    d2h_bytes: int
    h2d_bytes: int
    num_copies: int


@dataclass(frozen=True)
class Stream:
    """Events in order; ``moments`` names places in it: the number of events that precede the moment.

    Moments are ``loaded`` (frozen weights are there), ``attached`` (what is trained is too), and per step ``n`` from 1
    ``forward_n``, ``backward_n``, ``updated_n`` (gradients are still there) and ``optimizer_step_n`` (they are
    cleared), each at the end of what it names.
    """

    events: Sequence[StreamEvent]
    moments: Mapping[str, int] = field(default_factory=dict)
    offloaded: HostTraffic | None = None


@dataclass(frozen=True)
class PhaseLedger:
    """What is alive at the largest moment of one phase: whole blocks, and requested bytes by category."""

    allocated_bytes: int
    by_category: Mapping[str, int]

    @property
    def rounding_bytes(self) -> int:
        """What blocks hold above the requests: rounding to 512 bytes, and remainders too small to be split off."""
        return self.allocated_bytes - sum(self.by_category.values())


@dataclass(frozen=True)
class StreamPeaks:
    """Peaks of a stream, in bytes; ``at_moment`` gives (allocated, peak allocated so far) at each moment."""

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    num_retries: int
    at_moment: Mapping[str, tuple[int, int]]
    ledger: Mapping[Phase, PhaseLedger]


def stream_peaks(stream: Stream, *, capacity_bytes: int | None = None) -> StreamPeaks:
    """Replay a stream through a fresh caching allocator.

    Raises :class:`~meft.planner.base.errors.DeviceOutOfMemory` when ``capacity_bytes`` does not suffice, and
    :class:`ValueError` when a tensor goes that never came, or comes twice.
    """
    allocator = CachingAllocator(capacity_bytes)
    handles: dict[int, int] = {}
    largest: dict[Phase, tuple[int, int]] = {}
    at: dict[int, tuple[int, int]] = {}
    moments = set(stream.moments.values())
    for index, event in enumerate(stream.events):
        if index in moments:
            at[index] = (allocator.allocated_bytes, allocator.peak_allocated_bytes)
        _replay(event, allocator, handles)
        if event.phase not in largest or allocator.allocated_bytes > largest[event.phase][0]:
            largest[event.phase] = (allocator.allocated_bytes, index + 1)
    at[len(stream.events)] = (allocator.allocated_bytes, allocator.peak_allocated_bytes)
    return StreamPeaks(
        requested_bytes=allocator.peak_requested_bytes,
        allocated_bytes=allocator.peak_allocated_bytes,
        reserved_bytes=allocator.peak_reserved_bytes,
        num_retries=allocator.num_retries,
        at_moment={name: at[index] for name, index in stream.moments.items()},
        ledger=_ledger(stream, largest),
    )


def _ledger(stream: Stream, largest: Mapping[Phase, tuple[int, int]]) -> dict[Phase, PhaseLedger]:
    """By phase, from what is allocated at its largest moment and the number of events before that."""
    live = _live_at(stream, {passed for _, passed in largest.values()})
    return {phase: PhaseLedger(allocated, live[passed]) for phase, (allocated, passed) in largest.items()}


def live_by_category(stream: Stream, passed: int) -> dict[str, int]:
    """Requested bytes by category of the tensors that are there after the first ``passed`` events."""
    return _live_at(stream, {passed})[passed]


def _live_at(stream: Stream, moments: Collection[int]) -> dict[int, dict[str, int]]:
    category_of: dict[int, str] = {}
    live: Counter[str] = Counter()
    found, done = {}, 0
    for passed in sorted(moments):
        for event in stream.events[done:passed]:
            category = category_of.setdefault(event.tensor, event.category)
            live[category] += event.num_bytes
        found[passed], done = {name: num_bytes for name, num_bytes in live.items() if num_bytes}, passed
    return found


def _replay(event: StreamEvent, allocator: CachingAllocator, handles: dict[int, int]) -> None:
    if event.num_bytes > 0:
        if event.tensor in handles:
            raise ValueError(f"tensor {event.tensor} comes twice")
        handles[event.tensor] = allocator.malloc(event.num_bytes, event.stream)
    elif event.tensor in handles:
        allocator.free(handles.pop(event.tensor))
    else:
        raise ValueError(f"tensor {event.tensor} goes but never came")
