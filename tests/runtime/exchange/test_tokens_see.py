"""Training where tokens see their own rows: a plan's files, equal traffic, memory, and what is served."""

from __future__ import annotations

import json

import pytest
import torch
from plan_samples import sample_profiles
from sessions import EXPERTS, open_small, small_plan, small_trainer

from meft.planner.predict.prediction import predict
from meft.planner.records.plan import Decision, Plan, Request
from meft.runtime.session.checkpoint import AdapterConfig, save_adapter
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.inference import Serving, serving

OWN: dict[str, object] = {"tokens_see": "own", "rows_in_backward": "refetched"}


@pytest.mark.parametrize("record", ["request", "decision"])
def test_it_is_written_only_where_it_is_not_the_papers_way(glass_folder, record) -> None:
    plan = small_plan(glass_folder)
    usual: Request | Decision = getattr(plan, record)
    content = json.loads(plan.to_json())
    assert "tokens_see" not in content[record]
    own = usual.model_copy(update={"tokens_see": "own"})
    assert own.model_dump(mode="json") == content[record] | {"tokens_see": "own"}
    changed = plan.model_copy(update={record: own})
    assert changed.content_digest() != plan.content_digest()
    assert Plan.from_json(changed.to_json(), source="test") == changed
    assert Plan.from_json(plan.to_json(), source="test").decision.tokens_see == "union"


@pytest.mark.parametrize("choice", [{}, EXPERTS | {"prefetch_depth": 1}], ids=["exact", "experts"])
def test_the_same_bytes_travel_and_memory_is_as_predicted(glass_folder, choice) -> None:
    """The first step, before the two ways can have come to other rows."""
    found = {}
    for see in ("own", "union"):
        plan = small_plan(glass_folder, choice=OWN | choice | {"tokens_see": see})
        session = open_small(glass_folder, plan)
        trainer = small_trainer(session, steps=1)
        trainer.run()
        crossed = {key: size for key, size in session.engine.counted_bytes.items() if key[2] == "step"}
        predicted = predict(plan.request, plan.decision, sample_profiles()).device_memory
        assert trainer.measured.peaks.allocated_bytes == pytest.approx(predicted.peak_allocated_bytes, rel=0.03)
        found[see] = crossed, trainer.measured.active_rows
    assert found["own"] == found["union"]


@pytest.mark.parametrize("choice", [{}, EXPERTS], ids=["exact", "experts"])
def test_its_own_rows_are_what_a_token_meets_when_asked(glass_folder, tmp_path, choice) -> None:
    """Not in the mean: in training and at inference the logits are the same."""
    session = open_small(glass_folder, small_plan(glass_folder, choice=OWN | choice))
    small_trainer(session, steps=4).run()
    ids = torch.arange(40).view(2, 20)
    with session.device.scope(), torch.no_grad():
        trained = session.model(input_ids=session.to_device(ids)).logits.clone()
    with serving(session):
        served = session.model(input_ids=ids).logits.clone()
    with serving(session, Serving(128)):
        every = session.model(input_ids=ids).logits.clone()
    torch.testing.assert_close(served, trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(every, trained, rtol=1e-2, atol=1e-2)
    save_adapter(session, tmp_path, meft_version="test")
    assert AdapterConfig.load(tmp_path / "meft_config.json").tokens_see == "own"
    loaded = AdapterModel.from_pretrained(glass_folder, tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="in training a token met 8 rows"):
        AdapterModel.from_pretrained(glass_folder, tmp_path, rows_per_token=9)
