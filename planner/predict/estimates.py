"""What one configuration of a method needs: an :class:`Estimate` of memory, traffic and time.

The dense methods (``parallel-adapter``, ``lora``, ``qlora``, ``full``) are simulated, event by event, and replayed
through the allocator; MEFT is priced by its own ledger, as in a plan.
"""

from __future__ import annotations

from typing import Literal

from meft.planner.base.dtypes import AdapterDtype, WeightsDtype
from meft.planner.base.schema import Basis, Bytes, Count, Index, Rate, Record, Seconds
from meft.planner.fusion.run import simulate_unfused
from meft.planner.memory.budget import host_budget_bytes
from meft.planner.models.architecture import ModelShape
from meft.planner.models.kernels import KernelName
from meft.planner.models.linears import linear_layers
from meft.planner.predict.spread import ReservedSpread
from meft.planner.predict.verdict import Verdict, judged
from meft.planner.records.ladder import ladder_sizes
from meft.planner.records.plan import (
    Attention,
    ByteRange,
    Decision,
    DeviceMemory,
    MemoryEntry,
    Phase,
    Prediction,
    Request,
)
from meft.planner.records.profiles import GpuProfile, HostProfile, LinkProfile
from meft.planner.records.setup import Autocast, LossName, OffloadName, OptimizerName, TrainingSetup
from meft.planner.simulation.peft import has_closed_form, trained_sizes
from meft.planner.simulation.run import simulate
from meft.planner.simulation.stream import HostTraffic, Stream, StreamPeaks, live_by_category, stream_peaks
from meft.planner.sparse.step import setup_of
from meft.planner.terms.formats import FP32, STORED
from meft.planner.timing.dense import dense_step_seconds
from meft.planner.traffic.transfer import LOSS_BYTES, input_bytes

_EVERYWHERE = (
    "what a kernel allocates and frees within itself, but for attention's backward and the cuBLAS workspaces",
    "evaluation, generation, gradient clipping, and other processes on the card",
)

_NO_SIZE = ("full", "bitfit", "lst", "peft")
RESIDENT = (
    "linear_weights",
    "other_weights",
    "rotary_frequencies",
    "trainable_weights",
    "optimizer_moments",
    "cublas_workspaces",
)
"""Categories that stay from one step to the next."""

BECAUSE = {
    "linear_weights": "the blocks' linear layers, as stored",
    "other_weights": "embeddings, head, norms, biases: never below 16 bits",
    "rotary_frequencies": "two fp32 buffers of half a head",
    "trainable_weights": "what is trained beside the model",
    "optimizer_moments": "the optimizer's states, and fp32 copies of 16-bit weights if it has those",
    "cublas_workspaces": "cuBLAS workspaces: one per thread that multiplies, forward's and autograd's",
    "inputs": "token ids, labels, and the labels shifted",
    "embeddings": "token embeddings, before positions are added or they are scaled",
    "layer_inputs": "the residual stream between layers, and dropout's masks on it",
    "norms": "what norms keep and make (RMSNorm: in fp32)",
    "attention": "query, key, value, output and log-sum-exp, or scores and probabilities; rotary products on the way",
    "ffn": "the FFN's products and activations",
    "adapter": "what the trained part keeps and makes: inputs in its dtype, activations, dropout",
    "rotary_tables": "cosines and sines [1, S, d], shared by all layers",
    "positions": "position ids, and whether several documents share a sequence",
    "attention_mask": "[B, 1, S, S] for padded and packed batches and eager attention",
    "offloaded_activations": "activations brought back from the host for the nodes that run",
    "autocast_weights": "autocast's 16-bit copies of fp32 weights",
    "dequantized_weight": "a quantized linear layer, written out to be multiplied",
    "logits": "the logits in the head's dtype; a loop that holds the outputs holds them",
    "loss_chain": "the loss: fp32 logits, log-probabilities, and their gradients",
    "gradients": "gradients of the trained parameters",
    "backward_temporaries": "gradients of activations on their way",
    "optimizer_temporary": "what the optimizer makes for a while: of AdamW one as large as all that it updates",
    "block_rounding": "blocks are multiples of 512 bytes, and a remainder of up to 1 MiB is not split off",
}


class TracedPeaks(Record):
    """What ``--verify`` adds: the peaks of a trace of the real model's code, replayed like the simulation."""

    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes


class CompiledRange(Record):
    """What ``--torch-compile`` makes of the peaks: everything elementwise fused, to nothing fused."""

    allocated_bytes: ByteRange
    reserved_bytes: ByteRange


class ProbedPeaks(Record):
    """What ``--probe`` measured on a card; null where it ran out of memory, or the driver does not tell."""

    peak_allocated_bytes: Bytes | None
    peak_reserved_bytes: Bytes | None
    context_bytes: Bytes | None


class Estimate(Record):
    """What one configuration needs. Bytes and seconds are per step: one micro-batch forward and backward."""

    method: str
    model: str
    size_name: Literal["adapter_width", "rank"] | None
    size: Count | None
    targets: tuple[str, ...]
    weights_dtype: WeightsDtype
    double_quant: bool
    kbit_preparation: bool
    adapter_dtype: AdapterDtype | None
    autocast: Autocast
    attention: Attention
    activation_checkpointing: bool
    optimizer: OptimizerName
    trl_casts: bool = False
    kernels: tuple[KernelName, ...] = ()
    optimizer_in_backward: bool = False
    master_weights: bool = False
    offload: OffloadName = "none"
    loss: LossName
    decision: Decision | None
    """MEFT's remaining choices."""
    trainable_parameters: Count
    trainable_fraction: Rate
    """Trainable parameters over the frozen model's; full fine-tuning has 1."""
    resident_bytes: Bytes
    peak_phase: Phase
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes
    reserved_basis: Basis
    peak_reserved_bytes_at_cap: Bytes | None
    """With MEFT's active rows at their cap, which no batch exceeds; null for the dense methods."""
    process_bytes: ByteRange
    allocator_budget_bytes: Bytes
    fits: bool
    """Reserved (at the cap) within the budget, and the adapter within host memory."""
    verdict: Verdict = "does-not-fit"
    """What ``fits`` leaves out: whether it runs with the allocator's retries, or may, by the CUDA context's size."""
    cache_flushes: Index = 0
    """In two steps, where it fits after retries."""
    entries: tuple[MemoryEntry, ...]
    host_bytes: Bytes
    host_budget_bytes: Bytes
    host_entries: tuple[MemoryEntry, ...]
    h2d_bytes_per_step: Bytes
    d2h_bytes_per_step: Bytes
    step_seconds: Seconds
    leaves_out: tuple[str, ...]
    chosen: tuple[str, ...] = ()
    """What the request left open, and how it was chosen."""
    traced: TracedPeaks | None = None
    probed: ProbedPeaks | None = None
    """Where it is there, the process and the verdict are corrected by it."""
    compiled: CompiledRange | None = None
    """Of a compiled run: all other figures are of its upper end, but the least of the process, and the verdict."""
    lengths: ReservedSpread | None = None
    """Where lengths vary: everything above is of batches of the longest sequence, but the verdict."""

    def _repr_html_(self) -> str:
        """What a notebook shows: the totals."""
        from meft.planner.base.html import html_table
        from meft.planner.base.units import format_bytes, format_seconds

        size = "" if self.size is None else f", {str(self.size_name).replace('_', ' ')} {self.size:,}"
        rows = [
            ("trainable", f"{self.trainable_parameters:,} ({self.trainable_fraction:.1%} of the model)"),
            ("resident", format_bytes(self.resident_bytes)),
            ("peak allocated", f"{format_bytes(self.peak_allocated_bytes)} in {self.peak_phase}"),
            ("peak reserved", format_bytes(self.peak_reserved_bytes)),
            ("allocator's budget", format_bytes(self.allocator_budget_bytes)),
            ("verdict", self.verdict),
            ("host memory", format_bytes(self.host_bytes)),
            ("to the device, per step", format_bytes(self.h2d_bytes_per_step)),
            ("to the host, per step", format_bytes(self.d2h_bytes_per_step)),
            ("step", format_seconds(self.step_seconds)),
        ]
        return html_table(f"{self.method} on {self.model}{size}", ("", ""), rows)


def estimate_dense(
    setup: TrainingSetup,
    *,
    request: Request,
    gpu: GpuProfile,
    link: LinkProfile,
    host: HostProfile,
    stream: Stream | None = None,
) -> Estimate:
    """What a dense method needs; of the request only the budgets and names matter, ``setup`` says the rest.

    ``stream`` is a trace of the run, for a model or a method that cannot be simulated.
    """
    traced, stream = stream, dense_stream(setup, gpu) if stream is None else stream
    peaks, moved = stream_peaks(stream), stream.offloaded
    memory = simulated_memory(peaks, gpu=gpu, gpu_mem_bytes=request.gpu_mem_bytes)
    parameters = trainable_parameters(setup, traced)
    adapter = setup.method == "parallel-adapter"
    return _estimate(
        memory,
        setup=setup,
        host_budget_bytes=host_budget_bytes(request),
        size_name=None if setup.method in _NO_SIZE else "adapter_width" if adapter else "rank",
        size=setup.adapter_width if adapter else setup.rank,
        targets=setup.target_modules,
        adapter_dtype=None if setup.method in ("full", "bitfit") else setup.adapter_dtype,
        decision=None,
        trainable_parameters=parameters,
        trainable_fraction=parameters / setup.model.num_parameters,
        host_bytes=0 if moved is None else moved.peak_bytes,
        host_entries=_host_entries(moved),
        h2d_bytes_per_step=input_bytes(tokens=setup.tokens) + (0 if moved is None else moved.h2d_bytes),
        d2h_bytes_per_step=LOSS_BYTES + (0 if moved is None else moved.d2h_bytes),
        step_seconds=dense_step_seconds(setup=setup, request=request, gpu=gpu, link=link, host=host, moved=moved),
        leaves_out=_left_out(setup),
    )


def estimate_meft(request: Request, decision: Decision, prediction: Prediction) -> Estimate:
    """What a MEFT decision needs, in the terms of the other methods."""
    setup = meft_setup(request, decision)
    return _estimate(
        prediction.device_memory,
        setup=setup,
        host_budget_bytes=host_budget_bytes(request),
        size_name="adapter_width",
        size=decision.adapter_width,
        targets=(),
        adapter_dtype=request.adapter_dtype,
        decision=decision,
        trainable_parameters=prediction.trainable_parameters,
        trainable_fraction=prediction.trainable_fraction,
        host_bytes=prediction.host_memory.total_bytes,
        host_entries=prediction.host_memory.entries,
        h2d_bytes_per_step=prediction.transfer.h2d_bytes_per_step,
        d2h_bytes_per_step=prediction.transfer.d2h_bytes_per_step,
        step_seconds=prediction.timing.step_seconds,
        leaves_out=(*_EVERYWHERE, "on the host: the process itself, the frozen model while it loads, the data"),
    )


def reserved_at_most(estimate: Estimate) -> int:
    """What must fit: reserved with MEFT's active rows at their cap, for the dense methods at the peak."""
    return estimate.peak_reserved_bytes_at_cap or estimate.peak_reserved_bytes


def with_trace(estimate: Estimate, stream: Stream, *, gpu: GpuProfile, gpu_mem_bytes: int) -> Estimate:
    """The estimate with what a traced run of the same configuration needs, and the verdict on that run."""
    peaks = stream_peaks(stream)
    traced = TracedPeaks(peak_allocated_bytes=peaks.allocated_bytes, peak_reserved_bytes=peaks.reserved_bytes)
    estimate = estimate.model_copy(update={"traced": traced})
    return with_verdict(estimate, stream, peaks, gpu=gpu, gpu_mem_bytes=gpu_mem_bytes)


def with_verdict(
    estimate: Estimate, stream: Stream, peaks: StreamPeaks, *, gpu: GpuProfile, gpu_mem_bytes: int
) -> Estimate:
    """The estimate with the verdict on a run of it; ``fits`` follows."""
    if estimate.decision is not None and not estimate.fits:
        return estimate  # MEFT is judged by its rows at their cap, which a trace of the expected ones does not reach
    verdict, flushes = judged(stream, peaks, gpu=gpu, gpu_mem_bytes=gpu_mem_bytes)
    if estimate.host_bytes > estimate.host_budget_bytes:
        verdict, flushes = "does-not-fit", 0
    return estimate.model_copy(update={"verdict": verdict, "cache_flushes": flushes, "fits": verdict == "fits"})


def meft_setup(request: Request, decision: Decision) -> TrainingSetup:
    """The setup that a decision amounts to: AdamW on the host, stock loss, outputs let go."""
    sizes = {"adapter_width": decision.adapter_width, "top_k": decision.top_k}
    return setup_of(request, decision).model_copy(update=sizes)


def dense_peaks(setup: TrainingSetup, gpu: GpuProfile) -> StreamPeaks:
    """Peaks and ledger of a dense method on a card (which decides the cuBLAS workspace)."""
    return stream_peaks(dense_stream(setup, gpu))


def dense_stream(setup: TrainingSetup, gpu: GpuProfile) -> Stream:
    """The simulated run behind an estimate; of a compiled one the most that it needs."""
    if setup.compiled:
        return simulate_unfused(setup, workspace_bytes=int(gpu.workspace_bytes.value))
    return simulate(setup, workspace_bytes=int(gpu.workspace_bytes.value))


def simulated_memory(peaks: StreamPeaks, *, gpu: GpuProfile, gpu_mem_bytes: int) -> DeviceMemory:
    """The record of a replayed stream: its ledger by phase, its peaks, and the process on this GPU."""
    phase: Phase = max(peaks.ledger, key=lambda each: peaks.ledger[each].allocated_bytes)
    low, high = gpu.context.low_bytes, gpu.context.high_bytes
    reserved = peaks.reserved_bytes
    return DeviceMemory(
        entries=_entries(peaks, phase),
        peak_phase=phase,
        peak_allocated_bytes=peaks.allocated_bytes,
        peak_reserved_bytes=reserved,
        reserved_basis="counted",
        context_bytes=ByteRange(low_bytes=low, high_bytes=high, basis=gpu.context.basis, source=gpu.context.source),
        process_bytes=ByteRange(
            low_bytes=reserved + low,
            high_bytes=reserved + high,
            basis=gpu.context.basis,
            source=f"peak reserved and the CUDA context: {gpu.context.source}",
        ),
        allocator_budget_bytes=max(gpu_mem_bytes - high, 0),
    )


def trainable_parameters(setup: TrainingSetup, stream: Stream | None = None) -> int:
    """Numbers that the optimizer of a dense method updates; of one without a closed form, those that have a gradient
    in the trace of it."""
    shape = setup.model
    if setup.method in ("peft", "bitfit"):
        if has_closed_form(setup):
            return sum(trained_sizes(setup))
        assert stream is not None
        live = live_by_category(stream, stream.moments["backward_1"])
        return live["gradients"] // (STORED[setup.weights_dtype] if setup.method == "bitfit" else FP32)
    if setup.method == "full":
        return shape.num_parameters
    if setup.method == "lst":
        return sum(ladder_sizes(shape, setup.reduction or 0, setup.dropped_layers))
    if setup.method == "parallel-adapter":
        return shape.num_layers * 2 * (setup.adapter_width or 0) * shape.hidden_size
    return lora_parameters(shape, rank=setup.rank or 0, targets=setup.target_modules)


def lora_parameters(shape: ModelShape, *, rank: int, targets: tuple[str, ...]) -> int:
    """``r * (inputs + outputs)`` of every targeted linear layer."""
    if shape.measured is not None:
        found = [each for each in shape.measured.linears if each.name in targets]
        return rank * sum(each.count * (each.inputs + each.outputs) for each in found)
    layers = [layer for layer in linear_layers(shape) if layer.name in targets]
    return shape.num_layers * rank * sum(layer.inputs + layer.outputs for layer in layers)


def _entries(peaks: StreamPeaks, peak_phase: Phase) -> tuple[MemoryEntry, ...]:
    """Resident categories as they are at the peak; the others per phase, at each phase's largest moment."""
    at_peak = peaks.ledger[peak_phase].by_category
    entries = [_entry("resident", name, at_peak[name]) for name in RESIDENT if at_peak.get(name)]
    for phase, ledger in peaks.ledger.items():
        if phase == "resident":
            continue
        others = {name: size for name, size in ledger.by_category.items() if name not in RESIDENT}
        others["block_rounding"] = ledger.rounding_bytes
        entries += [_entry(phase, name, size) for name, size in others.items() if size]
    return tuple(entries)


def _host_entries(moved: HostTraffic | None) -> tuple[MemoryEntry, ...]:
    if moved is None:
        return ()
    because = "activations that wait on the host, each in a block of its own (pinned ones a power of two)"
    entry = MemoryEntry(
        place="host",
        phase="forward",
        category="offloaded_activations",
        num_bytes=moved.peak_bytes,
        basis="counted",
        because=because,
    )
    return (entry,)


def _entry(phase: Phase, category: str, num_bytes: int) -> MemoryEntry:
    return MemoryEntry(
        place="device",
        phase=phase,
        category=category,
        num_bytes=num_bytes,
        basis="counted",
        because=BECAUSE.get(category, "as the real model's code makes it"),
    )


def _estimate(
    memory: DeviceMemory, *, setup: TrainingSetup, host_budget_bytes: int, host_bytes: int, **fields: object
) -> Estimate:
    resident = sum(entry.num_bytes for entry in memory.entries if entry.phase == "resident")
    at_most = memory.peak_reserved_bytes_at_cap or memory.peak_reserved_bytes
    fits = at_most <= memory.allocator_budget_bytes and host_bytes <= host_budget_bytes
    shared = {
        "method": setup.label,
        "model": setup.model.name,
        "weights_dtype": setup.weights_dtype,
        "double_quant": setup.double_quant,
        "kbit_preparation": setup.kbit_preparation,
        "autocast": setup.autocast,
        "attention": setup.attention,
        "activation_checkpointing": setup.activation_checkpointing,
        "optimizer": setup.optimizer,
        "trl_casts": setup.trl_casts,
        "kernels": setup.kernels,
        "optimizer_in_backward": setup.optimizer_in_backward,
        "master_weights": setup.master_weights,
        "loss": setup.loss,
        "offload": setup.offload,
        "resident_bytes": resident,
        "peak_phase": memory.peak_phase,
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "reserved_basis": memory.reserved_basis,
        "process_bytes": memory.process_bytes,
        "allocator_budget_bytes": memory.allocator_budget_bytes,
        "peak_reserved_bytes_at_cap": memory.peak_reserved_bytes_at_cap,
        "fits": fits,
        "verdict": "fits" if fits else "does-not-fit",
        "host_bytes": host_bytes,
        "host_budget_bytes": host_budget_bytes,
        "entries": memory.entries,
    }
    return Estimate.model_validate(shared | fields)


def _left_out(setup: TrainingSetup) -> tuple[str, ...]:
    left_out = [*_EVERYWHERE, "temporaries while the model loads"]
    if setup.optimizer.startswith("paged-"):
        left_out.append("states of tensors from 100,000 numbers on, which the paged optimizer keeps outside torch")
    if setup.method in ("lst", "peft"):
        left_out.append("in the step's time: what the method itself computes")
    if setup.compiled:
        left_out.append(
            "of torch.compile: workspaces of its kernels, autotuning, the pools of CUDA graphs, a lower budget"
        )
        left_out.append("in the step's time: what torch.compile saves")
    if not setup.outputs_kept:
        left_out.append("logits and KV cache that a loop keeps by holding on to the model's outputs")
    return tuple(left_out)
