"""Predicted against observed, from the files of a plan and of a run of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from meft.planner.base.errors import UsageError
from meft.planner.check.audit import DEFAULT_TOLERANCE_FRACTION, Audit, audit
from meft.planner.records.plan import Plan
from meft.planner.records.profile_catalogue import load_gpu
from meft.planner.records.profiles import GpuProfile
from meft.planner.records.report import Report


def audit_files(
    plan: Path,
    report: Path,
    *,
    tolerance_fraction: float = DEFAULT_TOLERANCE_FRACTION,
    tolerances: Mapping[str, float] | None = None,
) -> Audit:
    """Read both and compare them; see :func:`~meft.planner.check.audit.audit` for tolerances and errors."""
    loaded = Plan.load(plan)
    return audit(
        loaded,
        Report.load(report),
        gpu=gpu_of(loaded),
        tolerance_fraction=tolerance_fraction,
        tolerances=tolerances,
    )


def gpu_of(plan: Plan) -> GpuProfile | None:
    """The plan's GPU profile, if it is still there."""
    try:
        return load_gpu(plan.request.gpu)
    except UsageError:
        return None
