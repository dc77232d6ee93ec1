"""The operators of :mod:`meft.planner.simulation.operators`, with all that is elementwise fused.

Products, attention, embeddings and the sums of the residual stream are written as ever: the last because the norm and
a sum beyond the next product both use them (the partitioner's ``ban_recompute_used_far_apart``). Norms, activations,
rotations, casts, scalings, dropout but for its mask, and the loss over the logits are fused; so are their gradients.

What that leaves for backward of a layer of LLaMA's kind, in elements per token (``D`` hidden, ``I`` of the FFN, ``H``
and ``G`` heads of ``d``): the two sums ``2 D``; query, key, value and attention's output ``2 H d + 2 G d``; gate and up
``2 I``; of every trained product its input, once for all products that share it (all trained: ``2 D + I`` more), and of
LoRA the ``r`` that lie between its factors; and in fp32 attention's log-sum-exp ``H``. A dropout's mask is a byte an
element. The logits are kept as the head made them.

Of a norm its factor is kept, 4 bytes a token (LayerNorm: with the mean 8), since the partitioner bans computing
reductions again (``ban_recompute_reductions``); that a softmax's two are kept as well is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast
from weakref import ReferenceType, ref

from meft.planner.fusion.tape import Fused, FusedTape
from meft.planner.simulation.autograd import GRADIENTS, TEMPORARIES, Backward, Gradients, Leaf, Tensor, as_outputs
from meft.planner.simulation.operators import Operators
from meft.planner.terms.formats import BOOL, FP32, promoted

RESIDUAL = "layer_inputs"


@dataclass
class FusedOperators(Operators):
    """Operators on one :class:`FusedTape`."""

    _known: dict[tuple[int, int, int], ReferenceType[Fused]] = field(default_factory=dict)
    """Casts and masks that are there: the same is not computed twice."""

    def cast(self, x: Tensor, itemsize: int, category: str) -> Tensor:
        """``x.to(dtype)``, once for all that ask for it."""
        if x.itemsize == itemsize:
            return x
        return self._connected(self._once(x, x.numel, itemsize, category), (x,))

    def scale(self, x: Tensor, category: str) -> Tensor:
        """A product with a number."""
        return self._fused((x,), x.numel, x.itemsize, category)

    def shift(self, x: Tensor, category: str) -> Tensor:
        """A sum with a number."""
        return self._fused((x,), x.numel, x.itemsize, category)

    copy = scale
    """A layout is how a kernel walks over its input."""

    def add(self, a: Tensor, b: Tensor, category: str) -> Tensor:
        """A sum, in the wider dtype; one of the residual stream is written."""
        if category == RESIDUAL:
            return super().add(a, b, category)
        return self._fused((a, b), max(a.numel, b.numel), promoted(a.itemsize, b.itemsize), category)

    def multiply(self, a: Tensor, b: Tensor, category: str) -> Tensor:
        """A product: each factor is needed if the other needs a gradient."""
        needs = (*((b,) if a.requires_grad else ()), *((a,) if b.requires_grad else ()))
        return self._fused((a, b), max(a.numel, b.numel), promoted(a.itemsize, b.itemsize), category, needs=needs)

    def power(self, x: Tensor, category: str) -> Tensor:
        """``x ** n``, in fp32 under autocast."""
        return self.keeps_input(x if self.autocast_bytes is None else self.cast(x, FP32, category), category)

    def keeps_input(self, x: Tensor, category: str) -> Tensor:
        """A function whose backward needs its input."""
        return self._fused((x,), x.numel, x.itemsize, category, needs=(x,))

    def keeps_output(self, x: Tensor, category: str) -> Tensor:
        """A function whose backward needs its output, which is computed from its input."""
        return self.keeps_input(x, category)

    def softmax_in_fp32(self, x: Tensor, category: str) -> Tensor:
        """Probabilities in fp32."""
        return self.keeps_input(self.cast(x, FP32, category), category)

    def safe_softmax(self, x: Tensor, category: str) -> Tensor:
        """The same, whatever the rows."""
        return self.keeps_input(x, category)

    def dropout(self, x: Tensor, category: str, *, active: bool) -> Tensor:
        """What was drawn cannot be drawn again: a mask of one byte an element is kept."""
        if not active:
            return x
        mask = self.tape.new(x.numel, BOOL, category)
        return self._fused((x, mask), x.numel, x.itemsize, category, needs=(mask,))

    def concatenate(self, parts: tuple[Tensor, ...], category: str) -> Tensor:
        """All parts, one after the other."""
        return self._fused(parts, sum(part.numel for part in parts), parts[0].itemsize, category)

    def slice(self, x: Tensor, numel: int) -> Tensor:
        """A view of some of the elements."""
        return self._connected(Tensor(x.storage, numel, x.itemsize), (x,))

    def heads_first(self, x: Tensor, num_heads: int) -> Tensor:
        """A view."""
        return x if num_heads == 1 else self._connected(Tensor(x.storage, x.numel, x.itemsize), (x,))

    def split(self, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Views of all elements."""
        parts = [Tensor(x.storage, size, x.itemsize) for size in sizes]
        numel, itemsize = x.numel, x.itemsize

        def backward(*grads: Tensor | None) -> Gradients:
            return (self._tape.fused((each for each in grads if each is not None), numel, itemsize, TEMPORARIES),)

        return tuple(as_outputs(self.tape, parts, (x,), backward))

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, width: int) -> Tensor:
        """Over ``width`` elements a row, in fp32 under autocast."""
        if self.autocast_bytes is not None:
            x = self.cast(x, FP32, "norms")
        statistics = self.tape.new(2 * x.numel // width, x.itemsize, "norms")
        return self._fused((x, weight, bias), x.numel, x.itemsize, "norms", needs=(x, statistics))

    def additive_mask(self, mask: Tensor, numel: int, itemsize: int) -> Tensor:
        """A mask of bytes as numbers to add, once for all layers."""
        return self._once(mask, numel, itemsize, "attention")

    def cross_entropy(self, logits: Tensor, *also_kept: Tensor) -> Tensor:
        """From the logits, in forward and in backward."""
        return self._fused((logits,), 1, FP32, "loss_chain", needs=(logits, *also_kept))

    def _mean_square(self, wide: Tensor, rows: int) -> Tensor:
        return self._fused((wide,), rows, FP32, "norms", needs=(wide,))

    # --- what they are made of --------------------------------------------------------------------------------------

    @property
    def _tape(self) -> FusedTape:
        return cast(FusedTape, self.tape)

    def _once(self, x: Tensor, numel: int, itemsize: int, category: str) -> Tensor:
        """What follows from ``x``, its size and its dtype alone."""
        key = (x.storage.number, numel, itemsize)
        known = self._known.get(key)
        storage = None if known is None else known()
        if storage is not None:
            return Tensor(storage, numel, itemsize)
        made = self._tape.fused((x,), numel, itemsize, category)
        self._known[key] = ref(cast(Fused, made.storage))
        return made

    def _fused(
        self, inputs: Sequence[Tensor], numel: int, itemsize: int, category: str, *, needs: Sequence[Tensor] = ()
    ) -> Tensor:
        """A fused result, and ``needs`` in backward."""
        return self._connected(self._tape.fused(inputs, numel, itemsize, category), inputs, needs)

    def _connected(self, out: Tensor, inputs: Sequence[Tensor], needs: Sequence[Tensor] = ()) -> Tensor:
        if not self.tape.differentiates(*inputs):
            return out
        kept = tuple(self._tape.save_or_recompute(each) for each in needs)
        return self.tape.connect(out, inputs, self._gradients(inputs, kept))

    def _gradients(self, inputs: Sequence[Tensor], kept: tuple[Tensor, ...]) -> Backward:
        """Of every input one: a parameter's is written, others' are fused too, or the incoming one as it is."""
        sizes = [(each.numel, each.itemsize) if each.requires_grad else None for each in inputs]
        leaves = [isinstance(each.node, Leaf) for each in inputs]

        def backward(grad: Tensor) -> Gradients:
            return tuple(
                None if size is None else self._gradient(grad, kept, *size, leaf=leaf)
                for size, leaf in zip(sizes, leaves, strict=True)
            )

        return backward

    def _gradient(self, grad: Tensor, kept: tuple[Tensor, ...], numel: int, itemsize: int, *, leaf: bool) -> Tensor:
        if leaf:
            return self.tape.new(numel, itemsize, GRADIENTS)
        if not kept and (grad.numel, grad.itemsize) == (numel, itemsize):
            return grad.detached()
        return self._tape.fused((grad, *kept), numel, itemsize, TEMPORARIES)
