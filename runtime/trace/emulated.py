"""The trace of a method other than MEFT as ``meft-run baseline`` runs it on the emulated device: the same session, the
CPU's operators, the device's own books."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.stream import Stream
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.fake.linear4bit import Linear4bit
from meft.runtime.methods.opening import ALL_LINEAR, open_method, plan_of
from meft.runtime.methods.peft_methods import trained_of
from meft.runtime.session.baselines import STATES, TRAINED, BaselineSession, open_trained
from meft.runtime.trace.loading import build_model
from meft.runtime.trace.meft import NO_LIMIT_BYTES, EmulatedBooks
from meft.runtime.trace.methods import attach_method, fake_peft
from meft.runtime.trace.scopes import Scopes
from meft.runtime.trace.stage import MICRO_BATCHES, STEPS, Stage, without_collection

_CATEGORIES = {"frozen_weights": "other_weights", TRAINED: "trainable_weights", STATES: "optimizer_moments"}
"""The runtime's names, and what the planner calls the same."""


def trace_emulated_method(setup: TrainingSetup, config: dict[str, Any]) -> Stream:
    """Load, attach and two whole steps of ``setup`` on the emulated device; ``config`` is the model's."""
    scopes = Scopes()
    with FakeTensorMode(), without_collection(), fake_peft():
        model = build_model(setup, config)
        stage = Stage(EmulatedBooks(scopes.category), scopes)
        device = EmulatedDevice(NO_LIMIT_BYTES, stage.books)
        session = _beside_nf4(setup, model, device) if setup.weights_dtype == "nf4" else None
        session = session or open_method(setup, model, device, seed=0)
        stage.log.moment("loaded")
        stage.log.moment("attached")
        return _steps(session, setup, stage)


def _beside_nf4(setup: TrainingSetup, model: nn.Module, device: EmulatedDevice) -> BaselineSession:
    """With stand-ins of bitsandbytes' layers, and of what ``peft`` puts around them."""
    _quantize(model, device, double_quant=setup.double_quant)
    names = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    if setup.target_modules == ALL_LINEAR:
        setup = setup.model_copy(update={"target_modules": tuple(sorted(names))})

    def attach(model: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
        adapted = attach_method(model, setup)
        return adapted, trained_of(adapted)

    return open_trained(attach, plan_of(setup, budget_bytes=NO_LIMIT_BYTES), model, device, seed=0)


def _quantize(model: nn.Module, device: EmulatedDevice, *, double_quant: bool) -> None:
    """Put stand-ins of bitsandbytes' layers in the linear layers' places, the head's left; they load as they are."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child is not head:
                dtype = child.weight.dtype
                made = Linear4bit(child.weight.shape, child.bias, dtype=dtype, double_quant=double_quant)
                with device.category("linear_weights"):
                    for tensor in made.quantized.tensors():
                        device.books.adopt(tensor)
                setattr(module, name, made)


def _steps(session: BaselineSession, setup: TrainingSetup, stage: Stage) -> Stream:
    shape = (setup.batch_size, setup.seq_len)

    def gradient_is_there(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        stage.books.recategorise(parameter.grad, "gradients")

    for parameter in session.trained:
        parameter.register_post_accumulate_grad_hook(gradient_is_there)
    with stage.of(session.model):
        for stage.step in range(1, STEPS + 1):
            for _ in range(min(setup.grad_accum, MICRO_BATCHES)):
                stage.begin_micro_batch()
                batch = Batch(*(torch.zeros(shape, dtype=torch.int64) for _ in range(3)))
                with session.device.scope():
                    loss = session.forward_backward(batch, loss_scale=1.0)
                    session.engine.bring_scalar(loss, category="loss")
                    del loss
            stage.moment("backward")
            stage.begin_optimizer_step()
            with session.device.scope(), torch.no_grad():
                session.engine.bring_scalar(session.squared_norm(), category="norm")
                session.update(learning_rate=1e-3, gradient_scale=1.0)
                stage.moment("updated")
                session.zero_gradients()
            stage.moment("optimizer_step")
    stream = stage.log.stream()
    events = [event._replace(category=_CATEGORIES.get(event.category, event.category)) for event in stream.events]
    return Stream(events, stream.moments)
