"""Optimizers of a traced run: torch's own, and bitsandbytes' as far as memory goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from meft.planner.records.setup import OptimizerName
from meft.planner.simulation.optimizers import BITSANDBYTES, LOW_RANKS

MIN_8BIT_ELEMENTS = 4096
"""Smaller parameters keep their states in fp32 (``min_8bit_size``)."""
MIN_PAGED_ELEMENTS = 100_000
"""States of at least this many elements are paged; paged memory is managed memory, outside of the allocator."""
_STATE_BLOCK = 256
_TABLE_ENTRIES = 256


class BitsandbytesOptimizer(torch.optim.Optimizer):
    """bitsandbytes' AdamW (two states) and Lion (one). In 8 bits a state is a byte an element, an fp32 maximum per 256
    of them, and a table of 256 fp32 values for all. The update itself needs no memory."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, num_states: int, bits: int, paged: bool) -> None:
        super().__init__(parameters, {})
        self.numbers = range(1, num_states + 1)
        self.bits, self.paged = bits, paged
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
        in_8_bits = self.bits == 8 and elements >= MIN_8BIT_ELEMENTS
        if in_8_bits and not self.tables:
            self.tables = [torch.empty(_TABLE_ENTRIES, dtype=torch.float32) for _ in self.numbers]
        for number in self.numbers:
            name = f"state{number}"
            if self.paged and elements >= MIN_PAGED_ELEMENTS:
                state[name] = "in managed memory"
            else:
                state[name] = torch.zeros_like(parameter, dtype=torch.uint8 if in_8_bits else torch.float32)
        if in_8_bits:
            for number in self.numbers:
                state[f"absmax{number}"] = torch.zeros(-(-elements // _STATE_BLOCK), dtype=torch.float32)


class MuonBesideAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices of a model's blocks, and its AdamW for the rest, as Muon's users have it."""

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter]) -> None:
        parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, foreach=True)] if others else []
        self.parts = [*parts, *([torch.optim.Muon(matrices)] if matrices else [])]
        super().__init__([*others, *matrices], {})

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One after the other."""
        assert closure is None
        for part in self.parts:
            part.step()
            self.state.update(part.state)


class LowRank(torch.optim.Optimizer):
    """The steps of galore-torch 1.0 and apollo-torch 1.0.3, as far as memory goes: ``projected`` has the ``id`` of the
    matrices whose gradients are. A gap between projections is longer than any trace."""

    def __init__(self, parameters: list[nn.Parameter], *, name: OptimizerName, projected: Collection[int]) -> None:
        super().__init__(parameters, {})
        self.name, self.rank, self.projected = name, LOW_RANKS[name], projected

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Project, update the moments, and make the step of the whole."""
        assert closure is None
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            grad, state = parameter.grad, self.state[parameter]
            is_projected = id(parameter) in self.projected
            if is_projected:
                if "directions" not in state:
                    state["directions"] = self._directions(grad)
                directions = state["directions"]
                tall = grad.shape[0] >= grad.shape[1]
                grad = grad @ directions.t() if tall else directions.t() @ grad
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(grad)
                state["exp_avg_sq"] = torch.zeros_like(grad)
            denominator = state["exp_avg_sq"].sqrt().add_(1e-6)
            step = state["exp_avg"] / denominator
            if is_projected:
                step = self._whole(step, state["directions"], parameter.grad)
            parameter.add_(step, alpha=-1e-3)

    def _directions(self, grad: torch.Tensor) -> torch.Tensor:
        tall, matrix = grad.shape[0] >= grad.shape[1], grad.float()
        rank = min(self.rank, *grad.shape)
        if self.name != "galore":
            shape = (rank, grad.shape[1]) if tall else (grad.shape[0], rank)
            drawn: torch.Tensor = torch.randn(shape, dtype=torch.float32) / rank**0.5
            return drawn.to(grad.dtype)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        if tall:
            found, other = right[:rank], left[:, :rank] @ torch.diag(values[:rank])
        else:
            found, other = left[:, :rank], torch.diag(values[:rank]) @ right[:rank]
        directions: torch.Tensor = found.to(grad.dtype)
        del other
        return directions

    def _whole(self, step: torch.Tensor, directions: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        if self.name != "galore":
            return grad * 1.0 / 1.0
        tall = step.shape[0] >= step.shape[1]
        return (step @ directions if tall else directions @ step) * 0.25


class MasterWeights(torch.optim.Optimizer):
    """An optimizer over fp32 copies of 16-bit parameters, as DeepSpeed's and Apex's: all gradients are cast first."""

    def __init__(self, parameters: list[nn.Parameter], make: Callable[[list[nn.Parameter]], Any]) -> None:
        super().__init__(parameters, {})
        self.masters = [nn.Parameter(each.detach().float()) for each in parameters]
        self.inner = make(self.masters)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Cast, update, and write the copies back."""
        assert closure is None
        parameters = self.param_groups[0]["params"]
        for parameter, master in zip(parameters, self.masters, strict=True):
            master.grad = parameter.grad.float()
        self.inner.step()
        for parameter, master in zip(parameters, self.masters, strict=True):
            master.grad = None
            with torch.no_grad():
                parameter.copy_(master)
        self.state.update(self.inner.state)


def make_optimizer(
    name: OptimizerName, parameters: list[nn.Parameter], *, in_block: Collection[int] = ()
) -> torch.optim.Optimizer:
    """The optimizer of that name over ``parameters``; ``in_block`` has the ``id`` of those that Muon takes."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, foreach=True)
    if name == "adamw-fused":
        return torch.optim.AdamW(parameters, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-3, foreach=True)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)
    if name == "muon":
        matrices = [each for each in parameters if id(each) in in_block]
        return MuonBesideAdamW(matrices, [each for each in parameters if id(each) not in in_block])
    if name in LOW_RANKS:
        return LowRank(parameters, name=name, projected=in_block)
    kind = BITSANDBYTES[name]
    return BitsandbytesOptimizer(parameters, num_states=kind.num_states, bits=kind.bits, paged=kind.paged)


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    """Everything that an optimizer keeps between steps."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
    yield from getattr(optimizer, "tables", ())


def keeps_steps_on_host(name: OptimizerName) -> bool:
    """Whether the count of steps is a tensor on the host: torch's AdamW has it there unless fused."""
    return name in ("adamw", "muon", "adafactor")
