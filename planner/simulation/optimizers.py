"""What optimizers make on the device: states at the first step, and temporaries at each.

torch's AdamW, SGD and Muon, transformers' Adafactor, bitsandbytes' AdamW and Lion in 8 and 32 bits, paged or not, and
GaLore's and APOLLO's own packages.
Each is written as the library's own step runs; ``tests/runtime/trace`` holds torch's and transformers' against them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from meft.planner.base.quantities import INDEX_BYTES, MASTER_BYTES
from meft.planner.records.setup import OptimizerName
from meft.planner.simulation.autograd import Leaf, Tape, Tensor
from meft.planner.terms.formats import BF16, BOOL, FP32
from meft.planner.traffic.hot_rows import HOT_CHUNK_ROWS

FP64 = 8
EIGHT_BIT_MIN_NUMEL = 4096
"""bitsandbytes keeps the moments of smaller tensors in fp32."""
EIGHT_BIT_BLOCK = 256
"""Numbers that share one fp32 scale."""
PAGED_MIN_NUMEL = 100_000
"""The paged optimizer leaves the states of smaller tensors on the device."""
CODE_NUMBERS = 256
LOW_RANKS: dict[OptimizerName, int] = {"galore": 128, "apollo": 256, "apollo-mini": 1}
"""Ranks of projected gradients: GaLore's and APOLLO-Mini's as transformers sets them, APOLLO's as its authors do."""
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Bitsandbytes:
    """One of its optimizers: states per number, their bits, and whether large ones live in managed memory."""

    num_states: int
    bits: int
    paged: bool


BITSANDBYTES: dict[OptimizerName, Bitsandbytes] = {
    "adamw-8bit": Bitsandbytes(2, 8, paged=False),
    "paged-adamw-8bit": Bitsandbytes(2, 8, paged=True),
    "paged-adamw-32bit": Bitsandbytes(2, 32, paged=True),
    "lion-32bit": Bitsandbytes(1, 32, paged=False),
    "lion-8bit": Bitsandbytes(1, 8, paged=False),
    "paged-lion-8bit": Bitsandbytes(1, 8, paged=True),
}


@dataclass(frozen=True)
class Parameter:
    """A trained tensor and its shape; ``in_block`` is a matrix of a linear layer, which Muon takes."""

    tensor: Tensor
    shape: tuple[int, ...]
    in_block: bool = False

    @property
    def gradient(self) -> Tensor | None:
        """The one that is there."""
        return self.tensor.node.grad if isinstance(self.tensor.node, Leaf) else None

    def drop_gradient(self) -> None:
        """As ``zero_grad`` does."""
        if isinstance(self.tensor.node, Leaf):
            self.tensor.node.grad = None


@dataclass
class Optimizer:
    """The states of one optimizer, made at its first step.

    ``master_weights``: 16-bit parameters have fp32 copies, which are what is updated, by gradients that are cast first.
    """

    tape: Tape
    name: OptimizerName
    parameters: Sequence[Parameter]
    master_weights: bool = False
    _states: dict[int, list[Tensor]] = field(default_factory=dict)
    _codes: list[Tensor] = field(default_factory=list)
    _masters: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, parameter in enumerate(self.parameters if self.master_weights else ()):
            self._masters[index] = self._state(parameter.tensor.numel, FP32)

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self._update([index for index, each in enumerate(self.parameters) if each.gradient is not None])

    def one_by_one(self) -> None:
        """As the runtime's baselines on the emulated device: the norm of all gradients, then torch's AdamW without
        multi-tensor kernels; a root and a quotient as large as the parameter, and the count of steps is on the device.
        """
        present = [index for index, each in enumerate(self.parameters) if each.gradient is not None]
        sums = []
        for index in present:
            square = self.tape.like(self.parameters[index].tensor, "optimizer_temporary")
            sums.append(self._temporary(1, FP32))
            del square
        stacked = self._temporary(len(sums), FP32)
        del sums
        total = self._temporary(1, FP32)
        del stacked, total
        for index in present:
            if index not in self._states:
                tensor = self.parameters[index].tensor
                moments = [self._state(tensor.numel, tensor.itemsize) for _ in range(2)]
                self._states[index] = [self._state(1, FP32), *moments]
        quotient = None
        for index in present:
            root, divided = (self.tape.like(self.parameters[index].tensor, "optimizer_temporary") for _ in range(2))
            quotient = divided  # the loop's name for the one before lasts until here
            del root, divided
        del quotient

    def in_backward(self) -> Callable[[Leaf], None]:
        """A hook that updates a parameter as soon as its gradient is there, and lets that go."""
        index_of = {id(each.tensor.node): index for index, each in enumerate(self.parameters)}

        def hook(leaf: Leaf) -> None:
            index = index_of.get(id(leaf))
            if index is not None:
                self._update([index])
                self.parameters[index].drop_gradient()

        return hook

    def _update(self, indices: list[int]) -> None:
        updated = [(index, self._updated(index)) for index in indices]
        if self.name in LOW_RANKS:
            self._low_rank(updated)
            return
        gradients = [self.tape.like(each, "optimizer_temporary") for index, each in updated if index in self._masters]
        for index, tensor in updated:
            if index not in self._states:
                self._states[index] = self._made(index, tensor)
        if self.name == "adamw":  # multi-tensor: the square roots of all second moments at once
            self._square_roots([tensor for _, tensor in updated])
        elif self.name == "adafactor":
            self._adafactor([tensor for _, tensor in updated])
        elif self.name == "muon":
            self._square_roots([tensor for index, tensor in updated if not self.parameters[index].in_block])
            self._orthogonalize([index for index in indices if self.parameters[index].in_block])
        del gradients

    def _updated(self, index: int) -> Tensor:
        return self._masters.get(index, self.parameters[index].tensor)

    # --- states ------------------------------------------------------------------------------------------------------

    def _made(self, index: int, tensor: Tensor) -> list[Tensor]:
        numel, itemsize = tensor.numel, tensor.itemsize
        if self.name in BITSANDBYTES:
            return self._bitsandbytes(numel, BITSANDBYTES[self.name])
        if self.name == "sgd":
            return []
        if self.name == "adafactor":
            *outer, last = self.parameters[index].shape
            sizes = [numel // last, numel // outer[-1]] if outer else [numel]
            return [self._state(size, FP32) for size in sizes]
        if self.name == "muon" and self.parameters[index].in_block:
            return [self._state(numel, itemsize)]
        moments = [self._state(numel, itemsize) for _ in range(2)]
        return [self._state(1, FP32), *moments] if self.name == "adamw-fused" else moments

    def _bitsandbytes(self, numel: int, kind: Bitsandbytes) -> list[Tensor]:
        on_device = not (kind.paged and numel >= PAGED_MIN_NUMEL)
        if kind.bits == 32 or numel < EIGHT_BIT_MIN_NUMEL:
            return [self._state(numel, FP32) for _ in range(kind.num_states if on_device else 0)]
        if not self._codes:
            self._codes = [self._state(CODE_NUMBERS, FP32) for _ in range(kind.num_states)]
        moments = [self._state(numel, 1) for _ in range(kind.num_states if on_device else 0)]
        return [*moments, *(self._state(-(-numel // EIGHT_BIT_BLOCK), FP32) for _ in range(kind.num_states))]

    def _state(self, numel: int, itemsize: int) -> Tensor:
        return self.tape.new(numel, itemsize, "optimizer_moments")

    # --- temporaries -------------------------------------------------------------------------------------------------

    def _temporary(self, numel: int, itemsize: int) -> Tensor:
        return self.tape.new(numel, itemsize, "optimizer_temporary")

    def _square_roots(self, tensors: list[Tensor]) -> None:
        temporaries = [self._temporary(tensor.numel, tensor.itemsize) for tensor in tensors]
        del temporaries

    def _adafactor(self, tensors: list[Tensor]) -> None:
        """One after the other; names of the step hold what they name until the next has it."""
        gradient = weights = update = None
        for tensor in tensors:
            half, numel = tensor.itemsize != FP32, tensor.numel
            gradient = self._temporary(numel, FP32) if half else None
            weights = self._temporary(numel, FP32) if half else None
            square = self._temporary(numel, FP32)
            update = self._temporary(numel, FP32)  # with epsilon added
            del square
            scaled = self._temporary(numel, FP32)
            update = scaled
            del scaled
            negative = self._temporary(numel, FP32)
            del negative
        del gradient, weights, update

    def _low_rank(self, updated: list[tuple[int, Tensor]]) -> None:
        """galore-torch 1.0 and apollo-torch 1.0.3, one parameter after the other: the gradient of a matrix is projected
        on ``rank`` directions of its smaller side, moments are of that size, and the step is made for the whole.

        Names of the step hold what they name until the next parameter's is there.
        """
        low = denominator = step = None
        for index, tensor in updated:
            parameter = self.parameters[index]
            low = None
            projected = tensor.numel
            if parameter.in_block:
                rank = min(LOW_RANKS[self.name], min(parameter.shape))
                projected = rank * max(parameter.shape)
                if index not in self._states:
                    self._states[index] = [self._directions(parameter, rank)]
                low = self._temporary(projected, tensor.itemsize)
            moments = self._states.setdefault(index, [])
            if len(moments) < 2:
                moments += [self._state(projected, tensor.itemsize) for _ in range(2)]
            denominator = self._temporary(projected, tensor.itemsize)
            step = self._temporary(projected, tensor.itemsize)
            if parameter.in_block:
                step = self._whole_step(tensor)
        del low, denominator, step

    def _directions(self, parameter: Parameter, rank: int) -> Tensor:
        """What a gradient is projected on, ``rank`` by the smaller side: GaLore's by a singular value decomposition in
        fp32, of which an fp32 matrix keeps a view, and so the whole square factor; APOLLO's at random."""
        tensor, short, long = parameter.tensor, min(parameter.shape), max(parameter.shape)
        wide = tensor if tensor.itemsize == FP32 else self._temporary(tensor.numel, FP32)
        if self.name != "galore":
            drawn = self._temporary(rank * short, FP32)
            if tensor.itemsize == FP32:
                return self._state(rank * short, FP32)
            scaled = self._temporary(rank * short, FP32)
            del drawn
            directions = self._state(rank * short, tensor.itemsize)
            del scaled, wide
            return directions
        factors = [self._state(short * short, FP32), self._temporary(short, FP32), self._temporary(long * short, FP32)]
        diagonal = self._temporary(rank * rank, FP32)
        product = self._temporary(rank * long, FP32)
        del diagonal
        if tensor.itemsize == FP32:
            return factors[0]
        directions = self._state(rank * short, tensor.itemsize)
        del factors, product, wide
        return directions

    def _whole_step(self, tensor: Tensor) -> Tensor:
        """GaLore projects back and scales; APOLLO scales the gradient itself, and from the second step on limits it."""
        first = self._temporary(tensor.numel, tensor.itemsize)
        second = self._temporary(tensor.numel, tensor.itemsize)
        del first
        return second

    def _orthogonalize(self, indices: list[int]) -> None:
        """Muon, one matrix after the other: Newton-Schulz steps in bf16 over the smaller side's products."""
        update = None
        for index in indices:
            tensor, shape = self.parameters[index].tensor, self.parameters[index].shape
            gram_numel = min(shape) ** 2
            mixed = self._temporary(tensor.numel, tensor.itemsize)
            update = mixed
            ortho = mixed if tensor.itemsize == BF16 else self._temporary(tensor.numel, BF16)
            gram = gram_update = None
            for _ in range(NEWTON_SCHULZ_STEPS):
                gram = self._temporary(gram_numel, BF16)
                gram_update = self._temporary(gram_numel, BF16)
                ortho = self._temporary(tensor.numel, BF16)
            del mixed, gram, gram_update
            update = ortho
            del ortho
        del update


# --- MEFT's: routers, and rows that live on the device ---------------------------------------------------------------


def squared_router_norm(tape: Tape, routers: Sequence[Tensor]) -> None:
    """Squares of each router's gradient, and their sums."""
    sums = []
    for weight in routers:
        square = tape.like(weight, "optimizer_temporary")
        sums.append(tape.new(1, FP32, "optimizer_temporary"))
        del square
    _stacked_sum(tape, list(sums), FP32)  # here they have a name


def update_routers(tape: Tape, routers: Sequence[Tensor]) -> None:
    """torch's AdamW, one router at a time."""
    denominator = None
    for weight in routers:
        root = tape.like(weight, "optimizer_temporary")
        divided = tape.like(weight, "optimizer_temporary")
        denominator = divided  # the loop's name for the one before lasts until here
        del root, divided
    del denominator


def _stacked_sum(tape: Tape, numbers: list[Tensor], itemsize: int) -> Tensor:
    """The numbers go once they are stacked."""
    stacked = tape.new(len(numbers), itemsize, "optimizer_temporary")
    numbers.clear()
    total = tape.new(1, itemsize, "optimizer_temporary")
    del stacked
    return total


@dataclass(frozen=True)
class HotStep:
    """Norm and AdamW of the hot rows, some at a time. ``row`` is the numbers of one."""

    tape: Tape
    num_layers: int
    row: int
    hot_rows: int

    def squared_norm(self) -> None:
        """In fp64, layer by layer."""
        totals = []
        for _ in range(self.num_layers):
            sums = []
            for rows in self._parts():
                wide = self.tape.new(rows * self.row, FP64, "optimizer_temporary")
                sums.append(self.tape.new(1, FP64, "optimizer_temporary"))
                del wide
            totals.append(_stacked_sum(self.tape, sums, FP64))
        _stacked_sum(self.tape, totals, FP64)

    def update(self) -> None:
        """Of all layers."""
        for _ in range(self.num_layers):
            for rows in self._parts():
                self._update_part(rows)

    def _parts(self) -> list[int]:
        return [min(HOT_CHUNK_ROWS, self.hot_rows - first) for first in range(0, self.hot_rows, HOT_CHUNK_ROWS)]

    def _update_part(self, rows: int) -> None:
        """Copies of weights and moments, what the bias corrections are computed in, and the denominator."""
        tape, numel = self.tape, rows * self.row
        touched = tape.new(rows, BOOL, "optimizer_temporary")
        copies = [tape.new(numel, MASTER_BYTES, "optimizer_temporary") for _ in range(3)]
        counts = tape.new(rows, INDEX_BYTES, "optimizer_temporary")
        exponent = tape.new(rows, FP64, "optimizer_temporary")
        step_size = self._bias_correction(rows, quotients=2)
        correction = self._bias_correction(rows, quotients=1)
        denominator = tape.new(numel, MASTER_BYTES, "optimizer_temporary")
        del touched, copies, counts, exponent, step_size, correction, denominator

    def _bias_correction(self, rows: int, *, quotients: int) -> Tensor:
        """A power, its difference to one, what is made of that, and the result in fp32."""
        tape = self.tape
        power = tape.new(rows, FP64, "optimizer_temporary")
        made = [tape.new(rows, FP64, "optimizer_temporary")]
        del power
        made += [tape.new(rows, FP64, "optimizer_temporary") for _ in range(quotients)]
        del made[:-1]
        return tape.new(rows, FP32, "optimizer_temporary")
