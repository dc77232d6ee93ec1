"""Small records for tests of the planner's models. The rates are round numbers, chosen for easy arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meft.planner.models.architecture import ModelShape
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Decision, Request
from meft.planner.records.profiles import (
    GpuProfile,
    HostProfile,
    LayerSparsity,
    LinkProfile,
    Sourced,
    SourcedRange,
    SparsityProfile,
)

GIB = 1 << 30


def sourced(value: float) -> Sourced:
    return Sourced(value=value, basis="assumed", source="a round number for tests")


def llama_7b(**changes: Any) -> ModelShape:
    """LLaMA-7B's public configuration."""
    values = {
        "name": "llama-7b",
        "model_type": "llama",
        "num_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_heads": 32,
        "num_kv_heads": 32,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_positions": 2048,
        "tied_embeddings": False,
        "gated_mlp": True,
        "activation": "silu",
        "norm": "rmsnorm",
        "norms_per_layer": 2,
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
    }
    return ModelShape(**(values | changes))


def tiny_shape(**changes: Any) -> ModelShape:
    """Three layers of width 8: small enough to count by hand."""
    small = {"num_layers": 3, "hidden_size": 8, "intermediate_size": 16, "num_heads": 2, "num_kv_heads": 1}
    return llama_7b(**({"name": "tiny", **small, "head_dim": 4, "vocab_size": 32} | changes))


def request_of(**changes: Any) -> Request:
    values = {
        "model": llama_7b(),
        "gpu": "test-gpu",
        "host": "test-host",
        "link": "test-link",
        "sparsity": "test-sparsity",
        "gpu_mem_bytes": 24 * GIB,
        "host_mem_bytes": 64 * GIB,
        "host_mem_basis": "given",
    }
    return Request(**(values | changes))


def decision_of(**changes: Any) -> Decision:
    values = {
        "adapter_width": 6144,
        "top_k": 64,
        "prefetch_depth": 0,
        "active_rows_cap": 2048,
        "num_experts": 1,
        "num_probes": 1,
        "routing": "exact",
        "rows_in_backward": "retained",
        "activation_checkpointing": False,
    }
    if changes.get("routing") == "key-experts":
        values |= {"num_experts": 64, "num_probes": 8}
    return Decision(**(values | changes))


def gpu_profile(**changes: Any) -> GpuProfile:
    values = {
        "key": "test-gpu",
        "name": "test GPU",
        "architecture": "none",
        "memory_total_bytes": sourced(24 * GIB),
        "memory_bytes_per_second": sourced(1e12),
        "bf16_flops_per_second": sourced(100e12),
        "fp32_flops_per_second": sourced(25e12),
        "matmul_efficiency": sourced(0.5),
        "memory_efficiency": sourced(0.8),
        "kernel_launch_seconds": sourced(1e-6),
        "context": SourcedRange(low_bytes=0, high_bytes=0, basis="assumed", source="none in tests"),
        "workspace_bytes": sourced(0),
        "link": "test-link",
    }
    return GpuProfile(**(values | changes))


def link_profile(scale: float = 1.0, **changes: Any) -> LinkProfile:
    """A link ``scale`` times as fast as the plain one."""
    values = {
        "key": "test-link",
        "name": "test link",
        "h2d_bytes_per_second": sourced(20e9 * scale),
        "d2h_bytes_per_second": sourced(25e9 * scale),
        "duplex_h2d_bytes_per_second": sourced(10e9 * scale),
        "duplex_d2h_bytes_per_second": sourced(12.5e9 * scale),
        "pageable_h2d_bytes_per_second": None,
        "pageable_d2h_bytes_per_second": None,
        "latency_seconds": sourced(1e-5 / scale),
    }
    return LinkProfile(**(values | changes))


def host_profile(scale: float = 1.0, **changes: Any) -> HostProfile:
    """A host ``scale`` times as fast as the plain one."""
    values = {
        "key": "test-host",
        "name": "test host",
        "num_cores": 8,
        "gather_bytes_per_second": sourced(20e9 * scale),
        "scatter_bytes_per_second": sourced(16e9 * scale),
        "adamw_bytes_per_second": sourced(28e9 * scale),
        "gemm_flops_per_second": sourced(500e9 * scale),
        "select_scores_per_second": sourced(1e9 * scale),
        "overhead_seconds_per_layer": sourced(1e-4 / scale),
        "overhead_seconds_per_expert": sourced(1e-6 / scale),
    }
    return HostProfile(**(values | changes))


def launching(seconds: float) -> dict[str, Sourced]:
    """A host profile's seconds of launching each task, no two alike."""
    tasks = ("attention", "router", "ffn", "adapter", "adapter_backward", "backward")
    return {f"launch_{task}_seconds": sourced((place + 1) * seconds) for place, task in enumerate(tasks)}


def sparsity_profile(*alphas: float, **changes: Any) -> SparsityProfile:
    values = {
        "key": "test-sparsity",
        "name": "test sparsity",
        "basis": "assumed",
        "source": "chosen for tests",
        "layers": tuple(LayerSparsity(alpha=alpha) for alpha in alphas or (0.5,)),
        "spread_fraction": 0.25,
        "prefetch_recall_by_depth": (1.0, 0.9, 0.85),
    }
    return SparsityProfile(**(values | changes))


def side_by_side(each: Sequence[Candidates]) -> Candidates:
    """Single candidates, of as many token chunks and routers each, with rows owned in all or none, as one record of
    arrays."""
    arrays = {name: np.array([vars(one)[name] for one in each]) for name in vars(each[0])}
    return Candidates(**arrays | {name: vars(each[0])[name] for name in ("token_chunks", "owned", "routers")})
