"""Router gradients of several ranks, summed in one order.

They are summed as row gradients are (:mod:`meft.runtime.exchange.shared_window`): after each micro-batch they go to the
host, where each rank adds its share of all ranks' numbers, in their order; at the window's end the sums come to every
device. An all-reduce on the devices would be shorter and would add in an order of its own.

Letters: ``N`` ranks, ``L`` layers, ``E`` experts, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from meft.runtime.device.engine import Copy, TransferEngine
from meft.runtime.device.lanes import SOON, Job
from meft.runtime.exchange.host_side import HostSide
from meft.runtime.exchange.shared_window import Waits
from meft.runtime.ranks.peers import Peers


class RouterSums:
    """One window after the other. ``weights`` are the routers, ``[E, D]`` each, with gradients that exist already."""

    def __init__(self, peers: Peers, engine: TransferEngine, host: HostSide, weights: list[torch.nn.Parameter]) -> None:
        self._peers, self._engine, self._host, self._weights = peers, engine, host, weights
        self._waits = Waits(peers, engine.schedule)
        shape = (len(weights), *weights[0].shape)
        self._landings = [peers.zeros(shape, torch.float32) for _ in range(peers.here)]
        self._sums = peers.zeros(shape, torch.float32)
        self._took_part = peers.zeros((peers.here,), torch.int64)
        self._landed, self._added, self._read = peers.counts(), peers.counts(), peers.counts()
        self.adds = peers.share_of(self._sums.numel())
        """Numbers that this rank adds up."""
        self._rounds = self._windows = 0
        self._first = True
        """No micro-batch of this window has come yet."""
        self._copies: list[Copy] = []
        self._last_added: Job | None = None
        for table in (self._landings[peers.local], self._sums):
            engine.pin(table)

    def begin(self) -> None:
        """Before a micro-batch's backward: its gradients alone are wanted. Inside the device's scope."""
        for copy in self._copies:
            copy.wait_on_device()
        with torch.no_grad():
            for weight in self._weights:
                assert weight.grad is not None
                weight.grad.zero_()

    def send(self, *, took_part: bool) -> None:
        """After a backward: send this micro-batch's gradients, if there was one, and add up everyone's."""
        number, rank, is_first = self._rounds, self._peers.local, self._first
        self._rounds, self._first = number + 1, False
        free = self._waits.until("router landing", lambda: self._added.reached(number))
        self._copies = [self._send_layer(layer, free) for layer in range(len(self._weights))] if took_part else []
        copies, windows = self._copies, self._windows

        def publish() -> None:
            for copy in copies:
                copy.wait_on_host()
            self._took_part[rank] = took_part
            self._landed.publish(number + 1)

        def add() -> None:
            own = slice(self.adds.start, self.adds.stop)
            sums = self._sums.view(-1)[own]
            if is_first:
                sums.zero_()
            for numbers in self._all_numbers():
                sums.add_(numbers)
            self._added.publish(number + 1)

        jobs = (free, *(copy.job for copy in copies))
        self._host.job("publish router", publish, after=jobs, urgency=SOON)
        arrived = self._waits.until("router gradients", lambda: self._landed.reached(number + 1))
        brought = self._bring(arrived)
        unread = self._waits.until("router sums", lambda: self._read.reached(windows))
        self._last_added = self._host.job("add router", add, after=(brought, unread, self._last_added), urgency=SOON)

    def collect(self) -> None:
        """At the window's end: the sums become each device's gradients. Inside the device's scope."""
        complete = self._complete()
        for copy in self._copies:
            copy.wait_on_device()
        point = self._engine.mark()
        copies = [
            self._engine.copy(
                "h2d",
                lambda layer=layer, weight=weight: (self._sums[layer], weight.grad),  # type: ignore[misc]
                category="router_gradients",
                name=f"router gradients {layer}",
                point=point,
                after=(complete,),
            )
            for layer, weight in enumerate(self._weights)
        ]
        for copy in copies:
            copy.wait_on_device()
            copy.wait_on_host()
        self._windows += 1
        self._first, self._copies = True, []
        self._read.publish(self._windows)

    def _bring(self, arrived: Job) -> Job:
        """What must be over before all ranks' numbers can be added: the machine's have ``arrived``."""
        return arrived

    def _all_numbers(self) -> Iterator[torch.Tensor]:
        """Of every rank that had a micro-batch, in their order, the numbers that this one adds up."""
        own = slice(self.adds.start, self.adds.stop)
        for rank, took_part in enumerate(self._took_part.tolist()):
            if took_part:
                yield self._landings[rank].view(-1)[own]

    def _complete(self) -> Job:
        """Waits until the window's sums are there, whoever added them up."""
        number = self._rounds
        return self._waits.until("router sums", lambda: self._added.reached(number))

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's own landing."""
        yield "router_landing", self._landings[self._peers.local]

    def named_tables(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What all ranks share."""
        yield "router_sums", self._sums

    def _send_layer(self, layer: int, free: Job) -> Copy:
        gradient, landing = self._weights[layer].grad, self._landings[self._peers.local][layer]
        assert gradient is not None
        return self._engine.copy(
            "d2h",
            lambda: (gradient, landing),
            category="router_gradients",
            name=f"router gradients {layer}",
            point=self._engine.mark(),
            after=(free,),
        )
