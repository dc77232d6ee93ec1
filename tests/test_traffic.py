"""Given the active rows, the transfer model's bytes are the counted bytes, exactly."""

from __future__ import annotations

import itertools

import pytest
from sessions import EXPERTS, open_small, small_plan, small_trainer

from meft.planner.host_memory import host_memory as planned_host_memory
from meft.planner.transfer import expected_step_bytes, step_transfer
from meft.runtime.nvml import PcieReading
from meft.runtime.reporting import host_memory, transfer

CHOICES = [
    pytest.param(
        {"prefetch_depth": depth, "rows_in_backward": rows, "activation_checkpointing": checkpointing, **routing},
        accum,
        id=f"p{depth}-{rows}-{'ckpt' if checkpointing else 'plain'}-accum{accum}-{'experts' if routing else 'exact'}",
    )
    for (depth, rows, checkpointing, accum), routing in zip(
        itertools.product((0, 1, 2), ("retained", "refetched"), (False, True), (1, 3)),
        itertools.cycle([{}, EXPERTS, EXPERTS, {}]),
        strict=False,
    )
]
NO_NVML = PcieReading(None, None, "none")


@pytest.mark.parametrize(("choice", "accum"), CHOICES)
def test_counted_bytes_are_the_predicted_ones_given_the_active_rows(glass_folder, choice, accum) -> None:
    plan = small_plan(glass_folder, choice=choice, grad_accum=accum)
    session = open_small(glass_folder, plan)
    trainer = small_trainer(session, steps=2 * accum)
    trainer.run()
    expected = [
        expected_step_bytes(request=plan.request, decision=plan.decision, active_rows_per_layer=rows)
        for rows in trainer.measured.active_rows
    ]
    assert session.engine.bytes_in("h2d", "step") == sum(h2d for h2d, _ in expected)
    assert session.engine.bytes_in("d2h", "step") == sum(d2h for _, d2h in expected)
    assert len({tuple(rows) for rows in trainer.measured.active_rows}) > 1  # the rows did differ between steps


@pytest.mark.parametrize("routing", [{}, EXPERTS])
def test_every_category_and_the_optimizer_step_agree(glass_folder, routing) -> None:
    choice = {"prefetch_depth": 1, "rows_in_backward": "refetched", **routing}
    plan = small_plan(glass_folder, choice=choice)
    session = open_small(glass_folder, plan)
    trainer = small_trainer(session, steps=1)
    trainer.run()
    observed = transfer(session, steps=1, windows=1, pcie=NO_NVML)
    predicted = step_transfer(
        request=plan.request, decision=plan.decision, active_rows_per_layer=trainer.measured.active_rows[0]
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
    planned = planned_host_memory(request=plan.request, decision=plan.decision, pinned=False)
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
