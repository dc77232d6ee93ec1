"""Calibration: what runs observed corrects the profiles, and what they cannot tell is said."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from plan_samples import sample_profiles, sample_report, sample_request

from meft.planner.base.errors import UsageError
from meft.planner.check.calibrate import calibrate, corrected_sparsity, errors_of, likely_trends
from meft.planner.check.rates import (
    Run,
    given_rows,
    gpu_factors,
    host_factors,
    lane_factors,
    slower_gpu,
    slower_host,
    slower_link,
)
from meft.planner.cli.main import command as plan_command
from meft.planner.predict.prediction import ProfileSet, inputs_used, predict, simulated_tasks
from meft.planner.records.plan import LANES, Plan
from meft.planner.records.profile_file import ProfileFile
from meft.planner.records.profiles import LayerSparsity
from meft.planner.records.report import Report
from meft.planner.search.search import make_plan
from meft.planner.timing.chrome import task_kind
from meft.planner.traffic.sparsity import at_seq_len
from meft.runtime.cli.profile import command

SLOWER = {"gpu": 1.5, "h2d": 2.0, "d2h": 2.0, "cpu": 3.0}
STEPS = 4


def plan_of(**changes: object) -> Plan:
    return make_plan(sample_request(**changes), sample_profiles(), meft_version="0")


def run_of(plan: Plan, truth: ProfileSet, *, filled: float = 1.0) -> Run:
    """A report as if ``truth`` were the machine and the text."""
    told = predict(plan.request, plan.decision, truth)
    rows = list(told.sparsity.active_rows_per_layer)
    report = sample_report(plan, rows_per_step=[rows] * STEPS)
    training = report.training.model_copy(
        update={"tokens": round(STEPS * plan.request.tokens_per_step * filled), "steps": STEPS}
    )
    times = {"step_seconds": told.timing.step_seconds, "busy_seconds": dict(told.timing.busy_seconds)}
    observed = report.observed.model_copy(update={"dropped_rows": 0, "prefetch_recall": 0.5, **times})
    report = report.model_copy(update={"observed": observed, "training": training, "rehearsal": False})
    return Run(plan, report)


@pytest.fixture(scope="module")
def profiles() -> ProfileSet:
    return sample_profiles()


@pytest.fixture(scope="module")
def truth(profiles) -> ProfileSet:
    """Slower in every lane, and with other text."""
    sparsity = profiles.sparsity.model_copy(update={"layers": (LayerSparsity(alpha=0.7),)})
    return replace(
        profiles,
        sparsity=sparsity,
        gpu=slower_gpu(profiles.gpu, SLOWER["gpu"], "truth"),
        host=slower_host(profiles.host, SLOWER["cpu"], "truth"),
        link=slower_link(profiles.link, SLOWER, "truth"),
    )


@pytest.fixture(scope="module")
def runs(truth) -> list[Run]:
    choices = [{"adapter_width": width, "top_k": top_k} for width, top_k in ((16, 2), (16, 4), (24, 3), (32, 4))]
    return [run_of(plan_of(**choice), truth) for choice in choices]


def test_lanes_get_the_factors_of_the_machine(runs, profiles) -> None:
    factors = lane_factors(runs, profiles)
    assert factors["cpu"] == pytest.approx(SLOWER["cpu"], rel=0.01)
    assert factors["gpu"] == pytest.approx(SLOWER["gpu"], rel=1e-6)
    assert factors["d2h"] == pytest.approx(SLOWER["d2h"], rel=1e-6)


def test_each_kind_of_host_work_gets_its_own_factor(profiles) -> None:
    """A host that is slow at AdamW alone, by reports that tell the tasks apart."""
    truth = replace(profiles, host=slower_host(profiles.host, 1.0, "truth", by_work={"adamw": 5.0}))
    runs = []
    for choice in ({"adapter_width": 16, "top_k": 2}, {"adapter_width": 32, "top_k": 4}):
        run = run_of(plan_of(**choice), truth)
        sparsity = predict(run.plan.request, run.plan.decision, truth).sparsity
        tasks: Counter[str] = Counter()
        for task in simulated_tasks(run.plan.request, run.plan.decision, truth, sparsity):
            if task.lane == "cpu":
                tasks[task_kind(task.name)] += task.end_seconds - task.start_seconds
        observed = run.report.observed.model_copy(update={"host_task_seconds": dict(tasks)})
        runs.append(Run(run.plan, run.report.model_copy(update={"observed": observed})))
    assert host_factors(runs, profiles) == pytest.approx(
        {"adamw": 5.0, "gather": 1, "scatter": 1, "route": 1}, rel=1e-6
    )
    host = calibrate(runs, profiles).profiles.host
    assert host.adamw_bytes_per_second.value == pytest.approx(profiles.host.adamw_bytes_per_second.value / 5)
    assert host.gather_bytes_per_second.value == pytest.approx(profiles.host.gather_bytes_per_second.value)


def with_launch(profiles: ProfileSet, seconds: float) -> ProfileSet:
    launches = profiles.gpu.kernel_launch_seconds.model_copy(update={"value": seconds})
    return replace(profiles, gpu=profiles.gpu.model_copy(update={"kernel_launch_seconds": launches}))


def test_launches_are_told_apart_from_the_work_of_the_gpu(profiles) -> None:
    """A device whose launches alone are slow: runs of two sizes show it, and a third size is predicted."""
    ample = {"gpu_mem_bytes": 1 << 40, "host_mem_bytes": 1 << 40, "adapter_width": 32, "top_k": 4, "seq_len": 4096}
    plan = plan_of(batch_size=8, **ample)
    work = predict(plan.request, plan.decision, with_launch(profiles, 0.0)).timing.busy_seconds["gpu"]
    once = predict(plan.request, plan.decision, with_launch(profiles, 1.0)).timing.busy_seconds["gpu"]
    profiles = with_launch(profiles, work / (once - work))  # as long as the work of the small run
    truth = replace(profiles, gpu=slower_gpu(profiles.gpu, 1.1, "truth", launching=3.0))
    small, large, other = (run_of(plan_of(batch_size=size, **ample), truth) for size in (8, 32, 64))
    computing, launching = gpu_factors([small, large], profiles)
    assert computing == pytest.approx(1.1, rel=0.05)
    assert launching == pytest.approx(3.0, rel=0.05)
    corrected = calibrate([small, large], profiles).profiles
    seen, found = (given_rows(other, each).timing.busy_seconds["gpu"] for each in (truth, corrected))
    assert found == pytest.approx(seen, rel=0.03)
    alone = gpu_factors([small], profiles)
    assert min(alone) > 1.1
    assert given_rows(small, calibrate([small], profiles).profiles).timing.busy_seconds["gpu"] == pytest.approx(
        small.report.observed.busy_seconds["gpu"], rel=0.01
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gather 3 again", "gather"), ("gather 12", "gather"), ("row gradients 2", "row gradients"), ("adamw", "adamw")],
)
def test_tasks_are_of_a_kind_whatever_the_layer(name, kind) -> None:
    assert task_kind(name) == kind


def test_a_fourth_plan_is_predicted_from_three_runs(runs, profiles) -> None:
    corrected = calibrate(runs[:3], profiles).profiles
    by_name = {row.quantity: row for row in errors_of(runs[3], 4, before=profiles, after=corrected)}
    assert abs(by_name["step_seconds"].before) > 0.3
    assert abs(by_name["step_seconds"].after) < 0.10
    assert abs(by_name["h2d_bytes_per_step"].after) < 0.06  # of 12 to 20 rows, one is much
    assert abs(by_name["active_rows_per_layer"].after) < abs(by_name["active_rows_per_layer"].before)


def test_each_run_is_judged_by_the_others(runs, profiles) -> None:
    calibration = calibrate(runs, profiles)
    assert {row.run for row in calibration.errors} == {1, 2, 3, 4}
    others = calibrate(runs[1:], profiles).profiles
    expected = list(errors_of(runs[0], 1, before=profiles, after=others))
    assert [row for row in calibration.errors if row.run == 1] == expected


def test_one_run_is_fitted_and_says_what_it_does_not_tell(runs, profiles) -> None:
    calibration = calibrate(runs[:1], profiles)
    assert calibration.errors == ()
    told = " ".join(calibration.notes)
    assert "one run: each lane's factor is a single observation" in told
    assert "the runs do not differ in K/R" in told
    assert "the runs do not differ in T" in told
    again = given_rows(runs[0], calibration.profiles)
    assert again.timing.busy_seconds["cpu"] == pytest.approx(runs[0].report.observed.busy_seconds["cpu"], rel=0.01)
    rows = predict(runs[0].plan.request, runs[0].plan.decision, calibration.profiles).sparsity.active_rows_per_layer
    assert np.allclose(rows, runs[0].mean_rows, atol=1)


def test_trends_are_taken_only_from_runs_that_differ(runs, profiles) -> None:
    same = calibrate([runs[0], runs[0]], profiles).profiles.sparsity
    assert {layer.level_slope for layer in same.layers} == {0.0}
    varied = calibrate(runs, profiles)
    assert not any("do not differ in K/R" in note for note in varied.notes)
    assert any("do not differ in T" in note for note in varied.notes)


def test_padding_is_counted(truth, profiles) -> None:
    run = run_of(plan_of(), truth, filled=0.5)
    assert calibrate([run], profiles).profiles.sparsity.filled_fraction == 0.5


def test_another_seq_len_is_filled_as_the_data_would(truth, profiles) -> None:
    """Sequences of 4 tokens in positions of 8: shorter or longer positions hold the same tokens."""
    run = run_of(plan_of(seq_len=8), truth, filled=0.5)
    training = run.report.training.model_copy(update={"sequence_tokens": (4,) * 11})
    sparsity = calibrate([changed(run, training=training)], profiles).profiles.sparsity
    assert sparsity.sequence_tokens == (4,) * 11
    assert [at_seq_len(sparsity, length).filled_fraction for length in (4, 8, 16)] == [1.0, 0.5, 0.25]
    both = calibrate([changed(run, training=training), run], profiles).profiles.sparsity
    assert both.sequence_tokens == ()  # one report does not have them


def test_what_routing_does_is_told_apart_from_the_level() -> None:
    """A text in which Key-Experts share fewer rows, learnt from runs of both kinds, and predicted for another width."""
    profiles = sample_profiles()
    profiles = replace(profiles, sparsity=profiles.sparsity.model_copy(update={"layers": (LayerSparsity(alpha=0.3),)}))
    told = {"layers": (LayerSparsity(alpha=0.35),), "key_experts_level": 0.2}
    truth = replace(profiles, sparsity=profiles.sparsity.model_copy(update=told))
    plans = [_wide_plan(profiles, width, routing) for width in (512, 2048) for routing in ("exact", "key-experts")]
    sparsity = calibrate([run_of(plan, truth) for plan in plans], profiles).profiles.sparsity
    assert sparsity.key_experts_level == pytest.approx(0.2, abs=0.02)
    other = _wide_plan(profiles, 1024, "key-experts")
    rows = predict(other.request, other.decision, replace(profiles, sparsity=sparsity)).sparsity.active_rows_per_layer
    expected = predict(other.request, other.decision, truth).sparsity.active_rows_per_layer
    assert np.allclose(rows, expected, rtol=0.02)


def _wide_plan(profiles: ProfileSet, width: int, routing: str) -> Plan:
    plan = plan_of(batch_size=8, seq_len=64, adapter_width=24, top_k=4)
    changes = {"adapter_width": width, "top_k": 16, "active_rows_cap": width, "routing": routing}
    changes |= {"num_experts": 16, "num_probes": 4} if routing == "key-experts" else {"num_experts": 1, "num_probes": 1}
    plan = plan.model_copy(update={"decision": plan.decision.model_copy(update=changes)})
    return plan.model_copy(update={"prediction": predict(plan.request, plan.decision, profiles)})


def test_few_runs_do_not_bend_the_law() -> None:
    """Runs that are nearly at one place say nothing of a trend, runs far apart all; what changes together is shared."""
    near, far = np.array([[-0.005], [0.005]]), np.array([[-1.5], [1.5]])
    assert abs(likely_trends(near, np.array([-0.01, 0.01]), spread=0.25)[0]) < 0.03  # 2 if it followed them
    assert likely_trends(far, np.array([-0.3, 0.3]), spread=0.25)[0] == pytest.approx(0.2, rel=0.01)
    together = likely_trends(np.hstack([far, far]), np.array([-0.3, 0.3]), spread=0.25)
    assert together == pytest.approx([0.1, 0.1], rel=0.01)


def test_a_measured_law_bends_less_than_an_assumed_one(truth, profiles) -> None:
    """Two runs, one with a quarter of its positions padded and as many rows: growth is weighed against the profile."""
    bent = {}
    for basis in ("assumed", "measured"):
        on = replace(profiles, sparsity=profiles.sparsity.model_copy(update={"basis": basis}))
        runs = [run_of(plan_of(), truth, filled=filled) for filled in (1.0, 0.75)]
        after, _ = corrected_sparsity(runs, on.sparsity)
        bent[basis] = on.sparsity.layers[0].alpha - after.layers[0].alpha
    assert 0 < bent["measured"] < 0.8 * bent["assumed"]


def test_short_runs_are_said_to_be_short(runs, profiles) -> None:
    """Active rows fall in the first optimizer steps; the note tells runs of unequal length from alike ones."""

    def told(*optimizer_steps: int) -> str:
        lengths = [run.report.training.model_copy(update={"optimizer_steps": steps}) for run, steps in
                   zip(runs, optimizer_steps, strict=False)]  # fmt: skip
        of_length = [changed(run, training=training) for run, training in zip(runs, lengths, strict=False)]
        return "\n".join(note for note in calibrate(of_length, profiles).notes if "optimizer steps" in note)

    assert told(100, 400) == ""
    assert told(20, 20).startswith("runs of 20 optimizer steps: active rows fall")
    assert "unequal" not in told(20, 22)
    assert told(20, 40).startswith("runs of 20 to 40 optimizer steps")
    assert "unequal length" in told(20, 40)


def test_recall_is_never_better_for_looking_further_ahead(truth, profiles) -> None:
    recalls = profiles.sparsity.model_copy(update={"prefetch_recall_by_depth": (1.0, 0.9, 0.8, 0.8)})
    run = run_of(plan_of(prefetch_depth=1), truth)  # observed 0.5
    found = calibrate([run], replace(profiles, sparsity=recalls)).profiles.sparsity.prefetch_recall_by_depth
    assert found == pytest.approx((1.0, 0.5, 0.8 * 0.5 / 0.9, 0.8 * 0.5 / 0.9))


def test_corrected_numbers_are_measured_and_keep_what_they_were(runs, profiles) -> None:
    host = calibrate(runs, profiles).profiles.host
    rate = host.gather_bytes_per_second
    assert rate.basis == "measured"
    assert rate.value == pytest.approx(profiles.host.gather_bytes_per_second.value / SLOWER["cpu"], rel=0.01)
    assert rate.source.startswith("calibrated by 4 runs")
    assert rate.source.endswith(f"before: {profiles.host.gather_bytes_per_second.source}")
    twice = calibrate(runs, profiles).profiles.host.gather_bytes_per_second.source
    assert twice.count("before:") == 1


def test_a_faster_device_raises_its_peaks_once_efficiency_is_full(profiles) -> None:
    faster = slower_gpu(profiles.gpu, 0.1, "x")
    assert faster.matmul_efficiency.value == 1
    before = profiles.gpu.matmul_efficiency.value * profiles.gpu.fp32_flops_per_second.value
    assert faster.fp32_flops_per_second.value == pytest.approx(10 * before)
    assert faster.kernel_launch_seconds.value == pytest.approx(profiles.gpu.kernel_launch_seconds.value / 10)


# --- refusals ------------------------------------------------------------------------------------------------------


def changed(run: Run, **update: object) -> Run:
    return Run(run.plan, run.report.model_copy(update=update))


def test_what_cannot_be_joined_is_refused(runs, profiles) -> None:
    run = runs[0]
    device = run.report.device.model_copy(update={"name": "another"})
    hot = run.plan.model_copy(update={"decision": run.plan.decision.model_copy(update={"hot_rows": 2})})
    of_hot = run.report.model_copy(update={"plan_digest": hot.content_digest()})
    for bad, message in [
        ([], "no runs"),
        ([Run(hot, of_hot)], "plan 1: hot_rows 2: .* calibrate runs with --hot-rows 0"),
        ([Run(run.plan, runs[1].report)], "not of this one"),
        ([changed(run, rehearsal=True)], "is a rehearsal"),
        ([run, changed(run, device=device)], "one device at a time"),
    ]:
        with pytest.raises(UsageError, match=message):
            calibrate(bad, profiles)


def test_plans_of_other_profiles_are_refused(runs, truth, profiles) -> None:
    inputs = inputs_used(runs[1].plan.request, runs[1].plan.decision, truth)
    other = runs[1].plan.model_copy(update={"inputs": inputs})
    report = runs[1].report.model_copy(update={"plan_digest": other.content_digest()})
    with pytest.raises(UsageError, match="rests on another gpu and link and host and sparsity profile"):
        calibrate([runs[0], Run(other, report)], profiles)


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Three plans of smollm2 on the emulated device, and reports that observed twice the time."""
    names = []
    for number, width in enumerate((512, 1024, 768)):
        plan_path, report_path = tmp_path / f"plan{number}.json", tmp_path / f"report{number}.json"
        words = ["--model", "smollm2-135m", "--gpu", "emulated", "--gpu-mem", "3GB", "--host-mem", "8GB"]
        words += ["--batch-size", "2", "--seq-len", "64", "--adapter-width", str(width), "--top-k", "16"]
        words += ["--max-slowdown", "100", "-o", str(plan_path)]
        assert CliRunner().invoke(plan_command, words).exit_code == 0
        plan = Plan.load(plan_path)
        report = sample_report(plan, rows_per_step=[list(plan.prediction.sparsity.active_rows_per_layer)] * STEPS)
        seconds = {lane: 2 * plan.prediction.timing.busy_seconds[lane] for lane in LANES}
        times = {"step_seconds": 2 * plan.prediction.timing.step_seconds, "busy_seconds": seconds}
        observed = report.observed.model_copy(update=times | {"dropped_rows": 0})
        tokens = report.training.model_copy(update={"tokens": STEPS * plan.request.tokens_per_step})
        report.model_copy(update={"observed": observed, "training": tokens}).save(report_path)
        names += [str(plan_path), str(report_path)]
    return names


def test_the_command_writes_profiles_that_planning_reads(files, tmp_path) -> None:
    path = tmp_path / "calibrated.json"
    done = CliRunner().invoke(command, ["calibrate", *files, "-o", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "cpu lane: 2.000 times the predicted seconds" in done.output
    assert ProfileFile.load(path).sections() == ("host", "gpu", "link", "sparsity")
    again = tmp_path / "again.json"
    words = [
        "--model",
        "smollm2-135m",
        "--gpu",
        str(path),
        "--gpu-mem",
        "3GB",
        "--host-mem",
        "8GB",
        "--batch-size",
        "2",
    ]
    words += ["--seq-len", "64", "--adapter-width", "512", "--top-k", "16", "--max-slowdown", "100", "-o", str(again)]
    planned = CliRunner().invoke(plan_command, words)
    assert planned.exit_code == 0, planned.output
    observed = Report.load(Path(files[1])).observed.step_seconds
    assert Plan.load(again).prediction.timing.step_seconds == pytest.approx(observed, rel=0.1)
    assert math.isclose(ProfileFile.load(path).sparsity.filled_fraction, 1.0)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_files_come_in_pairs(files, tmp_path, count) -> None:
    done = CliRunner().invoke(command, ["calibrate", *files[:count], "-o", str(tmp_path / "x.json")])
    assert isinstance(done.exception, UsageError)
    assert f"{count} files were given" in str(done.exception)
