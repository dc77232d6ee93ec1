"""The table of ``meft-plan audit``."""

from __future__ import annotations

from meft.planner.base.units import format_bytes, format_seconds
from meft.planner.check.audit import Audit, AuditRow
from meft.planner.check.counted_bytes import CategoryCheck
from meft.planner.render.tables import Columns, Paragraph, View, grid, lines, percent, section, stacked


def audit_view(audit: Audit, *, verbose: bool) -> View:
    """Predicted, observed and ratio with the basis of each, then the verdict."""
    steps = f"{audit.steps} step{'s' * (audit.steps != 1)}"
    head = f"Predicted against observed on {audit.device_name}, {steps}"
    headers = ("quantity", "predicted", "observed", "ratio", "basis", "rule")
    table = Columns(headers, map(_line, audit.rows), right=(1, 2, 3), optional=(4,), gap=1)
    parts: list[View] = [Paragraph(head, style="bold"), table]
    if verbose or not audit.transfer_exact:
        parts.append(section("Transfer by category, given the observed rows", _categories(audit.transfer)))
    exact = "equal" if audit.transfer_exact else "DO NOT equal"
    closing = [
        f"Given the active rows, the predicted bytes over the link {exact} the counted ones.",
        *audit.notes,
        f"{'PASSED' if audit.passed else 'FAILED'}: {_tally(audit)}",
    ]
    return stacked(*parts, lines(closing))


def _line(row: AuditRow) -> tuple[str, ...]:
    ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
    basis = f"{row.predicted_basis}|{row.observed_basis}"
    return (row.quantity, _shown(row, row.predicted), _shown(row, row.observed), ratio, basis, _rule(row))


def _shown(row: AuditRow, value: float) -> str:
    if row.quantity.endswith("_seconds"):
        return format_seconds(value)
    if row.quantity == "prefetch_recall":
        return percent(value)
    if "bytes" not in row.quantity:
        return f"{value:,.1f}"
    return f"{value:,.0f}" if row.rule == "exact" else format_bytes(value)


def _rule(row: AuditRow) -> str:
    if row.holds is None:
        return ""
    rule = f"within {percent(row.tolerance_fraction)}" if row.tolerance_fraction is not None else row.rule
    return f"{rule}: {'ok' if row.holds else 'MISSED'}"


def _categories(checks: tuple[CategoryCheck, ...]) -> View:
    rows = [
        (
            check.direction,
            check.category,
            check.per.replace("_", " "),
            f"{check.predicted_bytes:,}",
            f"{check.counted_bytes:,}",
            "" if check.equal else "DIFFERS",
        )
        for check in checks
    ]
    return grid(("way", "category", "per", "predicted", "counted", ""), rows, right=(3, 4))


def _tally(audit: Audit) -> str:
    judged = [row for row in audit.rows if row.holds is not None]
    missed = [row.quantity for row in judged if not row.holds]
    if missed:
        return f"{', '.join(missed)} missed, {len(judged) - len(missed)} of {len(judged)} hold"
    return f"all {len(judged)} judged quantities hold; the others rest on assumed rates and sparsity"
