"""The program of one step where a micro-batch's tokens come in chunks: each chunk is a job of its own within a layer.

As :mod:`meft.planner.timing.program` has it, but for the adapter. Forward: the hidden state leaves whole, with it the
experts; then chunk by chunk rows are chosen, gathered and sent, ``p`` chunks ahead of the one that the device computes
(with ``p = 0`` when it is done), never beyond the layer. A chunk is placed once the next one's rows are chosen too.
Backward, the last chunk first: the adapter of a chunk computes its activations again and its gradients, which leave and
are added up; rows of the chunk ``p`` before it come to the slot that is free once what both have was copied. A
recompute of checkpointing ends before the adapter.

What a task costs is one chunk's mean: ``missing`` and ``overflow`` rows of a layer are spread over its chunks.

Letters: ``C`` chunks, ``p`` prefetch depth.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meft.planner.base.quantities import Floats
from meft.planner.timing.program import Lanes, Program, StepCosts
from meft.planner.traffic.chunks import chunk_ring_slots


class ChunkedProgram(Program):
    """Issues a micro-batch's tasks in the runtime's order; a *unit* is a chunk of a layer, ``layer * C + chunk``."""

    def __init__(self, costs: StepCosts, lanes: Lanes, **choices: Any) -> None:
        """``choices`` as :class:`Program` has them."""
        super().__init__(costs, lanes, **choices)
        self.activate_again = self._by_layer(costs.gpu.activate_again)
        self.chunks = costs.token_chunks
        self.units_there: list[Floats] = [0.0] * (self.num_layers * self.chunks)
        """When each unit's rows are on the device."""
        self.units_sent: list[Floats] = [0.0] * (self.num_layers * self.chunks)
        """When their copy is issued."""
        self.ring = int(chunk_ring_slots(prefetch_depth=self.depth, num_layers=self.num_layers))
        self.routed_up_to = 0
        """Chunks of the layer at hand whose rows are chosen."""

    def forward(self, layer: int) -> None:
        """One layer: its chunks' rows come from its own hidden state."""
        hidden = self.run("gpu", f"attention {layer}", self.gpu.attention)
        arrived = self.send_queries(layer, range(layer, layer + 1), hidden)[layer]
        self.routed_up_to = 0
        first = range(min(self.depth + 1, self.chunks))
        if self.overlapped:
            for chunk in first:
                self.bring(layer, chunk, arrived)
        self.run("gpu", f"ffn {layer}", self.gpu.ffn)
        if not self.overlapped:
            for chunk in first:
                self.bring(layer, chunk, arrived)
        for chunk in range(self.chunks):
            if self.depth and chunk and chunk + self.depth < self.chunks:
                self.bring(layer, chunk + self.depth, arrived)
            seconds = self.adapter_forward[layer] + self.assemble[layer]
            unit = layer * self.chunks + chunk
            self.run("gpu", f"adapter {layer}", seconds, self.units_there[unit], known=self.units_sent[unit])
            if not self.depth and chunk + 1 < self.chunks:
                self.bring(layer, chunk + 1, arrived)

    def bring(self, layer: int, chunk: int, arrived: Floats) -> None:
        """Choose a chunk's rows, and those of the next, which tell what is in common; gather and send what is not."""
        routed: Floats = arrived
        while self.routed_up_to < min(chunk + 2, self.chunks):
            routed = self.run("cpu", f"route {layer}", self.host.route, arrived)
            self.routed_up_to += 1
        gathered = self.run("cpu", f"gather {layer}", self.gather[layer], routed)
        unit = layer * self.chunks + chunk
        self.units_sent[unit] = gathered
        self.units_there[unit] = self.run("h2d", f"rows {layer}", self.rows[layer], gathered)

    def backward(self) -> Floats:
        """Every unit from the last down, then the gradients still on their way; returns when the gpu is done."""
        slots, units = min(self.depth, 1) + 1, self.num_layers * self.chunks
        done: Floats = 0.0
        left: dict[int, Floats] = {}
        added: dict[int, Floats] = {}
        for unit in reversed(range(units)):
            layer = unit // self.chunks
            if unit % self.chunks == self.chunks - 1:
                self.recompute(layer)
            if self.depth:
                self.bring_again(unit - self.depth, done)
            emptied = (left if self.overlapped else added).get(unit + slots, 0.0)
            seconds = self.adapter_backward[layer] + self.activate_again[layer] + self.assemble[layer]
            known = np.maximum(self.units_sent[unit], added.get(unit + 2 * slots, 0.0))
            done = self.run("gpu", f"adapter backward {layer}", seconds, self.units_there[unit], emptied, known=known)
            if self.overlapped and unit + 1 in left:
                added[unit + 1] = self.add_up((unit + 1) // self.chunks, left[unit + 1])
            landing_free = added.get(unit + slots, 0.0)
            left[unit] = self.run("d2h", f"row gradients {layer}", self.row_gradients[layer], done, landing_free)
            if not self.overlapped:
                added[unit] = self.add_up(layer, left[unit])
            if not self.depth:
                self.bring_again(unit - 1, done)
            if not unit % self.chunks and layer:
                self.run("gpu", f"backward {layer}", self.gpu.frozen_backward)
        if self.overlapped:
            self.add_up(0, left[0])
        return done

    def recompute(self, layer: int) -> None:
        """The layer's forward again, up to its adapter, if its activations were not kept."""
        if np.any(self.checkpointing):
            done = self.checkpointing
            self.run("gpu", f"attention {layer} again", self.gpu.attention, done=done)
            self.run("gpu", f"ffn {layer} again", self.gpu.ffn, done=done)

    def bring_again(self, unit: int, slot_free: Floats) -> None:
        """Send what a unit's rows do not have in common with the next chunk's once more, unless they are there."""
        if 0 <= unit < self.num_layers * self.chunks - self.ring:
            layer = unit // self.chunks
            gathered = self.run("cpu", f"gather {layer} again", self.gather_again[layer])
            self.units_sent[unit] = gathered
            self.units_there[unit] = self.run(
                "h2d", f"rows {layer} again", self.rows_refetched[layer], gathered, slot_free
            )

    def add_up(self, layer: int, arrived: Floats) -> Floats:
        """Add a chunk's row gradients to the window's sum on the host; returns when it is done."""
        return self.run("cpu", f"accumulate {layer}", self.accumulate[layer], arrived)
