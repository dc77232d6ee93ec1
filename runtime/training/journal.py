"""A run's log: a line of JSON per event, for people and programs that follow it, and TensorBoard's files.

Events: ``begin`` (``step`` done so far, ``total_steps``), ``step`` (``loss``, ``seconds``), ``optimizer_step``
(``learning_rate``, ``gradient_norm``), ``second_stage`` (routing ``stable``: the light router is frozen and chooses
from here on), ``checkpoint``, ``evaluation`` (``scores``) and ``end`` (``reason``: ``done``, ``interrupted`` or
``patience``). Each has ``step``, the micro-batches done. A file that is there is appended to; a run
that went on from a checkpoint tells the steps after it again.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meft.planner.base.errors import MachineError
from meft.planner.base.files import writing

Tell = Callable[..., None]
"""Told of an event by name, the step, and what it is about as keywords."""
TRAINING_GOES_ON = "training needs no log: give another --log, or none, and go on with --resume"


def silent(event: str, *, step: int, **facts: Any) -> None:
    """Nobody listens."""
    del event, step, facts


@contextmanager
def journal(log: Path | None, tensorboard: Path | None) -> Iterator[Tell]:
    """Who is told of events; both are optional, and both are opened before anything is trained.

    Raises:
        MachineError: ``log`` cannot be written, or the package tensorboard is not there.
    """
    with _lines(log) as to_file, _scalars(tensorboard) as to_board:

        def tell(event: str, *, step: int, **facts: Any) -> None:
            to_file(event, step=step, **facts)
            to_board(event, step=step, **facts)

        yield tell


@contextmanager
def _lines(path: Path | None) -> Iterator[Tell]:
    if path is None:
        yield silent
        return
    with writing(path):
        file = path.open("a", encoding="utf-8")

    def tell(event: str, *, step: int, **facts: Any) -> None:
        with writing(path, hint=TRAINING_GOES_ON):
            file.write(json.dumps({"event": event, "step": step} | _finite(facts), allow_nan=False) + "\n")
            file.flush()

    try:
        yield tell
    finally:
        with writing(path):
            file.close()


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in facts.items()
    }


@contextmanager
def _scalars(folder: Path | None) -> Iterator[Tell]:
    """What is a number, or a table of numbers, becomes a curve over the steps."""
    if folder is None:
        yield silent
        return
    if importlib.util.find_spec("tensorboard") is None:
        raise MachineError(
            "--tensorboard: the package tensorboard is not installed; pip install tensorboard, or use --log"
        )
    from torch.utils.tensorboard import SummaryWriter

    with writing(folder):
        writer = SummaryWriter(str(folder))

    def tell(event: str, *, step: int, **facts: Any) -> None:
        numbers = {f"{event}/{name}": value for name, value in facts.items() if isinstance(value, int | float)}
        numbers |= {f"{event}/{name}": value for name, value in facts.get("scores", {}).items()}
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    try:
        yield tell
    finally:
        writer.close()
