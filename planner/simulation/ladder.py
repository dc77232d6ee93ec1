"""Ladder side tuning's step: the backbone without a graph, a narrow transformer beside it, and the head.

Of the backbone's blocks nothing is kept but, for each rung, the block's output ``[T, D]`` as the input of its
projection to the side width ``w``. The side network keeps what any decoder of its sizes keeps, in fp32, and at each
rung the two summands of its gated sum, ``2 T w``.

Letters: ``T`` tokens, ``D`` hidden size, ``w`` side width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meft.planner.models.linears import linear_layers
from meft.planner.records.ladder import kept_layers, side_shape
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.autograd import Tape, Tensor
from meft.planner.simulation.decoder import BlockWeights, Decoder, Shared
from meft.planner.simulation.operators import Weights
from meft.planner.simulation.optimizers import Parameter
from meft.planner.terms.formats import FP32


@dataclass
class LadderWeights:
    """What is trained: the entrance, per rung a projection, a gate and a block, and the way back up."""

    enter: Weights
    down: list[Weights] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    blocks: list[BlockWeights] = field(default_factory=list)
    up: Weights | None = None

    def parameters(self) -> list[Parameter]:
        """All of them, as the optimizer sees them."""
        assert self.up is not None
        found = [_matrix(each) for each in (self.enter, *self.down)]
        found += [Parameter(gate, (1,)) for gate in self.gates]
        for block in self.blocks:
            found += [_matrix(layer) for layer in block.linears.values() if isinstance(layer, Weights)]
            found += [Parameter(weight, (weight.numel,)) for weight, _ in block.norms]
        return [*found, _matrix(self.up)]


def side_setup(setup: TrainingSetup) -> TrainingSetup:
    """A run of the side network's blocks: its sizes, in fp32, without a cache."""
    side = side_shape(setup.model, setup.reduction or 0)
    sizes = {
        "hidden_size": side.width,
        "intermediate_size": side.inner,
        "num_heads": side.num_heads,
        "num_kv_heads": side.num_kv_heads,
        "head_dim": side.head_dim,
    }
    shape = setup.model.model_copy(update=sizes)
    return setup.model_copy(update={"model": shape, "weights_dtype": "fp32", "activation_checkpointing": False})


def load_ladder(tape: Tape, setup: TrainingSetup) -> LadderWeights:
    """Put the side network on the device, in the order in which the runtime makes it."""
    narrow = side_setup(setup).model
    hidden, width = setup.model.hidden_size, narrow.hidden_size
    rungs = kept_layers(setup.model.num_layers, setup.dropped_layers)

    def trained(inputs: int, outputs: int) -> Weights:
        return Weights(inputs, outputs, tape.parameter(inputs * outputs, FP32, "trainable_weights"))

    made = LadderWeights(trained(hidden, width))
    made.down = [trained(hidden, width) for _ in rungs]
    made.gates = [tape.parameter(1, FP32, "trainable_weights") for _ in rungs]
    for _ in rungs:
        block = BlockWeights()
        for layer in linear_layers(narrow):
            block.linears[layer.place, layer.name] = trained(layer.inputs, layer.outputs)
        block.norms = [(tape.parameter(width, FP32, "trainable_weights"), None) for _ in range(2)]
        made.blocks.append(block)
    made.up = trained(width, hidden)
    return made


@dataclass
class Laddered(Decoder):
    """A decoder with a ladder beside it."""

    ladder: LadderWeights | None = None

    def through_blocks(self, x: Tensor, shared: Shared, resting: Shared) -> Tensor:
        """The backbone's blocks without a graph, and the side network's after those that have one."""
        del resting  # of models that the side network is not pruned from
        ladder, ops = self.ladder, self.ops
        assert ladder is not None
        assert ladder.up is not None
        side = Decoder(ops, side_setup(self.setup), self.weights)
        narrow = Shared(shared.rotary, shared.masks, None)
        rungs = kept_layers(self.shape.num_layers, self.setup.dropped_layers)
        state = ops.linear(ops.cast(x, FP32, "adapter"), ladder.enter, "adapter")
        for index, block in enumerate(self.weights.blocks):
            with ops.tape.no_grad():
                x = self.block(x, block, shared)
            if index in rungs:
                state = self._rung(side, rungs.index(index), state, x, narrow)
        with ops.tape.no_grad():
            unused = self._norm(x, self.weights.final_norm, self.shape.hidden_size)  # the backbone runs to its end
        self._named = (*self._named, unused)
        up = ops.cast(ops.linear(state, ladder.up, "adapter"), x.itemsize, "adapter")
        return ops.add(x, up, "layer_inputs")

    def _rung(self, side: Decoder, place: int, state: Tensor, hidden: Tensor, shared: Shared) -> Tensor:
        ladder, ops = self.ladder, self.ops
        assert ladder is not None
        gate = ops.keeps_output(ops.scale(ladder.gates[place], "adapter"), "adapter")
        kept = ops.multiply(gate, state, "adapter")
        rest = ops.shift(gate, "adapter")
        entering = ops.linear(ops.cast(hidden, FP32, "adapter"), ladder.down[place], "adapter")
        mixed = ops.add(kept, ops.multiply(rest, entering, "adapter"), "adapter")
        del kept, rest, entering, gate
        return side.block(mixed, ladder.blocks[place], shared)


def _matrix(layer: Weights) -> Parameter:
    return Parameter(layer.weight, (layer.outputs, layer.inputs), in_block=True)
