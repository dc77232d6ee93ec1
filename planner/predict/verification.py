"""``--verify``: the planner's figures against a trace of the real model's code.

The trace needs torch and transformers, so it lives in another package and is found by its entry point; nothing here
names that package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from meft.planner.base.errors import DeviceOutOfMemory, Infeasible, InfeasibleError
from meft.planner.base.tracers import tracer
from meft.planner.base.units import format_bytes
from meft.planner.records.plan import Plan, Verification
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.stream import Stream, StreamPeaks, stream_peaks


def traced_setup(setup: TrainingSetup, config: Mapping[str, Any], *, workspace_bytes: int) -> Stream:
    """The stream of a run, traced; raises :class:`MachineError` where that cannot be done here."""
    stream: Stream = _tracer("setup")(setup, dict(config), workspace_bytes=workspace_bytes)
    return stream


def traced_plan(plan: Plan, config: Mapping[str, Any], *, workspace_bytes: int) -> Stream:
    """The same for a MEFT plan, with the active rows that it expects."""
    stream: Stream = _tracer("plan")(plan, dict(config), workspace_bytes=workspace_bytes)
    return stream


def traced_emulated(plan: Plan, config: Mapping[str, Any]) -> Stream:
    """The same on the emulated device, with the CPU's operators."""
    stream: Stream = _tracer("emulated")(plan, dict(config))
    return stream


def verified(plan: Plan, config: Mapping[str, Any], *, workspace_bytes: int) -> Plan:
    """``plan`` with its verification: traced with the rows it expects, and with all at the cap.

    Raises :class:`InfeasibleError` if the trace at the cap does not fit the allocator's budget.
    """
    expected = stream_peaks(traced_plan(plan, config, workspace_bytes=workspace_bytes))
    at_cap, retries = _at_cap(plan, config, workspace_bytes)
    verification = Verification(
        peak_allocated_bytes=expected.allocated_bytes,
        peak_reserved_bytes=expected.reserved_bytes,
        peak_allocated_bytes_at_cap=at_cap.allocated_bytes,
        peak_reserved_bytes_at_cap=at_cap.reserved_bytes,
        cache_flushes_at_cap=retries,
    )
    return plan.model_copy(update={"verification": verification})


def _at_cap(plan: Plan, config: Mapping[str, Any], workspace_bytes: int) -> tuple[StreamPeaks, int]:
    """Peaks with every layer's rows at the cap; and where they are above the budget, how often the allocator would have
    to give back what it caches to stay within it."""
    stream = traced_plan(_with_rows_at_cap(plan), config, workspace_bytes=workspace_bytes)
    peaks, budget = stream_peaks(stream), plan.prediction.device_memory.allocator_budget_bytes
    if peaks.reserved_bytes <= budget:
        return peaks, 0
    try:
        within = stream_peaks(stream, capacity_bytes=budget)
    except DeviceOutOfMemory as error:
        message = (
            f"--verify: the traced step reserves {format_bytes(peaks.reserved_bytes)} with its rows at the cap, more "
            f"than the allocator's budget of {format_bytes(budget)}; give more --gpu-mem, or a smaller --batch-size, "
            f"--seq-len or --adapter-width"
        )
        verdict = Infeasible("device memory", needed=peaks.reserved_bytes, limit=budget, message=message)
        raise InfeasibleError(message, verdict) from error
    return within, within.num_retries


def _with_rows_at_cap(plan: Plan) -> Plan:
    decision = plan.decision
    rows = (decision.active_rows_cap * decision.token_chunks,) * plan.request.model.num_layers
    update = {"active_rows_per_layer": rows}
    if decision.token_chunks > 1:
        update |= {"missing_rows_per_layer": rows}  # no chunk has a row in common with the one before
    sparsity = plan.prediction.sparsity.model_copy(update=update)
    return plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"sparsity": sparsity})})


def _tracer(name: str) -> Callable[..., Stream]:
    return tracer(name, purpose="--verify")
