"""``meft-plan compare``: every method side by side, for the same workload and budget."""

from __future__ import annotations

from typing import Any

import click

from meft.planner.cli.options import budget_options, search_options, workload_options
from meft.planner.front.compare import compare_methods
from meft.planner.front.options import RequestOptions
from meft.planner.front.request import planning


@click.command("compare", short_help="Every method side by side.")
@budget_options
@workload_options
@search_options
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare_command(*, as_json: bool, **given: Any) -> None:
    """Every method side by side: at its usual size, and at the largest size that fits."""
    comparison = compare_methods(planning(RequestOptions.taken_from(given)))
    if as_json:
        click.echo(comparison.model_dump_json(indent=2))
        return
    from meft.planner.render.methods import comparison_view
    from meft.planner.render.tables import show

    show(comparison_view(comparison))
