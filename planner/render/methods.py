"""Tables of ``meft-plan estimate`` and ``meft-plan compare``."""

from __future__ import annotations

from collections.abc import Sequence

from meft.planner.base.units import format_bytes, format_seconds
from meft.planner.predict.comparison import MethodComparison, MethodRow
from meft.planner.predict.estimates import Estimate, reserved_at_most
from meft.planner.records.plan import ByteRange, MemoryEntry
from meft.planner.render.details import ledger
from meft.planner.render.tables import View, count, grid, lines, percent, section, stacked


def estimate_view(estimate: Estimate, *, notes: Sequence[str]) -> View:
    """One configuration: whether it fits, totals, every entry, what is left out."""
    process = estimate.process_bytes
    rows = [
        ("fits", _verdict(estimate)),
        ("trainable", f"{count(estimate.trainable_parameters)}, {percent(estimate.trainable_fraction)} of the model"),
        ("resident", format_bytes(estimate.resident_bytes)),
        ("peak allocated", f"{_allocated(estimate)} in {estimate.peak_phase}"),
        ("peak reserved", f"{_reserved(estimate)} ({estimate.reserved_basis})"),
        *_spread(estimate),
        *_traced(estimate),
        *_probed(estimate),
        ("process (NVML)", f"{format_bytes(process.low_bytes)} - {format_bytes(process.high_bytes)} ({process.basis})"),
        ("host", format_bytes(estimate.host_bytes)),
        ("traffic per step", _traffic(estimate)),
        ("step", format_seconds(estimate.step_seconds)),
    ]
    parts = [
        section(f"{estimate.method} on {estimate.model}: {_configuration(estimate)}", grid(("", ""), rows)),
        *([section("Left open", lines(estimate.chosen))] if estimate.chosen else []),
        section(f"Device ledger: resident, and at the peak in {estimate.peak_phase}", ledger(_at_peak(estimate))),
    ]
    if estimate.host_entries:
        parts.append(section("Host ledger", ledger(estimate.host_entries)))
    parts.append(section("Left out", lines(estimate.leaves_out)))
    if notes:
        parts.append(section("Taken for granted", lines(notes)))
    return stacked(*parts)


def comparison_view(comparison: MethodComparison) -> View:
    """Every method at its usual size, the same whatever the budget, then at the largest size that fits this one."""
    request = comparison.request
    budget = f"{format_bytes(request.gpu_mem_bytes)} on {request.gpu}"
    head = (
        f"{request.model.name}, {request.batch_size} x {request.seq_len} tokens per step, {budget}, "
        f"{format_bytes(request.host_mem_bytes)} host memory"
    )
    usual = [line for row in comparison.rows for line in _usual(row)]
    largest = [_line(row.method, row.largest) for row in comparison.rows]
    usual_sizes = "; ".join(f"{row.method}: {row.usual_because}" for row in comparison.rows)
    largest_sizes = "; ".join(f"{row.method}: {row.largest_because}" for row in comparison.rows)
    notes = [f"usual: {usual_sizes}", f"largest: {largest_sizes}", _CHECKPOINTING, *comparison.notes]
    return stacked(
        lines([head]),
        section("At the usual size: alike at every budget, which decides what fits", _table(usual)),
        section(f"At the largest size that fits {budget}: others at other budgets", _table(largest)),
        section("Notes", lines(notes)),
    )


_HEADERS = ("method", "size", "ckpt", "trainable", "device", "host", "traffic", "step", "fits")
_OPTIONAL = (6, 5, 7, 3)
"""Columns that may go where it is narrow, the first to go first."""
_CHECKPOINTING = "ckpt: activation checkpointing, which computes layers again in backward instead of keeping them"


def _table(rows: Sequence[Sequence[str]]) -> View:
    return grid(_HEADERS, rows, right=(1, 3, 4, 5, 6, 7), optional=_OPTIONAL)


def _usual(row: MethodRow) -> list[tuple[str, ...]]:
    """A method's configurations; its name stands at the first."""
    each = row.usual_configurations or (row.usual,)
    return [_line("" if index else row.method, estimate) for index, estimate in enumerate(each)]


def _line(method: str, estimate: Estimate | None) -> tuple[str, ...]:
    if estimate is None:
        return (method, "-", "-", "-", "-", "-", "-", "-", "no")
    return (
        method,
        "-" if estimate.size is None else f"{estimate.size:,}",
        "on" if estimate.activation_checkpointing else "off",
        percent(estimate.trainable_fraction),
        format_bytes(estimate.peak_reserved_bytes),
        format_bytes(estimate.host_bytes) if estimate.host_bytes else "-",
        format_bytes(estimate.h2d_bytes_per_step + estimate.d2h_bytes_per_step),
        format_seconds(estimate.step_seconds),
        "yes" if estimate.fits else "no",
    )


def _at_peak(estimate: Estimate) -> list[MemoryEntry]:
    return [entry for entry in estimate.entries if entry.phase in ("resident", estimate.peak_phase)]


def _allocated(estimate: Estimate) -> str:
    """A figure; of a compiled run both ends."""
    if estimate.compiled is None:
        return format_bytes(estimate.peak_allocated_bytes)
    return _ends(estimate.compiled.allocated_bytes)


def _reserved(estimate: Estimate) -> str:
    if estimate.compiled is None:
        return format_bytes(estimate.peak_reserved_bytes)
    return _ends(estimate.compiled.reserved_bytes)


def _ends(found: ByteRange) -> str:
    return f"{format_bytes(found.low_bytes)} - {format_bytes(found.high_bytes)}"


def _spread(estimate: Estimate) -> list[tuple[str, str]]:
    """What varying lengths make of it."""
    if estimate.lengths is None:
        return []
    spread = estimate.lengths
    least, middle, most = (format_bytes(each) for each in (spread.least_bytes, spread.median_bytes, spread.most_bytes))
    orders = f"{spread.orders} orders of {spread.micro_batches} batches, {spread.batching}"
    return [("reserved, lengths varying", f"{least} - {most}, median {middle} ({orders})")]


def _probed(estimate: Estimate) -> list[tuple[str, str]]:
    """What ``--probe`` measured."""
    if estimate.probed is None:
        return []
    allocated, reserved = estimate.probed.peak_allocated_bytes, estimate.probed.peak_reserved_bytes
    if allocated is None or reserved is None:
        return [("probed on this card", "it ran out of memory")]
    context = estimate.probed.context_bytes
    beside = "" if context is None else f", {format_bytes(context)} beside them"
    return [("probed on this card", f"{format_bytes(allocated)} allocated, {format_bytes(reserved)} reserved{beside}")]


def _traced(estimate: Estimate) -> list[tuple[str, str]]:
    """What ``--verify`` traced, and how far the estimate is from it."""
    if estimate.traced is None:
        return []
    allocated, reserved = estimate.traced.peak_allocated_bytes, estimate.traced.peak_reserved_bytes
    of_allocated = f"{format_bytes(allocated)} ({estimate.peak_allocated_bytes / allocated - 1:+.2%})"
    of_reserved = f"{format_bytes(reserved)} ({estimate.peak_reserved_bytes / reserved - 1:+.2%})"
    return [("traced (estimate off by)", f"{of_allocated} allocated, {of_reserved} reserved")]


def _verdict(estimate: Estimate) -> str:
    """Yes and what is left, or no and what is missing; between them what the allocator makes of it."""
    needed, budget = reserved_at_most(estimate), estimate.allocator_budget_bytes
    if estimate.lengths is not None:
        needed = estimate.lengths.most_bytes
    if estimate.traced is not None:
        needed = max(estimate.traced.peak_reserved_bytes, estimate.peak_reserved_bytes_at_cap or 0)
    room = f"{format_bytes(budget)} for the allocator"
    if estimate.fits:
        return f"yes: {format_bytes(needed)}, {format_bytes(budget - needed)} below {room}"
    if estimate.verdict == "fits-after-retries":
        flushes = f"{estimate.cache_flushes} times in two steps"
        return f"after retries, so slowly: {format_bytes(needed)} in {room}, which flushes its cache {flushes}"
    if estimate.compiled is not None and estimate.verdict == "uncertain":
        return f"uncertain: {_reserved(estimate)} as torch.compile fuses, {room}"
    if estimate.verdict == "uncertain":
        process = (
            f"{format_bytes(estimate.process_bytes.low_bytes)} - {format_bytes(estimate.process_bytes.high_bytes)}"
        )
        return f"uncertain: {format_bytes(needed)}, and with the CUDA context {process}: the card's own decides"
    missing, at_least = [], ""
    if estimate.compiled is not None:
        needed, at_least = estimate.compiled.reserved_bytes.low_bytes, "at least "
    if needed > budget:
        missing.append(f"{at_least}{format_bytes(needed)}, {format_bytes(needed - budget)} above {room}")
    if (over := estimate.host_bytes - estimate.host_budget_bytes) > 0:
        limit = format_bytes(estimate.host_budget_bytes)
        missing.append(f"{format_bytes(estimate.host_bytes)} of host memory, {format_bytes(over)} above {limit}")
    return f"no: {'; '.join(missing)}"


def _traffic(estimate: Estimate) -> str:
    return (
        f"{format_bytes(estimate.h2d_bytes_per_step)} to the device, {format_bytes(estimate.d2h_bytes_per_step)} back"
    )


def _configuration(estimate: Estimate) -> str:
    texts = []
    if estimate.size_name is not None:
        texts.append(f"{estimate.size_name.replace('_', ' ')} {estimate.size:,}")
    if estimate.decision is not None:
        texts.append(f"K {estimate.decision.top_k}, {estimate.decision.routing} routing")
    if estimate.targets:
        texts.append(f"on {', '.join(estimate.targets)}")
    texts.append(f"{estimate.weights_dtype}{' double-quantized' if estimate.double_quant else ''} weights")
    if estimate.adapter_dtype is not None:
        texts.append(f"{estimate.adapter_dtype} adapter")
    texts += _loop(estimate)
    return ", ".join(texts)


def _loop(estimate: Estimate) -> list[str]:
    """How it is trained, where that is not the plain way."""
    texts = [f"checkpointing {'on' if estimate.activation_checkpointing else 'off'}", f"{estimate.attention} attention"]
    if estimate.kbit_preparation:
        texts.append("k-bit preparation")
    if estimate.trl_casts:
        texts.append("TRL's casts")
    if estimate.autocast != "none":
        texts.append(f"{estimate.autocast} autocast")
    if estimate.optimizer != "adamw":
        texts.append(estimate.optimizer)
    if estimate.optimizer_in_backward:
        texts.append("optimizer in backward")
    if estimate.master_weights:
        texts.append("fp32 master weights")
    if estimate.kernels:
        texts.append(f"fused {', '.join(estimate.kernels)}")
    if estimate.offload != "none":
        texts.append(f"activations on the host ({estimate.offload})")
    if estimate.compiled is not None:
        texts.append("compiled")
    if estimate.loss != "hf":
        texts.append(f"{estimate.loss} loss")
    return texts
