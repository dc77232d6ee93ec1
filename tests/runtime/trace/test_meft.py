"""The trace of MEFT against the real session on the emulated device, computing."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from sessions import EXPERTS, random_examples, small_plan  # noqa: E402
from sparse_setup import AMPLE_BYTES  # noqa: E402
from trace_setups import live_at  # noqa: E402

from meft.planner.records.plan import Plan  # noqa: E402
from meft.planner.simulation.stream import stream_peaks  # noqa: E402
from meft.runtime.data.examples import collate  # noqa: E402
from meft.runtime.device.device import EmulatedDevice  # noqa: E402
from meft.runtime.fake.books import CudaBooks  # noqa: E402
from meft.runtime.session.model_loading import load_frozen_model  # noqa: E402
from meft.runtime.session.session import open_session  # noqa: E402
from meft.runtime.trace.run import trace_plan  # noqa: E402


def with_rows(plan: Plan, rows: list[int]) -> Plan:
    """The plan, expecting just these active rows."""
    sparsity = plan.prediction.sparsity.model_copy(update={"active_rows_per_layer": tuple(rows)})
    return plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"sparsity": sparsity})})


@pytest.mark.parametrize(
    ("choice", "request_changes"),
    [
        ({}, {}),
        ({"activation_checkpointing": True, "prefetch_depth": 1}, {"weights_dtype": "fp32", "adapter_dtype": "bf16"}),
        (EXPERTS | {"rows_in_backward": "refetched"}, {}),
    ],
)
def test_the_peak_is_that_of_the_session(choice, request_changes, glass_folder, monkeypatch) -> None:
    """On the emulated device autograd adds gradients out of place, because its books are a dispatch mode."""
    monkeypatch.setattr(CudaBooks, "_is_unshared", lambda self, gradient: False)
    changes = {"batch_size": 1, "seq_len": 32, "attention": "eager"} | request_changes
    plan = small_plan(glass_folder, choice=choice, **changes)
    model, device = load_frozen_model(plan, glass_folder), EmulatedDevice(AMPLE_BYTES)
    session = open_session(plan, model, device, seed=0, compiled=False)
    batch = collate(random_examples(1, length=32), seq_len=32, pad_id=0)
    for _ in range(2):
        session.device.reset_peaks()
        session.step(batch, loss_scale=1.0)
        measured = device.books.allocator.peak_requested_bytes
        session.optimizer_step(learning_rate=1e-3, max_norm=None)
    config = json.loads((glass_folder / "config.json").read_text())
    rows = session.exchange.counters.active_rows
    found = stream_peaks(trace_plan(with_rows(plan, rows), config, workspace_bytes=0)).requested_bytes
    assert found == pytest.approx(measured, rel=1e-3)


def test_moments_and_what_is_left_at_the_end(glass_folder) -> None:
    plan = small_plan(glass_folder, batch_size=2, seq_len=64)
    config = json.loads((glass_folder / "config.json").read_text())
    stream = trace_plan(plan, config)
    names = [f"{name}_{step}" for step in (1, 2) for name in ("forward", "backward", "updated", "optimizer_step")]
    assert list(stream.moments) == ["loaded", "attached", *names]
    assert sorted(stream.moments.values()) == list(stream.moments.values())
    assert live_at(stream, "optimizer_step_1") == live_at(stream, "optimizer_step_2")
    assert set(live_at(stream, "attached")) >= {"linear_weights", "other_weights", "row_staging", "row_gradients"}
