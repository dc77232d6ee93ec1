"""A rehearsal: one step of a plan under fake tensors, for a model whose weights are not here.

The same session, hooks, exchange and autograd function run on the emulated device, but no number is computed and
nothing is read: what comes out are the books of allocation and transfer. Active rows are the plan's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meft.planner.records.plan import Plan, Sparsity
from meft.planner.records.report import ActiveRows, Observed, Report, Training
from meft.runtime.chunks.placement import PlannedPlacer
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.device.nvml import MemoryReading, PcieReading
from meft.runtime.exchange.row_cache import PlannedCache
from meft.runtime.fake.experts import grouped_products
from meft.runtime.host.router import PlannedRouter
from meft.runtime.session.documents import unpacked_sequences
from meft.runtime.session.model_loading import model_from_config
from meft.runtime.session.session import Session, open_session
from meft.runtime.training.reporting import active_rows, assemble, device_memory, host_memory, transfer

_NO_NVML = "a rehearsal: no GPU was used"


def rehearse(plan: Plan, config: dict[str, Any], *, budget_bytes: int, meft_version: str) -> Report:
    """Run one step and the transfers of one optimizer step under fake tensors; ``config`` is the model's."""
    with FakeTensorMode(), unpacked_sequences(plan.request.packed), grouped_products():
        session = rehearsal_session(plan, model_from_config(plan, config), EmulatedDevice(budget_bytes))
        rehearse_step(session)
        rehearse_optimizer_step(session)
        return _report(session, meft_version)


def rehearsal_session(plan: Plan, model: nn.Module, device: EmulatedDevice) -> Session:
    """A session that needs no data: its active rows, and those that stay cached, are the plan's own."""
    chunks = plan.decision.token_chunks
    router = PlannedRouter(tuple(rows // chunks for rows in plan.prediction.sparsity.active_rows_per_layer))
    session = open_session(
        plan,
        model,
        device,
        seed=0,
        around=lambda _: router,
        cache=_planned_cache(plan),
        placer=_planned_placer(plan) if chunks > 1 else None,
        compiled=False,
    )
    if session.exchange.hot is not None:
        hot_rows = torch.arange(plan.decision.hot_rows)
        session.exchange.hot.rehearse([hot_rows] * session.store.num_layers)
    return session


def _planned_cache(plan: Plan) -> PlannedCache | None:
    """The mean micro-batch of the plan's window; None where no rows are cached or hot."""
    decision, sparsity = plan.decision, plan.prediction.sparsity
    if not (decision.cached_rows or decision.hot_rows):
        return None
    active = sparsity.active_rows_per_layer
    nothing = (0,) * len(active)
    hot = sparsity.hot_rows_per_layer or nothing
    cold = tuple(rows - of_layer for rows, of_layer in zip(active, hot, strict=True))
    return PlannedCache(
        adapter_width=decision.adapter_width,
        cached_rows=decision.cached_rows,
        missing=sparsity.missing_rows_per_layer or cold,
        overflow=sparsity.overflow_rows_per_layer or cold,
        kept=sparsity.kept_rows_per_layer or nothing,
        hot=hot,
    )


def _planned_placer(plan: Plan) -> PlannedPlacer:
    """As many rows in common with a neighbour as the plan expects of a chunk; all of them where it does not say."""
    chunks, sparsity = plan.decision.token_chunks, plan.prediction.sparsity
    active = sparsity.active_rows_per_layer
    missing = sparsity.missing_rows_per_layer or tuple(rows // chunks for rows in active)
    shared = ((rows - there) // (chunks - 1) for rows, there in zip(active, missing, strict=True))
    return PlannedPlacer(shared=tuple(shared))


def rehearse_step(session: Session) -> None:
    """One micro-batch forward and backward."""
    request = session.plan.request
    shape = (request.batch_size, request.seq_len)
    starts = torch.zeros(shape, dtype=torch.bool) if request.packed else None
    ids, mask, labels = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    batch = Batch(ids, mask, labels, starts)
    session.device.reset_peaks()
    with session.device.scope():
        session.forward_backward(batch, loss_scale=1.0)


def rehearse_optimizer_step(session: Session) -> None:
    """What crosses the link, and hot rows, which the device updates; all other updates are the host's arithmetic."""
    session.engine.per = "optimizer_step"
    with session.device.scope():
        session.exchange.close_window()
    if session.router_weights:
        with session.device.scope(), torch.no_grad():
            session.engine.bring_scalar(session.squared_router_norm(), category="router_norm")
    hot = session.exchange.hot
    if hot is not None:
        with session.device.scope(), torch.no_grad():
            session.engine.bring_scalar(hot.squared_norm(), category="hot_norm")
            hot.update(session.settings, learning_rate=0.0, gradient_scale=1.0)


def _planned_rows(sparsity: Sparsity) -> tuple[ActiveRows, ...]:
    """The plan's rows, as a run of one step that met just those would report them."""
    kinds = {
        "missing_total": sparsity.missing_rows_per_layer,
        "overflow_total": sparsity.overflow_rows_per_layer,
        "kept_total": sparsity.kept_rows_per_layer,
        "hot_total": sparsity.hot_rows_per_layer,
    }
    return tuple(
        layer.model_copy(update={name: rows[layer.layer] for name, rows in kinds.items() if rows})
        for layer in active_rows([{count: 1} for count in sparsity.active_rows_per_layer])
    )


def _report(session: Session, meft_version: str) -> Report:
    request = session.plan.request
    observed = Observed(
        steps=1,
        device_memory=device_memory(session.device.peaks(), MemoryReading(None, _NO_NVML)),
        host_memory=host_memory(session),
        transfer=transfer(session, steps=1, windows=1, pcie=PcieReading(None, None, _NO_NVML)),
        active_rows=_planned_rows(session.plan.prediction.sparsity),
        packed=session.plan.request.packed,
        dropped_rows=0,
        prefetch_recall=None,
        step_seconds=None,
        busy_seconds={},
    )
    training = Training(
        steps=1,
        optimizer_steps=1,
        tokens=request.tokens_per_step,
        loss_per_step=(),
        learning_rate_per_optimizer_step=(),
        gradient_norm_per_optimizer_step=(),
        seed=0,
    )
    return assemble(session, observed, training, meft_version=meft_version, rehearsal=True)
