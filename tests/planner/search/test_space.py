"""The grid of decisions: what it holds, counted by hand, and that each of them is one the runtime takes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_records import llama_7b, request_of, sparsity_profile, tiny_shape

from meft.planner.records.routing import SwitchOptions
from meft.planner.search.space import (
    active_rows_caps,
    adapter_widths,
    enumerate_space,
    expert_counts,
    prefetch_depths,
    probe_counts,
)
from meft.planner.traffic.sparsity import distinct_layers


def decisions(space):
    grid = itertools.product(*(range(length) for length in space.shape))
    is_new = np.broadcast_to(space.is_new, space.shape)
    return [space.decision(index) for index in grid if is_new[index]]


def tiny_request(**changes: Any):
    return request_of(model=tiny_shape(), batch_size=2, seq_len=4, grad_accum=2, **changes)


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden_size", "first", "step", "last"),
    [
        (4096, 128, 128, 16384),  # 4D; D/8 = 512 is above the usual step, D/32 no more than it
        (8192, 256, 256, 32768),  # D/32
        (576, 64, 64, 2304),  # D/8 = 72, the power of two below is 64
        (768, 64, 64, 3072),
        (8, 1, 1, 32),
    ],
)
def test_widths_are_multiples_of_a_step_up_to_four_times_the_hidden_size(hidden_size, first, step, last):
    widths = adapter_widths(request_of(model=llama_7b(hidden_size=hidden_size, intermediate_size=4 * hidden_size)))
    assert widths == tuple(range(first, last + 1, step))


def test_no_width_has_more_weights_than_the_model():
    # 3 layers of D = 8 with an FFN of 1: a width R has 2*R*8*3 = 48 R weights
    shape = tiny_shape(intermediate_size=1, vocab_size=1, tied_embeddings=True)
    assert adapter_widths(request_of(model=shape))[-1] == shape.num_parameters // 48 < 32


def test_widths_start_at_a_top_k_that_is_fixed():
    assert adapter_widths(request_of(top_k=6000))[0] == 6016  # 47 * 128
    assert adapter_widths(request_of(top_k=17000)) == (17024,)  # beyond 4D: the first multiple of 128 that has the rows


@pytest.mark.parametrize(
    ("width", "counts"),
    [
        (64, (4, 8, 16, 32)),  # sqrt 8
        (100, (5, 10, 20, 50)),  # sqrt 10; for 40 the divisors around are 25 (ratio 1.6) and 50 (1.25)
        (6144, (32, 64, 128, 256)),  # sqrt 78.4: 64 * 96 = 6144, so both are as near, and the smaller is taken
        (7, (7, 7, 7, 7)),  # a prime: one row per expert, as a single expert would be exact routing
        (1, (1, 1, 1, 1)),
    ],
)
def test_experts_are_the_divisors_nearest_to_multiples_of_the_root(width, counts):
    assert expert_counts(width) == counts


@pytest.mark.parametrize(
    ("top_k", "probes"),
    [
        (8, [4, 8, 10]),  # 16 rows are wanted, 2 experts of 10 rows; there are 10 experts
        (30, [6, 8, 10]),  # 60 rows: 6 experts
        (80, [10, 10, 10]),  # 160 rows: all 100
    ],
)
def test_probed_experts_hold_twice_the_rows_that_a_token_takes(top_k, probes):
    assert probe_counts(adapter_width=100, num_experts=10, top_k=top_k).tolist() == probes


def caps_of(active: list[int], window: list[int], *, spread: float, width: int) -> list[int]:
    caps = active_rows_caps(
        request_of(grad_accum=4),
        sparsity_profile(spread_fraction=spread),
        adapter_width=np.array([width]),
        active_rows=np.array(active)[:, None],
        window_active_rows=np.array(window)[:, None],
    )
    return caps[:, 0].tolist()


def test_caps_are_multiples_of_the_busiest_layer_with_its_spread():
    # busiest 10, with a spread of a quarter 12.5: 13; times 1.25: 16.25, times 1.5: 19.5
    assert caps_of([5, 10, 7], [20, 30, 21], spread=0.25, width=100) == [13, 17, 20, 100]
    assert caps_of([5, 10, 7], [20, 30, 21], spread=0.25, width=18) == [13, 17, 18, 18]


def test_caps_hold_a_micro_batch_s_share_of_the_window():
    # 43 rows in a window of 4 micro-batches: one of them had at least 11
    assert caps_of([10, 10], [40, 43], spread=0.0, width=100) == [11, 14, 17, 100]


def test_depths_go_as_deep_as_recall_is_known_and_there_are_layers():
    known_to_two = sparsity_profile(prefetch_recall_by_depth=(1.0, 0.9, 0.8))
    assert prefetch_depths(request_of(), known_to_two) == (0, 1, 2)
    assert prefetch_depths(request_of(model=tiny_shape(num_layers=2)), known_to_two) == (0, 1)
    assert prefetch_depths(request_of(prefetch_depth=7), known_to_two) == (7,)


def test_exact_routing_of_one_width_counted_by_hand():
    # 3 layers: depths 0, 1, 2; with and without checkpointing; retained and refetched; K = 2; A = 2 of 16 at most 8*2
    request = tiny_request(adapter_width=16, top_k=2, routing="exact")
    space = enumerate_space(request, sparsity_profile(1.0))
    # A = 16 (1 - (1 - 2/16)^8) = 10.5: 11 (ties to even: rint(10.502)); with the spread 13.75: 14; 17.5 and 21 are
    # cut to 16, which is the whole width: caps 14 and 16
    assert space.active_rows[:, 0].tolist() == [11, 11, 11]
    assert space.caps[:, 0].tolist() == [14, 16, 16, 16]
    # A window activates 14 rows and at most, with the spread, 17.5: 16. So none or 16 rows are cached, their gradients
    # sent; or 4, 8 or 16, their gradients summed on the device.
    assert space.cached_rows[:, 0].tolist() == [0, 16, 4, 8, 16]
    assert space.gradients_on_device == (False, False, True, True, True)
    assert space.num_candidates == 5 * 3 * 2 * 2 * 2
    assert len(decisions(space)) == 120


@pytest.mark.parametrize("chunks", [None, 1, 2])
def test_rows_of_layers_that_are_alike_are_one_array_for_all(chunks):
    """Simulating a step costs as many array operations as layers differ: 32 times as many bytes for LLaMA-7B."""
    space = enumerate_space(tiny_request(token_chunks=chunks), sparsity_profile(0.5))
    for rows in (space.active_rows, space.window_active_rows):
        assert (rows.shape[0], distinct_layers(rows).shape[0]) == (3, 1)


def test_a_window_of_one_micro_batch_caches_nothing():
    space = enumerate_space(request_of(model=tiny_shape(), grad_accum=1), sparsity_profile(0.5))
    assert space.cached_rows.shape[0] == 1
    assert not space.cached_rows.any()


def test_least_traffic_caches_by_eighths():
    space = enumerate_space(tiny_request(adapter_width=16, top_k=2, objective="traffic"), sparsity_profile(1.0))
    # 16 rows are the most of a window: none, all with their gradients sent, or each eighth with them summed.
    assert space.cached_rows[:, 0].tolist() == [0, 16, *range(2, 17, 2)]
    assert space.gradients_on_device == (False, False, *[True] * 8)


def test_only_a_bf16_adapter_may_have_a_copy_of_its_rows():
    for asked, open_to in ((None, (False, True)), (True, (True,)), (False, (False,))):
        assert enumerate_space(tiny_request(bf16_copy=asked), sparsity_profile()).bf16_copies == open_to
    assert enumerate_space(tiny_request(adapter_dtype="fp32"), sparsity_profile()).bf16_copies == (False,)


def test_llama_7b_has_fifty_thousand_candidates_and_more():
    assert enumerate_space(request_of(), sparsity_profile(0.5378)).num_candidates >= 50_000


# --- whatever the request --------------------------------------------------------------------------------------------

CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "adapter_width": st.integers(1, 40),
        "prefetch_depth": st.integers(0, 2),
        "routing": st.sampled_from(["exact", "key-experts", "centroid", "switch", "stable"]),
        "rows_in_backward": st.sampled_from(["retained", "refetched"]),
        "activation_checkpointing": st.booleans(),
        "bf16_copy": st.booleans(),
        "objective": st.just("traffic"),
    },
)


@settings(max_examples=25)
@given(choices=CHOICES, data=st.data())
def test_decisions_are_valid_all_different_and_honour_what_is_fixed(choices, data):
    # Without a width there would be thousands of decisions to build; a Decision refuses what the runtime cannot run.
    choices = {"adapter_width": 24} | choices
    if data.draw(st.booleans(), label="top_k is fixed"):
        choices["top_k"] = data.draw(st.integers(1, choices["adapter_width"]))
    space = enumerate_space(tiny_request(**choices), sparsity_profile(0.9, 0.5, 0.7))
    found = decisions(space)
    assert len(set(found)) == len(found) == space.num_candidates > 0
    choices.pop("objective", None)
    assert all(getattr(decision, name) == value for decision in found for name, value in choices.items())
    assert all(decision.prefetch_depth < 3 for decision in found)


@settings(max_examples=25)
@given(width=st.integers(1, 5000), top_k=st.integers(1, 300))
def test_key_experts_leave_the_router_a_choice(width, top_k):
    top_k = min(top_k, width)
    space = enumerate_space(request_of(adapter_width=width, top_k=top_k, routing="key-experts"), sparsity_profile())
    probed_rows = space.num_probes * (width // space.num_experts)
    assert (width % space.num_experts == 0).all()
    assert (space.num_probes <= space.num_experts).all()
    assert (probed_rows >= min(2 * top_k, width)).all()


@settings(max_examples=25)
@given(width=st.integers(1, 5000), top_k=st.integers(1, 300))
def test_a_token_of_a_switch_has_rows_to_choose_from_in_its_one_expert(width, top_k):
    top_k = min(top_k, width)
    space = enumerate_space(request_of(adapter_width=width, top_k=top_k, routing="switch"), sparsity_profile())
    assert (width % space.num_experts == 0).all()
    assert (space.num_probes == 1).all()
    assert (width // space.num_experts >= min(2 * top_k, width)).all()
    assert space.decision((0,) * 6).switch == SwitchOptions()


@settings(max_examples=25)
@given(
    alphas=st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3),
    spread=st.floats(0.0, 1.0),
    grad_accum=st.integers(1, 64),
)
def test_no_cap_is_below_what_is_expected_of_a_batch_and_a_window(alphas, spread, grad_accum):
    # The search simulates a step once for all caps, which is right only if no cap changes the active rows.
    request = request_of(model=tiny_shape(), batch_size=2, seq_len=4, grad_accum=grad_accum)
    space = enumerate_space(request, sparsity_profile(*alphas, spread_fraction=spread))
    assert (space.caps >= space.active_rows.max(axis=0)).all()
    assert (space.caps * grad_accum >= space.window_active_rows.max(axis=0)).all()
    assert (space.caps >= space.top_k).all()
    assert (space.caps <= space.adapter_width).all()
    assert (np.diff(space.caps, axis=0) >= 0).all()


def test_budgets_and_limits_do_not_shape_the_grid():
    small = enumerate_space(tiny_request(gpu_mem_bytes=1, host_mem_bytes=1, max_slowdown=1.0), sparsity_profile())
    large = enumerate_space(tiny_request(objective="speed"), sparsity_profile())
    assert small.shape == large.shape
    np.testing.assert_array_equal(small.caps, large.caps)
    np.testing.assert_array_equal(small.num_probes, large.num_probes)
