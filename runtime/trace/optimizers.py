"""Optimizers of a traced run: torch's own, and bitsandbytes' 8-bit AdamW as far as memory goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from meft.planner.records.setup import OptimizerName

MIN_8BIT_ELEMENTS = 4096
"""Smaller parameters keep their states in fp32 (``min_8bit_size``)."""
MIN_PAGED_ELEMENTS = 100_000
"""States of at least this many elements are paged; paged memory is managed memory, outside of the allocator."""
_STATE_BLOCK = 256
_TABLE_ENTRIES = 256


class AdamW8bit(torch.optim.Optimizer):
    """bitsandbytes' ``AdamW8bit`` and ``PagedAdamW8bit``: two states of one byte an element, an fp32 maximum per 256 of
    them each, and two tables of 256 fp32 values for all. The update itself needs no memory."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, paged: bool) -> None:
        super().__init__(parameters, {})
        self.paged = paged
        self.tables: list[torch.Tensor] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Make the states that are not there yet; gradients that are not contiguous are copied, and kept so."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self._make_state(parameter)
                parameter.grad = parameter.grad.contiguous()

    def _make_state(self, parameter: nn.Parameter) -> None:
        elements, state = parameter.numel(), self.state[parameter]
        in_8_bits = elements >= MIN_8BIT_ELEMENTS
        if in_8_bits and not self.tables:
            self.tables = [torch.empty(_TABLE_ENTRIES, dtype=torch.float32) for _ in range(2)]
        for name in ("state1", "state2"):
            if self.paged and elements >= MIN_PAGED_ELEMENTS:
                state[name] = "in managed memory"
            else:
                state[name] = torch.zeros_like(parameter, dtype=torch.uint8 if in_8_bits else torch.float32)
        if in_8_bits:
            for name in ("absmax1", "absmax2"):
                state[name] = torch.zeros(-(-elements // _STATE_BLOCK), dtype=torch.float32)


def make_optimizer(name: OptimizerName, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of that name over ``parameters``."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, foreach=True)
    if name == "adamw-fused":
        return torch.optim.AdamW(parameters, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-3, foreach=True)
    return AdamW8bit(parameters, paged=name == "paged-adamw-8bit")


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    """Everything that an optimizer keeps between steps."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
    yield from getattr(optimizer, "tables", ())


def keeps_steps_on_host(name: OptimizerName) -> bool:
    """Whether the count of steps is a tensor on the host: torch's AdamW has it there unless fused."""
    return name == "adamw"
