"""``--probe``: two steps on a card that is there, and the card's profile corrected by what they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from meft.planner.base.tracers import tracer
from meft.planner.base.units import format_bytes
from meft.planner.front.request import Planning
from meft.planner.predict.estimates import Estimate, ProbedPeaks
from meft.planner.records.profiles import SourcedRange
from meft.planner.records.setup import TrainingSetup


def probed(planned: Planning, setup: TrainingSetup, config: Mapping[str, Any]) -> ProbedPeaks:
    """What two steps of the setup take on this machine's card.

    Raises :class:`MachineError` without a card, :class:`UsageError` for a setup that cannot be probed.
    """
    run = tracer("probe", purpose="--probe")
    found = run(setup, dict(config), budget_bytes=planned.request.gpu_mem_bytes)
    return ProbedPeaks(
        peak_allocated_bytes=found["allocated"], peak_reserved_bytes=found["reserved"], context_bytes=found["context"]
    )


def corrected(planned: Planning, estimate: Estimate, measured: ProbedPeaks) -> Planning:
    """The card with a context that makes up for what the simulation leaves out: what the driver says, or the profile's
    where it says nothing, and what was reserved above the estimate."""
    if measured.peak_reserved_bytes is None:
        return planned
    gpu = planned.profiles.gpu
    beyond = measured.peak_reserved_bytes - estimate.peak_reserved_bytes
    low, high = gpu.context.low_bytes, gpu.context.high_bytes
    if measured.context_bytes is not None:
        low = high = measured.context_bytes
    context = SourcedRange(
        low_bytes=max(low + beyond, 0),
        high_bytes=max(high + beyond, 0),
        basis="measured",
        source=f"two steps on this card, {format_bytes(measured.peak_reserved_bytes)} reserved",
    )
    profiles = replace(planned.profiles, gpu=gpu.model_copy(update={"context": context}))
    return replace(planned, profiles=profiles)
