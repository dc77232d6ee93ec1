"""The best decision whose step, replayed through the allocator, fits the device.

Weighing knows what decisions allocate, which costs microseconds for each; what the allocator reserves for that takes a
replay (:mod:`meft.planner.memory.replayed`) of some ten milliseconds. So the decision that the objective prefers among
those that *allocate* no more than the budget is replayed; where it reserves more, the one is replayed that is preferred
with as much less to allocate, and so on until one fits. Then the range between what fits and what does not is halved
some times, for a better one. Nothing fits only once what allocates least has been replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Found = TypeVar("Found")

HALVINGS = 2
"""How often a better decision is looked for."""
SMALLEST_STEP_BYTES = 1 << 16
"""Budgets that differ by less are one."""


@dataclass
class Fitting(Generic[Found]):
    """``found`` is the preferred decision that fits, None if none does; then ``short_bytes`` says by how much the one
    fails that comes closest, None if nothing allocates so little."""

    found: Found | None = None
    short_bytes: int | None = None


def best_fitting(
    budget_bytes: int, *, best_within: Callable[[int], Found | None], short_bytes: Callable[[Found], int]
) -> Fitting[Found]:
    """``best_within`` gives the preferred decision that allocates no more than a number of bytes, None where there is
    none; ``short_bytes`` by how much a decision's replay exceeds the budget, 0 if it fits."""
    result: Fitting[Found] = Fitting()
    refused, empty, budget = budget_bytes + 1, -SMALLEST_STEP_BYTES, budget_bytes
    while refused - empty > SMALLEST_STEP_BYTES:
        found = best_within(budget)
        short = 0 if found is None else short_bytes(found)
        if found is None:
            empty = budget
            if result.short_bytes is None:  # at the budget itself
                return result
        elif not short:
            result.found = _improved(found, budget, refused, best_within=best_within, short_bytes=short_bytes)
            return result
        else:
            refused = budget
            result.short_bytes = min(short, short if result.short_bytes is None else result.short_bytes)
        less = refused - short
        budget = less if short and less > empty else (refused + empty) // 2
    return result


def _improved(
    found: Found,
    fits: int,
    refused: int,
    *,
    best_within: Callable[[int], Found | None],
    short_bytes: Callable[[Found], int],
) -> Found:
    """What is preferred at the largest budget that still finds something that fits, as far as halving tells."""
    for _ in range(HALVINGS if refused - fits > SMALLEST_STEP_BYTES else 0):
        between = (fits + refused) // 2
        other = best_within(between)
        if other is None or short_bytes(other):
            refused = between
        else:
            found, fits = other, between
    return found
