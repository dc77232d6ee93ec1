"""The window of several ranks: their row gradients are summed in one order, by whoever owns the rows.

A rank owns a contiguous range of each layer's rows. The micro-batches of a window go round: rank ``r`` of ``N`` takes
``r, r + N, ...``. Row gradients land in host memory that all ranks share, a *message* per layer and micro-batch (and
per part of the sums that a window's end sends), with the rows they are of. Once message ``m`` of every rank has landed,
each owner adds the parts that fall into its range, in the order of ranks: which is the order in which one rank alone,
with all micro-batches, would have added them. So sums, and all that follows, are equal bit for bit, and no timing
changes them. A buffer takes the next message when every owner has added the last.

Every rank sends the same messages in the same order; one that has nothing to say sends an empty one.

The norm for clipping is a sum over rows, exact before it is rounded (``math.fsum``), so it is the same too: owners
write their rows' squares, and layer ``l`` is summed up by rank ``l mod N``. Rows are updated by their owner, and
whoever gathers from a layer next waits for all owners.

On several machines each has all of that, and what lies between them is in
:mod:`meft.runtime.exchange.machines_window`.

Letters: ``N`` ranks of a machine, ``L`` layers, ``R`` adapter rows per layer, ``D`` hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from meft.runtime.device.engine import COPY_DONE, Copy, TransferEngine
from meft.runtime.device.lanes import SOON, Job, Schedule
from meft.runtime.exchange.gradient_window import GradientWindow
from meft.runtime.host.optimizer import AdamWSettings
from meft.runtime.ranks.ordered import Counts
from meft.runtime.ranks.peers import Peers


@dataclass
class SharedLandings:
    """Where row gradients of all ranks land. Lists are by rank, then by slot."""

    gradients: list[list[torch.Tensor]]
    """``[cap, 2D]`` in the adapter's dtype."""
    rows: list[list[torch.Tensor]]
    """int64 ``[cap]``: which rows they are of."""
    lengths: torch.Tensor
    """int64 ``[N, slots]``: how many."""
    landed: Counts
    """How many messages of a rank are there."""
    added: Counts
    """How many of all ranks' messages a rank has added to its rows."""

    @classmethod
    def make(
        cls, peers: Peers, engine: TransferEngine, *, slots: int, shape: tuple[int, int], dtype: torch.dtype
    ) -> SharedLandings:
        """Buffers for ``shape = (cap, 2D)``; in every rank in the same order."""
        ranks = range(peers.here)
        gradients = [[peers.zeros(shape, dtype) for _ in range(slots)] for _ in ranks]
        rows = [[peers.zeros(shape[:1], torch.int64) for _ in range(slots)] for _ in ranks]
        for buffer in gradients[peers.local]:
            engine.pin(buffer)
        lengths = peers.zeros((peers.here, slots), torch.int64)
        return cls(gradients, rows, lengths, peers.counts(), peers.counts())


class Waits:
    """Jobs that wait for the other ranks, on their own lane."""

    def __init__(self, peers: Peers, schedule: Schedule) -> None:
        self._peers, self._schedule = peers, schedule

    def until(self, name: str, ready: Callable[[], bool], *, after: tuple[Job, ...] = ()) -> Job:
        """A job that is over when ``ready()``."""

        def work() -> None:
            self._peers.wait(ready, ended=self._schedule.ended)

        return self._schedule.submit("peers", name, work, after=after)


@dataclass
class SharedWindow(GradientWindow):
    """A :class:`GradientWindow` whose sums are those of all ranks. ``slots`` land in the rank's own landings."""

    peers: Peers = field(kw_only=True)
    landings: SharedLandings = field(kw_only=True)
    _squares: list[torch.Tensor] = field(init=False)
    """Per layer fp64 ``[R]``: of each row's gradient in this window the sum of squares."""
    _totals: torch.Tensor = field(init=False)
    """fp64 ``[L]``: their sums."""
    adds: range = field(init=False)
    """Rows whose gradients this rank adds up."""
    _last_added: Job | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        peers, num_layers = self.peers, len(self.state.layers)
        self.adds = self.store.own_rows
        self._waits = Waits(peers, self.engine.schedule)
        self._squares = [peers.zeros((self.store.adapter_width,), torch.float64) for _ in range(num_layers)]
        self._totals = peers.zeros((num_layers,), torch.float64)
        self._normed, self._totalled = peers.counts(num_layers), peers.counts(num_layers)
        self._updated = peers.counts(num_layers)
        self._norms, self._updates = [0] * num_layers, [0] * num_layers

    # --- gradients ------------------------------------------------------------------------------------------------

    def send_nothing(self, layer: int) -> None:
        """An empty message, where the others may have one."""
        number, place = self._turn, self._turn % len(self.slots)
        self._turn += 1
        self._exchange(layer, torch.empty(0, dtype=torch.int64), number, place, COPY_DONE, after=self._free(number))

    def send_sums(self, layer: int) -> None:
        """See :class:`GradientWindow`; always as many messages as the rows kept can need."""
        if not self.on_device.sums or layer in self._sums_sent:
            return
        before = self._turn
        super().send_sums(layer)
        messages = -(-self.decision.cached_rows // self.decision.active_rows_cap)
        for _ in range(messages - (self._turn - before)):
            self.send_nothing(layer)

    def _send_rows(
        self, layer: int, rows: torch.Tensor, first: int, *, name: str, category: str = "row_gradients"
    ) -> None:
        number, place, slot = self._turn, self._turn % len(self.slots), self._slot()
        slot.landing.readers = [self._free(number)]
        source, target = slot.buffer[first : first + rows.shape[0]], slot.landing.buffer[: rows.shape[0]]
        copy = self._leave(slot, source, target, category=category, name=name)
        self._exchange(layer, rows, number, place, copy, after=copy.job)

    def _free(self, number: int) -> Job:
        """Waits until every owner has added what the message's buffer last held."""
        landings, last = self.landings, number - len(self.slots) + 1
        return self._waits.until(f"landing {number}", lambda: landings.added.reached(last))

    def _exchange(
        self, layer: int, rows: torch.Tensor, number: int, place: int, copy: Copy, *, after: Job | None
    ) -> None:
        """Tell the others of a message that has landed, and add everyone's to the rows that are this rank's own."""
        landings, rank, count = self.landings, self.peers.local, rows.shape[0]

        def publish() -> None:
            copy.wait_on_host()
            landings.rows[rank][place][:count] = rows
            landings.lengths[rank, place] = count
            landings.landed.publish(number + 1)

        def accumulate() -> None:
            self._add_all(layer, place)
            landings.added.publish(number + 1)

        self.host.job(f"publish {layer}", publish, after=(after,), urgency=SOON)
        arrived = self._waits.until(f"gradients {layer}", lambda: landings.landed.reached(number + 1))
        brought = self._bring(layer, place, arrived)
        jobs = (brought, self._last_added, self._accumulated[layer], self.state.updated[layer])
        job = self.host.job(f"accumulate {layer}", accumulate, after=jobs, urgency=SOON)
        self._last_added = self._accumulated[layer] = job

    def _bring(self, layer: int, place: int, arrived: Job) -> Job:
        """What must be over before all ranks' messages can be added: the machine's have ``arrived``."""
        del layer, place
        return arrived

    def _add_all(self, layer: int, place: int) -> None:
        """Add every rank's message, in their order."""
        for rank in range(self.peers.here):
            self._add(layer, rank, place)

    def _add(self, layer: int, rank: int, place: int) -> None:
        """Add what the message of one of the machine's ranks holds of own rows."""
        rows, gradients = self._message(rank, place)
        for part in parts_within(rows, self.adds):
            self.store.accumulate(layer, rows[part], gradients[part])

    def _message(self, rank: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of a message and their gradients, where they landed."""
        landings = self.landings
        count = int(landings.lengths[rank, place])
        return landings.rows[rank][place][:count], landings.gradients[rank][place][:count]

    # --- the end of a window --------------------------------------------------------------------------------------

    def squared_norm(self, layer: int) -> Job:
        """See :class:`GradientWindow`: over all ranks' rows."""
        self._norms[layer] += 1
        number, peers, squares, own = self._norms[layer], self.peers, self._squares[layer], self.store.own_rows
        sums_up = layer % peers.here

        def square() -> None:
            squares[own.start : own.stop] = 0.0
            rows, of_rows = self.store.squares_of(layer)
            squares[rows] = of_rows

        def publish() -> None:
            self._normed.publish(number, layer)

        def sum_up() -> None:
            if peers.local == sums_up:
                self._totals[layer] = math.fsum(squares.numpy())
            self._totalled.publish(number, layer)

        mine = self._tell_squares(layer, square, publish)
        all_there = self._waits.until(f"squares {layer}", lambda: self._normed.reached(number, layer), after=(mine,))
        summed = self.host.job(f"gradient norm {layer}", sum_up, after=(all_there,))
        told = self._waits.until(f"norm {layer}", lambda: self._totalled.of(sums_up, layer) >= number, after=(summed,))
        return self.host.job(f"gradient norm {layer}", lambda: float(self._totals[layer]), after=(told,))

    def _tell_squares(self, layer: int, square: Callable[[], None], publish: Callable[[], None]) -> Job:
        """A job that takes the squares of own rows and tells the other ranks of them."""

        def work() -> None:
            square()
            publish()

        return self.host.job(f"gradient norm {layer}", work, after=(self._accumulated[layer],))

    def update(
        self,
        layer: int,
        settings: AdamWSettings,
        *,
        learning_rate: float,
        gradient_scale: float,
        after: tuple[Job, ...],
        unless: Callable[[], bool],
    ) -> Job:
        """See :class:`GradientWindow`: of own rows; who reads the layer's rows next waits for those of the others."""
        job = super().update(
            layer, settings, learning_rate=learning_rate, gradient_scale=gradient_scale, after=after, unless=unless
        )
        self._updates[layer] += 1
        number = self._updates[layer]
        told = self.host.job(f"publish rows {layer}", lambda: self._updated.publish(number, layer), after=(job,))
        self.state.updated[layer] = self._waits.until(
            f"rows {layer}", lambda: self._updated.reached(number, layer), after=(told,)
        )
        return job

    def own_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's buffers beside those of the slots, with their category."""
        for rows in self.landings.rows[self.peers.local]:
            yield "gradient_rows", rows

    def named_tables(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the machine's ranks share beside the store, with its categories."""
        for squares in self._squares:
            yield "row_squares", squares


def parts_within(rows: torch.Tensor, own: range) -> Iterator[slice]:
    """Where in ``rows`` (int64, a few ascending runs one after the other) those of the range ``own`` stand."""
    ends = [*((rows[1:] <= rows[:-1]).nonzero().flatten() + 1).tolist(), rows.shape[0]]
    limits = torch.tensor([own.start, own.stop])
    start = 0
    for end in ends:
        first, last = torch.searchsorted(rows[start:end], limits).tolist()
        if last > first:
            yield slice(start + first, start + last)
        start = end
