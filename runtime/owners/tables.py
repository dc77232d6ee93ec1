"""All machines' rows in one place, a table at a time: for what rank 0 saves and reports of rows that machines own.

Rank 0 asks for a layer's table and gets the others' parts in pieces of :data:`PIECE_BYTES`, in the order of machines,
which is that of rows; so no machine ever has room for more than its own. Files hold what they hold of one machine.

Letters: ``M`` machines, ``R`` adapter rows per layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

from meft.planner.records.plan import Decision
from meft.runtime.host.store import CHUNK_BYTES, HostStore
from meft.runtime.ranks.machines import Leaders
from meft.runtime.ranks.peers import Peers

T = TypeVar("T")

PIECE_BYTES = CHUNK_BYTES
TABLES = {"rows": "weights"} | {name: name for name in ("first_moment", "second_moment", "step_counts")}
"""What is saved of a layer, by its name in files."""
_OF_ROWS = re.compile(rf"layers\.(\d+)\.({'|'.join(TABLES)})")
_DONE = -1


def rows_of(decision: Decision, peers: Peers | None) -> tuple[range | None, range | None]:
    """The rows that a machine has, where not all, and of them those that this rank adds up and updates."""
    if peers is None:
        return None, None
    if decision.rows == "replicated":
        return None, peers.share_of(decision.adapter_width)
    held = peers.by_machine(range(decision.adapter_width))[peers.machine]
    return held, peers.own_rows_of(decision.adapter_width, peers.local)[peers.machine]


class OwnedTables:
    """One machine's part of it; ``leaders`` are None in all but a machine's first rank."""

    def __init__(self, store: HostStore, leaders: Leaders | None, parts: list[range]) -> None:
        self._store, self._leaders, self._parts = store, leaders, parts

    @classmethod
    def of(cls, decision: Decision, store: HostStore, peers: Peers | None) -> OwnedTables | None:
        """Of a run whose machines own rows; None of any other."""
        if peers is None or peers.machines == 1 or decision.rows != "owned":
            return None
        return cls(store, peers.leaders, peers.by_machine(range(decision.adapter_width)))

    def at_first(self, work: Callable[[], T], *, machine: int) -> T | None:
        """Do ``work`` at rank 0, which can have :meth:`pieces` meanwhile; elsewhere give them, and None in the end."""
        if self._leaders is None:
            return None
        if machine:
            self._give(self._leaders)
            return None
        try:
            return work()
        finally:
            self._leaders.tell(torch.tensor([_DONE, 0]))

    def shape_of(self, name: str, tensor: torch.Tensor) -> tuple[int, ...] | None:
        """Of a saved tensor the shape over all machines; None where this machine has all of it."""
        return (self._store.adapter_width, *tensor.shape[1:]) if _OF_ROWS.fullmatch(name) else None

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """At rank 0: a table of all rows, by the name that files have for it, piece after piece."""
        found, leaders = _OF_ROWS.fullmatch(name), self._leaders
        assert found is not None
        assert leaders is not None
        layer, place = int(found[1]), list(TABLES).index(found[2])
        own = self._table(place, layer)
        leaders.tell(torch.tensor([place, layer]))
        yield own
        for machine, part in enumerate(self._parts[1:], start=1):
            for rows in _pieces_of(len(part), own):
                piece = torch.empty(len(rows), *own.shape[1:], dtype=own.dtype)
                leaders.receive(piece, machine)
                yield piece

    def own_parts(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of tensors as files have them: the machine's own rows, and what else there is."""
        held, width = self._store.held, self._store.adapter_width
        return {
            name: tensor[held.start : held.stop] if _OF_ROWS.fullmatch(name) and len(tensor) == width else tensor
            for name, tensor in tensors.items()
        }

    def _give(self, leaders: Leaders) -> None:
        """Send what rank 0 asks for, until it asks no more."""
        while True:
            place, layer = leaders.tell(torch.empty(2, dtype=torch.int64)).tolist()
            if place == _DONE:
                return
            own = self._table(place, layer)
            for rows in _pieces_of(len(own), own):
                leaders.send(own[rows.start : rows.stop])

    def _table(self, place: int, layer: int) -> torch.Tensor:
        table: torch.Tensor = getattr(self._store.layers[layer], list(TABLES.values())[place])
        return table


def _pieces_of(count: int, table: torch.Tensor) -> Iterator[range]:
    """``count`` rows like those of ``table``, so many at a time that they are small."""
    row_bytes = table.element_size() * math.prod(table.shape[1:])
    each = max(1, PIECE_BYTES // row_bytes)
    yield from (range(first, min(first + each, count)) for first in range(0, count, each))
