"""Rows that stay on the device through an accumulation window: which they are, and what that leaves to send.

Until the optimizer runs, a row on the device is as good as the one on the host. Each layer keeps up to ``C`` rows, the
first that the window's micro-batches activate. Of a micro-batch's active rows, those kept are there (*hits*); the
others (*missing*) travel, and as many as there is room for are kept from then on (*admitted*). The rest are the
*overflow*, which travels in every micro-batch that needs it.

The rows of a layer then stand in the order admitted, overflow, hits, hot, so that each part is one slice. *Hot* rows
(:mod:`meft.runtime.exchange.hot_rows`) are on the device for good: none of the above sees them.

Letters: ``R`` adapter rows per layer, ``A`` active rows, ``C`` rows kept per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch


def _no_places() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int32)


@dataclass(frozen=True)
class Placement:
    """Where a micro-batch's active rows of one layer come from."""

    rows: torch.Tensor
    """int64 ``[A]``: admitted, overflow, hits, hot."""
    num_admitted: int
    num_missing: int
    """Admitted and overflow."""
    first_position: int
    """Where the admitted rows go, one after the other."""
    hits: torch.Tensor
    """int32: where the hits are."""
    hot: torch.Tensor = field(default_factory=_no_places)
    """int32: where the hot rows are."""

    @property
    def num_rows(self) -> int:
        """``A``."""
        return self.rows.shape[0]

    @property
    def num_hot(self) -> int:
        """Rows that are on the device for good."""
        return self.hot.shape[0]

    @property
    def num_cold(self) -> int:
        """All others."""
        return self.num_rows - self.num_hot

    @property
    def num_overflow(self) -> int:
        """Rows that travel and are not kept."""
        return self.num_missing - self.num_admitted

    @property
    def num_hits(self) -> int:
        """Rows that an earlier micro-batch of the window has brought."""
        return self.num_cold - self.num_missing

    @property
    def places(self) -> torch.Tensor:
        """int32: where the hits and then the hot rows are, each among its own kind."""
        return torch.cat([self.hits, self.hot])

    @property
    def overflow(self) -> torch.Tensor:
        """Rows that travel again in backward, where rows are fetched again."""
        return self.rows[self.num_admitted : self.num_missing]

    def travelling(self, *, again: bool) -> slice:
        """Which rows travel: in forward those missing, and again in backward, where they do at all, the overflow."""
        return slice(self.num_admitted if again else 0, self.num_missing)


class RowCache(Protocol):
    """Decides per layer which rows are kept."""

    def place(self, layer: int, rows: torch.Tensor) -> Placement:
        """Place a micro-batch's active rows (int64, ascending), admitting what there is room for."""
        ...

    def kept_rows(self, layer: int) -> torch.Tensor:
        """The rows kept, int64, by position."""
        ...

    def clear(self, layer: int) -> None:
        """Forget the layer's rows: the optimizer has changed them."""
        ...

    def host_bytes(self) -> int:
        """Bytes of the tables on the host."""
        ...


class NoCache:
    """Every row travels."""

    def place(self, layer: int, rows: torch.Tensor) -> Placement:
        """See :class:`RowCache`."""
        del layer
        return Placement(rows, 0, rows.shape[0], 0, _no_places())

    def kept_rows(self, layer: int) -> torch.Tensor:
        """See :class:`RowCache`."""
        del layer
        return torch.empty(0, dtype=torch.int64)

    def clear(self, layer: int) -> None:
        """See :class:`RowCache`."""

    def host_bytes(self) -> int:
        """See :class:`RowCache`."""
        return 0


class WindowCache:
    """Keeps the first ``C`` rows of each layer. Tables: int32 ``[R]`` and int64 ``[C]`` per layer."""

    def __init__(self, *, num_layers: int, adapter_width: int, cached_rows: int) -> None:
        self._positions = [torch.full((adapter_width,), -1, dtype=torch.int32) for _ in range(num_layers)]
        self._kept = [torch.empty(cached_rows, dtype=torch.int64) for _ in range(num_layers)]
        self._counts = [0] * num_layers

    def place(self, layer: int, rows: torch.Tensor) -> Placement:
        """See :class:`RowCache`."""
        table, kept, first = self._positions[layer], self._kept[layer], self._counts[layer]
        positions = table[rows]
        is_hit = positions >= 0
        missing = rows[~is_hit]
        admitted = missing[: kept.shape[0] - first]
        end = first + admitted.shape[0]
        table[admitted] = torch.arange(first, end, dtype=torch.int32)
        kept[first:end] = admitted
        self._counts[layer] = end
        ordered = torch.cat([missing, rows[is_hit]])
        return Placement(ordered, admitted.shape[0], missing.shape[0], first, positions[is_hit])

    def kept_rows(self, layer: int) -> torch.Tensor:
        """See :class:`RowCache`."""
        return self._kept[layer][: self._counts[layer]]

    def clear(self, layer: int) -> None:
        """See :class:`RowCache`."""
        self._positions[layer].fill_(-1)
        self._counts[layer] = 0

    def host_bytes(self) -> int:
        """See :class:`RowCache`."""
        tables = (*self._positions, *self._kept)
        return sum(table.numel() * table.element_size() for table in tables)


class BesideHotRows:
    """A cache that never sees a hot row. ``places`` is int32 ``[R]`` per layer: a hot row's place, -1 for others."""

    def __init__(self, cache: RowCache, places: Sequence[torch.Tensor]) -> None:
        self._cache, self._places = cache, places

    def place(self, layer: int, rows: torch.Tensor) -> Placement:
        """See :class:`RowCache`."""
        places = self._places[layer][rows]
        is_hot = places >= 0
        cold = self._cache.place(layer, rows[~is_hot])
        return replace(cold, rows=torch.cat([cold.rows, rows[is_hot]]), hot=places[is_hot])

    def kept_rows(self, layer: int) -> torch.Tensor:
        """See :class:`RowCache`."""
        return self._cache.kept_rows(layer)

    def clear(self, layer: int) -> None:
        """See :class:`RowCache`."""
        self._cache.clear(layer)

    def host_bytes(self) -> int:
        """See :class:`RowCache`; the places are the store's."""
        return self._cache.host_bytes()


class PlannedCache:
    """The cache of a rehearsal: as many rows missing, overflowing, kept and hot as the plan expects of a step."""

    def __init__(
        self,
        *,
        adapter_width: int,
        cached_rows: int,
        missing: Sequence[int],
        overflow: Sequence[int],
        kept: Sequence[int],
        hot: Sequence[int] = (),
    ) -> None:
        self._sizes = (adapter_width, cached_rows)
        self._missing, self._overflow, self._kept = tuple(missing), tuple(overflow), tuple(kept)
        self._hot = tuple(hot) or (0,) * len(self._kept)

    def place(self, layer: int, rows: torch.Tensor) -> Placement:
        """See :class:`RowCache`."""
        admitted = self._missing[layer] - self._overflow[layer]
        hits = torch.zeros(rows.shape[0] - self._missing[layer] - self._hot[layer], dtype=torch.int32)
        hot = torch.zeros(self._hot[layer], dtype=torch.int32)
        return Placement(rows, admitted, self._missing[layer], 0, hits, hot)

    def kept_rows(self, layer: int) -> torch.Tensor:
        """See :class:`RowCache`."""
        return torch.arange(self._kept[layer])

    def clear(self, layer: int) -> None:
        """See :class:`RowCache`."""

    def host_bytes(self) -> int:
        """See :class:`RowCache`."""
        adapter_width, cached_rows = self._sizes
        return len(self._kept) * (4 * adapter_width + 8 * cached_rows) if cached_rows else 0
