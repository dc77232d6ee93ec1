"""What a run reads, as options of ``meft-run``; and ``meft-run prepare``, which makes lines of it or looks at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from meft.planner.base.errors import UsageError
from meft.planner.base.files import write_atomic
from meft.runtime.data.metrics import METRICS
from meft.runtime.data.template_fit import KINDS, kinds_given

_PATH = click.Path(path_type=Path)
_READING = ("raw", "stride", "packing", "allow_cut", "allow_loss_of")


def data_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What to learn from, and how to read it."""
    options = (
        click.option(
            "--data",
            type=_PATH,
            multiple=True,
            help="File, folder or saved dataset, in any format of docs/data.md; may be given more than once.",
        ),
        click.option(
            "--raw", is_flag=True, help="Join prompt and completion as they stand, without the chat template."
        ),
        click.option(
            "--stride",
            type=click.IntRange(min=1),
            help="Tokens from one window of a long text to the next.  [default: the sequence length]",
        ),
        click.option(
            "--packing",
            type=click.Choice(["text", "all", "none"]),
            help="What shares full sequences: short texts, prompts and conversations too, or nothing. [default: text, "
            "where the budget has room for the mask]",
        ),
        click.option(
            "--allow-cut", is_flag=True, help="Train although more than 1 % of the examples are longer than a sequence."
        ),
        click.option(
            "--allow-loss-of",
            metavar="KIND,...",
            help=f"Train although the chat template leaves these out: {', '.join(KINDS)}.",
        ),
        click.option(
            "--show", type=click.IntRange(min=0), default=0, help="Print so many examples, what carries loss in [[ ]]."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def known_tokens_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """What known tokens weigh in the loss."""
    option = click.option(
        "--known-token-weight",
        type=click.FloatRange(0, 1),
        default=1.0,
        show_default=True,
        help="Weight in the loss of tokens that already have a probability above 0.5; 1: as any other.",
    )
    return option(function)


def reading_options(given: dict[str, Any]) -> dict[str, Any]:
    """Take the options of reading out of ``given``; what is to be put in their place."""
    from meft.runtime.data.loading import DataOptions

    values = {name: given.pop(name) for name in _READING}
    kinds = _kinds(values.pop("allow_loss_of"))
    return {"reading": DataOptions(**values, allow_loss=kinds)}


def _kinds(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    try:
        return kinds_given(text)
    except ValueError as error:
        raise UsageError(f"--allow-loss-of {text}: {error} no kind of loss; known: {', '.join(KINDS)}") from None


@click.command("prepare", short_help="Make training lines of any known format or a named task, or look at it.")
@click.argument("task")
@click.option("-o", "--output", type=_PATH, help="Where the lines go: for --data and --eval alike.")
@click.option("--metric", type=click.Choice(METRICS), help="[default: what the format is scored by, else em]")
@click.option("--limit", type=click.IntRange(min=1), help="The first so many items only.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Order of a named task's items.")
@click.option(
    "--show", type=click.IntRange(min=0), default=0, help="Print so many of the lines, what is learned in [[ ]]."
)
def prepare_command(task: str, output: Path | None, show: int, **given: Any) -> None:
    """Write TASK (a file or folder in any format of docs/data.md, or a name: see meft-run evaluate) as lines.

    Questions get their gold answers beside the completion, conversations and texts stay what they are. Without -o,
    --show alone looks at it.
    """
    from meft.runtime.data.task_sources import load_prepared

    if output is None and not show:
        raise UsageError("-o FILE: where shall the lines go? Or give --show N to look at N of them")
    prepared = load_prepared(task, **given)
    scored = f"; scored by --metric {prepared.metric}" if prepared.metric else ""
    click.echo(f"{prepared.description}: {len(prepared.records):,} items{scored}")
    for record in prepared.records[:show]:
        click.echo(record.marked())
    if output is not None:
        write_atomic(output, "".join(record.line() for record in prepared.records))
        click.echo(f"wrote {output}")
