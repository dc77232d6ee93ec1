"""``meft-plan audit``: predicted against observed."""

from __future__ import annotations

from pathlib import Path

import click

from meft.planner.base.errors import EXIT_DONE, EXIT_UNEXPECTED
from meft.planner.check.audit import DEFAULT_TOLERANCE_FRACTION
from meft.planner.cli.options import PATH
from meft.planner.front.audit import audit_run, tolerance_of


@click.command("audit", short_help="Compare a plan with the report of its run.")
@click.argument("plan", type=PATH)
@click.argument("report", type=PATH)
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="[QUANTITY=]FRACTION",
    help="Accepted difference from the observed value; alone for the allocated peak given the observed rows "
    f"[default: {DEFAULT_TOLERANCE_FRACTION}], with a name to judge any quantity: --tolerance step_seconds=0.25.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the audit as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Transfers by category.")
@click.pass_context
def audit_command(
    context: click.Context,
    /,
    *,
    plan: Path,
    report: Path,
    tolerances: tuple[str, ...],
    as_json: bool,
    verbose: bool,
) -> None:
    """Compare PLAN with the REPORT of a run of it.

    Given the rows that were active, the bytes over the link must equal the counted ones exactly. Exit code 0 when every
    judged quantity holds, 1 otherwise, 2 for a report of another plan.
    """
    fraction, by_name = parse_tolerances(tolerances)
    verdict = audit_run(plan, report, tolerance_fraction=fraction, tolerances=by_name)
    if as_json:
        click.echo(verdict.model_dump_json(indent=2))
    else:
        from meft.planner.render.audit import audit_view
        from meft.planner.render.tables import show

        show(audit_view(verdict, verbose=verbose))
    context.exit(EXIT_DONE if verdict.passed else EXIT_UNEXPECTED)


def parse_tolerances(texts: tuple[str, ...]) -> tuple[float, dict[str, float]]:
    """The tolerance of the allocated peak, and those of quantities by name."""
    overall, by_name = DEFAULT_TOLERANCE_FRACTION, {}
    for text in texts:
        name, _, number = text.rpartition("=")
        fraction = tolerance_of(number, shown=text)
        if name:
            by_name[name] = fraction
        else:
            overall = fraction
    return overall, by_name
