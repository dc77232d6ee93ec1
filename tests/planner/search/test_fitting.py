"""Replays in the search: the preferred decision that fits is found, and a plan fits what its own step reserves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_records import llama_7b, request_of, sparsity_profile

from meft.planner.base.errors import Infeasible
from meft.planner.base.units import MIB
from meft.planner.memory.replayed import replayed_peaks
from meft.planner.predict.prediction import ProfileSet
from meft.planner.records.plan import Plan, Request
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link
from meft.planner.search.fitting import SMALLEST_STEP_BYTES, Fitting, best_fitting
from meft.planner.search.search import make_plan

# --- the loop, on decisions that are (allocated, reserved), the more allocated the better ---------------------------


def search(budget: int, decisions: list[tuple[int, int]]) -> Fitting[tuple[int, int]]:
    return best_fitting(
        budget,
        best_within=lambda most: max((each for each in decisions if each[0] <= most), default=None),
        short_bytes=lambda found: max(found[1] - budget, 0),
    )


def test_the_preferred_one_is_taken_when_it_fits() -> None:
    assert search(100 * MIB, [(60 * MIB, 80 * MIB), (90 * MIB, 100 * MIB)]).found == (90 * MIB, 100 * MIB)


def test_one_that_allocates_less_is_taken_when_the_preferred_one_reserves_too_much() -> None:
    result = search(100 * MIB, [(60 * MIB, 80 * MIB), (70 * MIB, 95 * MIB), (90 * MIB, 104 * MIB)])
    assert result.found == (70 * MIB, 95 * MIB)


def test_one_between_is_found_by_halving() -> None:
    # 90 is 40 short, so budgets from 50 on are tried next; 80 fits and is found half way up
    decisions = [(50 * MIB, 60 * MIB), (80 * MIB, 99 * MIB), (90 * MIB, 140 * MIB)]
    assert search(100 * MIB, decisions).found == (80 * MIB, 99 * MIB)


def test_the_least_is_replayed_before_nothing_fits() -> None:
    # what is preferred is so short that all others are passed over at first
    decisions = [(60 * MIB, 99 * MIB), (90 * MIB, 300 * MIB)]
    assert search(100 * MIB, decisions).found == (60 * MIB, 99 * MIB)


def test_how_much_the_closest_lacks() -> None:
    assert search(100 * MIB, [(60 * MIB, 101 * MIB), (90 * MIB, 300 * MIB)]).short_bytes == MIB
    assert search(100 * MIB, [(101 * MIB, 102 * MIB)]) == Fitting(None, None)


@given(
    budget=st.integers(1, 400),
    decisions=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 100)), max_size=8),
)
def test_what_is_found_fits_and_nothing_fits_only_if_the_least_does_not(budget, decisions) -> None:
    unit = 4 * SMALLEST_STEP_BYTES
    sized = [(allocated * unit, (allocated + unused) * unit) for allocated, unused in decisions]
    found = search(budget * unit, sized).found
    if found is not None:
        assert found in sized
        assert found[1] <= budget * unit
    elif sized:
        least = min(each[0] for each in sized)
        # the decision that best_within gives at the least budget
        assert max(each for each in sized if each[0] <= least)[1] > budget * unit


# --- plans of small models on the emulated device --------------------------------------------------------------------


def small_request(**changes) -> Request:
    shape = llama_7b(
        name="small",
        num_layers=2,
        hidden_size=256,
        intermediate_size=768,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=4096,
    )
    asked = {"gpu_mem_bytes": 1 << 33, "host_mem_bytes": 1 << 33, "max_slowdown": 1000.0, "batch_size": 4}
    asked |= {"seq_len": 192, "grad_accum": 1, "weights_dtype": "fp32", "adapter_dtype": "fp32", "adapter_width": 256}
    return request_of(model=shape, **(asked | changes))


def profiles() -> ProfileSet:
    return ProfileSet(load_gpu("emulated"), load_link("emulated"), load_host("emulated"), sparsity_profile())


def planned(request: Request) -> Plan:
    plan = make_plan(request, profiles(), meft_version="test")
    assert isinstance(plan, Plan), plan
    return plan


def test_the_plan_says_what_its_step_reserves() -> None:
    plan = planned(small_request())
    peaks = replayed_peaks(plan.request, plan.decision, load_gpu("emulated"))
    memory = plan.prediction.device_memory
    assert memory.peak_reserved_bytes == memory.peak_reserved_bytes_at_cap == peaks.reserved_bytes
    assert memory.reserved_basis == "counted"


def test_planned_again_at_its_own_peak_it_fits() -> None:
    peak = planned(small_request()).prediction.device_memory.peak_reserved_bytes_at_cap
    again = planned(small_request(gpu_mem_bytes=peak))
    assert again.prediction.device_memory.peak_reserved_bytes_at_cap <= peak


@pytest.mark.parametrize("part", [0.9, 0.7, 0.5])
def test_with_less_there_is_a_plan_that_fits_or_a_change_with_which_there_is(part) -> None:
    peak = planned(small_request()).prediction.device_memory.peak_reserved_bytes_at_cap
    request = small_request(gpu_mem_bytes=int(peak * part))
    found = make_plan(request, profiles(), meft_version="test")
    if isinstance(found, Infeasible):
        assert found.binding == "device memory"
        assert found.needed > found.limit == request.gpu_mem_bytes
        assert found.suggestion
    else:
        assert found.prediction.device_memory.peak_reserved_bytes_at_cap <= request.gpu_mem_bytes
