"""One step of the sparse adapter and of the dense oracle beside it, and the choices under which they are compared."""

from __future__ import annotations

import pytest
import torch
from sparse_setup import Tower, run_step
from torch import nn

from meft.runtime.adapter.oracle import DenseAdapter, DenseStable, DenseSwitch
from meft.runtime.exchange.gating import SwitchGating, capacity

EXACT = {"rtol": 0.0, "atol": 1e-10}
TOKENS = 5
SWITCH = {"routing": "switch", "num_experts": 4, "switch": {"capacity_factor": 0.8, "jitter": 0.1, "balance_loss": 0.5}}
"""An expert takes one of five tokens."""
STABLE = {"routing": "stable", "num_experts": 4, "stable": {"first_stage": 0.5, "balance_loss": 0.5}}
CHOICES = [
    pytest.param({"prefetch_depth": depth, "rows_in_backward": rows, **routing}, id=f"p{depth}-{rows}-{name}")
    for depth in (0, 1, 2)
    for rows in ("retained", "refetched")
    for name, routing in {
        "exact": {},
        "experts": {"routing": "key-experts", "num_experts": 4, "num_probes": 4},
        "centroid": {"routing": "centroid", "num_experts": 4, "num_probes": 4},
    }.items()
]


class DenseTower(nn.Module):
    """The tower with the oracle beside every FFN."""

    def __init__(self, tower: Tower, adapters: list[DenseAdapter]) -> None:
        super().__init__()
        self.tower, self.adapters = tower, nn.ModuleList(adapters)
        self.top_k: int | None = None
        self.rows: list[torch.Tensor | list[torch.Tensor] | None] = [None] * len(adapters)
        """By layer; where tokens come in chunks, by chunk too."""
        self.probes: list[torch.Tensor | None] = [None] * len(adapters)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block, adapter, rows, probes in zip(self.tower.layers, self.adapters, self.rows, self.probes, strict=True):
            hidden = hidden + torch.tanh(block.mix(hidden))
            adapted = adapter.by_chunks if isinstance(rows, list) else adapter
            hidden = hidden + block.mlp(hidden) + adapted(hidden, rows, probes, self.top_k)
        return hidden


def dense_twin(setup) -> DenseTower:
    gated = bool(setup.exchange.router_weights)
    adapters = [
        _dense(setup.exchange.decision, tables.keys, tables.values, weight.detach().cpu() if gated else None)
        for tables, weight in zip(setup.store.layers, setup.weights, strict=True)
    ]
    tower = Tower(setup.store.num_layers, setup.store.hidden_size).double()
    tower.load_state_dict(setup.model.state_dict())
    dense = DenseTower(tower.requires_grad_(False), adapters)
    if setup.exchange.decision.tokens_see == "own":
        dense.top_k = setup.exchange.decision.top_k
    return dense


def _dense(decision, keys: torch.Tensor, values: torch.Tensor, router: torch.Tensor | None) -> DenseAdapter:
    if decision.stable is not None and router is not None:
        return DenseStable(keys, values, router, balance_weight=decision.stable.balance_loss)
    if decision.switch is None or router is None:
        return DenseAdapter(keys, values, router)
    full = capacity(decision.switch, TOKENS, decision.num_experts)
    return DenseSwitch(keys, values, router, capacity=full, balance_weight=decision.switch.balance_loss)


def dense_step(dense: DenseTower, hidden: torch.Tensor, grad: torch.Tensor):
    hidden = hidden.detach().clone().requires_grad_(hidden.requires_grad)
    output = dense(hidden)
    balances = [adapter.balance for adapter in dense.adapters if hasattr(adapter, "balance")]
    torch.autograd.backward([output, *balances], [grad, *(torch.ones_like(balance) for balance in balances)])
    return output.detach(), hidden.grad


def give_noise(setup, dense: DenseTower) -> None:
    """What a switch router's reading was multiplied by in the micro-batch that was."""
    gating = setup.exchange.gating
    if isinstance(gating, SwitchGating):
        like = torch.empty(TOKENS, 8, dtype=torch.float64, device=setup.device.torch_device)
        for layer, adapter in enumerate(dense.adapters):
            noise = gating._noise(layer, like, torch.float64)
            adapter.noise = None if noise is None else noise.cpu()


def assert_same_gradients(setup, dense: DenseTower) -> None:
    for tables, weight, adapter in zip(setup.store.layers, setup.weights, dense.adapters, strict=True):
        expected = torch.cat([adapter.keys.grad, adapter.values.grad], dim=1)
        torch.testing.assert_close(tables.gradients, expected, **EXACT)
        if adapter.router is not None:
            torch.testing.assert_close(weight.grad.cpu(), adapter.router.grad, **EXACT)


def rows_chosen(setup) -> list[torch.Tensor | list[torch.Tensor] | None]:
    """Each layer's active rows in the last micro-batch, or of each of its chunks."""
    chunks = setup.exchange.decision.token_chunks
    if chunks == 1:
        return [state.selection.rows for state in setup.exchange.layers]
    placed = setup.exchange.unit_rows()
    return [placed[first : first + chunks] for first in range(0, len(placed), chunks)]


def assert_step_equals_the_oracle(setup, *, num_tokens: int = 5) -> None:
    """One step of the adapter and of the oracle, which is told the rows and probes that the adapter chose."""
    dense = dense_twin(setup)
    hidden = torch.randn(num_tokens, 8, dtype=torch.float64).requires_grad_()
    grad = torch.randn(num_tokens, 8, dtype=torch.float64)
    noted_probes: dict[int, torch.Tensor] = {}
    original = setup.exchange.after_backward

    def note_probes(layer: int) -> None:  # the exchange forgets a layer's probes when its backward is done
        noted_probes[layer] = setup.exchange.layers[layer].probes
        original(layer)

    setup.exchange.after_backward = note_probes
    output, input_grad = run_step(setup, hidden, grad)
    for adapter in dense.adapters:
        if isinstance(adapter, DenseStable):
            adapter.frozen = setup.exchange.gating.frozen
    dense.rows = rows_chosen(setup)
    if setup.exchange.router_weights:
        dense.probes = [noted_probes[layer].cpu().long() for layer in range(setup.store.num_layers)]
    give_noise(setup, dense)
    expected, expected_grad = dense_step(dense, hidden, grad)
    torch.testing.assert_close(output, expected, **EXACT)
    torch.testing.assert_close(input_grad, expected_grad, **EXACT)
    assert_same_gradients(setup, dense)
