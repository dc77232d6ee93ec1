"""What people use instead, in the same loop and books: LoRA, a dense parallel adapter, full fine-tuning, nothing.

A :class:`BaselineSession` stands where a :class:`~meft.runtime.session.session.Session` stands: the trainer drives it,
the device's books count it, the same evaluation asks it. Its trained parameters, gradients and Adam states are all on
the device. (The dense adapter that is offloaded whole is the runtime's own with ``top_k`` at the adapter width;
:mod:`meft.runtime.session.streamed` lets the layers of LoRA travel whole.)

Letters: ``R`` adapter rows, ``D`` hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from meft.planner.base.errors import UsageError
from meft.planner.records.plan import Plan
from meft.runtime.adapter.adapter import add_to, ffn_input
from meft.runtime.adapter.blocks import ffn_modules
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import Device
from meft.runtime.device.engine import TransferEngine
from meft.runtime.device.lanes import Sequential
from meft.runtime.device.timeline import LaneClock
from meft.runtime.exchange.state import StepCounters
from meft.runtime.host.optimizer import AdamWSettings, clip_scale
from meft.runtime.session.documents import unpacked_sequences
from meft.runtime.session.rotary import settle_rotary_frequencies
from meft.runtime.session.session import OptimizerResult, StepResult, WindowEnd

Baseline = Literal["none", "lora", "parallel-adapter", "full"]
Attach = Callable[[nn.Module], tuple[nn.Module, list[nn.Parameter]]]
"""Attaches what is trained to a frozen model; returns the model to run, which may be around that one, and what of it is
trained."""
TRAINED = "trained_weights"
STATES = "trained_states"


@dataclass
class BaselineSession:
    """A model, what of it is trained, and torch's AdamW over that, on one device."""

    plan: Plan
    device: Device
    engine: TransferEngine
    model: nn.Module
    trained: list[nn.Parameter]
    settings: AdamWSettings
    optimizer: torch.optim.AdamW | None
    clock: LaneClock
    peers: ClassVar[None] = None
    """It is the only rank."""

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trained)

    def step(self, batch: Batch, *, loss_scale: float, window_end: WindowEnd | None = None) -> StepResult:
        """One micro-batch forward and backward; gradients are scaled by ``loss_scale``."""
        del window_end  # the optimizer works on the device, after backward
        started = time.perf_counter()
        with self.device.scope():
            value = self.engine.read_scalar(self.forward_backward(batch, loss_scale=loss_scale), category="loss")
        return StepResult(value, time.perf_counter() - started, StepCounters.zero(0))

    def forward_backward(self, batch: Batch, *, loss_scale: float) -> torch.Tensor:
        """The loss, with gradients of it times ``loss_scale``; inside the device's scope."""
        loss = self._loss(batch)
        (loss * loss_scale).backward()
        return loss

    def loss(self, batch: Batch) -> float:
        """The loss on a batch that is not trained on."""
        self.model.eval()
        try:
            with self.device.scope(), torch.no_grad():
                return self.engine.read_scalar(self._loss(batch), category="loss")
        finally:
            self.model.train()

    def optimizer_step(self, *, learning_rate: float, max_norm: float | None) -> OptimizerResult:
        """Clip by the global norm, update, and open a new window."""
        started = time.perf_counter()
        self.engine.per = "optimizer_step"
        with self.device.scope(), self.device.category(STATES), torch.no_grad():
            norm, scale = clip_scale(self.engine.read_scalar(self.squared_norm(), category="norm"), max_norm)
            self.update(learning_rate=learning_rate, gradient_scale=scale)
            self.zero_gradients()
        self.engine.per = "step"
        return OptimizerResult(norm, [], [], time.perf_counter() - started)

    def squared_norm(self) -> torch.Tensor:
        """Of all gradients together; inside the device's scope."""
        return torch.stack([gradient.square().sum() for gradient in self._gradients()]).sum()

    def update(self, *, learning_rate: float, gradient_scale: float) -> None:
        """AdamW with the gradients times ``gradient_scale``; inside the device's scope."""
        if self.optimizer is None:
            raise UsageError("method none trains nothing")
        for gradient in self._gradients():
            gradient.mul_(gradient_scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def zero_gradients(self) -> None:
        """Open a new window."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.trained if parameter.grad is not None]

    def drain(self) -> None:
        """Nothing is ever left to do: everything is done when it is issued."""

    def meet(self) -> None:
        """As :meth:`drain`: there is no other rank to wait for."""

    def require_replicas(self) -> None:
        """Nor another machine to be alike."""

    def close(self) -> None:
        """There are no lanes."""

    def _loss(self, batch: Batch) -> torch.Tensor:
        ids, labels = (self._to_device(part) for part in (batch.input_ids, batch.labels))
        with unpacked_sequences():
            loss: torch.Tensor = self.model(input_ids=ids, labels=labels, use_cache=False).loss
        return loss

    def _to_device(self, host: torch.Tensor) -> torch.Tensor:
        with self.device.host():
            source = host.pin_memory() if self.device.kind == "cuda" else host
        with self.device.category("inputs"):
            target = torch.empty(host.shape, dtype=host.dtype, device=self.device.torch_device)
        self.engine.to_device(source, target, category="inputs").wait_on_device()
        return target


def open_baseline(
    method: Baseline,
    plan: Plan,
    model: nn.Module,
    device: Device,
    *,
    seed: int,
    rank: int = 16,
    settings: AdamWSettings | None = None,
) -> BaselineSession:
    """Put ``model`` on the device with what ``method`` trains.

    The dense adapter has the plan's adapter width. LoRA goes on every linear layer but the head, with ``rank`` and
    alpha twice that; nothing is dropped out. ``full`` trains every parameter.
    """
    make: dict[Baseline, Attach] = {
        "none": lambda model: (model, []),
        "lora": lambda model: _with_lora(model, rank),
        "parallel-adapter": lambda model: _with_adapter(model, plan, device, seed),
        "full": lambda model: (model.requires_grad_(True), list(model.parameters())),
    }
    return open_trained(make[method], plan, model, device, seed=seed, settings=settings)


def open_trained(
    attach: Attach, plan: Plan, model: nn.Module, device: Device, *, seed: int, settings: AdamWSettings | None = None
) -> BaselineSession:
    """Put ``model`` on the device, frozen, with what ``attach`` trains."""
    settings = settings or AdamWSettings()
    settle_rotary_frequencies(model)
    model = device.adopt(model)
    model.requires_grad_(False)
    torch.manual_seed(seed)
    with device.scope(), device.category(TRAINED):
        model, trained = attach(model)
    model.train()
    if plan.decision.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    optimizer = adamw(trained, settings) if trained else None
    clock = LaneClock()
    engine = TransferEngine(device, Sequential(clock))
    return BaselineSession(plan, device, engine, model, trained, settings, optimizer, clock)


def adamw(trained: list[nn.Parameter], settings: AdamWSettings) -> torch.optim.AdamW:
    """Torch's own. One parameter at a time, as the runtime updates routers: no foreach temporaries."""
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(trained, betas=betas, eps=settings.eps, weight_decay=settings.weight_decay, foreach=False)


def _with_lora(model: nn.Module, rank: int) -> tuple[nn.Module, list[nn.Parameter]]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted, [parameter for parameter in adapted.parameters() if parameter.requires_grad]


def _with_adapter(model: nn.Module, plan: Plan, device: Device, seed: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """A dense adapter beside every FFN, initialised as the runtime initialises its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = (plan.decision.adapter_width, plan.request.model.hidden_size)
    bound = 1 / math.sqrt(shape[1])
    trained: list[nn.Parameter] = []
    for block in ffn_modules(model):
        keys, values = (torch.zeros(shape, device=device.torch_device) for _ in range(2))
        with device.host():
            host = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            keys.copy_(host)
        pair = nn.Parameter(keys), nn.Parameter(values)
        for name, parameter in zip(("adapter_keys", "adapter_values"), pair, strict=True):
            block.register_parameter(name, parameter)
        block.register_forward_hook(_beside(*pair), with_kwargs=True)
        trained += pair
    return model, trained


def _beside(keys: nn.Parameter, values: nn.Parameter) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = ffn_input(module, args, kwargs).flatten(0, -2)
        adapted = torch.relu(hidden.to(keys.dtype) @ keys.T) @ values
        return add_to(output, adapted.to(hidden.dtype))

    return hook
