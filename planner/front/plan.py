"""The best decision within the budgets, and what its step looks like."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from meft.planner.base.errors import Infeasible, UsageError
from meft.planner.base.version import VERSION
from meft.planner.front.options import AUTO, MAX_BATCH_SIZE, USUAL_BATCH_SIZE, RequestOptions
from meft.planner.front.request import Planning, planning
from meft.planner.models.catalogue import load_model
from meft.planner.predict.prediction import simulated_tasks
from meft.planner.records.plan import Plan, Request
from meft.planner.search.search import make_plan, make_plan_of_splits
from meft.planner.timing.chrome import Event

if TYPE_CHECKING:
    from meft.planner.predict.scaling import Scaling
    from meft.planner.search.levers import Lever


@dataclass(frozen=True)
class Planned:
    """A plan, and what it was made from."""

    plan: Plan
    planning: Planning


def find_plan(options: RequestOptions, *, verify: bool = False) -> Planned | Infeasible:
    """The best plan for the options, or why there is none; with ``verify`` traced in the real model's code (torch).

    Raises :class:`~meft.planner.base.errors.UsageError` for options that cannot be used, and with ``verify``
    :class:`~meft.planner.base.errors.InfeasibleError` if the trace does not fit.
    """
    if options.batch_size == AUTO:
        return _of_open_batch(options, verify=verify)
    planned = planning(options)
    if verify and planned.request.shard_base:
        raise UsageError("--verify: what is traced is one card with all of the base, not its part; leave it out")
    if planned.request.model.measured is not None:
        return _traced(planned, verify=verify)
    found = make_plan(planned.request, planned.profiles, meft_version=VERSION)
    if not isinstance(found, Plan):
        return found
    return Planned(_verified(found, planned) if verify else found, planned)


def _of_open_batch(options: RequestOptions, *, verify: bool) -> Planned | Infeasible:
    """With the sequences of an optimizer step split as the objective likes best."""
    sequences = USUAL_BATCH_SIZE * options.grad_accum
    planned = planning(replace(options, batch_size=1, grad_accum=sequences))
    if planned.request.model.measured is not None:
        raise UsageError(
            f"--batch-size auto: the memory of {planned.request.model.name} is known from traces of one batch size; "
            f"give a number"
        )
    found = make_plan_of_splits(_splits(planned.request, sequences), planned.profiles, meft_version=VERSION)
    if isinstance(found, Infeasible):
        return found
    plan, fitting = found
    request = plan.request
    sizes = ", ".join(f"{each.batch_size:,}" for each in fitting)
    note = f"batch size: {request.batch_size:,} x {request.grad_accum:,} of {sequences:,} sequences (fit: {sizes})"
    planned = replace(planned, request=request, notes=(*planned.notes, note))
    return Planned(_verified(plan, planned) if verify else plan, planned)


def _splits(request: Request, sequences: int) -> tuple[Request, ...]:
    """Every micro-batch that divides an optimizer step's sequences evenly, among all ranks, the smallest first."""
    return tuple(
        request.model_copy(update={"batch_size": size, "grad_accum": sequences // size, "batch_size_basis": "planned"})
        for size in range(1, min(sequences, MAX_BATCH_SIZE) + 1)
        if sequences % (size * request.ranks) == 0
    )


def _traced(planned: Planning, *, verify: bool) -> Planned | Infeasible:
    """For a model without a closed form: what its own code takes; with ``verify`` traced on CUDA once more."""
    from meft.planner.front.traced import settled_plan, with_terms  # few need it, and it asks the installation

    _, config, _ = load_model(planned.request.model_path or planned.request.model.name)
    planned = with_terms(planned, config)
    found = settled_plan(planned, config)
    if isinstance(found, Infeasible):
        return found
    return Planned(_verified(found, planned) if verify else found, planned)


def levers_of(found: Planned) -> tuple[Lever, ...]:
    """What one change alone would save of the plan."""
    from meft.planner.search.levers import levers  # for people's eyes: JSON needs none

    plan = found.plan
    return levers(plan.request, plan.decision, plan.prediction, found.planning.profiles)


def scaling_of(found: Planned) -> tuple[Scaling, ...]:
    """How the plan's decision scales; empty for a plan of one card."""
    from meft.planner.predict.scaling import scaling  # for people's eyes, as above

    plan = found.plan
    return scaling(plan.request, plan.decision, found.planning.profiles) if plan.request.ranks > 1 else ()


def simulated_step(found: Planned) -> list[Event]:
    """The tasks of the plan's step, as its timing was simulated."""
    plan, profiles = found.plan, found.planning.profiles
    return simulated_tasks(plan.request, plan.decision, profiles, plan.prediction.sparsity)


def _verified(plan: Plan, planned: Planning) -> Plan:
    """The plan with its verification; looks up the model's config again."""
    from meft.planner.predict.verification import verified  # it asks the installation: slow to load

    _, config, _ = load_model(plan.request.model_path or plan.request.model.name)
    return verified(plan, config, workspace_bytes=int(planned.profiles.gpu.workspace_bytes.value))
