"""The quick search against the readable one: the same to the bit, whatever is asked."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_records import (
    GIB,
    gpu_profile,
    host_profile,
    launching,
    link_profile,
    request_of,
    sourced,
    sparsity_profile,
    tiny_shape,
)

from meft.planner.predict.prediction import ProfileSet
from meft.planner.records.plan import Request
from meft.planner.records.profiles import SparsityProfile
from meft.planner.search.cost_table import Cells, CostTable
from meft.planner.search.sifted_choice import Listed, best, front
from meft.planner.search.sifting import Sifted
from meft.planner.search.weighing import weigh
from meft.planner.timing import apart
from meft.planner.timing.apart import (
    backward_seconds,
    backward_tasks,
    forward_seconds,
    forward_tasks,
    least_backward,
    least_forward,
)
from meft.planner.timing.lanes import simulate, simulate_candidates
from meft.planner.timing.program import GpuSeconds, HostSeconds, LinkSeconds, StepCosts

KIB = 1 << 10
COUNT = 24
"""Candidates of random costs."""

# --- step seconds ----------------------------------------------------------------------------------------------------


def random_costs(seed: int, *, layers: int, spread: float, hot: bool, machines: bool = False) -> StepCosts:
    """Costs of some candidates, each task up to ``spread`` powers of ten from the others; of odd seeds few
    values, so that lanes often tie."""
    random = np.random.default_rng(seed)

    def seconds(*shape: int) -> Any:
        return np.round(10.0 ** random.uniform(-spread, 0.0, shape), 2 if seed % 2 else 9) + 0.01

    def number() -> float:
        return float(seconds())

    def each() -> Any:
        return seconds(COUNT)

    def by_layer() -> Any:
        return seconds(layers, COUNT)

    return StepCosts(
        gpu=GpuSeconds(
            embedding=number(),
            attention=number(),
            router=each(),
            ffn=number(),
            adapter_forward=by_layer(),
            loss_head=number(),
            adapter_backward=by_layer(),
            frozen_backward=number(),
            router_adamw=each(),
            assemble=by_layer(),
            sum_gradients=by_layer(),
            hot_adamw=number() if hot else None,
        ),
        link=LinkSeconds(
            inputs=number(),
            queries=number(),
            probes=each(),
            rows=by_layer(),
            loss=number(),
            rows_refetched=by_layer(),
            row_gradients=by_layer(),
            router_norm=each(),
            hot_keys=number() if hot else 0.0,
            exchange=by_layer() if machines else None,
            sums=each() if machines else 0.0,
        ),
        host=HostSeconds(
            route=each(),
            gather=by_layer(),
            accumulate=by_layer(),
            adamw=each(),
            gather_again=by_layer(),
            hot_keys=number() if hot else 0.0,
        ),
    )


COSTS = {
    "seed": st.integers(0, 10**6),
    "num_layers": st.sampled_from([1, 2, 3, 4, 7, 12, 32]),
    "alike": st.booleans(),
    "spread": st.sampled_from([0.1, 0.5, 2.0]),
    "depth": st.integers(0, 4),
    "checkpointing": st.booleans(),
    "refetched": st.booleans(),
    "hot": st.booleans(),
    "machines": st.booleans(),
}


@settings(max_examples=300)
@given(**COSTS)
def test_forward_and_backward_apart_take_as_long_as_the_program(
    seed, num_layers, alike, spread, depth, checkpointing, refetched, hot, machines
):
    costs = random_costs(seed, layers=1 if alike else num_layers, spread=spread, hot=hot, machines=machines)
    program = simulate(
        costs, num_layers=num_layers, prefetch_depth=depth, checkpointing=checkpointing, refetched=refetched
    ).step_seconds
    ahead, behind = forward_tasks(costs), backward_tasks(costs, refetched=refetched)
    forward = forward_seconds(ahead, num_layers=num_layers, prefetch_depth=depth)
    backward = backward_seconds(
        behind, num_layers=num_layers, prefetch_depth=depth, checkpointing=checkpointing, refetched=refetched
    )
    said = ~np.isnan(backward)  # the others are doubtful
    np.testing.assert_allclose((forward + backward)[said], program[said], rtol=1e-11)
    least = least_forward(ahead, num_layers=num_layers)
    assert np.all(least <= forward * (1 + 1e-12))
    least = least + least_backward(behind, num_layers=num_layers, checkpointing=checkpointing)
    assert np.all(least <= program * (1 + 1e-12))


def test_a_first_gather_that_may_begin_before_backward_is_doubtful():
    costs = random_costs(2, layers=1, spread=0.1, hot=False)
    times = np.where(np.arange(COUNT) % 2 == 0, 1.0, 100.0)
    costs = replace(costs, host=replace(costs.host, gather_again=costs.host.gather_again * times))
    choices = {"num_layers": 12, "prefetch_depth": 1, "checkpointing": False, "refetched": True}
    seconds = backward_seconds(backward_tasks(costs, refetched=True), **choices)
    assert np.isnan(seconds).tolist() == [place % 2 == 1 for place in range(COUNT)]
    without = backward_seconds(backward_tasks(costs, refetched=False), **(choices | {"refetched": False}))
    assert not np.isnan(without).any()


def test_layers_that_repeat_each_other_are_skipped(monkeypatch):
    costs, num_layers = random_costs(1, layers=1, spread=0.5, hot=False), 1000
    run = []
    real = apart._forward_layer
    monkeypatch.setattr(
        apart, "_forward_layer", lambda *given, depth: run.append(given[2]) or real(*given, depth=depth)
    )
    quick = forward_seconds(forward_tasks(costs), num_layers=num_layers, prefetch_depth=2)
    assert len(run) < 100
    every = apart.Forward(**(vars(forward_tasks(costs)) | {"rows": np.repeat(costs.link.rows, num_layers, axis=0)}))
    slow = forward_seconds(every, num_layers=num_layers, prefetch_depth=2)
    np.testing.assert_allclose(quick, slow, rtol=1e-11)
    assert len(run) > 900


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    num_layers=st.sampled_from([1, 2, 3, 5]),
    hot=st.booleans(),
    machines=st.booleans(),
)
def test_candidates_of_all_choices_are_simulated_together_to_the_bit(seed, num_layers, hot, machines):
    costs = random_costs(seed, layers=num_layers, spread=0.5, hot=hot, machines=machines)
    random = np.random.default_rng(seed)
    depth, again, refetched = random.integers(0, 3, COUNT), random.random(COUNT) < 0.5, random.random(COUNT) < 0.5
    together = simulate_candidates(
        costs, num_layers=num_layers, prefetch_depth=depth, checkpointing=again, refetched=refetched
    )
    one_by_one = [
        simulate(
            costs.take(np.array([place])),
            num_layers=num_layers,
            prefetch_depth=int(depth[place]),
            checkpointing=bool(again[place]),
            refetched=bool(refetched[place]),
        ).step_seconds[0]
        for place in range(COUNT)
    ]
    assert together.tolist() == one_by_one


# --- the whole search ------------------------------------------------------------------------------------------------


def profiles_of(*alphas: float, popular: bool = False, **changes: Any) -> ProfileSet:
    sparsity = sparsity_profile(*alphas or (0.5,))
    if popular:
        points = ({"rows": 0.1, "traffic": 0.4}, {"rows": 0.25, "traffic": 0.7})
        sparsity = SparsityProfile.model_validate(sparsity.model_dump() | {"popularity": points})
    return replace(ProfileSet(gpu_profile(), link_profile(), host_profile(), sparsity), **changes)


def tiny_request(**changes: Any) -> Request:
    """Three layers of D = 8, T = 8: budgets of some tens of KiB decide."""
    small = {"batch_size": 2, "seq_len": 4, "grad_accum": 2, "weights_dtype": "fp32", "adapter_dtype": "fp32"}
    limitless = {"gpu_mem_bytes": 1 << 40, "host_mem_bytes": 1 << 40, "max_slowdown": 1e9}
    return request_of(model=tiny_shape(), **(small | limitless | changes))


def assert_same(request: Request, profiles: ProfileSet) -> None:
    """The quick search says what the readable one says."""
    quick, slow = Sifted(request, profiles), weigh(request, profiles)
    np.testing.assert_array_equal(quick.within, slow.within)
    assert quick.num_feasible == int(slow.feasible.sum())
    if not quick.num_feasible:
        return
    winner = best(quick)
    assert winner == slow.best(request)
    chosen = front(quick, winner)
    assert chosen == slow.front(winner, request)
    points = [(quick.point(index, unused_bytes=7), slow.point(index, request, unused_bytes=7)) for index in chosen]
    assert [ours.model_dump_json() for ours, _ in points] == [theirs.model_dump_json() for _, theirs in points]
    assert quick.device.at(winner) == slow.at(slow.allocated_bytes, winner)


REQUESTS = st.fixed_dictionaries(
    {
        "gpu_mem_bytes": st.one_of(st.integers(60 * KIB, 200 * KIB), st.just(1 << 40)),
        "host_mem_bytes": st.one_of(st.integers(20 * KIB, 200 * KIB), st.just(1 << 40)),
        "max_slowdown": st.one_of(st.floats(1.0, 100.0), st.just(1e9)),
        "objective": st.sampled_from(["capacity", "speed", "traffic"]),
        "min_trainable_fraction": st.sampled_from([0.0, 0.1]),
        "adapter_dtype": st.sampled_from(["fp32", "bf16"]),
        "grad_accum": st.sampled_from([1, 2, 8]),
        "adapter_width": st.sampled_from([None, None, 13, 32]),
        "top_k": st.sampled_from([None, 4]),
        "hot_rows": st.sampled_from([None, None, 3]),
        "prefetch_depth": st.sampled_from([None, None, 0, 2]),
        "rows_in_backward": st.sampled_from([None, None, "retained", "refetched"]),
        "activation_checkpointing": st.sampled_from([None, None, True, False]),
        "routing": st.sampled_from([None, None, "exact", "key-experts", "centroid", "switch", "stable"]),
    }
)


@settings(max_examples=60)
@given(
    fields=REQUESTS,
    alphas=st.sampled_from([(0.5,), (0.9, 0.4, 0.6)]),
    rate=st.sampled_from([1e5, 2e6, 1e9]),
    popular=st.booleans(),
    copy=st.sampled_from([None, None, True, False]),
    launch=st.sampled_from([None, None, 1e-6, 1e-4]),
)
def test_the_quick_search_says_what_the_readable_one_says(fields, alphas, rate, popular, copy, launch):
    rates = {"gather_bytes_per_second": sourced(rate), "adamw_bytes_per_second": sourced(4 * rate)}
    slow_host = host_profile(**rates, **({} if launch is None else launching(launch)))
    asked = fields | ({"bf16_copy": copy} if fields["adapter_dtype"] == "bf16" else {})
    assert_same(tiny_request(**asked), profiles_of(*alphas, popular=popular, host=slow_host))


LLAMA = {"gpu_mem_bytes": 20 * GIB, "host_mem_bytes": 48 * GIB, "top_k": 64, "adapter_dtype": "bf16"}


@pytest.mark.parametrize("objective", ["capacity", "speed", "traffic"])
def test_the_quick_search_says_the_same_of_a_7b_model(objective):
    assert_same(request_of(objective=objective, **LLAMA), profiles_of())


def test_a_limit_that_a_decision_just_keeps_is_kept():
    # The slowdowns of some decisions, and the numbers just below them: seconds that are close would not tell.
    profiles = profiles_of(0.9, 0.4, 0.6)
    slowdowns = np.unique(weigh(tiny_request(adapter_width=16), profiles).limits[-1].needed)
    for slowdown in slowdowns[:: max(len(slowdowns) // 12, 1)].tolist():
        for limit in (slowdown, math.nextafter(slowdown, 0.0)):
            if limit >= 1.0:
                assert_same(tiny_request(adapter_width=16, max_slowdown=limit), profiles)


def test_the_program_is_asked_for_few():
    asked = []
    real = CostTable.exact_seconds

    def counted(self: CostTable, cells: Cells) -> Any:
        asked.append(len(cells))
        return real(self, cells)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CostTable, "exact_seconds", counted)
        quick = Sifted(request_of(**LLAMA), profiles_of())
        front(quick, best(quick))
    assert 0 < sum(asked) < 0.01 * quick.seconds[0].size


# --- its parts -------------------------------------------------------------------------------------------------------


def test_every_cell_s_seconds_and_bytes_are_the_program_s():
    request, profiles = tiny_request(adapter_width=24, adapter_dtype="bf16"), profiles_of(0.9, 0.4, 0.6)
    quick, slow = Sifted(request, profiles), weigh(request, profiles)
    cells = tuple(axis.ravel() for axis in np.indices(quick.seconds[0].shape))
    close = [seconds.copy() for seconds in quick.seconds]
    quick.make_exact(*cells)
    for before, after in zip(close, quick.seconds, strict=True):
        known = np.isfinite(before)
        np.testing.assert_allclose(before[known], after[known], rtol=1e-12)
    everywhere = tuple(axis.ravel() for axis in np.indices(quick.space.shape))
    listed = Listed(quick, everywhere)
    np.testing.assert_array_equal(listed.seconds, np.broadcast_to(slow.step_seconds, quick.space.shape).ravel())
    np.testing.assert_array_equal(listed.allocated_bytes, slow.allocated_bytes.ravel())


def test_what_the_front_leaves_out_is_beaten_by_fewer_probes():
    # a host that gathers slowly: with more probes a copy pays in some steps that it does not shorten with fewer
    host = host_profile(gather_bytes_per_second=sourced(5e9))
    quick = Sifted(
        request_of(**(LLAMA | {"objective": "speed", "min_trainable_fraction": 0.0})), profiles_of(host=host)
    )
    first, kind_of, leading = quick.table.first_of_kind, quick.table.kind_of, quick.leading_routings
    assert len(first) < len(leading) < len(kind_of)
    left_out = np.setdiff1d(np.arange(len(kind_of)), leading)
    *axes, place = np.nonzero(quick.within[..., left_out])
    beaten = Listed(quick, (*axes, left_out[place]))
    by = Listed(quick, (*axes, first[kind_of[left_out[place]]]))
    assert quick.within[by.axes].all()
    assert np.all(by.seconds <= beaten.seconds * (1 + 1e-9))
    assert np.all(by.allocated_bytes <= beaten.allocated_bytes)
