"""A batch size that is left open: the quick search over splits equals the readable one, plan by plan; and a lever."""

from __future__ import annotations

import pytest
from planner_records import (
    gpu_profile,
    host_profile,
    link_profile,
    request_of,
    sourced,
    sparsity_profile,
    tiny_shape,
)

from meft.planner.base.errors import Infeasible
from meft.planner.memory.budget import machine_bytes_for
from meft.planner.predict.prediction import ProfileSet
from meft.planner.records.plan import Plan, Request
from meft.planner.search import search
from meft.planner.search.levers import LARGER_PAYS, LARGEST_BATCH, levers
from meft.planner.search.search import make_plan, make_plan_of_splits

KIB = 1 << 10
MIB = 1 << 20
SEQUENCES = 12


def profiles() -> ProfileSet:
    """A GPU whose launches and a link whose latency make small steps slow."""
    return ProfileSet(
        gpu=gpu_profile(),
        link=link_profile(latency_seconds=sourced(1e-4)),
        host=host_profile(),
        sparsity=sparsity_profile(0.5),
    )


def splits(sequences: int = SEQUENCES, **changes: object) -> list[Request]:
    """Three layers of D = 8, S = 512; 12 sequences as 1 x 12, 2 x 6, ... 12 x 1. They reserve 22 to 128 MiB."""
    small = {"seq_len": 512, "weights_dtype": "fp32", "adapter_dtype": "fp32", "max_slowdown": 1e9}
    limits = {"gpu_mem_bytes": 1 << 40, "host_mem_bytes": 1 << 40}
    request = request_of(model=tiny_shape(), **(small | limits | changes))
    sizes = [size for size in range(1, sequences + 1) if sequences % size == 0]
    return [request.model_copy(update={"batch_size": size, "grad_accum": sequences // size}) for size in sizes]


def readable(each: list[Request], given: ProfileSet) -> Plan | Infeasible:
    """A plan of every split, and the preferred one of them by the words of the documents."""
    made = [make_plan(request, given, meft_version="test") for request in each]
    plans = [plan for plan in made if isinstance(plan, Plan)]
    if not plans:
        return made[0]
    if each[0].objective != "speed":
        most = max(plan.prediction.trainable_parameters for plan in plans)
        plans = [plan for plan in plans if plan.prediction.trainable_parameters >= 0.95 * most]

    def cost(plan: Plan) -> float:
        predicted, request = plan.prediction, plan.request
        if request.objective == "speed":
            return 1 / predicted.timing.tokens_per_second
        if request.objective == "traffic":
            tokens = request.grad_accum * request.batch_size * request.seq_len
            return predicted.transfer.window_bytes(request.grad_accum) / tokens / predicted.sparsity.prefetch_recall
        return 1 / predicted.timing.tokens_per_second / predicted.sparsity.prefetch_recall

    return min(plans, key=cost)


LIMITS = [
    {},
    {"gpu_mem_bytes": 70 * MIB},
    {"gpu_mem_bytes": 23 * MIB},
    {"host_mem_bytes": machine_bytes_for(130 * KIB)},
    {"host_mem_bytes": machine_bytes_for(60 * KIB), "gpu_mem_bytes": 40 * MIB},
    {"max_slowdown": 4.22},
    {"gpu_mem_bytes": 1},
]


@pytest.mark.parametrize("objective", ["capacity", "speed", "traffic"])
@pytest.mark.parametrize("limits", LIMITS)
def test_the_split_is_the_one_that_plans_of_all_of_them_give(objective, limits) -> None:
    each = splits(objective=objective, top_k=3, routing="exact", **limits)
    found, expected = make_plan_of_splits(each, profiles(), meft_version="test"), readable(each, profiles())
    if isinstance(expected, Infeasible):
        assert found == expected
        return
    assert not isinstance(found, Infeasible)
    plan, fitting = found
    assert plan == expected
    fit = [request for request in each if isinstance(make_plan(request, profiles(), meft_version="test"), Plan)]
    assert list(fitting) == fit


def test_splits_differ_in_what_is_preferred() -> None:
    """Not the same batch everywhere: room for a larger one, and none."""
    chosen = set()
    for limits in LIMITS[:-1]:
        found = make_plan_of_splits(splits(top_k=3, routing="exact", **limits), profiles(), meft_version="test")
        if not isinstance(found, Infeasible):
            chosen.add(found[0].request.batch_size)
    assert len(chosen) > 1


def test_no_split_is_weighed_beyond_what_memory_holds(monkeypatch) -> None:
    looked_at = []

    class Counting(search.Sifted):
        def __init__(self, request: Request, given: ProfileSet) -> None:
            looked_at.append(request.batch_size)
            super().__init__(request, given)

    monkeypatch.setattr(search, "Sifted", Counting)
    each = splits(192, top_k=3, routing="exact", gpu_mem_bytes=23 * MIB)
    found = make_plan_of_splits(each, profiles(), meft_version="test")
    assert not isinstance(found, Infeasible)
    assert looked_at[: len(found[1])] == [request.batch_size for request in found[1]]
    assert max(looked_at) < 192


# --- the lever ------------------------------------------------------------------------------------------------------


def larger(plan: Plan) -> list[str]:
    """Options that a plan's levers propose for a larger batch."""
    found = levers(plan.request, plan.decision, plan.prediction, profiles())
    sizes = [lever for lever in found if lever.option.startswith("--batch-size") and lever.device_bytes > 0]
    assert all(lever.fits and lever.tokens_per_second_ratio >= 1 + LARGER_PAYS for lever in sizes)
    assert sizes == list(found[: len(sizes)])  # what trains faster comes first
    return [lever.option for lever in sizes]


def planned(**changes: object) -> Plan:
    request = splits(top_k=3, routing="exact", adapter_width=16, seq_len=64, **changes)[1]
    plan = make_plan(request, profiles(), meft_version="test")
    assert isinstance(plan, Plan)
    return plan


def test_memory_that_is_left_over_is_proposed_for_a_larger_batch() -> None:
    assert larger(planned()) == [f"--batch-size {LARGEST_BATCH}"]


def test_no_larger_batch_is_proposed_where_there_is_no_memory_for_it_or_the_planner_chose() -> None:
    plan = planned()
    memory = plan.prediction.device_memory
    tight = memory.peak_reserved_bytes + memory.context_bytes.high_bytes
    request = plan.request.model_copy(update={"gpu_mem_bytes": tight})
    assert larger(plan.model_copy(update={"request": request})) == []
    request = plan.request.model_copy(update={"batch_size_basis": "planned"})
    assert larger(plan.model_copy(update={"request": request})) == []
