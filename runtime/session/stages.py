"""The two stages of stable routing (:class:`~meft.runtime.exchange.gating.StableGating`) in a session.

In the second the light router is frozen: AdamW has the gate alone, and the light router's moments are gone from the
device. Its weights stay where they were, in the lower half of each layer's router ``[2N, D]``, and so do gradients,
zeros there: what is saved, and what ranks add up, keeps its shape, and a plan's memory and traffic hold in both.

Letters: ``N`` experts, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from meft.planner.base.errors import UsageError
from meft.runtime.exchange.gating import StableGating
from meft.runtime.session.session import Session

ROUTING_STAGE = "routing_stage"
"""In an adapter's file, where its routing has stages: an int64 of one number, 1 or 2."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


def stage_of(session: Session) -> int | None:
    """1 or 2; None for a routing without stages."""
    gating = session.exchange.gating
    return (2 if gating.frozen else 1) if isinstance(gating, StableGating) else None


def begin_second_stage_if_due(session: object, share_done: float) -> bool:
    """Between windows: begin the second stage if so much of a run's steps is its first; whether that was now. Never in
    a session of another method."""
    if not isinstance(session, Session):
        return False
    gating = session.exchange.gating
    if not isinstance(gating, StableGating) or gating.frozen or share_done < gating.options.first_stage:
        return False
    set_stage(session, 2)
    return True


def set_stage(session: Session, stage: int) -> None:
    """Be in a stage, between windows or before the first. Back in the first, the light router's moments are zeros.

    Raises:
        UsageError: the plan's routing has no stages, or not this one.
    """
    gating = session.exchange.gating
    if not isinstance(gating, StableGating):
        raise UsageError(f"routing {session.plan.decision.routing} has no stages: plan with --routing stable")
    if stage not in (1, 2):
        raise UsageError(f"{ROUTING_STAGE} {stage}: routing stable has stages 1 and 2")
    if gating.frozen == (stage == 2):
        return
    gating.frozen = stage == 2
    with session.device.scope(), session.device.category("router_states"), torch.no_grad():
        _train_alone(session, gating.num_experts) if gating.frozen else _train_again(session, gating.num_experts)


def _train_alone(session: Session, num_experts: int) -> None:
    """AdamW goes on with the first ``N`` rows of each router, which are the same memory."""

    def part(weight: nn.Parameter) -> nn.Parameter:
        gate = nn.Parameter(weight.detach()[:num_experts])
        assert weight.grad is not None
        weight.grad[num_experts:].zero_()
        gate.grad = weight.grad[:num_experts]
        return gate

    _replace(session, [part(weight) for weight in session.router_weights], lambda moment: moment[:num_experts].clone())


def _train_again(session: Session, num_experts: int) -> None:
    def with_zeros(moment: torch.Tensor) -> torch.Tensor:
        return torch.cat([moment, moment.new_zeros(num_experts, moment.shape[1])])

    _replace(session, session.router_weights, with_zeros)


def _replace(session: Session, weights: list[nn.Parameter], moment_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Give the routers' AdamW other parameters in the place of its own, with what their moments become."""
    optimizer = session.router_optimizer
    assert optimizer is not None
    group = optimizer.param_groups[0]
    for before, after in zip(group["params"], weights, strict=True):
        state = optimizer.state.pop(before)
        optimizer.state[after] = state | {name: moment_of(state[name]) for name in _MOMENTS}
    group["params"] = list(weights)
