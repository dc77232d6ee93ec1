"""``meft-run`` as users run it: real processes on the tiny model, real input and wrong input."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import BIN, run

from meft.planner.records.plan import Plan
from meft.planner.records.report import Report
from meft.planner.traffic.transfer import expected_step_bytes


def test_a_run_leaves_report_adapter_and_checkpoint(finished, plan_path) -> None:
    folder, report = finished
    plan = Plan.load(plan_path)
    assert report.plan_digest == plan.content_digest()
    assert (report.device.kind, report.training.steps, report.training.optimizer_steps) == ("emulated", 4, 2)
    assert len(report.training.loss_per_step) == 4
    assert len(report.training.sequence_tokens) == 11
    assert report.training.tokens <= 4 * plan.request.batch_size * report.training.sequence_tokens[-1]
    assert {path.name for path in folder.iterdir()} == {"adapter", "checkpoint-00000004", "report.json"}
    observed = report.observed
    assert observed.device_memory.process_bytes is None
    assert observed.transfer.nvml_rx_bytes is None
    assert observed.device_memory.peak_reserved_bytes <= report.device.budget_bytes


def test_the_report_gives_the_transfer_model_all_it_needs(finished, plan_path) -> None:
    _, report = finished
    plan = Plan.load(plan_path)
    constant_h2d, constant_d2h = expected_step_bytes(
        request=plan.request, decision=plan.decision, active_rows_per_layer=[0] * report.layers
    )
    totals = [layer.total for layer in report.observed.active_rows]
    h2d, d2h = expected_step_bytes(request=plan.request, decision=plan.decision, active_rows_per_layer=totals)
    steps = report.training.steps
    assert report.observed.transfer.h2d_bytes_total == h2d + (steps - 1) * constant_h2d
    assert report.observed.transfer.d2h_bytes_total == d2h + (steps - 1) * constant_d2h


def test_audit_accepts_the_report(finished, plan_path) -> None:
    folder, _ = finished
    done = run("meft-plan", "audit", plan_path, folder / "report.json")
    assert "equal the counted ones" in done.stdout


def test_hot_rows_from_plan_to_audit(glass_folder, data, tmp_path) -> None:
    """Chosen after 32 steps, that is after the eighth window."""
    path = tmp_path / "plan.json"
    run("meft-plan", "--model", glass_folder, "--gpu", "emulated", "--gpu-mem", "64MiB", "--host-mem", "1GB",
        "--batch-size", 1, "--seq-len", 16, "--grad-accum", 4, "--max-slowdown", 20, "--top-k", 8,
        "--adapter-width", 256, "--hot-rows", 48, "-o", path)  # fmt: skip
    done = run("meft-run", path, "--data", data, "--steps", 40, "--output-dir", tmp_path)
    assert "hot rows, on the device in 2 windows, were " in done.stdout
    report = Report.load(tmp_path / "report.json")
    assert (report.observed.hot_windows, len(report.observed.active_rows)) == (2, report.layers)
    assert "equal the counted ones" in run("meft-plan", "audit", path, tmp_path / "report.json").stdout


def test_json_prints_the_report_and_nothing_else(plan_path, data, tmp_path) -> None:
    done = run("meft-run", plan_path, "--data", data, "--steps", 2, "--output-dir", tmp_path, "--json")
    assert Report.from_json(done.stdout, source="stdout") == Report.load(tmp_path / "report.json")


def test_resume_goes_on_and_equals_a_run_straight_through(plan_path, data, tmp_path, finished) -> None:
    _, straight = finished
    options = ["--data", data, "--output-dir", tmp_path, "--learning-rate", "1e-2", "--save-every", 1]
    process = subprocess.Popen(
        [BIN / "meft-run", plan_path, *map(str, options), "--steps", "4"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:  # the first step's line is out: ask it to stop after this window
        if "step 1/4" in line:
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=120)
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    if checkpoints == ["checkpoint-00000004"]:
        pytest.skip("the run was over before the signal arrived")
    assert checkpoints == ["checkpoint-00000002"]
    assert process.returncode == 143
    run("meft-run", plan_path, *options, "--resume")
    assert Report.load(tmp_path / "report.json").training.loss_per_step == straight.training.loss_per_step


def test_a_killed_run_leaves_its_last_checkpoint_loadable(plan_path, data, tmp_path) -> None:
    options = ["--data", str(data), "--output-dir", str(tmp_path), "--steps", "400", "--save-every", "1"]
    process = subprocess.Popen([BIN / "meft-run", plan_path, *options], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait(timeout=30)
    saved = sorted(tmp_path.glob("checkpoint-*"))
    assert saved
    done = int(saved[-1].name.removeprefix("checkpoint-"))
    resumed = run("meft-run", plan_path, *options, "--resume", "--gpu-mem", "1MiB", expect=4)
    assert "out of" in resumed.stderr  # it loaded the model and met the budget, with the checkpoint in place
    assert sorted(tmp_path.glob("checkpoint-*"))[-1].name == f"checkpoint-{done:08d}"


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_ends_the_run_cleanly(plan_path, data, tmp_path, presses) -> None:
    """Once: after the window, with a checkpoint and a report. Twice: at once; what was saved stays."""
    options = ["--data", str(data), "--output-dir", str(tmp_path), "--steps", "4000", "--schedule", "overlapped"]
    process = subprocess.Popen([BIN / "meft-run", plan_path, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    told = False
    for line in process.stderr:
        lines.append(line)
        if "step 1/4000" in line and not told:
            process.send_signal(signal.SIGINT)
            told = True
        if "SIGINT: stopping" in line:
            break
    if presses == 2:
        process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert "Traceback" not in "".join(lines) + rest
    if presses == 1:
        assert process.returncode == 130
        assert "SIGINT: stopped after step" in rest.splitlines()[-1]
        (checkpoint,) = tmp_path.glob("checkpoint-*")
        assert Report.load(tmp_path / "report.json").training.steps == int(checkpoint.name.removeprefix("checkpoint-"))
    elif process.returncode != 0:  # else the window was over before the second arrived
        assert process.returncode == 130  # as shells count an interrupt


def test_rehearsal_needs_neither_weights_nor_data(plan_path, tmp_path, glass_folder) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((glass_folder / "config.json").read_text())
    run("meft-run", plan_path, "--model", bare, "--rehearse", "--output-dir", tmp_path)
    plan, report = Plan.load(plan_path), Report.load(tmp_path / "report.json")
    predicted = {row.quantity: row.ratio for row in report.comparison}
    assert report.rehearsal
    assert predicted["h2d_bytes_per_step"] == predicted["d2h_bytes_per_step"] == 1.0
    assert predicted["host_adapter_bytes"] == 1.0
    assert predicted["device_allocated_bytes"] == pytest.approx(1.0, abs=0.03)
    assert tuple(layer.total for layer in report.observed.active_rows) == plan.prediction.sparsity.active_rows_per_layer


def test_a_budget_below_the_predicted_peak_ends_out_of_memory(plan_path, data, tmp_path, finished) -> None:
    budget = int(0.97 * Plan.load(plan_path).prediction.device_memory.peak_allocated_bytes)
    command = ["meft-run", plan_path, "--data", data, "--steps", 4, "--output-dir", tmp_path]
    done = run(*command, "--gpu-mem", budget, expect=4)
    assert "expect a device out-of-memory error" in done.stderr
    assert "out of" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def damaged_plan(plan_path: Path, folder: Path, change) -> Path:
    path = folder / "damaged.json"
    path.write_text(change(plan_path.read_text()))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: text.replace('"top_k": 16', '"top_k": 15', 1), "digest"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 99', 1), "newer"),
        (lambda text: text.replace('"schema_version": 1,', '"schema_version": 1, "extra": 1,', 1), "unknown field"),
        (lambda text: "[]", "expected a JSON object"),
    ],
    ids=["truncated", "edited", "newer", "unknown field", "no object"],
)
def test_a_damaged_plan_is_refused_in_one_line(plan_path, data, tmp_path, change, message) -> None:
    bad = damaged_plan(plan_path, tmp_path, change)
    done = run("meft-run", bad, "--data", data, "--output-dir", tmp_path, expect=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_wrong_input_is_one_line_and_exit_2(plan_path, data, tmp_path, glass_folder) -> None:
    def refused(*options: object) -> str:
        done = run("meft-run", plan_path, "--output-dir", tmp_path, *options, expect=2)
        return done.stderr.strip().splitlines()[-1]

    assert "--data: what should it learn?" in refused()
    assert "no such file" in refused("--data", tmp_path / "absent.jsonl")
    assert "no such folder" in refused("--data", data, "--model", tmp_path / "absent")
    assert "'foo' is not a size" in refused("--data", data, "--gpu-mem", "foo")
    assert "no checkpoint" in refused("--data", data, "--resume")
    bad_lines = tmp_path / "bad.jsonl"
    bad_lines.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "only"}\n')
    done = run("meft-run", plan_path, "--data", bad_lines, "--output-dir", tmp_path, expect=2)
    assert f"{bad_lines}:2" in done.stderr


def test_a_plan_for_another_model_is_refused_by_field(plan_path, data, tmp_path, glass_folder) -> None:
    config = json.loads((glass_folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("meft-run", plan_path, "--model", tmp_path, "--data", data, expect=2)
    assert "num_layers 4 in the plan, 3 here" in done.stderr
