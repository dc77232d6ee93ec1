"""A baseline with what it trains on the host: whole layers travel, as MEFT's rows do.

Weights, gradients and Adam states of what is trained lie on the host, layer by layer. A layer's weights come to the one
buffer on the device before its forward, and again before its backward unless they are still there; its gradients are
gathered in a second buffer and leave together. So the device holds two layers' worth of trained numbers: what a method
needs when it is brought layer by layer, without MEFT's sparsity.

Letters: ``L`` layers, ``n`` trained numbers of a layer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from meft.planner.base.errors import UsageError
from meft.runtime.adapter.blocks import decoder, ffn_modules
from meft.runtime.device.device import Device
from meft.runtime.device.engine import TransferEngine
from meft.runtime.host.optimizer import AdamWSettings, clip_scale
from meft.runtime.session.baselines import BaselineSession, adamw
from meft.runtime.session.session import OptimizerResult

WEIGHTS_BUFFER = "row_staging"
GRADIENTS_BUFFER = "row_gradients"
"""The buffers' categories in the books are those of MEFT's, whose place they take."""


@dataclass
class HostLayer:
    """One layer's trained numbers on the host, fp32 ``[n]``, and its parameters, which are views of the buffer."""

    master: nn.Parameter
    parameters: list[nn.Parameter]
    arrived: int = 0
    """How many of them have their gradient in the buffer, in this backward."""


@dataclass
class StreamedSession(BaselineSession):
    """A :class:`BaselineSession` whose ``trained`` parameters are views of one layer's buffer on the device."""

    layers: list[HostLayer] = field(default_factory=list)
    weights: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    gradients: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    resident: int | None = None
    """The layer whose weights are in the buffer."""

    def optimizer_step(self, *, learning_rate: float, max_norm: float | None) -> OptimizerResult:
        """Clip by the global norm, update and open a new window, all on the host."""
        assert self.optimizer is not None
        started, self.resident = time.perf_counter(), None
        with self.device.host(), torch.no_grad():
            gradients = [layer.master.grad for layer in self.layers if layer.master.grad is not None]
            squares = sum(float(gradient.double().square().sum()) for gradient in gradients)
            norm, scale = clip_scale(squares, max_norm)
            for gradient in gradients:
                gradient.mul_(scale)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return OptimizerResult(norm, [], [], time.perf_counter() - started)

    def bring(self, index: int, *, trains: bool) -> None:
        """Bring a layer's weights to the buffer, unless they are there; counted as a probe where nothing is trained."""
        if self.resident == index:
            return
        master = self.layers[index].master.detach()
        per, self.engine.per = self.engine.per, self.engine.per if trains else "probe"
        with torch.no_grad():
            target = self.weights[: master.shape[0]]
            self.engine.to_device(master, target, category="weights").wait_on_device()
        self.engine.per, self.resident = per, index

    def take_gradient(self, index: int, first: int, parameter: torch.Tensor) -> None:
        """Move a parameter's gradient to its place in the buffer; the layer's last sends them all to the host."""
        layer, gradient = self.layers[index], parameter.grad
        assert gradient is not None
        self.gradients[first : first + gradient.numel()].copy_(gradient.flatten())
        parameter.grad = None
        layer.arrived += 1
        if layer.arrived < len(layer.parameters):
            return
        layer.arrived, numel = 0, layer.master.shape[0]
        landing = self.engine.host_empty(numel, dtype=self.gradients.dtype)
        self.engine.to_host(self.gradients[:numel], landing, category="gradients").wait_on_host()
        with self.device.host():
            layer.master.grad = landing if layer.master.grad is None else layer.master.grad.add_(landing)


def streamed(session: BaselineSession) -> StreamedSession:
    """The same baseline, not yet trained, with what it trains on the host.

    Raises:
        UsageError: it trains something outside the model's layers, or nothing.
    """
    of_layer = _by_layer(session.model, session.trained)
    device, engine = session.device, session.engine
    layers = [HostLayer(_to_host(device, engine, parameters), parameters) for parameters in of_layer]
    most = max(layer.master.shape[0] for layer in layers)
    made = StreamedSession(
        session.plan,
        device,
        engine,
        session.model,
        session.trained,
        session.settings,
        _optimizer(device, layers, session.settings),
        session.clock,
        layers=layers,
        weights=_buffer(device, most, WEIGHTS_BUFFER),
        gradients=_buffer(device, most, GRADIENTS_BUFFER),
    )
    for index, (block, layer) in enumerate(zip(decoder_blocks(session.model), layers, strict=True)):
        _attach(made, index, block, layer)
    return made


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's layers: the modules that hold the FFNs."""
    ffns = ffn_modules(model)
    return [next(child for child in decoder(model).modules() if ffn in child.children()) for ffn in ffns]


def _by_layer(model: nn.Module, trained: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    wanted = {id(parameter) for parameter in trained}
    of_layer = [[each for each in block.parameters() if id(each) in wanted] for block in decoder_blocks(model)]
    found = sum(map(len, of_layer))
    if found != len(trained) or not all(of_layer):
        raise UsageError(
            f"{len(trained) - found} of {len(trained)} trained tensors are in no layer of the model: only layers are "
            f"brought one by one; stream LoRA or a parallel adapter"
        )
    return of_layer


def _to_host(device: Device, engine: TransferEngine, parameters: list[nn.Parameter]) -> nn.Parameter:
    """A copy on the host of what a layer trains."""
    master = engine.host_empty(sum(each.numel() for each in parameters), dtype=torch.float32)
    first = 0
    for parameter in parameters:
        target = master[first : first + parameter.numel()].view(parameter.shape)
        with device.host():
            target.copy_(parameter.detach())
        first += parameter.numel()
    return nn.Parameter(master)


def _optimizer(device: Device, layers: list[HostLayer], settings: AdamWSettings) -> torch.optim.AdamW:
    with device.host():
        return adamw([layer.master for layer in layers], settings)


def _buffer(device: Device, numel: int, category: str) -> torch.Tensor:
    with device.scope(), device.category(category):
        return torch.empty(numel, dtype=torch.float32, device=device.torch_device)


def _attach(session: StreamedSession, index: int, block: nn.Module, layer: HostLayer) -> None:
    """Let the layer's parameters be views of the buffer, which its weights come to when it is their turn."""
    first = 0
    for parameter in layer.parameters:
        with session.device.scope():
            parameter.data = session.weights[first : first + parameter.numel()].view(parameter.shape)

        def arrived(tensor: torch.Tensor, first: int = first) -> None:
            session.take_gradient(index, first, tensor)

        parameter.register_post_accumulate_grad_hook(arrived)
        first += parameter.numel()

    def bring(*_: Any) -> None:
        session.bring(index, trains=torch.is_grad_enabled())

    def bring_again(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del module, args
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: session.bring(index, trains=True))

    block.register_forward_pre_hook(bring)
    block.register_forward_hook(bring_again)
