"""What runs with a router of their own have in common: how they are tried, and the memory that a plan says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from plan_samples import sample_profiles
from sessions import open_small, rows_by_step, small_trainer

from meft.planner.predict.prediction import predict
from meft.planner.records.plan import Plan
from meft.runtime.training.training import Trainer

WAYS = [
    pytest.param({}, {"grad_accum": 2}, id="plain"),
    pytest.param({"activation_checkpointing": True, "prefetch_depth": 1}, {"adapter_dtype": "bf16"}, id="recomputed"),
]
"""Changes of the decision, and of the request."""


def finished(trainer: Trainer) -> Trainer:
    """Run to the end, its session closed."""
    trainer.run()
    trainer.session.close()
    return trainer


def require_predicted_memory(folder: Path, plan: Plan) -> None:
    """A run of four steps takes the device memory that is predicted for its own active rows."""
    trainer = small_trainer(open_small(folder, plan), steps=4)
    rows = rows_by_step(trainer)
    finished(trainer)
    most = [max(step[layer] for step in rows["active_rows"]) for layer in range(plan.request.model.num_layers)]
    predicted = predict(plan.request, plan.decision, sample_profiles(), most).device_memory
    assert predicted.peak_allocated_bytes == pytest.approx(trainer.measured.peaks.allocated_bytes, rel=0.03)
