"""A sharded base on the tape: which layers' weights are there, whole, and when, as FSDP2 has it.

A layer's weights come in a flat buffer and are copied out of it; then the buffer goes and the next layer's is made.
The weights go when the layer's forward is done, or the last of its backward. What nodes keep of them for backward is a
name: the bytes go all the same, and are back before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from meft.planner.simulation.autograd import Gradients, Tape, Tensor
from meft.planner.simulation.decoder import BlockWeights, Decoder, Shared

GATHERED = "gathered_weights"


@dataclass
class Gathering:
    """All layers' weights. ``sizes`` are bytes of the padded matrices of each layer; ``first_again`` is the first layer
    that is gathered for backward."""

    tape: Tape
    sizes: Sequence[Sequence[int]]
    first_again: int
    buffers: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, list[Tensor]] = field(default_factory=dict)

    def gather_all(self) -> None:
        """One after the other, before the first step."""
        for layer in range(len(self.sizes)):
            self._bring(layer)
            del self.weights[layer]

    def before_forward(self, layer: int) -> None:
        """It runs, and the next is on its way."""
        self._bring(layer)
        if layer + 1 < len(self.sizes):
            self._begin(layer + 1)

    def before_backward(self, layer: int) -> None:
        """The same, for the last layer first."""
        if layer >= self.first_again:
            self._bring(layer)
        if layer > self.first_again:
            self._begin(layer - 1)

    def give_up(self, layer: int) -> None:
        """Its weights go, one after the other."""
        weights = self.weights.pop(layer, [])
        while weights:
            del weights[0]

    def _begin(self, layer: int) -> None:
        if layer not in self.buffers:
            self.buffers[layer] = self.tape.new(sum(self.sizes[layer]), 1, GATHERED)

    def _bring(self, layer: int) -> None:
        self._begin(layer)
        self.weights[layer] = [self.tape.new(size, 1, GATHERED) for size in self.sizes[layer]]
        del self.buffers[layer]


@dataclass
class ShardedDecoder(Decoder):
    """A :class:`Decoder` whose layers FSDP2's hooks surround."""

    gathering: Gathering | None = None

    def _layer(self, x: Tensor, block: BlockWeights, shared: Shared) -> Tensor:
        """A forward that is computed again finds the weights there; what stands for the hooks is made all the same,
        since a region's nodes must be."""
        assert self.gathering is not None
        index = next(place for place, each in enumerate(self.weights.blocks) if each is block)
        again = self.ops.tape.phase == "backward"
        if not again:
            self.gathering.before_forward(index)
        output = super()._layer(self._passed(x, self.gathering.give_up, index), block, shared)
        if not again:
            self.gathering.give_up(index)
        return self._passed(output, self.gathering.before_backward, index)

    def _passed(self, x: Tensor, when_differentiated: Callable[[int], None], index: int) -> Tensor:
        """The same tensor, whose gradient passes once something is done."""

        def backward(grad: Tensor) -> Gradients:
            when_differentiated(index)
            return (grad.detached(),)

        return self.ops.tape.connect(Tensor(x.storage, x.numel, x.itemsize), (x,), backward)
