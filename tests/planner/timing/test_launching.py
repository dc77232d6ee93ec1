"""The thread that launches as an agent of a step: by hand, what must hold of every step, and when it is left out."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_records import (
    decision_of,
    gpu_profile,
    host_profile,
    launching,
    link_profile,
    request_of,
    sparsity_profile,
    tiny_shape,
)

from meft.planner.predict.prediction import ProfileSet, inputs_used, predict
from meft.planner.records.plan import Decision, Request, Timing
from meft.planner.timing.chrome import Event
from meft.planner.timing.lanes import baseline_seconds, simulate
from meft.planner.timing.launching import LaunchSeconds, launch_seconds
from meft.planner.timing.layer_kernels import LAYERS
from meft.planner.timing.program import GpuSeconds, HostSeconds, LinkSeconds, StepCosts
from meft.planner.timing.step import step_timing

TASKS = tuple(field.name for field in fields(LaunchSeconds))


def costs_of(launch: LaunchSeconds | None, **seconds: float) -> StepCosts:
    """Layers that are alike; what is not named takes no time."""

    def of(kind: type) -> Any:
        values = {}
        for field in fields(kind):
            value = seconds.get(field.name, 0.0)
            values[field.name] = np.array([value]) if field.name in kind.PER_LAYER else value
        if kind is LinkSeconds:
            values |= {"chunks": 1, "exchange": None}
        if kind is GpuSeconds:
            values |= {"unpack": None, "hot_adamw": None}
        return kind(**values)

    return StepCosts(of(GpuSeconds), of(LinkSeconds), of(HostSeconds), launch=launch)


def seconds_of(costs: StepCosts, **choices: Any) -> float:
    usual = {"num_layers": 2, "prefetch_depth": 0, "checkpointing": False, "refetched": False}
    return float(simulate(costs, **(usual | choices)).step_seconds)


EACH = LaunchSeconds(attention=3.0, router=0.0, ffn=2.0, adapter=1.0, adapter_backward=2.0, backward=4.0)
WORK = {"attention": 1.0, "ffn": 1.0, "adapter_forward": 1.0, "adapter_backward": 1.0, "frozen_backward": 1.0}


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_a_device_that_is_faster_than_it_is_told_waits() -> None:
    """Launched: attention 0 at 3, ffn 5, adapter 6, attention 1 at 9, ffn 11, adapter 12; backward: adapter 1 at 14,
    frozen 1 at 18, adapter 0 at 20. Each has then been done, as its kernels ran while they were launched."""
    costs = costs_of(EACH, **WORK)
    assert seconds_of(costs) == 20.0
    assert seconds_of(replace(costs, launch=None)) == 9.0
    assert baseline_seconds(costs, num_layers=2) == 20.0
    assert baseline_seconds(replace(costs, launch=None), num_layers=2) == 9.0


def test_a_device_that_is_slower_than_it_is_told_never_waits() -> None:
    """It begins with the first kernel, and has something to do from then on."""
    slow = dict.fromkeys(WORK, 10.0)
    assert seconds_of(costs_of(EACH, **slow)) == seconds_of(costs_of(None, **slow))


def test_a_task_begins_when_launching_it_does() -> None:
    """Attention works from 0 to 10, though its last kernel is launched at 3; the FFN, launched by then, follows."""
    events: list[Event] = []
    seconds_of(costs_of(EACH, **WORK | {"attention": 10.0}), num_layers=1, events=events)
    spans = {event.name: (event.start_seconds, event.end_seconds) for event in events}
    assert (spans["attention 0"], spans["ffn 0"]) == ((0.0, 10.0), (10.0, 11.0))


def test_an_adapter_is_launched_when_its_rows_are_on_their_way() -> None:
    """One layer: the hidden state is there at 3, routed at 13; rows, gathered then, take no time. The adapter is
    launched, and done, at 14, its backward at 16."""
    assert seconds_of(costs_of(EACH, **WORK, route=10.0), num_layers=1) == 16.0


def test_with_look_ahead_it_is_launched_before() -> None:
    """Two layers, both served by layer 0's hidden state, at 3: routed at 4 and 5. Nothing waits for the host."""
    assert seconds_of(costs_of(EACH, **WORK, route=1.0), prefetch_depth=1) == 20.0


def test_in_sequence_one_thread_launches_and_works_for_the_host() -> None:
    """Attention 0 launched at 3, ffn at 5; routed from 5 to 15, adapter launched at 16. Attention 1 at 19, ffn at 21,
    routed until 31, adapter at 32. Adapter 1 backward launched at 34; the thread adds its gradients up when they have
    arrived, for a second, and only then launches frozen 1, at 39, and adapter 0, at 41, whose it adds up at 42."""
    assert seconds_of(costs_of(EACH, **WORK, route=10.0, accumulate=1.0), overlapped=False) == 42.0


def test_going_backward_is_launched_when_the_gradient_buffer_s_content_is_leaving() -> None:
    """Layer 2's gradients are added up from 20 to 70. Layer 1's wait until then for the landing; layer 0's take the
    buffer when those are on their way, at 70: launched at 72."""
    events: list[Event] = []
    seconds_of(costs_of(EACH, **WORK, accumulate=50.0), num_layers=3, events=events)
    ends = {event.name: event.end_seconds for event in events}
    assert (ends["adapter backward 2"], ends["adapter backward 1"], ends["adapter backward 0"]) == (20.0, 26.0, 72.0)


def test_what_is_recomputed_is_launched_again() -> None:
    """With checkpointing each layer's forward is launched once more, 6 seconds each."""
    costs = costs_of(EACH, **WORK)
    assert seconds_of(costs, checkpointing=True) == 20.0 + 2 * 6.0
    mixed = simulate(
        costs, num_layers=2, prefetch_depth=0, checkpointing=np.array([True, False]), refetched=False
    ).step_seconds
    assert np.asarray(mixed).tolist() == [32.0, 20.0]


# --- what holds of every step ----------------------------------------------------------------------------------------

SECONDS = st.floats(0.0, 3.0, width=32)


@given(
    launch=st.builds(LaunchSeconds, **dict.fromkeys(TASKS, SECONDS)),
    work=st.fixed_dictionaries(
        dict.fromkeys((*WORK, "router", "queries", "probes", "rows", "route", "gather", "accumulate"), SECONDS)
    ),
    num_layers=st.sampled_from([1, 2, 3, 7]),
    depth=st.integers(0, 3),
    checkpointing=st.booleans(),
    refetched=st.booleans(),
    overlapped=st.booleans(),
)
def test_launching_makes_a_step_longer_by_no_more_than_it_takes(
    launch, work, num_layers, depth, checkpointing, refetched, overlapped
) -> None:
    choices = {
        "num_layers": num_layers,
        "prefetch_depth": depth,
        "checkpointing": checkpointing,
        "refetched": refetched,
        "overlapped": overlapped,
    }
    without = seconds_of(costs_of(None, **work), **choices)
    found = seconds_of(costs_of(launch, **work), **choices)
    again = num_layers * (launch.attention + launch.ffn + launch.adapter) if checkpointing else 0.0
    total = launch.of_layers(num_layers) + again
    assert without <= found * (1 + 1e-9)
    assert total <= found * (1 + 1e-9)
    assert found <= (without + total) * (1 + 1e-9)


# --- where it is known -----------------------------------------------------------------------------------------------


def timing(request: Request, decision: Decision, profiles: ProfileSet) -> Timing:
    rows = (decision.active_rows_cap,) * request.model.num_layers
    return step_timing(
        request=request,
        decision=decision,
        gpu=profiles.gpu,
        link=profiles.link,
        host=profiles.host,
        active_rows_per_layer=rows,
        window_active_rows_per_layer=rows,
    )


def profiles_with(**changes: Any) -> ProfileSet:
    parts = {"gpu": gpu_profile(), "link": link_profile(), "host": host_profile(), "sparsity": sparsity_profile()}
    return ProfileSet(**(parts | changes))


def test_a_profile_that_knows_only_some_of_it_knows_nothing() -> None:
    some = launching(1e-3)
    some.pop("launch_ffn_seconds")
    assert launch_seconds(request_of(), gpu_profile(), host_profile(**some)) is None
    assert launch_seconds(request_of(), gpu_profile(), host_profile()) is None


def test_the_emulated_device_has_it_in_its_rates() -> None:
    host = host_profile(**launching(1e-3))
    emulated = gpu_profile(shares_host_cores=True)
    assert launch_seconds(request_of(), emulated, host) is None
    request, decision = request_of(model=tiny_shape()), decision_of()
    for gpu, named in ((emulated, 0), (gpu_profile(), len(TASKS))):
        numbers = inputs_used(request, decision, profiles_with(gpu=gpu, host=host)).numbers
        assert sum(number.name.startswith("host.launch_") for number in numbers) == named


def test_a_plan_for_a_fast_card_says_how_long_python_takes() -> None:
    """Seconds of launching beside which all else is nothing: the step is launching, and so is the baseline."""
    request, decision, slow = request_of(model=tiny_shape()), decision_of(), host_profile(**launching(10.0))
    launch = launch_seconds(request, gpu_profile(), slow)
    assert launch is not None
    found = timing(request, decision, profiles_with(host=slow))
    assert found.step_seconds == pytest.approx(launch.of_layers(request.model.num_layers), rel=0.01)
    assert found.baseline_step_seconds == launch.of_layers(request.model.num_layers)
    predicted = predict(request, decision, profiles_with(host=slow), replayed=False).timing
    assert predicted.step_seconds == pytest.approx(found.step_seconds, rel=0.01)


def test_layers_of_other_kernels_are_launched_by_their_number() -> None:
    host = host_profile(**launching(1e-3))
    llama, gpt2 = (LaunchSeconds.of(host, LAYERS[family, 4, "fused"]) for family in ("llama", "gpt2"))
    assert llama is not None
    assert gpt2 is not None
    assert [getattr(llama, task) for task in TASKS] == pytest.approx([1e-3 * (place + 1) for place in range(6)])
    assert gpt2.attention == pytest.approx(1e-3 * 6 / 28)
    assert gpt2.ffn == pytest.approx(3e-3 * 11 / 6)
    assert gpt2.backward == pytest.approx(6e-3 * 21 / 56)
    assert (gpt2.router, gpt2.adapter, gpt2.adapter_backward) == (llama.router, llama.adapter, llama.adapter_backward)
