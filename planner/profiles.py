"""Profiles: what is known of GPUs, links, hosts, models and sparsity, each number with its basis and source."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from meft.planner.schema import Basis, Count, Fraction, Index, Rate, Record, Seconds


class Sourced(Record):
    """A number and where it comes from."""

    value: Annotated[float, Field(ge=0.0)]
    basis: Basis
    source: str


class SourcedRange(Record):
    """A range of bytes, both ends included, and where it comes from."""

    low_bytes: Index
    high_bytes: Index
    basis: Basis
    source: str


class GpuProfile(Record):
    """One card. Rates are dense peaks; the efficiencies say which share of them a fine-tuning step reaches."""

    key: str
    name: str
    architecture: str
    memory_total_bytes: Sourced
    """The total that NVML reports."""
    memory_bytes_per_second: Sourced
    bf16_flops_per_second: Sourced | None
    fp16_flops_per_second: Sourced | None = None
    fp32_flops_per_second: Sourced
    matmul_efficiency: Sourced
    memory_efficiency: Sourced
    kernel_launch_seconds: Sourced
    context: SourcedRange
    """What the CUDA context and modules take outside the allocator."""
    workspace_bytes: Sourced
    """cuBLAS workspace per handle and stream."""
    link: str
    """Key of the link class of the card's slot."""
    shares_host_cores: bool = False
    """True for the emulated device, which computes on the host: its lanes cannot overlap."""


class LinkProfile(Record):
    """One class of host-device link. ``duplex`` rates hold while the other direction is busy too."""

    key: str
    name: str
    h2d_bytes_per_second: Sourced
    d2h_bytes_per_second: Sourced
    duplex_h2d_bytes_per_second: Sourced
    duplex_d2h_bytes_per_second: Sourced
    pageable_h2d_bytes_per_second: Sourced | None
    pageable_d2h_bytes_per_second: Sourced | None
    latency_seconds: Sourced


class HostProfile(Record):
    """One class of host. Memory rates count bytes read plus bytes written."""

    key: str
    name: str
    num_cores: Count
    gather_bytes_per_second: Sourced
    scatter_bytes_per_second: Sourced
    adamw_bytes_per_second: Sourced
    gemm_flops_per_second: Sourced
    select_scores_per_second: Sourced
    """Scores per second that top-K selection and the union over tokens go through."""
    overhead_seconds_per_layer: Sourced
    """Python and synchronisation per layer and direction, once per routed layer."""


class LayerSparsity(Record):
    """Union growth of one layer: ``A/R = 1 - (1 - K/R)^(T^alpha)``."""

    alpha: Annotated[float, Field(gt=0.0, le=1.0)]


class SparsityProfile(Record):
    """Measured or assumed activation sparsity of an adapter. One layer entry serves every layer."""

    key: str
    name: str
    basis: Basis
    source: str
    layers: tuple[LayerSparsity, ...]
    spread_fraction: Fraction
    """How far above the mean the active rows of a batch may lie, as a fraction of the mean."""
    prefetch_recall_by_depth: tuple[Fraction, ...]
    """Recall for depth 0, 1, 2, ...; depth 0 is exact, so the first is 1."""


__all__ = [
    "GpuProfile",
    "HostProfile",
    "LayerSparsity",
    "LinkProfile",
    "Rate",
    "Seconds",
    "Sourced",
    "SourcedRange",
    "SparsityProfile",
]
