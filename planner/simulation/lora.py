"""LoRA beside a model's linear layers: as ``peft`` runs it, and fused, as Unsloth and fms-acceleration's foak do.

Fused, the layers that share an input are one function of their own: queries, keys and values; the output projection;
the FFN. It multiplies without a graph, keeps the input, what dropout made of it for each layer, and the factors (of the
FFN gate and up as well), and writes the gradient over the input where nothing else needs that. What is dropped is not
kept as a mask: it is where the kept copy is zero. Read from foak's ``fused_ops/unsloth_lora/bnb/fast_lora.py``.

Letters: ``T`` tokens, ``D`` inputs, ``r`` the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from meft.planner.models.linears import Place
from meft.planner.simulation.autograd import GRADIENTS, TEMPORARIES, Gradients, Tensor, as_outputs
from meft.planner.simulation.operators import Operators, QuantizedWeights, Weights
from meft.planner.terms.formats import BOOL, FP32
from meft.planner.terms.weights import NF4_BLOCK


@dataclass(frozen=True)
class Lora:
    """The two factors beside one linear layer."""

    down: Weights
    up: Weights


class Adapted(NamedTuple):
    """A linear layer and what is trained beside it."""

    layer: Weights | QuantizedWeights
    lora: Lora


def quantized_lora(
    ops: Operators, x: Tensor, layer: QuantizedWeights, lora: Lora, place: Place, *, dropout: bool
) -> Tensor:
    """A 4-bit layer and what is beside it: ``peft`` copies what the layer gives, and casts only outside autocast."""
    result = ops.copy(ops.linear(x, layer, place), place)
    outer = result.itemsize
    autocast = ops.autocast_bytes is not None
    if not autocast:
        x = ops.cast(x, lora.down.weight.itemsize, "adapter")
    added = lora_added(ops, x, lora, dropout=dropout)
    if not autocast:
        added = ops.cast(added, outer, "adapter")
    return ops.add(result, added, place)


def lora_added(ops: Operators, x: Tensor, lora: Lora, *, dropout: bool) -> Tensor:
    """What the factors make of a layer's input."""
    dropped = ops.dropout(x, "adapter", active=dropout)
    low = ops.linear(dropped, lora.down, "adapter")
    del dropped
    return ops.scale(ops.linear(low, lora.up, "adapter"), "adapter")


# --- fused -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FusedLora:
    """The fused functions on one tape."""

    ops: Operators
    dropout: bool

    def products(self, x: Tensor, layers: Sequence[Adapted], place: Place, *, over_input: bool) -> list[Tensor]:
        """What the layers make of ``x``, in one function; with ``over_input`` its gradient is written over ``x``."""
        tape = self.ops.tape
        made = [self._product(x, each, place) for each in layers]
        outputs = [output for output, _ in made]
        kept_x, kept = tape.save(x), [tape.save(dropped) for _, dropped in made]
        del made

        def backward(*grads: Tensor) -> Gradients:
            of_factors: list[Tensor | None] = []
            for each, dropped, grad in zip(layers, kept, grads, strict=True):
                of_factors += self._factor_gradients(each, dropped, grad)
            gradient = kept_x.detached() if over_input else None
            for each, grad in zip(layers, grads, strict=True):
                gradient = self._add_input_gradient(gradient, each, kept_x, grad)
            return gradient, *of_factors

        return as_outputs(tape, outputs, (x, *_factors(layers)), backward)

    def ffn(self, x: Tensor, gate: Adapted, up: Adapted, down: Adapted) -> Tensor:
        """A gated FFN whose three layers are adapted: gate and up are kept, their gradients written over them."""
        tape, layers = self.ops.tape, (gate, up, down)
        gate_states, gate_x = self._product(x, gate, "ffn")
        up_states, up_x = self._product(x, up, "ffn")
        hidden = tape.like(gate_states, "ffn")
        output, down_x = self._product(hidden, down, "ffn")
        kept_x, kept = tape.save(x), [tape.save(each) for each in (gate_x, up_x, gate_states, up_states)]
        kept_down = tape.save(down_x) if self.dropout else None
        del hidden, gate_states, up_states, gate_x, up_x, down_x

        def backward(grad: Tensor) -> Gradients:
            gate_x, up_x, of_gate, of_up = kept
            hidden, _ = self._product(grad, _transposed(down), "ffn", dropout=False)
            mask = None if kept_down is None else tape.new(kept_down.numel, BOOL, TEMPORARIES)
            del mask
            of_down = self._factor_gradients(down, kept_down or hidden, grad)
            of_factors = [*self._factor_gradients(gate, gate_x, of_gate), *self._factor_gradients(up, up_x, of_up)]
            del hidden
            gradient: Tensor | None = kept_x.detached()
            for each, of_states in ((up, of_up), (gate, of_gate)):
                gradient = self._add_input_gradient(gradient, each, kept_x, of_states)
            return gradient, *of_factors, *of_down

        return as_outputs(tape, [output], (x, *_factors(layers)), backward)[0]

    def _product(
        self, x: Tensor, adapted: Adapted, place: Place, *, dropout: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """One layer with what is beside it, and its input as dropout left it."""
        ops, tape, (layer, lora) = self.ops, self.ops.tape, adapted
        rows = x.numel // layer.inputs
        with tape.no_grad():
            narrow = self._narrow(x)
            written = self._written(layer, narrow.itemsize)
            ops.use_workspace()
            out = tape.new(rows * layer.outputs, narrow.itemsize, place)
            del written
            dropped = ops.dropout(x, "adapter", active=self.dropout if dropout is None else dropout)
            low = tape.new(rows * lora.down.outputs, narrow.itemsize, "adapter")
            factor = tape.new(lora.up.weight.numel, narrow.itemsize, "adapter")  # scaled
            product = tape.like(out, "adapter")
            del low, factor, product
        return out, dropped

    def _factor_gradients(self, adapted: Adapted, dropped: Tensor, grad: Tensor) -> list[Tensor | None]:
        """Of the lower and the upper factor, each by way of a product ``[T, r]``."""
        tape, lora = self.ops.tape, adapted.lora
        self.ops.use_workspace(backward=True)
        rows = dropped.numel // lora.down.inputs
        found: list[Tensor | None] = []
        for factor in (lora.down, lora.up):
            low = tape.new(rows * lora.down.outputs, grad.itemsize, TEMPORARIES)
            found.append(tape.new(factor.weight.numel, grad.itemsize, GRADIENTS))
            del low
        return found

    def _add_input_gradient(self, gradient: Tensor | None, adapted: Adapted, x: Tensor, grad: Tensor) -> Tensor:
        """The layer's own share is the first sum or is added to it; that of the factors is masked as dropout did."""
        tape = self.ops.tape
        written = self._written(adapted.layer, grad.itemsize)
        product = tape.new(x.numel, grad.itemsize, TEMPORARIES)
        del written
        if gradient is None:
            gradient = product
        del product
        mask = tape.new(x.numel, BOOL, TEMPORARIES)
        added = tape.new(x.numel, grad.itemsize, TEMPORARIES)
        masked = tape.like(added, TEMPORARIES)
        del mask, added, masked
        return gradient

    def _written(self, layer: Weights | QuantizedWeights, itemsize: int) -> Tensor | None:
        """A quantized layer written out, its scales in fp32 while that is done."""
        if isinstance(layer, Weights):
            return None
        tape, numel = self.ops.tape, layer.inputs * layer.outputs
        written = tape.new(numel, itemsize, "dequantized_weight")
        scales = tape.new(-(-numel // NF4_BLOCK), FP32, "dequantized_weight")
        del scales
        return written

    def _narrow(self, x: Tensor) -> Tensor:
        return x if self.ops.autocast_bytes is None else self.ops.cast(x, self.ops.autocast_bytes, "adapter")


def _factors(layers: Sequence[Adapted]) -> list[Tensor]:
    return [factor.weight for _, lora in layers for factor in (lora.down, lora.up)]


def _transposed(adapted: Adapted) -> Adapted:
    """The same layer from its outputs to its inputs."""
    layer, lora = adapted
    if isinstance(layer, Weights):
        turned: Weights | QuantizedWeights = Weights(layer.outputs, layer.inputs, layer.weight)
    else:
        turned = QuantizedWeights(layer.outputs, layer.inputs, layer.stored, layer.compute_bytes)
    down, up = lora.up, lora.down
    return Adapted(
        turned,
        Lora(Weights(down.outputs, down.inputs, down.weight), Weights(up.outputs, up.inputs, up.weight)),
    )
