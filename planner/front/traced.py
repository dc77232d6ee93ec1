"""Plans and estimates for models that no closed form describes, from traces of their own code.

The search needs terms: they are fitted from traces at two batch sizes and kept in the cache by the config's digest and
the workload, so that the same question needs no torch again. The decision that the search prefers is traced as it is,
where torch is there, and what was found corrects the terms until the decision fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from meft.planner.base.errors import Infeasible, MachineError, UsageError
from meft.planner.base.schema import read_text
from meft.planner.base.version import VERSION
from meft.planner.front.request import Planning
from meft.planner.memory.traced import fitted_phases
from meft.planner.models.measured import TracedPhases, TracedTerms
from meft.planner.models.shapes import cache_file, config_digest, keep
from meft.planner.predict.comparison import checkpointing_choices
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.predict.verification import traced_emulated, traced_plan
from meft.planner.records.plain import plain_decision, plan_with_rows
from meft.planner.records.plan import Decision, Plan, Request
from meft.planner.records.profiles import GpuProfile
from meft.planner.search.search import check_request, make_plan
from meft.planner.simulation.stream import Stream, StreamPeaks, stream_peaks
from meft.planner.terms.ledger import STEP_PHASES

ROUNDS = 5
"""At most so many decisions are traced before the search gives up."""
SMALL_ROWS = 64
"""Rows of the adapter that terms are fitted with: little beside any model."""
TRACED = "trace of the real code"
CLOSED = "closed form"


@dataclass(frozen=True)
class _Traced:
    """A decision's trace, and the largest of each phase with what is resident."""

    peaks: StreamPeaks
    largest: Mapping[str, int]


def answered_by(request: Request) -> str:
    """Which of the two says what a plan needs."""
    return CLOSED if request.model.measured is None else TRACED


def with_terms(planned: Planning, config: Mapping[str, Any]) -> Planning:
    """The planning with the model's traced terms for this workload, from the cache or from traces made now.

    Raises:
        UsageError: the model cannot be trained like that; the line says why.
        MachineError: the terms are not in the cache, and torch is not there to trace.
    """
    request = planned.request
    assert request.model.measured is not None
    if not request.model.measured.checkpointing:
        if request.activation_checkpointing:
            raise UsageError(
                f"--activation-checkpointing: {request.model.measured.class_name} does not recompute its blocks; "
                f"give --no-activation-checkpointing"
            )
        request = request.model_copy(update={"activation_checkpointing": False})
    check_request(request)
    kept = cache_file(f"{config_digest(config)}-{_workload_digest(request, planned.profiles.gpu)}")
    terms = _read(kept)
    note = "terms from traces that are kept in the cache"
    if terms is None:
        try:
            terms = _fitted(replace(planned, request=request), config)
        except MachineError as error:
            why = f"model {request.model.name}: no closed form knows model_type {request.model.model_type}, so its code"
            raise MachineError(f"{why} is traced once for each workload; {str(error).partition(': ')[2]}") from error
        keep(kept, json.dumps(terms.model_dump(mode="json")))
        note = "terms fitted from traces made now, and kept in the cache"
    request = _with(request, terms)
    return replace(planned, request=request, notes=(f"memory: {TRACED}, {note}", *planned.notes))


def settled_plan(planned: Planning, config: Mapping[str, Any]) -> Plan | Infeasible:
    """The best plan whose own trace fits; without torch, the best by the terms.

    ``planned`` has terms (:func:`with_terms`).
    """
    request, profiles = planned.request, planned.profiles
    found: Plan | Infeasible = make_plan(request, profiles, meft_version=VERSION)
    needed = 0
    for _ in range(ROUNDS):
        if isinstance(found, Infeasible):
            return found
        try:
            request = _as_its_trace(request, found.decision, config, profiles.gpu)
        except MachineError:
            return found
        prediction = predict(request, found.decision, profiles)
        memory = prediction.device_memory
        if memory.peak_reserved_bytes <= memory.allocator_budget_bytes:
            return found.model_copy(update={"request": request, "prediction": prediction})
        needed = memory.peak_reserved_bytes
        found = make_plan(request, profiles, meft_version=VERSION)
    limit = request.gpu_mem_bytes - profiles.gpu.context.high_bytes
    message = f"{ROUNDS} decisions were traced, and none kept within the device budget; give more --gpu-mem"
    return Infeasible("device memory", needed=needed, limit=limit, message=message)


def as_its_trace(request: Request, decision: Decision, config: Mapping[str, Any], gpu: GpuProfile) -> Request:
    """The request with terms that give ``decision`` its own trace; as it is where torch is not there."""
    try:
        return _as_its_trace(request, decision, config, gpu)
    except MachineError:
        return request


# --- traces -----------------------------------------------------------------------------------------------------------


def _trace(request: Request, decision: Decision, config: Mapping[str, Any], gpu: GpuProfile) -> _Traced:
    """Two steps of a decision with every layer's rows at the cap."""
    plan = plan_with_rows(request, decision, decision.active_rows_cap)
    stream = _stream(plan, config, gpu)
    peaks = stream_peaks(stream)
    resident = peaks.at_moment["attached"][0]
    found = {phase: ledger.allocated_bytes for phase, ledger in peaks.ledger.items()}
    largest: dict[str, int] = {phase: max(found.get(phase, 0), resident) for phase in STEP_PHASES}
    return _Traced(peaks, {"resident": resident, **largest})


def _stream(plan: Plan, config: Mapping[str, Any], gpu: GpuProfile) -> Stream:
    if gpu.shares_host_cores:
        return traced_emulated(plan, config)
    return traced_plan(plan, config, workspace_bytes=int(gpu.workspace_bytes.value))


def _fitted(planned: Planning, config: Mapping[str, Any]) -> TracedTerms:
    """From traces at the request's batch size and one sequence more, with a small adapter."""
    request = planned.request
    phases = {
        flag: _fitted_phases(request, config, planned.profiles, checkpointing=flag)
        for flag in checkpointing_choices(request.activation_checkpointing)
    }
    return TracedTerms(
        batch_size=request.batch_size,
        seq_len=request.seq_len,
        plain=phases.get(False),
        checkpointed=phases.get(True),
    )


def _fitted_phases(
    request: Request, config: Mapping[str, Any], profiles: ProfileSet, *, checkpointing: bool
) -> TracedPhases:
    decision = plain_decision(adapter_width=SMALL_ROWS, active_rows=SMALL_ROWS, activation_checkpointing=checkpointing)
    request = request.model_copy(
        update={"grad_accum": 1}
    )  # half the work: the rows' gradients are there from the start
    at = _trace(request, decision, config, profiles.gpu)
    one_more = request.model_copy(update={"batch_size": request.batch_size + 1})
    more = _trace(one_more, decision, config, profiles.gpu)
    return _phases(request, decision, (at, more))


def _phases(request: Request, decision: Decision, traced: tuple[_Traced, _Traced]) -> TracedPhases:
    peaks = traced[0].peaks
    beyond = peaks.reserved_bytes - peaks.allocated_bytes
    return fitted_phases(request, decision, (traced[0].largest, traced[1].largest), beyond_allocated=beyond)


def _as_its_trace(request: Request, decision: Decision, config: Mapping[str, Any], gpu: GpuProfile) -> Request:
    """As :func:`as_its_trace`; what a further sequence adds stays as it was."""
    terms = request.model.traced
    assert terms is not None
    name = "checkpointed" if decision.activation_checkpointing else "plain"
    traced = _trace(request, decision, config, gpu)
    before, found = cast(TracedPhases, getattr(terms, name)), _phases(request, decision, (traced, traced))
    slope = request.batch_size - terms.batch_size
    update: dict[str, Any] = {"beyond_allocated": found.beyond_allocated}
    for phase in ("resident", *STEP_PHASES):
        more = getattr(before, phase)[1]
        update[phase] = (getattr(found, phase)[0] - slope * more, more)
    return _with(request, terms.model_copy(update={name: before.model_copy(update=update)}))


def _with(request: Request, terms: TracedTerms) -> Request:
    return request.model_copy(update={"model": request.model.model_copy(update={"traced": terms})})


# --- the cache --------------------------------------------------------------------------------------------------------


_WORKLOAD = ("seq_len", "weights_dtype", "double_quant", "adapter_dtype", "attention", "activation_checkpointing")
"""Beside them ``packed``, where it is so: what earlier versions kept stays found."""


def _workload_digest(request: Request, gpu: GpuProfile) -> str:
    """What the terms hold for, but for the batch size, in which they are linear."""
    fields = {name: getattr(request, name) for name in _WORKLOAD}
    if request.packed:
        fields["packed"] = True
    fields |= {"emulated": gpu.shares_host_cores, "workspace": int(gpu.workspace_bytes.value)}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> TracedTerms | None:
    """Terms that are kept; None where there are none."""
    if not path.is_file():
        return None
    try:
        return TracedTerms.model_validate_json(read_text(path, kind="traced terms"))
    except (UsageError, ValueError):
        path.unlink(missing_ok=True)  # of another release, or damaged: traced again
        return None
