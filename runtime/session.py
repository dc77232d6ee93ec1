"""One plan on one device: the model, the adapter beside it, and what they do, a step and an optimizer step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from meft.planner.plan import Decision, Plan
from meft.runtime.adapter import AttachedAdapter, attach
from meft.runtime.data import Batch
from meft.runtime.device import Device
from meft.runtime.engine import TransferEngine
from meft.runtime.exchange import RowExchange, StepCounters
from meft.runtime.host_store import HostStore
from meft.runtime.initialise import KeyInit, keys_from_ffn
from meft.runtime.optimizer import AdamWSettings, clip_scale, update_touched_rows
from meft.runtime.router import Router, TopKRouter

ADAPTER_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Session:
    """Everything that a run of a plan holds. ``router_weights`` is empty for exact routing."""

    plan: Plan
    device: Device
    engine: TransferEngine
    store: HostStore
    exchange: RowExchange
    model: nn.Module
    adapter: AttachedAdapter
    router_weights: list[nn.Parameter]
    settings: AdamWSettings
    router_optimizer: torch.optim.AdamW | None
    key_init: KeyInit = "random"

    def step(self, batch: Batch, *, loss_scale: float) -> StepResult:
        """One micro-batch forward and backward; gradients are scaled by ``loss_scale``."""
        started = time.perf_counter()
        self.exchange.expect_tokens(batch.attention_mask.flatten().bool())
        with self.device.scope():
            loss = self.forward_backward(batch, loss_scale=loss_scale)
            value = self.engine.read_scalar(loss, category="loss")
        return StepResult(value, time.perf_counter() - started, self.exchange.counters)

    def forward_backward(self, batch: Batch, *, loss_scale: float) -> torch.Tensor:
        """The step itself, inside the device's scope; returns the loss on the device."""
        loss = self.loss(batch)
        self.exchange.begin_backward()
        (loss * loss_scale).backward()
        self.exchange.finish_backward()
        return loss

    def loss(self, batch: Batch) -> torch.Tensor:
        """The model's loss on a batch, inside the device's scope.

        No attention mask travels: padding is on the right, so causal attention keeps it from every real token, and
        the labels keep it from the loss.
        """
        input_ids = self.to_device(batch.input_ids)
        labels = self.to_device(batch.labels)
        loss: torch.Tensor = self.model(input_ids=input_ids, labels=labels, use_cache=False).loss
        return loss

    def optimizer_step(self, *, learning_rate: float, max_norm: float | None) -> OptimizerResult:
        """Clip by the global norm over rows and routers, update both, and open a new window."""
        started = time.perf_counter()
        self.engine.per = "optimizer_step"
        norm, scale = clip_scale(self._squared_norm(), max_norm)
        updated = update_touched_rows(self.store, self.settings, learning_rate=learning_rate, gradient_scale=scale)
        self.store.clear_gradients()
        if self.router_optimizer is not None:
            self._update_routers(self.router_optimizer, learning_rate, scale)
        self.engine.per = "step"
        return OptimizerResult(norm, updated, time.perf_counter() - started)

    def _squared_norm(self) -> float:
        total = self.store.squared_gradient_norm()
        if self.router_weights:
            with self.device.scope(), torch.no_grad():
                total += self.engine.read_scalar(self.squared_router_norm(), category="router_norm")
        return total

    def squared_router_norm(self) -> torch.Tensor:
        """Sum of squares of the routers' gradients, on the device."""
        squares = [weight.grad.square().sum() for weight in self.router_weights if weight.grad is not None]
        return torch.stack(squares).sum()

    def _update_routers(self, optimizer: torch.optim.AdamW, learning_rate: float, scale: float) -> None:
        with self.device.scope(), self.device.category("router_states"), torch.no_grad():
            for weight in self.router_weights:
                if weight.grad is not None:
                    weight.grad.mul_(scale)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """A host tensor's copy on the device, inside the device's scope, counted as an input."""
        with self.device.host():
            source = host.pin_memory() if self.device.kind == "cuda" else host
        with self.device.category("inputs"):
            target = torch.empty(host.shape, dtype=host.dtype, device=self.device.torch_device)
        self.engine.to_device(source, target, category="inputs").wait_on_device()
        return target


@dataclass(frozen=True)
class StepResult:
    """What one micro-batch gave."""

    loss: float
    seconds: float
    counters: StepCounters


@dataclass(frozen=True)
class OptimizerResult:
    """What one optimizer step did: the global gradient norm before clipping, and how many rows it updated."""

    gradient_norm: float
    updated_rows: int
    seconds: float


def open_session(
    plan: Plan,
    model: nn.Module,
    device: Device,
    *,
    seed: int,
    settings: AdamWSettings | None = None,
    router: Router | None = None,
    key_init: KeyInit = "random",
) -> Session:
    """Put ``model`` on the device with a fresh adapter beside it, as the plan decides.

    ``router`` replaces the plan's own (a rehearsal passes one that needs no data). ``key_init`` says where keys begin:
    see :mod:`meft.runtime.initialise`.
    """
    decision, shape = plan.decision, plan.request.model
    settings = settings or AdamWSettings()
    model = device.adopt(model)
    _set_checkpointing(model, decision)
    engine = TransferEngine(device)
    store = HostStore(num_layers=shape.num_layers, adapter_width=decision.adapter_width, hidden_size=shape.hidden_size)
    store.initialise(seed=seed)
    if key_init == "ffn":
        keys_from_ffn(store, model, seed=seed)
    weights = _graph_weights(decision, shape.num_layers, shape.hidden_size, device, seed)
    routers = weights if decision.routing == "key-experts" else []
    exchange = RowExchange(
        device=device,
        engine=engine,
        store=store,
        router=router or TopKRouter(decision.top_k, decision.active_rows_cap, decision.num_experts),
        decision=decision,
        adapter_dtype=ADAPTER_DTYPES[plan.request.adapter_dtype],
        router_weights=routers,
    )
    optimizer = _router_optimizer(routers, settings, device) if routers else None
    adapter = attach(model, exchange, weights)
    return Session(plan, device, engine, store, exchange, model, adapter, routers, settings, optimizer, key_init)


def _set_checkpointing(model: nn.Module, decision: Decision) -> None:
    model.train()
    if decision.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def _graph_weights(
    decision: Decision, num_layers: int, hidden_size: int, device: Device, seed: int
) -> list[nn.Parameter]:
    """Per layer the router ``[N, D]``, uniform in +-1/sqrt(D); for exact routing a scalar that starts the graph."""
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (decision.num_experts, hidden_size) if decision.routing == "key-experts" else ()
    bound = hidden_size**-0.5
    weights = []
    for _ in range(num_layers):
        host = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        with device.scope(), device.category("router_weights"):
            weight = torch.empty(shape, device=device.torch_device)
            with device.host():
                weight.copy_(host)
        weights.append(nn.Parameter(weight))
    return weights


def _router_optimizer(weights: list[nn.Parameter], settings: AdamWSettings, device: Device) -> torch.optim.AdamW:
    """Torch's own AdamW, one parameter at a time: no foreach temporaries on the device.

    Gradients and moments are made here, so that device memory is the same in the first step as in every later one.
    """
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(
        weights, betas=betas, eps=settings.eps, weight_decay=settings.weight_decay, foreach=False
    )
    with device.scope(), device.category("router_states"):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
            moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            optimizer.state[weight] = {"step": torch.tensor(0.0), **moments}
    return optimizer
