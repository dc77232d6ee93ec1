"""The way back: row gradients go to the host, which sums them over the accumulation window and updates the rows.

Gradients leave as soon as a layer has them. With ``gradients_on_device`` those of rows that are kept there are summed
there and leave once, when the window's last micro-batch is through. Those of hot rows
(:mod:`meft.runtime.exchange.hot_rows`) never leave.

Letters: ``D`` hidden size, ``A`` active rows of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from meft.planner.records.plan import Decision
from meft.runtime.device.device import Device
from meft.runtime.device.engine import Copy, TransferEngine
from meft.runtime.device.lanes import LATER, SOON, Job
from meft.runtime.exchange.device_rows import DeviceRows, GradientSlot
from meft.runtime.exchange.host_side import HostSide
from meft.runtime.exchange.row_cache import RowCache
from meft.runtime.exchange.state import ExchangeState
from meft.runtime.host.optimizer import AdamWSettings, update_layer
from meft.runtime.host.store import HostStore


@dataclass
class GradientWindow:
    """One accumulation window after the other. ``slots`` are one or two buffers that gradients leave from."""

    device: Device
    engine: TransferEngine
    store: HostStore
    decision: Decision
    cache: RowCache
    on_device: DeviceRows
    host: HostSide
    state: ExchangeState
    slots: list[GradientSlot]
    is_open: bool = False
    """Micro-batches have run whose gradients no optimizer step has used."""
    counts_activations: bool = False
    """Hot rows are still to be chosen: whatever goes backward is counted."""
    _turn: int = 0
    _accumulated: list[Job | None] = field(init=False)
    """By layer: the last job that added gradients to the window's sum on the host."""
    _counted: dict[int, Job] = field(default_factory=dict)
    """By layer: the last job that counted active rows."""
    _sums_sent: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._accumulated = [None] * len(self.state.layers)

    def buffer(self, layer: int) -> torch.Tensor:
        """Where the layer's row gradients ``[A, 2D]`` go; waits until the buffer's last content has left."""
        slot = self._slot()
        slot.sent.wait_on_device()
        return slot.buffer[: self.on_device.aligned(self.state.placement(layer).num_rows)]

    def send(self, layer: int) -> None:
        """Send what :meth:`buffer` now holds to the host, less what is summed on the device."""
        placement, slot = self.state.placement(layer), self._slot()
        self.state.layers[layer].went_backward = True
        gradients = slot.buffer[: placement.num_rows]
        if self.counts_activations:
            self._count(layer, placement.rows)
        with torch.no_grad():
            if placement.num_hot:
                self.on_device.add_hot_gradients(layer, placement, gradients)
            if self.on_device.sums:
                self.on_device.add_gradients(layer, placement, gradients)
        if not self.on_device.sums:
            self._send_rows(layer, placement.rows[: placement.num_cold], 0, name=f"row gradients {layer}")
        elif placement.num_overflow:
            self._send_rows(layer, placement.overflow, placement.num_admitted, name=f"row gradients {layer}")
        else:
            self.send_nothing(layer)

    def send_nothing(self, layer: int) -> None:
        """None of a micro-batch's gradients of a layer leave: nobody else waits for them."""

    def send_sums(self, layer: int) -> None:
        """Send the layer's gradient sums, unless they were; each at most ``cap`` rows, in the adapter's dtype."""
        if not self.on_device.sums or layer in self._sums_sent:
            return
        self._sums_sent.add(layer)
        kept, sums = self.cache.kept_rows(layer), self.on_device.sums[layer]
        for first in range(0, kept.shape[0], self.decision.active_rows_cap):
            rows, slot = kept[first : first + self.decision.active_rows_cap], self._slot()
            slot.sent.wait_on_device()
            with torch.no_grad():
                slot.buffer[: rows.shape[0]].copy_(sums[first : first + rows.shape[0]])
            self._send_rows(layer, rows, 0, name=f"window gradients {layer}", category="window_gradients")

    def send_hot_keys(self, layer: int, rows: torch.Tensor, weights: torch.Tensor) -> None:
        """Send the keys of the layer's hot ``rows [H]``, of ``weights [H, 2D]``, to the host, which chooses by them.

        They leave through the gradients' buffers, as many at a time as those hold.
        """
        hidden_size = self.store.hidden_size
        most = viewed(self.slots[0].buffer, weights.dtype).shape[0] // hidden_size
        for first in range(0, rows.shape[0], most):
            some, slot = rows[first : first + most], self._slot()
            keys = viewed(slot.buffer, weights.dtype)[: some.shape[0] * hidden_size].view(-1, hidden_size)
            slot.sent.wait_on_device()
            with torch.no_grad():
                keys.copy_(weights[first : first + most, :hidden_size])
            with self.device.host():
                landing = viewed(slot.landing.buffer, weights.dtype)[: keys.numel()].view_as(keys)
            copy = self._leave(slot, keys, landing, category="hot_keys", name=f"hot keys {layer}")
            job = self._store_keys(layer, some, landing, copy)
            slot.landing.readers = [job]

    def _store_keys(self, layer: int, rows: torch.Tensor, landing: torch.Tensor, copy: Copy) -> Job:
        """Write keys that have arrived; whoever chooses from the layer's rows next waits for it."""

        def write() -> None:
            copy.wait_on_host()
            self.store.layers[layer].keys[rows] = landing
            self.store.keys_changed(layer)

        job = self.host.job(f"hot keys {layer}", write, after=(copy.job, self.state.updated[layer]))
        self.state.updated[layer] = job
        return job

    def close(self) -> list[int]:
        """Send the gradient sums that the last backward did not; how many rows of each layer were kept."""
        for layer in range(len(self.state.layers)):
            self.send_sums(layer)
        self._sums_sent.clear()
        return list(self.state.kept)

    def settle_without_backward(self) -> None:
        """Where a forward had no backward, the rows that it admitted have no gradients: their sums begin as zero."""
        for layer, state in enumerate(self.state.layers if self.on_device.sums else ()):
            if not state.went_backward and state.selection is not None:
                first, count = state.selection.first_position, state.selection.num_admitted
                with torch.no_grad():
                    self.on_device.sums[layer][first : first + count].zero_()
                state.went_backward = True

    def forget_rows(self) -> None:
        """Rows kept on the device are not good any more; their gradient sums go to the host."""
        self.settle_without_backward()
        self.close()
        self.engine.schedule.drain()
        self._forget_kept()

    def drop(self) -> None:
        """Forget the window's gradients, on the host and on the device. What was updated before goes on."""
        if not self.is_open:
            return
        self.is_open = False
        self.engine.schedule.drain()
        self.store.clear_gradients()
        self._sums_sent.clear()
        self._forget_kept()  # a row that is kept anew begins a new sum

    def squared_norm(self, layer: int) -> Job:
        """A job that sums the squares of the layer's gradients of the window, once they have all arrived."""
        return self.host.job(
            f"gradient norm {layer}", lambda: self.store.squared_norm_of(layer), after=(self._accumulated[layer],)
        )

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
        """See :meth:`meft.runtime.exchange.exchange.RowExchange.update`."""

        def work() -> int:
            if unless():
                return 0
            self.cache.clear(layer)
            return update_layer(self.store, layer, settings, learning_rate=learning_rate, gradient_scale=gradient_scale)

        jobs = (self._accumulated[layer], *after)
        job = self.state.updated[layer] = self.host.job(f"adamw {layer}", work, after=jobs, urgency=LATER)
        return job

    def _send_rows(
        self, layer: int, rows: torch.Tensor, first: int, *, name: str, category: str = "row_gradients"
    ) -> None:
        """Send rows of the present gradient slot, from ``first`` on, and add them to the window's sums on the host."""
        slot = self._slot()
        source, target = slot.buffer[first : first + rows.shape[0]], slot.landing.buffer[: rows.shape[0]]
        copy = self._leave(slot, source, target, category=category, name=name)

        def accumulate() -> None:
            copy.wait_on_host()
            self.store.accumulate(layer, rows, target)

        jobs = (copy.job, self._accumulated[layer], self.state.updated[layer])
        job = self.host.job(f"accumulate {layer}", accumulate, after=jobs, urgency=SOON)
        slot.landing.readers = [job]
        self._accumulated[layer] = job

    def _leave(
        self, slot: GradientSlot, source: torch.Tensor, target: torch.Tensor, *, category: str, name: str
    ) -> Copy:
        """Send what lies in a slot to its landing, once those who read the landing's last content have; next slot."""
        copy = slot.sent = self.engine.copy(
            "d2h",
            lambda: (source, target),
            category=category,
            name=name,
            point=self.engine.mark(),
            after=tuple(slot.landing.readers),
            per="step" if category == "row_gradients" else "optimizer_step",
        )
        self._turn += 1
        return copy

    def _count(self, layer: int, rows: torch.Tensor) -> None:
        """Note that these rows were active."""

        def count() -> None:
            self.store.hot[layer].activations[rows] += 1

        last = self._counted.get(layer)
        self._counted[layer] = self.host.job(f"count {layer}", count, after=(last,), urgency=LATER)

    def _slot(self) -> GradientSlot:
        """The slot whose turn it is."""
        return self.slots[self._turn % len(self.slots)]

    def _forget_kept(self) -> None:
        with self.device.host():
            for layer in range(len(self.state.layers)):
                self.cache.clear(layer)
                self.state.kept[layer] = 0


def viewed(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous buffer's memory as a flat tensor of another dtype."""
    return buffer.view(-1).view(dtype)
