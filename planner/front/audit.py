"""Predicted against observed: a plan and the report of a run of it, as records or as files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from meft.planner.base.errors import UsageError
from meft.planner.check.audit import DEFAULT_TOLERANCE_FRACTION, Audit, audit
from meft.planner.records.plan import Plan
from meft.planner.records.profile_catalogue import load_gpu
from meft.planner.records.profiles import GpuProfile
from meft.planner.records.report import Report


def audit_run(
    plan: Plan | Path,
    report: Report | Path,
    *,
    tolerance_fraction: float = DEFAULT_TOLERANCE_FRACTION,
    tolerances: Mapping[str, float] | None = None,
) -> Audit:
    """Compare them, read from their files first if need be.

    See :func:`~meft.planner.check.audit.audit` for tolerances and errors.
    """
    loaded = plan if isinstance(plan, Plan) else Plan.load(plan)
    return audit(
        loaded,
        report if isinstance(report, Report) else Report.load(report),
        gpu=gpu_of(loaded),
        tolerance_fraction=tolerance_fraction,
        tolerances=tolerances,
    )


def tolerance_of(given: object, *, shown: str) -> float:
    """A tolerance as a fraction; ``shown`` is how it was given, for the :class:`UsageError` that refuses it."""
    try:
        fraction = float(str(given))
    except ValueError:
        fraction = math.nan
    if not 0 <= fraction < math.inf:
        raise UsageError(f"--tolerance {shown}: {given!r} is not a fraction of 0 or more; give such as 0.05")
    return fraction


def gpu_of(plan: Plan) -> GpuProfile | None:
    """The plan's GPU profile, if it is still there."""
    try:
        return load_gpu(plan.request.gpu)
    except UsageError:
        return None
