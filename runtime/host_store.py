"""The adapter's home: every row of every layer in host memory, with its optimizer state.

Letters: ``L`` layers, ``R`` adapter rows per layer, ``D`` hidden size, ``A`` active rows. A row is one neuron: its key
(the first ``D`` numbers) and its value (the last ``D``) lie together, so one gather and one copy move both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerTables:
    """One layer's tables. ``weights``, ``first_moment``, ``second_moment``, ``gradients`` are ``[R, 2D]``."""

    weights: torch.Tensor
    first_moment: torch.Tensor
    second_moment: torch.Tensor
    gradients: torch.Tensor
    """Sum of the row gradients of the accumulation window; zero outside touched rows."""
    step_counts: torch.Tensor
    """int32 ``[R]``: how often each row was updated."""
    touched: torch.Tensor
    """bool ``[R]``: rows with a gradient in this window."""

    @property
    def keys(self) -> torch.Tensor:
        """View ``[R, D]``."""
        return self.weights[:, : self.weights.shape[1] // 2]

    @property
    def values(self) -> torch.Tensor:
        """View ``[R, D]``."""
        return self.weights[:, self.weights.shape[1] // 2 :]


class HostStore:
    """Rows, moments, gradient accumulators and step counts of all layers; masters in ``dtype`` (fp32 outside tests)."""

    def __init__(
        self, *, num_layers: int, adapter_width: int, hidden_size: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.num_layers = num_layers
        self.adapter_width = adapter_width
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.layers = tuple(_empty_tables(adapter_width, hidden_size, dtype) for _ in range(num_layers))

    def initialise(self, *, seed: int) -> None:
        """Keys uniform in +-1/sqrt(D) (what ``torch.nn.Linear`` does), values zero: the adapter starts as nothing."""
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(self.hidden_size)
        for tables in self.layers:
            tables.keys.uniform_(-bound, bound, generator=generator)
            tables.values.zero_()

    def gather(self, layer: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Copy rows ``[A]`` of a layer into ``out [A, 2D]``, converting to its dtype."""
        weights = self.layers[layer].weights
        if out.dtype == weights.dtype:
            torch.index_select(weights, 0, rows, out=out)
        else:
            out.copy_(weights.index_select(0, rows))

    def accumulate(self, layer: int, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add the gradients ``[A, 2D]`` of one micro-batch to the window's sum."""
        tables = self.layers[layer]
        tables.gradients.index_add_(0, rows, gradients.to(self.dtype))
        tables.touched[rows] = True

    def touched_rows(self, layer: int) -> torch.Tensor:
        """Rows with a gradient in this window, ascending int64."""
        return self.layers[layer].touched.nonzero().flatten()

    def squared_gradient_norm(self) -> float:
        """Sum of squares of the window's gradients over all layers."""
        total = 0.0
        for layer in range(self.num_layers):
            for rows in in_chunks(self.touched_rows(layer), self.layers[layer].gradients):
                total += float(self.layers[layer].gradients[rows].double().square().sum())
        return total

    def clear_gradients(self) -> None:
        """Zero the touched rows' gradients and open a new window."""
        for layer, tables in enumerate(self.layers):
            tables.gradients.index_fill_(0, self.touched_rows(layer), 0.0)
            tables.touched.zero_()

    def bytes_by_category(self) -> dict[str, int]:
        """Bytes of the tables over all layers, under the names of the host ledger."""
        totals = dict.fromkeys(_CATEGORIES.values(), 0)
        for tables in self.layers:
            for name, category in _CATEGORIES.items():
                table: torch.Tensor = getattr(tables, name)
                totals[category] += table.numel() * table.element_size()
        return totals


_CATEGORIES = {
    "weights": "adapter_weights",
    "first_moment": "adapter_moments",
    "second_moment": "adapter_moments",
    "gradients": "adapter_gradients",
    "step_counts": "step_counts",
    "touched": "touched_flags",
}

CHUNK_BYTES = 4 << 20
"""Size of a temporary copy of rows: small enough that the C library reuses its memory instead of mapping new pages."""


def in_chunks(rows: torch.Tensor, table: torch.Tensor) -> Iterator[torch.Tensor]:
    """Split a row list so that a copy of its rows of ``table [R, 2D]`` stays small."""
    row_bytes = table.shape[1] * table.element_size()
    yield from rows.split(max(1, CHUNK_BYTES // row_bytes))


def _empty_tables(adapter_width: int, hidden_size: int, dtype: torch.dtype) -> LayerTables:
    def table() -> torch.Tensor:
        return torch.zeros(adapter_width, 2 * hidden_size, dtype=dtype)

    return LayerTables(
        weights=table(),
        first_moment=table(),
        second_moment=table(),
        gradients=table(),
        step_counts=torch.zeros(adapter_width, dtype=torch.int32),
        touched=torch.zeros(adapter_width, dtype=torch.bool),
    )
