"""The hot set: the most often active rows of every layer, which live on the device for good.

Their weights, AdamW state and gradient sums lie there, and the device updates them. They are chosen once: the
micro-batches that go backward are counted per row, and at the end of the window that completes ``hot_after_steps`` the
rows with the highest counts (of equal ones the first) are taken. From then on neither they nor their gradients travel
in a step. What does travel of them:

- ``hot_keys``, once per optimizer step: the host chooses rows by their keys, and must know those of the hot rows too.
- ``hot_norm``, once per optimizer step: the squared norm of their gradients, for clipping.
- ``hot_placed`` and ``hot_returned``, when there is need: everything, to the device when they have been chosen or were
  written on the host, and to the host before it is read there (a checkpoint, an evaluation). ``hot_placed`` goes when
  the next forward begins, so that a run that ends, or whose state is replaced, has not sent it in vain.

Letters: ``H`` hot rows per layer, ``D`` hidden size, ``R`` adapter rows per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from meft.planner.base.errors import UsageError
from meft.planner.records.plan import Decision, Direction
from meft.runtime.device.device import Device
from meft.runtime.device.engine import TransferEngine
from meft.runtime.device.timeline import LaneClock
from meft.runtime.exchange.device_rows import Landing
from meft.runtime.exchange.gradient_window import GradientWindow, viewed
from meft.runtime.exchange.hot_tables import HotTables
from meft.runtime.host.optimizer import AdamWSettings
from meft.runtime.host.store import HostStore

TABLES = ("weights", "first_moment", "second_moment", "step_counts")
"""What a row is, on the host and on the device, under the same names."""


@dataclass
class HotSet:
    """The hot rows of all layers. ``landing`` is a host buffer that they may travel through between two windows."""

    device: Device
    engine: TransferEngine
    store: HostStore
    decision: Decision
    tables: list[HotTables]
    window: GradientWindow
    landing: Landing
    clock: LaneClock | None = None
    counted_steps: int = 0
    """Micro-batches that the activation counts are of."""
    current: Literal["host", "both", "device"] = "host"
    """Where the rows are what training made of them."""
    rows: list[torch.Tensor] = field(default_factory=list)
    """The hot rows of each layer, int64 ascending; empty until they are chosen."""

    def __post_init__(self) -> None:
        self.take(self.rows)

    # --- choosing --------------------------------------------------------------------------------------------------

    def note_step(self) -> None:
        """A micro-batch has gone backward, and was counted by :meth:`GradientWindow.send`."""
        if not self.rows:
            self.counted_steps += 1

    def choose_if_due(self) -> None:
        """At a window's end: choose the rows once enough micro-batches were counted."""
        if self.rows or self.counted_steps < self.decision.hot_after_steps:
            return
        self.engine.schedule.drain()
        with self.device.host():
            for index in self.store.hot:
                index.choose(self.decision.hot_rows)
            self.take([index.rows for index in self.store.hot])

    def take(self, rows: list[torch.Tensor]) -> None:
        """These rows are the hot ones; while there are none, activations are counted."""
        self.rows = rows
        self.window.counts_activations = not rows

    def rehearse(self, rows: list[torch.Tensor]) -> None:
        """For a rehearsal: these rows have been chosen, and are there."""
        self.take(rows)
        self.current = "both"

    # --- a window's end --------------------------------------------------------------------------------------------

    def squared_norm(self) -> torch.Tensor:
        """Sum of squares of the window's gradients, fp64 on the device, inside its scope."""
        return torch.stack([tables.squared_norm() for tables in self.tables]).sum()

    def update(self, settings: AdamWSettings, *, learning_rate: float, gradient_scale: float) -> bool:
        """Update the touched rows and send all keys to the host; whether there are hot rows yet.

        Inside the device's scope, without gradients.
        """
        if not self.rows:
            return False
        self.place()
        for layer, tables in enumerate(self.tables):
            if self.clock is not None:
                self.clock.resume()
            tables.update(settings, learning_rate=learning_rate, gradient_scale=gradient_scale)
            if self.clock is not None:
                self.clock.computed(f"hot adamw {layer}")
            self.window.send_hot_keys(layer, self.rows[layer], tables.weights)
        self.current = "device"
        return True

    def drop_gradients(self) -> None:
        """Forget the window's gradients."""
        for tables in self.tables:
            tables.clear()

    # --- travelling ------------------------------------------------------------------------------------------------

    def place(self) -> None:
        """Bring the rows to the device, if what lies there is not what the host has."""
        if not self.rows or self.current != "host":
            return
        self._wait_for_landing()
        for layer, tables in enumerate(self.tables):
            self._place_layer(layer, tables)
        self.current = "both"

    def bring_home(self) -> None:
        """Make the host's tables current."""
        if self.current != "device":
            return
        self._wait_for_landing()
        for layer, tables in enumerate(self.tables):
            self._return_layer(layer, tables)
        self.current = "both"

    def host_was_written(self) -> None:
        """What the host has holds, also of which rows are hot."""
        self.current = "host"
        rows = [index.rows for index in self.store.hot]
        self.take(rows if rows[0].shape[0] else [])

    def require_no_gradients(self) -> None:
        """Raise :class:`UsageError` where the device holds gradients of rows that other ones are about to replace."""
        if self.window.is_open and self.rows:
            raise UsageError(
                "optimizer state: an accumulation window is open, and the device holds gradients of its hot rows; "
                "call the optimizer's step() or zero_grad() before loading"
            )

    def _wait_for_landing(self) -> None:
        """No job is left, and no copy that a job has issued still reads or writes the landing."""
        self.engine.schedule.drain()
        self.landing.copy.wait_on_host()

    def _place_layer(self, layer: int, tables: HotTables) -> None:
        for name in TABLES:
            with self.device.host():
                source = getattr(self.store.layers[layer], name)[self.rows[layer]].flatten()
            target = getattr(tables, name).view(-1)
            for part, buffer in self._parts(target):
                with self.device.host():
                    buffer.copy_(source[part])
                self._copy("h2d", buffer, target[part], category="hot_placed")
        with torch.no_grad():
            tables.refresh_rows()

    def _return_layer(self, layer: int, tables: HotTables) -> None:
        rows = self.rows[layer]
        for name in TABLES:
            source = getattr(tables, name).view(-1)
            with self.device.host():
                target = torch.empty(source.shape, dtype=source.dtype)
            for part, buffer in self._parts(source):
                self._copy("d2h", source[part], buffer, category="hot_returned")
                with self.device.host():
                    target[part] = buffer
            with self.device.host():
                home = getattr(self.store.layers[layer], name)
                home[rows] = target.view(rows.shape[0], *home.shape[1:])
        if self.store.copies:
            with self.device.host():
                self.store.copies[layer][rows] = self.store.layers[layer].weights[rows].bfloat16()

    def _parts(self, flat: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Parts of a flat table, each with as much of the landing's memory, in the table's dtype."""
        with self.device.host():
            buffer = viewed(self.landing.buffer, flat.dtype)
        for first in range(0, flat.shape[0], buffer.shape[0]):
            part = slice(first, min(first + buffer.shape[0], flat.shape[0]))
            with self.device.host():
                own = buffer[: part.stop - first]
            yield part, own

    def _copy(self, direction: Direction, source: torch.Tensor, target: torch.Tensor, *, category: str) -> None:
        """Copy and wait: rare enough to be simple."""
        point = self.engine.mark()
        copy = self.engine.copy(direction, lambda: (source, target), category=category, point=point, per="run")
        copy.wait_on_host()
