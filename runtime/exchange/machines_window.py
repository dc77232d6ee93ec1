"""The window of ranks on several machines, each of which has all rows: what crosses the network, and when.

A machine's owners divide their rows among the machines: rank ``i`` of machine ``m`` adds up part ``m`` of the range
that is rank ``i``'s on every machine. After each message it sends its *mates* (the ranks ``i`` of the other machines)
what the machine's landings hold of their parts, and adds what they send to its own, in the order of all ranks: machine
by machine, rank by rank. So sums are again equal bit for bit to those of one rank with all micro-batches.

When a window's last gradients of a layer are added, each sends its mates the rows of its part that were touched, and
their sums: a sparse all-gather, after which every machine has all sums. Norm and update are each machine's own, and so
the same on all; rows, moments and counts never cross.

Adding each machine's rows first and the machines' sums then would send less where a window is many micro-batches long;
but floating-point sums depend on how they are grouped, and nothing would equal one rank any more.

Letters: ``M`` machines, ``N`` ranks on each, ``L`` layers, ``D`` hidden size, ``C`` the largest part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from meft.runtime.device.engine import Copy
from meft.runtime.device.lanes import Job
from meft.runtime.exchange.router_sums import RouterSums
from meft.runtime.exchange.shared_window import SharedWindow, parts_within
from meft.runtime.ranks.machines import About, Network


@dataclass
class Crossing:
    """Rows of messages on their way to mates, and from them. ``counts`` are int64 ``[M, N]``: of a machine's ranks."""

    sent_rows: torch.Tensor
    """int64 ``[(M-1) * N * min(cap, C)]``."""
    sent: torch.Tensor
    """``[(M-1) * N * min(cap, C), 2D]`` in the adapter's dtype."""
    rows: torch.Tensor
    gradients: torch.Tensor
    counts: torch.Tensor
    """Of what came."""

    @classmethod
    def make(cls, length: int, *, width: int, dtype: torch.dtype, shape: tuple[int, int]) -> Crossing:
        """Room for ``length`` rows each way."""
        sent_rows, rows = (torch.empty(length, dtype=torch.int64) for _ in range(2))
        sent, gradients = (torch.empty(length, width, dtype=dtype) for _ in range(2))
        return cls(sent_rows, sent, rows, gradients, torch.zeros(shape, dtype=torch.int64))

    def tables(self) -> Iterator[torch.Tensor]:
        """Those that take memory."""
        yield from (self.sent_rows, self.sent, self.rows, self.gradients)

    def from_machine(self, machine: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and gradients that came of a rank's message."""
        numbers = self.counts.flatten()
        place = machine * self.counts.shape[1] + rank
        first = int(numbers[:place].sum())
        part = slice(first, first + int(numbers[place]))
        return self.rows[part], self.gradients[part]


@dataclass
class MachinesWindow(SharedWindow):
    """A :class:`SharedWindow` whose sums are those of all machines' ranks."""

    network: Network = field(kw_only=True)
    foreign_rows: list[int] = field(init=False)
    """By layer: rows of this rank's messages that another machine adds up."""
    summed_rows: list[int] = field(init=False)
    """By layer: touched rows of this rank's part, over all windows."""
    _shared: set[int] = field(default_factory=set)
    """Layers whose sums every machine has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        num_layers, network, landing = len(self.state.layers), self.network, self.slots[0].buffer
        self._parts = self._parts_of(self.peers.local)
        self.adds = self._parts[network.machine]
        machines, ranks, width = network.machines, self.peers.here, landing.shape[1]
        largest = -(-self.store.adapter_width // (machines * ranks))
        length = (machines - 1) * ranks * min(self.decision.active_rows_cap, largest)
        self._crossings = [
            Crossing.make(length, width=width, dtype=landing.dtype, shape=(machines, ranks)) for _ in self.slots
        ]
        self._make_room_for_sums((machines - 1) * largest)
        self._added_at: list[Job | None] = [None] * len(self.slots)
        parts = [part for rank in range(ranks) for part in self._parts_of(rank)]
        self._starts = torch.tensor([part.start for part in parts])
        self.foreign_rows, self.summed_rows = [0] * num_layers, [0] * num_layers

    def _make_room_for_sums(self, length: int) -> None:
        """For so many rows' each way."""
        shape = (self.network.machines, 1)
        self._sums = Crossing.make(length, width=2 * self.store.hidden_size, dtype=self.store.dtype, shape=shape)

    def _room_for_sums(self) -> Iterator[torch.Tensor]:
        """What :meth:`_make_room_for_sums` made."""
        yield from self._sums.tables()

    def _parts_of(self, rank: int) -> list[range]:
        """By machine: the rows that its rank ``rank`` adds up."""
        return self.peers.by_machine(self.peers.share_of(self.store.adapter_width, rank))

    # --- messages -------------------------------------------------------------------------------------------------

    def _bring(self, layer: int, place: int, arrived: Job) -> Job:
        """Exchange with the mates, once the buffers' last content is added."""
        self._shared.discard(layer)

        def exchange() -> None:
            self._exchange_message(layer, place)

        jobs = (arrived, self._added_at[place])
        return self.host.job(f"exchange gradients {layer}", exchange, after=jobs, lane="network")

    def _exchange(
        self, layer: int, rows: torch.Tensor, number: int, place: int, copy: Copy, *, after: Job | None
    ) -> None:
        super()._exchange(layer, rows, number, place, copy, after=after)
        self._added_at[place] = self._last_added

    def _exchange_message(self, layer: int, place: int) -> None:
        crossing, network = self._crossings[place], self.network
        counts = torch.zeros_like(crossing.counts)
        end = 0
        for machine in network.others:
            for rank in range(self.peers.here):
                rows, gradients = self._message(rank, place)
                for part in parts_within(rows, self._parts[machine]):
                    some = slice(end, end := end + part.stop - part.start)
                    crossing.sent_rows[some], crossing.sent[some] = rows[part], gradients[part]
                    counts[machine, rank] += part.stop - part.start
        self._note_foreign(layer, place)
        self._swap(crossing, counts, About("row_gradients", "step", self.engine.schedule.ended))

    def _note_foreign(self, layer: int, place: int) -> None:
        """Of the own message, count the rows that other machines add up, whichever of their ranks does."""
        rows, _ = self._message(self.peers.local, place)
        part = torch.searchsorted(self._starts, rows, right=True) - 1
        self.foreign_rows[layer] += int((part % self.network.machines != self.network.machine).sum())

    def _swap(self, crossing: Crossing, counts: torch.Tensor, about: About) -> None:
        """Tell mates how many rows come, of which ranks, and send them."""
        network, lengths = self.network, counts.sum(1).tolist()
        crossing.counts = network.tell(counts, about)
        expected = crossing.counts.sum(1).tolist()
        network.swap(crossing.sent_rows, crossing.rows, about, counts=lengths, expected=expected)
        network.swap(crossing.sent, crossing.gradients, about, counts=lengths, expected=expected)

    def _add_all(self, layer: int, place: int) -> None:
        for machine in range(self.network.machines):
            for rank in range(self.peers.here):
                if machine == self.network.machine:
                    self._add(layer, rank, place)
                    continue
                rows, gradients = self._crossings[place].from_machine(machine, rank)
                if rows.shape[0]:
                    self.store.accumulate(layer, rows, gradients)

    # --- the end of a window --------------------------------------------------------------------------------------

    def send_sums(self, layer: int) -> None:
        """See :class:`GradientWindow`; with it the layer's sums are complete, and go to the other machines."""
        super().send_sums(layer)
        self._share_sums(layer)

    def squared_norm(self, layer: int) -> Job:
        """See :class:`GradientWindow`: over all machines' rows."""
        self._share_sums(layer)
        return super().squared_norm(layer)

    def _share_sums(self, layer: int) -> None:
        """Give every machine the layer's sums, unless it has them."""
        if layer in self._shared:
            return
        self._shared.add(layer)

        def share() -> None:
            self._exchange_sums(layer)

        jobs = (self._accumulated[layer],)
        self._accumulated[layer] = self.host.job(f"exchange sums {layer}", share, after=jobs, lane="network")

    def _exchange_sums(self, layer: int) -> None:
        tables, sums, network, own = self.store.layers[layer], self._sums, self.network, self.adds
        touched = tables.touched[own.start : own.stop].nonzero().flatten().add_(own.start)
        length = touched.shape[0]
        counts = torch.zeros_like(sums.counts)
        for copy, machine in enumerate(network.others):
            some = slice(copy * length, (copy + 1) * length)
            sums.sent_rows[some] = touched
            torch.index_select(tables.gradients, 0, touched, out=sums.sent[some])
            counts[machine] = length
        self.summed_rows[layer] += length
        self._swap(sums, counts, About("row_sums", "optimizer_step", self.engine.schedule.ended))
        for machine in network.others:
            rows, gradients = sums.from_machine(machine, 0)
            tables.gradients[rows] = gradients
            tables.touched[rows] = True

    # --- what is asked beside the steps ---------------------------------------------------------------------------

    def own_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See :class:`SharedWindow`."""
        yield from super().own_buffers()
        for crossing in self._crossings:
            for table in crossing.tables():
                yield "network_buffers", table
        for table in self._room_for_sums():
            yield "network_buffers", table

    def crossed(self) -> dict[str, list[int]]:
        """Rows that crossed so far, by kind and layer."""
        return {"foreign_total": self.foreign_rows, "summed_total": self.summed_rows}


class MachinesRouterSums(RouterSums):
    """:class:`RouterSums` of several machines: numbers cross as rows do, all of them, as routers are small."""

    def __init__(self, network: Network, *parts: Any) -> None:
        super().__init__(*parts)
        self._network = network
        self._parts = self._peers.by_machine(self.adds)
        self.adds = self._parts[network.machine]
        self._lengths = [len(part) if machine != network.machine else 0 for machine, part in enumerate(self._parts)]
        self._expected = [len(self.adds) * (machine != network.machine) for machine in range(network.machines)]
        ranks, others = self._peers.here, len(network.others)
        largest = -(-self._sums.numel() // (ranks * network.machines))
        self._sent, self._received = (torch.zeros(others * ranks * largest) for _ in range(2))
        self._sent_sums, self._received_sums = (torch.zeros(others * largest) for _ in range(2))
        self._there = torch.zeros(network.machines, ranks, dtype=torch.int64)
        """Which ranks of the other machines had a micro-batch."""
        self._spread = self._peers.counts()

    def _bring(self, arrived: Job) -> Job:
        jobs = (arrived, self._last_added)
        return self._host.job("exchange router", self._exchange, after=jobs, lane="network")

    def _exchange(self) -> None:
        network, ranks = self._network, self._peers.here
        about = About("router_gradients", "step", self._engine.schedule.ended)
        end = 0
        for machine in network.others:
            part = self._parts[machine]
            for landing in self._landings:
                self._sent[end : end + len(part)] = landing.view(-1)[part.start : part.stop]
                end += len(part)
        self._there = network.tell(self._took_part.expand(network.machines, ranks), about)
        counts, expected = ([ranks * length for length in each] for each in (self._lengths, self._expected))
        network.swap(self._sent, self._received, about, counts=counts, expected=expected)

    def _all_numbers(self) -> Iterator[torch.Tensor]:
        came = iter(self._received.split(max(len(self.adds), 1)))
        for machine, there in enumerate(self._there.tolist()):
            if machine == self._network.machine:
                yield from super()._all_numbers()
                continue
            for took_part in there:
                numbers = next(came)[: len(self.adds)]
                if took_part:
                    yield numbers

    def _complete(self) -> Job:
        number = self._windows + 1

        def spread() -> None:
            self._exchange_sums()
            self._spread.publish(number)

        self._host.job("exchange router sums", spread, after=(self._last_added,), lane="network")
        return self._waits.until("router sums", lambda: self._spread.reached(number))

    def _exchange_sums(self) -> None:
        """Give the mates the sums of the own part, and take theirs."""
        network, sums, own = self._network, self._sums.view(-1), self.adds
        for copy in range(len(network.others)):
            self._sent_sums[copy * len(own) : (copy + 1) * len(own)] = sums[own.start : own.stop]
        about = About("router_sums", "optimizer_step", self._engine.schedule.ended)
        network.swap(self._sent_sums, self._received_sums, about, counts=self._expected, expected=self._lengths)
        start = 0
        for machine in network.others:
            part = self._parts[machine]
            sums[part.start : part.stop] = self._received_sums[start : (start := start + len(part))]

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See :class:`RouterSums`."""
        yield from super().named_buffers()
        for buffer in (self._sent, self._received, self._sent_sums, self._received_sums):
            yield "network_buffers", buffer
