"""Step time: hand-made schedules, what must hold of every schedule, the cost of each task, arrays against numbers."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_records import (
    decision_of,
    gpu_profile,
    host_profile,
    link_profile,
    request_of,
    side_by_side,
    sourced,
    tiny_shape,
)

from meft.planner.records.candidates import Candidates
from meft.planner.timing.chrome import Event, chrome_trace
from meft.planner.timing.gpu import attention_seconds, ffn_seconds, gpu_rates
from meft.planner.timing.lanes import baseline_seconds, simulate, simulate_candidates
from meft.planner.timing.program import (
    GpuSeconds,
    HostSeconds,
    Lanes,
    LinkSeconds,
    StepCosts,
    overlapped_seconds,
)
from meft.planner.timing.step import step_costs, step_timing

GPU_FIELDS, LINK_FIELDS, HOST_FIELDS = (
    tuple(field.name for field in fields(kind)) for kind in (GpuSeconds, LinkSeconds, HostSeconds)
)
FIELDS = (*GPU_FIELDS, *LINK_FIELDS, *HOST_FIELDS)
OF_SHARDED_BASE = ("unpack", "weights", "weights_sent")
TASKS = tuple(name for name in FIELDS if name not in ("chunks", *OF_SHARDED_BASE))
"""Whose values are seconds, and that every step has."""
PER_LAYER = GpuSeconds.PER_LAYER | LinkSeconds.PER_LAYER | HostSeconds.PER_LAYER


def costs_of(**seconds: float) -> StepCosts:
    """Costs with every layer alike; what is not named takes no time."""
    given_seconds: dict[str, Any] = dict.fromkeys(FIELDS, 0.0) | {"gather_again": seconds.get("gather", 0.0)} | seconds
    values = {name: np.array([value]) if name in PER_LAYER else value for name, value in given_seconds.items()}
    for name in ("exchange", "unpack"):
        values[name] = values[name] if name in seconds else None
    return StepCosts(
        GpuSeconds(**{name: values[name] for name in GPU_FIELDS}),
        LinkSeconds(**{name: values[name] for name in LINK_FIELDS}),
        HostSeconds(**{name: values[name] for name in HOST_FIELDS}),
    )


GATHERED = {"attention": 1.0, "ffn": 1.0, "frozen_backward": 2.0, "unpack": 0.0, "weights": 3.0, "weights_sent": 2.0}


@pytest.mark.parametrize(("checkpointing", "step_seconds", "gathers"), [(True, 17.0, 4), (False, 13.0, 3)])
def test_weights_of_the_next_layer_come_while_one_is_computed(checkpointing, step_seconds, gathers) -> None:
    """Two layers. Forward: weights 0 until 3, layer 0 until 5; weights 1 from 3 to 6, layer 1 until 8. Backward: its
    weights again until 11, and weights 0 again, from then on, until 14. Checkpointed, layer 1 is computed again until
    13 and goes backward until 15, layer 0 is computed again until 17. Not checkpointed, layer 1 goes backward until 13,
    and layer 0 has no backward, nor weights for it."""
    step = simulate(costs_of(**GATHERED), num_layers=2, prefetch_depth=0, checkpointing=checkpointing, refetched=False)
    assert step.step_seconds == step_seconds
    assert (step.busy_seconds["h2d"], step.busy_seconds["d2h"]) == (gathers * 3.0, gathers * 2.0)


def test_copying_weights_to_and_from_the_buffer_is_the_gpus_work() -> None:
    """Behind the weights, before the layer: both layers' forward, and backward of the second."""
    step = simulate(
        costs_of(**(GATHERED | {"unpack": 0.5})), num_layers=2, prefetch_depth=0, checkpointing=False, refetched=False
    )
    assert step.step_seconds == 14.5
    assert step.busy_seconds["gpu"] == 2 * 2.0 + 2.0 + 3 * 0.5


HAND = {
    "attention": 2.0,
    "ffn": 2.0,
    "adapter_forward": 1.0,
    "loss_head": 1.0,
    "adapter_backward": 2.0,
    "frozen_backward": 3.0,
    "queries": 1.0,
    "rows": 1.0,
    "rows_refetched": 1.0,
    "row_gradients": 1.0,
    "route": 1.0,
    "gather": 1.0,
    "accumulate": 1.0,
    "adamw": 1.0,
}


def simulated(costs: StepCosts, **changes: Any):
    choices = {"num_layers": 2, "prefetch_depth": 0, "checkpointing": False, "refetched": False, "serial": False}
    choices["overlapped"] = False
    return simulate(costs, **(choices | changes))


def schedule(costs: StepCosts, **changes: Any) -> dict[str, tuple[float, float]]:
    events: list[Event] = []
    simulated(costs, events=events, **changes)
    return {event.name: (event.start_seconds, event.end_seconds) for event in events}


# --- schedules by hand -----------------------------------------------------------------------------------------------


def test_two_layers_without_look_ahead():
    # forward  gpu: attention 0 0-2, ffn 0 2-4; queries 2-3, route 3-4, gather 4-5, rows 5-6; adapter 0 6-7
    #          attention 1 7-9, ffn 1 9-11; queries 9-10, route 10-11, gather 11-12, rows 12-13; adapter 1 13-14
    # loss     14-15
    # backward adapter 1 15-17; gradients 1 17-18, accumulated 18-19 by the thread that launches frozen 1 then, 19-22
    #          adapter 0 22-24; gradients 0 24-25, accumulated 25-26; then adamw 26-27
    step = simulated(costs_of(**HAND))
    assert step.step_seconds == 27
    assert step.busy_seconds == {"gpu": 18, "h2d": 2, "d2h": 4, "cpu": 7}
    times = schedule(costs_of(**HAND))
    assert times["rows 0"] == (5, 6)
    assert times["adapter 1"] == (13, 14)
    assert times["adapter backward 0"] == (22, 24)
    assert times["accumulate 0"] == (25, 26)


def test_two_layers_with_look_ahead():
    # forward  attention 0 0-2, ffn 0 2-4; queries 0 2-3 serve both layers: route 0 3-4, gather 0 4-5, rows 0 5-6,
    #          adapter 0 6-7; route 1 5-6, gather 1 6-7, rows 1 7-8; attention 1 7-9, ffn 1 9-11, adapter 1 11-12
    # loss     12-13
    # backward adapter 1 13-15, gradients 15-16, accumulated 16-17, frozen 1 17-20, adapter 0 20-22; gradients 22-23,
    #          accumulated 23-24; adamw 24-25
    step = simulated(costs_of(**HAND), prefetch_depth=1)
    assert step.step_seconds == 25
    assert step.busy_seconds == {"gpu": 18, "h2d": 2, "d2h": 3, "cpu": 7}
    times = schedule(costs_of(**HAND), prefetch_depth=1)
    assert times["rows 1"] == (7, 8)
    assert times["adapter 1"] == (11, 12)
    assert "queries 1" not in times


def test_one_gradient_slot_makes_the_next_layer_wait_for_the_host():
    # As without look-ahead up to row gradients 1 at 17-18; accumulating them takes 9: 18-27, then one thread launches
    # frozen 1 27-30 and the adapter of layer 0. A worker would let frozen 1 run 17-20, and the adapter start at 27,
    # when the slot is empty; with look-ahead there are two slots and it starts when the gpu is free, at 18.
    slow = costs_of(**(HAND | {"accumulate": 9.0}))
    assert schedule(slow)["adapter backward 0"] == (30, 32)
    assert schedule(slow, host_launches=False)["adapter backward 0"] == (27, 29)
    assert schedule(slow, host_launches=False, prefetch_depth=1)["adapter backward 0"] == (18, 20)


def test_refetched_rows_wait_for_their_slot():
    # The host gathers when it has added up gradients 1 (18-19); layer 1 has left the slot by then (17).
    times = schedule(costs_of(**HAND), refetched=True)
    assert times["gather 0 again"] == (19, 20)
    assert times["rows 0 again"] == (20, 21)
    assert "rows 1 again" not in times
    # With two slots both layers are still there.
    assert "rows 0 again" not in schedule(costs_of(**HAND), refetched=True, prefetch_depth=1)


def test_backward_waits_for_refetched_rows():
    # Rows 0 are copied 20-30 and needed by the adapter of layer 0; retained, it started at 22.
    slow = costs_of(**(HAND | {"rows_refetched": 10.0}))
    assert schedule(slow, refetched=True)["adapter backward 0"] == (30, 32)


def test_checkpointing_repeats_each_layers_forward():
    # 15-20 layer 1 again, adapter 20-22, gradients 22-23, accumulated 23-24, frozen 24-27; 27-32 layer 0 again, adapter
    # 32-34; gradients 34-35, accumulated 35-36, adamw 36-37.
    step = simulated(costs_of(**HAND), checkpointing=True)
    assert step.step_seconds == 37
    assert step.busy_seconds["gpu"] == 18 + 2 * (2 + 2 + 1)


def test_the_host_thread_that_routes_cannot_launch():
    # Routing takes 5. route 0 3-8, gather 0 8-9, rows 0 9-10, adapter 0 10-11; route 1 9-14, gather 1 14-15.
    # One thread launches attention 1 after that, at 15; a worker would let it start when the gpu is free, at 11.
    slow = costs_of(**(HAND | {"route": 5.0}))
    assert schedule(slow, prefetch_depth=1)["attention 1"] == (15, 17)
    assert schedule(slow, prefetch_depth=1, host_launches=False)["attention 1"] == (11, 13)


def test_probes_leave_after_the_router_has_scored():
    # attention 0-2, router 2-5, ffn 5-7; queries 2-3, probes 5-6, route 6-7.
    times = schedule(costs_of(**(HAND | {"router": 3.0, "probes": 1.0})), num_layers=1)
    assert times["queries 0"] == (2, 3)
    assert times["probes 0"] == (5, 6)
    assert times["route 0"] == (6, 7)


def test_rows_that_leave_in_parts_travel_while_others_are_gathered():
    # queries 2-3, route 3-4. Gathered in four parts 4-5-6-7-8, each copied in a half: 5-5.5, ... 8-8.5.
    slow = HAND | {"gather": 4.0, "rows": 2.0}
    times = schedule(costs_of(**slow, chunks=4), num_layers=1)
    assert times["gather 0"] == (4, 8)
    assert times["rows 0"] == (6.5, 8.5)
    assert times["adapter 0"] == (8.5, 9.5)
    # The other way round: gathered in halves 4-4.5-5-5.5-6, copied 4.5-5.5-6.5-7.5-8.5.
    slow = HAND | {"gather": 2.0, "rows": 4.0}
    assert schedule(costs_of(**slow, chunks=4), num_layers=1)["rows 0"] == (4.5, 8.5)
    # On a serial device no part travels before all are gathered (routed at 6).
    assert schedule(costs_of(**slow, chunks=4), num_layers=1, serial=True)["rows 0"] == (8, 12)


@given(
    gather=st.floats(0, 4), copy=st.floats(0, 4), gap=st.floats(0, 8), busy=st.floats(0, 8), chunks=st.integers(1, 9)
)
def test_parts_end_as_if_each_were_a_task(gather: float, copy: float, gap: float, busy: float, chunks: int):
    """The one task that stands for all parts, against a task for each: whatever keeps the link's lane before."""
    each = Lanes(host_launches=False)
    one = Lanes(host_launches=False)
    for lanes in (each, one):
        lanes.run("h2d", "before", busy)
        lanes.run("cpu", "before", gap)
    for _ in range(chunks):
        last = each.run("h2d", "part", copy / chunks, each.run("cpu", "part", gather / chunks))
    gathered = one.run("cpu", "gather", gather)
    end = one.run("h2d", "rows", copy, gathered - overlapped_seconds(gather, copy, chunks=chunks))
    assert end == pytest.approx(last)
    assert one.busy == pytest.approx(each.busy)


def test_products_are_priced_in_whole_64s_of_rows_and_copies_are_not():
    def of(rows: int, width: int = 256) -> StepCosts:
        decision, active = decision_of(adapter_width=width, active_rows_cap=width), np.full(3, rows)
        return step_costs(
            request=request_of(), gpu=gpu_profile(), link=link_profile(), host=host_profile(),
            candidates=Candidates.of(decision), active_rows=active, window_active_rows=active,
        )  # fmt: skip

    few, many = of(65), of(128)
    assert few.gpu.adapter_forward[0] == many.gpu.adapter_forward[0] < of(129).gpu.adapter_forward[0]
    assert few.gpu.adapter_backward[0] == many.gpu.adapter_backward[0] < of(129).gpu.adapter_backward[0]
    assert few.link.rows[0] < many.link.rows[0]
    assert of(200, width=200).gpu.adapter_forward[0] < of(200).gpu.adapter_forward[0]  # no more than there are


def test_a_serial_device_does_one_thing_at_a_time():
    step = simulated(costs_of(**HAND), serial=True)
    assert step.step_seconds == 18 + 2 + 4 + 7


def test_lanes_are_first_in_first_out():
    lanes = Lanes()
    assert lanes.run("h2d", "late", 1.0, 10.0) == 11
    assert lanes.run("h2d", "queued behind it", 1.0) == 12
    assert lanes.end_seconds() == 12


def test_the_baseline_is_the_gpu_lane_without_recompute():
    costs = costs_of(**(HAND | {"router": 0.5, "embedding": 0.25, "router_adamw": 0.125}))
    busy = simulated(costs).busy_seconds["gpu"]
    assert baseline_seconds(costs, num_layers=2) == busy
    assert simulated(costs, checkpointing=True).busy_seconds["gpu"] > busy


def test_the_chrome_trace_has_each_lane_in_order():
    events: list[Event] = []
    step = simulated(costs_of(**HAND), events=events)
    trace = json.loads(json.dumps(chrome_trace(events)))
    tasks = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert max(task["ts"] + task["dur"] for task in tasks) == step.step_seconds * 1e6
    assert all(task["dur"] > 0 for task in tasks)
    for lane in range(4):
        in_lane = [task for task in tasks if task["tid"] == lane]
        assert in_lane
        for before, after in pairwise(in_lane):
            assert before["ts"] + before["dur"] <= after["ts"]


def test_overlapped_rows_are_chosen_while_the_device_computes_the_ffn():
    # forward  attention 0 0-2, ffn 0 2-4; queries 2-3, route 3-4, gather 4-5, rows 5-6; adapter 0 6-7: p = 0 waits as
    #          before. With look-ahead from layer 0: route 0 3-4, gather 0 4-5, rows 0 5-6, adapter 0 6-7; route 1 5-6,
    #          gather 1 6-7, rows 1 7-8, and nothing of it holds the gpu up: attention 1 7-9, ffn 1 9-11, adapter 11-12
    # loss     12-13, and its copy at once: 13-14
    # backward adapter 1 13-15, gradients 1 15-16; frozen 1 15-18, adapter 0 18-20; gradients 1 are added up only when
    #          the next are made, at once then: 16-17; gradients 0 20-21, added 21-22; adamw 22-23
    times = schedule(costs_of(**HAND, loss=1.0), prefetch_depth=1, overlapped=True)
    assert times["loss"] == (13, 14)
    assert times["accumulate 1"] == (16, 17)
    assert times["adamw"] == (22, 23)


def test_overlapped_the_next_copy_waits_for_the_host_but_not_the_gpu():
    # Row gradients 1 leave at 17-18, frozen 1 runs 17-20; adding them up takes 9: 18-27. The buffer left
    # at 18, so the adapter of layer 0 goes at 20-22; its gradients leave when the landing is free, at 27.
    times = schedule(costs_of(**(HAND | {"accumulate": 9.0})), overlapped=True)
    assert times["adapter backward 0"] == (20, 22)
    assert times["row gradients 0"] == (27, 28)


# --- what holds of every schedule ------------------------------------------------------------------------------------

durations = st.integers(0, 20).map(float)
any_costs = st.fixed_dictionaries(dict.fromkeys(TASKS, durations) | {"chunks": st.sampled_from((1, 2, 4))})
choices = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 5),
        "prefetch_depth": st.integers(0, 5),
        "checkpointing": st.booleans(),
        "refetched": st.booleans(),
        "host_launches": st.booleans(),
        "overlapped": st.booleans(),
    }
)


@given(seconds=any_costs, chosen=choices)
def test_a_step_lasts_at_least_its_busiest_lane_and_at_most_all_of_them(
    seconds: dict[str, float], chosen: dict[str, Any]
):
    step = simulated(costs_of(**seconds), **chosen)
    assert max(step.busy_seconds.values()) <= step.step_seconds <= sum(step.busy_seconds.values())
    serial = simulated(costs_of(**seconds), **(chosen | {"serial": True}))
    assert serial.step_seconds == sum(serial.busy_seconds.values()) == sum(step.busy_seconds.values())


@given(seconds=any_costs, chosen=choices, faster=st.sets(st.sampled_from(TASKS)))
def test_a_task_that_takes_less_time_never_makes_the_step_longer(
    seconds: dict[str, float], chosen: dict[str, Any], faster: set[str]
):
    quicker = seconds | {name: seconds[name] / 2 for name in faster}
    assert (
        simulated(costs_of(**quicker), **chosen).step_seconds <= simulated(costs_of(**seconds), **chosen).step_seconds
    )


@given(seconds=any_costs, chosen=choices)
def test_a_worker_thread_never_makes_the_step_longer(seconds: dict[str, float], chosen: dict[str, Any]):
    step = simulated(costs_of(**seconds), **(chosen | {"host_launches": True})).step_seconds
    assert simulated(costs_of(**seconds), **(chosen | {"host_launches": False})).step_seconds <= step


@given(seconds=any_costs, chosen=choices)
def test_deeper_look_ahead_never_hurts_where_the_host_has_a_worker_and_rows_are_retained(
    seconds: dict[str, float], chosen: dict[str, Any]
):
    # Not so with one host thread: it routes two layers before layer 1 can start. Not so either where rows are
    # refetched: the host gathers earlier, and row gradients wait behind it.
    costs = costs_of(**(seconds | {"router": 0.0, "probes": 0.0}))
    chosen |= {"host_launches": False, "refetched": False, "overlapped": False}
    deeper = chosen | {"prefetch_depth": chosen["prefetch_depth"] + 1}
    assert simulated(costs, **deeper).step_seconds <= simulated(costs, **chosen).step_seconds


# --- what tasks cost -------------------------------------------------------------------------------------------------


def costs_for(
    request=None, *, decision=None, rows: int = 1600, window: int = 4800, bf16_copy: bool = False, **profiles: Any
) -> StepCosts:
    request, decision = request or request_of(), decision or decision_of()
    num_layers = request.model.num_layers
    used = {"gpu": gpu_profile(), "link": link_profile(), "host": host_profile()} | profiles
    return step_costs(
        request=request,
        candidates=replace(Candidates.of(decision), bf16_copy=bf16_copy),
        active_rows=np.full(num_layers, rows),
        window_active_rows=np.full(num_layers, window),
        **used,
    )


def test_frozen_layers_are_bound_by_arithmetic_at_512_tokens():
    # FFN: 2 * 3 * 4096 * 11008 * 512 flops at half of 100e12 per second = 2.7702539e-3 s, and 6 launches of 1 us.
    # Attention: 2 * 4 * 4096^2 * 512 + 4 * 512 * 256 * 4096 flops = 70,866,960,384 -> 1.4173392e-3 s, 32 launches.
    # Backward: the same linear flops, attention products 2.5 times, 60 launches.
    # Elementwise kernels, bytes of each of 512 tokens: FFN 6 * 4096 + 10 * 11008 = 134,656; attention
    # 78 * 4096 + 2 * 20 * 4096 = 483,328; backward 198 * 4096 + 2 * 32 * 4096 + 18 * 11008 = 1,271,296.
    gpu = costs_for().gpu
    assert gpu.ffn == pytest.approx(2.7702539e-3 + 512 * 134_656 / 0.8e12 + 6e-6, rel=1e-6)
    assert gpu.attention == pytest.approx(1.4173392e-3 + 512 * 483_328 / 0.8e12 + 32e-6, rel=1e-6)
    backward_flops = 138_512_695_296 + 68_719_476_736 + 2.5 * 2_147_483_648
    assert gpu.frozen_backward == pytest.approx(backward_flops / 50e12 + 512 * 1_271_296 / 0.8e12 + 60e-6, rel=1e-6)


def test_frozen_layers_are_bound_by_their_weights_at_one_token():
    # FFN: 3 * 4096 * 11008 weights of 2 bytes, and 2 * 4096 + 3 * 11008 numbers of one token, at 0.8e12 bytes per
    # second; elementwise kernels move 134,656 bytes.
    request = request_of(batch_size=1, seq_len=1)
    num_bytes = (135_266_304 + 41_216) * 2 + 134_656
    assert ffn_seconds(request, gpu_rates(gpu_profile(), request)) == pytest.approx(num_bytes / 0.8e12 + 6e-6)


def test_adapter_flops_and_its_gate():
    # Forward 4*T*A*D = 4 * 512 * 1600 * 4096 = 13,421,772,800 flops at 50e12; backward twice that. The products'
    # traffic is below: 2 * 4096 * (1600 + 512) + 2 * 512 * 1600 = 18,939,904 numbers of 2 bytes at 0.8e12. Elementwise,
    # passes of 2 bytes over [T, A] = 819,200 and [T, D] = 2,097,152 numbers: 2 and 3 forward, 3 and 3 backward.
    gpu = costs_for().gpu
    forward_bytes, backward_bytes = (2 * (passes * 819_200 + 3 * 2_097_152) for passes in (2, 3))
    assert gpu.adapter_forward[0] == pytest.approx(13_421_772_800 / 50e12 + forward_bytes / 0.8e12 + 4e-6)
    assert gpu.adapter_backward[0] == pytest.approx(26_843_545_600 / 50e12 + backward_bytes / 0.8e12 + 6e-6)
    assert gpu.router == 0
    # A gate scores the 64 experts again: 2 * 512 * 64 * 4096 flops forward, and 6 launches; backward twice that and
    # 2 * 512 * 64 * 1600 for its sum over each expert's rows, and 12 launches; 5 and 9 more passes over [T, A].
    gated = costs_for(decision=decision_of(routing="key-experts")).gpu
    forward_bytes, backward_bytes = forward_bytes + 2 * 5 * 819_200, backward_bytes + 2 * 9 * 819_200
    forward_flops = 13_421_772_800 + 268_435_456
    assert gated.adapter_forward[0] == pytest.approx(forward_flops / 50e12 + forward_bytes / 0.8e12 + 10e-6)
    gate_backward = 2 * 268_435_456 + 104_857_600
    backward_flops = 26_843_545_600 + gate_backward
    assert gated.adapter_backward[0] == pytest.approx(backward_flops / 50e12 + backward_bytes / 0.8e12 + 18e-6)
    assert gated.router > 0


def test_link_costs_and_the_duplex_rule():
    # Rows: 1600 * 8192 * 2 = 26,214,400 bytes; hidden states 512 * 4096 * 2 = 4,194,304; latency 10 us.
    link = costs_for().link
    assert link.rows[0] == pytest.approx(1e-5 + 26_214_400 / 20e9)
    assert link.row_gradients[0] == pytest.approx(1e-5 + 26_214_400 / 25e9)
    assert link.queries == pytest.approx(1e-5 + 4_194_304 / 25e9)
    assert (link.probes, link.router_norm) == (0, 0)
    # Refetched rows and row gradients travel at the same time: duplex rates, both half here. Forward does not change.
    duplex = costs_for(decision=decision_of(rows_in_backward="refetched")).link
    assert duplex.rows[0] == link.rows[0]
    assert duplex.rows_refetched[0] == pytest.approx(1e-5 + 26_214_400 / 10e9)
    assert duplex.row_gradients[0] == pytest.approx(1e-5 + 26_214_400 / 12.5e9)


def test_host_costs():
    # Exact routing: 2 * 512 * 6144 * 4096 flops at 500e9, 512 * 6144 scores at 1e9, 100 us.
    # Gather: 1600 * 8192 numbers, 4 bytes read and 2 written through the cache, twice 2, at 20e9; accumulate: of 2 + 8
    # bytes at 16e9, 100 us.
    # AdamW: 32 layers * 4800 rows * 8192 numbers * 28 bytes at 28e9, a 32nd of it per step.
    host = costs_for().host
    assert host.route == pytest.approx(25_769_803_776 / 500e9 + 3_145_728 / 1e9 + 1e-4)
    assert host.gather[0] == pytest.approx(13_107_200 * 8 / 20e9)
    assert host.accumulate[0] == pytest.approx(13_107_200 * 10 / 16e9 + 1e-4)
    assert host.adamw == pytest.approx(4800 * 8192 / 1e9)
    # Key-Experts score the rows of 8 of 64 experts, an eighth of all, one expert after the other, 1 us each.
    routed = costs_for(decision=decision_of(routing="key-experts")).host
    assert routed.route == pytest.approx((25_769_803_776 / 500e9 + 3_145_728 / 1e9) / 8 + 1e-4 + 64e-6)


def _seconds(costs: StepCosts, name: str) -> Any:
    return next(getattr(lane, name) for lane in (costs.gpu, costs.link, costs.host) if hasattr(lane, name))


def test_a_bf16_copy_halves_the_gather_and_makes_adamw_write_more():
    # Gather: 1600 * 8192 numbers of 2 + 2 bytes at 20e9, in forward and again. AdamW: 28 bytes per number and the
    # copy's 2 through the cache, twice 2, of 4800 rows * 8192 numbers * 32 layers, a 32nd of it per step. No more.
    without, copied = (costs_for(bf16_copy=chosen) for chosen in (False, True))
    assert copied.host.gather[0] == pytest.approx(13_107_200 * 4 / 20e9)
    assert copied.host.gather_again[0] == copied.host.gather[0] == without.host.gather[0] / 2
    assert copied.host.adamw == pytest.approx(4800 * 8192 * 32 / 28e9) == without.host.adamw * 32 / 28
    assert {name for name in FIELDS if not np.array_equal(_seconds(copied, name), _seconds(without, name))} == {
        "gather",
        "gather_again",
        "adamw",
    }
    # fp32 rows leave as they are kept, 4 + 4 bytes: there is nothing to copy.
    fp32 = [costs_for(request_of(adapter_dtype="fp32"), bf16_copy=chosen).host for chosen in (False, True)]
    assert all(np.array_equal(getattr(fp32[0], name), getattr(fp32[1], name)) for name in HOST_FIELDS)
    assert fp32[0].gather[0] == pytest.approx(13_107_200 * 8 / 20e9)


def test_dtypes_choose_the_rate():
    def flops(weights_dtype: str, **gpu: Any) -> float:
        return gpu_rates(gpu_profile(**gpu), request_of(weights_dtype=weights_dtype)).frozen_flops_per_second

    assert flops("bf16") == flops("nf4") == flops("fp16") == 50e12
    assert flops("fp32") == 12.5e12
    assert flops("fp16", fp16_flops_per_second=sourced(60e12)) == 30e12
    assert flops("bf16", bf16_flops_per_second=None, fp16_flops_per_second=sourced(60e12)) == 30e12
    assert flops("bf16", bf16_flops_per_second=None) == 12.5e12
    rates = gpu_rates(gpu_profile(), request_of(adapter_dtype="fp32"))
    assert (rates.frozen_flops_per_second, rates.adapter_flops_per_second) == (50e12, 12.5e12)


def test_quantised_weights_are_read_and_written_in_16_bits_first():
    # nf4: 0.5625 bytes read and 2 written per weight, before each product; attention has 4 * 4096^2 weights.
    plain, quantised = (
        attention_seconds(request, gpu_rates(gpu_profile(), request))
        for request in (request_of(), request_of(weights_dtype="nf4"))
    )
    assert quantised - plain == pytest.approx(67_108_864 * 2.5625 / 0.8e12)


def test_flash_attention_skips_the_masked_half():
    def seconds(attention: str) -> float:
        request = request_of(attention=attention)
        return attention_seconds(request, gpu_rates(gpu_profile(), request))

    assert seconds("sdpa") - seconds("flash") == pytest.approx(2 * 512 * 256 * 4096 / 50e12)


# --- from decision to timing -----------------------------------------------------------------------------------------


def timing_of(decision=None, request=None, **profiles: Any):
    request = request or request_of(model=tiny_shape(num_layers=5))
    used = {"gpu": gpu_profile(), "link": link_profile(), "host": host_profile()} | profiles
    num_layers = request.model.num_layers
    return step_timing(
        request=request,
        decision=decision or decision_of(),
        active_rows_per_layer=[1000 + 100 * layer for layer in range(num_layers)],
        window_active_rows_per_layer=[4000] * num_layers,
        **used,
    )


def test_timing_adds_up():
    timing = timing_of()
    assert timing.slowdown == timing.step_seconds / timing.baseline_step_seconds > 1
    assert timing.tokens_per_second == 512 / timing.step_seconds
    assert timing.step_seconds >= max(timing.busy_seconds.values())
    assert timing.busy_seconds["gpu"] == pytest.approx(timing.baseline_step_seconds)


def test_in_sequence_the_emulated_device_overlaps_nothing():
    emulated = gpu_profile(shares_host_cores=True)
    timing = timing_of(gpu=emulated, overlapped=False)
    assert timing.step_seconds == pytest.approx(sum(timing.busy_seconds.values()))
    assert timing_of(gpu=emulated).step_seconds == timing_of().step_seconds < timing.step_seconds


@pytest.mark.parametrize("routing", ["exact", "key-experts"])
@pytest.mark.parametrize("place", ["retained", "refetched"])
def test_a_faster_link_or_host_is_never_slower(routing: str, place: str):
    for depth in range(3):
        decision = decision_of(routing=routing, rows_in_backward=place, prefetch_depth=depth)
        plain = timing_of(decision).step_seconds
        assert timing_of(decision, link=link_profile(2.0)).step_seconds <= plain
        assert timing_of(decision, host=host_profile(2.0)).step_seconds < plain


@settings(max_examples=25)
@given(data=st.data(), uniform=st.booleans())
def test_arrays_of_candidates_give_what_each_gives_alone(data: st.DataObject, uniform: bool):
    request = request_of(model=tiny_shape(), batch_size=2, seq_len=64)
    count = data.draw(st.integers(1, 8))
    decisions = [
        decision_of(
            adapter_width=data.draw(st.sampled_from([256, 512])),
            active_rows_cap=256,
            prefetch_depth=data.draw(st.integers(0, 3)),
            routing=data.draw(st.sampled_from(["exact", "key-experts"])),
            top_k=16,
            rows_in_backward=data.draw(st.sampled_from(["retained", "refetched"])),
            activation_checkpointing=data.draw(st.booleans()),
        )
        for _ in range(count)
    ]
    layers = data.draw(st.lists(st.tuples(*[st.integers(64, 256)] * count), min_size=3, max_size=3))
    rows = np.broadcast_to(np.array(layers[0]), (3, count)) if uniform else np.array(layers)
    candidates = side_by_side([Candidates.of(decision) for decision in decisions])
    profiles = {"gpu": gpu_profile(), "link": link_profile(), "host": host_profile()}
    costs = step_costs(
        request=request,
        candidates=candidates,
        active_rows=rows,
        window_active_rows=2 * rows,
        **profiles,
    )
    seconds = simulate_candidates(
        costs,
        num_layers=3,
        prefetch_depth=np.array([decision.prefetch_depth for decision in decisions]),
        checkpointing=np.array([decision.activation_checkpointing for decision in decisions]),
        refetched=candidates.refetched,
    )
    baselines = np.broadcast_to(baseline_seconds(costs, num_layers=3), (count,))
    for candidate, decision in enumerate(decisions):
        alone = step_timing(
            request=request,
            decision=decision,
            active_rows_per_layer=rows[:, candidate].tolist(),
            window_active_rows_per_layer=(2 * rows[:, candidate]).tolist(),
            **profiles,
        )
        assert seconds[candidate] == alone.step_seconds
        assert baselines[candidate] == pytest.approx(alone.baseline_step_seconds, rel=1e-12)


def test_costs_of_candidates_that_differ_in_what_must_be_alike_are_refused():
    decisions = [decision_of(), decision_of(cached_rows=64, gradients_on_device=True)]
    rows = np.full((request_of().model.num_layers, 2), 1600)
    with pytest.raises(ValueError, match="must be the same for all candidates"):
        step_costs(
            request=request_of(),
            gpu=gpu_profile(),
            link=link_profile(),
            host=host_profile(),
            candidates=side_by_side([Candidates.of(decision) for decision in decisions]),
            active_rows=rows,
            window_active_rows=rows,
        )


def test_take_keeps_what_candidates_share():
    costs = costs_of(**HAND)
    varied = replace(costs, host=replace(costs.host, gather=np.array([[1.0, 2.0, 3.0]]), route=np.array([4.0, 5, 6])))
    taken = varied.take(np.array([2, 0]))
    assert taken.host.gather.tolist() == [[3.0, 1.0]]
    assert np.asarray(taken.host.route).tolist() == [6.0, 4.0]
    assert taken.host.accumulate.tolist() == [1.0]
    assert vars(taken.gpu) == vars(costs.gpu)
