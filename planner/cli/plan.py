"""``meft-plan [plan]``: the best decision within the budgets."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any, NoReturn

import click

from meft.planner.base.errors import Infeasible, InfeasibleError, UsageError
from meft.planner.base.files import write_atomic
from meft.planner.cli.options import (
    COUNT,
    PATH,
    budget_options,
    command_with,
    rank_options,
    search_options,
    workload_options,
)
from meft.planner.front.options import RequestOptions
from meft.planner.front.plan import Planned, find_plan, levers_of, scaling_of, simulated_step


@click.command("plan", short_help="The best decision within the budgets (the default).")
@budget_options
@workload_options
@search_options
@rank_options
@click.option("-o", "--output", type=PATH, default=Path("plan.json"), show_default=True, help="Where the plan goes.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON on standard output, and nothing else.")
@click.option("--plot", type=PATH, help="Draw memory, trade-offs and lanes into this .png, .svg or .pdf file.")
@click.option("--trace", type=PATH, help="Write the simulated step as a Chrome trace (chrome://tracing, Perfetto).")
@click.option(
    "--verify", is_flag=True, help="Trace the step in the real model's code (needs torch); exit 3 if it does not fit."
)
@click.option(
    "--tokens",
    type=COUNT,
    help="Tokens of the data (10M, 1.5B, 2500000): the output says how long one pass takes.",
)
@click.option("-v", "--verbose", is_flag=True, help="Every ledger entry, and every number with its source.")
@click.pass_context
def plan_command(
    context: click.Context,
    /,
    *,
    output: Path,
    as_json: bool,
    plot: Path | None,
    trace: Path | None,
    verify: bool,
    tokens: int | None,
    verbose: bool,
    **given: Any,
) -> None:
    """Plan: the decision, what it needs, and what binds. The default command."""
    if plot is not None:
        from meft.planner.render.plot import check_format

        check_format(plot)
    before = _plan_there(output)
    if verify:
        gc.enable()  # tracing makes garbage of its own; see main
    found = find_plan(RequestOptions.taken_from(given), verify=verify)
    if not isinstance(found, Planned):
        refuse(context, found, as_json=as_json)
    text = found.plan.to_json()
    _write(output, text, option="-o")
    if before not in (None, text):
        click.echo(f"meft-plan: {output} held another plan, which this one has replaced", err=True)
    if trace is not None:
        from meft.planner.timing.chrome import chrome_trace

        _write(trace, json.dumps(chrome_trace(simulated_step(found)), separators=(",", ":")), option="--trace")
    if plot is not None:
        from meft.planner.render.plot import plot_plan

        plot_plan(found.plan, simulated_step(found), plot)
    if as_json:
        click.echo(text, nl=False)
    else:
        _show(found, output, tokens=tokens, verbose=verbose, also=[path for path in (plot, trace) if path is not None])


def refuse(context: click.Context, verdict: Infeasible, *, as_json: bool) -> NoReturn:
    """Say what binds and the nearest command that works; with ``--json`` on standard output too."""
    nearest = command_with(context, verdict.suggestion) if verdict.suggestion else None
    if as_json:
        content = {
            "feasible": False,
            "binding": verdict.binding,
            "needed": verdict.needed,
            "limit": verdict.limit,
            "message": verdict.message,
            "command": nearest,
        }
        click.echo(json.dumps(content, indent=2, allow_nan=False))
    hint = f"; the nearest that fits: {nearest}" if nearest else "; no change nearby was found that fits"
    raise InfeasibleError(f"no plan fits: {verdict.message.rstrip('.')}{hint}", verdict)


def _plan_there(output: Path) -> str | None:
    """The text of the plan that is there and would be replaced; anything else that is there is refused."""
    if not output.exists() and not output.is_symlink():
        return None
    try:
        text = output.read_text(encoding="utf-8") if output.is_file() else ""
        content = json.loads(text)
    except OSError as error:
        raise UsageError(f"-o {output}: cannot be written ({error.strerror})") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or "decision" not in content:
        raise UsageError(f"-o {output}: what is there is no plan, and would be lost; remove it, or choose another name")
    return text


def _write(path: Path, text: str, *, option: str) -> None:
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written ({error.strerror})") from None


def _show(found: Planned, output: Path, *, tokens: int | None, verbose: bool, also: list[Path]) -> None:
    from meft.planner.render.plan import plan_view
    from meft.planner.render.tables import show

    levers, notes = levers_of(found), found.planning.notes
    view = plan_view(
        found.plan,
        path=str(output),
        notes=notes,
        verbose=verbose,
        levers=levers,
        scaling=scaling_of(found),
        tokens=tokens,
    )
    show(view)
    for path in (output, *also):
        click.echo(f"wrote {path}")
