"""Activations on their way to the host and back, on the tape, as :mod:`meft.planner.terms.offload` describes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from meft.planner.simulation.autograd import Packed, Storage, Tape, Tensor
from meft.planner.simulation.stream import HostTraffic
from meft.planner.terms.offload import HostCopies, Offloading

OFFLOADED = "offloaded_activations"


class HostOffloader:
    """What is on the device when it is made are weights."""

    def __init__(self, tape: Tape, how: Offloading) -> None:
        self.tape, self.how, self.copies = tape, how, HostCopies(how.pinned)
        self.paused = False
        self._last_weight = tape.new(0, 1, OFFLOADED).storage.number
        self._ticket = 0
        self._nowhere = Storage(tape, 0, 0)
        self._stash: dict[int, Storage] = {}
        self._in_flight: list[Storage] = []

    def takes(self, tensor: Tensor, *, checkpointed: bool, in_backward: bool) -> bool:
        """Whether this tensor goes: neither what is too small nor what is on its way already."""
        how = self.how
        self._ticket += 1
        if self.paused or (in_backward and not how.in_backward) or (how.checkpoints_only and not checkpointed):
            return False
        if tensor.storage.number <= self._last_weight and not how.takes_weights:
            return False
        return tensor.numel * tensor.itemsize >= how.least_bytes and tensor.storage not in self._stash.values()

    def send(self, tensors: list[Packed]) -> None:
        """They go, and leave the device once nothing else holds them and newer ones have gone."""
        for tensor in tensors:
            for ticket in [each for each in self._stash if each <= self._ticket - self.how.stash]:
                del self._stash[ticket]
            tensor.ticket = self._ticket
            self.copies.sent(tensor.numel * tensor.itemsize)
            if self.how.stash:
                self._stash[tensor.ticket] = tensor.storage
            tensor.storage = self._nowhere

    def bring_back(self, tensors: list[Packed]) -> int:
        """They are on the device, on a stream of their own where copies overlap. Gives how many of earlier nodes go
        once this one has run: none within a reentrant checkpoint's engine, whose nodes are not told apart."""
        earlier = 0 if self.tape.num_engines > 1 else len(self._in_flight)
        for tensor in tensors:
            stashed = self._stash.get(tensor.ticket)
            self.copies.returned(tensor.numel * tensor.itemsize, over_link=stashed is None)
            tensor.storage = stashed or self._again(tensor)
            if self.how.overlaps and stashed is None:
                self._in_flight.append(tensor.storage)
        return earlier

    def _again(self, tensor: Packed) -> Storage:
        return self.tape.new(tensor.numel, tensor.itemsize, OFFLOADED, stream=int(self.how.overlaps)).storage

    def done_with(self, tensors: list[Packed], earlier: int) -> None:
        """The node has run; where copies overlap its tensors stay until the next one has."""
        if self.how.overlaps:
            self._stash.clear()
            del self._in_flight[:earlier]
        for tensor in tensors:
            tensor.storage = self._nowhere

    def settle(self) -> None:
        """Backward is over."""
        self._stash.clear()
        self._in_flight = []

    def traffic(self) -> HostTraffic:
        """Of the last micro-batch."""
        copies = self.copies
        return HostTraffic(copies.peak_bytes, copies.d2h_bytes, copies.h2d_bytes, copies.num_copies)


@contextmanager
def in_head(tape: Tape) -> Iterator[None]:
    """Inside runs the head, which some ways leave alone."""
    offloader = tape.offloader if isinstance(tape.offloader, HostOffloader) else None
    if offloader is None or offloader.how.takes_head:
        yield
        return
    offloader.paused = True
    yield
    offloader.paused = False
