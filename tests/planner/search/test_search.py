"""The search: against brute force on small grids, what must hold of every winner, fronts, verdicts and their advice."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from planner_records import (
    GIB,
    decision_of,
    gpu_profile,
    host_profile,
    link_profile,
    request_of,
    sourced,
    sparsity_profile,
    tiny_shape,
)

from meft.planner.base.errors import Infeasible, UsageError
from meft.planner.memory import device
from meft.planner.memory.budget import host_budget_bytes, machine_bytes_for
from meft.planner.memory.device import counted_bytes
from meft.planner.memory.replayed import ReplayedPeaks
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import Decision, Plan, Request
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
from meft.planner.records.profiles import GpuProfile, SourcedRange
from meft.planner.search import grid_timing, search
from meft.planner.search.grid_timing import COPY_PAYS
from meft.planner.search.infeasible import Limit
from meft.planner.search.pareto import pareto_front, thinned
from meft.planner.search.search import make_plan
from meft.planner.search.weighing import weigh

KIB = 1 << 10
LIMITLESS = {"gpu_mem_bytes": 1 << 40, "host_mem_bytes": 1 << 40, "max_slowdown": 1e9}


@pytest.fixture(autouse=True, scope="module")
def _no_segments() -> Iterator[None]:
    """An allocator that reserves what is allocated, so that budgets of tens of KiB decide: what a replay says of these
    tiny models is one segment of 2 MiB. How a replay and the search go together is for ``test_fitting.py``."""

    def peaks(request: Request, decision: Decision, gpu: GpuProfile) -> ReplayedPeaks:
        counted = counted_bytes(request=request, decision=decision, gpu=gpu)
        return ReplayedPeaks(counted, counted)

    with pytest.MonkeyPatch.context() as patch:
        for module in (device, search):
            patch.setattr(module, "replayed_peaks", peaks)
        yield


def profiles_of(*alphas: float, **changes: Any) -> ProfileSet:
    whole = ProfileSet(gpu_profile(), link_profile(), host_profile(), sparsity_profile(*alphas or (0.5,)))
    return replace(whole, **changes)


SLOW_GATHER = host_profile(gather_bytes_per_second=sourced(2e6), adamw_bytes_per_second=sourced(1e7))
"""So slow that what is gathered from, and written to, makes a difference to rows of 16 numbers."""


def tiny_request(**changes: Any) -> Request:
    """Three layers of D = 8, T = 8, fp32: budgets of some tens of KiB decide."""
    small = {"batch_size": 2, "seq_len": 4, "grad_accum": 2, "weights_dtype": "fp32", "adapter_dtype": "fp32"}
    return request_of(model=tiny_shape(), **(small | LIMITLESS | changes))


def planned(request: Request, profiles: ProfileSet | None = None) -> Plan:
    found = make_plan(request, profiles or profiles_of(), meft_version="test")
    assert isinstance(found, Plan), found
    return found


def refused(request: Request, profiles: ProfileSet | None = None) -> Infeasible:
    found = make_plan(request, profiles or profiles_of(), meft_version="test")
    assert isinstance(found, Infeasible), found.decision
    return found


# --- against brute force ---------------------------------------------------------------------------------------------


def all_decisions(request: Request, profiles: ProfileSet) -> list[Decision]:
    space = weigh(request, profiles).space
    grid = itertools.product(*(range(length) for length in space.shape))
    is_new = np.broadcast_to(space.is_new, space.shape)
    return [space.decision(index) for index in grid if is_new[index]]


def fits(request: Request, decision: Decision, profiles: ProfileSet) -> bool:
    prediction = predict(request, decision, profiles)
    device = prediction.device_memory
    return (
        device.peak_reserved_bytes_at_cap <= device.allocator_budget_bytes
        and prediction.host_memory.total_bytes <= host_budget_bytes(request)
        and prediction.timing.slowdown <= request.max_slowdown
        and (request.objective != "speed" or prediction.trainable_fraction >= request.min_trainable_fraction)
    )


def with_copy_if_it_pays(request: Request, decision: Decision, profiles: ProfileSet) -> Decision:
    """The decision, or its twin with a bf16 copy where that fits the host and is faster by a hundredth."""
    if request.adapter_dtype != "bf16" or request.bf16_copy is not None:
        return decision
    twin = decision.model_copy(update={"bf16_copy": True})
    without, copied = (predict(request, each, profiles) for each in (decision, twin))
    pays = copied.timing.step_seconds <= (1 - COPY_PAYS) * without.timing.step_seconds
    return twin if pays and copied.host_memory.total_bytes <= host_budget_bytes(request) else decision


def preference(request: Request, decision: Decision, profiles: ProfileSet) -> tuple[float, ...]:
    prediction = predict(request, decision, profiles)
    capacity = (-decision.adapter_width, -decision.top_k)
    rest = (-decision.active_rows_cap, prediction.device_memory.peak_reserved_bytes_at_cap)
    step = prediction.timing.step_seconds
    if request.objective == "speed":
        return (round(step, 12), *capacity, *rest)
    if request.objective == "traffic":
        moved = prediction.transfer.window_bytes(request.grad_accum)
        capacity = (*capacity, round(moved / prediction.sparsity.prefetch_recall, 6))
    return (*capacity, round(step / prediction.sparsity.prefetch_recall, 12), *rest)


SMALL_GRIDS = [
    {"adapter_width": 16, "top_k": 3},
    {"adapter_width": 16, "top_k": 3, "objective": "speed", "min_trainable_fraction": 0.0},
    {"top_k": 4, "routing": "exact", "prefetch_depth": 1, "activation_checkpointing": False},
    {"routing": "exact", "prefetch_depth": 0, "activation_checkpointing": True, "rows_in_backward": "refetched"},
    {
        "top_k": 3,
        "routing": "key-experts",
        "prefetch_depth": 2,
        "rows_in_backward": "retained",
        "activation_checkpointing": False,
        "objective": "speed",
    },
    {"adapter_width": 16, "top_k": 3, "prefetch_depth": 1, "objective": "traffic"},
    {
        "adapter_width": 24,
        "routing": "exact",
        "prefetch_depth": 0,
        "activation_checkpointing": False,
        "objective": "traffic",
    },
]
NARROW_BF16 = {"adapter_dtype": "bf16", "prefetch_depth": 1, "activation_checkpointing": False}
BF16_GRIDS = [
    NARROW_BF16 | {"adapter_width": 16, "routing": "key-experts"},
    NARROW_BF16 | {"top_k": 4, "routing": "exact"},
    NARROW_BF16 | {"adapter_width": 16, "objective": "traffic"},
    NARROW_BF16 | {"top_k": 4, "routing": "exact", "objective": "speed", "min_trainable_fraction": 0.0},
]


@pytest.mark.parametrize("grid", [*SMALL_GRIDS, *BF16_GRIDS])
def test_the_winner_is_the_one_that_brute_force_finds(grid):
    # The budgets are set amid what the decisions need, so that each of them cuts some off.
    profiles = profiles_of(0.9, 0.4, 0.6)
    if grid in BF16_GRIDS:
        profiles = replace(profiles, host=SLOW_GATHER)
    loose = weigh(tiny_request(**grid), profiles)
    amid = {
        "gpu_mem_bytes": int(np.quantile(loose.allocated_bytes, 0.7)),
        "host_mem_bytes": machine_bytes_for(
            int(np.quantile(np.broadcast_to(loose.host_bytes, loose.space.shape), 0.8))
        ),
        "max_slowdown": max(1.0, float(np.quantile(loose.limits[-1].needed, 0.7))),
    }
    request = tiny_request(**grid, **amid)
    everything = [with_copy_if_it_pays(request, each, profiles) for each in all_decisions(request, profiles)]
    fitting = [decision for decision in everything if fits(request, decision, profiles)]
    plan = planned(request, profiles)
    assert (plan.search.candidates, plan.search.feasible) == (len(everything), len(fitting))
    assert 0 < len(fitting) < len(everything)
    best = min(preference(request, decision, profiles) for decision in fitting)
    assert preference(request, plan.decision, profiles) == best
    assert any(decision.bf16_copy for decision in fitting) == (grid in BF16_GRIDS)


@settings(max_examples=20)
@given(data=st.data(), serial=st.booleans())
def test_every_candidate_is_weighed_as_it_is_predicted(data, serial):
    # One set of terms: an array's element and the scalar prediction of the same decision agree.
    profiles = profiles_of(0.9, 0.4, 0.6, gpu=gpu_profile(shares_host_cores=serial), host=SLOW_GATHER)
    request = tiny_request(
        adapter_width=data.draw(st.integers(1, 40)),
        adapter_dtype=data.draw(st.sampled_from(["fp32", "bf16"])),
        objective="traffic",
    )
    weighed = weigh(request, profiles)
    index = tuple(data.draw(st.integers(0, length - 1)) for length in weighed.space.shape)
    decision = weighed.decision(index)
    prediction = predict(request, decision, profiles)
    assert weighed.at(weighed.window_bytes, index) == prediction.transfer.window_bytes(request.grad_accum)
    assert decision == with_copy_if_it_pays(request, weighed.space.decision(index), profiles)
    assert weighed.at(weighed.allocated_bytes, index) == prediction.device_memory.peak_allocated_bytes_at_cap
    assert weighed.at(weighed.host_bytes, index) == prediction.host_memory.total_bytes
    assert weighed.at(weighed.trainable_parameters, index) == prediction.trainable_parameters
    assert weighed.at(weighed.step_seconds, index) == pytest.approx(prediction.timing.step_seconds, rel=1e-12)
    assert weighed.at(weighed.limits[-1].needed, index) == pytest.approx(prediction.timing.slowdown, rel=1e-12)


# --- what must hold of every winner ----------------------------------------------------------------------------------

BUDGETS = st.fixed_dictionaries(
    {
        "gpu_mem_bytes": st.integers(40 * KIB, 200 * KIB),
        "host_mem_bytes": st.integers(4 * KIB, 200 * KIB),
        "max_slowdown": st.floats(1.0, 100.0),
    }
)
NARROW = {"prefetch_depth": 1, "rows_in_backward": "refetched"}


@settings(max_examples=20)
@given(budgets=BUDGETS, name=st.sampled_from(["gpu_mem_bytes", "host_mem_bytes", "max_slowdown"]), more=st.floats(1, 3))
def test_a_larger_budget_never_takes_anything_away(budgets, name, more):
    larger = budgets | {name: type(budgets[name])(budgets[name] * more)}
    before, after = (
        make_plan(tiny_request(**NARROW, **given_budgets), profiles_of(), meft_version="test")
        for given_budgets in (budgets, larger)
    )
    if isinstance(before, Infeasible):
        return
    assert isinstance(after, Plan)
    assert after.decision.adapter_width >= before.decision.adapter_width
    assert after.search.feasible >= before.search.feasible
    assert after.search.candidates == before.search.candidates


@settings(max_examples=15)
@given(budgets=BUDGETS, objective=st.sampled_from(["capacity", "speed", "traffic"]))
def test_a_plan_keeps_its_limits_and_a_verdict_s_advice_makes_one(budgets, objective):
    request, profiles = tiny_request(objective=objective, **NARROW, **budgets), profiles_of()
    found = make_plan(request, profiles, meft_version="test")
    if isinstance(found, Plan):
        assert fits(request, found.decision, profiles)
    elif found.suggestion:
        assert make_plan(with_options(request, found.suggestion), profiles, meft_version="test").kind == "plan"


def test_the_same_request_gives_the_same_plan():
    assert planned(tiny_request()).to_json() == planned(tiny_request()).to_json()


def test_a_plan_survives_json():
    plan = planned(tiny_request())
    assert Plan.from_json(plan.to_json(), source="test") == plan


def test_the_search_may_not_disagree_with_the_prediction(monkeypatch):
    def slower(*arguments):
        honest = predict(*arguments)
        timing = honest.timing.model_copy(update={"step_seconds": 1.001 * honest.timing.step_seconds})
        return honest.model_copy(update={"timing": timing})

    monkeypatch.setattr("meft.planner.search.search.predict", slower)
    with pytest.raises(RuntimeError, match="the search found step seconds"):
        planned(tiny_request())


def test_planning_loads_neither_torch_nor_scipy_nor_matplotlib():
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / 'tests' / 'helpers')]!r}; "
        "from test_search import planned, tiny_request; planned(tiny_request()); "
        "print([name for name in ('torch', 'transformers', 'numba', 'scipy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the three objectives --------------------------------------------------------------------------------------------


def test_capacity_takes_the_widest_adapter_then_the_largest_k():
    # No limit binds: 4D = 32 rows, and K = 32 of the 8, 16, 32 that there are.
    decision = planned(tiny_request()).decision
    assert (decision.adapter_width, decision.top_k) == (32, 32)


def test_speed_takes_the_fastest_step_that_trains_enough():
    frozen = tiny_shape().num_parameters
    # The least width whose 2*R*D*L = 48 R weights are half the model's; K = 16 is the least, and the fastest.
    plan = planned(tiny_request(objective="speed", min_trainable_fraction=0.5))
    assert plan.prediction.trainable_fraction >= 0.5
    narrower = planned(tiny_request(objective="speed", min_trainable_fraction=0.1))
    assert narrower.prediction.timing.step_seconds <= plan.prediction.timing.step_seconds
    assert plan.decision.top_k == 16
    assert plan.prediction.trainable_parameters >= frozen / 2


def test_of_equal_steps_the_larger_cap_is_taken_as_it_drops_fewer_rows():
    # All caps of a decision take the same time, and memory is no object: the whole width.
    decision = planned(tiny_request(adapter_width=32, top_k=2)).decision
    assert decision.active_rows_cap == 32


def test_least_traffic_is_had_at_the_capacity_that_there_is():
    limits = {"gpu_mem_bytes": 120 * KIB, "host_mem_bytes": machine_bytes_for(60 * KIB), "max_slowdown": 20.0}
    request, profiles = tiny_request(**limits), profiles_of()
    usual, least = (planned(request.model_copy(update={"objective": name})) for name in ("capacity", "traffic"))
    assert least.decision.adapter_width == usual.decision.adapter_width
    assert least.decision.top_k == usual.decision.top_k
    moved = [plan.prediction.transfer.window_bytes(request.grad_accum) for plan in (usual, least)]
    assert moved[1] < moved[0] / usual.prediction.sparsity.prefetch_recall
    # Of the same width and K, nothing that fits moves fewer bytes: at its own depth, or per row that is found at any.
    fixed = {"adapter_width": least.decision.adapter_width, "top_k": least.decision.top_k, "objective": "traffic"}
    same = request.model_copy(update=fixed)
    for decision in all_decisions(same, profiles):
        if not fits(same, decision, profiles):
            continue
        other = predict(same, decision, profiles)
        bytes_of_other = other.transfer.window_bytes(request.grad_accum)
        recall = other.sparsity.prefetch_recall / least.prediction.sparsity.prefetch_recall
        assert moved[1] <= bytes_of_other / recall
        assert moved[1] <= bytes_of_other or decision.prefetch_depth != least.decision.prefetch_depth


def test_a_front_of_least_traffic_counts_bytes():
    plan = planned(tiny_request(objective="traffic", max_slowdown=50.0))
    points = plan.search.pareto
    assert points[0].decision == plan.decision
    assert len({point.moved_bytes_per_step for point in points}) > 2
    for point in points:
        moved = predict(plan.request, point.decision, profiles_of()).transfer.window_bytes(plan.request.grad_accum)
        assert point.moved_bytes_per_step == round(moved / plan.request.grad_accum)


PAPERS_BYTES = 0.56 * (2 * 6144 * 4096 * 32) * 4
"""The paper's traffic of a micro-batch at width 6144: 0.56 M numbers of fp32, M = 2*R*D*L."""


@pytest.mark.parametrize("weights_dtype", ["bf16", "nf4"])
def test_llama_7b_moves_a_fifth_of_the_papers_bytes_or_less(weights_dtype):
    profiles = ProfileSet(
        load_gpu("rtx-3090"), load_link("pcie-4.0-x16"), load_host("workstation-32core"), load_sparsity("meft-paper")
    )
    request = request_of(adapter_width=6144, top_k=64, weights_dtype=weights_dtype, objective="traffic")
    plan = planned(request, profiles)
    moved = plan.prediction.transfer.window_bytes(request.grad_accum) / request.grad_accum
    assert moved <= PAPERS_BYTES / 5
    capacity = planned(request.model_copy(update={"objective": "capacity"}), profiles)
    assert moved < capacity.prediction.transfer.window_bytes(request.grad_accum) / request.grad_accum


# --- the bf16 copy ---------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    budgets=BUDGETS,
    rate=st.floats(1e5, 1e7),
    times_as_fast=st.sampled_from([0.5, 1.0, 2.0, 8.0]),
    grad_accum=st.sampled_from([1, 2, 8]),
)
def test_a_copy_is_taken_only_where_it_pays(budgets, rate, times_as_fast, grad_accum):
    adamw = sourced(rate * times_as_fast)  # near to the gather's, so that what a copy saves and what it adds are near
    host = host_profile(gather_bytes_per_second=sourced(rate), adamw_bytes_per_second=adamw)
    profiles = profiles_of(host=host)
    request = tiny_request(adapter_dtype="bf16", grad_accum=grad_accum, **NARROW, **budgets)
    found = make_plan(request, profiles, meft_version="test")
    if isinstance(found, Infeasible):
        return
    bare = found.decision.model_copy(update={"bf16_copy": False})
    assert found.decision == with_copy_if_it_pays(request, bare, profiles)
    without = make_plan(request.model_copy(update={"bf16_copy": False}), profiles, meft_version="test")
    if isinstance(without, Plan):  # an open choice is never worse than one that is made
        assert found.decision.adapter_width >= without.decision.adapter_width


@pytest.mark.parametrize("adamw_bytes_per_second", [2e5, 3e5, 5e5])
def test_copies_that_are_not_simulated_are_those_that_cannot_pay(monkeypatch, adamw_bytes_per_second):
    # Against the search that simulates them all.
    slow = {"gather_bytes_per_second": sourced(1e6), "adamw_bytes_per_second": sourced(adamw_bytes_per_second)}
    profiles = profiles_of(0.9, 0.4, 0.6, host=host_profile(**slow))
    request = tiny_request(adapter_dtype="bf16", activation_checkpointing=False)
    ruled_out = []

    def counted(*arguments):
        pays = may_pay(*arguments)
        ruled_out.append(int((~pays).sum()))
        return pays

    may_pay = grid_timing.copy_may_pay
    monkeypatch.setattr(grid_timing, "copy_may_pay", counted)
    quick = weigh(request, profiles)
    monkeypatch.setattr(grid_timing, "copy_may_pay", lambda _, __, baseline, ___: np.ones(baseline.shape, np.bool_))
    slow_but_sure = weigh(request, profiles)
    assert sum(ruled_out) > 0
    np.testing.assert_array_equal(quick.bf16_copied, slow_but_sure.bf16_copied)
    np.testing.assert_array_equal(quick.step_seconds, slow_but_sure.step_seconds)
    np.testing.assert_array_equal(quick.host_bytes, slow_but_sure.host_bytes)


def test_a_copy_can_keep_the_slowdown_where_nothing_else_does():
    profiles = replace(profiles_of(), host=SLOW_GATHER)
    fixed = {"adapter_width": 32, "top_k": 32, "routing": "exact", "adapter_dtype": "bf16"}
    fastest = tiny_request(objective="speed", min_trainable_fraction=0.0, **fixed)
    slowdowns = [
        planned(fastest.model_copy(update={"bf16_copy": copied}), profiles).prediction.timing.slowdown
        for copied in (False, True)
    ]
    between = tiny_request(max_slowdown=sum(slowdowns) / 2, **fixed)
    assert planned(between, profiles).decision.bf16_copy
    verdict = refused(between.model_copy(update={"bf16_copy": False}), profiles)
    assert verdict.binding == "slowdown"


def test_a_copy_is_left_out_where_the_host_has_no_room_for_it():
    profiles = profiles_of(gpu=gpu_profile(shares_host_cores=True), host=SLOW_GATHER)
    request = tiny_request(adapter_width=32, top_k=8, adapter_dtype="bf16", grad_accum=1)
    plan = planned(request, profiles)
    assert plan.decision.bf16_copy
    bare = plan.prediction.host_memory.total_bytes - 3 * 32 * 16 * 2  # L * R * 2D numbers of 2 bytes; no buffer is that
    short = request.model_copy(update={"host_mem_bytes": machine_bytes_for(bare)})
    assert not planned(short, profiles).decision.bf16_copy
    # A byte too little for the largest cap with a copy: the copy saves time, so the next smaller cap is taken with it.
    most = machine_bytes_for(plan.prediction.host_memory.total_bytes - 1)
    tight = request.model_copy(update={"host_mem_bytes": most})
    decision = planned(tight, profiles).decision
    assert decision.bf16_copy
    assert decision.active_rows_cap < plan.decision.active_rows_cap
    assert fits(tight, decision, profiles)


def test_a_copy_that_was_asked_for_is_given_up_first():
    profiles = replace(profiles_of(), host=SLOW_GATHER)
    request = tiny_request(adapter_width=32, adapter_dtype="bf16", bf16_copy=True, host_mem_basis="this machine")
    needed = planned(request, profiles).prediction.host_memory.total_bytes
    verdict = refused(
        request.model_copy(update={"host_mem_bytes": machine_bytes_for(needed - 3 * 32 * 16 * 2)}), profiles
    )
    assert verdict.binding == "host memory"
    assert verdict.suggestion == {"--no-bf16-copy": ""}
    assert not planned(with_options(request, verdict.suggestion), profiles).decision.bf16_copy


# --- the Pareto front ------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), max_size=30))
def test_the_front_is_what_nothing_beats(points):
    most, least, also = (np.array([point[axis] for point in points], dtype=np.int64) for axis in range(3))
    front = pareto_front(most, least.astype(np.float64), also).tolist()
    as_costs = [(-a, b, c) for a, b, c in points]

    def beaten(place: int) -> bool:
        mine = as_costs[place]
        return any(
            all(x <= y for x, y in zip(other, mine, strict=True)) and (other != mine or before < place)
            for before, other in enumerate(as_costs)
        )

    assert sorted(front) == [place for place in range(len(points)) if not beaten(place)]
    assert [as_costs[place][:2] for place in front] == sorted(as_costs[place][:2] for place in front)


def test_a_thinned_front_starts_at_a_place_and_keeps_both_ends():
    assert thinned(100, near=50, most=6, neighbours=3) == [
        50,
        49,
        51,
        0,
        48,
        99,
    ]  # of the other 97 the middle one, place 48
    assert thinned(4, near=3, most=6, neighbours=3) == [3, 2, 1, 0]
    assert thinned(1, near=0, most=6, neighbours=3) == [0]


def test_a_plan_shows_its_winner_and_what_could_be_had_instead():
    plan = planned(tiny_request(max_slowdown=50.0))
    points = plan.search.pareto
    assert points[0].decision == plan.decision
    assert 1 < len({point.decision for point in points}) == len(points) <= 12
    for point in points:
        prediction = predict(plan.request, point.decision, profiles_of())
        assert point.trainable_parameters == prediction.trainable_parameters
        assert point.step_seconds == pytest.approx(prediction.timing.step_seconds, rel=1e-12)
        assert point.peak_reserved_bytes == prediction.device_memory.peak_reserved_bytes_at_cap
        assert point.host_bytes == prediction.host_memory.total_bytes


# --- verdicts --------------------------------------------------------------------------------------------------------


def with_options(request: Request, options: dict[str, str]) -> Request:
    """The request as ``meft-plan`` would make it with these options."""
    fields: dict[str, Any] = {}
    for option, value in options.items():
        name = option.removeprefix("--").removeprefix("no-").replace("-", "_")
        if name in ("activation_checkpointing", "bf16_copy"):
            assert value == ""
            fields[name] = not option.startswith("--no-")
        elif name in ("gpu_mem", "host_mem"):
            units = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
            fields[f"{name}_bytes"] = int(value[:-3]) * units[value[-3:]]
        elif name == "min_trainable":
            fields["min_trainable_fraction"] = float(value)
        else:
            fields[name] = float(value) if "." in value else int(value) if value.isdecimal() else value
    return Request.model_validate(request.model_dump() | fields)


def test_device_memory_binds_and_the_card_has_more():
    # The 7B model in bf16 takes 12.55 GiB alone; the test card has 24 GiB.
    request = request_of(gpu_mem_bytes=13 * GIB, adapter_width=6144)
    verdict = refused(request)
    assert verdict.binding == "device memory"
    assert verdict.limit == 13 * GIB < verdict.needed < 16 * GIB
    assert verdict.message.startswith("device memory: the nearest needs 1")
    assert verdict.message.endswith("more than 13.00 GiB (--gpu-mem)")
    assert list(verdict.suggestion) == ["--gpu-mem"]
    assert planned(with_options(request, verdict.suggestion)).request.gpu_mem_bytes - GIB < verdict.needed


def test_lighter_weights_are_nearer_than_a_card_of_twice_the_memory():
    request = request_of(gpu_mem_bytes=8 * GIB, adapter_width=1024)
    verdict = refused(request)
    assert verdict.suggestion == {"--weights-dtype": "nf4", "--adapter-dtype": "bf16"}
    planned(with_options(request, verdict.suggestion))
    hopeless = refused(request.model_copy(update={"gpu_mem_bytes": GIB}))  # 4-bit weights alone take more than 3 GiB
    assert list(hopeless.suggestion) == ["--gpu-mem"]


def test_fewer_hot_rows_are_what_to_change_where_the_card_has_no_more():
    # 18 bytes for each of 2 * 6144 * 4096 * 32 numbers are 27 GiB.
    request = request_of(gpu_mem_bytes=24 * GIB, adapter_width=6144, hot_rows=6144)
    verdict = refused(request)
    assert verdict.binding == "device memory"
    assert verdict.suggestion == {"--hot-rows": "0"}
    assert planned(with_options(request, verdict.suggestion)).decision.hot_rows == 0


def test_the_need_of_device_memory_is_exact():
    request = request_of(gpu_mem_bytes=12 * GIB, adapter_width=6144)
    needed = int(refused(request).needed)
    planned(request.model_copy(update={"gpu_mem_bytes": needed}))
    refused(request.model_copy(update={"gpu_mem_bytes": needed - 1}))


def test_the_context_counts_against_the_card():
    context = SourcedRange(low_bytes=0, high_bytes=GIB, basis="assumed", source="test")
    request = request_of(gpu_mem_bytes=12 * GIB, adapter_width=6144)
    with_context = refused(request, profiles_of(gpu=gpu_profile(context=context)))
    assert with_context.needed == refused(request).needed + GIB


def test_a_card_that_is_too_small_gets_a_smaller_batch():
    # 128 sequences do not fit the card's 24 GiB; no advice to have more than that.
    request = request_of(batch_size=128, adapter_width=6144)
    verdict = refused(request)
    assert verdict.binding == "device memory"
    assert list(verdict.suggestion) == ["--batch-size"]
    planned(with_options(request, verdict.suggestion))
    batch_size = int(verdict.suggestion["--batch-size"])
    assert batch_size in (64, 32, 16, 8, 4, 2, 1)
    refused(request.model_copy(update={"batch_size": 2 * batch_size}))


def test_checkpointing_that_was_switched_off_is_switched_on():
    small = profiles_of(gpu=gpu_profile(memory_total_bytes=sourced(20 * GIB)))
    request = request_of(
        gpu_mem_bytes=20 * GIB, batch_size=1, seq_len=2048, activation_checkpointing=False, adapter_width=6144
    )
    verdict = refused(request, small)
    assert verdict.suggestion == {"--activation-checkpointing": ""}
    assert planned(with_options(request, verdict.suggestion), small).decision.activation_checkpointing


def test_fewer_tokens_where_nothing_else_helps():
    small = profiles_of(gpu=gpu_profile(memory_total_bytes=sourced(13 * GIB)))
    request = request_of(
        gpu_mem_bytes=13 * GIB, batch_size=1, seq_len=2048, activation_checkpointing=True, adapter_width=6144
    )
    verdict = refused(request, small)
    assert list(verdict.suggestion) == ["--seq-len"]
    planned(with_options(request, verdict.suggestion), small)


def test_weights_that_are_too_large_are_quantized():
    small = profiles_of(gpu=gpu_profile(memory_total_bytes=sourced(8 * GIB)))
    request = request_of(gpu_mem_bytes=8 * GIB, adapter_width=6144)
    verdict = refused(request, small)
    assert verdict.suggestion == {"--weights-dtype": "nf4", "--adapter-dtype": "bf16"}
    planned(with_options(request, verdict.suggestion), small)


def test_there_is_no_advice_where_nothing_helps():
    small = profiles_of(gpu=gpu_profile(memory_total_bytes=sourced(GIB)))
    verdict = refused(request_of(gpu_mem_bytes=GIB, adapter_width=6144, top_k=64), small)
    assert verdict.binding == "device memory"
    assert verdict.suggestion == {}


def test_the_emulated_device_takes_its_memory_from_the_machine_s_own():
    # Of 16 GiB the device has 15 and the host the rest; what --gpu-mem gets more, the host budget gets less.
    emulated = profiles_of(gpu=gpu_profile(memory_total_bytes=None, shares_host_cores=True))
    request = request_of(
        gpu_mem_bytes=25 * GIB // 2,
        host_mem_bytes=40 * GIB,
        host_mem_basis="this machine",
        adapter_width=6144,
        max_slowdown=99,
    )
    assert list(refused(request, emulated).suggestion) == ["--gpu-mem"]
    most = machine_bytes_for(24 * GIB + GIB // 4)  # tables 24 GiB, buffers below 256 MiB
    tight = request.model_copy(update={"host_mem_bytes": most})
    assert "--gpu-mem" not in refused(tight, emulated).suggestion


def test_host_memory_binds():
    # fp32 weights, two moments and gradients of 32 layers x 8192 numbers: 4 MiB per row; 6144 rows: 24 GiB and buffers
    request = request_of(host_mem_bytes=20 * GIB, adapter_width=6144)
    verdict = refused(request)
    assert verdict.binding == "host memory"
    assert 24 * GIB < verdict.needed < 24.2 * GIB
    assert verdict.limit == 18 * GIB  # 2 GiB of 20 are left to all else
    assert "(--host-mem less what all else needs)" in verdict.message
    assert verdict.suggestion == {"--host-mem": "27GiB"}  # less a tenth
    planned(with_options(request, verdict.suggestion))


def test_ram_that_is_there_is_not_wished_larger_before_all_else():
    request = request_of(host_mem_bytes=20 * GIB, host_mem_basis="this machine", adapter_width=6144)
    verdict = refused(request)
    assert list(verdict.suggestion) == ["--adapter-width"]
    # 4608 rows are the 18 GiB of 20 that are left, without a buffer; the next multiple of 128 below is 4480
    assert verdict.suggestion["--adapter-width"] == "4480"
    planned(with_options(request, verdict.suggestion))


def test_slowdown_binds():
    request = request_of(max_slowdown=1.0, adapter_width=8192, top_k=256)
    verdict = refused(request)
    assert verdict.binding == "slowdown"
    assert verdict.needed > verdict.limit == 1.0
    assert verdict.message == (
        f"slowdown: the nearest takes {verdict.needed:.3f} times its baseline, the limit is 1.000 (--max-slowdown)"
    )
    assert float(verdict.suggestion["--max-slowdown"]) - verdict.needed < 0.01
    planned(with_options(request, verdict.suggestion))


def test_trainable_share_binds_for_speed_alone():
    fixed = {"adapter_width": 2048, "top_k": 64, "max_slowdown": 100.0}  # 2*2048*4096*32 of 6.74e9: 7.97 %
    planned(request_of(**fixed))
    request = request_of(objective="speed", routing="exact", **fixed)
    verdict = refused(request)
    assert verdict.binding == "trainable share"
    assert (
        verdict.message
        == "trainable share: the nearest trains 7.97% of the model, the least is 10.00% (--min-trainable)"
    )
    assert verdict.suggestion == {"--min-trainable": "0.079"}
    planned(with_options(request, verdict.suggestion))


def test_one_limit_is_raised_rather_than_two_by_less():
    # 10 % of the model takes 10 GiB of host memory (2.5 over); 8.7 % and 8.5 GiB would be nearer to both limits.
    request = request_of(objective="speed", host_mem_bytes=10 * GIB, top_k=64, max_slowdown=100.0)
    verdict = refused(request)
    assert verdict.message.count("the nearest") == len(verdict.suggestion) == 1
    planned(with_options(request, verdict.suggestion))


def test_two_limits_that_bind_are_both_told_and_raised():
    request = request_of(gpu_mem_bytes=13 * GIB, host_mem_bytes=20 * GIB, adapter_width=6144)
    verdict = refused(request)
    assert verdict.message.count("the nearest needs") == 2
    assert set(verdict.suggestion) == {"--gpu-mem", "--host-mem"}
    planned(with_options(request, verdict.suggestion))


def test_excess_is_a_share_of_the_limit():
    most = Limit("host memory", "host_mem_bytes", np.array([50, 100, 150]), 100)
    assert most.excess().tolist() == [0, 0, 0.5]
    least = Limit("trainable share", "min_trainable_fraction", np.array([0.05, 0.1, 0.2]), 0.1, at_least=True)
    assert least.excess().tolist() == [1.0, 0, 0]


# --- requests that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights_dtype": "fp16"}, "weights_dtype fp16: the runtime trains beside fp32, bf16 or nf4"),
        ({"weights_dtype": "int8"}, "weights_dtype int8"),
        ({"bf16_copy": True}, "bf16_copy: the adapter's rows travel in fp32"),
        ({"adapter_width": 4, "top_k": 5}, "top_k 5 is above adapter_width 4"),
        ({"prefetch_depth": 3}, "prefetch_depth 3: tiny has 3 layers; give at most 2"),
    ],
)
def test_a_request_that_cannot_be_run_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        make_plan(tiny_request(**changes), profiles_of(), meft_version="test")


def test_a_sparsity_profile_of_another_model_is_refused():
    with pytest.raises(UsageError, match="has 2 layers but the model has 3"):
        make_plan(tiny_request(), profiles_of(0.5, 0.6), meft_version="test")


# --- the prediction of one decision ----------------------------------------------------------------------------------


def test_given_rows_take_the_place_of_expected_ones():
    request = tiny_request()
    decision = decision_of(adapter_width=32, top_k=4, active_rows_cap=20)
    expected = predict(request, decision, profiles_of())
    given_rows = predict(request, decision, profiles_of(), active_rows_per_layer=[4, 20, 5])
    assert given_rows.sparsity.active_rows_per_layer == (4, 20, 5)
    assert given_rows.sparsity.basis == "measured"
    # rows and row gradients, [A, 2D] fp32 each way; no look-ahead, so the three layers' queries are the same
    assert given_rows.transfer.h2d_bytes_per_step - expected.transfer.h2d_bytes_per_step == 64 * (
        29 - sum(expected.sparsity.active_rows_per_layer)
    )
    # the window of two micro-batches has no fewer rows than one and no more than two
    assert given_rows.sparsity.window_active_rows_per_layer[0] == 8
    assert given_rows.sparsity.window_active_rows_per_layer[1] >= 20
    assert given_rows.device_memory.peak_allocated_bytes_at_cap == expected.device_memory.peak_allocated_bytes_at_cap


@pytest.mark.parametrize(
    ("rows", "message"),
    [([4, 4], "for 2 layers, the model has 3"), ([4, 21, 4], "the cap 20"), ([4, -1, 4], "between 0 and the cap")],
)
def test_given_rows_must_be_possible(rows, message):
    decision = decision_of(adapter_width=32, top_k=4, active_rows_cap=20)
    with pytest.raises(ValueError, match=message):
        predict(tiny_request(), decision, profiles_of(), active_rows_per_layer=rows)


def test_device_memory_is_the_same_whatever_rows_are_active():
    decision = decision_of(adapter_width=32, top_k=4, active_rows_cap=20)
    few, many = (
        predict(tiny_request(), decision, profiles_of(), active_rows_per_layer=[rows] * 3).device_memory
        for rows in (4, 20)
    )
    assert few == many
    assert few.peak_allocated_bytes == few.peak_allocated_bytes_at_cap
    assert few.peak_reserved_bytes == few.peak_reserved_bytes_at_cap


def test_routers_are_trained_too():
    # 3 layers of D = 8: 2*32*8*3 keys and values; 4 experts: 4*8*3 router weights
    exact = decision_of(adapter_width=32, top_k=4, active_rows_cap=20)
    gated = decision_of(
        adapter_width=32, top_k=4, active_rows_cap=20, routing="key-experts", num_experts=4, num_probes=2
    )
    assert predict(tiny_request(), exact, profiles_of()).trainable_parameters == 1536
    prediction = predict(tiny_request(), gated, profiles_of())
    assert prediction.trainable_parameters == 1536 + 96
    assert prediction.trainable_fraction == prediction.trainable_parameters / tiny_shape().num_parameters


# --- where the numbers come from -------------------------------------------------------------------------------------


def test_a_plan_names_its_profiles_by_digest():
    profiles = profiles_of()
    used = {profile.kind: profile for profile in planned(tiny_request(), profiles).inputs.profiles}
    assert set(used) == {"gpu", "link", "host", "sparsity", "model"}
    assert used["host"].digest == profiles.host.content_digest()
    assert used["model"].digest == tiny_shape().content_digest()


def test_a_plan_lists_the_numbers_it_rests_on_and_no_others():
    names = {number.name: number for number in planned(tiny_request(rows_in_backward="retained")).inputs.numbers}
    assert names["gpu.fp32_flops_per_second"].value == 25e12
    assert names["sparsity.alpha"].value == 0.5
    assert not any(name.startswith("allocator.") for name in names)  # what it reserves is replayed
    assert "gpu.bf16_flops_per_second" not in names  # weights and adapter are fp32
    assert "link.duplex_h2d_bytes_per_second" not in names  # retained rows do not meet their gradients
    refetched = planned(tiny_request(rows_in_backward="refetched", prefetch_depth=0, adapter_dtype="bf16"))
    names = {number.name: number for number in refetched.inputs.numbers}
    assert "link.duplex_h2d_bytes_per_second" in names
    assert "gpu.bf16_flops_per_second" in names


def test_a_profile_of_many_layers_is_summed_up():
    numbers = {n.name: n.value for n in planned(tiny_request(), profiles_of(0.4, 0.5, 0.9)).inputs.numbers}
    assert (numbers["sparsity.alpha_lowest"], numbers["sparsity.alpha_highest"]) == (0.4, 0.9)
    assert numbers["sparsity.alpha_mean"] == pytest.approx(0.6)
