"""What host kernels lose to Python beside them, and the decision to bind both to cores of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_records import (
    GIB,
    gpu_profile,
    host_profile,
    launching,
    link_profile,
    request_of,
    sourced,
    sparsity_profile,
)

from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import Decision, Plan
from meft.planner.records.profiles import sourced_numbers
from meft.planner.render.details import detail_sections
from meft.planner.render.tables import show
from meft.planner.search.search import make_plan
from meft.planner.search.weighing import weigh
from meft.planner.timing.cores import beside_python, binding_pays, python_share
from meft.planner.timing.launching import LaunchSeconds

REQUEST = request_of(gpu_mem_bytes=20 * GIB, host_mem_bytes=48 * GIB, top_k=64, adapter_width=4096, max_slowdown=1e9)


def host_with(busy: float | None, bound: float | None, *, launch: float | None = 1e-4):
    fractions = {"busy_rates_fraction": busy, "bound_rates_fraction": bound}
    known = {name: sourced(value) for name, value in fractions.items() if value is not None}
    return host_profile(**known, **(launching(launch) if launch is not None else {}))


def profiles_with(host, **changes) -> ProfileSet:
    return replace(ProfileSet(gpu_profile(), link_profile(), host, sparsity_profile()), **changes)


@pytest.mark.parametrize(
    ("busy", "bound", "pays"),
    [(0.5, 0.9, True), (0.9, 0.5, False), (0.9, 0.91, False), (0.9, None, False), (None, 0.9, False)],
)
def test_cores_are_divided_where_kernels_are_faster_for_it(busy, bound, pays) -> None:
    assert binding_pays(gpu_profile(), host_with(busy, bound)) is pays
    assert not binding_pays(gpu_profile(shares_host_cores=True), host_with(busy, bound))


def test_a_share_of_python_slows_the_kernels_for_as_long() -> None:
    """A quarter of the time at half the rate: 1.25 times as long; bound at four fifths, 1.0625 times."""
    host = host_with(0.5, 0.8)
    for bound, times in ((False, 1.25), (True, 1.0625)):
        found = dict(sourced_numbers(beside_python(host, 0.25, bound=bound)))
        for name, number in sourced_numbers(host):
            expected = number.value / times if name.endswith("_per_second") else number.value
            assert found[name].value == pytest.approx(expected)
    assert beside_python(host_with(None, None), 0.25, bound=True) == host_with(None, None)


def test_python_works_for_as_long_as_it_launches() -> None:
    each = LaunchSeconds(attention=1.0, router=0.0, ffn=1.0, adapter=1.0, adapter_backward=1.0, backward=9.0)
    assert python_share(each, layer_seconds=16.0) == 0.25
    assert python_share(each, layer_seconds=2.0) == 1.0


def plan_of(host) -> Plan:
    plan = make_plan(REQUEST, profiles_with(host), meft_version="0")
    assert isinstance(plan, Plan)
    return plan


def test_a_plan_binds_where_that_pays_and_is_shorter_for_it(capsys) -> None:
    free, bound = plan_of(host_with(0.3, None)), plan_of(host_with(0.3, 0.9))
    assert not free.decision.bind_cores
    assert bound.decision.bind_cores
    same = free.decision.model_copy(update={"bind_cores": True})
    seconds = [
        predict(REQUEST, decision, profiles_with(host_with(0.3, 0.9)), replayed=False).timing.busy_seconds["cpu"]
        for decision in (free.decision, same)
    ]
    assert seconds[1] < seconds[0]
    for section in detail_sections(bound):
        show(section)
    assert "the host's kernels apart from Python, faster so" in capsys.readouterr().out
    assert "cores" not in free.decision.model_dump_json()
    assert Decision.model_validate_json(bound.decision.model_dump_json()).bind_cores


def test_the_readable_search_says_the_same_of_bound_cores() -> None:
    profiles = profiles_with(host_with(0.3, 0.9))
    weighed = weigh(REQUEST, profiles)
    decision = weighed.decision(weighed.best(REQUEST))
    assert decision.bind_cores
    assert plan_of(host_with(0.3, 0.9)).prediction.timing.step_seconds <= weighed.step_seconds.max()


def test_without_what_launching_takes_nobody_is_beside_the_kernels() -> None:
    plans = [plan_of(host_with(busy, None, launch=None)) for busy in (0.3, None)]
    assert plans[0].prediction.timing == plans[1].prediction.timing
