"""The row exchange of a micro-batch in chunks of tokens: a long sequence in the staging of a short one.

The union of a long sequence's rows grows towards all rows. Cut into ``C`` chunks, each with a union and a cap of its
own, a layer's adapter meets one chunk's rows at a time, and no more than a few chunks' are on the device:

- Forward. A layer's hidden state goes to the host whole, and each chunk's rows are chosen from its own tokens. With
  look-ahead ``p`` the rows of chunk ``c + p`` travel while the device computes chunk ``c``; it never looks beyond its
  layer, so the choice is exact at every depth. Of a chunk's rows those that the chunk before has too are copied from
  its slot and do not travel (:mod:`meft.runtime.chunks.placement`).
- Backward. The chunks come in the opposite order, across layers: those still in the ring are there, and of the others
  the rows travel that the next chunk of the layer does not have. Each chunk's activations are computed once more.
- Row gradients of a chunk leave as soon as it has them, and are summed on the host like those of a micro-batch.

There is always a slot beside the one in use, which the common rows are copied from: the ring has ``max(p, 1) + 1``.

A recompute of activation checkpointing ends before the adapter, which keeps its input alone and keeps that first
(:mod:`meft.runtime.adapter.chunked`), so that nothing travels for it.

Letters: ``T`` tokens, ``D`` hidden size, ``A`` active rows of a chunk, ``C`` chunks, ``L`` layers, ``p`` prefetch
depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from meft.planner.base.errors import UsageError
from meft.planner.records.plan import Decision
from meft.runtime.chunks.fetching import ChunkFetcher
from meft.runtime.chunks.placement import ChunkPlacement, ChunkPlacer, NeighbourPlacer
from meft.runtime.exchange.exchange import RowExchange
from meft.runtime.exchange.row_cache import RowCache


@dataclass
class ChunkedExchange(RowExchange):
    """A :class:`RowExchange` for a decision with token chunks.

    What it says of a layer's rows (:meth:`rows`, :meth:`row_experts`, :meth:`probes`, :meth:`gradient_buffer`,
    :meth:`send_gradients`) is of the chunk at hand: see :meth:`chunks_of` and :meth:`chunks_again`.
    """

    placer: ChunkPlacer = field(default_factory=NeighbourPlacer)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._unit = 0

    def _make_fetcher(self, cache: RowCache) -> ChunkFetcher:
        self._chunk_fetcher = ChunkFetcher(**self._fetcher_parts(cache), placer=self.placer)
        return self._chunk_fetcher

    @property
    def token_chunks(self) -> int:
        """``C``."""
        return self.decision.token_chunks

    @property
    def _span(self) -> slice:
        """Tokens of the chunk at hand."""
        return self._chunk_fetcher.spans[self._unit % self.token_chunks]

    # --- forward -----------------------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """See :class:`RowExchange`."""
        super().begin_forward()
        self._chunk_fetcher.begin_micro_batch()

    def before_ffn(self, layer: int, hidden: torch.Tensor) -> None:
        """See :class:`RowExchange`; overlapped, the layer's first chunks are fetched."""
        self._computed(f"attention {layer}")
        if not self.in_backward:
            if self.observer is not None:
                self.observer(layer, hidden)
            self._chunk_fetcher.split(hidden.shape[0])
            self._fetcher.send_queries(layer, hidden.detach())
            self._fetcher.send_probes(layer, hidden.detach())
            if self.schedule.overlapped:
                self._bring_first(layer)
        self._resume()

    def before_adapter(self, layer: int) -> None:
        """In sequence: fetch the layer's first chunks."""
        self._computed(f"ffn {layer}")
        if not (self.in_backward or self.schedule.overlapped):
            self._bring_first(layer)

    def after_adapter(self, layer: int) -> None:
        """Every chunk has used its rows."""

    def chunks_of(self, layer: int) -> Iterator[slice]:
        """The layer's chunks in forward, one at hand after the other: their tokens.

        Raises :class:`UsageError` in a recompute, for which rows would have to travel once more.
        """
        if self.in_backward:
            raise UsageError(
                f"token_chunks {self.token_chunks}: this model keeps something for backward behind its FFN, so that "
                f"activation checkpointing computes the adapter again, without its rows; plan with token_chunks 1"
            )
        for unit in self._units(layer):
            self._unit = unit
            yield self._span
            self._computed(f"adapter {layer}")
            self._on_device.slot(unit).used = self.engine.mark()
            if not self.depth:
                self._bring(unit + 1, layer)
            self._resume()

    def _bring_first(self, layer: int) -> None:
        for unit in self._units(layer)[: self.depth + 1]:
            self._chunk_fetcher.bring_chunk(unit)

    def _bring(self, unit: int, layer: int) -> None:
        """Fetch a unit's rows, unless it is another layer's or was among the first."""
        if unit in self._units(layer) and self._on_device.slot(unit).layer != unit:
            self._chunk_fetcher.bring_chunk(unit)

    def rows(self, layer: int) -> torch.Tensor:
        """Active rows ``[A, 2D]`` of the chunk at hand, waiting for their copy; those of chunks ahead set out."""
        unit, slot = self._unit, self._on_device.slot(self._unit)
        if slot.layer != unit:
            raise RuntimeError(f"rows of unit {unit} are not on the device: its slot holds {slot.layer}")
        self._fetcher.release(layer)
        slot.filled.wait_on_device()
        self._resume()
        placement: ChunkPlacement = self._chunk_fetcher.placed(unit).result()
        self._state.layers[layer].route = self._chunk_fetcher.placed(unit)
        if not slot.assembled:
            self._assemble(unit, placement, again=slot.filled_again)
            self._on_device.end_with_zeros(slot, placement.num_rows)
            slot.assembled = True
        if self.depth:
            self._look_ahead(layer)
        return slot.buffer[: self._on_device.aligned(placement.num_rows)]

    def _assemble(self, unit: int, placement: ChunkPlacement, *, again: bool) -> None:
        """Copy what the neighbour has too from its slot, which is free then."""
        neighbour = unit + 1 if again else unit - 1
        if neighbour // self.token_chunks != unit // self.token_chunks:
            return
        slot, source = self._on_device.slot(unit), self._on_device.slot(neighbour)
        with torch.no_grad():
            if again:
                other: ChunkPlacement = self._chunk_fetcher.placed(neighbour).result()
                places = self._on_device.places[neighbour][: other.num_hits]
                targets = self.for_rows((other.num_hits,), axis=0, dtype=torch.int64).copy_(places)
                slot.buffer.index_copy_(0, targets, source.buffer[other.num_missing : other.num_rows])
            else:
                places = self._on_device.places[unit][: placement.num_hits]
                target = slot.buffer[placement.num_missing : placement.num_rows]
                torch.index_select(source.buffer, 0, places, out=target)
        source.used = self.engine.mark()

    def _look_ahead(self, layer: int) -> None:
        """Send the rows of the chunk that comes ``p`` later to the slot of the one before, which is done."""
        if not self.in_backward:
            self._bring(self._unit + self.depth, layer)
        elif self._unit >= self.depth:
            self._chunk_fetcher.bring_chunk_again(self._unit - self.depth)

    def probes(self, layer: int) -> torch.Tensor:
        """See :class:`RowExchange`; of the chunk's tokens."""
        return super().probes(layer)[self._span]

    def row_experts(self, layer: int) -> torch.Tensor:
        """See :class:`RowExchange`."""
        return self._on_device.experts[self._unit][: self._on_device.aligned(self._state.placement(layer).num_rows)]

    # --- backward ----------------------------------------------------------------------------------------------

    def chunks_again(self, layer: int) -> Iterator[slice]:
        """The layer's chunks in backward, the last first: their tokens. Behind each its gradients have left."""
        for unit in reversed(self._units(layer)):
            self._unit = unit
            yield self._span
            self._computed(f"adapter backward {layer}")
            self._on_device.slot(unit).used = self._on_device.used[unit] = self.engine.mark()
            if not self.depth and unit:
                self._chunk_fetcher.bring_chunk_again(unit - 1)
            self._resume()

    def after_backward(self, layer: int) -> None:
        """The layer's chunks are through."""
        self.layers[layer].probes = None
        if self.closes_window and self.after_last_gradients is not None:
            self.after_last_gradients(layer)
        self._resume()

    def finish_backward(self) -> None:
        """See :class:`RowExchange`; how often a row was active is counted by chunks."""
        super().finish_backward()
        with self.device.host():
            self.store.use.micro_batches += self.token_chunks - 1

    # --- what is asked beside the steps --------------------------------------------------------------------------

    def unit_rows(self) -> list[torch.Tensor]:
        """Active rows of every unit of the micro-batch, int64 ``[A]``, in the order of forward."""
        units = range(len(self.layers) * self.token_chunks)
        return [self._chunk_fetcher.placed(unit).result().rows for unit in units]

    def look_ahead_recall(self, layer: int, hidden: torch.Tensor) -> float:
        """All of it: a chunk's rows are chosen from its own hidden states, however early they travel."""
        del layer, hidden
        return 1.0

    def _units(self, layer: int) -> range:
        return range(layer * self.token_chunks, (layer + 1) * self.token_chunks)


def exchange_of(decision: Decision, *, placer: ChunkPlacer | None = None, **parts: Any) -> RowExchange:
    """The exchange that a decision asks for; ``parts`` as :class:`RowExchange` has them, ``placer`` for chunks."""
    if decision.token_chunks == 1:
        return RowExchange(decision=decision, **parts)
    return ChunkedExchange(decision=decision, placer=placer or NeighbourPlacer(), **parts)
