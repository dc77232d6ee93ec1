"""Two ranks on the device that only takes time are given, in a window, just the work that the planner says it has."""

from __future__ import annotations

import pytest
from timed_ranks import timed_windows

import meft
from meft.planner.predict.prediction import ProfileSet, predict, simulated_tasks
from meft.planner.records.plan import LANES, Decision, Lane, Plan
from meft.planner.timing.chrome import task_kind

RANKS, LAYERS, WIDTH = 2, 30, 512


def plan_of(cached_rows: int) -> Plan:
    """A small model on two real cards. Every row is active, so each rank's half of a layer is all touched."""
    sizes = {"model": "smollm2-135m", "gpu": "rtx-3090", "gpu_mem": "24GB", "host_mem": "64GB", "gpus": RANKS}
    given = {"adapter_width": WIDTH, "top_k": 16, "batch_size": 2, "seq_len": 64, "prefetch_depth": 1, "grad_accum": 4}
    plan: Plan = meft.plan(**sizes | given, routing="key-experts", max_slowdown=10.0)
    changes = {"active_rows_cap": WIDTH, "cached_rows": cached_rows, "gradients_on_device": False}
    decision = Decision.model_validate(plan.decision.model_dump() | changes)
    prediction = predict(plan.request, decision, ProfileSet.of(plan.request), [WIDTH] * LAYERS, replayed=False)
    each_step = (WIDTH // plan.request.rounds,) * LAYERS if cached_rows else ()  # they arrive once a window
    sparsity = prediction.sparsity.model_copy(update={"missing_rows_per_layer": each_step})
    prediction = prediction.model_copy(update={"sparsity": sparsity})
    return plan.model_copy(update={"decision": decision, "prediction": prediction})


def planned_seconds(plan: Plan) -> dict[Lane, float]:
    """Of each lane in a window; without Python's on the host, which is real, and the routers' AdamW, torch's own."""
    profiles, decision, request = ProfileSet.of(plan.request), plan.decision, plan.request
    tasks = simulated_tasks(request, decision, profiles, plan.prediction.sparsity)
    planned = dict.fromkeys(LANES, 0.0)
    for task in tasks:
        if task.name != "router adamw":
            planned[task.lane] += task.end_seconds - task.start_seconds
    layers = sum(task_kind(task.name) in ("route", "accumulate") for task in tasks)
    experts = LAYERS * min(decision.num_experts, request.tokens_per_step * decision.num_probes)
    host = profiles.host
    planned["cpu"] -= layers * host.overhead_seconds_per_layer.value + experts * host.overhead_seconds_per_expert.value
    return {lane: seconds * request.rounds for lane, seconds in planned.items()}


@pytest.mark.parametrize("cached_rows", [0, WIDTH])
def test_a_window_gives_each_lane_of_each_rank_the_work_that_is_planned(cached_rows: int) -> None:
    """Rows that are kept travel in the first of a window's two rounds alone."""
    plan = plan_of(cached_rows)
    planned = planned_seconds(plan)
    first, second = timed_windows(plan, ProfileSet.of(plan.request), windows=1)
    assert (first[0].rank, second[0].rank) == (0, 1)
    for window in (*first, *second):
        given = window.given_seconds
        assert given["gpu"] == pytest.approx(planned["gpu"], rel=1e-6)
        assert given["cpu"] == pytest.approx(planned["cpu"], rel=1e-6)
        # the routers' sums come back over h2d; the plan has them with their gradients, on d2h
        assert given["h2d"] > planned["h2d"]
        assert given["h2d"] + given["d2h"] == pytest.approx(planned["h2d"] + planned["d2h"], rel=1e-6)
        assert window.missing_rows == LAYERS * WIDTH * (1 if cached_rows else plan.request.rounds)
        assert window.waited_seconds > 0
