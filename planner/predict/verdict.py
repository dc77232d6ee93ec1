"""Whether a run fits a card: not by its size alone, but by whether it runs within what the card leaves it.

torch's allocator gives back what it caches when the device is full and tries again; only then is a run out of memory.
What the CUDA context takes is a range, so between its ends nothing can be said.
"""

from __future__ import annotations

from typing import Literal

from meft.planner.base.errors import DeviceOutOfMemory
from meft.planner.records.profiles import GpuProfile
from meft.planner.simulation.stream import Stream, StreamPeaks, stream_peaks

Verdict = Literal["fits", "fits-after-retries", "uncertain", "does-not-fit"]


def judged(stream: Stream, peaks: StreamPeaks, *, gpu: GpuProfile, gpu_mem_bytes: int) -> tuple[Verdict, int]:
    """The verdict on a run, and how often its allocator flushes its cache; ``peaks`` are those without a limit.

    *fits*: reserved stays within the memory that the largest CUDA context leaves. *fits-after-retries*: it runs in
    that much, the allocator flushing its cache on the way, which waits for the device each time. *uncertain*: it runs
    in what the smallest context leaves, and not in what the largest does.
    """
    least, most = (gpu_mem_bytes - context for context in (gpu.context.high_bytes, gpu.context.low_bytes))
    if peaks.reserved_bytes <= least:
        return "fits", 0
    flushes = _flushes_within(stream, least)
    if flushes is not None:
        return "fits-after-retries", flushes
    flushes = _flushes_within(stream, most)
    return ("does-not-fit", 0) if flushes is None else ("uncertain", flushes)


def _flushes_within(stream: Stream, capacity_bytes: int) -> int | None:
    """How often the cache is flushed where the allocator has so much; None where that does not do."""
    if capacity_bytes <= 0:
        return None
    try:
        return stream_peaks(stream, capacity_bytes=capacity_bytes).num_retries
    except DeviceOutOfMemory:
        return None
