"""How many adapter rows a batch activates, and how well look-ahead finds them.

Each token takes ``K`` of ``R`` rows. Were the picks of ``T`` tokens independent, their union would leave
``(1 - K/R)^T`` of the rows out; tokens of a text agree, so it grows as if there were only ``T^alpha`` of them:

    A / R = 1 - (1 - K/R)^(T^alpha)            0 < alpha <= 1, measured per layer

Letters: ``T`` tokens, ``R`` adapter rows per layer, ``K`` rows per token, ``A`` active rows, ``L`` layers.
Layers are the first axis of every array that has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meft.planner.errors import UsageError
from meft.planner.plan import Decision, Request, Sparsity
from meft.planner.profiles import SparsityProfile
from meft.planner.quantities import Floats, Ints


def active_fraction(*, tokens: Ints, top_k: Ints, adapter_width: Ints, alpha: Floats) -> Floats:
    """``A / R`` in ``[K/R, 1]``, exactly ``K/R`` for one token and exactly 1 for ``K = R``.

    Written as the first token's share plus what the others add, which is what makes both ends exact.
    """
    share = top_k / adapter_width
    other_tokens = np.power(tokens, alpha) - 1.0
    fraction: Floats = share + (1.0 - share) * (1.0 - np.power(1.0 - share, other_tokens))
    return fraction


def active_rows(*, tokens: Ints, top_k: Ints, adapter_width: Ints, alpha: Floats) -> Ints:
    """``A``, the nearest whole number of rows; between ``K`` and the smaller of ``R`` and ``T*K``."""
    fraction = active_fraction(tokens=tokens, top_k=top_k, adapter_width=adapter_width, alpha=alpha)
    rows = np.clip(np.rint(fraction * adapter_width), top_k, np.minimum(adapter_width, tokens * top_k))
    return int(rows) if np.ndim(rows) == 0 else rows.astype(np.int64)


def layer_alphas(profile: SparsityProfile, num_layers: int) -> NDArray[np.float64]:
    """The exponents ``[L]``, or ``[1]`` where one entry serves every layer.

    Raises :class:`UsageError` when the profile has another number of layers.
    """
    if len(profile.layers) not in (1, num_layers):
        raise UsageError(
            f"sparsity profile {profile.key!r} has {len(profile.layers)} layers but the model has {num_layers}; "
            f"use a profile with {num_layers} layers, or with one that serves every layer"
        )
    return np.array([layer.alpha for layer in profile.layers])


def active_rows_per_layer(
    profile: SparsityProfile, num_layers: int, *, tokens: Ints, top_k: Ints, adapter_width: Ints
) -> NDArray[np.int64]:
    """``A`` of each layer: ``[L]`` for one decision, ``[L, candidates]`` for arrays of them.

    Where one entry serves every layer the result is a read-only view that holds it once.
    """
    alphas = layer_alphas(profile, num_layers)
    shape = np.broadcast_shapes(np.shape(tokens), np.shape(top_k), np.shape(adapter_width))
    alphas = alphas.reshape(-1, *(1,) * len(shape))
    rows = np.asarray(active_rows(tokens=tokens, top_k=top_k, adapter_width=adapter_width, alpha=alphas))
    return np.broadcast_to(rows, (num_layers, *shape))


def distinct_layers(per_layer: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first layer alone (``[1, ...]``) if the array repeats it by construction, otherwise the array itself."""
    return per_layer[:1] if per_layer.strides[0] == 0 else per_layer


def every_layer_the_mean(per_layer: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[L, ...]`` with each layer's rows replaced by their mean, rounded: a view that holds it once.

    Bytes stay the same to a row per layer and time nearly so, at a fraction of the work: for weighing many candidates.
    """
    return np.broadcast_to(np.rint(per_layer.mean(axis=0)).astype(np.int64), per_layer.shape)


def highest_active_rows(*, active_rows: Ints, spread_fraction: float, adapter_width: Ints) -> Ints:
    """The most rows that a batch is expected to activate where the mean is ``active_rows``; what a cap should hold."""
    rows = np.minimum(np.ceil(active_rows * (1.0 + spread_fraction)), adapter_width)
    return int(rows) if np.ndim(rows) == 0 else rows.astype(np.int64)


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


@dataclass(frozen=True)
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
    top_k: Ints,
    adapter_width: Ints,
    grad_accum: int,
    cached_rows: Ints,
    active_rows_cap: Ints,
) -> WindowRows:
    """What travels when a layer keeps the first ``C`` rows that the window activates.

    The union of ``m`` micro-batches is that of ``m * T`` tokens, so the next one brings what the union grows by. Once
    ``C`` are kept, every further micro-batch is taken to miss as many as the next one would have: micro-batches are
    alike, and those kept are the rows of the first ones.
    """

    def union(micro_batches: int) -> NDArray[np.int64]:
        rows = active_rows_per_layer(
            profile, num_layers, tokens=tokens * micro_batches, top_k=top_k, adapter_width=adapter_width
        )
        return np.minimum(distinct_layers(rows), active_rows_cap * micro_batches)

    before = np.zeros_like(union(1))
    missing = overflow = before.astype(np.float64)
    missed: NDArray[np.int64] = union(1)
    for micro_batch in range(1, grad_accum + 1):
        after = union(micro_batch)
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


def predict_sparsity(profile: SparsityProfile, *, request: Request, decision: Decision) -> Sparsity:
    """Active rows of a micro-batch and of an accumulation window, per layer, under the decision's cap."""
    num_layers, tokens = request.model.num_layers, request.tokens_per_step
    width, top_k, cap = decision.adapter_width, decision.top_k, decision.active_rows_cap
    step = active_rows_per_layer(profile, num_layers, tokens=tokens, top_k=top_k, adapter_width=width)
    window_tokens = tokens * request.grad_accum
    window = active_rows_per_layer(profile, num_layers, tokens=window_tokens, top_k=top_k, adapter_width=width)
    cached: dict[str, tuple[int, ...]] = {}
    if decision.cached_rows:
        rows = window_rows(
            profile,
            num_layers,
            tokens=tokens,
            top_k=top_k,
            adapter_width=width,
            grad_accum=request.grad_accum,
            cached_rows=decision.cached_rows,
            active_rows_cap=cap,
        )
        cached = {
            "missing_rows_per_layer": tuple(rows.missing.tolist()),
            "overflow_rows_per_layer": tuple(rows.overflow.tolist()),
            "kept_rows_per_layer": tuple(rows.kept.tolist()),
        }
    return Sparsity(
        active_rows_per_layer=tuple(capped(step, cap=cap).tolist()),
        window_active_rows_per_layer=tuple(capped(window, cap=cap * request.grad_accum).tolist()),
        prefetch_recall=float(prefetch_recall(profile, prefetch_depth=decision.prefetch_depth)),
        basis=profile.basis,
        **cached,
    )
