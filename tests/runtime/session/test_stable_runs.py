"""Runs with stable routing: the light router learns and is then frozen to the bit, whatever interrupts them."""

from __future__ import annotations

import pytest
import torch
from routed_runs import WAYS, finished, require_predicted_memory
from sessions import EXPERTS, STABLE, open_small, small_plan, small_trainer

from meft.planner.base.errors import UsageError
from meft.runtime.session.checkpoint import list_checkpoints, load_adapter, save_adapter
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import Session
from meft.runtime.session.stages import set_stage, stage_of
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.inference import AS_TRAINED, LayerRows, _rows_of


@pytest.mark.parametrize("stopped_at", [2, 4, 6], ids=["first stage", "change", "second stage"])
@pytest.mark.parametrize(("choice", "asked"), WAYS)
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(glass_folder, tmp_path, choice, asked, stopped_at) -> None:
    """In the first stage, at the change and in the second."""
    plan = small_plan(glass_folder, choice=STABLE | choice, **asked)
    whole = finished(small_trainer(open_small(glass_folder, plan), steps=8))
    first = small_trainer(open_small(glass_folder, plan), steps=8, output=tmp_path)
    first.on_step = lambda progress: setattr(first, "stop_requested", progress.step == stopped_at)
    finished(first)
    assert first.steps_done == stopped_at
    second = small_trainer(open_small(glass_folder, plan), steps=8, output=tmp_path)
    second.resume(list_checkpoints(tmp_path)[-1])
    assert stage_of(second.session) == (2 if stopped_at > 4 else 1)
    finished(second)
    assert stage_of(whole.session) == stage_of(second.session) == 2
    assert second.history.losses == whole.history.losses
    for mine, theirs in zip(second.session.router_weights, whole.session.router_weights, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(second.session.store.layers, whole.session.store.layers, strict=True):
        assert torch.equal(mine.weights, theirs.weights)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_light_router_is_as_it_was_when_it_was_frozen(glass_folder, weight_decay) -> None:
    """It learns before, and what the gate learns goes on; its moments are gone, and decay does not reach it."""
    session = open_small(glass_folder, small_plan(glass_folder, choice=STABLE))
    assert session.router_optimizer is not None
    session.router_optimizer.param_groups[0]["weight_decay"] = weight_decay
    events: list[tuple[str, int]] = []
    halves: dict[int, list[torch.Tensor]] = {0: [weight.detach().clone() for weight in session.router_weights]}
    trainer = small_trainer(session, steps=8)
    trainer.tell = lambda event, *, step, **_: events.append((event, step))
    trainer.on_step = lambda progress: halves.__setitem__(
        progress.step, [weight.detach().clone() for weight in session.router_weights]
    )
    held = _state_numbers(session)
    finished(trainer)
    assert ("second_stage", 4) in events
    for layer, weight in enumerate(session.router_weights):
        at_change, last = halves[5][layer], weight.detach()  # on_step comes before the window's update
        assert not torch.equal(halves[0][layer][8:], at_change[8:])
        assert torch.equal(at_change[8:], last[8:])
        assert not torch.equal(at_change[:8], last[:8])
    assert held - _state_numbers(session) == 2 * session.store.num_layers * 8 * session.store.hidden_size


def _state_numbers(session: Session) -> int:
    """Of AdamW's states of the routers, all that there are."""
    assert session.router_optimizer is not None
    return sum(each.numel() for state in session.router_optimizer.state.values() for each in state.values())


@pytest.mark.parametrize(("choice", "asked"), WAYS)
def test_it_takes_the_device_memory_that_is_predicted(glass_folder, choice, asked) -> None:
    """Of both stages no more than the first's, which is what a plan says."""
    require_predicted_memory(glass_folder, small_plan(glass_folder, choice=STABLE | choice, **asked))


@pytest.mark.parametrize("stage", [1, 2])
def test_served_a_token_meets_the_expert_that_its_stage_chooses(glass_folder, stage, tmp_path) -> None:
    """As one writes it down; and the adapter's folder, loaded, answers as the session does."""
    session = open_small(glass_folder, small_plan(glass_folder, choice=STABLE))
    small_trainer(session, steps=4).run()
    set_stage(session, stage)
    rows = _rows_of(session, AS_TRAINED)[0]
    assert isinstance(rows, LayerRows)
    hidden = torch.randn(6, session.store.hidden_size)
    gate, light = rows.router.tensor_split(2)
    expected = torch.zeros_like(hidden)
    for token in range(6):
        expert = int((hidden[token] @ (gate if stage == 1 else light).T).argmax())
        its = range(expert * 16, expert * 16 + 16)
        products = {row: float(hidden[token] @ rows.keys[row]) for row in its}
        own = sorted(its, key=lambda row: -products[row])[: rows.top_k]
        for row in its:
            weight = 1.0 if row in own else float(rows.shares[row])
            factor = float(torch.sigmoid(hidden[token] @ gate[expert]))
            expected[token] += factor * weight * max(products[row], 0.0) * rows.values[row]
    torch.testing.assert_close(rows.output(hidden), expected, rtol=1e-4, atol=1e-6)
    save_adapter(session, tmp_path / "adapter", meft_version="0.0.0")
    loaded = AdapterModel.from_pretrained(load_frozen_model(session.plan, glass_folder), tmp_path / "adapter")
    ids = torch.randint(4, 1000, (1, 8))
    answer = loaded.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    session.close()
    other = open_small(glass_folder, session.plan, seed=1)
    load_adapter(other, tmp_path / "adapter")
    assert stage_of(other) == stage
    torch.testing.assert_close(_rows_of(other, AS_TRAINED)[0].output(hidden), expected, rtol=1e-4, atol=1e-6)
    assert answer.shape == (1, 12)
    other.close()


def test_a_loop_of_ones_own_says_when_routing_is_learnt(glass_folder) -> None:
    plan = small_plan(glass_folder, choice=STABLE)
    model = AdapterModel.from_plan(load_frozen_model(plan, glass_folder), plan, device="emulated")
    optimizer = model.optimizer(learning_rate=1e-2)
    ids = torch.randint(4, 1000, (plan.request.batch_size, plan.request.seq_len))
    light = [weight.detach()[8:].clone() for weight in model.session.router_weights]
    for step in range(4):
        if step == 2:
            assert not any(map(torch.equal, light, _light(model)))
            model.freeze_routing()
            light = _light(model)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, light, _light(model)))
    saved = model.state_dict(), optimizer.state_dict()
    model.detach()
    again = AdapterModel.from_plan(load_frozen_model(plan, glass_folder), plan, device="emulated", seed=1)
    again.load_state_dict(saved[0])
    again.optimizer(learning_rate=1e-2).load_state_dict(saved[1])
    assert stage_of(again.session) == 2
    set_stage(again.session, 1)  # and back: what the light router has to learn anew begins without moments
    assert [len(each) for each in again.session.router_optimizer.param_groups[0]["params"]] == [16] * len(light)
    again.detach()


def _light(model: AdapterModel) -> list[torch.Tensor]:
    return [weight.detach()[8:].clone() for weight in model.session.router_weights]


def test_other_routings_have_no_stages(glass_folder) -> None:
    session = open_small(glass_folder, small_plan(glass_folder, choice=EXPERTS))
    assert stage_of(session) is None
    with pytest.raises(UsageError, match="routing key-experts has no stages: plan with --routing stable"):
        set_stage(session, 2)
    session.close()
