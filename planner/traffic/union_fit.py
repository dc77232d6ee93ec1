"""Fitting the law of :mod:`meft.planner.traffic.sparsity` to measured unions, and its error on points that it did not
see.

Letters: ``T`` tokens, ``R`` adapter rows per layer, ``K`` rows per token, ``A`` active rows, ``L`` layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meft.planner.records.profiles import TYPICAL_SHARE, TYPICAL_TOKENS, LayerSparsity
from meft.planner.traffic.sparsity import grown, layer_laws, union_fraction

POINTS_FOR_SHARES = 6
"""Points of as many as three shares from which the law's dependence on ``K/R`` is fitted; fewer leave it out."""
_DIGITS = 5
_MOST_FRACTION = 1 - 1e-6


@dataclass(frozen=True)
class UnionPoints:
    """Measured unions: ``tokens``, ``shares`` (``K/R``) ``[points]``, and ``fractions`` (mean ``A/R``)
    ``[L, points]``."""

    tokens: NDArray[np.float64]
    shares: NDArray[np.float64]
    fractions: NDArray[np.float64]

    def where(self, chosen: NDArray[np.bool_]) -> UnionPoints:
        """The points that are chosen."""
        return UnionPoints(self.tokens[chosen], self.shares[chosen], self.fractions[:, chosen])


@dataclass(frozen=True)
class FitError:
    """Relative errors of ``A``, absolute values, over layers and points."""

    mean: float
    worst_point: float
    """Of the point with the largest mean over layers."""
    worst: float
    """Of any layer at any point."""
    worst_total: float
    """Of the mean over layers of the rows, which traffic follows, at the worst point."""
    points: int


def fit_layers(points: UnionPoints) -> tuple[LayerSparsity, ...]:
    """The law of each layer, by least squares of the relative error of ``A``.

    With points of three shares or more all six parameters, with fewer level and growth. Raises :class:`ValueError`
    for points of fewer than two token counts: growth does not follow from them.
    """
    if len(np.unique(points.tokens)) < 2:
        raise ValueError("growth with tokens does not follow from one number of tokens")
    shares = len(np.unique(points.shares)) >= 3 and points.tokens.size >= POINTS_FOR_SHARES
    return tuple(_fit_layer(points.tokens, points.shares, row, with_shares=shares) for row in points.fractions)


def _fit_layer(
    tokens: NDArray[np.float64], shares: NDArray[np.float64], fractions: NDArray[np.float64], *, with_shares: bool
) -> LayerSparsity:
    from scipy.optimize import least_squares

    offset = np.log(shares) - math.log(TYPICAL_SHARE)
    alpha, level = _first_guess(tokens, shares, fractions)
    start = [alpha, level, 0.0, 0.0, 0.0, 0.0] if with_shares else [alpha, level]
    log_tokens = np.log(tokens)

    def residuals(values: NDArray[np.float64]) -> NDArray[np.float64]:
        given = np.concatenate([values, np.zeros(6 - len(values))])
        growth = np.clip(given[0] + given[4] * offset, 0.0, 1.0)
        level = given[1] + offset * (given[2] + offset * given[3])
        log_effective = level + grown(log_tokens - _LOG_TYPICAL, growth=growth, curve=given[5])
        effective = np.exp(np.clip(log_effective, 0.0, log_tokens))
        relative: NDArray[np.float64] = union_fraction(shares, effective_tokens=effective) / fractions - 1
        return relative

    lowest, highest = [1e-4, 0.0, -5.0, -5.0, -1.0, -0.3], [1.0, 30.0, 5.0, 5.0, 1.0, 0.3]
    bounds = (lowest[: len(start)], highest[: len(start)])
    found = least_squares(residuals, np.clip(start, *bounds), bounds=bounds, x_scale=0.1).x
    rounded = [round(float(value), _DIGITS) for value in found] + [0.0] * (6 - len(found))
    names = ("alpha", "log_level", "level_slope", "level_curve", "alpha_slope", "growth_curve")
    return LayerSparsity(**dict(zip(names, rounded, strict=True)))


_LOG_TYPICAL = math.log(TYPICAL_TOKENS)


def _first_guess(
    tokens: NDArray[np.float64], shares: NDArray[np.float64], fractions: NDArray[np.float64]
) -> tuple[float, float]:
    """A straight line through ``ln q`` over ``ln T``, full unions left out of it where there are others."""
    usable = fractions < 0.99 if (fractions < 0.99).sum() >= 2 else np.ones(len(fractions), np.bool_)
    effective = np.log1p(-np.minimum(fractions, _MOST_FRACTION)) / np.log1p(-np.minimum(shares, _MOST_FRACTION))
    logs = np.log(np.maximum(effective[usable], 1.0))
    centred = np.log(tokens[usable]) - _LOG_TYPICAL
    if np.ptp(centred) == 0:
        return 0.5, float(logs.mean())
    slope, level = np.polyfit(centred, logs, 1)
    return float(np.clip(slope, 0.01, 0.99)), float(max(level, 0.0))


def predicted_fractions(layers: Sequence[LayerSparsity], points: UnionPoints) -> NDArray[np.float64]:
    """``A/R`` of every layer at every point, ``[L, points]``."""
    laws = layer_laws(layers, axes=1)
    effective = laws.effective_tokens(tokens=points.tokens, share=points.shares)
    return np.asarray(union_fraction(points.shares, effective_tokens=effective))


def fit_error(layers: Sequence[LayerSparsity], points: UnionPoints) -> FitError:
    """How far the laws are from measured points."""
    predicted = predicted_fractions(layers, points)
    relative = np.abs(predicted / points.fractions - 1)
    return FitError(
        mean=float(relative.mean()),
        worst_point=float(relative.mean(axis=0).max()),
        worst=float(relative.max()),
        worst_total=float(np.abs(predicted.mean(axis=0) / points.fractions.mean(axis=0) - 1).max()),
        points=points.tokens.size,
    )
