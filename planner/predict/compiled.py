"""What torch.compile makes of an estimate: a range, and a verdict on both of its ends."""

from __future__ import annotations

from meft.planner.fusion.run import simulate_fused
from meft.planner.predict.estimates import CompiledRange, Estimate
from meft.planner.predict.verdict import Verdict, judged
from meft.planner.records.plan import ByteRange
from meft.planner.records.profiles import GpuProfile
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.stream import stream_peaks

_SOURCE = "the step with nothing elementwise in memory (least), and without fusion (most)"


def with_range(estimate: Estimate, setup: TrainingSetup, *, gpu: GpuProfile, gpu_mem_bytes: int) -> Estimate:
    """The estimate of a compiled run, whose figures and verdict are those of the upper end, with the lower end.

    It fits if the upper end does, does not if the lower end does not, and is *uncertain* in between.
    """
    stream = simulate_fused(setup, workspace_bytes=int(gpu.workspace_bytes.value))
    least = stream_peaks(stream)
    verdict: Verdict = estimate.verdict
    if verdict == "does-not-fit":
        at_least, _ = judged(stream, least, gpu=gpu, gpu_mem_bytes=gpu_mem_bytes)
        verdict = "does-not-fit" if at_least == "does-not-fit" else "uncertain"
    process = estimate.process_bytes
    low_process = min(least.reserved_bytes + gpu.context.low_bytes, process.low_bytes)
    update = {
        "compiled": CompiledRange(
            allocated_bytes=_range(least.allocated_bytes, estimate.peak_allocated_bytes),
            reserved_bytes=_range(least.reserved_bytes, estimate.peak_reserved_bytes),
        ),
        "process_bytes": process.model_copy(update={"low_bytes": low_process}),
        "verdict": verdict,
    }
    return estimate.model_copy(update=update)


def _range(least: int, most: int) -> ByteRange:
    """Saving what the eager step saves is one of the cuts, so that the lower end is never above the upper one."""
    return ByteRange(low_bytes=min(least, most), high_bytes=most, basis="counted", source=_SOURCE)
