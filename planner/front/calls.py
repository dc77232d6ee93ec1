"""What ``import meft`` offers of the planner: the commands' questions as calls, their answers as records.

Arguments are the commands' options with underscores. Sizes are bytes or text (``"24GB"``), names and paths text or
:class:`~pathlib.Path`. What a command refuses a call refuses in the same words, as a
:class:`~meft.planner.base.errors.UsageError`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

from meft.planner.base.errors import Infeasible, InfeasibleError
from meft.planner.base.schema import validated
from meft.planner.check.audit import DEFAULT_TOLERANCE_FRACTION, Audit
from meft.planner.front.arguments import (
    EstimateArguments,
    PlanArguments,
    as_arguments,
    call_with,
    keywords_of,
    plain,
    request_options,
)
from meft.planner.front.asked import EstimateRequest
from meft.planner.front.audit import audit_run, tolerance_of
from meft.planner.front.compare import compare_methods
from meft.planner.front.estimate import estimate_of
from meft.planner.front.options import RequestOptions
from meft.planner.front.plan import find_plan
from meft.planner.front.request import planning
from meft.planner.predict.comparison import MethodComparison
from meft.planner.predict.estimates import Estimate
from meft.planner.records.plan import Plan
from meft.planner.records.report import Report

PLAN_DEFAULTS = {name: field.default for name, field in RequestOptions.__dataclass_fields__.items()}
ESTIMATE_DEFAULTS = {name: field.default for name, field in EstimateRequest.model_fields.items()}


@keywords_of(PlanArguments, PLAN_DEFAULTS)
def plan(*, verify: bool = False, **options: Unpack[PlanArguments]) -> Plan:
    """The best plan within the budgets, as ``meft-plan`` finds it: ``meft.plan(gpu_mem="24GB")``.

    ``verify`` traces the step in the real model's code too, which needs torch. ``plan.save("plan.json")`` writes what
    ``meft-run`` takes.

    Raises:
        UsageError: an argument that is not known, or a value that cannot be used.
        InfeasibleError: nothing fits; its ``verdict`` says what binds, and its text ends in a call that works.
    """
    with as_arguments():
        found = find_plan(request_options(options), verify=verify)
    if isinstance(found, Infeasible):
        raise _infeasible(found, options)
    return found.plan


@keywords_of(EstimateArguments, ESTIMATE_DEFAULTS)
def estimate(
    method: str, *, verify: bool = False, probe: bool = False, **options: Unpack[EstimateArguments]
) -> Estimate:
    """What one configuration of a method needs, whether or not it fits: ``meft.estimate("lora", rank=16)``.

    Raises:
        UsageError: an argument that is not known or not of this method, or a value that cannot be used.
        InfeasibleError: MEFT has no such configuration.
    """
    with as_arguments():
        known = tuple(EstimateRequest.model_fields)
        asked = validated(EstimateRequest, plain({"method": method} | options, known=known), source="estimate")
        return estimate_of(asked, verify=verify, probe=probe)[0]


@keywords_of(PlanArguments, PLAN_DEFAULTS)
def compare(**options: Unpack[PlanArguments]) -> MethodComparison:
    """Every method under one budget, at its usual size and at the largest that fits: ``meft.compare(gpu_mem="24GB")``.

    Raises :class:`UsageError` for an argument that is not known, or a value that cannot be used.
    """
    with as_arguments():
        return compare_methods(planning(request_options(options)))


def audit(
    plan: Plan | str | os.PathLike[str],
    report: Report | str | os.PathLike[str],
    *,
    tolerance: float | Mapping[str, float] = DEFAULT_TOLERANCE_FRACTION,
) -> Audit:
    """Predicted against observed: a plan and the report of a run of it, or their files.

    ``tolerance`` is the accepted difference from the observed allocated peak, as a fraction; a mapping judges
    quantities by name: ``{"step_seconds": 0.25}``. The audit's ``passed`` is the verdict.

    Raises :class:`UsageError` for a file that is none of theirs, the report of another plan, and a bad tolerance.
    """
    by_name = tolerance if isinstance(tolerance, Mapping) else {}
    overall = DEFAULT_TOLERANCE_FRACTION if isinstance(tolerance, Mapping) else tolerance
    with as_arguments():
        return audit_run(
            plan if isinstance(plan, Plan) else Path(plan),
            report if isinstance(report, Report) else Path(report),
            tolerance_fraction=tolerance_of(overall, shown=str(overall)),
            tolerances={name: tolerance_of(value, shown=f"{name}={value}") for name, value in by_name.items()},
        )


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file; raises :class:`UsageError` for one that is missing, damaged, or something else."""
    return Plan.load(Path(path))


def load_report(path: str | os.PathLike[str]) -> Report:
    """Read the report of a run; raises :class:`UsageError` for one that is missing, damaged, or something else."""
    return Report.load(Path(path))


def _infeasible(verdict: Infeasible, options: PlanArguments) -> InfeasibleError:
    """The command's sentence, with a call in place of the command that fits."""
    nearest = call_with("meft.plan", dict(options), verdict.suggestion) if verdict.suggestion else None
    hint = f"; the nearest that fits: {nearest}" if nearest else "; no change nearby was found that fits"
    with as_arguments():
        raise InfeasibleError(f"no plan fits: {verdict.message.rstrip('.')}{hint}", verdict)
