"""A session with the compiled kernels trains as one with the readable code."""

from __future__ import annotations

import pytest
import torch
from sessions import AMPLE_BYTES, EXPERTS, small_plan, small_trainer

from meft.runtime.device.device import EmulatedDevice
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import open_session


@pytest.mark.parametrize("routing", [{}, EXPERTS], ids=["exact", "experts"])
def test_a_few_steps_agree(glass_folder, routing) -> None:
    plan = small_plan(glass_folder, choice={"prefetch_depth": 1, **routing}, grad_accum=2)
    sessions = []
    for compiled in (True, False):
        model = load_frozen_model(plan, glass_folder)
        session = open_session(plan, model, EmulatedDevice(AMPLE_BYTES), seed=0, compiled=compiled)
        trainer = small_trainer(session, steps=4)
        trainer.run()
        sessions.append((session, trainer))
    (fast, fast_trainer), (readable, readable_trainer) = sessions
    assert fast.store.kernels is not None
    assert readable.store.kernels is None
    assert fast_trainer.measured.active_rows == readable_trainer.measured.active_rows
    for own, other in zip(fast.store.layers, readable.store.layers, strict=True):
        difference = (own.weights - other.weights).abs()
        assert difference.mean() < 1e-6
        assert difference.max() < 1e-2  # the learning rate: AdamW makes a whole step even of a gradient near zero
        assert torch.equal(own.step_counts, other.step_counts)
