"""The exceptions that reach a user, each with its documented exit code.

MeftError                  1  unexpected
+-- UsageError             2  a bad value, name or file: what was given, what is allowed, what to try
+-- InfeasibleError        3  no plan fits: carries the :class:`~meft.planner.search.infeasible.Infeasible` verdict as
text
+-- MachineError           4  this machine cannot run the plan (preflight)
    +-- DeviceOutOfMemory  4  the device budget was exceeded while running
"""

from __future__ import annotations

from collections.abc import Iterable

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


class InfeasibleError(MeftError):
    """Nothing in the search space satisfies the budgets."""

    exit_code = EXIT_INFEASIBLE


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
