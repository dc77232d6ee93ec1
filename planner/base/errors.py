"""The exceptions that reach a user, each with its documented exit code.

MeftError                  1  unexpected
+-- UsageError             2  a bad value, name or file: what was given, what is allowed, what to try
+-- InfeasibleError        3  nothing fits: carries the :class:`Infeasible` verdict, its message is the text of it
+-- MachineError           4  this machine cannot run the plan (preflight)
    +-- DeviceOutOfMemory  4  the device budget was exceeded while running
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

EXIT_DONE = 0
EXIT_UNEXPECTED = 1
EXIT_USAGE = 2
EXIT_INFEASIBLE = 3
EXIT_MACHINE = 4


class MeftError(Exception):
    """Base of every error this project raises on purpose; its text is shown to the user as it stands."""

    exit_code: int = EXIT_UNEXPECTED


class UsageError(MeftError):
    """A value, a name or a file that cannot be used."""

    exit_code = EXIT_USAGE


class UntraceableError(UsageError):
    """Code that a trace cannot follow: it looks at numbers, of which a trace has none."""


Binding = Literal["device memory", "host memory", "slowdown", "trainable share"]


@dataclass(frozen=True)
class Infeasible:
    """The verdict that nothing fits. ``needed`` and ``limit`` are bytes, or plain ratios for slowdown and share."""

    binding: Binding
    needed: float
    limit: float
    message: str
    """What binds and by how much: one line."""
    suggestion: dict[str, str] = field(default_factory=dict)
    """Options of ``meft-plan`` to change or add so that a plan exists, empty if none was found; a flag has no value."""


class InfeasibleError(MeftError):
    """Nothing in the search space satisfies the budgets; ``verdict`` says what binds and what would do."""

    exit_code = EXIT_INFEASIBLE

    def __init__(self, message: str, verdict: Infeasible | None = None) -> None:
        super().__init__(message)
        self.verdict = verdict


class MachineError(MeftError):
    """The plan is sound but this machine cannot run it."""

    exit_code = EXIT_MACHINE


class DeviceOutOfMemory(MachineError):
    """An allocation did not fit the device budget, even after the cache was flushed."""


def unknown_name(kind: str, given: str, known: Iterable[str]) -> UsageError:
    """Build the error for a misspelt name: near names first, then the whole list.

    >>> print(unknown_name("GPU", "rtx-3900", ["rtx-3090", "rtx-4090"]))
    unknown GPU 'rtx-3900'; did you mean rtx-3090, rtx-4090? Known: rtx-3090, rtx-4090
    """
    import difflib  # only mistakes need it, and it is slow to load

    names = sorted(known)
    near = difflib.get_close_matches(given.lower(), names, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else "."
    return UsageError(f"unknown {kind} {given!r}{hint} Known: {', '.join(names)}")
