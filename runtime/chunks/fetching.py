"""The way to the device, chunk by chunk: each chunk's rows are chosen from its own tokens' hidden states.

A *unit* is a chunk of a layer: number ``layer * C + chunk`` of the micro-batch's ``L * C``, in the order of forward.

Letters: ``C`` chunks of tokens, ``L`` layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meft.planner.base.quantities import chunk_tokens
from meft.runtime.chunks.placement import ChunkPlacement, ChunkPlacer
from meft.runtime.device.lanes import Job
from meft.runtime.exchange.fetching import RowFetcher
from meft.runtime.host.router import Selection


@dataclass
class ChunkFetcher(RowFetcher):
    """A :class:`RowFetcher` whose ring slots and staging buffers are units'."""

    placer: ChunkPlacer = field(kw_only=True)
    spans: list[slice] = field(default_factory=list)
    """By chunk: which tokens of the micro-batch."""
    _chosen: dict[int, Job] = field(default_factory=dict)
    """By unit: gives the router's :class:`Selection`."""
    _placed: dict[int, Job] = field(default_factory=dict)
    """By unit: gives its :class:`ChunkPlacement`."""

    @property
    def chunks(self) -> int:
        """``C``."""
        return self.decision.token_chunks

    def begin_micro_batch(self) -> None:
        """Nothing is known of the units any more."""
        self._chosen.clear()
        self._placed.clear()

    def split(self, tokens: int) -> None:
        """Divide a micro-batch's tokens into chunks; the last may be shorter, or empty."""
        size = chunk_tokens(tokens, self.chunks)
        self.spans = [slice(min(first, tokens), min(first + size, tokens)) for first in self._starts(size)]

    def _starts(self, size: int) -> list[int]:
        return [chunk * size for chunk in range(self.chunks)]

    def release(self, layer: int) -> None:
        """See :class:`RowFetcher`: a layer's rows are chosen from its own hidden state."""
        self._held.pop(layer, None)

    def placed(self, unit: int) -> Job:
        """Gives where the unit's rows come from."""
        return self._placed[unit]

    def bring_chunk(self, unit: int) -> None:
        """Choose a unit's rows, and send to its slot those that the chunk before does not have.

        They are placed once the next chunk's are chosen too, which tells which will travel again.
        """
        layer, chunk = divmod(unit, self.chunks)
        chosen = self._choose(unit)
        after = self._choose(unit + 1) if chunk + 1 < self.chunks else None
        before = self._placed[unit - 1] if chunk else None

        def place() -> ChunkPlacement:
            selection: Selection = chosen.result()
            placement = self.placer.place(
                layer,
                selection.rows,
                None if before is None else before.result(),
                None if after is None else after.result().rows,
            )
            self._count(layer, unit, placement, selection)
            return placement

        self._placed[unit] = self.host.job(f"place {layer}", place, after=(chosen, after, before))
        self._bring(layer, unit, self._placed[unit], again=False)

    def bring_chunk_again(self, unit: int) -> None:
        """In backward: send to the unit's slot the rows that the next chunk does not have, unless it is there whole."""
        if self.on_device.slot(unit).layer != unit:
            self._bring(unit // self.chunks, unit, self._placed[unit], again=True)

    def _choose(self, unit: int) -> Job:
        """The router's choice for a unit; made once."""
        if unit not in self._chosen:
            layer, chunk = divmod(unit, self.chunks)
            self._chosen[unit] = self._choice(layer, layer, self.spans[chunk])
        return self._chosen[unit]

    def _count(self, layer: int, unit: int, placement: ChunkPlacement, selection: Selection) -> None:
        """Add a unit's rows to its layer's; the ring holds the last units of forward when backward begins."""
        counters = self.state.counters
        counters.active_rows[layer] += placement.num_rows
        counters.missing_rows[layer] += placement.num_missing
        if unit < len(self.state.layers) * self.chunks - len(self.on_device.ring):
            counters.overflow_rows[layer] += placement.num_again
        counters.dropped_rows += selection.dropped_rows
