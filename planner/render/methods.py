"""Tables of ``meft-plan estimate`` and ``meft-plan compare``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from meft.planner.base.units import format_bytes, format_seconds
from meft.planner.predict.comparison import MethodComparison, MethodRow
from meft.planner.predict.estimates import Estimate
from meft.planner.records.plan import MemoryEntry
from meft.planner.render.details import ledger
from meft.planner.render.tables import count, grid, lines, percent, section


def estimate_view(estimate: Estimate, *, notes: Sequence[str]) -> RenderableType:
    """One configuration: totals, every entry, what is left out."""
    process = estimate.process_bytes
    rows = [
        ("trainable", f"{count(estimate.trainable_parameters)}, {percent(estimate.trainable_fraction)} of the model"),
        ("resident", format_bytes(estimate.resident_bytes)),
        ("peak allocated", f"{format_bytes(estimate.peak_allocated_bytes)} in {estimate.peak_phase}"),
        ("peak reserved", f"{format_bytes(estimate.peak_reserved_bytes)} ({estimate.reserved_basis})"),
        *_traced(estimate),
        ("process (NVML)", f"{format_bytes(process.low_bytes)} - {format_bytes(process.high_bytes)} ({process.basis})"),
        ("fits", f"{_verdict(estimate)} {format_bytes(estimate.allocator_budget_bytes)} for the allocator"),
        ("host", format_bytes(estimate.host_bytes)),
        ("traffic per step", _traffic(estimate)),
        ("step", format_seconds(estimate.step_seconds)),
    ]
    parts = [
        section(f"{estimate.method} on {estimate.model}: {_configuration(estimate)}", grid(("", ""), rows)),
        section(f"Device ledger: resident, and at the peak in {estimate.peak_phase}", ledger(_at_peak(estimate))),
    ]
    if estimate.host_entries:
        parts.append(section("Host ledger", ledger(estimate.host_entries)))
    parts.append(section("Left out", lines(estimate.leaves_out)))
    if notes:
        parts.append(section("Taken for granted", lines(notes)))
    return Group(*parts)


def comparison_view(comparison: MethodComparison) -> RenderableType:
    """Every method at its usual size, then at the largest size that fits."""
    request = comparison.request
    head = (
        f"{request.model.name}, {request.batch_size} x {request.seq_len} tokens per step, "
        f"{format_bytes(request.gpu_mem_bytes)} on {request.gpu}, {format_bytes(request.host_mem_bytes)} host memory"
    )
    usual = [_line(row, row.usual) for row in comparison.rows]
    largest = [_line(row, row.largest) for row in comparison.rows]
    usual_sizes = "; ".join(f"{row.method}: {row.usual_because}" for row in comparison.rows)
    largest_sizes = "; ".join(f"{row.method}: {row.largest_because}" for row in comparison.rows)
    return Group(
        Text(head),
        section("At the usual size", _table(usual)),
        section("At the largest size that fits", _table(largest)),
        section("Notes", lines([f"usual: {usual_sizes}", f"largest: {largest_sizes}", *comparison.notes])),
    )


_HEADERS = ("method", "size", "checkpointing", "trainable", "device", "host", "traffic", "step", "fits")


def _table(rows: Sequence[Sequence[str]]) -> RenderableType:
    return grid(_HEADERS, rows, right=(1, 3, 4, 5, 6, 7))


def _line(row: MethodRow, estimate: Estimate | None) -> tuple[str, ...]:
    if estimate is None:
        return (row.method, "-", "-", "-", "-", "-", "-", "-", "no")
    return (
        row.method,
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


def _traced(estimate: Estimate) -> list[tuple[str, str]]:
    """What ``--verify`` traced, and how far the estimate is from it."""
    if estimate.traced is None:
        return []
    allocated, reserved = estimate.traced.peak_allocated_bytes, estimate.traced.peak_reserved_bytes
    of_allocated = f"{format_bytes(allocated)} ({estimate.peak_allocated_bytes / allocated - 1:+.2%})"
    of_reserved = f"{format_bytes(reserved)} ({estimate.peak_reserved_bytes / reserved - 1:+.2%})"
    return [("traced (estimate off by)", f"{of_allocated} allocated, {of_reserved} reserved")]


def _verdict(estimate: Estimate) -> str:
    return "yes, within" if estimate.fits else "no, above"


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
    if estimate.autocast != "none":
        texts.append(f"{estimate.autocast} autocast")
    if estimate.optimizer != "adamw":
        texts.append(estimate.optimizer)
    if estimate.loss != "hf":
        texts.append(f"{estimate.loss} loss")
    return texts
