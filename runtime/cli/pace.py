"""How fast a run goes, told while it goes: seconds a step and the time that is left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from meft.planner.base.units import format_seconds

REMEMBERED_STEPS = 20


class Pace:
    """The mean over the last steps; the first, with its warming up, is not among them.

    >>> clock = iter([0.0, 9.0, 11.0])
    >>> pace = Pace(lambda: next(clock))
    >>> [pace.told(step, 30) for step in (1, 2, 3)]
    ['', ', 9.00 s a step, 4 min left', ', 5.50 s a step, 2 min left']
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ends: deque[tuple[int, float]] = deque(maxlen=REMEMBERED_STEPS + 1)

    def told(self, step: int, total_steps: int) -> str:
        """To be called as each step ends, with its number: what to add to its line, nothing before there are two."""
        self._ends.append((step, self._clock()))
        (first, began), (last, now) = self._ends[0], self._ends[-1]
        if first == last:
            return ""
        seconds = (now - began) / (last - first)
        left = seconds * (total_steps - step)
        told = f", {format_seconds(seconds)} a step"
        return f"{told}, {_long(left)} left" if left else told


def _long(seconds: float) -> str:
    """A wait as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
