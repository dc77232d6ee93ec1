"""Device memory of a model that no closed form describes: the frozen model as traces of its code found it, and the
adapter's own terms on top.

The frozen model's bytes of each phase are fitted from two traces with a small adapter, whose terms are taken off
(:func:`fitted_phases`); a decision's are put on (:func:`traced_ledger`). Both are the same upper bound, which adds what
one layer's adapter needs for a while to the frozen model's worst moment, so a fit from a trace of the decision itself
gives that trace again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np

from meft.planner.base.quantities import ADAPTER_DTYPE_BYTES, Ints
from meft.planner.models.architecture import ModelShape
from meft.planner.models.measured import TracedPhases, TracedTerms
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Decision, Phase, Request
from meft.planner.terms.activations import choose, largest
from meft.planner.terms.ledger import STEP_PHASES, Row
from meft.planner.terms.methods import SparseAdapter, Trained, Workload, trained_by

_BECAUSE = "the frozen model's own code, traced, less the adapter's terms"


def ledger_of_decision(request: Request, decision: Decision) -> tuple[Row, ...]:
    """A decision's lines, with every layer's rows at the cap."""
    return traced_ledger(request.model, *workload_and_method(request, decision))


def workload_and_method(request: Request, decision: Decision) -> tuple[Workload, SparseAdapter]:
    """What a decision's step is, for the terms."""
    workload = Workload(
        batch_size=request.batch_size,
        seq_len=request.seq_len,
        weights_dtype=request.weights_dtype,
        double_quant=request.double_quant,
        attention=request.attention,
        packed=request.packed,
        activation_checkpointing=decision.activation_checkpointing,
    )
    at_cap = np.full(request.model.num_layers, decision.active_rows_cap, dtype=np.int64)
    return workload, SparseAdapter(at_cap, Candidates.of(decision), ADAPTER_DTYPE_BYTES[request.adapter_dtype])


def traced_ledger(shape: ModelShape, workload: Workload, method: SparseAdapter) -> tuple[Row, ...]:
    """Every line of a step's device memory, for a shape with traced terms."""
    terms = shape.traced
    if terms is None:
        raise ValueError(f"{shape.name} has no closed form, and no traced terms")
    trained = trained_by(shape, workload, method)
    rows: list[Row] = [_frozen("resident", terms, workload), *trained.resident]
    for phase in STEP_PHASES:
        rows.append(_frozen(phase, terms, workload))
        rows += [Row(phase, "adapter", _adapter_bytes(trained, phase, workload), "what the adapter keeps and makes")]
    return tuple(rows)


def fitted_phases(
    request: Request,
    decision: Decision,
    traced: tuple[Mapping[str, int], Mapping[str, int]],
    *,
    beyond_allocated: int,
) -> TracedPhases:
    """The frozen model's bytes by phase from the largest of each phase in two traces of ``method``: of the workload,
    and of one sequence more."""
    workload, method = workload_and_method(request, decision)
    longer = replace(workload, batch_size=workload.batch_size + 1)
    at = _less_adapter(request.model, workload, method, traced[0])
    more = _less_adapter(request.model, longer, method, traced[1])
    fields = {phase: (at[phase], more[phase] - at[phase]) for phase in at}
    return TracedPhases.model_validate(fields | {"beyond_allocated": max(beyond_allocated, 0)})


def _less_adapter(
    shape: ModelShape, workload: Workload, method: SparseAdapter, found: Mapping[str, int]
) -> dict[Phase, int]:
    """``found`` has what is resident, and what each phase has at most, resident included."""
    trained = trained_by(shape, workload, method)
    kept = sum(int(row.num_bytes) for row in trained.resident)
    left: dict[Phase, int] = {"resident": found["resident"] - kept}
    for phase in STEP_PHASES:
        left[phase] = found[phase] - found["resident"] - int(_adapter_bytes(trained, phase, workload))
    return left


def _adapter_bytes(trained: Trained, phase: Phase, workload: Workload) -> Ints:
    """What the adapter has in a phase, beside what is resident."""
    checkpointing = workload.activation_checkpointing
    kept = choose(checkpointing, 0, trained.kept_all) + trained.held
    if phase == "forward":
        return kept + trained.forward + choose(checkpointing, trained.kept_most, 0)
    if phase == "backward":
        return kept + trained.backward + choose(checkpointing, trained.kept_most, 0)
    return kept if phase == "loss" else trained.optimizer_temporary


def _frozen(phase: Phase, terms: TracedTerms, workload: Workload) -> Row:
    further = workload.batch_size * workload.seq_len - terms.batch_size * terms.seq_len

    def of(phases: TracedPhases | None) -> Ints:
        if phases is None:
            return cast(Ints, _NEVER if phase == "resident" else 0)
        at, more = getattr(phases, phase)
        return largest(0, at + more * further // terms.seq_len)

    plain, checkpointed = of(terms.plain), of(terms.checkpointed)
    category = "frozen_model" if phase == "resident" else "model_activations"
    return Row(phase, category, choose(workload.activation_checkpointing, checkpointed, plain), _BECAUSE)


_NEVER = 1 << 58
"""Bytes of what was not traced because it was not asked for, or cannot be: no budget holds it."""
