"""The window of machines that own rows: row gradients go to their owners, who alone update them.

Row gradients cross as they do where every machine has all rows (:mod:`meft.runtime.exchange.machines_window`), but who
adds a row up is who has it: rank ``i`` of machine ``m`` adds up, and updates, the ``i``-th part of the machine's own.
So no sums go back at the window's end, only fp64 squares for the norm, one number a row.

Letters: ``M`` machines, ``N`` ranks on each, ``C`` the largest part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from meft.runtime.device.lanes import Job
from meft.runtime.exchange.machines_window import MachinesWindow
from meft.runtime.ranks.machines import About


@dataclass
class OwnedWindow(MachinesWindow):
    """A :class:`MachinesWindow` of a store that holds its machine's rows alone."""

    def _make_room_for_sums(self, length: int) -> None:
        """For the squares of so many rows each way: fp64 ``[(M-1) * C]``."""
        self._squares_out, self._squares_in = (torch.zeros(length, dtype=torch.float64) for _ in range(2))

    def _room_for_sums(self) -> Iterator[torch.Tensor]:
        yield from (self._squares_out, self._squares_in)

    def _parts_of(self, rank: int) -> list[range]:
        """By machine: the part of its rows that its rank ``rank`` adds up."""
        return self.peers.own_rows_of(self.store.adapter_width, rank)

    def _note_foreign(self, layer: int, place: int) -> None:
        rows, held = self._message(self.peers.local, place)[0], self.store.held
        self.foreign_rows[layer] += int(((rows < held.start) | (rows >= held.stop)).sum())

    def _share_sums(self, layer: int) -> None:
        """They are where they are used."""

    def _tell_squares(self, layer: int, square: Callable[[], None], publish: Callable[[], None]) -> Job:
        """The mates' squares come too, before the machine's other ranks are told."""
        mine = self.host.job(f"gradient norm {layer}", square, after=(self._accumulated[layer],))

        def exchange() -> None:
            self._exchange_squares(layer)
            publish()

        return self.host.job(f"exchange squares {layer}", exchange, after=(mine,), lane="network")

    def _exchange_squares(self, layer: int) -> None:
        network, squares, own = self.network, self._squares[layer], self.adds
        for copy in range(len(network.others)):
            self._squares_out[copy * len(own) : (copy + 1) * len(own)] = squares[own.start : own.stop]
        away = [machine != network.machine for machine in range(network.machines)]
        counts, expected = (
            [there * len(own) for there in away],
            [there * len(part) for there, part in zip(away, self._parts, strict=True)],
        )
        about = About("row_squares", "optimizer_step", self.engine.schedule.ended)
        network.swap(self._squares_out, self._squares_in, about, counts=counts, expected=expected)
        start = 0
        for machine in network.others:
            part = self._parts[machine]
            squares[part.start : part.stop] = self._squares_in[start : (start := start + len(part))]

    def crossed(self) -> dict[str, list[int]]:
        """See :class:`MachinesWindow`."""
        return {"foreign_total": self.foreign_rows}
