"""Decisions and plans with no more in them than a trace needs."""

from __future__ import annotations

from typing import Any

from meft.planner.records.plan import Decision, Plan, Prediction, Request, Sparsity


def plain_decision(*, adapter_width: int, active_rows: int, top_k: int = 1, activation_checkpointing: bool) -> Decision:
    """The decision with nothing in it that a planner would have to choose: each layer's rows are routed exactly, by its
    own input, and fetched again for backward."""
    return Decision(
        adapter_width=adapter_width,
        top_k=top_k,
        prefetch_depth=0,
        active_rows_cap=active_rows,
        num_experts=1,
        num_probes=1,
        routing="exact",
        rows_in_backward="refetched",
        activation_checkpointing=activation_checkpointing,
    )


def plan_with_rows(request: Request, decision: Decision, rows: int) -> Plan:
    """As much of a plan as a trace needs, with ``rows`` active in every layer; nothing else is predicted in it."""
    per_layer = (rows,) * request.model.num_layers
    sparsity = Sparsity(
        active_rows_per_layer=per_layer, window_active_rows_per_layer=per_layer, prefetch_recall=1.0, basis="assumed"
    )
    incomplete_plan: type[Any] = Plan
    incomplete_prediction: type[Any] = Prediction
    prediction = incomplete_prediction.model_construct(sparsity=sparsity)
    made: Plan = incomplete_plan.model_construct(request=request, decision=decision, prediction=prediction)
    return made
