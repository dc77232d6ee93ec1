"""Every method under one budget: at its usual size, and at the largest size that fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from meft.planner.base.dtypes import WeightsDtype
from meft.planner.base.schema import Record
from meft.planner.base.units import MAX_BYTES, format_bytes, format_seconds
from meft.planner.models.linears import linear_layers, resolve_targets
from meft.planner.predict.estimates import Estimate, dense_peaks, estimate_dense
from meft.planner.records.plan import Request
from meft.planner.records.profiles import GpuProfile, HostProfile, LinkProfile
from meft.planner.records.setup import MethodName, TrainingSetup

DenseName = Literal["parallel-adapter", "lora", "qlora", "full"]
DENSE_NAMES: tuple[DenseName, ...] = get_args(DenseName)

UNLIMITED_SLOWDOWN = 1e9
WIDTH_STEP = 64
MAX_WIDTH = 1 << 16


@dataclass(frozen=True)
class UsualSize:
    """The size at which a method is commonly run, and who does. ``targets`` is a group of linear layers."""

    size: int | None
    targets: str
    because: str


USUAL_SIZES: dict[MethodName, UsualSize] = {
    "meft": UsualSize(6144, "", "the MEFT paper's best width for LLaMA-7B, K = 64"),
    "parallel-adapter": UsualSize(1536, "", "the MEFT paper's dense adapter on a 24 GB card"),
    "lora": UsualSize(16, "attention", "r = 16 on the attention's linear layers, a common recipe"),
    "qlora": UsualSize(64, "all-linear", "r = 64 on every linear layer, the QLoRA paper's recipe"),
    "full": UsualSize(None, "", "every weight"),
    "bitfit": UsualSize(None, "", "every bias"),
    "lst": UsualSize(8, "", "the LST paper's reduction"),
    "peft": UsualSize(None, "", "as it is configured"),
}
USUAL_TOP_K = 64


class MethodRow(Record):
    """One method of a comparison."""

    method: MethodName
    usual: Estimate | None
    """Of :attr:`usual_configurations` the first that fits, else the one that misses by least."""
    usual_because: str
    usual_configurations: tuple[Estimate, ...] = ()
    """At the usual size without activation checkpointing and with it, or as asked: the same at every budget."""
    largest: Estimate | None
    """At the largest size that fits; null when none does."""
    largest_because: str


class MethodComparison(Record):
    """Every method under one budget."""

    request: Request
    rows: tuple[MethodRow, ...]
    notes: tuple[str, ...]

    def _repr_html_(self) -> str:
        """What a notebook shows: each method at its usual size and at the largest that fits."""
        from meft.planner.base.html import html_table

        request = self.request
        headers = ("method", "", "size", "trainable", "device", "host", "traffic per step", "step", "fits")
        rows = [
            cells
            for row in self.rows
            for cells in (_html_cells(row.method, "usual", row.usual), _html_cells("", "largest", row.largest))
        ]
        title = f"{request.model.name}, {request.batch_size} x {request.seq_len} tokens per step"
        budget = f"{format_bytes(request.gpu_mem_bytes)} on {request.gpu}, {format_bytes(request.host_mem_bytes)} host"
        return html_table(f"{title}, {budget} memory", headers, rows, notes=self.notes)


def _html_cells(method: str, which: str, estimate: Estimate | None) -> tuple[str, ...]:
    if estimate is None:
        return (method, which, "none", "-", "-", "-", "-", "-", "no")
    return (
        method,
        which,
        "-" if estimate.size is None else f"{estimate.size:,}",
        f"{estimate.trainable_fraction:.1%}",
        format_bytes(estimate.peak_reserved_bytes),
        format_bytes(estimate.host_bytes),
        format_bytes(estimate.h2d_bytes_per_step + estimate.d2h_bytes_per_step),
        format_seconds(estimate.step_seconds),
        "yes" if estimate.fits else "no",
    )


def without_limits(request: Request) -> Request:
    """The same request with budgets that bind nothing: what a configuration needs, whether or not it fits."""
    return request.model_copy(
        update={"gpu_mem_bytes": MAX_BYTES, "host_mem_bytes": MAX_BYTES, "max_slowdown": UNLIMITED_SLOWDOWN}
    )


def usual_setup(method: DenseName, *, request: Request, weights_dtype: WeightsDtype) -> TrainingSetup:
    """A dense method at its usual size for the request's workload: fp32 adapter, AdamW, stock loss, outputs held."""
    usual = USUAL_SIZES[method]
    quantized = method == "qlora"
    lora = method in ("lora", "qlora")
    return TrainingSetup(
        model=request.model,
        method=method,
        rank=usual.size if lora else None,
        target_modules=resolve_targets(request.model, [usual.targets]) if lora else (),
        adapter_width=usual.size if method == "parallel-adapter" else None,
        weights_dtype="nf4" if quantized else weights_dtype,
        double_quant=quantized,
        batch_size=request.batch_size,
        seq_len=request.seq_len,
        grad_accum=request.grad_accum,
        attention=request.attention,
        packed=request.packed,
    )


def compare_dense(
    method: DenseName,
    *,
    request: Request,
    gpu: GpuProfile,
    link: LinkProfile,
    host: HostProfile,
    weights_dtype: WeightsDtype,
) -> MethodRow:
    """A dense method at its usual size, and at the largest size whose reserved peak stays within the budget.

    Where the request leaves activation checkpointing open it is used only where it helps: to fit at all, or to fit a
    larger size.
    """
    usual = USUAL_SIZES[method]
    setup = usual_setup(method, request=request, weights_dtype=weights_dtype)

    def estimate(one: TrainingSetup) -> Estimate:
        return estimate_dense(one, request=request, gpu=gpu, link=link, host=host)

    flags = checkpointing_choices(request.activation_checkpointing)
    variants = [setup.model_copy(update={"activation_checkpointing": flag}) for flag in flags]
    configurations = tuple(map(estimate, variants))
    at_usual = first_that_fits(configurations)
    if usual.size is None:
        largest = at_usual if at_usual.fits else None
    else:
        found = _largest(variants, budget_bytes=at_usual.allocator_budget_bytes, gpu=gpu)
        largest = None if found is None else estimate(found)
    return MethodRow(
        method=method,
        usual=at_usual,
        usual_because=usual.because,
        usual_configurations=configurations,
        largest=largest,
        largest_because=_why_largest(method, largest),
    )


def sized(setup: TrainingSetup, size: int) -> TrainingSetup:
    """The same run at another size: adapter width, or rank."""
    field = "adapter_width" if setup.method == "parallel-adapter" else "rank"
    return setup.model_copy(update={field: size})


def candidate_sizes(setup: TrainingSetup) -> range:
    """Sizes to try, ascending: every rank up to full rank, widths in steps of :data:`WIDTH_STEP`."""
    if setup.method == "parallel-adapter":
        return range(WIDTH_STEP, MAX_WIDTH + 1, WIDTH_STEP)
    layers = [layer for layer in linear_layers(setup.model) if layer.name in setup.target_modules]
    return range(1, max(min(layer.inputs, layer.outputs) for layer in layers) + 1)


def checkpointing_choices(asked: bool | None) -> tuple[bool, ...]:
    """Without activation checkpointing first, which costs time; only what was asked where something was."""
    return (False, True) if asked is None else (asked,)


def first_that_fits(estimates: Iterable[Estimate]) -> Estimate:
    """The first that fits, else the one that misses by least; no more are made than are needed."""
    seen = []
    for estimate in estimates:
        if estimate.fits:
            return estimate
        seen.append(estimate)
    return min(seen, key=lambda each: each.peak_reserved_bytes)


def _largest(variants: Sequence[TrainingSetup], *, budget_bytes: int, gpu: GpuProfile) -> TrainingSetup | None:
    """The largest size over the variants; at equal size the first of them.

    The last variant, which checkpoints, holds the most: the others are only asked from its size on.
    """
    best: TrainingSetup | None = None
    at_least = 0
    for variant in reversed(variants):
        size = _largest_of(variant, budget_bytes=budget_bytes, gpu=gpu, at_least=at_least)
        if size:
            best, at_least = sized(variant, size), size
    return best


def _largest_of(setup: TrainingSetup, *, budget_bytes: int, gpu: GpuProfile, at_least: int) -> int:
    """The largest size that fits; 0 when none does from ``at_least`` on.

    Memory grows with size, nearly in proportion but in steps. The line between the ends of the bracket says where to
    look next; an end that stays a second time counts half, so that the other is not crept up to (the Illinois method).
    """
    sizes = candidate_sizes(setup)

    def above(index: int) -> float:
        return dense_peaks(sized(setup, sizes[index]), gpu).reserved_bytes - budget_bytes

    low = next((index for index, size in enumerate(sizes) if size >= at_least), len(sizes) - 1)
    high = len(sizes) - 1
    if (at_low := above(low)) > 0:
        return 0
    if (at_high := above(high)) <= 0:
        return sizes[high]
    stayed = ""
    while high - low > 1:
        guess = low + int((high - low) * at_low / (at_low - at_high))
        guess = min(max(guess, low + 1), high - 1)
        if (found := above(guess)) > 0:
            high, at_high = guess, found
            at_low /= 2 if stayed == "low" else 1
            stayed = "low"
        else:
            low, at_low = guess, found
            at_high /= 2 if stayed == "high" else 1
            stayed = "high"
    return sizes[low]


def _why_largest(method: DenseName, largest: Estimate | None) -> str:
    if largest is None:
        return "no size fits the budget"
    if method == "full":
        return "fits"
    if method == "parallel-adapter":
        return f"in steps of {WIDTH_STEP} rows" if largest.size != MAX_WIDTH else "as wide as is tried"
    return "largest rank that fits"
