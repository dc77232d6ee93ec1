"""What runs on batches of varying lengths reserve: the same data in several orders, each through the allocator."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from meft.planner.base.schema import Bytes, Count, Record
from meft.planner.predict.verdict import Verdict, judged
from meft.planner.records.profiles import GpuProfile
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.run import simulate
from meft.planner.simulation.stream import stream_peaks
from meft.planner.terms.lengths import Batching, BatchShape


class ReservedSpread(Record):
    """Peaks of reserved memory over several orders of the same data, and the verdict on the worst of them."""

    batching: Batching
    sequences: Count
    longest: Count
    """Tokens of the longest sequence, after cutting."""
    orders: Count
    micro_batches: Count
    """Of each order, with the longest sequence among them."""
    least_bytes: Bytes
    median_bytes: Bytes
    most_bytes: Bytes
    peak_allocated_bytes: Bytes
    verdict: Verdict


def reserved_spread(
    setup: TrainingSetup,
    orders: Sequence[Sequence[BatchShape]],
    *,
    batching: Batching,
    lengths: Sequence[int],
    gpu: GpuProfile,
    gpu_mem_bytes: int,
) -> ReservedSpread:
    """Simulate every order; ``lengths`` are the data's, cut already."""
    reserved: list[int] = []
    allocated, verdict = 0, "fits"
    for shapes in orders:
        stream = simulate(setup, workspace_bytes=int(gpu.workspace_bytes.value), shapes=shapes)
        peaks = stream_peaks(stream)
        if not reserved or peaks.reserved_bytes > max(reserved):
            verdict, _ = judged(stream, peaks, gpu=gpu, gpu_mem_bytes=gpu_mem_bytes)
        reserved.append(peaks.reserved_bytes)
        allocated = max(allocated, peaks.allocated_bytes)
    return ReservedSpread(
        batching=batching,
        sequences=len(lengths),
        longest=max(lengths),
        orders=len(orders),
        micro_batches=len(orders[0]),
        least_bytes=min(reserved),
        median_bytes=int(median(reserved)),
        most_bytes=max(reserved),
        peak_allocated_bytes=allocated,
        verdict=verdict,
    )
