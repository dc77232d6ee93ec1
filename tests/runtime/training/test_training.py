"""The training loop: it learns, resumes bit for bit, stops cleanly, and leaves loadable checkpoints."""

from __future__ import annotations

import pytest
import torch
from sessions import EXPERTS, open_small, small_plan, small_trainer

from meft.planner.base.errors import DeviceOutOfMemory, MeftError, UsageError
from meft.runtime.session.checkpoint import (
    TRAINING_STATE,
    latest_checkpoint,
    list_checkpoints,
    load_adapter,
    save_adapter,
)

REFETCHED = {"prefetch_depth": 1, "rows_in_backward": "refetched"}


def tables(session) -> list[torch.Tensor]:
    """Every number that training changes."""
    found = [getattr(layer, name) for layer in session.store.layers for name in layer.__dataclass_fields__]
    found += [weight.detach() for weight in session.router_weights]
    if session.router_optimizer is not None:
        found += [
            value for weight in session.router_weights for value in session.router_optimizer.state[weight].values()
        ]
    return found


def assert_same(session, other) -> None:
    for mine, theirs in zip(tables(session), tables(other), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("routing", [{}, EXPERTS])
def test_the_loss_falls_on_sequences_learnt_by_heart(glass_folder, routing) -> None:
    session = open_small(glass_folder, small_plan(glass_folder, choice={**REFETCHED, **routing}))
    trainer = small_trainer(session, steps=24)
    trainer.run()
    assert sum(trainer.history.losses[-4:]) < 0.7 * sum(trainer.history.losses[:4])


@pytest.mark.parametrize("routing", [{}, EXPERTS])
def test_resumed_training_equals_training_straight_through(glass_folder, tmp_path, routing) -> None:
    plan = small_plan(glass_folder, choice={**REFETCHED, **routing}, grad_accum=2)
    straight = small_trainer(open_small(glass_folder, plan), steps=8)
    straight.run()

    first = small_trainer(open_small(glass_folder, plan), steps=8, output=tmp_path, save_every=1)
    first.on_step = lambda progress: setattr(first, "stop_requested", progress.step == 4)
    first.run()
    assert len(first.history.losses) == 4
    resumed = small_trainer(open_small(glass_folder, plan, seed=9), steps=8, output=tmp_path)
    resumed.resume(latest_checkpoint(tmp_path))
    resumed.run()

    assert resumed.history == straight.history
    assert_same(resumed.session, straight.session)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was .* now"),
        ({"steps": 1}, "to be 2 steps long, now 1; it can be made longer"),
        ({"learning_rate": 0.5}, "settings was .* now"),
    ],
)
def test_resuming_refuses_other_settings(glass_folder, tmp_path, change, named) -> None:
    plan = small_plan(glass_folder)
    small_trainer(open_small(glass_folder, plan), steps=2, output=tmp_path).run()
    options = {"steps": 2} | change
    other = small_trainer(open_small(glass_folder, plan), output=tmp_path, **options)
    with pytest.raises(UsageError, match=named):
        other.resume(latest_checkpoint(tmp_path))


def test_resuming_refuses_another_plan(glass_folder, tmp_path) -> None:
    small_trainer(open_small(glass_folder, small_plan(glass_folder)), steps=2, output=tmp_path).run()
    other = open_small(glass_folder, small_plan(glass_folder, choice={"top_k": 4}))
    with pytest.raises(UsageError, match="another plan"):
        small_trainer(other, steps=2).resume(latest_checkpoint(tmp_path))


def test_only_the_newest_checkpoint_stays(glass_folder, tmp_path) -> None:
    session = open_small(glass_folder, small_plan(glass_folder))
    small_trainer(session, steps=3, output=tmp_path, save_every=1).run()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000003"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_run_killed_while_saving_leaves_the_last_checkpoint(glass_folder, tmp_path, monkeypatch) -> None:
    session = open_small(glass_folder, small_plan(glass_folder))
    trainer = small_trainer(session, steps=4, output=tmp_path, save_every=1)

    def killed_at_the_second(path, tensors, fsync=None):
        raise KeyboardInterrupt

    def on_step(progress) -> None:
        if progress.step == 2:
            monkeypatch.setattr("meft.runtime.session.checkpoint.save_tensors", killed_at_the_second)

    trainer.on_step = on_step
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path).name == "checkpoint-00000001"
    again = small_trainer(open_small(glass_folder, small_plan(glass_folder)), steps=4, output=tmp_path)
    again.resume(latest_checkpoint(tmp_path))
    assert len(again.history.losses) == 1


def test_a_damaged_checkpoint_is_one_clear_line(glass_folder, tmp_path) -> None:
    plan = small_plan(glass_folder)
    small_trainer(open_small(glass_folder, plan), steps=1, output=tmp_path).run()
    folder = latest_checkpoint(tmp_path)
    weights = folder / "meft_adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="not a complete safetensors file"):
        small_trainer(open_small(glass_folder, plan), steps=1).resume(folder)
    (folder / TRAINING_STATE).write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        small_trainer(open_small(glass_folder, plan), steps=1).resume(folder)


@pytest.mark.parametrize("routing", [{}, EXPERTS])
def test_a_saved_adapter_gives_the_same_logits(glass_folder, tmp_path, routing) -> None:
    plan = small_plan(glass_folder, choice=routing)
    session = open_small(glass_folder, plan)
    small_trainer(session, steps=3).run()
    save_adapter(session, tmp_path / "adapter", meft_version="0.0.0")
    other = open_small(glass_folder, plan, seed=5)
    ids = torch.arange(4, 24).view(1, -1)

    def logits(which):
        which.device.books.adopt(ids)
        with which.device.scope(), torch.no_grad():
            return which.model(input_ids=ids).logits.clone()

    assert not torch.equal(logits(session), logits(other))
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits(session), logits(other))


def test_an_adapter_of_another_shape_is_refused(glass_folder, tmp_path) -> None:
    session = open_small(glass_folder, small_plan(glass_folder))
    save_adapter(session, tmp_path / "adapter", meft_version="0.0.0")
    other = open_small(glass_folder, small_plan(glass_folder, choice={"adapter_width": 256}))
    with pytest.raises(UsageError, match="adapter_width does not fit"):
        load_adapter(other, tmp_path / "adapter")


def test_detach_restores_the_model_exactly(glass_folder, glass_model) -> None:
    session = open_small(glass_folder, small_plan(glass_folder))
    small_trainer(session, steps=2).run()
    session.adapter.detach()
    session.model.eval()
    ids = torch.arange(4, 24).view(1, -1)
    with torch.no_grad():
        assert torch.equal(session.model(input_ids=ids).logits, glass_model.eval()(input_ids=ids).logits)
    assert all(parameter.requires_grad for parameter in session.model.parameters())
    hooked = [m for m in session.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked == []


def test_the_device_budget_is_enforced_and_the_checkpoint_survives(glass_folder, tmp_path) -> None:
    plan = small_plan(glass_folder)
    roomy = open_small(glass_folder, plan)
    small_trainer(roomy, steps=1, output=tmp_path).run()
    peak = roomy.device.peaks().allocated_bytes
    tight = open_small(glass_folder, plan, budget_bytes=int(0.97 * peak))
    trainer = small_trainer(tight, steps=1)
    with pytest.raises(DeviceOutOfMemory, match="budget"):
        trainer.run()
    assert trainer.history.losses == []
    again = small_trainer(open_small(glass_folder, plan), steps=1)
    again.resume(latest_checkpoint(tmp_path))


def test_a_loss_that_is_not_finite_stops_before_anything_is_applied(glass_folder) -> None:
    session = open_small(glass_folder, small_plan(glass_folder))
    session.store.layers[0].values.fill_(float("nan"))
    before = [layer.step_counts.clone() for layer in session.store.layers]
    with pytest.raises(MeftError, match="the loss became nan at step 1"):
        small_trainer(session, steps=1).run()
    assert all(torch.equal(layer.step_counts, old) for layer, old in zip(session.store.layers, before, strict=True))


def test_accumulated_gradients_are_the_mean_over_the_window(glass_folder) -> None:
    session = open_small(glass_folder, small_plan(glass_folder, grad_accum=2))
    trainer = small_trainer(session, steps=2)
    apart = []
    for step in range(2):
        session.step(trainer.batch(step), loss_scale=1.0)
        apart.append([layer.gradients.clone() for layer in session.store.layers])
        session.store.clear_gradients()
    for step in range(2):
        session.step(trainer.batch(step), loss_scale=0.5)
    for layer, first, second in zip(session.store.layers, *apart, strict=True):
        torch.testing.assert_close(layer.gradients, (first + second) / 2)
