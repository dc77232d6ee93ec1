"""The ordered stream of allocations and frees of a training run, and what it amounts to.

A stream is what a trace of a real model records and what the simulated step makes: tensors in the order in which they
come and go. Fed to the caching allocator it gives *allocated* (whole blocks, as ``torch.cuda.memory_allocated``
counts) and *reserved*; grouped at the peak it gives the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from meft.planner.allocator import CachingAllocator
from meft.planner.plan import Phase


class StreamEvent(NamedTuple):
    """Tensor ``tensor`` (a number never used twice) comes with ``num_bytes``, or goes, with ``num_bytes`` negative.

    ``phase`` is when; ``category`` and ``label`` (the operator) say what the tensor is, on its allocation.
    """

    tensor: int
    num_bytes: int
    phase: Phase
    category: str
    label: str = ""


@dataclass(frozen=True)
class Stream:
    """Events in order; ``moments`` names places in it: the number of events that precede the moment.

    Moments are ``loaded`` (frozen weights are there), ``attached`` (what is trained is too), and per step ``n`` from 1
    ``forward_n``, ``backward_n`` and ``optimizer_step_n``, each at the end of what it names.
    """

    events: Sequence[StreamEvent]
    moments: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Whole steps in the stream."""
        return sum(name.startswith("optimizer_step_") for name in self.moments)


@dataclass(frozen=True)
class StreamPeaks:
    """Peaks of a stream, in bytes; ``at_moment`` gives (allocated, peak allocated so far) at each moment.

    ``ledger`` holds, for each phase, the requested bytes by category at the largest moment of that phase.
    """

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    num_retries: int
    at_moment: Mapping[str, tuple[int, int]]
    ledger: Mapping[Phase, Mapping[str, int]]


def stream_peaks(stream: Stream, *, capacity_bytes: int | None = None) -> StreamPeaks:
    """Replay a stream through a fresh caching allocator.

    Raises :class:`~meft.planner.errors.DeviceOutOfMemory` when ``capacity_bytes`` does not suffice, and
    :class:`ValueError` when a tensor goes that never came, or comes twice.
    """
    allocator = CachingAllocator(capacity_bytes)
    handles: dict[int, int] = {}
    moments_by_index: dict[int, list[str]] = {}
    for name, index in stream.moments.items():
        moments_by_index.setdefault(index, []).append(name)
    at_moment: dict[str, tuple[int, int]] = {}

    def note(index: int) -> None:
        for name in moments_by_index.get(index, ()):
            at_moment[name] = (allocator.allocated_bytes, allocator.peak_allocated_bytes)

    for index, event in enumerate(stream.events):
        if index in moments_by_index:
            note(index)
        if event.num_bytes > 0:
            if event.tensor in handles:
                raise ValueError(f"tensor {event.tensor} comes twice")
            handles[event.tensor] = allocator.malloc(event.num_bytes)
        elif event.tensor in handles:
            allocator.free(handles.pop(event.tensor))
        else:
            raise ValueError(f"tensor {event.tensor} goes but never came")
    note(len(stream.events))
    return StreamPeaks(
        requested_bytes=allocator.peak_requested_bytes,
        allocated_bytes=allocator.peak_allocated_bytes,
        reserved_bytes=allocator.peak_reserved_bytes,
        num_retries=allocator.num_retries,
        at_moment=at_moment,
        ledger=ledger_at_phase_peaks(stream),
    )


def ledger_at_phase_peaks(stream: Stream) -> dict[Phase, dict[str, int]]:
    """Requested bytes by category at the largest moment of each phase that occurs in the stream."""
    return {phase: live_by_category(stream, upto) for phase, upto in _phase_peaks(stream).items()}


def live_by_category(stream: Stream, upto: int) -> dict[str, int]:
    """Requested bytes by category of the tensors that are there after the first ``upto`` events."""
    category_of: dict[int, str] = {}
    live: Counter[str] = Counter()
    for event in stream.events[:upto]:
        category = category_of.setdefault(event.tensor, event.category)
        live[category] += event.num_bytes
    return {category: num_bytes for category, num_bytes in live.items() if num_bytes}


def _phase_peaks(stream: Stream) -> dict[Phase, int]:
    """How many events have passed at the largest moment of each phase."""
    total = 0
    best: dict[Phase, tuple[int, int]] = {}
    for passed, event in enumerate(stream.events, start=1):
        total += event.num_bytes
        if event.phase not in best or total > best[event.phase][0]:
            best[event.phase] = (total, passed)
    return {phase: passed for phase, (_, passed) in best.items()}
