"""What the search narrows by allocated bytes, against the readable search; and levers that are replayed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_records import (
    gpu_profile,
    host_profile,
    link_profile,
    request_of,
    sparsity_profile,
    tiny_shape,
)

from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import Decision, Request
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
from meft.planner.search.levers import levers, reserved_at_most
from meft.planner.search.sifted_choice import best, front
from meft.planner.search.sifting import Sifted
from meft.planner.search.weighing import weigh

KIB = 1 << 10


def tiny_request(**changes: Any) -> Request:
    """Three layers of D = 8, T = 8: some tens of KiB decide."""
    small = {"batch_size": 2, "seq_len": 4, "grad_accum": 2, "weights_dtype": "fp32", "adapter_dtype": "fp32"}
    limitless = {"gpu_mem_bytes": 1 << 40, "host_mem_bytes": 1 << 40, "max_slowdown": 1e9}
    return request_of(model=tiny_shape(), **(small | limitless | changes))


def tiny_profiles() -> ProfileSet:
    return ProfileSet(gpu_profile(), link_profile(), host_profile(), sparsity_profile(0.9, 0.4, 0.6))


@settings(max_examples=25)
@given(
    gpu_mem_bytes=st.one_of(st.integers(80 * KIB, 200 * KIB), st.just(1 << 40)),
    most=st.lists(st.integers(60 * KIB, 200 * KIB), min_size=1, max_size=3),
    objective=st.sampled_from(["capacity", "speed", "traffic"]),
    cached=st.booleans(),
)
def test_those_that_allocate_less_are_the_readable_searchs(gpu_mem_bytes, most, objective, cached) -> None:
    """Narrowed again and again, as the search for what fits does, and the first stays whole."""
    fixed = {} if cached else {"hot_rows": 0}
    request, profiles = tiny_request(gpu_mem_bytes=gpu_mem_bytes, objective=objective, **fixed), tiny_profiles()
    quick, slow = Sifted(request, profiles), weigh(request, profiles)
    whole = quick.within.copy()
    for num_bytes in most:
        ours, theirs = quick.allocating_at_most(num_bytes), slow.allocating_at_most(num_bytes)
        np.testing.assert_array_equal(ours.within, theirs.within)
        assert ours.num_feasible == int(theirs.feasible.sum())
        if ours.num_feasible:
            winner = best(ours)
            assert winner == theirs.best(request)
            assert front(ours, winner) == theirs.front(winner, request)
            assert ours.device.at(winner) <= num_bytes
    np.testing.assert_array_equal(quick.within, whole)


def test_no_less_than_the_budget_is_the_same_object() -> None:
    """What allows everything copies nothing."""
    sifted = Sifted(tiny_request(gpu_mem_bytes=150 * KIB), tiny_profiles())
    assert sifted.allocating_at_most(1 << 40) is sifted
    assert sifted.allocating_at_most(100 * KIB) is not sifted


@pytest.mark.parametrize("seq_len", [64, 200])
def test_a_change_that_takes_more_memory_is_replayed(seq_len: int) -> None:
    """Without checkpointing a step reserves more than the plan's does: what it reserves is its own replay's."""
    profiles = ProfileSet(
        load_gpu("emulated"), load_link("emulated"), load_host("emulated"), load_sparsity("meft-paper")
    )
    decision = Decision(
        adapter_width=256,
        top_k=4,
        prefetch_depth=0,
        active_rows_cap=128,
        num_experts=1,
        num_probes=1,
        routing="exact",
        rows_in_backward="refetched",
        activation_checkpointing=True,
    )
    request = tiny_request(seq_len=seq_len, gpu_mem_bytes=1 << 33, gpu="emulated", link="emulated", host="emulated")
    before = predict(request, decision, profiles)
    plain = decision.model_copy(update={"activation_checkpointing": False})
    after = predict(request, plain, profiles)
    counted = predict(request, plain, profiles, replayed=False)
    found = {lever.option: lever for lever in levers(request, decision, before, profiles)}
    lever = found["--no-activation-checkpointing"]
    own = before.device_memory
    assert counted.device_memory.peak_reserved_bytes + own.peak_reserved_bytes - own.peak_allocated_bytes > (
        own.peak_reserved_bytes
    )  # it takes the branch
    assert lever.device_bytes == reserved_at_most(after) - reserved_at_most(before)
