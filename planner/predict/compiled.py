"""What torch.compile makes of an estimate: a range, a verdict on both of its ends, and what is not said of it."""

from __future__ import annotations

from meft.planner.base.errors import UsageError
from meft.planner.fusion.run import simulate_fused
from meft.planner.predict.estimates import CompiledRange, Estimate
from meft.planner.predict.verdict import Verdict, judged
from meft.planner.records.plan import ByteRange
from meft.planner.records.profiles import GpuProfile
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.stream import stream_peaks
from meft.planner.terms.activations import attention_used

_LOSSES = ("hf", "hf-shifted-logits")
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


def check_compiled(setup: TrainingSetup, *, traced: bool) -> None:
    """Raise :class:`UsageError` for a run of whose compiled form neither end is known; ``traced``: it is not simulated.

    The first that applies is named, with what to do instead.
    """
    grouped = setup.model.num_heads != setup.model.num_kv_heads
    sdpa = attention_used(setup.model, setup.attention) == "sdpa"
    plain = setup.weights_dtype == "fp32" and setup.autocast == "none"
    unknown = {
        f"{setup.model.name} has no closed form, and its trace is of uncompiled code; leave it out": traced,
        "4-bit layers break its graph where their version does; leave it out, or give 16-bit weights": (
            setup.weights_dtype == "nf4" or setup.model.stored is not None
        ),
        f"what it makes of fused {', '.join(setup.kernels)} is theirs; leave out --kernels": bool(setup.kernels),
        f"what it makes of {setup.loss} is that library's; give --loss {' or '.join(_LOSSES)}": (
            setup.loss not in _LOSSES
        ),
        f"--offload {setup.offload} is told of tensors that a compiled graph does not have; leave it out": (
            setup.offload != "none"
        ),
        "a compiled backward hands out all gradients at its end; leave out --optimizer-in-backward": (
            setup.optimizer_in_backward
        ),
        "which kernel takes grouped heads in fp32 is not known; give 16-bit weights, or --autocast bf16": (
            plain and grouped and sdpa
        ),
    }
    for why, applies in unknown.items():
        if applies:
            raise UsageError(f"--torch-compile: {why}")
