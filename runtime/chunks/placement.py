"""Where the active rows of a chunk of tokens come from: the link, or the chunk before it.

Neighbouring chunks of a text activate many rows in common. In forward a chunk's rows that the chunk before it has too
are copied from that one's slot, and only the others travel; in backward, where chunks come in the opposite order, those
that the chunk *after* it has too. So that what travels is one slice either way, the rows of a chunk stand in the order

    next alone | neither | before alone | both        (which of the neighbours has the row too)

of which the first two travel in forward and the middle two in backward; within each they ascend.

Letters: ``A`` active rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from meft.runtime.exchange.row_cache import Placement


@dataclass(frozen=True)
class ChunkPlacement(Placement):
    """``missing`` rows travel in forward; ``hits`` are the places, in the slot of the chunk before, of all others."""

    first_again: int = 0
    last_again: int = 0
    """Rows from the one to the other travel again in backward; the others are in the next chunk's slot."""

    @property
    def num_again(self) -> int:
        """How many travel again, unless the chunk is still on the device."""
        return self.last_again - self.first_again

    def travelling(self, *, again: bool) -> slice:
        """See :class:`Placement`."""
        return slice(self.first_again, self.last_again) if again else slice(0, self.num_missing)


class ChunkPlacer(Protocol):
    """Orders the rows of a chunk by what its neighbours have."""

    def place(
        self, layer: int, rows: torch.Tensor, before: ChunkPlacement | None, after: torch.Tensor | None
    ) -> ChunkPlacement:
        """Place ``rows`` (int64, ascending); ``before`` is the chunk before, ``after`` the rows of the next, if any."""
        ...


class NeighbourPlacer:
    """The order above."""

    def place(
        self, layer: int, rows: torch.Tensor, before: ChunkPlacement | None, after: torch.Tensor | None
    ) -> ChunkPlacement:
        """See :class:`ChunkPlacer`."""
        del layer
        nobody = torch.zeros_like(rows, dtype=torch.bool)
        in_before = nobody if before is None else torch.isin(rows, before.rows)
        in_after = nobody if after is None else torch.isin(rows, after)
        parts = [
            rows[~in_before & in_after],
            rows[~in_before & ~in_after],
            rows[in_before & ~in_after],
            rows[in_before & in_after],
        ]
        ordered = torch.cat(parts)
        sizes = [part.shape[0] for part in parts]
        missing = sizes[0] + sizes[1]
        hits = torch.empty(0, dtype=torch.int32) if before is None else _places_of(ordered[missing:], before.rows)
        return ChunkPlacement(
            ordered, 0, missing, 0, hits, first_again=sizes[0], last_again=ordered.shape[0] - sizes[3]
        )


class PlannedPlacer:
    """The placer of a rehearsal: as many rows travel as the plan expects, by layer, whatever the rows are.

    ``rows`` are a chunk's, ``shared`` those that it has in common with a neighbour.
    """

    def __init__(self, *, shared: Sequence[int]) -> None:
        self._shared = tuple(shared)

    def place(
        self, layer: int, rows: torch.Tensor, before: ChunkPlacement | None, after: torch.Tensor | None
    ) -> ChunkPlacement:
        """See :class:`ChunkPlacer`."""
        count, shared = rows.shape[0], self._shared[layer]
        missing = count if before is None else count - shared
        again = count if after is None else count - shared
        hits = torch.zeros(count - missing, dtype=torch.int32)
        first = min(count - again, missing)
        return ChunkPlacement(rows, 0, missing, 0, hits, first_again=first, last_again=first + again)


def _places_of(rows: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Where each of ``rows`` stands in ``among`` (int64, none twice), int32."""
    ascending, order = among.sort()
    return order[torch.searchsorted(ascending, rows)].to(torch.int32)
