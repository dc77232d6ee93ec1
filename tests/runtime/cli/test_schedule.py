"""``meft-run --schedule``, ``--link-gbps`` and ``--trace``, as real processes."""

from __future__ import annotations

import json

from processes import run

from meft.planner.predict.prediction import ProfileSet
from meft.planner.records.plan import LANES, Plan
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
from meft.planner.records.report import Report
from meft.planner.timing.chrome import chrome_trace
from meft.planner.timing.step import step_timing


def names_of(trace: dict, lane: str) -> set[str]:
    return {task["name"] for task in trace["traceEvents"] if task["ph"] == "X" and task["tid"] == LANES.index(lane)}


def predicted_trace(plan: Plan) -> dict:
    profiles = ProfileSet(
        load_gpu("emulated"), load_link("emulated"), load_host("emulated"), load_sparsity("meft-paper")
    )
    events, rows = [], plan.prediction.sparsity
    step_timing(
        request=plan.request,
        decision=plan.decision,
        gpu=profiles.gpu,
        link=profiles.link,
        host=profiles.host,
        active_rows_per_layer=rows.active_rows_per_layer,
        window_active_rows_per_layer=rows.window_active_rows_per_layer,
        missing_rows_per_layer=rows.missing_rows_per_layer,
        overflow_rows_per_layer=rows.overflow_rows_per_layer,
        kept_rows_per_layer=rows.kept_rows_per_layer,
        events=events,
    )
    return chrome_trace(events)


def test_sequential_on_a_slow_link_learns_the_same_and_writes_its_trace(finished, plan_path, data, tmp_path) -> None:
    trace = tmp_path / "trace.json"
    run("meft-run", plan_path, "--data", data, "--steps", 4, "--output-dir", tmp_path, "--learning-rate", "1e-2",
        "--schedule", "sequential", "--link-gbps", "0.5", "--trace", trace)  # fmt: skip
    report, (_, overlapped) = Report.load(tmp_path / "report.json"), finished
    assert report.training.loss_per_step == overlapped.training.loss_per_step
    assert report.observed.transfer == overlapped.observed.transfer
    written = json.loads(trace.read_text())
    expected = predicted_trace(Plan.load(plan_path))
    for lane in ("h2d", "d2h"):  # the same tasks under the same names; a step's share of the window's end aside
        once = {"router norm", "inputs"}
        observed, predicted = names_of(written, lane) - once, names_of(expected, lane) - once
        assert {name for name in observed if name.startswith(("rows", "queries", "probes", "row gradients"))} == {
            name for name in predicted if name.startswith(("rows", "queries", "probes", "row gradients"))
        }
    for lane, task in (("gpu", "attention 0"), ("gpu", "adapter backward 0"), ("cpu", "route 0"), ("cpu", "gather 0")):
        assert task in names_of(written, lane) & names_of(expected, lane)


def test_a_trace_that_cannot_be_written_is_one_line(plan_path, data, tmp_path) -> None:
    done = run("meft-run", plan_path, "--data", data, "--steps", 2, "--output-dir", tmp_path, "--trace",
               tmp_path / "none" / "trace.json", expect=2)  # fmt: skip
    assert "--trace" in done.stderr
