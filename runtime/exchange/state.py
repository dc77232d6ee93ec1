"""What the two halves of the row exchange share: the micro-batch's layers, its counters, and jobs that both wait for.

Fetching (:mod:`meft.runtime.exchange.fetching`) writes it in forward, the gradients' way back
(:mod:`meft.runtime.exchange.gradient_window`) reads it in backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meft.runtime.device.lanes import Job
from meft.runtime.exchange.row_cache import Placement


@dataclass
class LayerState:
    """What is known of one layer in this micro-batch."""

    route: Job | None = None
    """Gives the :class:`Placement`."""
    probes: torch.Tensor | None = None
    """int32 ``[T, P]`` on the device: the experts that each token probes."""
    went_backward: bool = False

    @property
    def selection(self) -> Placement | None:
        """The layer's active rows, once they are chosen."""
        return None if self.route is None else self.route.result()


@dataclass
class StepCounters:
    """What a micro-batch did, for the report; per layer, but for the dropped rows."""

    active_rows: list[int]
    missing_rows: list[int]
    """Those that were not on the device."""
    overflow_rows: list[int]
    """Those that were not kept there either."""
    hot_rows: list[int]
    """Those that are there for good."""
    dropped_rows: int = 0

    @classmethod
    def zero(cls, num_layers: int) -> StepCounters:
        """Nothing was done yet."""
        return cls([0] * num_layers, [0] * num_layers, [0] * num_layers, [0] * num_layers)


@dataclass
class ExchangeState:
    """Lists are by layer."""

    layers: list[LayerState]
    counters: StepCounters
    kept: list[int]
    """Rows that are on the device in this window."""
    updated: list[Job | None]
    """The last job that wrote the layer's rows on the host: whoever reads them waits for it."""

    @classmethod
    def of(cls, num_layers: int) -> ExchangeState:
        """Before the first micro-batch."""
        nothing: list[Job | None] = [None] * num_layers
        layers = [LayerState() for _ in range(num_layers)]
        return cls(layers, StepCounters.zero(num_layers), [0] * num_layers, nothing)

    def begin_micro_batch(self) -> None:
        """Nothing is known of the layers any more."""
        self.layers = [LayerState() for _ in self.layers]
        self.counters = StepCounters.zero(len(self.layers))

    def placement(self, layer: int) -> Placement:
        """The layer's active rows; waits for their choice."""
        placement = self.layers[layer].selection
        if placement is None:
            raise RuntimeError(f"no rows were chosen for layer {layer}: the model's forward has not begun")
        return placement
