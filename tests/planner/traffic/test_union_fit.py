"""The law of active rows with its six parameters: found again from its own points, and fitted to published unions."""

from __future__ import annotations

import csv
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import SHARED

from meft.planner.records.profile_catalogue import load_sparsity
from meft.planner.records.profiles import LayerSparsity, SparsityProfile
from meft.planner.traffic.sparsity import active_rows_per_layer
from meft.planner.traffic.union_fit import UnionPoints, fit_error, fit_layers, predicted_fractions

POLAR = SHARED / "reference" / "polar_union_k.csv"
TOKENS, SHARES = (64, 256, 1024), (1 / 128, 1 / 32, 1 / 8)


def points_of(layers: list[LayerSparsity], tokens=TOKENS, shares=SHARES) -> UnionPoints:
    """Points on the laws themselves."""
    pairs = np.array(list(product(tokens, shares)))
    empty = UnionPoints(pairs[:, 0], pairs[:, 1], np.ones((len(layers), len(pairs))))
    return UnionPoints(empty.tokens, empty.shares, predicted_fractions(layers, empty))


laws = st.builds(
    LayerSparsity,
    alpha=st.floats(0.2, 0.8),
    log_level=st.floats(2.0, 4.0),
    level_slope=st.floats(-0.2, 0.2),
    level_curve=st.floats(-0.05, 0.05),
    alpha_slope=st.floats(-0.03, 0.03),
    growth_curve=st.floats(-0.04, 0.04),
)


@given(law=laws)
def test_a_law_is_found_again_from_its_points(law) -> None:
    (found,) = fit_layers(points_of([law]))
    elsewhere = points_of([law], tokens=(96, 512, 900), shares=(1 / 64, 1 / 16))
    assert fit_error([found], elsewhere).worst < 0.02


def test_few_points_fit_level_and_growth_alone() -> None:
    law = LayerSparsity(alpha=0.5, log_level=3.0)
    (found,) = fit_layers(points_of([law], shares=(1 / 32,)))
    assert found.alpha == pytest.approx(0.5, abs=1e-3)
    assert found.log_level == pytest.approx(3.0, abs=1e-3)
    assert (found.level_slope, found.level_curve, found.alpha_slope) == (0, 0, 0)


def test_one_number_of_tokens_tells_no_growth() -> None:
    with pytest.raises(ValueError, match="growth with tokens"):
        fit_layers(points_of([LayerSparsity(alpha=0.5)], tokens=(64,)))


def test_errors_by_hand() -> None:
    law = LayerSparsity(alpha=0.5)
    points = points_of([law, law], tokens=(64, 256), shares=(1 / 8,))
    off = points.fractions * np.array([[1 / 1.1, 1.0], [1 / 1.2, 1.0]])
    error = fit_error([law, law], UnionPoints(points.tokens, points.shares, off))
    assert error.mean == pytest.approx((0.1 + 0.2) / 4)
    assert error.worst_point == pytest.approx(0.15)
    assert error.worst == pytest.approx(0.2)
    assert error.points == 2
    by_hand = [1 / ((1 / 1.1 + 1 / 1.2) / 2) - 1, 0.0]  # both layers have the same rows
    assert error.worst_total == pytest.approx(max(by_hand))


# --- the law -------------------------------------------------------------------------------------------------------


def profile_of(law: LayerSparsity, **fields) -> SparsityProfile:
    given_fields = {"key": "x", "name": "x", "basis": "measured", "source": "x", "spread_fraction": 0.0}
    return SparsityProfile(**(given_fields | {"layers": (law,), "prefetch_recall_by_depth": (1.0,)} | fields))


def rows(law: LayerSparsity, *, tokens, top_k, width, **fields) -> int:
    found = active_rows_per_layer(profile_of(law, **fields), 1, tokens=tokens, top_k=top_k, adapter_width=width)
    return int(found[0])


@given(law=laws, tokens=st.integers(1, 100_000), width=st.integers(1, 8192), data=st.data())
def test_rows_are_possible_and_grow_with_tokens(law, tokens, width, data) -> None:
    top_k = data.draw(st.integers(1, width))
    few, more = (rows(law, tokens=count, top_k=top_k, width=width) for count in (tokens, 2 * tokens))
    assert top_k <= few <= min(width, tokens * top_k)
    assert few <= more
    assert rows(law, tokens=1, top_k=top_k, width=width) == top_k
    assert rows(law, tokens=tokens, top_k=width, width=width) == width


def test_a_law_by_hand() -> None:
    """At 512 tokens and 64 of 2048 rows the level alone counts: q = e^3, so 2048 * (1 - (1 - 1/32)^20.09) rows."""
    law = LayerSparsity(alpha=0.5, log_level=3.0, level_slope=0.7, level_curve=0.1, alpha_slope=0.2)
    assert rows(law, tokens=512, top_k=64, width=2048) == round(2048 * (1 - (31 / 32) ** math.exp(3)))
    # Four times the tokens double q; twice the share moves the level by 0.7 ln 2 + 0.1 ln^2 2.
    assert rows(law, tokens=2048, top_k=64, width=2048) == round(2048 * (1 - (31 / 32) ** (2 * math.exp(3))))
    level = 3 + 0.7 * math.log(2) + 0.1 * math.log(2) ** 2
    assert rows(law, tokens=512, top_k=128, width=2048) == round(2048 * (1 - (15 / 16) ** math.exp(level)))


def test_a_bent_law_by_hand() -> None:
    """At 2048 tokens, t = ln 4, the bend adds 0.03 t^2; beyond them the law goes on with the slope it has there."""
    law = LayerSparsity(alpha=0.5, log_level=2.0, growth_curve=-0.03)
    end = 2 + 0.5 * math.log(4) - 0.03 * math.log(4) ** 2
    assert rows(law, tokens=2048, top_k=64, width=2048) == round(2048 * (1 - (31 / 32) ** math.exp(end)))
    beyond = end + (0.5 - 2 * 0.03 * math.log(4)) * math.log(2)
    assert rows(law, tokens=4096, top_k=64, width=2048) == round(2048 * (1 - (31 / 32) ** math.exp(beyond)))


def test_padding_activates_nothing() -> None:
    law = LayerSparsity(alpha=0.5)
    assert rows(law, tokens=512, top_k=8, width=2048, filled_fraction=0.5) == rows(law, tokens=256, top_k=8, width=2048)


def test_beyond_the_measured_shares_the_law_of_the_end_holds() -> None:
    law = LayerSparsity(alpha=0.5, log_level=3.0, level_slope=0.5)
    measured = {"least_share": 1 / 64, "greatest_share": 1 / 8}
    share = 32 / 64  # at the end, 1/8, ln q = 3 + 0.5 ln 4
    expected = round(64 * (1 - (1 - share) ** math.exp(3 + 0.5 * math.log(4))))
    assert rows(law, tokens=512, top_k=32, width=64, **measured) == expected


def test_old_profiles_still_load_and_mean_the_same() -> None:
    """Of the MEFT paper's traffic: 1592 rows at T = 512, K = 64, R = 6144."""
    paper = load_sparsity("meft-paper")
    assert paper.layers[0].log_level is None
    assert active_rows_per_layer(paper, 32, tokens=512, top_k=64, adapter_width=6144)[0] == 1592


# --- published unions ----------------------------------------------------------------------------------------------


def polar(model: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, each layer's share at one token, and fractions ``[L, tokens]``."""
    if not POLAR.is_file():
        pytest.skip("needs ../shared/reference/polar_union_k.csv beside the checkout")
    with POLAR.open(encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["model"] == model]
    tokens = sorted({int(row["tokens_in_batch"]) for row in found})
    by_place = {(int(row["layer"]), int(row["tokens_in_batch"])): float(row["fraction"]) for row in found}
    layers = sorted({layer for layer, _ in by_place})
    return (
        np.array(tokens, float),
        np.array(layers),
        np.array([[by_place[layer, count] for count in tokens] for layer in layers]),
    )


@pytest.mark.parametrize(
    ("model", "mean", "num_layers"), [("opt-6.7b", 0.035, 32), ("opt-30b", 0.04, 48), ("opt-66b", 0.055, 64)]
)
def test_published_unions_per_layer(model, mean, num_layers) -> None:
    """Neurons that are active with ReLU, for 99 % of the union: no fixed K, so each layer's share is that of one token.

    Fitted to every second batch size and judged on the others; the bounds are the errors as found, rounded up. Much of
    them is the file's: its numbers are rounded to 128 and floored at 256 to 512, as its source says.
    """
    tokens, layers, fractions = polar(model)
    assert len(layers) == num_layers
    seen, unseen = np.arange(1, len(tokens), 2), np.arange(2, len(tokens), 2)
    errors = []
    for row in fractions:
        shares = np.full(len(tokens), min(row[0], 0.5))
        points = UnionPoints(tokens, shares, np.maximum(row, shares)[None])
        chosen = np.isin(np.arange(len(tokens)), seen)
        (law,) = fit_layers(points.where(chosen))
        errors.append(fit_error([law], points.where(np.isin(np.arange(len(tokens)), unseen))).mean)
    assert np.mean(errors) < mean
