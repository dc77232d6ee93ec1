"""Lines of a memory ledger, and the sums and peaks that follow from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meft.planner.base.quantities import Ints
from meft.planner.base.schema import Basis
from meft.planner.records.plan import Phase
from meft.planner.terms.activations import largest

STEP_PHASES: tuple[Phase, ...] = ("forward", "loss", "backward", "optimizer_step")


@dataclass(frozen=True)
class Row:
    """One line of the ledger; ``num_bytes`` is an int for one decision, an int64 array for many."""

    phase: Phase
    category: str
    num_bytes: Ints
    because: str
    basis: Basis = "counted"


def phase_bytes(ledger: Iterable[Row]) -> dict[Phase, Ints]:
    """The sum of each phase, ``resident`` apart."""
    totals: dict[Phase, Ints] = dict.fromkeys(("resident", *STEP_PHASES), 0)
    for row in ledger:
        totals[row.phase] = totals[row.phase] + row.num_bytes
    return totals


def peak_bytes(ledger: Iterable[Row]) -> Ints:
    """Peak allocated: resident and the largest phase."""
    totals = phase_bytes(ledger)
    return totals["resident"] + largest(*(totals[phase] for phase in STEP_PHASES))
