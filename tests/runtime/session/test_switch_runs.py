"""Runs with a switch router: what they hold and move is what is planned, they go on bit for bit, and are served."""

from __future__ import annotations

import pytest
import torch
from routed_runs import WAYS, finished, require_predicted_memory
from sessions import SWITCH, open_small, random_examples, small_plan, small_trainer

from meft.runtime.data.examples import collate
from meft.runtime.session.checkpoint import list_checkpoints
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.inference import AS_TRAINED, LayerRows, _rows_of


def _balanced(weight: float) -> dict[str, object]:
    return SWITCH | {"switch": {"balance_loss": weight, "jitter": 0.0, "capacity_factor": 8.0}}


@pytest.mark.parametrize(("choice", "asked"), WAYS)
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(glass_folder, tmp_path, choice, asked) -> None:
    """Jitter is that of the micro-batch, whichever process has it."""
    plan = small_plan(glass_folder, choice=SWITCH | choice, **asked)
    whole = finished(small_trainer(open_small(glass_folder, plan), steps=8))
    first = small_trainer(open_small(glass_folder, plan), steps=8, output=tmp_path, save_every=2)
    first.on_step = lambda progress: setattr(first, "stop_requested", progress.step == 4)
    finished(first)
    assert 0 < first.steps_done < 8
    second = small_trainer(open_small(glass_folder, plan), steps=8, output=tmp_path)
    second.resume(list_checkpoints(tmp_path)[-1])
    finished(second)
    assert second.history.losses == whole.history.losses
    for mine, theirs in zip(second.session.router_weights, whole.session.router_weights, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(second.session.store.layers, whole.session.store.layers, strict=True):
        assert torch.equal(mine.weights, theirs.weights)


@pytest.mark.parametrize(("choice", "asked"), WAYS)
def test_it_takes_the_device_memory_that_is_predicted(glass_folder, choice, asked) -> None:
    require_predicted_memory(glass_folder, small_plan(glass_folder, choice=SWITCH | choice, **asked))


def test_the_balance_loss_spreads_tokens_over_experts(glass_folder) -> None:
    """It is trained: the more it weighs, the more even the experts' probabilities become."""
    spread = []
    for weight in (0.0, 1.0):
        session = open_small(glass_folder, small_plan(glass_folder, choice=_balanced(weight)))
        told: list[float] = []
        original = session.exchange.note_balance
        session.exchange.note_balance = lambda loss, note=original, told=told: (
            told.append(float(loss.detach())),
            note(loss),
        )  # type: ignore[method-assign,misc]
        trainer = finished(small_trainer(session, steps=24))
        assert sum(trainer.history.losses[-4:]) < sum(trainer.history.losses[:4])
        used = [tables.step_counts.view(8, -1).sum(dim=1).double() for tables in session.store.layers]
        spread.append(sum(float((each / each.sum()).square().sum()) for each in used))
        assert bool(told) == (weight > 0)
        if told:
            layers = session.store.num_layers
            assert sum(told[-layers:]) < sum(told[:layers])
    assert spread[1] < spread[0]


def test_an_adapter_model_adds_the_balance_loss_to_the_models(glass_folder) -> None:
    """Own loops and Trainers go backward from the model's loss: routers get the gradients of ``meft-run``'s step."""
    plan = small_plan(glass_folder, choice=SWITCH)
    session = open_small(glass_folder, plan)
    (example,) = random_examples(1, length=plan.request.seq_len)
    batch = collate([example] * plan.request.batch_size, seq_len=plan.request.seq_len, pad_id=0)
    step = session.step(batch, loss_scale=1.0)
    model = AdapterModel.from_plan(
        load_frozen_model(plan, glass_folder), plan, device="emulated", schedule="sequential"
    )
    outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    assert step.loss < float(outputs.loss.detach()) < step.loss + 4 * 0.01 * 8
    outputs.loss.backward()
    model.finish_backward()
    for mine, theirs in zip(model.session.router_weights, session.router_weights, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    model.detach()
    session.close()


def test_served_a_token_meets_the_expert_of_highest_probability(glass_folder) -> None:
    """As one writes it down: its rows times the probability, those that are not its own times their share."""
    session = open_small(glass_folder, small_plan(glass_folder, choice=SWITCH))
    trainer = small_trainer(session, steps=4)
    trainer.run()
    rows = _rows_of(session, AS_TRAINED)[0]
    assert isinstance(rows, LayerRows)
    hidden = torch.randn(6, session.store.hidden_size)
    probabilities = (hidden @ rows.router.T).softmax(dim=1)
    expected = torch.zeros_like(hidden)
    for token in range(6):
        expert = int(probabilities[token].argmax())
        its = range(expert * 16, expert * 16 + 16)
        products = {row: float(hidden[token] @ rows.keys[row]) for row in its}
        own = sorted(its, key=lambda row: -products[row])[: rows.top_k]
        for row in its:
            weight = 1.0 if row in own else float(rows.shares[row])
            gate = float(probabilities[token, expert])
            expected[token] += gate * weight * max(products[row], 0.0) * rows.values[row]
    torch.testing.assert_close(rows.output(hidden), expected, rtol=1e-4, atol=1e-6)
    session.close()
