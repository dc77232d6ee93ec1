"""What one configuration of a training method needs, and every method side by side under one budget.

The memory terms are those of the plan's own ledger, so that MEFT and the methods it is compared with are priced alike.
Methods: ``meft`` (this project), ``parallel-adapter`` (the same adapter, dense, on the GPU), ``lora``, ``qlora`` (LoRA
beside nf4 weights) and ``full``. A method's size is its adapter width ``R`` or its rank ``r``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from meft.planner.architecture import ModelShape
from meft.planner.dense_timing import DenseMethod, dense_step_seconds
from meft.planner.ledger import peak_bytes
from meft.planner.memory import device_ledger, device_memory, reserved_bytes
from meft.planner.methods import Full, Lora, ParallelAdapter, Workload
from meft.planner.plan import (
    AdapterDtype,
    ByteRange,
    Decision,
    DeviceMemory,
    MemoryEntry,
    Phase,
    Prediction,
    Request,
    WeightsDtype,
)
from meft.planner.profiles import GpuProfile, LinkProfile
from meft.planner.quantities import ADAPTER_DTYPE_BYTES, Ints
from meft.planner.schema import Basis, Bytes, Count, Rate, Record, Seconds
from meft.planner.terms_adapter import lora_parameters, parallel_adapter_parameters
from meft.planner.terms_weights import LinearName, linear_sizes
from meft.planner.transfer import LOSS_BYTES, input_bytes
from meft.planner.units import MAX_BYTES

MethodName = Literal["meft", "parallel-adapter", "lora", "qlora", "full"]
METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)
DenseName = Literal["parallel-adapter", "lora", "qlora", "full"]
DENSE_NAMES: tuple[DenseName, ...] = get_args(DenseName)

UNLIMITED_SLOWDOWN = 1e9
WIDTH_STEP = 64
MAX_WIDTH = 1 << 16
_EVERYWHERE = (
    "what kernels hold within one operation, beyond the two cuBLAS workspaces",
    "evaluation, generation, and other processes on the card",
)


@dataclass(frozen=True)
class UsualSize:
    """The size at which a method is commonly run, and who does."""

    size: int | None
    targets: tuple[LinearName, ...]
    because: str


USUAL_SIZES: dict[MethodName, UsualSize] = {
    "meft": UsualSize(6144, (), "the MEFT paper's best width for LLaMA-7B, K = 64"),
    "parallel-adapter": UsualSize(1536, (), "the MEFT paper's dense adapter on a 24 GB card"),
    "lora": UsualSize(16, ("q", "k", "v", "o"), "r = 16 on the attention's linear layers, a common recipe"),
    "qlora": UsualSize(64, get_args(LinearName), "r = 64 on every linear layer, the QLoRA paper's recipe"),
    "full": UsualSize(None, (), "every weight"),
}
USUAL_TOP_K = 64


class Estimate(Record):
    """What one configuration needs. Bytes and seconds are per step: one micro-batch forward and backward."""

    method: MethodName
    model: str
    size_name: Literal["adapter_width", "rank"] | None
    size: Count | None
    targets: tuple[LinearName, ...]
    weights_dtype: WeightsDtype
    double_quant: bool
    adapter_dtype: AdapterDtype | None
    activation_checkpointing: bool
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
    entries: tuple[MemoryEntry, ...]
    host_bytes: Bytes
    host_entries: tuple[MemoryEntry, ...]
    h2d_bytes_per_step: Bytes
    d2h_bytes_per_step: Bytes
    step_seconds: Seconds
    leaves_out: tuple[str, ...]


class MethodRow(Record):
    """One method of a comparison."""

    method: MethodName
    usual: Estimate | None
    usual_because: str
    largest: Estimate | None
    """At the largest size that fits; null when none does."""
    largest_because: str


class MethodComparison(Record):
    """Every method under one budget."""

    request: Request
    rows: tuple[MethodRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class DenseChoice:
    """One configuration of a dense method."""

    method: DenseName
    size: int | None
    targets: tuple[LinearName, ...] = ()
    weights_dtype: WeightsDtype = "bf16"
    double_quant: bool = False
    adapter_dtype: AdapterDtype = "fp32"
    activation_checkpointing: bool = False
    padded: bool = False
    outputs_kept: bool = True
    """Stock loops hold on to the model's outputs through backward, as measured runs show: 2 bytes per bf16 logit."""


def estimate_dense(choice: DenseChoice, *, request: Request, gpu: GpuProfile, link: LinkProfile) -> Estimate:
    """What a dense method needs for the request's workload; the request's own dtypes and decisions do not matter."""
    request = request.model_copy(
        update={
            "weights_dtype": choice.weights_dtype,
            "double_quant": choice.double_quant,
            "adapter_dtype": choice.adapter_dtype,
        }
    )
    method = dense_method(choice, shape=request.model, size=choice.size or 0)
    ledger = device_ledger(shape=request.model, workload=_workload(choice, request), method=method, gpu=gpu)
    memory = device_memory(ledger, gpu=gpu, gpu_mem_bytes=request.gpu_mem_bytes)
    parameters = trainable_parameters(request.model, method)
    step_seconds = dense_step_seconds(
        request=request,
        gpu=gpu,
        link=link,
        method=method,
        activation_checkpointing=choice.activation_checkpointing,
    )
    size_name: Literal["adapter_width", "rank"] = "adapter_width" if choice.method == "parallel-adapter" else "rank"
    return _estimate(
        memory,
        host_budget_bytes=request.host_mem_bytes,
        method=choice.method,
        model=request.model.name,
        size_name=None if choice.size is None else size_name,
        size=choice.size,
        targets=_targets(choice, request.model),
        weights_dtype=choice.weights_dtype,
        double_quant=choice.double_quant,
        adapter_dtype=None if choice.method == "full" else choice.adapter_dtype,
        activation_checkpointing=choice.activation_checkpointing,
        decision=None,
        trainable_parameters=parameters,
        trainable_fraction=parameters / request.model.num_parameters,
        host_bytes=0,
        host_entries=(),
        h2d_bytes_per_step=input_bytes(tokens=request.tokens_per_step),
        d2h_bytes_per_step=LOSS_BYTES,
        step_seconds=step_seconds,
        leaves_out=_left_out(choice),
    )


def estimate_meft(request: Request, decision: Decision, prediction: Prediction) -> Estimate:
    """What a MEFT decision needs, in the terms of the other methods."""
    return _estimate(
        prediction.device_memory,
        host_budget_bytes=request.host_mem_bytes,
        method="meft",
        model=request.model.name,
        size_name="adapter_width",
        size=decision.adapter_width,
        targets=(),
        weights_dtype=request.weights_dtype,
        double_quant=request.double_quant,
        adapter_dtype=request.adapter_dtype,
        activation_checkpointing=decision.activation_checkpointing,
        decision=decision,
        trainable_parameters=prediction.trainable_parameters,
        trainable_fraction=prediction.trainable_fraction,
        host_bytes=prediction.host_memory.total_bytes,
        host_entries=prediction.host_memory.entries,
        h2d_bytes_per_step=prediction.transfer.h2d_bytes_per_step,
        d2h_bytes_per_step=prediction.transfer.d2h_bytes_per_step,
        step_seconds=prediction.timing.step_seconds,
        leaves_out=(
            *_EVERYWHERE,
            "on the host: the process itself, the frozen model while it loads, the data",
        ),
    )


def without_limits(request: Request) -> Request:
    """The same request with budgets that bind nothing: what a configuration needs, whether or not it fits."""
    return request.model_copy(
        update={"gpu_mem_bytes": MAX_BYTES, "host_mem_bytes": MAX_BYTES, "max_slowdown": UNLIMITED_SLOWDOWN}
    )


def compare_dense(
    method: DenseName, *, request: Request, gpu: GpuProfile, link: LinkProfile, weights_dtype: WeightsDtype
) -> MethodRow:
    """A dense method at its usual size, and at the largest size whose reserved peak stays within the budget.

    Where the request leaves activation checkpointing open it is used only where it helps: to fit at all, or to fit a
    larger size.
    """
    usual = USUAL_SIZES[method]
    quantized = method == "qlora"
    choice = DenseChoice(
        method=method,
        size=usual.size,
        targets=usual.targets,
        weights_dtype="nf4" if quantized else weights_dtype,
        double_quant=quantized,
    )

    def estimate(one: DenseChoice) -> Estimate:
        return estimate_dense(one, request=request, gpu=gpu, link=link)

    variants = [replace(choice, activation_checkpointing=flag) for flag in _checkpointing(request)]
    at_usual = _first_that_fits([estimate(variant) for variant in variants])
    if usual.size is None:
        largest = at_usual if at_usual.fits else None
    else:
        largest = _largest(variants, request=request, gpu=gpu, estimate=estimate)
    return MethodRow(
        method=method,
        usual=at_usual,
        usual_because=usual.because,
        largest=largest,
        largest_because=_why_largest(choice, largest),
    )


def dense_method(choice: DenseChoice, *, shape: ModelShape, size: Ints) -> DenseMethod:
    """The method's record for the memory and time models; ``size`` may be an array of candidates."""
    adapter_bytes = ADAPTER_DTYPE_BYTES[choice.adapter_dtype]
    if choice.method == "parallel-adapter":
        return ParallelAdapter(adapter_width=size, adapter_bytes=adapter_bytes)
    if choice.method == "full":
        return Full()
    return Lora(rank=size, targets=_targets(choice, shape), adapter_bytes=adapter_bytes)


def trainable_parameters(shape: ModelShape, method: DenseMethod) -> int:
    """Numbers that the optimizer updates."""
    if isinstance(method, ParallelAdapter):
        width = method.adapter_width
        return int(
            parallel_adapter_parameters(num_layers=shape.num_layers, hidden_size=shape.hidden_size, adapter_width=width)
        )
    if isinstance(method, Lora):
        return int(lora_parameters(shape, rank=method.rank, targets=method.targets))
    return shape.num_parameters


def candidate_sizes(choice: DenseChoice, shape: ModelShape) -> NDArray[np.int64]:
    """Sizes to try, ascending: every rank up to full rank, widths in steps of :data:`WIDTH_STEP`."""
    if choice.method == "parallel-adapter":
        return np.arange(WIDTH_STEP, MAX_WIDTH + 1, WIDTH_STEP, dtype=np.int64)
    sizes = linear_sizes(shape)
    full_rank = max(min(sizes[name]) for name in _targets(choice, shape))
    return np.arange(1, full_rank + 1, dtype=np.int64)


def _estimate(memory: DeviceMemory, *, host_budget_bytes: int, host_bytes: int, **fields: object) -> Estimate:
    resident = sum(entry.num_bytes for entry in memory.entries if entry.phase == "resident")
    at_most = memory.peak_reserved_bytes_at_cap or memory.peak_reserved_bytes
    shared = {
        "resident_bytes": resident,
        "peak_phase": memory.peak_phase,
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "reserved_basis": memory.reserved_basis,
        "process_bytes": memory.process_bytes,
        "allocator_budget_bytes": memory.allocator_budget_bytes,
        "peak_reserved_bytes_at_cap": memory.peak_reserved_bytes_at_cap,
        "fits": at_most <= memory.allocator_budget_bytes and host_bytes <= host_budget_bytes,
        "host_bytes": host_bytes,
        "entries": memory.entries,
    }
    return Estimate.model_validate(shared | fields)


def _targets(choice: DenseChoice, shape: ModelShape) -> tuple[LinearName, ...]:
    """Those of the choice that the model has: without a gated FFN there is no ``gate``."""
    return tuple(name for name in choice.targets if name in linear_sizes(shape))


def _workload(choice: DenseChoice, request: Request) -> Workload:
    return Workload(
        batch_size=request.batch_size,
        seq_len=request.seq_len,
        weights_dtype=choice.weights_dtype,
        attention=request.attention,
        activation_checkpointing=choice.activation_checkpointing,
        double_quant=choice.double_quant,
        grad_accum=request.grad_accum,
        padded=choice.padded,
        outputs_kept=choice.outputs_kept,
    )


def _checkpointing(request: Request) -> tuple[bool, ...]:
    asked = request.activation_checkpointing
    return (False, True) if asked is None else (asked,)


def _first_that_fits(estimates: Sequence[Estimate]) -> Estimate:
    """The first that fits, else the one that misses by least."""
    fitting = [estimate for estimate in estimates if estimate.fits]
    return fitting[0] if fitting else min(estimates, key=lambda estimate: estimate.peak_reserved_bytes)


def _largest(
    variants: Sequence[DenseChoice],
    *,
    request: Request,
    gpu: GpuProfile,
    estimate: Callable[[DenseChoice], Estimate],
) -> Estimate | None:
    """The largest size over the variants; at equal size the first of them."""
    sizes = candidate_sizes(variants[0], request.model)
    budget = max(request.gpu_mem_bytes - gpu.context.high_bytes, 0)
    best: DenseChoice | None = None
    for variant in variants:
        method = dense_method(variant, shape=request.model, size=sizes)
        ledger = device_ledger(shape=request.model, workload=_workload(variant, request), method=method, gpu=gpu)
        fitting = sizes[np.broadcast_to(reserved_bytes(peak_bytes(ledger)) <= budget, sizes.shape)]
        if fitting.size and (best is None or int(fitting[-1]) > (best.size or 0)):
            best = replace(variant, size=int(fitting[-1]))
    return None if best is None else estimate(best)


def _why_largest(choice: DenseChoice, largest: Estimate | None) -> str:
    if largest is None:
        return "no size fits the budget"
    if choice.size is None:
        return "fits"
    if choice.method == "parallel-adapter":
        return f"in steps of {WIDTH_STEP} rows" if largest.size != MAX_WIDTH else "as wide as is tried"
    return "largest rank that fits"


def _left_out(choice: DenseChoice) -> tuple[str, ...]:
    left_out = [*_EVERYWHERE, "optimizers other than AdamW in the parameters' dtype, such as 8-bit or paged ones"]
    if choice.method in ("lora", "qlora"):
        left_out.append("dropout masks")
    if choice.weights_dtype == "nf4":
        left_out.append("a preparation that turns embeddings, head and norms into fp32")
    if not choice.outputs_kept:
        left_out.append("logits and KV cache that a loop keeps by holding on to the model's outputs")
    return tuple(left_out)
