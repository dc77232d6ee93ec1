"""SIGINT and SIGTERM: the first is noted and obeyed at the next safe place, the second ends the process at once.

A handler that raises can be lost: an exception in a destructor is printed and ignored, and some libraries swallow it.
So nothing is raised here. While a run loads, its stages ask (:meth:`Interrupts.check`); while it trains, it ends after
its accumulation window with a checkpoint. Everything is written so that even the second signal costs no more than what
was done since the last checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from meft.planner.base.errors import MeftError

STDERR = 2


class Interrupted(MeftError):
    """A signal ended the run; its exit code is 128 and the signal's number, as shells count."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interrupts:
    """What signals have asked for. ``on_signal`` is called by the first."""

    def __init__(self, program: str = "meft-run") -> None:
        self.program = program
        self.number: int | None = None
        """The first signal."""
        self.stopped_after: int | None = None
        """The step after which it ended training early."""
        self.when = "before training begins"
        self.on_signal: Callable[[], None] = lambda: None
        self._before: dict[signal.Signals, Any] = {}
        """Handlers that were there when this was first installed."""

    @contextmanager
    def installed(self) -> Iterator[Interrupts]:
        """Catch both signals; outside the main thread, where Python allows no handlers, nothing is caught."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._note) for number in numbers}
        self._before = self._before or before
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def hand_back(self) -> None:
        """What follows is no run: signals do again what they did before; one that was noted ends the program now."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.number is not None:
            raise self.ended("stopped before anything was begun")

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal came while nothing was trained yet."""
        if self.number is not None:
            raise self.ended("stopped while loading; nothing was trained and nothing was written")

    def check_trained(self) -> None:
        """Raise :class:`Interrupted` if a signal ended training early."""
        if self.stopped_after is not None:
            raise self.ended(f"stopped after step {self.stopped_after}, with a checkpoint; go on with --resume")

    def ended(self, what: str) -> Interrupted:
        """The error that ends the run: which signal, and ``what`` is where."""
        assert self.number is not None
        return Interrupted(f"{signal.Signals(self.number).name}: {what}", self.number)

    @contextmanager
    def while_training(self, stop: Callable[[], None]) -> Iterator[None]:
        """Let the first signal call ``stop``, which ends the run after its window."""
        before = self.when, self.on_signal
        self.when, self.on_signal = "after this accumulation window", stop
        try:
            if self.number is not None:
                stop()
            yield
        finally:
            self.when, self.on_signal = before

    def _note(self, number: int, frame: object) -> None:
        """Printing may have been what was interrupted, so this writes past Python's buffers."""
        del frame
        name = signal.Signals(number).name
        if self.number is not None:
            _tell(f"{self.program}: {name} again: stopped at once; what was saved is whole")
            os._exit(128 + number)
        self.number = number
        if os.environ.get("RANK", "0") == "0":  # of several ranks, all of which got it, the first says so
            _tell(f"{self.program}: {name}: stopping {self.when}; again to stop at once")
        self.on_signal()


@contextmanager
def no_interrupt_ignored(program: str, message: str) -> Iterator[None]:
    """Where Ctrl-C raises: one that Python would ignore, because a destructor was running, ends the process too."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _tell(f"{program}: {message}")
            os._exit(128 + signal.SIGINT)
        before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _tell(line: str) -> None:
    start = "\n" if os.isatty(STDERR) else ""  # a progress bar may stand there
    os.write(STDERR, f"{start}{line}\n".encode())
