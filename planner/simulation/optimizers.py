"""What optimizers hold and make on the device: torch's AdamW and SGD, and bitsandbytes' 8-bit AdamW."""

from __future__ import annotations

from meft.planner.records.setup import OptimizerName
from meft.planner.simulation.autograd import Leaf, Tape, Tensor
from meft.planner.simulation.formats import FP32

EIGHT_BIT_MIN_NUMEL = 4096
"""bitsandbytes keeps the moments of smaller tensors in fp32."""
EIGHT_BIT_BLOCK = 256
"""Numbers that share one fp32 scale."""
PAGED_MIN_NUMEL = 100_000
"""The paged optimizer leaves the states of smaller tensors on the device."""
CODE_NUMBERS = 256
NUM_MOMENTS = 2


class Optimizer:
    """The states of one optimizer, made at its first step."""

    def __init__(self, tape: Tape, name: OptimizerName, parameters: list[Tensor]) -> None:
        self.tape = tape
        self.name = name
        self.parameters = parameters
        self._states: list[Tensor] = []

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        updated = [each for each in self.parameters if isinstance(each.node, Leaf) and each.node.grad is not None]
        if not self._states:
            self._states = self._made(updated)
        if self.name == "adamw":  # multi-tensor: the square roots of all second moments at once
            temporaries = [self.tape.like(parameter, "optimizer_temporary") for parameter in updated]
            del temporaries

    def _made(self, parameters: list[Tensor]) -> list[Tensor]:
        if self.name == "sgd":
            return []
        if self.name in ("adamw", "adamw-fused"):
            return [state for parameter in parameters for state in self._adamw(parameter)]
        codes = [self._state(CODE_NUMBERS, FP32) for _ in range(NUM_MOMENTS)]
        return [*codes, *(state for parameter in parameters for state in self._eight_bit(parameter))]

    def _adamw(self, parameter: Tensor) -> list[Tensor]:
        moments = [self._state(parameter.numel, parameter.itemsize) for _ in range(NUM_MOMENTS)]
        return [self._state(1, FP32), *moments] if self.name == "adamw-fused" else moments

    def _eight_bit(self, parameter: Tensor) -> list[Tensor]:
        paged = self.name == "paged-adamw-8bit" and parameter.numel >= PAGED_MIN_NUMEL
        if parameter.numel < EIGHT_BIT_MIN_NUMEL:
            return [self._state(parameter.numel, FP32) for _ in range(NUM_MOMENTS)]
        scales = [self._state(-(-parameter.numel // EIGHT_BIT_BLOCK), FP32) for _ in range(NUM_MOMENTS)]
        moments = [] if paged else [self._state(parameter.numel, 1) for _ in range(NUM_MOMENTS)]
        return [*moments, *scales]

    def _state(self, numel: int, itemsize: int) -> Tensor:
        return self.tape.new(numel, itemsize, "optimizer_moments")
