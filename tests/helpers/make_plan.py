"""A plan written by hand for a small model, for runtime tests that must not depend on the search."""

from __future__ import annotations

from meft.planner.models.architecture import ModelShape
from meft.planner.records.plan import (
    ByteRange,
    Decision,
    DeviceMemory,
    HostMemory,
    Inputs,
    Plan,
    Prediction,
    Request,
    SearchSummary,
    Sparsity,
    Timing,
    Transfer,
)


def hand_plan(shape: ModelShape, decision: Decision, *, budget_bytes: int = 1 << 32, **request: object) -> Plan:
    """A plan for ``decision`` whose predictions are placeholders of the right form."""
    nothing = ByteRange(low_bytes=0, high_bytes=0, basis="counted", source="emulated")
    asked: dict[str, object] = {
        "model": shape,
        "gpu": "emulated",
        "host": "small-2core",
        "link": "emulated",
        "sparsity": "meft-paper",
        "gpu_mem_bytes": budget_bytes,
        "host_mem_bytes": 1 << 34,
        "host_mem_basis": "given",
        "batch_size": 2,
        "seq_len": 32,
        "grad_accum": 1,
        "weights_dtype": "fp32",
        "adapter_dtype": "fp32",
    }
    rows = (decision.active_rows_cap,) * shape.num_layers
    return Plan(
        meft_version="0.0.0",
        request=Request.model_validate(asked | request),
        decision=decision,
        prediction=Prediction(
            device_memory=DeviceMemory(
                entries=(),
                peak_phase="loss",
                peak_allocated_bytes=1,
                peak_reserved_bytes=1,
                reserved_basis="assumed",
                context_bytes=nothing,
                process_bytes=nothing,
                allocator_budget_bytes=budget_bytes,
            ),
            host_memory=HostMemory(entries=(), total_bytes=1),
            transfer=Transfer(
                entries=(),
                h2d_bytes_per_step=1,
                d2h_bytes_per_step=1,
                h2d_bytes_per_optimizer_step=0,
                d2h_bytes_per_optimizer_step=0,
                whole_adapter_offload_ratio=1.0,
            ),
            timing=Timing(
                step_seconds=1.0, baseline_step_seconds=1.0, slowdown=1.0, busy_seconds={}, tokens_per_second=1.0
            ),
            sparsity=Sparsity(
                active_rows_per_layer=rows, window_active_rows_per_layer=rows, prefetch_recall=1.0, basis="assumed"
            ),
            trainable_parameters=2 * decision.adapter_width * shape.hidden_size * shape.num_layers,
            trainable_fraction=0.1,
        ),
        inputs=Inputs(profiles=(), numbers=()),
        search=SearchSummary(candidates=1, feasible=1, pareto=()),
    )
