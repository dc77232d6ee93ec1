"""The trace of a MEFT plan: the real session, exchange and adapter on the emulated device, whose books are the trace's.

The rows of the adapter and their optimizer live on the host and do not appear; what the device holds for them does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meft.planner.base.errors import UsageError
from meft.planner.records.plan import Plan
from meft.planner.records.setup import TrainingSetup, plan_of_setup
from meft.planner.simulation.stream import Stream
from meft.runtime.device.books import DeviceBooks
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.device.event_log import EventLog
from meft.runtime.fake.books import CudaBooks
from meft.runtime.session.model_loading import model_from_config
from meft.runtime.session.session import Session
from meft.runtime.trace.loading import build_model, load
from meft.runtime.trace.scopes import Scopes
from meft.runtime.trace.stage import MICRO_BATCHES, STEPS, Stage, without_collection
from meft.runtime.training.rehearse import rehearsal_session, rehearse_optimizer_step, rehearse_step

NO_LIMIT_BYTES = 1 << 60
"""The trace says what is needed; whether it fits is for the allocator to say afterwards."""


def trace_meft(plan: Plan, config: dict[str, Any], *, workspace_bytes: int) -> Stream:
    """Load, attach and two whole steps of ``plan`` on CUDA; ``config`` is the model's Hugging Face config."""
    setup, scopes = _setup_of(plan), Scopes()
    books = CudaBooks(workspace_bytes=workspace_bytes, categorise=scopes.category)
    with FakeTensorMode(), without_collection():
        model = build_model(setup, config)
        load(books, model, setup)
        return _steps(plan, model, Stage(books, scopes, packed=plan.request.packed))


def trace_emulated(plan: Plan, config: dict[str, Any]) -> Stream:
    """The same on the emulated device, with the CPU's operators: what a run there takes."""
    scopes = Scopes()
    with FakeTensorMode(), without_collection():
        model = model_from_config(plan, config)
        return _steps(plan, model, Stage(EmulatedBooks(scopes.category), scopes, packed=plan.request.packed))


class EmulatedBooks(DeviceBooks):
    """The emulated device's, with a log; ``categorise`` names what an operator allocates now."""

    def __init__(self, categorise: Callable[[], str]) -> None:
        super().__init__(None, EventLog())
        self._categorise = categorise

    def category_of(self, tensor: torch.Tensor, func: Any) -> str:
        """The category set by :meth:`category`, or what the trace says."""
        return super().category_of(tensor, func) if self._category is not None else self._categorise()


def _steps(plan: Plan, model: nn.Module, stage: Stage) -> Stream:
    """A session around a model in the books, and two steps of it."""
    stage.log.moment("loaded")
    session = rehearsal_session(plan, model, EmulatedDevice(NO_LIMIT_BYTES, stage.books))
    stage.log.moment("attached")
    _name_adapter(session, stage)
    with stage.of(model):
        for stage.step in range(1, STEPS + 1):
            for _ in range(min(plan.request.grad_accum, MICRO_BATCHES)):
                stage.begin_micro_batch()
                rehearse_step(session)
            stage.moment("backward")
            stage.begin_optimizer_step()
            rehearse_optimizer_step(session)
            stage.moment("updated")
            stage.moment("optimizer_step")
    return stage.log.stream()


def plan_of_traced(setup: TrainingSetup) -> Plan:
    """As much of a plan as a session needs, for a setup of MEFT."""
    if setup.adapter_width is None or setup.active_rows is None:
        raise UsageError("adapter_width and active_rows: the trace of meft needs both")
    return plan_of_setup(
        setup,
        adapter_width=setup.adapter_width,
        active_rows=setup.active_rows,
        top_k=setup.top_k or min(64, setup.active_rows),
        budget_bytes=NO_LIMIT_BYTES,
    )


def _setup_of(plan: Plan) -> TrainingSetup:
    """What of a plan decides how its model is loaded."""
    request = plan.request
    return TrainingSetup(
        model=request.model,
        method="meft",
        weights_dtype=request.weights_dtype,
        double_quant=request.double_quant,
        attention=request.attention,
        packed=request.packed,
        batch_size=request.batch_size,
        seq_len=request.seq_len,
        grad_accum=request.grad_accum,
    )


def _name_adapter(session: Session, stage: Stage) -> None:
    """What is allocated from the exchange's ``before_adapter`` to its ``after_adapter`` belongs to the adapter."""
    before, after = session.exchange.before_adapter, session.exchange.after_adapter

    def named(layer: int) -> None:
        before(layer)
        stage.scopes.push("adapter")

    def unnamed(layer: int) -> None:
        stage.scopes.pop()
        after(layer)

    exchange: Any = session.exchange
    exchange.before_adapter, exchange.after_adapter = named, unnamed
