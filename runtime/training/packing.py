"""Packed texts in a run: whether the plan's budget has room for the mask between them, and whether it keeps them apart.

A plan made with ``--packed`` has priced the mask. Of any other plan the memory of its decision is worked out anew, with
the mask: where the budget holds it, texts are packed and the figure is said; where it does not, they are packed only if
that was asked for, and then the run is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from meft.planner.base.errors import InfeasibleError, UsageError
from meft.planner.base.units import format_bytes
from meft.planner.predict.prediction import repriced, without_workspaces
from meft.planner.records.plan import DeviceMemory, Plan
from meft.planner.records.profile_catalogue import load_gpu
from meft.runtime.data.loading import DataOptions, Dataset
from meft.runtime.session.documents import attends_across

Say = Callable[[str], None]
INSTEAD = "meft-plan --packed plans for it, --packing none does without"


def load(
    load_with: Callable[[DataOptions], Dataset], reading: DataOptions, plan: Plan, *, budget_bytes: int, say: Say
) -> Dataset:
    """The data, packed as ``reading`` says, or where it leaves that open as far as the budget goes.

    Raises :class:`InfeasibleError` where packing was asked for and does not fit.
    """
    dataset = load_with(reading)
    if plan.request.packed or not shares_sequences(dataset):
        return dataset
    priced = _with_mask(plan)
    if priced is None:
        if reading.packing is not None:
            say(f"note: texts share sequences, kept apart by a mask that this plan does not price; {INSTEAD}")
            return dataset
        say("note: each text has a sequence of its own: how much a mask between them takes is not known; " + INSTEAD)
        return load_with(replace(reading, packing="none"))
    needed, planned = _at_most(priced), _at_most(plan.prediction.device_memory)
    if needed <= budget_bytes:
        if needed > planned:
            say(
                f"note: texts share sequences, kept apart by a mask that this plan does not price: "
                f"{format_bytes(needed)} of device memory, not {format_bytes(planned)}; {INSTEAD}"
            )
        return dataset
    short = f"a mask between packed texts makes it {format_bytes(needed)} of {format_bytes(budget_bytes)}"
    if reading.packing is None:
        say(f"note: each text has a sequence of its own: {short}; meft-plan --packed plans for it")
        return load_with(replace(reading, packing="none"))
    raise InfeasibleError(f"--packing {reading.packing}: {short}; {INSTEAD}")


def documents_apart(plan: Plan, model: torch.nn.Module, dataset: Dataset, say: Say) -> bool:
    """Whether attention keeps packed documents apart; where it does not, that is said."""
    request = plan.request
    if not shares_sequences(dataset) or not attends_across(
        model, batch_size=request.batch_size, vocab_size=request.model.vocab_size
    ):
        return True
    say(
        f"note: with {request.attention} attention this model attends across the texts packed into one sequence; "
        f"--packing none gives each a sequence of its own"
    )
    return False


def shares_sequences(dataset: Dataset) -> bool:
    """Whether any sequence holds several documents."""
    return any(len(example.starts) > 1 for example in dataset.examples)


def _with_mask(plan: Plan) -> DeviceMemory | None:
    """What the decision takes with packed texts; None where no closed form says so."""
    again = as_run(plan, packed=True)
    return again.prediction.device_memory if again.request.packed else None


def as_run(plan: Plan, *, packed: bool | None, emulated: bool = False) -> Plan:
    """The plan with the memory of a run whose texts shared sequences, or did not, whatever was planned; as it is where
    that is not known. The emulated device has no cuBLAS workspaces, whichever card was planned for."""
    if packed not in (None, plan.request.packed):
        try:
            plan = repriced(plan, load_gpu(plan.request.gpu), packed=bool(packed))
        except UsageError:  # a profile's file that is no longer there
            return plan
    return without_workspaces(plan) if emulated else plan


def _at_most(memory: DeviceMemory) -> int:
    return memory.peak_reserved_bytes_at_cap or memory.peak_reserved_bytes
