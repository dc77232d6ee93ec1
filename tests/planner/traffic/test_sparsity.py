"""The union of active rows: bounds, both exact ends, growth, the published point; layers; look-ahead recall."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import sample_profiles, sample_request
from planner_records import decision_of, request_of, sparsity_profile, tiny_shape

from meft.planner.base.errors import UsageError
from meft.planner.search.search import make_plan
from meft.planner.traffic.sparsity import (
    SPREAD_DEVIATIONS,
    SPREAD_QUANTILE,
    active_fraction,
    active_rows,
    active_rows_per_layer,
    at_seq_len,
    distinct_layers,
    highest_active_rows,
    predict_sparsity,
    prefetch_recall,
    spread_at,
)

alphas = st.floats(0.05, 1.0)
tokens = st.integers(1, 1 << 20)
widths = st.integers(1, 20_000)
shares = st.floats(0.0, 1.0)


def test_the_papers_point_from_the_exponent_solved_from_it():
    # MEFT (arXiv 2406.04984) section 3.3: 0.56 M elements per iteration at R = 6144, 2 x 256 tokens imply A = 1592.
    # alpha = ln(ln(1 - 1592/6144) / ln(1 - 64/6144)) / ln 512 = ln(0.29988 / 0.010471) / 6.2383 = 0.5377
    alpha = math.log(math.log(1 - 1592 / 6144) / math.log(1 - 64 / 6144)) / math.log(512)
    assert alpha == pytest.approx(0.5377, abs=1e-4)
    assert active_rows(tokens=512, top_k=64, adapter_width=6144, alpha=alpha) == 1592


def test_independent_tokens_are_alpha_one():
    # 1 - (1 - 1/2)^3 = 7/8 of 16 rows = 14
    assert active_rows(tokens=3, top_k=8, adapter_width=16, alpha=1.0) == 14


@given(top_k=st.integers(1, 20_000), extra=st.integers(0, 20_000), alpha=alphas)
def test_one_token_activates_exactly_its_own_rows(top_k: int, extra: int, alpha: float):
    width = top_k + extra
    assert active_fraction(tokens=1, top_k=top_k, adapter_width=width, alpha=alpha) == top_k / width
    assert active_rows(tokens=1, top_k=top_k, adapter_width=width, alpha=alpha) == top_k


@given(count=tokens, width=widths, alpha=alphas)
def test_all_rows_are_active_when_every_token_takes_all(count: int, width: int, alpha: float):
    assert active_fraction(tokens=count, top_k=width, adapter_width=width, alpha=alpha) == 1.0
    assert active_rows(tokens=count, top_k=width, adapter_width=width, alpha=alpha) == width


@given(count=tokens, width=widths, share=shares, alpha=alphas)
def test_bounds(count: int, width: int, share: float, alpha: float):
    top_k = max(1, round(share * width))
    fraction = active_fraction(tokens=count, top_k=top_k, adapter_width=width, alpha=alpha)
    rows = active_rows(tokens=count, top_k=top_k, adapter_width=width, alpha=alpha)
    assert top_k / width <= fraction <= 1.0
    assert isinstance(rows, int)
    assert top_k <= rows <= min(width, count * top_k)


@given(count=tokens, more=st.integers(0, 1 << 20), width=widths, share=shares, alpha=alphas)
def test_more_tokens_never_activate_fewer_rows(count: int, more: int, width: int, share: float, alpha: float):
    top_k = max(1, round(share * width))
    fewer = active_rows(tokens=count, top_k=top_k, adapter_width=width, alpha=alpha)
    assert active_rows(tokens=count + more, top_k=top_k, adapter_width=width, alpha=alpha) >= fewer


@given(count=tokens, width=widths, share=shares, more=shares, alpha=alphas)
def test_more_rows_per_token_never_activate_fewer(count: int, width: int, share: float, more: float, alpha: float):
    top_k = max(1, round(share * width))
    higher = top_k + round(more * (width - top_k))
    fewer = active_rows(tokens=count, top_k=top_k, adapter_width=width, alpha=alpha)
    assert active_rows(tokens=count, top_k=higher, adapter_width=width, alpha=alpha) >= fewer


def test_arrays_of_candidates_give_what_each_gives_alone():
    widths, top_ks = np.array([64, 1024, 6144]), np.array([64, 16, 64])
    profile = sparsity_profile(0.3, 0.5)
    together = active_rows_per_layer(profile, 2, tokens=512, top_k=top_ks, adapter_width=widths)
    assert together.shape == (2, 3)
    for candidate, (width, top_k) in enumerate(zip(widths.tolist(), top_ks.tolist(), strict=True)):
        alone = active_rows_per_layer(profile, 2, tokens=512, top_k=top_k, adapter_width=width)
        assert alone.tolist() == together[:, candidate].tolist()


def test_the_share_that_holds_tokens_follows_from_the_lengths_of_the_data():
    # Lengths 10, 20, 40 at the quantiles 0, 1/2, 1: between them as many of each. Cut at 30: halves of mean 15 and 25.
    profile = sparsity_profile().model_copy(update={"sequence_tokens": (10, 20, 40), "filled_fraction": 0.9})
    assert at_seq_len(profile, 100).filled_fraction == pytest.approx((15 + 30) / 2 / 100)
    assert at_seq_len(profile, 30).filled_fraction == pytest.approx((15 + 25) / 2 / 30)
    assert at_seq_len(profile, 5).filled_fraction == 1
    assert at_seq_len(sparsity_profile(), 5) == sparsity_profile()


def test_a_prediction_pads_as_the_data_would():
    profile = sparsity_profile().model_copy(update={"sequence_tokens": (16, 16)})
    decision = decision_of(active_rows_cap=6144)
    for seq_len, tokens in ((16, 32), (64, 32), (8, 16)):
        request = request_of(model=tiny_shape(), batch_size=2, seq_len=seq_len)
        rows = predict_sparsity(profile, request=request, decision=decision).active_rows_per_layer
        expected = active_rows_per_layer(sparsity_profile(), 3, tokens=tokens, top_k=64, adapter_width=6144)
        assert list(rows) == expected.tolist()


def test_key_experts_have_a_level_of_their_own():
    profile = sparsity_profile(0.4).model_copy(update={"key_experts_level": 0.3})
    rows = active_rows_per_layer(
        profile, 1, tokens=512, top_k=8, adapter_width=4096, key_experts=np.array([False, True])
    )
    assert rows[0, 0] == active_rows(tokens=512, top_k=8, adapter_width=4096, alpha=0.4)
    effective = np.exp(0.4 * np.log(512) + 0.3)
    assert rows[0, 1] == pytest.approx(4096 * (1 - (1 - 8 / 4096) ** effective), abs=0.51)


def test_one_entry_serves_every_layer_and_is_computed_once():
    rows = active_rows_per_layer(sparsity_profile(0.5), 4, tokens=512, top_k=8, adapter_width=64)
    assert rows.shape == (4,)
    assert len(set(rows.tolist())) == 1
    assert distinct_layers(rows).tolist() == rows[:1].tolist()
    own = np.array([3, 3])
    assert distinct_layers(own).tolist() == [3, 3]


def test_a_profile_of_another_depth_is_refused():
    with pytest.raises(UsageError, match=r"'test-sparsity' has 2 layers but the model has 3"):
        active_rows_per_layer(sparsity_profile(0.3, 0.5), 3, tokens=512, top_k=8, adapter_width=64)


def test_recall_by_depth_and_beyond_the_last_measured():
    profile = sparsity_profile()
    assert [prefetch_recall(profile, prefetch_depth=depth) for depth in range(5)] == [1.0, 0.9, 0.85, 0.85, 0.85]
    assert np.asarray(prefetch_recall(profile, prefetch_depth=np.array([4, 0]))).tolist() == [0.85, 1.0]


def test_the_highest_active_rows_are_the_mean_and_its_spread_within_the_width():
    assert highest_active_rows(active_rows=101, spread_fraction=0.25, adapter_width=1000) == 127  # 126.25, up
    assert highest_active_rows(active_rows=101, spread_fraction=0.25, adapter_width=120) == 120


def test_prediction_respects_the_cap_in_the_step_and_in_the_window():
    # alpha 1, T = 4, K = 8, R = 64: 1 - (7/8)^4 = 0.4138 -> 26 rows, cut to 20; a window of 2 x 4 tokens:
    # 1 - (7/8)^8 = 0.6564 -> 42 rows, and 2 steps of at most 20 rows touch at most 40.
    request = request_of(model=tiny_shape(), batch_size=1, seq_len=4, grad_accum=2)
    decision = decision_of(adapter_width=64, top_k=8, active_rows_cap=20, prefetch_depth=1)
    sparsity = predict_sparsity(sparsity_profile(1.0), request=request, decision=decision)
    assert sparsity.active_rows_per_layer == (20, 20, 20)
    assert sparsity.window_active_rows_per_layer == (40, 40, 40)
    assert sparsity.prefetch_recall == 0.9
    free = predict_sparsity(
        sparsity_profile(1.0), request=request, decision=decision.model_copy(update={"active_rows_cap": 64})
    )
    assert free.active_rows_per_layer == (26, 26, 26)
    assert free.window_active_rows_per_layer == (42, 42, 42)


# --- from batch to batch --------------------------------------------------------------------------------------------


def test_the_spread_of_a_quantile() -> None:
    assert spread_at(0.3, quantile=0.99) == pytest.approx(0.3)
    assert spread_at(0.3, quantile=0.999) == pytest.approx(0.3 * 3.0902 / 2.3263, rel=1e-4)  # of a normal table
    assert spread_at(0.0, quantile=0.999) == 0


def test_a_plan_states_the_quantile_that_its_cap_holds() -> None:
    """Rows of 99 in 100 batches by default; asking for more of them never lowers the cap."""
    profiles = sample_profiles()
    plans = []
    for quantile in (0.9, 0.99, 0.9999):
        request = sample_request().model_copy(update={"active_rows_quantile": quantile})
        plans.append(make_plan(request, profiles, meft_version="0"))
    for plan, quantile in zip(plans, (0.9, 0.99, 0.9999), strict=True):
        sparsity = plan.prediction.sparsity
        assert sparsity.quantile == quantile
        assert max(sparsity.quantile_rows_per_layer) <= plan.decision.active_rows_cap
    caps = [plan.prediction.sparsity.quantile_rows_per_layer for plan in plans]
    assert all(low <= high for few, more in pairwise(caps) for low, high in zip(few, more, strict=True))


def test_the_number_that_stands_for_the_normal_distribution_is_its_own() -> None:
    assert statistics.NormalDist().inv_cdf(SPREAD_QUANTILE) == SPREAD_DEVIATIONS
    assert spread_at(0.25, quantile=SPREAD_QUANTILE) == 0.25
    assert spread_at(0.25, quantile=0.9) == pytest.approx(0.25 * 1.2815515655 / 2.3263478740)
