"""The methods that MEFT is compared with: each trains what it says, in the same books, and the dense ones agree."""

from __future__ import annotations

import pytest
import torch
from sessions import open_small, small_plan, small_trainer
from sparse_setup import AMPLE_BYTES

from meft.planner.base.errors import DeviceOutOfMemory, UsageError
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.session.baselines import STATES, TRAINED, open_baseline
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.streamed import streamed

WIDTH, HIDDEN, LAYERS = 128, 128, 4
DENSE_BYTES = 2 * WIDTH * HIDDEN * LAYERS * 4


def open_method(folder, method, plan, *, budget_bytes: int = AMPLE_BYTES, **options: object):
    model = load_frozen_model(plan, folder)
    return open_baseline(method, plan, model, EmulatedDevice(budget_bytes), seed=0, **options)


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("none", 0),
        ("lora", 4 * 8 * (128 + 128 + 128 + 64 + 128 + 64 + 128 + 128 + 3 * (128 + 341))),  # q, k, v, o, gate, up, down
        ("parallel-adapter", 2 * WIDTH * HIDDEN * LAYERS),
        ("full", 852_608),
    ],
)
def test_a_method_trains_what_it_says(glass_folder, method, trained) -> None:
    session = open_method(glass_folder, method, small_plan(glass_folder), rank=8)
    assert session.trainable_parameters == trained


@pytest.mark.parametrize("method", ["lora", "parallel-adapter", "full"])
def test_a_method_learns_and_leaves_the_rest_alone(glass_folder, method) -> None:
    session = open_method(glass_folder, method, small_plan(glass_folder))
    frozen = [p for p in session.model.parameters() if not p.requires_grad]
    before = [parameter.clone() for parameter in frozen]
    trainer = small_trainer(session, steps=10)
    trainer.run()
    assert sum(trainer.history.losses[-2:]) < 0.95 * sum(trainer.history.losses[:2])
    assert all(map(torch.equal, frozen, before))


def test_the_dense_adapter_equals_the_one_offloaded_whole(glass_folder) -> None:
    """The runtime with K at the width brings every row, and AdamW on all rows is torch's."""
    plan = small_plan(glass_folder, choice={"top_k": WIDTH, "rows_in_backward": "refetched"}, grad_accum=2)
    dense, offloaded = open_method(glass_folder, "parallel-adapter", plan), open_small(glass_folder, plan)
    trainers = [small_trainer(session, steps=6) for session in (dense, offloaded)]
    for trainer in trainers:
        trainer.run()
    assert trainers[0].history.losses == pytest.approx(trainers[1].history.losses, rel=1e-4)
    for layer, tables in enumerate(offloaded.store.layers):
        torch.testing.assert_close(dense.trained[2 * layer].detach(), tables.keys, rtol=1e-3, atol=5e-4)
        torch.testing.assert_close(dense.trained[2 * layer + 1].detach(), tables.values, rtol=1e-3, atol=5e-4)


def test_the_books_hold_weights_gradients_and_states(glass_folder) -> None:
    session = open_method(glass_folder, "parallel-adapter", small_plan(glass_folder))
    small_trainer(session, steps=2).run()
    live = session.device.books._bytes_by_category
    assert live[TRAINED] == DENSE_BYTES
    assert live[STATES] == 2 * DENSE_BYTES + 8 * 512  # Adam's step count of each of 8 tensors: one block
    assert session.engine.bytes_in("h2d", "step") == 2 * 2 * 2 * 32 * 8  # two steps of ids and labels, int64


def test_a_budget_stops_full_fine_tuning(glass_folder) -> None:
    session = open_method(glass_folder, "full", small_plan(glass_folder), budget_bytes=12 << 20)
    with pytest.raises(DeviceOutOfMemory):
        small_trainer(session, steps=2).run()


LORA_LAYER = 4 * 8 * (128 + 128 + 128 + 64 + 128 + 64 + 128 + 128 + 3 * (128 + 341)) // LAYERS
"""Numbers that LoRA of rank 8 trains in a layer."""


@pytest.mark.parametrize(
    ("method", "numbers"), [("lora", LORA_LAYER), ("parallel-adapter", 2 * WIDTH * HIDDEN)], ids=["lora", "dense"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_method_whose_layers_travel_is_the_one_on_the_device(glass_folder, method, numbers, checkpointing) -> None:
    """Two windows of two steps; on the device two buffers of one layer."""
    plan = small_plan(glass_folder, choice={"activation_checkpointing": checkpointing}, grad_accum=2)
    sessions = [open_method(glass_folder, method, plan, rank=8) for _ in range(2)]
    sessions[1] = streamed(sessions[1])
    trainers = [small_trainer(session, steps=4) for session in sessions]
    for trainer in trainers:
        trainer.run()
    assert trainers[1].history.losses == pytest.approx(trainers[0].history.losses, rel=1e-5)
    assert trainers[1].history.gradient_norms == pytest.approx(trainers[0].history.gradient_norms, rel=1e-5)
    moving = sessions[1]
    assert moving.trainable_parameters == sessions[0].trainable_parameters == LAYERS * numbers
    for layer, block in enumerate(moving.layers):
        expected = sessions[0].trained[layer * len(block.parameters) : (layer + 1) * len(block.parameters)]
        torch.testing.assert_close(block.master, torch.cat([each.flatten() for each in expected]), rtol=1e-4, atol=1e-5)
    live = moving.device.books._bytes_by_category
    assert live["row_staging"] == live["row_gradients"] == -(-4 * numbers // 512) * 512  # a block each
    assert live.get(TRAINED, 0) == live.get(STATES, 0) == 0
    assert moving.engine.counted_bytes["d2h", "gradients", "step"] == 4 * LAYERS * 4 * numbers
    brought = 2 * (2 * (2 * LAYERS - 1) - 1)  # the last layer's weights are there still when backward begins, and the
    # first's when a window's next forward does
    assert moving.engine.counted_bytes["h2d", "weights", "step"] == brought * 4 * numbers


def test_only_layers_travel_whole(glass_folder) -> None:
    with pytest.raises(UsageError, match="trained tensors are in no layer of the model"):
        streamed(open_method(glass_folder, "full", small_plan(glass_folder)))


def test_a_streamed_loss_is_counted_apart(glass_folder) -> None:
    session = streamed(open_method(glass_folder, "lora", small_plan(glass_folder)))
    trainer = small_trainer(session, steps=1)
    trainer.run()
    before = session.engine.bytes_in("h2d", "step")
    assert session.loss(trainer.batch(1)) > 0
    assert session.engine.counted_bytes["h2d", "weights", "probe"] > 0
    assert session.engine.bytes_in("h2d", "step") - before == 2 * 2 * 32 * 8  # ids and labels
