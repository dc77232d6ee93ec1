"""The audit: what a plan predicted beside what a run of it observed, and whether the plan kept its word.

Three kinds of lines. *Exact* ones rest on arithmetic alone: given the active rows that the run observed, the bytes over
the link must equal the counted ones, and the adapter's host tables must take what was said. *Within* ones may differ by
a tolerance. *Shown* ones rest on assumed or measured rates and sparsity, which another machine or other data change:
they are for reading and calibration, and are judged only when a tolerance is asked for them by name.

Letters: ``L`` layers, ``A_l`` active rows of layer ``l``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Literal

from meft.planner.base.errors import UsageError, unknown_name
from meft.planner.base.schema import Basis, Record
from meft.planner.check.counted_bytes import (
    DIRECTIONS,
    CategoryCheck,
    as_run,
    by_direction,
    bytes_between_cards,
    bytes_between_machines,
    bytes_of_optimizer_steps,
    bytes_of_report,
    category_checks,
    windows_of,
)
from meft.planner.memory.device import predict_device_memory
from meft.planner.memory.host import host_memory
from meft.planner.predict.prediction import repriced, without_workspaces
from meft.planner.records.plan import Plan
from meft.planner.records.profiles import GpuProfile
from meft.planner.records.report import Report

DEFAULT_TOLERANCE_FRACTION = 0.03
"""What the closed-form ledger promises of the allocated peak."""

Rule = Literal["exact", "within", "at most", "shown"]

_GIVEN_ROWS = ("h2d_bytes_given_rows", "d2h_bytes_given_rows")
_EXACT = (*_GIVEN_ROWS, "network_bytes_given_rows", "cards_bytes_total")


class AuditRow(Record):
    """One quantity. ``ratio`` is predicted over observed, null when the observed value is 0."""

    quantity: str
    predicted: float
    observed: float
    ratio: float | None
    predicted_basis: Basis
    observed_basis: Basis
    rule: Rule
    tolerance_fraction: float | None
    """Largest accepted ``|predicted - observed| / observed``; null where the rule needs none."""
    holds: bool | None
    """Null for what is only shown."""
    because: str


class Audit(Record):
    """The whole of it; ``passed`` when every judged line holds."""

    plan_digest: str
    report_digest: str
    device_kind: Literal["cuda", "emulated"]
    device_name: str
    rehearsal: bool
    steps: int
    rows: tuple[AuditRow, ...]
    transfer: tuple[CategoryCheck, ...]
    transfer_exact: bool
    notes: tuple[str, ...]
    passed: bool

    def _repr_html_(self) -> str:
        """What a notebook shows: each quantity, and the verdict."""
        from meft.planner.base.html import html_table

        rows = [
            (
                row.quantity,
                f"{row.predicted:,.6g}" if row.predicted < 1e6 else f"{row.predicted:,.0f}",
                f"{row.observed:,.6g}" if row.observed < 1e6 else f"{row.observed:,.0f}",
                "-" if row.ratio is None else f"{row.ratio:.3f}",
                row.rule,
                "" if row.holds is None else "ok" if row.holds else "missed",
            )
            for row in self.rows
        ]
        verdict = "passed" if self.passed else "failed"
        title = f"Predicted against observed on {self.device_name}, {self.steps} steps: {verdict}"
        headers = ("quantity", "predicted", "observed", "ratio", "rule", "")
        return html_table(title, headers, rows, notes=self.notes)


def audit(
    plan: Plan,
    report: Report,
    *,
    gpu: GpuProfile | None,
    tolerance_fraction: float = DEFAULT_TOLERANCE_FRACTION,
    tolerances: Mapping[str, float] | None = None,
) -> Audit:
    """Compare a report with the plan that it ran.

    ``gpu`` is the plan's GPU profile, to work out device memory again from the observed rows; without it, or if it no
    longer gives the plan's own peak, that line is left out. ``tolerances`` judge quantities by name with a tolerance of
    their own. Raises :class:`UsageError` for a report of another plan, a report without a step, and a tolerance for an
    unknown quantity.
    """
    check_belongs(plan, report)
    gpu = gpu if gpu is not None and _reproduces(plan, gpu) else None
    planned = plan
    if gpu is not None and report.observed.packed is not None:
        plan = repriced(plan, gpu, packed=report.observed.packed)
    if report.device.kind == "emulated":
        plan = without_workspaces(plan)
    steps = report.observed.steps
    rows = (
        *_device_rows(plan, report, gpu, tolerance_fraction),
        *_host_rows(plan, report),
        *_exact_transfer_rows(plan, report, steps),
        *_network_rows(plan, report),
        *_cards_rows(plan, report),
        *_planned_transfer_rows(plan, report),
        *_estimated_rows(plan, report),
    )
    rows = _with_tolerances(rows, tolerances or {})
    checks = category_checks(plan, report, steps)
    return Audit(
        plan_digest=report.plan_digest,
        report_digest=report.content_digest(),
        device_kind=report.device.kind,
        device_name=report.device.name,
        rehearsal=report.rehearsal,
        steps=steps,
        rows=rows,
        transfer=checks,
        transfer_exact=all(row.predicted == row.observed for row in rows if row.quantity in _EXACT),
        notes=(*_packed_notes(planned, report), *_notes(plan, report, gpu)),
        passed=all(row.holds is not False for row in rows),
    )


def weakest_basis(bases: Iterable[Basis]) -> Basis:
    """The basis of a number made from numbers of these: assumed if one is, else measured if one is, else counted."""
    order: tuple[Basis, ...] = ("counted", "measured", "assumed")
    return max(bases, key=order.index, default="counted")


def check_belongs(plan: Plan, report: Report) -> None:
    """Raise :class:`UsageError` for a report of another plan or model."""
    digest = plan.content_digest()
    if report.plan_digest != digest:
        raise UsageError(
            f"report: it is of the plan with digest {report.plan_digest[:12]}, not of this one ({digest[:12]}); "
            f"give the plan.json that was run, or run this one"
        )
    layers, expected = len(report.observed.active_rows), plan.request.model.num_layers
    if layers != expected:
        raise UsageError(f"report: active rows of {layers} layers, but the plan's model has {expected}")


# --- the lines ------------------------------------------------------------------------------------------------------


def _row(
    quantity: str,
    predicted: float,
    observed: float,
    *,
    bases: tuple[Basis, Basis],
    because: str,
    rule: Rule = "shown",
    tolerance_fraction: float | None = None,
) -> AuditRow:
    return AuditRow(
        quantity=quantity,
        predicted=predicted,
        observed=observed,
        ratio=predicted / observed if observed else None,
        predicted_basis=bases[0],
        observed_basis=bases[1],
        rule=rule,
        tolerance_fraction=tolerance_fraction,
        holds=_holds(rule, predicted, observed, tolerance_fraction),
        because=because,
    )


def _holds(rule: Rule, predicted: float, observed: float, tolerance_fraction: float | None) -> bool | None:
    if rule == "exact":
        return predicted == observed
    if rule == "at most":
        return observed <= predicted
    if rule == "within":
        return abs(predicted - observed) <= (tolerance_fraction or 0.0) * abs(observed)
    return None


def _device_rows(plan: Plan, report: Report, gpu: GpuProfile | None, tolerance_fraction: float) -> tuple[AuditRow, ...]:
    predicted, observed = plan.prediction.device_memory, report.observed.device_memory
    seen: Basis = "counted" if report.device.kind == "emulated" else "measured"
    ledger = weakest_basis(entry.basis for entry in predicted.entries)
    guessed = weakest_basis((ledger, plan.prediction.sparsity.basis))
    rows = [
        _row(
            "device_allocated_bytes",
            predicted.peak_allocated_bytes,
            observed.peak_allocated_bytes,
            bases=(guessed, seen),
            because="allocated peak, with the planned active rows",
        )
    ]
    if gpu is not None:
        rows.append(
            _row(
                "device_bytes_given_rows",
                predicted.peak_allocated_bytes,
                observed.peak_allocated_bytes,
                bases=(ledger, seen),
                because="allocated peak of the decision, counted anew: the same whatever rows are active",
                rule="within",
                tolerance_fraction=tolerance_fraction,
            )
        )
    rows += [
        _row(
            "device_reserved_bytes",
            predicted.peak_reserved_bytes,
            observed.peak_reserved_bytes,
            bases=(predicted.reserved_basis, seen),
            because="what the caching allocator held at its peak: the plan's step, replayed",
            rule="at most" if seen == predicted.reserved_basis == "counted" else "shown",
        ),
        _row(
            "device_budget_bytes",
            predicted.allocator_budget_bytes,
            observed.peak_reserved_bytes,
            bases=("counted", seen),
            because="the plan's promise: reserved stays within the budget",
            rule="at most",
        ),
    ]
    if observed.process_bytes is not None:
        process = predicted.process_bytes
        middle = (process.low_bytes + process.high_bytes) / 2
        rows.append(
            _row(
                "device_process_bytes",
                middle,
                observed.process_bytes,
                bases=(process.basis, "measured"),
                because=f"the middle of a range; observed by {observed.process_bytes_source}",
            )
        )
    return tuple(rows)


def _reproduces(plan: Plan, gpu: GpuProfile) -> bool:
    """Whether this version and this profile still say what the plan says."""
    again = predict_device_memory(request=plan.request, decision=plan.decision, gpu=gpu)
    return again.peak_allocated_bytes == plan.prediction.device_memory.peak_allocated_bytes


def _host_rows(plan: Plan, report: Report) -> tuple[AuditRow, ...]:
    return (
        _row(
            "host_adapter_bytes",
            _host_bytes(plan, report),
            report.observed.host_memory.total_bytes,
            bases=("counted", "counted"),
            because="tables and staging buffers of the adapter",
            rule="exact",
        ),
    )


def _host_bytes(plan: Plan, report: Report) -> int:
    """As planned, or of another number of ranks what the plan would have said for it."""
    if (report.gpus, report.nodes) == (plan.request.gpus, plan.request.nodes):
        return plan.prediction.host_memory.total_bytes
    return host_memory(request=as_run(plan, report).request, decision=plan.decision).total_bytes


def _exact_transfer_rows(plan: Plan, report: Report, steps: int) -> tuple[AuditRow, ...]:
    observed = report.observed.transfer
    once = [round(size / windows_of(plan, report)) for size in by_direction(bytes_of_optimizer_steps(plan, report))]
    totals = bytes_of_report(plan, report, steps)
    given_rows = zip(by_direction(totals), (observed.h2d_bytes_total, observed.d2h_bytes_total), strict=True)
    seen_once = (observed.h2d_bytes_per_optimizer_step, observed.d2h_bytes_per_optimizer_step)
    per_optimizer_step = tuple(zip(once, seen_once, strict=True))
    counted: tuple[Basis, Basis] = ("counted", "counted")
    return (
        *(
            _row(
                name,
                expected,
                seen,
                bases=counted,
                because=f"all {steps} steps, with the rows that were active",
                rule="exact",
            )
            for name, (expected, seen) in zip(_GIVEN_ROWS, given_rows, strict=True)
        ),
        *(
            _row(
                f"{way}_bytes_per_optimizer_step",
                expected,
                seen,
                bases=counted,
                because="outside the steps, once per accumulation window",
                rule="exact",
            )
            for way, (expected, seen) in zip(DIRECTIONS, per_optimizer_step, strict=True)
            if expected or seen
        ),
    )


def _network_rows(plan: Plan, report: Report) -> tuple[AuditRow, ...]:
    """Between machines, if there were several."""
    observed, totals = report.observed.transfer, {"step": 0, "optimizer_step": 0}
    for (_, per), size in bytes_between_machines(plan, report).items():
        totals[per] += size
    once = round(totals["optimizer_step"] / windows_of(plan, report))
    pairs = (
        ("network_bytes_given_rows", totals["step"], observed.network_bytes_total, "of all machines"),
        ("network_bytes_per_optimizer_step", once, observed.network_bytes_per_optimizer_step, "once per window"),
    )
    return tuple(
        _row(
            name,
            expected,
            seen,
            bases=("counted", "counted"),
            because=f"between machines, {of_what}, with the rows that crossed",
            rule="exact",
        )
        for name, expected, seen, of_what in pairs
        if expected or seen
    )


def _cards_rows(plan: Plan, report: Report) -> tuple[AuditRow, ...]:
    """Between a machine's cards, if the base is sharded over them."""
    expected, seen = bytes_between_cards(plan, report), report.observed.transfer.cards_bytes_total
    if not expected and not seen:
        return ()
    because = "weights that the cards gathered from each other, in all rounds"
    return (_row("cards_bytes_total", expected, seen, bases=("counted", "counted"), because=because, rule="exact"),)


def _planned_transfer_rows(plan: Plan, report: Report) -> tuple[AuditRow, ...]:
    predicted, observed = plan.prediction.transfer, report.observed.transfer
    pairs = (
        (predicted.h2d_bytes_per_step, observed.h2d_bytes_per_step),
        (predicted.d2h_bytes_per_step, observed.d2h_bytes_per_step),
    )
    bases: tuple[Basis, Basis] = (plan.prediction.sparsity.basis, "counted")
    return tuple(
        _row(f"{way}_bytes_per_step", expected, seen, bases=bases, because="with the planned active rows")
        for way, (expected, seen) in zip(DIRECTIONS, pairs, strict=True)
    )


def _estimated_rows(plan: Plan, report: Report) -> tuple[AuditRow, ...]:
    """What rests on rates and sparsity: active rows, recall, times."""
    prediction, observed = plan.prediction, report.observed
    sparsity = prediction.sparsity
    rates = weakest_basis(number.basis for number in plan.inputs.numbers)
    planned_rows = statistics.fmean(sparsity.active_rows_per_layer)
    seen_rows = statistics.fmean(layer.mean for layer in observed.active_rows)
    rows = [
        _row(
            "active_rows_per_layer",
            planned_rows,
            seen_rows,
            bases=(sparsity.basis, "counted"),
            because="mean over layers and steps",
        )
    ]
    highest = [layer.p99 for layer in observed.active_rows if layer.p99 is not None]
    if highest and sparsity.quantile_rows_per_layer and plan.decision.token_chunks == 1:  # planned is a chunk's
        rows.append(
            _row(
                "active_rows_p99",
                max(sparsity.quantile_rows_per_layer),
                max(highest),
                bases=(sparsity.basis, "counted"),
                because=f"busiest layer; planned for {sparsity.quantile:.4g} of batches, observed 99 of 100",
            )
        )
    if observed.prefetch_recall is not None:
        rows.append(
            _row(
                "prefetch_recall",
                sparsity.prefetch_recall,
                observed.prefetch_recall,
                bases=(sparsity.basis, "measured"),
                because="share of the exact choice that look-ahead found",
            )
        )
    if observed.step_seconds is not None:
        rows.append(
            _row(
                "step_seconds",
                prediction.timing.step_seconds,
                observed.step_seconds,
                bases=(rates, "measured"),
                because="median step with the optimizer's share",
            )
        )
    for lane, seconds in observed.busy_seconds.items():
        rows.append(
            _row(
                f"{lane}_busy_seconds",
                prediction.timing.busy_seconds.get(lane, 0.0),
                seconds,
                bases=(rates, "measured"),
                because=f"work of the {lane} lane in a step",
            )
        )
    return tuple(rows)


def _with_tolerances(rows: tuple[AuditRow, ...], tolerances: Mapping[str, float]) -> tuple[AuditRow, ...]:
    """Judge the named quantities with their own tolerance."""
    names = [row.quantity for row in rows]
    for name in tolerances:
        if name not in names:
            raise unknown_name("quantity in --tolerance", name, names)
    return tuple(
        row.model_copy(
            update={
                "rule": "within",
                "tolerance_fraction": tolerances[row.quantity],
                "holds": _holds("within", row.predicted, row.observed, tolerances[row.quantity]),
            }
        )
        if row.quantity in tolerances
        else row
        for row in rows
    )


def _packed_notes(planned: Plan, report: Report) -> tuple[str, ...]:
    if report.observed.packed in (None, planned.request.packed):
        return ()
    was = "short texts shared sequences in this run, which the plan does not price"
    if planned.request.packed:
        was = "no texts shared a sequence in this run, for which the plan prices a mask"
    return (f"{was}: device memory is the decision's as it was run",)


def _notes(plan: Plan, report: Report, gpu: GpuProfile | None) -> tuple[str, ...]:
    observed, notes = report.observed, []
    if report.rehearsal:
        notes.append("a rehearsal: nothing was computed, and the active rows are the plan's own")
    if observed.device_memory.process_bytes is None:
        notes.append(f"no process memory: {observed.device_memory.process_bytes_source}")
    if observed.dropped_rows:
        cap = plan.decision.active_rows_cap
        notes.append(f"active_rows_cap {cap} dropped {observed.dropped_rows:,} rows, summed over layers and steps")
    if gpu is None:
        notes.append(
            f"device memory given the observed rows is left out: the plan's peak does not follow from this version of "
            f"meft and the GPU profile {plan.request.gpu!r}"
        )
    if report.device.budget_bytes != plan.prediction.device_memory.allocator_budget_bytes:
        notes.append("the run had another device budget than the plan")
    return tuple(notes)
