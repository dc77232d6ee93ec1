"""One layer's hot rows on the device: weights, moments, gradient sums, step counts, and how they are updated.

Letters: ``H`` hot rows per layer, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from meft.planner.traffic.hot_rows import HOT_CHUNK_ROWS
from meft.runtime.device.device import Device
from meft.runtime.host.optimizer import AdamWSettings, adamw


@dataclass(frozen=True)
class HotTables:
    """``weights``, ``first_moment``, ``second_moment`` and ``gradients`` are ``[H, 2D]`` in the masters' dtype."""

    rows: torch.Tensor
    """``[H, 2D]`` in the adapter's dtype, what the adapter computes with; ``weights`` itself if the dtypes are one."""
    weights: torch.Tensor
    first_moment: torch.Tensor
    second_moment: torch.Tensor
    gradients: torch.Tensor
    """Sums over the accumulation window; zero for rows that it has not touched."""
    step_counts: torch.Tensor
    """int32 ``[H]``."""
    touched: torch.Tensor
    """int32 ``[H]``: how many of the window's micro-batches gave the row a gradient."""

    @classmethod
    def empty(
        cls, device: Device, *, count: int, row_numbers: int, dtype: torch.dtype, master_dtype: torch.dtype
    ) -> HotTables:
        """Tables of zeros, inside the device's scope; ``row_numbers`` is ``2D``."""

        def table(category: str, *shape: int, dtype: torch.dtype) -> torch.Tensor:
            with device.category(category):
                return torch.zeros(shape, dtype=dtype, device=device.torch_device)

        rows = table("hot_rows", count, row_numbers, dtype=dtype)
        weights = rows if dtype == master_dtype else table("hot_states", count, row_numbers, dtype=master_dtype)
        states = [table("hot_states", count, row_numbers, dtype=master_dtype) for _ in range(3)]
        counts = [table("hot_states", count, dtype=torch.int32) for _ in range(2)]
        return cls(rows, weights, *states, *counts)

    def squared_norm(self) -> torch.Tensor:
        """Sum of squares of the window's gradients, fp64 on the device."""
        parts = self.gradients.split(HOT_CHUNK_ROWS)
        return torch.stack([part.to(torch.float64, copy=True).square_().sum() for part in parts]).sum()

    def update(self, settings: AdamWSettings, *, learning_rate: float, gradient_scale: float) -> None:
        """AdamW on the touched rows, as :mod:`meft.runtime.host.optimizer` has it; opens a new window."""
        for part in self._parts():
            part._update(settings, learning_rate=learning_rate, gradient_scale=gradient_scale)
        self.clear()

    def clear(self) -> None:
        """Forget the window's gradients."""
        self.gradients.zero_()
        self.touched.zero_()

    def refresh_rows(self) -> None:
        """Make ``rows`` what ``weights`` are."""
        if self.rows.dtype != self.weights.dtype:
            self.rows.copy_(self.weights)

    def _update(self, settings: AdamWSettings, *, learning_rate: float, gradient_scale: float) -> None:
        """Update copies of all rows, and keep those of the touched ones: which they are only the device knows."""
        touched = self.touched > 0
        self.step_counts.add_(touched)
        own = (self.weights, self.first_moment, self.second_moment)
        weights, first_moment, second_moment = (table.clone() for table in own)
        gradients, counts = self.gradients.mul_(gradient_scale), self.step_counts.clamp(min=1)
        adamw(weights, first_moment, second_moment, gradients, counts, settings, learning_rate=learning_rate)
        for table, updated in zip(own, (weights, first_moment, second_moment), strict=True):
            torch.where(touched.unsqueeze(1), updated, table, out=table)
        self.refresh_rows()

    def _parts(self) -> Iterator[HotTables]:
        """Views of some rows at a time."""
        tables = (self.rows, self.weights, self.first_moment, self.second_moment, self.gradients)
        for first in range(0, self.touched.shape[0], HOT_CHUNK_ROWS):
            chosen = slice(first, first + HOT_CHUNK_ROWS)
            yield HotTables(*(table[chosen] for table in (*tables, self.step_counts, self.touched)))
