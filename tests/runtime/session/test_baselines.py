"""The methods that MEFT is compared with: each trains what it says, in the same books, and the dense ones agree."""

from __future__ import annotations

import pytest
import torch
from sessions import open_small, small_plan, small_trainer
from sparse_setup import AMPLE_BYTES

from meft.planner.base.errors import DeviceOutOfMemory
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.session.baselines import STATES, TRAINED, open_baseline
from meft.runtime.session.model_loading import load_frozen_model

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
