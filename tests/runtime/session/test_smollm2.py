"""The embedded model for real: predicted device peaks, the budget kept and enforced, the paper's routing at work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from make_plan import hand_plan
from sessions import EXPERTS, random_examples
from sparse_setup import AMPLE_BYTES, decision

from meft.planner.memory.device import predict_device_memory
from meft.planner.models.catalogue import load_model
from meft.planner.records.plan import Plan
from meft.planner.records.profile_catalogue import load_gpu
from meft.planner.records.report import Report
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import open_session
from meft.runtime.training.rehearse import rehearse
from meft.runtime.training.training import Trainer, TrainingOptions

BIN = Path(sys.executable).parent
DECISIONS = [
    pytest.param({"adapter_width": 512, "active_rows_cap": 512}, (1, 64), id="narrow"),
    pytest.param({"prefetch_depth": 1, "rows_in_backward": "refetched", **EXPERTS}, (2, 64), id="experts-ahead"),
    pytest.param({"prefetch_depth": 2, "activation_checkpointing": True, **EXPERTS}, (2, 64), id="checkpointed"),
    pytest.param({"activation_checkpointing": True, "rows_in_backward": "refetched"}, (4, 64), id="checkpointed-exact"),
    pytest.param({"adapter_width": 2048, "active_rows_cap": 2048, **EXPERTS}, (1, 128), id="wide"),
    pytest.param({"rows_in_backward": "refetched", "top_k": 64}, (2, 96), id="refetched"),
    pytest.param({"prefetch_depth": 3, "top_k": 16, **EXPERTS}, (1, 160), id="retained-ahead"),
]


def plan_for(choice: dict[str, object], batch: tuple[int, int]) -> Plan:
    shape, _, _ = load_model("smollm2-135m")
    chosen = {"adapter_width": 1024, "top_k": 32, "active_rows_cap": 1024} | choice
    return hand_plan(shape, decision(**chosen), batch_size=batch[0], seq_len=batch[1])


@pytest.mark.parametrize(("choice", "batch"), DECISIONS)
def test_the_predicted_peak_is_the_emulated_devices(smollm2, choice, batch) -> None:
    plan = plan_for(choice, batch)
    session = open_session(plan, load_frozen_model(plan, smollm2), EmulatedDevice(AMPLE_BYTES), seed=0)
    examples = random_examples(batch[0], length=batch[1], vocab_size=49152)
    trainer = Trainer(session, examples, TrainingOptions(steps=3), pad_id=0, meft_version="0")
    trainer.run()
    predicted = predict_device_memory(
        request=plan.request,
        decision=plan.decision,
        gpu=load_gpu("emulated"),
    )
    observed = trainer.measured.peaks
    assert predicted.peak_allocated_bytes == pytest.approx(observed.allocated_bytes, rel=0.03)
    assert predicted.peak_reserved_bytes == observed.reserved_bytes
    weights = 4 * plan.request.model.num_parameters  # what is left without them is what the models had to get right
    rest, seen = predicted.peak_allocated_bytes - weights, observed.allocated_bytes - weights
    assert rest == pytest.approx(seen, rel=0.10)


def test_a_rehearsal_keeps_the_books_of_a_real_step(smollm2) -> None:
    plan = plan_for({"prefetch_depth": 1, "rows_in_backward": "refetched", **EXPERTS}, (2, 64))
    session = open_session(plan, load_frozen_model(plan, smollm2), EmulatedDevice(AMPLE_BYTES), seed=0)
    examples = random_examples(2, length=64, vocab_size=49152)
    trainer = Trainer(session, examples, TrainingOptions(steps=1), pad_id=0, meft_version="0")
    trainer.run()
    rows = tuple(next(iter(layer)) for layer in trainer.measured.active_rows.layers)
    sparsity = plan.prediction.sparsity.model_copy(update={"active_rows_per_layer": rows})
    prediction = plan.prediction.model_copy(update={"sparsity": sparsity})
    _, config, _ = load_model("smollm2-135m")
    rehearsed = rehearse(
        plan.model_copy(update={"prediction": prediction}), config, budget_bytes=AMPLE_BYTES, meft_version="0"
    )
    transfer = rehearsed.observed.transfer
    assert transfer.h2d_bytes_total == session.engine.bytes_in("h2d", "step")
    assert transfer.d2h_bytes_total == session.engine.bytes_in("d2h", "step")
    peak = rehearsed.observed.device_memory.peak_allocated_bytes
    assert peak == pytest.approx(trainer.measured.peaks.allocated_bytes, rel=0.005)


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> tuple[Path, Path]:
    """The demo's plan and a few facts."""
    folder = tmp_path_factory.mktemp("smollm2")
    plan, data = folder / "plan.json", folder / "facts.jsonl"
    facts = [{"prompt": f"Where is airport number {n}?", "completion": f"City {n}"} for n in range(16)]
    data.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    command = ["--model", "smollm2-135m", "--gpu", "emulated", "--gpu-mem", "900MiB", "--host-mem", "4GB"]
    command += ["--batch-size", "2", "--seq-len", "64", "--grad-accum", "1", "--top-k", "32", "-o", str(plan)]
    subprocess.run([BIN / "meft-plan", *command], check=True, capture_output=True)
    return plan, data


@pytest.mark.usefixtures("smollm2")
def test_the_chosen_plan_keeps_its_budget(planned, tmp_path) -> None:
    plan, data = planned
    command = ["meft-run", plan, "--data", data, "--steps", "2", "--output-dir", tmp_path]
    done = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = Report.load(tmp_path / "report.json")
    assert report.observed.device_memory.peak_reserved_bytes <= report.device.budget_bytes == 900 << 20


@pytest.mark.usefixtures("smollm2")
def test_three_percent_below_its_peak_it_runs_out_of_memory(planned, tmp_path) -> None:
    plan, data = planned
    peak = Plan.load(plan).prediction.device_memory.peak_allocated_bytes
    command = ["meft-run", plan, "--data", data, "--steps", "2", "--output-dir", tmp_path]
    command += ["--gpu-mem", str(int(0.97 * peak))]
    done = subprocess.run([BIN / command[0], *map(str, command[1:])], capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "out of" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
