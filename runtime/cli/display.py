"""How a run tells how it goes, on standard error: a progress bar on a terminal, about ten lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from meft.runtime.cli.pace import Pace
from meft.runtime.training.interrupts import Interrupts

if TYPE_CHECKING:  # torch is loaded only once there is something to run
    from meft.runtime.training.options import Display

LINES_WITHOUT_TERMINAL = 10


@contextmanager
def display_of(interrupts: Interrupts) -> Iterator[Display]:
    """A progress bar on a terminal, about ten lines elsewhere; all on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from meft.runtime.training.options import Display
    from meft.runtime.training.training import Progress as Step

    console = Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        console.print(f"meft-run: {text}", soft_wrap=True, markup=False)

    pace = Pace(time.monotonic)
    if not console.is_terminal:

        def line(step: Step) -> None:
            told = pace.told(step.step, step.total_steps)
            every = max(1, step.total_steps // LINES_WITHOUT_TERMINAL)
            if step.step % every == 0 or step.step in (1, step.total_steps):
                say(f"step {step.step}/{step.total_steps} loss {step.loss:.4f}{told}")

        yield Display(say, line, interrupts)
        return
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=None, loss="-", visible=False)

        def advance(step: Step) -> None:
            told = pace.told(step.step, step.total_steps)
            bar.update(task, total=step.total_steps, completed=step.step, loss=f"{step.loss:.4f}{told}", visible=True)

        yield Display(say, advance, interrupts)
