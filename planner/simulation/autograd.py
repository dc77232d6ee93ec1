"""A reverse-mode differentiation of nothing but memory: tensors without numbers, freed when the last reference goes.

Operators (:mod:`meft.planner.simulation.operators`) are written the way torch runs them: they make tensors, keep what
their backward needs, and let the rest go out of scope. The reference counts of Python then give the lifetimes, as they
do in torch, and the tape records every allocation and release in order.

The engine follows torch's: nodes run latest first, gradients that meet at a node are summed (into the first of them
when nothing else holds it), a node gives up what it keeps once it has run, and a leaf takes its gradient as it is.

>>> tape = Tape()
>>> x = tape.parameter(100, 4, "weights")
>>> y = tape.unary(x, "activations", saves=x)
>>> tape.backward(y, tape.new(100, 4, "gradients"))
>>> [event.num_bytes for event in tape.events]
[400, 400, 400, 400, -400]
"""

from __future__ import annotations

import heapq
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from meft.planner.records.plan import Phase
from meft.planner.simulation.stream import StreamEvent

GRADIENTS = "gradients"
TEMPORARIES = "backward_temporaries"

_made = tuple.__new__  # without the call in between that fills defaults in: half of what an event takes
_REFERENCES_OF_ONE_HOLDER = 2
"""What ``sys.getrefcount`` says of a storage that one tensor holds: that tensor, and the call's own argument."""


class Storage:
    """Bytes on the device; they are released with the last reference."""

    __slots__ = ("num_bytes", "number", "tape")

    def __init__(self, tape: Tape, number: int, num_bytes: int) -> None:
        self.tape = tape
        self.number = number
        self.num_bytes = num_bytes

    def __del__(self) -> None:
        if self.num_bytes:
            self.tape.released(self)


class Tensor:
    """A shape of ``numel`` elements of ``itemsize`` bytes over a storage; ``node`` made it if it requires a gradient.

    Views are tensors that share a storage. ``index`` tells the outputs of one node apart; ``base`` is what a view that
    torch makes in backward holds on to, so that the storage is not its alone.
    """

    __slots__ = ("base", "index", "itemsize", "node", "numel", "storage")

    def __init__(self, storage: Storage, numel: int, itemsize: int, node: Node | None = None, index: int = 0) -> None:
        self.storage = storage
        self.numel = numel
        self.itemsize = itemsize
        self.node = node
        self.index = index
        self.base: Tensor | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows to it."""
        return self.node is not None

    def detached(self) -> Tensor:
        """The same bytes outside the graph: what a node keeps."""
        return Tensor(self.storage, self.numel, self.itemsize)


def as_view(tensor: Tensor) -> Tensor:
    """A gradient that comes out of its operator as a view of the operator's own result."""
    view = tensor.detached()
    view.base = tensor
    return view


def as_outputs(tape: Tape, outputs: list[Tensor], inputs: Sequence[Tensor | None], backward: Backward) -> list[Tensor]:
    """Make all ``outputs`` those of one node, whose backward takes a gradient of each."""
    tape.connect(outputs[0], inputs, backward)
    node = outputs[0].node
    if node is not None:
        node.num_outputs = len(outputs)
        for index, output in enumerate(outputs):
            output.node, output.index = node, index
    return outputs


Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]


class Node:
    """One operator's backward: takes the gradients of its outputs, gives those of its inputs."""

    __slots__ = ("backward", "inputs", "num_outputs", "packed", "phase", "place", "sequence")

    def __init__(self, sequence: int, inputs: tuple[Edge | None, ...], backward: Backward | None, phase: Phase) -> None:
        self.sequence = sequence
        self.inputs = inputs
        self.backward = backward
        self.phase = phase
        self.num_outputs = 1
        self.packed: list[Packed] = []
        self.place: tuple[Recomputation, int] | None = None
        """Of a node in a checkpointed region that keeps something: where the recomputation puts its backward."""


class Packed(Tensor):
    """What a node keeps while it is on the host; ``ticket`` tells it from others."""

    __slots__ = ("ticket",)
    ticket: int


class Offloader(Protocol):
    """Sends what nodes keep elsewhere, and brings it back for the node that needs it."""

    def takes(self, tensor: Tensor, *, checkpointed: bool, in_backward: bool) -> bool:
        """Whether this tensor goes."""

    def send(self, tensors: list[Packed]) -> None:
        """They go: their storage is nowhere."""

    def bring_back(self, tensors: list[Packed]) -> int:
        """They have a storage again; gives what :meth:`done_with` is to be told."""

    def done_with(self, tensors: list[Packed], earlier: int) -> None:
        """The node has run."""

    def settle(self) -> None:
        """Backward is over."""


class Recomputation:
    """A checkpointed region, computed again when the first node asks for what it would have kept."""

    __slots__ = ("backwards", "run")

    def __init__(self, run: Callable[[], list[Backward | None]]) -> None:
        self.run = run
        self.backwards: list[Backward | None] | None = None

    def take(self, index: int) -> Backward | None:
        """The backward of the region's node of that number, which is then the caller's alone."""
        if self.backwards is None:
            self.backwards = self.run()
        backward, self.backwards[index] = self.backwards[index], None
        return backward


class Leaf(Node):
    """Where a gradient ends: it becomes ``grad``, or is added to the one that is there. It holds on to the bytes of the
    tensor whose gradient it is."""

    __slots__ = ("grad", "storage")

    def __init__(self, storage: Storage, phase: Phase) -> None:
        super().__init__(sys.maxsize, (), None, phase)
        self.storage = storage
        self.grad: Tensor | None = None

    def accumulate(self, gradient: Tensor | None) -> None:
        """Take the gradient as it is; adding to an earlier one needs no memory."""
        if self.grad is None:
            self.grad = gradient


class Edge:
    """From a node to the maker of one of its inputs, with that input's shape: gradients are fitted to it."""

    __slots__ = ("index", "itemsize", "node", "numel")

    def __init__(self, tensor: Tensor, node: Node) -> None:
        self.node = node
        self.index = tensor.index
        self.numel = tensor.numel
        self.itemsize = tensor.itemsize


class Tape:
    """Makes tensors and nodes, and records what comes and goes.

    ``phase`` and ``category`` label what is made; ``sums_in_place`` is torch's own rule for gradients that meet (a
    dispatch mode, such as a tracer, switches it off in torch).
    """

    def __init__(self, *, sums_in_place: bool = True) -> None:
        self.events: list[StreamEvent] = []
        self.phase: Phase = "resident"
        self.sums_in_place = sums_in_place
        self.moments: dict[str, int] = {}
        self.on_gradient: Callable[[Leaf], None] | None = None
        """Told of every leaf whose gradient is there, as ``register_post_accumulate_grad_hook`` is."""
        self._numbers = 0
        self._sequence = 0
        self._grad_enabled = True
        self._num_saved = 0
        self._num_saved_when_connected = 0
        self._region: Recomputation | None = None
        self._num_in_region = 0
        self._again: list[Backward | None] | None = None
        self._stop_after: int | None = None
        self.offloader: Offloader | None = None
        self._to_be_sent: list[Packed] = []
        self.num_engines = 0

    # --- tensors ----------------------------------------------------------------------------------------------------

    def new(self, numel: int, itemsize: int, category: str, *, stream: int = 0) -> Tensor:
        """A tensor of its own storage."""
        num_bytes = 0 if self._stop_after is not None and self._stopped else numel * itemsize
        self._numbers = number = self._numbers + 1
        if num_bytes:
            self.events.append(_made(StreamEvent, (number, num_bytes, self.phase, category, "", stream)))
        return Tensor(Storage(self, number, num_bytes), numel, itemsize)

    def like(self, tensor: Tensor, category: str) -> Tensor:
        """A new tensor of the same shape."""
        return self.new(tensor.numel, tensor.itemsize, category)

    def parameter(self, numel: int, itemsize: int, category: str, *, trained: bool = True) -> Tensor:
        """A weight; a trained one is a leaf."""
        weight = self.new(numel, itemsize, category)
        return self.as_leaf(weight) if trained else weight

    def as_leaf(self, tensor: Tensor) -> Tensor:
        """The tensor made to require a gradient."""
        tensor.node = Leaf(tensor.storage, self.phase)
        return tensor

    def released(self, storage: Storage) -> None:
        """The last reference of a storage, which has bytes, is gone."""
        self.events.append(_made(StreamEvent, (storage.number, -storage.num_bytes, self.phase, "", "", 0)))

    def mark(self, moment: str) -> None:
        """Name this place in the stream."""
        self.moments[moment] = len(self.events)

    # --- the graph --------------------------------------------------------------------------------------------------

    def save(self, tensor: Tensor, *, hooked: bool = True, checkpointed: bool = False) -> Tensor:
        """What a node keeps of a tensor; ``hooked``: by way of autograd, whose hooks may send it to the host, but in a
        checkpointed region, which has hooks of its own. ``checkpointed``: it is the input of such a region."""
        self._num_saved += 1
        in_region = self._region is not None or self._again is not None
        if not hooked or self.offloader is None or in_region or not self._grad_enabled:
            return tensor.detached()
        if not self.offloader.takes(tensor, checkpointed=checkpointed, in_backward=self.num_engines > 0):
            return tensor.detached()
        self._to_be_sent.append(Packed(tensor.storage, tensor.numel, tensor.itemsize))
        return self._to_be_sent[-1]

    def connect(self, output: Tensor, inputs: Sequence[Tensor | None], backward: Backward) -> Tensor:
        """Make ``output`` the result of ``inputs``: its node keeps whatever ``backward`` refers to."""
        packed, self._to_be_sent = self._to_be_sent, []
        if not self.differentiates(*inputs):
            return output
        edges = tuple(None if each is None or each.node is None else Edge(each, each.node) for each in inputs)
        self._sequence += 1
        output.node = node = Node(self._sequence, edges, backward, self.phase)
        if packed and self.offloader is not None:
            node.packed = packed
            self.offloader.send(packed)
        if self._region is not None:
            self._leave_to_recomputation(node)
        elif self._again is not None:
            self._again.append(backward)
            node.backward, node.inputs = None, ()  # the first computation's node runs, with this backward
        self._num_saved_when_connected = self._num_saved
        return output

    def _leave_to_recomputation(self, node: Node) -> None:
        """In a checkpointed region: what the node keeps is let go; one that keeps nothing runs as it is."""
        if self._num_saved > self._num_saved_when_connected:
            assert self._region is not None
            node.backward, node.place = None, (self._region, self._num_in_region)
        self._num_in_region += 1

    def differentiates(self, *inputs: Tensor | None) -> bool:
        """Whether an operator on these inputs has a backward."""
        if self._grad_enabled:
            for each in inputs:
                if each is not None and each.node is not None:
                    return True
        return False

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Operators inside have no backward."""
        before, self._grad_enabled = self._grad_enabled, False
        try:
            yield
        finally:
            self._grad_enabled = before

    def unary(self, x: Tensor, category: str, *, saves: Tensor | None = None) -> Tensor:
        """An elementwise operator that keeps ``saves``, and whose backward makes one gradient."""
        out = self.like(x, category)
        return self.connect(out, (x,), self.one_gradient(None if saves is None else self.save(saves)))

    def one_gradient(self, *kept: Tensor | None, numel: int | None = None, itemsize: int | None = None) -> Backward:
        """A backward that holds ``kept`` and makes one new gradient, of the incoming one's shape unless given."""

        def backward(grad: Tensor) -> Gradients:
            _ = kept
            return (self.new(numel or grad.numel, itemsize or grad.itemsize, TEMPORARIES),)

        return backward

    # --- activation checkpointing -----------------------------------------------------------------------------------

    def checkpoint(self, region: Callable[[Tensor], Tensor], x: Tensor, *, reentrant: bool) -> Tensor:
        """Run ``region`` keeping its input alone, and compute it again when its gradient is asked for."""
        return self._checkpoint_reentrant(region, x) if reentrant else self._checkpoint(region, x)

    def _checkpoint(self, region: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The region's nodes are there from the start and run in their turn; the first that needs what was let go has
        the region computed again, up to the last tensor that is kept: what follows is not computed."""
        saved_before, num_saved = self._num_saved, 0
        kept = self._kept_input(x)

        def run() -> list[Backward | None]:
            if not isinstance(kept, Packed) or self.offloader is None:
                return self._compute_again(region, kept, stop_after=num_saved)
            earlier = self.offloader.bring_back([kept])
            try:
                return self._compute_again(region, kept, stop_after=num_saved)
            finally:
                self.offloader.done_with([kept], earlier)

        self._region, self._num_in_region = Recomputation(run), 0
        self._num_saved_when_connected = self._num_saved
        try:
            return region(x)
        finally:
            self._region = None
            num_saved = self._num_saved - saved_before

    def _kept_input(self, x: Tensor) -> Tensor:
        """A region's input, or, where inputs go to the host, what stands for it."""
        kept = self.save(x, checkpointed=True)
        self._num_saved -= 1
        packed, self._to_be_sent = self._to_be_sent, []
        if self.offloader is None or not packed:
            return x
        self.offloader.send(packed)
        kept.node, kept.index = x.node, x.index
        return kept

    def _compute_again(
        self, region: Callable[[Tensor], Tensor], x: Tensor, *, stop_after: int
    ) -> list[Backward | None]:
        backwards: list[Backward | None] = []
        self._again, self._num_saved, self._stop_after = backwards, 0, stop_after
        try:
            region(x)
        finally:
            self._again = self._stop_after = None
        return backwards

    def _checkpoint_reentrant(self, region: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The region is differentiated by an engine of its own, which holds input, output and incoming gradient."""
        with self.no_grad():
            out = region(x)
        kept = self.save(x, checkpointed=True)

        def backward(grad: Tensor) -> Gradients:
            inner = self.as_leaf(kept.detached())
            output = region(inner)
            self.backward(output, grad)
            return (inner.node.grad if isinstance(inner.node, Leaf) else None,)

        return self.connect(out, (x,), backward)

    @property
    def _stopped(self) -> bool:
        return self._stop_after is not None and self._num_saved >= self._stop_after

    # --- the engine -------------------------------------------------------------------------------------------------

    def backward(self, root: Tensor, grad: Tensor) -> None:
        """Differentiate ``root``, whose gradient is ``grad``; leaves have theirs afterwards."""
        if root.node is None:
            raise ValueError("the root requires no gradient: nothing is trained")
        before = self.phase
        engine = _Engine(self)
        engine.start(root, grad)
        del grad
        self.num_engines += 1
        engine.run()
        self.num_engines -= 1
        self.phase = before
        if self.offloader is not None and not self.num_engines:
            self.offloader.settle()


class _Engine:
    """One run of backward."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._pending: Counter[Node] = Counter()
        self._buffers: dict[Node, list[Tensor | None]] = {}
        self._ready: list[tuple[int, int, Node]] = []
        self._ticket = 0

    def start(self, root: Tensor, grad: Tensor) -> None:
        node = root.node
        assert node is not None
        self._explore(node)
        self._buffers[node] = [None] * node.num_outputs
        self._buffers[node][root.index] = grad
        self._push(node)

    def run(self) -> None:
        while self._ready:
            node = heapq.heappop(self._ready)[2]
            self.tape.phase = "backward" if node.phase == "forward" else node.phase
            if isinstance(node, Leaf):
                node.accumulate(*self._buffers.pop(node))
                if self.tape.on_gradient is not None:
                    self.tape.on_gradient(node)
            else:
                self._execute(node)

    def _explore(self, root: Node) -> None:
        """Count how many nodes each node waits for."""
        stack, known = [root], {root}
        while stack:
            for edge in stack.pop().inputs:
                if edge is not None:
                    self._pending[edge.node] += 1
                    if edge.node not in known:
                        known.add(edge.node)
                        stack.append(edge.node)

    def _execute(self, node: Node) -> None:
        run, recomputation = node.backward, None
        if node.place is not None:
            recomputation, index = node.place
            node.place = None
            run = recomputation.take(index)
        if run is None:
            raise RuntimeError("backward runs a second time over the same graph")
        incoming = self._buffers.pop(node)
        packed, node.packed = node.packed, []
        offloader = self.tape.offloader if packed else None
        earlier = 0 if offloader is None else offloader.bring_back(packed)
        grads = run(*incoming)
        if offloader is not None:
            offloader.done_with(packed, earlier)
        outputs = [self._fitted(grad, edge) for grad, edge in zip(grads, node.inputs, strict=True)]
        del grads, run, incoming
        node.backward = recomputation = None
        for edge in reversed(node.inputs):
            grad = outputs.pop()
            if edge is not None:
                self._deliver(edge, grad)

    def _fitted(self, grad: Tensor | None, edge: Edge | None) -> Tensor | None:
        """Summed over what was broadcast, and cast, to the shape and type of the input."""
        if grad is None or edge is None:
            return None
        category = GRADIENTS if isinstance(edge.node, Leaf) else TEMPORARIES
        if grad.numel > edge.numel:
            grad = self.tape.new(edge.numel, grad.itemsize, category)
        if grad.itemsize != edge.itemsize:
            grad = self.tape.new(edge.numel, edge.itemsize, category)
        return grad

    def _deliver(self, edge: Edge, grad: Tensor | None) -> None:
        node = edge.node
        if grad is not None:
            buffer = self._buffers.setdefault(node, [None] * node.num_outputs)
            held = buffer[edge.index]
            buffer[edge.index] = None
            buffer[edge.index] = grad if held is None else self._sum(held)
        self._pending[node] -= 1
        if not self._pending[node] and node in self._buffers:
            self._push(node)

    def _sum(self, held: Tensor) -> Tensor:
        alone = sys.getrefcount(held.storage) <= _REFERENCES_OF_ONE_HOLDER
        if self.tape.sums_in_place and alone and held.storage.num_bytes == held.numel * held.itemsize:
            return held
        return self.tape.like(held, TEMPORARIES)

    def _push(self, node: Node) -> None:
        self._ticket += 1
        heapq.heappush(self._ready, (-node.sequence, self._ticket, node))
