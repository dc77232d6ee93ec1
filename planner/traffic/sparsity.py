"""How many adapter rows a batch activates, and how well look-ahead finds them.

Each token takes ``K`` of ``R`` rows. Were the picks of ``T`` tokens independent, their union would leave
``(1 - K/R)^T`` of the rows out; tokens of a text agree, so it grows as if there were only ``q`` of them:

    A / R = 1 - (1 - K/R)^q            1 <= q <= T
    ln q  = log_level + level_slope*s + level_curve*s^2 + (alpha + alpha_slope*s) * t + growth_curve * t^2
    s     = ln(K/R) - ln(1/32),   t = ln(T/512)

per layer, where Key-Experts routing adds a number of its own to ``ln q``. That ``A/R`` depends on ``K`` and ``R`` by
their ratio alone was measured (SmolLM2, R from 256 to 4096 and K from 8 to 128 agree along equal ratios). Where only
``alpha`` is known, ``q = T^alpha``.

Letters: ``T`` tokens, ``R`` adapter rows per layer, ``K`` rows per token, ``A`` active rows, ``L`` layers, ``q``
effective tokens. Layers are the first axis of every array that has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.errors import UsageError
from meft.planner.base.quantities import Flags, Floats, Ints, Reals
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Decision, Request, Sparsity
from meft.planner.records.profiles import TYPICAL_SHARE, TYPICAL_TOKENS, LayerSparsity, SparsityProfile
from meft.planner.traffic.hot_rows import HotRows, hot_active_rows, hot_share

BENT_FROM, BENT_UP_TO = math.log(64 / TYPICAL_TOKENS), math.log(2048 / TYPICAL_TOKENS)
"""Range of ``t`` in which growth may bend: what is measured."""
SPREAD_QUANTILE = 0.99
"""What a profile's ``spread_fraction`` stands for."""
SPREAD_DEVIATIONS = 2.3263478740408408
"""Standard deviations above the mean at which a normal distribution's :data:`SPREAD_QUANTILE` lies."""


def active_fraction(*, tokens: Ints, top_k: Ints, adapter_width: Ints, alpha: Floats) -> Floats:
    """``A / R`` of the law with ``alpha`` alone, in ``[K/R, 1]``."""
    return union_fraction(top_k / adapter_width, effective_tokens=np.power(tokens, alpha))


def union_fraction(share: Floats, *, effective_tokens: Floats) -> Floats:
    """``A / R`` for ``share = K/R``: exactly that share for one token, and exactly 1 for ``K = R``.

    Written as the first token's share plus what the others add, which is what makes both ends exact.
    """
    fraction: Floats = share + (1.0 - share) * (1.0 - np.power(1.0 - share, effective_tokens - 1.0))
    return fraction


def active_rows(*, tokens: Ints, top_k: Ints, adapter_width: Ints, alpha: Floats) -> Ints:
    """``A`` of the law with ``alpha`` alone; between ``K`` and the smaller of ``R`` and ``T*K``."""
    fraction = active_fraction(tokens=tokens, top_k=top_k, adapter_width=adapter_width, alpha=alpha)
    return _whole_rows(fraction, tokens=tokens, top_k=top_k, adapter_width=adapter_width)


def _whole_rows(fraction: Floats, *, tokens: Reals, top_k: Ints, adapter_width: Ints) -> Ints:
    """The nearest whole number, within what is possible."""
    most = np.maximum(np.minimum(adapter_width, np.floor(tokens * top_k)), top_k)
    rows = np.clip(np.rint(fraction * adapter_width), top_k, most)
    return int(rows) if np.ndim(rows) == 0 else rows.astype(np.int64)


@dataclass(frozen=True, eq=False, repr=False)
class LayerLaws:
    """The laws of all layers, each parameter ``[L, 1, ...]`` ready to broadcast over decisions."""

    alpha: NDArray[np.float64]
    log_level: NDArray[np.float64]
    level_slope: NDArray[np.float64]
    level_curve: NDArray[np.float64]
    alpha_slope: NDArray[np.float64]
    growth_curve: NDArray[np.float64]
    least_share: float = 1e-6
    greatest_share: float = 1.0
    key_experts_level: float = 0.0

    def effective_tokens(self, *, tokens: Reals, share: Floats, key_experts: Flags = False) -> Floats:
        """``q``, from 1 to ``T``."""
        log_tokens = np.log(np.maximum(tokens, 1.0))
        measured_share = np.clip(share, self.least_share, self.greatest_share)
        offset = np.log(measured_share) - math.log(TYPICAL_SHARE)
        growth = np.clip(self.alpha + self.alpha_slope * offset, 0.0, 1.0)
        level = self.log_level + offset * (self.level_slope + offset * self.level_curve)
        level = level + self.key_experts_level * key_experts
        log_effective = level + grown(log_tokens - math.log(TYPICAL_TOKENS), growth=growth, curve=self.growth_curve)
        effective: Floats = np.exp(np.clip(log_effective, 0.0, log_tokens))
        return effective


def grown(log_tokens: Floats, *, growth: Floats, curve: Floats) -> Floats:
    """``growth * t + curve * t^2`` within the range of a bend, straight beyond it, and falling nowhere."""
    curve = np.clip(curve, -growth / (2 * BENT_UP_TO), growth / (2 * -BENT_FROM))
    bent = np.clip(log_tokens, BENT_FROM, BENT_UP_TO)
    slope = np.clip(growth + 2 * curve * bent, 0.0, 1.0)
    total: Floats = growth * bent + curve * bent * bent + slope * (log_tokens - bent)
    return total


def profile_laws(profile: SparsityProfile, *, axes: int = 0) -> LayerLaws:
    """The laws of a profile's layers with what it says of all of them."""
    return replace(
        layer_laws(profile.layers, axes=axes),
        least_share=profile.least_share,
        greatest_share=profile.greatest_share,
        key_experts_level=profile.key_experts_level,
    )


def layer_laws(layers: Sequence[LayerSparsity], *, axes: int = 0) -> LayerLaws:
    """The laws of layers, with ``axes`` axes after that of the layers."""

    def column(values: Iterable[float]) -> NDArray[np.float64]:
        return np.array(list(values)).reshape(-1, *(1,) * axes)

    levels = (
        layer.alpha * math.log(TYPICAL_TOKENS) if layer.log_level is None else layer.log_level for layer in layers
    )
    return LayerLaws(
        alpha=column(layer.alpha for layer in layers),
        log_level=column(levels),
        level_slope=column(layer.level_slope for layer in layers),
        level_curve=column(layer.level_curve for layer in layers),
        alpha_slope=column(layer.alpha_slope for layer in layers),
        growth_curve=column(layer.growth_curve for layer in layers),
    )


def check_layers(profile: SparsityProfile, num_layers: int) -> None:
    """Raise :class:`UsageError` unless the profile has one layer for all or as many as the model."""
    if len(profile.layers) not in (1, num_layers):
        raise UsageError(
            f"sparsity profile {profile.key!r} has {len(profile.layers)} layers but the model has {num_layers}; "
            f"use a profile with {num_layers} layers, or with one that serves every layer"
        )


def active_rows_per_layer(
    profile: SparsityProfile,
    num_layers: int,
    *,
    tokens: Ints,
    top_k: Ints,
    adapter_width: Ints,
    key_experts: Flags = False,
) -> NDArray[np.int64]:
    """``A`` of each layer: ``[L]`` for one decision, ``[L, candidates]`` for arrays of them.

    ``tokens`` are positions; the profile's share of them holds tokens. Where one entry serves every layer the result is
    a read-only view that holds it once. Raises :class:`UsageError` when the profile has another number of layers.
    """
    check_layers(profile, num_layers)
    shape = np.broadcast_shapes(*map(np.shape, (tokens, top_k, adapter_width, key_experts)))
    laws = profile_laws(profile, axes=len(shape))
    filled = np.maximum(np.multiply(tokens, profile.filled_fraction), 1.0)
    share = np.true_divide(top_k, adapter_width)
    effective = laws.effective_tokens(tokens=filled, share=share, key_experts=key_experts)
    fraction = union_fraction(share, effective_tokens=effective)
    rows = np.asarray(_whole_rows(fraction, tokens=filled, top_k=top_k, adapter_width=adapter_width))
    return np.broadcast_to(rows, (num_layers, *shape))


def at_seq_len(profile: SparsityProfile, seq_len: int) -> SparsityProfile:
    """The profile with the share of positions that hold tokens when sequences are cut or padded to ``seq_len``.

    It follows from the lengths of the data's sequences; a profile that does not have them stays as it is.
    """
    if not profile.sequence_tokens:
        return profile
    lengths = np.minimum(np.array(profile.sequence_tokens, dtype=np.float64), seq_len)
    mean = float((lengths[:-1] + lengths[1:]).mean()) / 2
    return profile.model_copy(update={"filled_fraction": mean / seq_len, "sequence_tokens": ()})


def distinct_layers(per_layer: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first layer alone (``[1, ...]``) if the array repeats it by construction, otherwise the array itself."""
    return per_layer[:1] if per_layer.strides[0] == 0 else per_layer


def highest_active_rows(*, active_rows: Ints, spread_fraction: float, adapter_width: Ints) -> Ints:
    """The most rows that a batch is expected to activate where the mean is ``active_rows``; what a cap should hold."""
    rows = np.minimum(np.ceil(active_rows * (1.0 + spread_fraction)), adapter_width)
    return int(rows) if np.ndim(rows) == 0 else rows.astype(np.int64)


def spread_at(spread_fraction: float, *, quantile: float) -> float:
    """How far above the mean the given share of batches lies at the most; ``spread_fraction`` holds for 99 in 100.

    Batches are taken as normally distributed about their mean for any other share.
    """
    return spread_fraction * _deviations(quantile) / SPREAD_DEVIATIONS


def _deviations(quantile: float) -> float:
    """So many standard deviations above the mean that share of a normal distribution ends."""
    if quantile == SPREAD_QUANTILE:
        return SPREAD_DEVIATIONS
    import statistics  # slow to load

    return statistics.NormalDist().inv_cdf(quantile)


def prefetch_recall(profile: SparsityProfile, *, prefetch_depth: Ints) -> Floats:
    """Share of the exact choice that look-ahead by ``prefetch_depth`` layers finds.

    Beyond the deepest depth of the profile its value stays, since nothing is known there.
    """
    recalls = np.array(profile.prefetch_recall_by_depth)
    recall = recalls[np.minimum(prefetch_depth, recalls.size - 1)]
    return float(recall) if np.ndim(recall) == 0 else recall


def capped(rows: NDArray[np.int64], *, cap: Ints) -> NDArray[np.int64]:
    """``rows [L, ...]`` cut to ``cap``; layers that are one by construction stay one."""
    return np.broadcast_to(np.minimum(distinct_layers(rows), cap), np.broadcast_shapes(rows.shape, np.shape(cap)))


@dataclass(frozen=True, eq=False, repr=False)
class WindowRows:
    """Rows of an accumulation window of which up to ``C`` per layer stay on the device. All ``[L, ...]``.

    ``missing`` and ``overflow`` are means over the window's micro-batches, rounded.
    """

    missing: NDArray[np.int64]
    overflow: NDArray[np.int64]
    kept: NDArray[np.int64]


def window_rows(
    profile: SparsityProfile,
    num_layers: int,
    *,
    tokens: Ints,
    grad_accum: int,
    candidates: Candidates,
) -> WindowRows:
    """What travels when a layer keeps the first ``C`` rows that the window activates; hot rows are left out.

    The union of ``m`` micro-batches is that of ``m * T`` tokens, so the next one brings what the union grows by. Once
    ``C`` are kept, every further micro-batch is taken to miss as many as the next one would have: micro-batches are
    alike, and those kept are the rows of the first ones.
    """

    cached_rows = candidates.cached_rows
    unions = _window_unions(profile, num_layers, tokens=tokens, grad_accum=grad_accum, candidates=candidates)
    missed = unions[:, 0]
    before = np.zeros_like(missed)
    missing = overflow = before.astype(np.float64)
    for after in np.moveaxis(unions, 1, 0):
        full = before >= cached_rows
        missed = np.where(full, missed, after - before)
        missing = missing + missed
        overflow = overflow + np.where(full, missed, np.maximum(after - cached_rows, 0))
        before = after
    shape = (num_layers, *np.broadcast_shapes(before.shape[1:], np.shape(cached_rows)))

    def mean(total: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.broadcast_to(np.rint(total / grad_accum).astype(np.int64), shape)

    kept = np.broadcast_to(np.minimum(before, cached_rows), shape)
    return WindowRows(missing=mean(missing), overflow=mean(overflow), kept=kept)


def _window_unions(
    profile: SparsityProfile, num_layers: int, *, tokens: Ints, grad_accum: int, candidates: Candidates
) -> NDArray[np.int64]:
    """Rows that the first 1, 2, ... micro-batches of a window activate, without hot ones: ``[L, grad_accum, ...]``,
    layers that are one by construction once."""
    width, hot_rows = candidates.adapter_width, candidates.hot_rows
    of_decisions = (candidates.top_k, width, candidates.in_experts, candidates.active_rows_cap, hot_rows)
    axes = max(map(np.ndim, of_decisions))
    micro_batches = np.arange(1, grad_accum + 1).reshape(-1, *(1,) * axes)
    rows = active_rows_per_layer(
        profile,
        num_layers,
        tokens=tokens * micro_batches,
        top_k=candidates.top_k,
        adapter_width=width,
        key_experts=candidates.in_experts,
    )
    rows = np.minimum(distinct_layers(rows), candidates.active_rows_cap * micro_batches)
    return rows - hot_active_rows(
        rows, hot_rows=hot_rows, share=hot_share(profile, hot_rows=hot_rows, adapter_width=width)
    )


def hot_rows_among(
    profile: SparsityProfile,
    *,
    hot_rows: Ints,
    adapter_width: Ints,
    active_rows: NDArray[np.int64],
    window_active_rows: NDArray[np.int64],
) -> HotRows | None:
    """The hot ones among active rows ``[L, ...]`` of a micro-batch and of a window; None where no rows are hot."""
    if not np.any(hot_rows):
        return None
    share = hot_share(profile, hot_rows=hot_rows, adapter_width=adapter_width)

    def among(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.broadcast_to(hot_active_rows(distinct_layers(rows), hot_rows=hot_rows, share=share), rows.shape)

    return HotRows(per_layer=hot_rows, active=among(active_rows), in_window=among(window_active_rows))


def expected_active_rows(
    profile: SparsityProfile, *, request: Request, decision: Decision, micro_batches: int = 1
) -> NDArray[np.int64]:
    """Rows that so many micro-batches activate together, ``[L]``, were there no cap."""
    return active_rows_per_layer(
        at_seq_len(profile, request.seq_len),
        request.model.num_layers,
        tokens=request.tokens_per_step * micro_batches,
        top_k=decision.top_k,
        adapter_width=decision.adapter_width,
        key_experts=decision.needs.in_experts,
    )


def predict_sparsity(profile: SparsityProfile, *, request: Request, decision: Decision) -> Sparsity:
    """Active rows of a micro-batch and of an accumulation window, per layer, under the decision's cap."""
    num_layers, tokens = request.model.num_layers, request.tokens_per_step
    width, cap = decision.adapter_width, decision.active_rows_cap
    step, window = (
        expected_active_rows(profile, request=request, decision=decision, micro_batches=micro_batches)
        for micro_batches in (1, request.grad_accum)
    )
    profile = at_seq_len(profile, request.seq_len)
    cached: dict[str, tuple[int, ...]] = {}
    if decision.cached_rows:
        rows = window_rows(
            profile, num_layers, tokens=tokens, grad_accum=request.rounds, candidates=Candidates.of(decision)
        )
        cached = {
            "missing_rows_per_layer": tuple(rows.missing.tolist()),
            "overflow_rows_per_layer": tuple(rows.overflow.tolist()),
            "kept_rows_per_layer": tuple(rows.kept.tolist()),
        }
    active, in_window = capped(step, cap=cap), capped(window, cap=cap * request.grad_accum)
    hot = hot_rows_among(
        profile, hot_rows=decision.hot_rows, adapter_width=width, active_rows=active, window_active_rows=in_window
    )
    quantile = request.active_rows_quantile
    spread = spread_at(profile.spread_fraction, quantile=quantile)
    highest = np.asarray(highest_active_rows(active_rows=step, spread_fraction=spread, adapter_width=width))
    return Sparsity(
        quantile=quantile,
        quantile_rows_per_layer=tuple(highest.tolist()),
        active_rows_per_layer=tuple(active.tolist()),
        window_active_rows_per_layer=tuple(in_window.tolist()),
        hot_rows_per_layer=() if hot is None else tuple(hot.active.tolist()),
        prefetch_recall=float(prefetch_recall(profile, prefetch_depth=decision.prefetch_depth)),
        basis=profile.basis,
        **cached,
    )
