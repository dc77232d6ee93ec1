"""A small sparse adapter on the emulated device, or on CUDA, for tests that compare it with the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from meft.planner.records.plan import Decision
from meft.runtime.adapter.adapter import AttachedAdapter, attach
from meft.runtime.chunks.exchange import exchange_of
from meft.runtime.device.device import CudaDevice, EmulatedDevice
from meft.runtime.device.engine import TransferEngine
from meft.runtime.exchange.exchange import RowExchange
from meft.runtime.host.routers import router_of
from meft.runtime.host.store import HostStore

AMPLE_BYTES = 1 << 32


def decision(**changes: object) -> Decision:
    """A decision for width 12, changed by keyword."""
    base: dict[str, object] = {
        "adapter_width": 12,
        "top_k": 12,
        "prefetch_depth": 0,
        "active_rows_cap": 12,
        "num_experts": 1,
        "num_probes": 1,
        "routing": "exact",
        "rows_in_backward": "retained",
        "activation_checkpointing": False,
    }
    return Decision.model_validate(base | changes)


class Block(nn.Module):
    """A residual block whose only learning is its adapter: enough to carry a gradient through every layer."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mix = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Tanh())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + torch.tanh(self.mix(hidden))
        return hidden + self.mlp(hidden)


class Tower(nn.Module):
    """Blocks in a list named like a transformer's."""

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(hidden_size) for _ in range(num_layers))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            hidden = block(hidden)
        return hidden


@dataclass
class Setup:
    device: EmulatedDevice | CudaDevice
    engine: TransferEngine
    store: HostStore
    exchange: RowExchange
    model: nn.Module
    adapter: AttachedAdapter
    weights: list[nn.Parameter]

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device: itself, entered in the emulated device's books, or its copy on CUDA."""
        if isinstance(self.device, EmulatedDevice):
            self.device.books.adopt(tensor)
        return tensor.to(self.device.torch_device)


def sparse_setup(
    chosen: Decision,
    *,
    num_layers: int = 3,
    hidden_size: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    device: EmulatedDevice | CudaDevice | None = None,
) -> Setup:
    """A tower with a sparse adapter of random rows attached; everything in ``dtype``."""
    torch.manual_seed(seed)
    device = device or EmulatedDevice(AMPLE_BYTES)
    engine = TransferEngine(device)
    store = HostStore(
        num_layers=num_layers,
        adapter_width=chosen.adapter_width,
        hidden_size=hidden_size,
        dtype=dtype,
        has_hot_rows=chosen.hot_rows > 0,
        means_of_experts=chosen.num_experts if chosen.needs.means else None,
    )
    for tables in store.layers:
        tables.weights.normal_(std=0.3)  # keeps the tower's outputs near 1, so that 1e-10 means something
    model = Tower(num_layers, hidden_size).to(dtype)
    device.adopt(model)
    gated = chosen.needs.gated
    shape = (chosen.needs.router_rows(chosen.num_experts), hidden_size) if gated else ()
    with device.scope():
        random = [0.3 * torch.randn(shape, dtype=dtype) for _ in range(num_layers)]
        weights = [nn.Parameter(weight.to(device.torch_device)) for weight in random]
    router = router_of(chosen, store)
    exchange = exchange_of(
        chosen,
        device=device,
        engine=engine,
        store=store,
        router=router,
        adapter_dtype=dtype,
        router_weights=weights if gated else [],
    )
    return Setup(device, engine, store, exchange, model, attach(model, exchange, weights), weights)


def run_step(setup: Setup, hidden: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One forward and backward of ``hidden [T, D]``; returns the output and the input's gradient, on the host."""
    device_hidden = setup.put(hidden.detach().clone()).requires_grad_(hidden.requires_grad)
    device_grad = setup.put(grad)
    with setup.device.scope():
        output = setup.model(device_hidden)
        balance = setup.exchange.take_balance()
        setup.exchange.begin_backward()
        if balance is None:
            output.backward(device_grad)
        else:
            torch.autograd.backward([output, balance], [device_grad, torch.ones_like(balance)])
        setup.exchange.finish_backward()
    input_grad = device_hidden.grad
    return output.detach().cpu(), None if input_grad is None else input_grad.cpu()
