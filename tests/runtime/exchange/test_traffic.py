"""Given the active rows, the transfer model's bytes are the counted bytes, exactly."""

from __future__ import annotations

import itertools
import json

import pytest
from plan_samples import sample_profiles, sample_request
from sessions import CENTROIDS, EXPERTS, STABLE, SWITCH, ByStep, open_small, rows_by_step, small_plan, small_trainer
from sparse_setup import AMPLE_BYTES, decision

from meft.planner.memory.host import host_memory as planned_host_memory
from meft.planner.models.catalogue import load_model
from meft.planner.predict.prediction import predict
from meft.planner.records.plan import Plan
from meft.planner.traffic.transfer import NORM_BYTES, expected_step_bytes, step_transfer, window_gradient_bytes
from meft.runtime.device.nvml import PcieReading
from meft.runtime.training.rehearse import rehearse
from meft.runtime.training.reporting import host_memory, transfer

CHOICES = [
    pytest.param(
        {"prefetch_depth": depth, "rows_in_backward": rows, "activation_checkpointing": checkpointing, **routing},
        accum,
        id=f"p{depth}-{rows}-{'ckpt' if checkpointing else 'plain'}-accum{accum}-{routing.get('routing', 'exact')}",
    )
    for (depth, rows, checkpointing, accum), routing in zip(
        itertools.product((0, 1, 2), ("retained", "refetched"), (False, True), (1, 3)),
        itertools.cycle([{}, EXPERTS, CENTROIDS, SWITCH, EXPERTS, STABLE, SWITCH]),
        strict=False,
    )
]
NO_NVML = PcieReading(None, None, "none")


CACHED = [
    pytest.param(
        {
            "prefetch_depth": depth,
            "rows_in_backward": rows,
            "cached_rows": cached,
            "gradients_on_device": summed,
            **routing,
        },
        id=f"p{depth}-{rows}-{cached}-{'summed' if summed else 'sent'}-{routing.get('routing', 'exact')}",
    )
    for depth, rows, cached, summed, routing in (
        (0, "refetched", 30, True, EXPERTS),
        (1, "refetched", 70, True, {}),
        (1, "refetched", 70, True, CENTROIDS),
        (0, "refetched", 30, True, SWITCH),
        (1, "retained", 128, True, EXPERTS),
        (2, "refetched", 30, False, EXPERTS),
        (0, "retained", 128, False, {}),
        (0, "refetched", 70, True, EXPERTS | {"gather_chunks": 3}),
    )
]


def expected_bytes_per_step(plan: Plan, rows: ByStep) -> list[tuple[int, int]]:
    """``(h2d, d2h)`` of the byte model, given the rows that each micro-batch was counted to activate and to miss."""
    rows_per_step = zip(rows["active_rows"], rows["missing_rows"], rows["overflow_rows"], strict=True)
    return [
        expected_step_bytes(
            request=plan.request,
            decision=plan.decision,
            active_rows_per_layer=active,
            missing_rows_per_layer=missing,
            overflow_rows_per_layer=overflow,
        )
        for active, missing, overflow in rows_per_step
    ]


@pytest.mark.parametrize("adapter_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("choice", CACHED)
def test_with_cached_rows_too(glass_folder, choice, adapter_dtype) -> None:
    choice = {**choice, "active_rows_cap": 100, "bf16_copy": adapter_dtype == "bf16"}
    plan = small_plan(glass_folder, choice=choice, grad_accum=3, adapter_dtype=adapter_dtype)
    session = open_small(glass_folder, plan)
    trainer = small_trainer(session, steps=6)
    rows = rows_by_step(trainer)
    trainer.run()
    expected = expected_bytes_per_step(plan, rows)
    engine = session.engine
    assert engine.bytes_in("h2d", "step") == sum(h2d for h2d, _ in expected)
    assert engine.bytes_in("d2h", "step") == sum(d2h for _, d2h in expected)
    sums = [
        window_gradient_bytes(request=plan.request, decision=plan.decision, kept_rows_per_layer=kept)
        for kept in rows["kept_rows"]
    ]
    assert engine.counted_bytes["d2h", "window_gradients", "optimizer_step"] == sum(sums)
    assert (sum(sums) > 0) == choice["gradients_on_device"]
    assert sum(map(sum, rows["missing_rows"])) < sum(map(sum, rows["active_rows"]))
    assert (sum(map(sum, rows["overflow_rows"])) > 0) == (choice["cached_rows"] < 128)
    planned = planned_host_memory(request=plan.request, decision=plan.decision)
    assert {entry.category: entry.num_bytes for entry in host_memory(session).entries} == {
        entry.category: entry.num_bytes for entry in planned.entries
    }


def planned_window_bytes(plan: Plan, rows: ByStep) -> int:
    """The byte model's window, both ways, of the rows that its micro-batches were counted to activate and to miss."""
    (kept,) = rows["kept_rows"]
    sums = window_gradient_bytes(request=plan.request, decision=plan.decision, kept_rows_per_layer=kept)
    return sum(map(sum, expected_bytes_per_step(plan, rows))) + sums + NORM_BYTES


def test_a_window_of_32_costs_a_fifth_of_the_papers_traffic_or_less(glass_folder) -> None:
    """The paper: 0.56 M numbers of 4 bytes per micro-batch, M = 2*R*D*L, at 512 tokens and 6144 rows. Here with as many
    rows per token of the batch, and at least as large a share of them active as the paper's 25.9 %."""
    width = 384
    choice = {"prefetch_depth": 1, "adapter_width": width, "active_rows_cap": width, **EXPERTS}
    choice |= {"cached_rows": width, "gradients_on_device": True}
    plan = small_plan(glass_folder, choice=choice, grad_accum=32, adapter_dtype="bf16", batch_size=1, seq_len=32)
    session = open_small(glass_folder, plan)
    trainer = small_trainer(session, steps=32)
    rows = rows_by_step(trainer)
    trainer.run()
    shape = plan.request.model
    numbers = 2 * plan.decision.adapter_width * shape.hidden_size * shape.num_layers
    papers_bytes = 0.56 * numbers * 4 * 32
    moved = sum(session.engine.bytes_in(way, per) for way in ("h2d", "d2h") for per in ("step", "optimizer_step"))
    assert moved == planned_window_bytes(plan, rows)
    share = sum(map(sum, rows["active_rows"])) / (32 * shape.num_layers * width)
    assert share > 0.259
    assert moved < papers_bytes / 5


def test_predicted_for_llama_7b_it_is_less_than_a_fifth_too() -> None:
    request = sample_request(
        model=load_model("llama-7b")[0], gpu_mem_bytes=24 << 30, grad_accum=32, batch_size=2, seq_len=256,
        weights_dtype="bf16", adapter_dtype="bf16",
    )  # fmt: skip
    chosen = decision(
        adapter_width=6144, top_k=64, active_rows_cap=2048, cached_rows=6144, gradients_on_device=True, prefetch_depth=1
    )
    expected = predict(request, chosen, sample_profiles())
    transfer = expected.transfer
    moved = transfer.h2d_bytes_per_step + transfer.d2h_bytes_per_step
    moved += (transfer.h2d_bytes_per_optimizer_step + transfer.d2h_bytes_per_optimizer_step) / 32
    assert moved < 0.56 * 2 * 6144 * 4096 * 32 * 4 / 5


@pytest.mark.parametrize(("choice", "accum"), CHOICES)
def test_counted_bytes_are_the_predicted_ones_given_the_active_rows(glass_folder, choice, accum) -> None:
    plan = small_plan(glass_folder, choice=choice, grad_accum=accum)
    session = open_small(glass_folder, plan)
    trainer = small_trainer(session, steps=2 * accum)
    rows = rows_by_step(trainer)
    trainer.run()
    expected = [
        expected_step_bytes(request=plan.request, decision=plan.decision, active_rows_per_layer=active)
        for active in rows["active_rows"]
    ]
    assert session.engine.bytes_in("h2d", "step") == sum(h2d for h2d, _ in expected)
    assert session.engine.bytes_in("d2h", "step") == sum(d2h for _, d2h in expected)
    assert len(set(rows["active_rows"])) > 1  # the rows did differ between steps


@pytest.mark.parametrize("routing", [{}, EXPERTS])
def test_every_category_and_the_optimizer_step_agree(glass_folder, routing) -> None:
    choice = {"prefetch_depth": 1, "rows_in_backward": "refetched", **routing}
    plan = small_plan(glass_folder, choice=choice)
    session = open_small(glass_folder, plan)
    trainer = small_trainer(session, steps=1)
    rows = rows_by_step(trainer)
    trainer.run()
    observed = transfer(session, steps=1, windows=1, pcie=NO_NVML)
    predicted = step_transfer(
        request=plan.request, decision=plan.decision, active_rows_per_layer=rows["active_rows"][0]
    )
    seen = {(entry.direction, entry.category, entry.per): entry.num_bytes for entry in observed.entries}
    assert seen == {(entry.direction, entry.category, entry.per): entry.num_bytes for entry in predicted.entries}
    assert observed.d2h_bytes_per_optimizer_step == (4 if routing else 0)


@pytest.mark.parametrize("routing", [{}, EXPERTS])
@pytest.mark.parametrize("depth", [0, 2])
def test_host_memory_is_the_planned_one_to_the_byte(glass_folder, routing, depth) -> None:
    plan = small_plan(glass_folder, choice={"prefetch_depth": depth, "active_rows_cap": 96, **routing})
    session = open_small(glass_folder, plan)
    small_trainer(session, steps=1).run()
    planned = planned_host_memory(request=plan.request, decision=plan.decision)
    observed = host_memory(session)
    assert {entry.category: entry.num_bytes for entry in observed.entries} == {
        entry.category: entry.num_bytes for entry in planned.entries
    }
    assert observed.total_bytes == planned.total_bytes


def test_a_recall_probe_is_counted_apart(glass_folder) -> None:
    plan = small_plan(glass_folder, choice={"prefetch_depth": 2})
    session = open_small(glass_folder, plan)
    trainer = small_trainer(session, steps=2)
    trainer.run()
    before = session.engine.bytes_in("h2d", "step"), session.engine.bytes_in("d2h", "step")
    recall = trainer.measure_recall()
    assert 0 < recall < 1
    assert (session.engine.bytes_in("h2d", "step"), session.engine.bytes_in("d2h", "step")) == before
    assert session.engine.bytes_in("d2h", "probe") > 0


def test_exact_routing_at_depth_zero_needs_no_probe(glass_folder) -> None:
    session = open_small(glass_folder, small_plan(glass_folder))
    assert small_trainer(session, steps=1).measure_recall() == 1.0
    assert session.engine.bytes_in("d2h", "probe") == 0


@pytest.mark.parametrize("gpu", ["rtx-3090", "emulated"])
def test_a_rehearsal_counts_host_buffers_as_the_plan_does(glass_folder, gpu) -> None:
    # cap 100: no buffer is a power of two, to which torch's pinned allocator would round it up.
    choice = {"prefetch_depth": 1, "active_rows_cap": 100, **EXPERTS}
    plan = small_plan(glass_folder, choice=choice, gpu=gpu)
    sparsity = plan.prediction.sparsity.model_copy(update={"active_rows_per_layer": (100,) * 4})
    plan = plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"sparsity": sparsity})})
    config = json.loads((glass_folder / "config.json").read_text())
    observed = rehearse(plan, config, budget_bytes=AMPLE_BYTES, meft_version="0.0.0").observed.host_memory
    planned = planned_host_memory(request=plan.request, decision=plan.decision)
    assert {entry.category: entry.num_bytes for entry in observed.entries} == {
        entry.category: entry.num_bytes for entry in planned.entries
    }
