"""The audit: exact given the observed rows, and judged by stated tolerances."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import SHAPE, sample_plan, sample_profiles, sample_report

from meft.planner.base.errors import UsageError
from meft.planner.check.audit import Audit, AuditRow, audit, weakest_basis
from meft.planner.check.counted_bytes import bytes_given_rows
from meft.planner.cli.audit import parse_tolerances
from meft.planner.front.audit import gpu_of
from meft.planner.memory.device import predict_device_memory
from meft.planner.predict.prediction import repriced, without_workspaces
from meft.planner.records.plan import Plan
from meft.planner.records.profile_catalogue import load_gpu
from meft.planner.records.profiles import GpuProfile
from meft.planner.records.report import Report
from meft.planner.traffic.transfer import expected_step_bytes


@pytest.fixture(scope="module")
def plan() -> Plan:
    return sample_plan()


def audited(plan: Plan, report: Report, **options: object) -> Audit:
    return audit(plan, report, gpu=sample_profiles().gpu, **options)  # type: ignore[arg-type]


def audited_with(plan: Plan, gpu: GpuProfile) -> Audit:
    return audit(plan, sample_report(plan), gpu=gpu)


def row(verdict: Audit, quantity: str) -> AuditRow:
    return next(one for one in verdict.rows if one.quantity == quantity)


# --- bytes given rows -----------------------------------------------------------------------------------------------


def test_bytes_given_rows_by_hand(plan: Plan) -> None:
    # Two steps, rows [3, 4, 2] and [5, 4, 6]: totals [8, 8, 8]. A row is 2*D*e = 2*8*4 = 64 bytes.
    totals = bytes_given_rows(plan, rows_total=[8, 8, 8], steps=2)
    assert totals == {
        ("h2d", "inputs"): 2 * (2 * 8 * 4),  # ids and labels, int64, T = 4
        ("h2d", "rows"): 24 * 64,
        ("h2d", "row_experts"): 24 * 4,
        ("h2d", "row_positions"): 0,
        ("h2d", "rows_refetched"): 8 * 64,  # of the layers l < L-1-p = 1: layer 0
        ("d2h", "queries"): 2 * (2 * 4 * 8 * 4),  # (L-p)*T*D*q
        ("d2h", "probes"): 2 * (3 * 4 * 2 * 4),  # L*T*P*4
        ("d2h", "row_gradients"): 24 * 64,
        ("d2h", "router_gradients"): 0,  # nothing to sum with one rank
        ("d2h", "loss"): 2 * 4,
    }


@given(st.lists(st.tuples(*[st.integers(2, 12)] * SHAPE.num_layers), min_size=1, max_size=5))
def test_bytes_given_rows_are_the_sum_over_the_steps(rows_per_step: list[tuple[int, ...]]) -> None:
    plan = sample_plan()
    each = [
        expected_step_bytes(request=plan.request, decision=plan.decision, active_rows_per_layer=list(rows))
        for rows in rows_per_step
    ]
    totals = bytes_given_rows(plan, rows_total=map(sum, zip(*rows_per_step, strict=True)), steps=len(rows_per_step))
    by_way = tuple(sum(size for (way, _), size in totals.items() if way == which) for which in ("h2d", "d2h"))
    assert by_way == tuple(map(sum, zip(*each, strict=True)))


# --- the verdict ----------------------------------------------------------------------------------------------------


def test_a_run_as_modelled_passes(plan: Plan) -> None:
    verdict = audited(plan, sample_report(plan))
    assert verdict.passed
    assert verdict.transfer_exact
    assert verdict.steps == 2
    assert all(check.equal for check in verdict.transfer)
    assert {check.category for check in verdict.transfer} >= {"rows", "rows_refetched", "probes", "router_norm"}
    assert row(verdict, "device_bytes_given_rows").ratio == 1.0


@pytest.mark.parametrize("way", ["h2d", "d2h"])
def test_one_byte_too_many_fails(plan: Plan, way: str) -> None:
    field = f"{way}_bytes_total"
    counted = getattr(sample_report(plan).observed.transfer, field)
    verdict = audited(plan, sample_report(plan, **{field: counted + 1}))
    assert not verdict.passed
    assert not verdict.transfer_exact
    assert [one.quantity for one in verdict.rows if one.holds is False] == [f"{way}_bytes_given_rows"]


def test_a_category_that_differs_is_named(plan: Plan) -> None:
    report = sample_report(plan)
    entries = tuple(
        entry.model_copy(update={"num_bytes": entry.num_bytes + 4}) if entry.category == "probes" else entry
        for entry in report.observed.transfer.entries
    )
    verdict = audited(plan, sample_report(plan, entries=entries))
    assert [check.category for check in verdict.transfer if not check.equal] == ["probes"]


def test_host_bytes_must_be_exact(plan: Plan) -> None:
    report = sample_report(plan)
    host = report.observed.host_memory.model_copy(update={"total_bytes": report.observed.host_memory.total_bytes - 1})
    observed = report.observed.model_copy(update={"host_memory": host})
    verdict = audited(plan, report.model_copy(update={"observed": observed}))
    assert row(verdict, "host_adapter_bytes").holds is False
    assert not verdict.passed


def with_device_memory(report: Report, **changes: int) -> Report:
    memory = report.observed.device_memory.model_copy(update=changes)
    return report.model_copy(update={"observed": report.observed.model_copy(update={"device_memory": memory})})


def test_allocated_peak_is_judged_within_its_tolerance(plan: Plan) -> None:
    report = sample_report(plan)
    peak = report.observed.device_memory.peak_allocated_bytes
    # 4 % above what the rows that were seen make: |p - 1.04 p| / 1.04 p = 3.8 %
    above = with_device_memory(report, peak_allocated_bytes=round(peak * 1.04))
    assert not audited(plan, above).passed
    assert audited(plan, above, tolerance_fraction=0.05).passed


def test_a_run_that_packed_is_compared_with_its_decision_packed(plan: Plan) -> None:
    report, gpu = sample_report(plan), sample_profiles().gpu
    packed = repriced(plan, gpu, packed=True).prediction.device_memory
    assert packed.peak_allocated_bytes > plan.prediction.device_memory.peak_allocated_bytes
    peaks = {name: getattr(packed, name) for name in ("peak_allocated_bytes", "peak_reserved_bytes")}
    report = with_device_memory(report, **peaks)
    as_it_was = report.model_copy(update={"observed": report.observed.model_copy(update={"packed": True})})
    verdict = audited(plan, as_it_was, tolerance_fraction=0.0)
    assert row(verdict, "device_bytes_given_rows").holds
    assert verdict.notes[0].startswith("short texts shared sequences in this run, which the plan does not price")
    assert not row(audited(plan, report, tolerance_fraction=0.0), "device_bytes_given_rows").holds


def test_reserved_above_what_was_replayed_fails(plan: Plan) -> None:
    replayed = plan.prediction.device_memory.peak_reserved_bytes
    report = sample_report(plan)
    assert audited(plan, with_device_memory(report, peak_reserved_bytes=replayed)).passed
    over = audited(plan, with_device_memory(report, peak_reserved_bytes=replayed + 1))
    assert [one.quantity for one in over.rows if one.holds is False] == ["device_reserved_bytes"]


def test_reserved_above_the_budget_fails(plan: Plan) -> None:
    budget = plan.prediction.device_memory.allocator_budget_bytes
    report = sample_report(plan)
    within = audited(plan, with_device_memory(report, peak_reserved_bytes=budget))
    assert row(within, "device_budget_bytes").holds is True
    over = audited(plan, with_device_memory(report, peak_reserved_bytes=budget + 1))
    assert row(over, "device_budget_bytes").holds is False


def test_times_and_rows_are_only_shown_unless_asked_for(plan: Plan) -> None:
    report = sample_report(plan)
    verdict = audited(plan, report)
    for quantity in ("step_seconds", "active_rows_per_layer", "prefetch_recall", "cpu_busy_seconds"):
        assert row(verdict, quantity).holds is None
    predicted = row(verdict, "step_seconds").predicted
    wide, narrow = (abs(predicted - 0.01) / 0.01 * factor for factor in (1.01, 0.99))
    assert audited(plan, report, tolerances={"step_seconds": wide}).passed
    missed = audited(plan, report, tolerances={"step_seconds": narrow})
    assert row(missed, "step_seconds").holds is False
    assert not missed.passed


def test_an_unknown_quantity_lists_near_names(plan: Plan) -> None:
    with pytest.raises(UsageError, match=r"unknown quantity in --tolerance 'step_second'; did you mean step_seconds"):
        audited(plan, sample_report(plan), tolerances={"step_second": 0.1})


def test_bases(plan: Plan) -> None:
    verdict = audited(plan, sample_report(plan))
    exact = row(verdict, "h2d_bytes_given_rows")
    assert (exact.predicted_basis, exact.observed_basis) == ("counted", "counted")
    planned = row(verdict, "h2d_bytes_per_step")
    assert planned.predicted_basis == plan.prediction.sparsity.basis
    assert weakest_basis(["counted", "measured"]) == "measured"
    assert weakest_basis(["assumed", "counted"]) == "assumed"
    assert weakest_basis([]) == "counted"


# --- what is refused, and what is left out --------------------------------------------------------------------------


def test_a_report_of_another_plan_is_refused(plan: Plan) -> None:
    other = sample_plan(grad_accum=4)
    with pytest.raises(UsageError, match=f"of the plan with digest {plan.content_digest()[:12]}, not of this one"):
        audited(other, sample_report(plan))


def test_a_report_of_another_number_of_layers_is_refused(plan: Plan) -> None:
    report = sample_report(plan)
    observed = report.observed.model_copy(update={"active_rows": report.observed.active_rows[:2]})
    with pytest.raises(UsageError, match="active rows of 2 layers, but the plan's model has 3"):
        audited(plan, report.model_copy(update={"observed": observed}))


def test_steps_are_those_the_counters_cover(plan: Plan) -> None:
    report = sample_report(plan)
    resumed = report.training.model_copy(update={"steps": 10})  # eight of them before this process
    assert audited(plan, report.model_copy(update={"training": resumed})).rows == audited(plan, report).rows


def test_without_the_gpu_profile_the_line_is_left_out_and_said(plan: Plan) -> None:
    missing = plan.request.model_copy(update={"gpu": "gone"})
    assert gpu_of(plan) == sample_profiles().gpu
    assert gpu_of(plan.model_copy(update={"request": missing})) is None
    verdict = audit(plan, sample_report(plan), gpu=None)
    assert "device_bytes_given_rows" not in [one.quantity for one in verdict.rows]
    assert any("and the GPU profile 'emulated'" in note for note in verdict.notes)


def test_a_gpu_profile_that_no_longer_gives_the_plans_peak_is_not_used(plan: Plan) -> None:
    gpu = sample_profiles().gpu
    workspaces = gpu.workspace_bytes.model_copy(update={"value": 4096.0})
    quantities = [
        one.quantity for one in audited_with(plan, gpu.model_copy(update={"workspace_bytes": workspaces})).rows
    ]
    assert "device_bytes_given_rows" not in quantities
    faster = gpu.fp32_flops_per_second.model_copy(update={"value": 1e15})  # which memory does not depend on
    quantities = [
        one.quantity for one in audited_with(plan, gpu.model_copy(update={"fp32_flops_per_second": faster})).rows
    ]
    assert "device_bytes_given_rows" in quantities


def test_a_rehearsal_has_no_time(plan: Plan) -> None:
    report = sample_report(plan)
    observed = report.observed.model_copy(update={"step_seconds": None, "busy_seconds": {}, "prefetch_recall": None})
    verdict = audited(plan, report.model_copy(update={"observed": observed, "rehearsal": True}))
    assert not {"step_seconds", "prefetch_recall"} & {one.quantity for one in verdict.rows}
    assert verdict.passed
    assert any(note.startswith("a rehearsal") for note in verdict.notes)


def test_the_emulated_device_has_no_cublas_workspaces() -> None:
    """Of a plan for a card, 16.2 MiB that a rehearsal has not: of a tiny model they are nearly all."""
    card = load_gpu("rtx-3090")
    plan = sample_plan(gpu="rtx-3090", gpu_mem_bytes=4 << 30)
    priced = predict_device_memory(request=plan.request, decision=plan.decision, gpu=card)
    plan = plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"device_memory": priced})})
    peak = priced.peak_allocated_bytes - 2 * 8_519_680
    report = with_device_memory(sample_report(plan), peak_allocated_bytes=peak)
    emulated, cuda = (
        audit(plan, report.model_copy(update={"device": report.device.model_copy(update={"kind": kind})}), gpu=card)
        for kind in ("emulated", "cuda")
    )
    assert row(emulated, "device_bytes_given_rows").predicted == peak
    assert not row(cuda, "device_bytes_given_rows").holds


def test_without_workspaces_a_rehearsal_reserves_what_the_emulated_devices_step_does() -> None:
    """Not the plan's less the workspaces: other blocks lie in the room that their segments leave."""
    card, emulated = load_gpu("rtx-3090"), load_gpu("emulated")
    plan = sample_plan(gpu="rtx-3090", gpu_mem_bytes=4 << 30)
    on_card, here = (
        predict_device_memory(request=plan.request, decision=plan.decision, gpu=gpu) for gpu in (card, emulated)
    )
    plan = plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"device_memory": on_card})})
    found = without_workspaces(plan).prediction.device_memory.peak_reserved_bytes
    assert found == here.peak_reserved_bytes
    assert found != on_card.peak_reserved_bytes - 2 * 8_519_680


# --- --tolerance ----------------------------------------------------------------------------------------------------


def test_tolerances_are_parsed() -> None:
    assert parse_tolerances(()) == (0.03, {})
    assert parse_tolerances(("0.1", "step_seconds=0.25")) == (0.1, {"step_seconds": 0.25})


@pytest.mark.parametrize("text", ["x", "-0.1", "nan", "inf", "step_seconds=", ""])
def test_bad_tolerances_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a fraction of 0 or more"):
        parse_tolerances((text,))
