"""``meft-plan trace``: a user's own training script on a card that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from meft.planner.base.errors import EXIT_DONE, EXIT_INFEASIBLE
from meft.planner.cli.options import PATH, SIZE
from meft.planner.front.script import MAX_STEPS, Trace, trace_script

if TYPE_CHECKING:
    from meft.planner.front.script import ScriptMemory
    from meft.planner.render.tables import View

_ROWS = 12


@click.command("trace", short_help="Your own training script, without GPU and weights.")
@click.option("--gpu", metavar="NAME|FILE", help="Card that the script is to find.")
@click.option("--gpu-mem", type=SIZE, help="GPU memory. [default: the card's]")
@click.option("--steps", type=click.IntRange(1, MAX_STEPS), default=2, show_default=True, help="Optimizer steps.")
@click.option(
    "--snapshot",
    type=PATH,
    metavar="FILE",
    help="Write the allocations: .pickle for pytorch.org/memory_viz, .json as a Chrome trace.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="-- python SCRIPT [ARGS]...")
@click.pass_context
def trace_command(
    context: click.Context,
    /,
    *,
    gpu: str | None,
    gpu_mem: int | None,
    steps: int,
    snapshot: Path | None,
    as_json: bool,
    words: tuple[str, ...],
) -> None:
    """Run a training script of yours for two steps on a card that is not there, and say what it takes.

    The script runs as it is, with a CUDA device that has no content: models come from their config.json without
    weights. Needs torch and transformers. What the script prints goes to standard error. Exit code 3 when it does not
    fit the card.
    """
    traced = Trace(gpu=gpu, gpu_mem_bytes=gpu_mem, steps=steps)
    trace_script(words, traced)
    memory = traced.memory
    if snapshot is not None:
        traced.save(snapshot)
    if as_json:
        click.echo(memory.model_dump_json(indent=2))
    else:
        from meft.planner.render.tables import show

        show(_view(memory))
    context.exit(EXIT_INFEASIBLE if memory.verdict == "does-not-fit" else EXIT_DONE)


def _view(memory: ScriptMemory) -> View:
    """Totals, what is there at each phase's largest moment by module, and what was not followed."""
    from meft.planner.base.units import format_bytes
    from meft.planner.render.tables import grid, lines, section, stacked

    card = f"{memory.gpu} with {format_bytes(memory.gpu_mem_bytes)}"
    rows = [
        ("fits", _VERDICTS[memory.verdict]),
        ("peak allocated", format_bytes(memory.peak_allocated_bytes)),
        ("peak reserved", format_bytes(memory.peak_reserved_bytes)),
    ]
    largest: dict[str, int] = {}
    for phase in memory.phases:
        for name, num_bytes in phase.by_module.items():
            largest[name] = max(largest.get(name, 0), num_bytes)
    shown = sorted(largest, key=lambda name: (-largest[name], name))[:_ROWS]
    body = [
        (name, *(format_bytes(phase.by_module[name]) if name in phase.by_module else "" for phase in memory.phases))
        for name in shown
    ]
    body.append(("allocated", *(format_bytes(phase.allocated_bytes) for phase in memory.phases)))
    header = ("module", *(phase.phase for phase in memory.phases))
    parts = [
        section(f"{memory.steps} steps on {card}", grid(("", ""), rows)),
        section("At the largest moment of each phase", grid(header, body, right=tuple(range(1, len(header))))),
    ]
    if memory.not_followed:
        parts.append(section("Not followed", lines(memory.not_followed)))
    return stacked(*parts)


_VERDICTS = {
    "fits": "yes",
    "fits-after-retries": "after retries, so slowly: the allocator flushes its cache",
    "uncertain": "uncertain: the size of the CUDA context decides",
    "does-not-fit": "no",
}
