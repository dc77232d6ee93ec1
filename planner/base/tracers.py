"""Where the planner finds what needs torch: by the entry points of one group, so that it names no other package."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from meft.planner.base.errors import MachineError

GROUP = "meft.verify"


def tracer(name: str, *, purpose: str) -> Callable[..., Any]:
    """The function of that name; ``purpose`` begins the line of the :class:`MachineError` where there is none."""
    found = [each for each in entry_points(group=GROUP) if each.name == name]
    if not found:
        raise MachineError(f"{purpose}: no tracer is installed (entry point {name} of {GROUP}); reinstall meft")
    try:
        function: Callable[..., Any] = found[0].load()
    except ImportError as error:
        need = "it runs the real model's code, which needs torch: pip install 'meft[run]'"
        raise MachineError(f"{purpose}: {need} ({error})") from error
    return function
