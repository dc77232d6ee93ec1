"""A plan with token chunks from the planner to the report: bytes, memory and files are as predicted."""

from __future__ import annotations

import json

import pytest
from plan_samples import sample_profiles
from sessions import EXPERTS, open_small, small_plan, small_trainer

from meft.planner.check.counted_bytes import bytes_given_rows
from meft.planner.predict.prediction import predict
from meft.planner.records.plan import Decision, Plan
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.training.rehearse import rehearsal_session, rehearse_optimizer_step, rehearse_step
from meft.runtime.training.reporting import host_memory, rows_seen

CHUNKED: dict[str, object] = {"token_chunks": 4, "rows_in_backward": "refetched", "active_rows_cap": 96}
CHOICES = [
    pytest.param({}, id="p0"),
    pytest.param({"prefetch_depth": 1, "activation_checkpointing": True, "tokens_see": "own"}, id="p1-checkpointing"),
    pytest.param(EXPERTS | {"prefetch_depth": 2, "token_chunks": 2}, id="p2-experts"),
]


def chunked_plan(folder, choice: dict[str, object]) -> Plan:
    """With the planner's own prediction."""
    plan = small_plan(folder, choice=CHUNKED | choice, grad_accum=2)
    prediction = predict(plan.request, plan.decision, sample_profiles())
    return plan.model_copy(update={"prediction": prediction})


@pytest.mark.parametrize("choice", CHOICES)
def test_bytes_and_memory_are_as_predicted(glass_folder, choice) -> None:
    plan = chunked_plan(glass_folder, choice)
    session = open_small(glass_folder, plan)
    trainer = small_trainer(session, steps=4)
    trainer.run()
    rows = rows_seen(trainer.measured, plan.decision)
    given = bytes_given_rows(
        plan,
        rows_total=[layer.total for layer in rows],
        missing_total=[layer.missing_total for layer in rows],
        overflow_total=[layer.overflow_total for layer in rows],
        steps=4,
    )
    counted = {key[:2]: size for key, size in session.engine.counted_bytes.items() if key[2] == "step"}
    assert {key: size for key, size in given.items() if size} == counted
    assert counted["h2d", "rows"] < counted["d2h", "row_gradients"]  # some were there
    memory = plan.prediction.device_memory
    assert trainer.measured.peaks.reserved_bytes == memory.peak_reserved_bytes
    assert trainer.measured.peaks.allocated_bytes == pytest.approx(memory.peak_allocated_bytes, rel=0.03)
    assert host_memory(session).total_bytes == plan.prediction.host_memory.total_bytes


@pytest.mark.parametrize("choice", CHOICES)
def test_a_rehearsal_moves_what_is_predicted(glass_folder, choice) -> None:
    plan = chunked_plan(glass_folder, choice)
    session = rehearsal_session(plan, load_frozen_model(plan, glass_folder), EmulatedDevice(1 << 32))
    rehearse_step(session)
    rehearse_optimizer_step(session)
    transfer = plan.prediction.transfer
    assert session.engine.bytes_in("h2d", "step") == transfer.h2d_bytes_per_step
    assert session.engine.bytes_in("d2h", "step") == transfer.d2h_bytes_per_step


def test_it_is_written_only_where_there_are_several(glass_folder) -> None:
    plan = small_plan(glass_folder)
    content = json.loads(plan.to_json())
    assert "token_chunks" not in content["request"] | content["decision"]
    several = plan.model_copy(update={"decision": small_plan(glass_folder, choice=CHUNKED).decision})
    assert json.loads(several.to_json())["decision"]["token_chunks"] == 4
    assert Plan.from_json(several.to_json(), source="test") == several


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"cached_rows": 8}, "cached_rows 8 beside token_chunks 4"),
        ({"hot_rows": 8}, "hot_rows 8 beside token_chunks 4"),
        ({"rows_in_backward": "retained"}, "rows_in_backward retained"),
    ],
)
def test_what_keeps_rows_longer_is_refused_beside_it(beside, said) -> None:
    usual: dict[str, object] = {"adapter_width": 64, "top_k": 4, "prefetch_depth": 0, "num_experts": 1}
    usual |= {"num_probes": 1, "routing": "exact", "activation_checkpointing": False}
    with pytest.raises(ValueError, match=said):
        Decision.model_validate(usual | CHUNKED | {"active_rows_cap": 48} | beside)
