"""Profiles: what is known of GPUs, links, hosts and sparsity, each number with its basis and source.

Where they are read from: :mod:`meft.planner.records.profile_catalogue`. Letters: ``e`` bytes per number in the
adapter's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from meft.planner.base.errors import UsageError
from meft.planner.base.schema import (
    Basis,
    Count,
    Fraction,
    Index,
    Record,
    Text,
)

Section = Literal["host", "gpu", "link", "sparsity"]
"""What a file of ``meft-profile`` may hold."""


class Sourced(Record):
    """A number and where it comes from."""

    value: Annotated[float, Field(ge=0.0)]
    basis: Basis
    source: Text


def _above_zero(number: Sourced) -> Sourced:
    if number.value <= 0:
        raise ValueError("value is not above zero")
    return number


def _at_most_one(number: Sourced) -> Sourced:
    if number.value > 1:
        raise ValueError("value is above 1, which no efficiency is")
    return _above_zero(number)


Positive = Annotated[Sourced, AfterValidator(_above_zero)]
"""A rate or a size."""
Efficiency = Annotated[Sourced, AfterValidator(_at_most_one)]
"""A share in (0, 1]."""


class SourcedRange(Record):
    """A range of bytes, both ends included, and where it comes from."""

    low_bytes: Index
    high_bytes: Index
    basis: Basis
    source: Text

    @model_validator(mode="after")
    def _ordered(self) -> SourcedRange:
        if self.low_bytes > self.high_bytes:
            raise ValueError(f"low_bytes {self.low_bytes} is above high_bytes {self.high_bytes}")
        return self


class GpuProfile(Record):
    """One card. Rates are dense peaks; the efficiencies say which share of them a fine-tuning step reaches."""

    key: Text
    name: Text
    aliases: tuple[str, ...] = ()
    architecture: str
    memory_total_bytes: Positive | None
    """The total that NVML reports; None for the emulated device, which has only the budget it is given."""
    memory_bytes_per_second: Positive
    bf16_flops_per_second: Positive | None
    """None where the card has no bf16 units."""
    fp16_flops_per_second: Positive | None = None
    """Only where it differs from bf16, which is the case where bf16 is absent."""
    fp32_flops_per_second: Positive
    matmul_efficiency: Efficiency
    memory_efficiency: Efficiency
    kernel_launch_seconds: Sourced
    """Per kernel, on top of its arithmetic or traffic."""
    context: SourcedRange
    """What the CUDA context and modules take outside the allocator."""
    workspace_bytes: Sourced
    """cuBLAS workspace per handle and stream."""
    link: str
    """Key of the link class of the card's slot."""
    shares_host_cores: bool = False
    """True for the emulated device, which computes on the host."""

    @property
    def total_bytes(self) -> int:
        """The memory total; raises :class:`UsageError` where the profile has none."""
        if self.memory_total_bytes is None:
            raise UsageError(f"GPU {self.key} has no memory of its own: say how much it may use, such as --gpu-mem 2GB")
        return int(self.memory_total_bytes.value)


class LinkProfile(Record):
    """One class of host-device link. ``duplex`` rates hold while the other direction is busy too."""

    key: Text
    name: Text
    aliases: tuple[str, ...] = ()
    h2d_bytes_per_second: Positive
    d2h_bytes_per_second: Positive
    duplex_h2d_bytes_per_second: Positive
    duplex_d2h_bytes_per_second: Positive
    pageable_h2d_bytes_per_second: Positive | None
    pageable_d2h_bytes_per_second: Positive | None
    latency_seconds: Sourced
    """Per copy, on top of bytes over rate."""


class HostProfile(Record):
    """One class of host. Memory rates count bytes read plus bytes written."""

    key: Text
    name: Text
    aliases: tuple[str, ...] = ()
    num_cores: Count
    gather_bytes_per_second: Positive
    """Rows to staging: ``2e`` bytes per number, or ``4 + 2e`` where fp32 is rounded to bf16 on the way: what is written
    then passes through the cache and counts twice."""
    scatter_bytes_per_second: Positive
    """Row gradients added to the window's fp32 sum: ``e + 8`` bytes per number."""
    adamw_bytes_per_second: Positive
    """The optimizer step on touched rows, clipping norm and clearing included: 28 bytes per number (weight and two
    moments read and written, gradient read)."""
    gemm_flops_per_second: Positive
    select_scores_per_second: Positive
    """Scores per second that top-K selection and the union over tokens go through."""
    overhead_seconds_per_layer: Sourced
    """Python and synchronisation per layer and direction, once per routed layer."""
    overhead_seconds_per_expert: Sourced
    """Python per expert that some token probes: Key-Experts routing goes through them one after the other."""
    launch_attention_seconds: Sourced | None = None
    """What the thread that launches needs for the attention of a LLaMA's layer, in Python; the five below likewise, of
    a step without anything to wait for. None: nobody measured it here, and plans leave it out."""
    launch_router_seconds: Sourced | None = None
    launch_ffn_seconds: Sourced | None = None
    launch_adapter_seconds: Sourced | None = None
    launch_adapter_backward_seconds: Sourced | None = None
    launch_backward_seconds: Sourced | None = None
    busy_rates_fraction: Positive | None = None
    """What is left of the rates while Python launches beside; None: nobody measured it, and plans leave it out."""
    bound_rates_fraction: Positive | None = None
    """The same with the kernels' threads on cores of their own."""


TYPICAL_TOKENS = 512
TYPICAL_SHARE = 1 / 32
"""Where a layer's law is centred: the default micro-batch, and K = 64 of R = 2048."""


class LayerSparsity(Record):
    """Union growth of one layer: ``A/R = 1 - (1 - K/R)^q`` with ``q(T, K/R)`` effective tokens; see
    :mod:`meft.planner.traffic.sparsity`. With ``alpha`` alone it is ``q = T^alpha``."""

    alpha: Annotated[float, Field(gt=0.0, le=1.0)]
    """How effective tokens grow with tokens: ``q ~ T^alpha`` at a share ``K/R`` of 1/32."""
    log_level: Annotated[float, Field(ge=0.0)] | None = None
    """``ln q`` at 512 tokens and that share; None: ``alpha * ln 512``."""
    level_slope: float = 0.0
    level_curve: float = 0.0
    """How ``ln q`` changes with ``ln(K/R)``, linearly and squared."""
    alpha_slope: float = 0.0
    """How ``alpha`` changes with ``ln(K/R)``."""
    growth_curve: float = 0.0
    """How ``ln q`` bends with ``ln T``, between 64 and 2048 tokens; beyond them it goes on straight."""


class Popularity(Record):
    """The most popular rows of a layer: their share of its rows, and of the active rows of micro-batches."""

    rows: Annotated[float, Field(gt=0.0, lt=1.0)]
    traffic: Annotated[float, Field(gt=0.0, le=1.0)]


class SparsityProfile(Record):
    """Measured or assumed activation sparsity of an adapter. One layer entry serves every layer."""

    key: Text
    name: Text
    aliases: tuple[str, ...] = ()
    basis: Basis
    source: Text
    layers: Annotated[tuple[LayerSparsity, ...], Field(min_length=1)]
    spread_fraction: Fraction
    """How far above the mean the active rows of a batch may lie, as a fraction of the mean: in 99 of 100 batches they
    lie no higher."""
    filled_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a micro-batch's positions that hold tokens: padding activates nothing."""
    sequence_tokens: tuple[Count, ...] = ()
    """Lengths of the data's sequences at equal steps of their quantiles, the shortest first and the longest last; where
    they are known, the share that is filled follows from them for any ``seq_len``."""
    least_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    greatest_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Range of ``K/R`` that was measured; beyond it the law of its end holds."""
    key_experts_level: Annotated[float, Field(ge=-5.0, le=5.0)] = 0.0
    """What Key-Experts routing adds to every layer's ``ln q``: tokens that probe other experts share fewer rows."""
    prefetch_recall_by_depth: Annotated[tuple[Fraction, ...], Field(min_length=1)]
    """Recall for depth 0, 1, 2, ...; depth 0 is exact, so the first is 1."""

    popularity: tuple[Popularity, ...] = ()
    """How much the most popular rows carry, by ascending share of rows; empty where that is not known."""

    @model_validator(mode="after")
    def _popularity_rises(self) -> SparsityProfile:
        points = [(0.0, 0.0), *((point.rows, point.traffic) for point in self.popularity)]
        for (rows, traffic), (more_rows, more_traffic) in pairwise(points):
            if more_rows <= rows or more_traffic < traffic:
                raise ValueError("popularity: rows must ascend, and traffic must not fall")
            if more_traffic < more_rows:
                raise ValueError(f"popularity: the first {more_rows} of the rows carry less than that, {more_traffic}")
        return self

    @model_validator(mode="after")
    def _depth_zero_is_exact(self) -> SparsityProfile:
        if self.prefetch_recall_by_depth[0] != 1.0:
            raise ValueError("prefetch_recall_by_depth: depth 0 routes from the exact hidden state, its recall is 1")
        return self

    @model_validator(mode="after")
    def _lengths_ascend(self) -> SparsityProfile:
        if list(self.sequence_tokens) != sorted(self.sequence_tokens) or len(self.sequence_tokens) == 1:
            raise ValueError("sequence_tokens: give none, or two lengths or more, the shortest first")
        return self


class Defaults(Record):
    """The profiles used where a request names none; the link is the one of the GPU's slot."""

    gpu: str
    host: str
    sparsity: str
    model: str


def sourced_numbers(profile: Record) -> Iterator[tuple[str, Sourced]]:
    """Every number of a profile that carries its basis and source, by field name."""
    for field in type(profile).model_fields:
        value = getattr(profile, field)
        if isinstance(value, Sourced):
            yield field, value
