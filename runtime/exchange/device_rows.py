"""The adapter's buffers on the device: the ring of active rows, rows kept through a window, sums of their gradients.

All are made once, so that device memory is the same in every step, and so are the tables of the hot rows, which are
there for good (:mod:`meft.runtime.exchange.hot_tables`). Letters: ``A`` active rows, ``D`` hidden size, ``C`` rows kept
per layer, ``L`` layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from meft.planner.base.quantities import ALIGNED_ROWS
from meft.planner.records.plan import Decision
from meft.runtime.device.device import Device
from meft.runtime.device.engine import COPY_DONE, Copy
from meft.runtime.device.lanes import Job
from meft.runtime.exchange.hot_tables import HotTables
from meft.runtime.exchange.row_cache import Placement

CAST_ROWS = 256
"""Row gradients are cast to the sums' dtype so many rows at a time."""


@dataclass
class Landing:
    """A host buffer that copies go through: the copy that fills or empties it, and the jobs that read it."""

    buffer: torch.Tensor
    copy: Copy = COPY_DONE
    readers: list[Job] = field(default_factory=list)


@dataclass
class RingSlot:
    """``buffer [cap, 2D]`` on the device, who is in it, when it was filled and last used."""

    buffer: torch.Tensor
    layer: int | None = None
    filled: Copy = COPY_DONE
    used: Copy = COPY_DONE
    filled_again: bool = False
    """In backward: what was admitted is kept, and does not travel again."""
    assembled: bool = False


@dataclass
class GradientSlot:
    """Row gradients ``[cap, 2D]`` on the device, and their landing on the host."""

    buffer: torch.Tensor
    landing: Landing
    sent: Copy = COPY_DONE


@dataclass
class DeviceRows:
    """Buffers of one exchange. Lists by layer are empty where the decision has no use for them.

    With token chunks the rows of a layer come chunk by chunk: slots, ``places``, ``experts`` and ``used`` are then by
    chunk, in the order of forward (:mod:`meft.runtime.chunks.exchange`).
    """

    device: Device
    cap: int
    hidden_size: int
    dtype: torch.dtype
    ring: list[RingSlot] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)
    """``[C, 2D]`` per layer."""
    sums: list[torch.Tensor] = field(default_factory=list)
    """Gradient sums ``[C, 2D]`` per layer, in the masters' dtype."""
    hot: list[HotTables] = field(default_factory=list)
    places: list[torch.Tensor] = field(default_factory=list)
    """int32 ``[cap]`` per layer: where the hits lie in ``kept``, and behind them the hot rows in ``hot``."""
    experts: list[torch.Tensor] = field(default_factory=list)
    """int32 ``[cap]`` per layer: the expert of each active row; behind them whichever was there before."""
    used: list[Copy] = field(default_factory=list)
    """When each layer's ``places`` and ``experts`` were last used."""
    cast: torch.Tensor | None = None

    @classmethod
    def make(
        cls,
        device: Device,
        decision: Decision,
        *,
        num_layers: int,
        hidden_size: int,
        dtype: torch.dtype,
        sums_dtype: torch.dtype,
    ) -> DeviceRows:
        """Allocate what the decision needs."""
        made = cls(device, decision.active_rows_cap, hidden_size, dtype)
        depth, units = min(decision.prefetch_depth, num_layers - 1), num_layers * decision.token_chunks
        slots = num_layers if decision.rows_in_backward == "retained" else depth + 1
        if decision.token_chunks > 1:
            slots = max(depth, 1) + 1
        made.ring = [RingSlot(made.new_rows("row_staging")) for _ in range(slots)]
        made.used = [COPY_DONE] * units
        if decision.cached_rows:
            made.kept = [made.new_rows("kept_rows", decision.cached_rows) for _ in range(num_layers)]
        if decision.gradients_on_device:
            made.sums = [made.new_rows("gradient_sums", decision.cached_rows, sums_dtype) for _ in range(num_layers)]
        if decision.hot_rows:
            made.hot = [made._new_hot(decision.hot_rows, sums_dtype) for _ in range(num_layers)]
        if decision.cached_rows or decision.hot_rows or decision.token_chunks > 1:
            made.places = [made._new_indices("row_indices") for _ in range(units)]
        if (made.sums or made.hot) and dtype != sums_dtype:
            made.cast = made.new_rows("gradient_sums", CAST_ROWS, sums_dtype)
        if decision.needs.gated:
            made.experts = [made._new_indices("row_indices").zero_() for _ in range(units)]
        return made

    def new_rows(self, category: str, count: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A buffer ``[count, 2D]``, by default for ``cap`` rows in the adapter's dtype."""
        shape = (count or self.cap, 2 * self.hidden_size)
        with self.device.scope(), self.device.category(category):
            return torch.empty(shape, dtype=dtype or self.dtype, device=self.device.torch_device)

    def slot(self, layer: int) -> RingSlot:
        """The ring slot of a layer."""
        return self.ring[layer % len(self.ring)]

    def aligned(self, num_rows: int) -> int:
        """How many rows products are made of: whole 64s, as far as there is room."""
        return min(-(-num_rows // ALIGNED_ROWS) * ALIGNED_ROWS, self.cap)

    def end_with_zeros(self, slot: RingSlot, num_rows: int) -> None:
        """Put rows of zeros behind those of a slot (:meth:`aligned`): they add nothing to any product but zeros."""
        slot.buffer[num_rows : self.aligned(num_rows)].zero_()

    def empty_ring(self) -> None:
        """No layer's rows are there."""
        for slot in self.ring:
            slot.layer = None

    def assemble(self, layer: int, placement: Placement) -> None:
        """Complete the layer's slot from the rows that are here, and keep the rows admitted; once per filling."""
        slot = self.slot(layer)
        if slot.assembled:
            return
        slot.assembled = True
        self.end_with_zeros(slot, placement.num_rows)
        if self.kept:
            self._assemble_kept(layer, slot, placement)
        if placement.num_hot:
            target = slot.buffer[placement.num_cold : placement.num_rows]
            torch.index_select(self.hot[layer].rows, 0, self.hot_places(layer, placement), out=target)

    def _assemble_kept(self, layer: int, slot: RingSlot, placement: Placement) -> None:
        kept, admitted = self.kept[layer], placement.num_admitted
        own = kept[placement.first_position : placement.first_position + admitted]
        if slot.filled_again:
            slot.buffer[:admitted].copy_(own)
        else:
            own.copy_(slot.buffer[:admitted])
        if placement.num_hits:
            target = slot.buffer[placement.num_missing : placement.num_cold]
            torch.index_select(kept, 0, self.places[layer][: placement.num_hits], out=target)

    def hot_places(self, layer: int, placement: Placement) -> torch.Tensor:
        """Where the micro-batch's hot rows lie, int32 on the device."""
        return self.places[layer][placement.num_hits : placement.num_hits + placement.num_hot]

    def add_gradients(self, layer: int, placement: Placement, gradients: torch.Tensor) -> None:
        """Add ``gradients [A, 2D]`` of the rows kept to their sums; those of admitted rows are the first."""
        sums, admitted = self.sums[layer], placement.num_admitted
        sums[placement.first_position : placement.first_position + admitted].copy_(gradients[:admitted])
        hits = self.places[layer][: placement.num_hits]
        self._add(sums, hits, gradients[placement.num_missing : placement.num_cold])

    def add_hot_gradients(self, layer: int, placement: Placement, gradients: torch.Tensor) -> None:
        """Add ``gradients [A, 2D]`` of the hot rows to their sums."""
        tables, places = self.hot[layer], self.hot_places(layer, placement)
        self._add(tables.gradients, places, gradients[placement.num_cold :])
        once = torch.ones(self.cap, dtype=places.dtype, device=self.device.torch_device)
        tables.touched.index_add_(0, places, once[: places.shape[0]])

    def _add(self, sums: torch.Tensor, places: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add rows of ``gradients`` to those of ``sums`` at ``places``, of which none comes twice."""
        if self.cast is None:
            if places.shape[0]:
                sums.index_add_(0, places, gradients)
            return
        for first in range(0, places.shape[0], CAST_ROWS):
            some = gradients[first : first + CAST_ROWS]
            cast = self.cast[: some.shape[0]].copy_(some)
            sums.index_add_(0, places[first : first + CAST_ROWS], cast)

    def _new_hot(self, count: int, dtype: torch.dtype) -> HotTables:
        with self.device.scope():
            return HotTables.empty(
                self.device, count=count, row_numbers=2 * self.hidden_size, dtype=self.dtype, master_dtype=dtype
            )

    def _new_indices(self, category: str) -> torch.Tensor:
        with self.device.scope(), self.device.category(category):
            return torch.empty(self.cap, dtype=torch.int32, device=self.device.torch_device)
