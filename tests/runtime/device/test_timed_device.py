"""The device that only takes time is given, by the real runtime, just the work that the planner says a step has."""

from __future__ import annotations

import math

import pytest
from timed_device import TimedStream, small_batch, timed_session

import meft
from meft.planner.predict.prediction import ProfileSet, simulated_tasks
from meft.planner.records.plan import LANES, Lane, Plan
from meft.planner.timing.chrome import task_kind
from meft.runtime.device.lanes import Overlapped, Schedule, Sequential
from meft.runtime.session.session import Session


def plan_of(*, gather_chunks: int = 1, **choice: object) -> Plan:
    """A small model on a real card."""
    sizes = {"model": "smollm2-135m", "gpu": "rtx-3090", "gpu_mem": "24GB", "host_mem": "64GB"}
    given = {
        "adapter_width": 512,
        "top_k": 16,
        "batch_size": 2,
        "seq_len": 64,
        "prefetch_depth": 0,
        "grad_accum": 1,
        "max_slowdown": 10.0,
    }
    plan: Plan = meft.plan(**sizes | given | choice)
    return plan.model_copy(update={"decision": plan.decision.model_copy(update={"gather_chunks": gather_chunks})})


@pytest.mark.parametrize(
    ("choice", "schedule"),
    [
        ({}, Overlapped),
        ({"prefetch_depth": 1}, Overlapped),
        ({"prefetch_depth": 2, "rows_in_backward": "refetched"}, Overlapped),
        ({"activation_checkpointing": True}, Sequential),
        ({"routing": "key-experts", "adapter_width": 1024}, Overlapped),
        ({"gather_chunks": 3}, Overlapped),
    ],
)
def test_a_step_gives_each_lane_the_work_that_is_planned(choice: dict[str, object], schedule: type[Schedule]) -> None:
    """All but the optimizer's share, which is no micro-batch's, and Python's on the host, which is real."""
    plan = plan_of(**choice)
    profiles = ProfileSet.of(plan.request)
    tasks = simulated_tasks(plan.request, plan.decision, profiles, plan.prediction.sparsity)
    planned = dict.fromkeys(LANES, 0.0)
    for task in tasks:
        if "adamw" not in task.name and "norm" not in task.name:
            planned[task.lane] += task.end_seconds - task.start_seconds
    host_tasks = sum(task_kind(task.name) in ("route", "accumulate") for task in tasks)
    host_tasks += (plan.decision.gather_chunks - 1) * plan.request.model.num_layers
    planned["cpu"] -= host_tasks * profiles.host.overhead_seconds_per_layer.value
    if plan.decision.routing == "key-experts":
        experts = min(plan.decision.num_experts, plan.request.tokens_per_step * plan.decision.num_probes)
        planned["cpu"] -= plan.request.model.num_layers * experts * profiles.host.overhead_seconds_per_expert.value

    with timed_session(plan, profiles, schedule()) as session:
        session.step(small_batch(plan), loss_scale=1.0)
        given = given_seconds(session)

    assert given == pytest.approx(planned, rel=1e-6)


def test_a_piece_of_work_begins_when_launching_it_did_and_ends_no_earlier(monkeypatch) -> None:
    """It is 100: what was launched since 90 has 4 seconds of work and ends with its launching, what has 30 at 120; of
    a stream that is free at 130, behind that."""
    monkeypatch.setattr("time.perf_counter", lambda: 100.0)
    ends = []
    for free_at, seconds, since in ((0.0, 4.0, 90.0), (0.0, 30.0, 90.0), (130.0, 4.0, 90.0), (0.0, 4.0, math.inf)):
        stream = TimedStream()
        stream.free_at = free_at
        stream.take(seconds, since=since)
        ends.append(stream.free_at)
    assert ends == [100.0, 120.0, 134.0, 104.0]


def given_seconds(session: Session) -> dict[Lane, float]:
    """What each lane was given to do, once it is done."""
    session.drain()
    compute, copies = session.device.streams.compute, session.engine._streams
    return {
        "gpu": compute.given_seconds,
        "h2d": copies["h2d"].given_seconds,
        "d2h": copies["d2h"].given_seconds,
        "cpu": session.store.kernels.slept_seconds,
    }
