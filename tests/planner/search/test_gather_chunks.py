"""Rows gathered in parts: a winner without look-ahead has them where its step is the shorter by more than a little."""

from __future__ import annotations

import pytest
from plan_samples import sample_request

from meft.planner.models.catalogue import load_model
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import Plan
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
from meft.planner.search.search import CHUNKS_PAY, make_plan


def profiles() -> ProfileSet:
    """A 3090 and what goes with it."""
    return ProfileSet(
        gpu=load_gpu("rtx-3090"),
        link=load_link("pcie-4.0-x16"),
        host=load_host("workstation-32core"),
        sparsity=load_sparsity("meft-paper"),
    )


def planned(**asked: object) -> Plan:
    """A 7B model on it, 512 tokens a step: gather and copy of a layer are about a millisecond each."""
    fixed = {"adapter_width": 6144, "top_k": 64, "batch_size": 2, "seq_len": 256, "max_slowdown": 10.0}
    dtypes = {"weights_dtype": "bf16", "adapter_dtype": "bf16"}
    shape = load_model("llama-7b")[0]
    budgets = {"gpu_mem_bytes": 24 << 30, "host_mem_bytes": 128 << 30}
    request = sample_request(model=shape, **budgets | fixed | dtypes | asked)
    plan = make_plan(request, profiles(), meft_version="0")
    assert isinstance(plan, Plan)
    return plan


def test_parts_are_as_many_as_make_the_step_shortest() -> None:
    plan = planned(prefetch_depth=0, grad_accum=1)
    decisions = {chunks: plan.decision.model_copy(update={"gather_chunks": chunks}) for chunks in (1, 2, 4, 8)}
    by_chunks = {
        chunks: predict(plan.request, decision, profiles(), replayed=False) for chunks, decision in decisions.items()
    }
    seconds = {chunks: each.timing.step_seconds for chunks, each in by_chunks.items()}
    chosen = plan.decision.gather_chunks
    assert chosen > 1
    assert seconds[chosen] == min(seconds.values()) == plan.prediction.timing.step_seconds
    assert seconds[chosen] < (1 - CHUNKS_PAY) * seconds[1]
    for each in by_chunks.values():  # not a byte more
        assert (each.transfer, each.host_memory) == (by_chunks[1].transfer, by_chunks[1].host_memory)


@pytest.mark.parametrize("asked", [{"prefetch_depth": 1, "grad_accum": 1}, {"prefetch_depth": 0, "grad_accum": 32}])
def test_where_rows_are_there_in_time_they_leave_in_one(asked: dict[str, int]) -> None:
    """Look-ahead brings them, or most of them are kept through a window: the plan is as it was, byte for byte."""
    plan = planned(**asked)
    assert plan.decision.gather_chunks == 1
    assert "gather_chunks" not in plan.to_json()
