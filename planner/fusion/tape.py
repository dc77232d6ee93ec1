"""Two tapes for a compiled step: one at the upper end of what can be said of it, one at the lower.

At the upper end nothing is fused. But a compiled backward hands out all gradients of parameters at once, at its end
(:class:`GatheringTape`).

At the lower end elementwise results take no memory, as far as that can be (:class:`FusedTape`).

A compiler that fuses elementwise operators into the kernel that needs their result has no buffer for it. Such a result
is here a :class:`Fused` storage of no bytes, which holds on to what it is computed from. It is written out where
torch's min-cut partitioner (``torch._functorch.partitioners``, its defaults) would have to save it for backward:

- a product or an attention kernel needs it in backward. Backward would have to write it out to multiply it, so that
  computing it again saves nothing: ``ban_recompute_materialized_backward``;
- an elementwise operator needs it in backward, and it is smaller than what it would be computed from, as far as nobody
  else keeps that: the cut takes the fewer bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

from meft.planner.records.plan import Phase
from meft.planner.simulation.autograd import Leaf, Storage, Tape, Tensor


class GatheringTape(Tape):
    """A tape whose parameters' gradients stay until backward is over, whether they are added to earlier ones or not."""

    def __init__(self, *, sums_in_place: bool = True) -> None:
        super().__init__(sums_in_place=sums_in_place)
        self._gathered: list[Tensor] = []

    def as_leaf(self, tensor: Tensor) -> Tensor:
        """The tensor made to require a gradient, which is handed out at the end."""
        tensor.node = _GatheringLeaf(tensor.storage, self.phase, self._gathered)
        return tensor

    def backward(self, root: Tensor, grad: Tensor) -> None:
        """Differentiate ``root``; gradients that were added to earlier ones go once all are there."""
        super().backward(root, grad)
        if not self.num_engines:
            self._gathered.clear()


class _GatheringLeaf(Leaf):
    """One that lets nothing go."""

    __slots__ = ("gathered",)

    def __init__(self, storage: Storage, phase: Phase, gathered: list[Tensor]) -> None:
        super().__init__(storage, phase)
        self.gathered = gathered

    def accumulate(self, gradient: Tensor | None) -> None:
        """Take the gradient, or hold it beside the one that is there."""
        if self.grad is not None and gradient is not None:
            self.gathered.append(gradient)
        super().accumulate(gradient)


class Fused(Storage):
    """``numel`` elements of ``itemsize`` bytes that exist within a kernel alone, until they are ``written``."""

    __slots__ = ("__weakref__", "category", "itemsize", "numel", "sources", "written")

    def __init__(
        self, tape: Tape, number: int, sources: tuple[Storage, ...], numel: int, itemsize: int, category: str
    ) -> None:
        super().__init__(tape, number, 0)
        self.sources = sources
        self.numel, self.itemsize, self.category = numel, itemsize, category
        self.written: Storage | None = None


class FusedTape(Tape):
    """A tape whose elementwise results are :class:`Fused`."""

    def __init__(self, *, sums_in_place: bool = True) -> None:
        super().__init__(sums_in_place=sums_in_place)
        self._kept: set[int] = set()
        """Storages that are there in backward whatever else is kept: by their numbers."""

    def new(self, numel: int, itemsize: int, category: str, *, stream: int = 0) -> Tensor:
        """A tensor of its own storage; what is loaded stays."""
        made = super().new(numel, itemsize, category, stream=stream)
        if self.phase == "resident":
            self._kept.add(made.storage.number)
        return made

    def fused(self, sources: Iterable[Tensor], numel: int, itemsize: int, category: str) -> Tensor:
        """What an elementwise kernel makes of ``sources``, without a buffer of its own."""
        self._numbers += 1
        held = tuple(each.storage for each in sources)
        return Tensor(Fused(self, self._numbers, held, numel, itemsize, category), numel, itemsize)

    def save(self, tensor: Tensor, *, hooked: bool = True, checkpointed: bool = False) -> Tensor:
        """What a kernel that is not elementwise keeps: it has to be written."""
        if self._decides and not checkpointed:
            self.write(tensor)
        self._stays(tensor)
        return super().save(tensor, hooked=hooked, checkpointed=checkpointed)

    def save_or_recompute(self, tensor: Tensor) -> Tensor:
        """What an elementwise operator needs in backward: kept itself, or what it is computed from."""
        storage = tensor.storage
        if self._decides and isinstance(storage, Fused) and storage.written is None:
            needed = sum(each.num_bytes for each in sources_of(storage) if each.number not in self._kept)
            if storage.numel * storage.itemsize < needed:
                self.write(tensor)
        self._stays(tensor)
        return super().save(tensor)

    def write(self, tensor: Tensor) -> None:
        """It is in memory from now on, for all that share it, and lets go of what it was computed from."""
        storage = tensor.storage
        if isinstance(storage, Fused) and storage.written is None:
            storage.written = self.new(storage.numel, storage.itemsize, storage.category).storage
            storage.sources = ()

    @property
    def _decides(self) -> bool:
        """Whether what is kept now is there in backward: not in a region that is computed again."""
        return self._region is None and self._grad_enabled

    def _stays(self, tensor: Tensor) -> None:
        if self._decides:
            self._kept |= {each.number for each in sources_of(tensor.storage)}


def sources_of(storage: Storage) -> list[Storage]:
    """The storages with bytes from which it can be computed: itself, if it is one.

    >>> tape = FusedTape()
    >>> x = tape.new(100, 2, "ffn")
    >>> doubled = tape.fused((x,), 100, 4, "ffn")
    >>> sources_of(tape.fused((doubled, x), 100, 4, "ffn").storage) == [x.storage]
    True
    """
    found: dict[int, Storage] = {}
    seen: set[int] = set()
    stack = [storage]
    while stack:
        each = stack.pop()
        if each.number in seen:
            continue
        seen.add(each.number)
        if not isinstance(each, Fused):
            found[each.number] = each
        elif each.written is not None:
            found[each.written.number] = each.written
        else:
            stack += each.sources
    return list(found.values())
