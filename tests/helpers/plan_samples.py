"""A plan small enough to check by hand, and reports of runs of it: L = 3 layers, D = 8, T = 4 tokens, fp32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from meft.planner.models.architecture import ModelShape
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import (
    Decision,
    Inputs,
    NumberUsed,
    Plan,
    ProfileUsed,
    Request,
    SearchSummary,
    TransferEntry,
)
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
from meft.planner.records.report import (
    ActiveRows,
    DeviceUsed,
    Observed,
    ObservedDeviceMemory,
    ObservedHostMemory,
    ObservedTransfer,
    Report,
    Training,
)
from meft.planner.traffic.transfer import step_transfer

MIB = 1 << 20

SHAPE = ModelShape(
    name="tiny",
    model_type="llama",
    num_layers=3,
    hidden_size=8,
    intermediate_size=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=32,
    max_positions=64,
    tied_embeddings=True,
    gated_mlp=True,
    activation="silu",
    norm="rmsnorm",
    norms_per_layer=2,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
)
DECISION = Decision(
    adapter_width=16,
    top_k=2,
    prefetch_depth=1,
    active_rows_cap=12,
    num_experts=4,
    num_probes=2,
    routing="key-experts",
    rows_in_backward="refetched",
    activation_checkpointing=False,
)
ROWS_PER_STEP = ((3, 4, 2), (5, 4, 6))
"""Active rows of two steps, by layer."""


def sample_profiles() -> ProfileSet:
    """The emulated device and what goes with it."""
    return ProfileSet(
        gpu=load_gpu("emulated"),
        link=load_link("emulated"),
        host=load_host("emulated"),
        sparsity=load_sparsity("meft-paper"),
    )


def sample_request(**changes: object) -> Request:
    """One sequence of four tokens on a device of 4 MiB."""
    fields: dict[str, object] = {
        "model": SHAPE,
        "gpu": "emulated",
        "host": "emulated",
        "link": "emulated",
        "sparsity": "meft-paper",
        "gpu_mem_bytes": 4 * MIB,
        "host_mem_bytes": MIB,
        "host_mem_basis": "given",
        "batch_size": 1,
        "seq_len": 4,
        "grad_accum": 2,
        "weights_dtype": "fp32",
        "adapter_dtype": "fp32",
    }
    return Request.model_validate(fields | changes)


def sample_plan(**changes: object) -> Plan:
    """A plan of :data:`DECISION`, predicted by the real models."""
    request, profiles = sample_request(**changes), sample_profiles()
    gpu = ProfileUsed(kind="gpu", name=profiles.gpu.key, digest=profiles.gpu.content_digest())
    latency = profiles.link.latency_seconds
    number = NumberUsed(name="link.latency_seconds", value=latency.value, basis=latency.basis, source=latency.source)
    return Plan(
        meft_version="0",
        request=request,
        decision=DECISION,
        prediction=predict(request, DECISION, profiles),
        inputs=Inputs(profiles=(gpu,), numbers=(number,)),
        search=SearchSummary(candidates=1, feasible=1, pareto=()),
    )


def sample_report(plan: Plan, *, rows_per_step: Sequence[Sequence[int]] = ROWS_PER_STEP, **observed: object) -> Report:
    """A run that observed exactly what the transfer and memory models say of these rows.

    ``observed`` replaces fields of the transfer.
    """
    steps = len(rows_per_step)
    layers = tuple(
        ActiveRows(layer=layer, mean=sum(counts) / steps, max=max(counts), total=sum(counts))
        for layer, counts in enumerate(zip(*rows_per_step, strict=True))
    )
    return Report(
        meft_version="0",
        plan_digest=plan.content_digest(),
        rehearsal=False,
        device=DeviceUsed(
            kind="emulated",
            name="emulated device",
            budget_bytes=plan.prediction.device_memory.allocator_budget_bytes,
        ),
        observed=Observed(
            steps=len(rows_per_step),
            device_memory=_device_memory(plan, [layer.max for layer in layers]),
            host_memory=ObservedHostMemory(
                entries=(), total_bytes=plan.prediction.host_memory.total_bytes, process_rss_bytes=None
            ),
            transfer=_transfer(plan, rows_per_step).model_copy(update=observed),
            active_rows=layers,
            dropped_rows=0,
            prefetch_recall=0.9,
            step_seconds=0.01,
            busy_seconds={"cpu": 0.001},
        ),
        comparison=(),
        training=Training(
            steps=steps,
            optimizer_steps=1,
            tokens=4 * steps,
            loss_per_step=(1.0,) * steps,
            learning_rate_per_optimizer_step=(1e-4,),
            gradient_norm_per_optimizer_step=(1.0,),
            seed=0,
        ),
        versions={},
        layers=SHAPE.num_layers,
    )


def _device_memory(plan: Plan, most: list[int]) -> ObservedDeviceMemory:
    prediction = predict(plan.request, plan.decision, sample_profiles(), most)
    return ObservedDeviceMemory(
        peak_allocated_bytes=prediction.device_memory.peak_allocated_bytes,
        peak_reserved_bytes=prediction.device_memory.peak_allocated_bytes,
        process_bytes=None,
        process_bytes_source="there is no GPU",
    )


def _transfer(plan: Plan, rows_per_step: Sequence[Sequence[int]]) -> ObservedTransfer:
    each = [
        step_transfer(request=plan.request, decision=plan.decision, active_rows_per_layer=list(rows))
        for rows in rows_per_step
    ]
    steps = len(each)
    h2d, d2h = (sum(getattr(one, f"{way}_bytes_per_step") for one in each) for way in ("h2d", "d2h"))
    totals: dict[tuple[str, str, str], int] = {}
    for entry in (entry for one in each for entry in one.entries if entry.per == "step"):
        key = (entry.direction, entry.category, entry.per)
        totals[key] = totals.get(key, 0) + entry.num_bytes
    entries = [
        TransferEntry.model_validate(
            {"direction": way, "category": name, "per": per, "num_bytes": round(size / steps), "because": "counted"}
        )
        for (way, name, per), size in totals.items()
    ]
    return ObservedTransfer(
        entries=(*entries, *(entry for entry in each[0].entries if entry.per == "optimizer_step")),
        h2d_bytes_per_step=round(h2d / steps),
        d2h_bytes_per_step=round(d2h / steps),
        h2d_bytes_per_optimizer_step=each[0].h2d_bytes_per_optimizer_step,
        d2h_bytes_per_optimizer_step=each[0].d2h_bytes_per_optimizer_step,
        h2d_bytes_total=h2d,
        d2h_bytes_total=d2h,
        nvml_rx_bytes=None,
        nvml_tx_bytes=None,
        nvml_source="there is no GPU",
    )


def shallow_model(folder: Path) -> Path:
    """A folder with the config of a LLaMA of three layers, each a fifth of the paper's wide: comparing methods on it
    simulates a tenth of the events."""
    sizes = {"hidden_size": 896, "intermediate_size": 2400, "num_hidden_layers": 3, "num_attention_heads": 14}
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
