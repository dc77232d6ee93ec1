"""``meft-profile``: measure this machine, a model's sparsity, or correct profiles by what runs observed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meft.runtime.cli import run_command

if TYPE_CHECKING:
    from meft.planner.profile_file import ProfileFile
    from meft.runtime.hardware import Tell

PROGRAM = "meft-profile"
_PATH = click.Path(path_type=Path)
_OUTPUT = click.option(
    "-o", "--output", type=_PATH, required=True, help="Where to write it; meft-plan reads it by --gpu FILE and others."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("meft"), prog_name=PROGRAM)
def command() -> None:
    """Measure what plans rest on, and let reports of runs correct it.

    Exit codes: 0 done, 1 unexpected, 2 usage or a bad file, 4 this machine cannot do it.
    """


@command.command()
@_OUTPUT
def hardware(output: Path) -> None:
    """Measure this machine: host, GPU and link, in less than a minute.

    Plan with `meft-plan --gpu FILE`. Without a GPU the emulated device is measured.
    """
    from meft.runtime.hardware import measure_hardware

    with _progress() as tell:
        measured = measure_hardware(tell, meft_version=version("meft"))
    measured.save(output)
    show_measurements(measured)
    _say_how_to_plan(measured, output)


def show_measurements(file: ProfileFile) -> None:
    """Every measurement with its spread, then the warnings, on standard output."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(file.machine.name, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("what", "median", "quartiles", "n", "with"):
        table.add_column(name, justify="right" if name in ("median", "n") else "left")
    for each in file.measurements:
        quartiles = f"{_number(each.low_quartile)} to {_number(each.high_quartile)}"
        median = f"{_number(each.median)} {each.unit}"
        table.add_row(each.name, median, quartiles, str(each.repetitions), each.detail)
    console.print(table)
    for warning in file.warnings:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)


def _number(value: float) -> str:
    """Three digits with an SI prefix."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{prefix}"
    return "0" if value == 0 else f"{value / 1e-6:.3g}u"


def _say_how_to_plan(file: ProfileFile, output: Path) -> None:
    options = f"--gpu {output}" if file.gpu is not None else f"--sparsity {output}"
    memory = " --gpu-mem 2GB" if file.gpu is not None and file.gpu.memory_total_bytes is None else ""
    click.echo(f"wrote {output} with {', '.join(file.sections())}; plan with: meft-plan {options}{memory}")


@contextmanager
def _progress() -> Iterator[Tell]:
    """A bar on a terminal, a line per stage elsewhere; on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:

        def line(what: str, stage: int, stages: int) -> None:
            if stage < stages:
                console.print(f"{PROGRAM}: {what} ({stage + 1}/{stages})", soft_wrap=True, markup=False)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=None)

        def advance(what: str, stage: int, stages: int) -> None:
            bar.update(task, description=what, completed=stage, total=stages)

        yield advance


def main() -> None:
    """Entry point: every error a user can cause is one line on standard error and a documented exit code."""
    run_command(command, PROGRAM, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    main()
