"""The adapter's home: every row of every layer in host memory, with its optimizer state.

Letters: ``L`` layers, ``R`` adapter rows per layer, ``D`` hidden size, ``A`` active rows. A row is one neuron: its key
(the first ``D`` numbers) and its value (the last ``D``) lie together, so one gather and one copy move both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from meft.runtime.host import huge_pages
from meft.runtime.host.centroids import KeyMeans

if TYPE_CHECKING:
    from meft.runtime.host.kernels import HostKernels

Zeros = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""Makes a table of zeros."""


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


@dataclass(frozen=True)
class HotIndex:
    """One layer's record of which rows live on the device, int32 ``[R]`` each."""

    activations: torch.Tensor
    """In how many of the micro-batches that were counted a row was active."""
    places: torch.Tensor
    """Where a hot row lies on the device; -1 for all others, and for all before they are chosen."""

    @property
    def rows(self) -> torch.Tensor:
        """The hot rows, int64 ascending, which is the order of their places."""
        return (self.places >= 0).nonzero().flatten()

    def choose(self, num_rows: int) -> None:
        """Take the rows most often active, of equal ones the first."""
        order = self.activations.argsort(descending=True, stable=True)
        rows = order[:num_rows].sort().values
        self.places.fill_(-1)
        self.places[rows] = torch.arange(num_rows, dtype=torch.int32)


class RowUse:
    """How often each row was active: a run's statistics, which inference weights rows by.

    ``counts`` is int32 ``[R]`` per layer: in how many micro-batches that went backward a row was active, since training
    began; ``micro_batches`` int64 ``[1]`` how many there were. Like a run's other statistics it is in no ledger.
    """

    def __init__(self, *, num_layers: int, adapter_width: int) -> None:
        self.counts = tuple(torch.zeros(adapter_width, dtype=torch.int32) for _ in range(num_layers))
        self.micro_batches = torch.zeros(1, dtype=torch.int64)

    def note(self, layer: int, rows: torch.Tensor) -> None:
        """A micro-batch had these rows of a layer active, none twice."""
        self.counts[layer][rows] += 1

    def shares(self) -> tuple[torch.Tensor, ...] | None:
        """Per layer, fp32 ``[R]``: the share of micro-batches in which a row was active; None before the first."""
        total = int(self.micro_batches)
        return tuple(count / total for count in self.counts) if total else None

    def active_rows(self) -> tuple[float, ...]:
        """Mean active rows of a micro-batch, per layer; empty before the first."""
        total = int(self.micro_batches)
        return tuple(int(count.sum()) / total for count in self.counts) if total else ()


class HostStore:
    """Rows, moments, gradient accumulators and step counts of all layers; masters in ``dtype`` (fp32 outside tests).

    ``kernels`` do the work at the speed of memory; without them it is done by the readable code that they must equal.
    ``bf16_copy`` keeps a bf16 copy of every row to gather from: half as much to read, and as much more to keep.
    ``has_hot_rows`` keeps the tables that say which rows live on the device, ``means_of_experts`` the mean key of
    each of so many experts. ``zeros`` makes the tables, and of rows
    that several processes share ``own_rows`` are those whose gradients this one sums up and that it updates. ``held``
    are the rows that the tables are of, where other machines have the rest: row ``held.start`` is their first. Rows are
    told by their number among all ``R`` in :meth:`gather`, :meth:`accumulate` and :meth:`squares_of`, and by their
    place in the tables in :meth:`touched_rows`.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        adapter_width: int,
        hidden_size: int,
        dtype: torch.dtype = torch.float32,
        kernels: HostKernels | None = None,
        bf16_copy: bool = False,
        has_hot_rows: bool = False,
        means_of_experts: int | None = None,
        zeros: Zeros = huge_pages.zeros,
        own_rows: range | None = None,
        held: range | None = None,
    ) -> None:
        self.num_layers = num_layers
        self.adapter_width = adapter_width
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.kernels = kernels
        self.held = range(adapter_width) if held is None else held
        self.own_rows = self.held if own_rows is None else own_rows
        self.layers = tuple(_empty_tables(len(self.held), hidden_size, dtype, zeros) for _ in range(num_layers))
        self.use = RowUse(num_layers=num_layers, adapter_width=adapter_width)
        self.copies: tuple[torch.Tensor, ...] = ()
        if bf16_copy:
            shape = (len(self.held), 2 * hidden_size)
            self.copies = tuple(zeros(shape, torch.bfloat16) for _ in self.layers)
        self.hot: tuple[HotIndex, ...] = ()
        """Empty where no rows are hot."""
        if has_hot_rows:
            self.hot = tuple(_empty_index(adapter_width) for _ in range(num_layers))
        self.means: KeyMeans | None = None
        if means_of_experts is not None:
            self.means = KeyMeans(
                num_layers=num_layers, num_experts=means_of_experts, hidden_size=hidden_size, dtype=dtype
            )

    def initialise(self, *, seed: int) -> None:
        """Keys uniform in +-1/sqrt(D) (what ``torch.nn.Linear`` does), values zero: the adapter starts as nothing."""
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(self.hidden_size)
        for tables in self.layers:
            self._draw_keys(tables, bound, generator)
            tables.values.zero_()
        self.refresh_copies()

    def _draw_keys(self, tables: LayerTables, bound: float, generator: torch.Generator) -> None:
        """All rows' keys are drawn, in their order, and those held are kept."""
        if len(self.held) == self.adapter_width:
            tables.keys.uniform_(-bound, bound, generator=generator)
            return
        for row in range(self.adapter_width):
            key = torch.empty(self.hidden_size, dtype=self.dtype).uniform_(-bound, bound, generator=generator)
            if row in self.held:
                tables.keys[row - self.held.start] = key

    def refresh_copies(self) -> None:
        """Bring what is made of the rows up to date after they were written other than by the optimizer."""
        for tables, copy in zip(self.layers, self.copies, strict=False):
            copy.copy_(tables.weights)
        for layer in range(self.num_layers):
            self.keys_changed(layer)

    def keys_changed(self, layer: int) -> None:
        """A layer's keys were written, by whomever: the means of its experts' keys are to be taken anew."""
        if self.means is not None:
            self.means.keys_changed(layer)

    def gather(self, layer: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Copy rows ``[A]`` of a layer into ``out [A, 2D]``, converting to its dtype."""
        from_copy, rows = bool(self.copies) and out.dtype == torch.bfloat16, self._places(rows)
        weights = self.copies[layer] if from_copy else self.layers[layer].weights
        if self.kernels is not None:
            self.kernels.gather(weights, rows, out)
        elif out.dtype == weights.dtype:
            torch.index_select(weights, 0, rows, out=out)
        else:
            out.copy_(weights.index_select(0, rows))

    def accumulate(self, layer: int, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add the gradients ``[A, 2D]`` of one micro-batch to the window's sum."""
        tables, rows = self.layers[layer], self._places(rows)
        if self.kernels is not None:
            self.kernels.accumulate(tables.gradients, tables.touched, rows, gradients)
            return
        tables.gradients.index_add_(0, rows, gradients.to(self.dtype))
        tables.touched[rows] = True

    def touched_rows(self, layer: int) -> torch.Tensor:
        """Places of own rows with a gradient in this window, ascending int64."""
        first = self.own_rows.start - self.held.start
        rows = self.own_touched(layer).nonzero().flatten()
        return rows.add_(first) if first else rows

    def own_touched(self, layer: int) -> torch.Tensor:
        """The flags of this store's own rows: a view."""
        first = self.held.start
        return self.layers[layer].touched[self.own_rows.start - first : self.own_rows.stop - first]

    def _places(self, rows: torch.Tensor) -> torch.Tensor:
        """Where rows are in the tables."""
        return rows - self.held.start if self.held.start else rows

    def _numbers(self, places: torch.Tensor) -> torch.Tensor:
        """Which rows are at these places."""
        return places + self.held.start if self.held.start else places

    def squared_gradient_norm(self) -> float:
        """Sum of squares of the window's gradients over all layers."""
        return math.fsum(self.squared_norm_of(layer) for layer in range(self.num_layers))

    def squared_norm_of(self, layer: int) -> float:
        """Sum of squares of one layer's gradients in this window."""
        rows, gradients = self.touched_rows(layer), self.layers[layer].gradients
        if self.kernels is not None:
            return self.kernels.squared_norm(gradients, rows)
        return math.fsum(float(gradients[some].double().square().sum()) for some in in_chunks(rows, gradients))

    def squares_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's own touched rows, and of each the sum of squares of its gradient in this window, fp64."""
        rows, gradients = self.touched_rows(layer), self.layers[layer].gradients
        if self.kernels is not None:
            return self._numbers(rows), self.kernels.squares(gradients, rows)
        squares = [gradients[some].double().square().sum(dim=1) for some in in_chunks(rows, gradients)]
        return self._numbers(rows), torch.cat(squares) if squares else torch.empty(0, dtype=torch.float64)

    def clear_gradients(self) -> None:
        """Zero the touched rows' gradients and open a new window; own rows only."""
        for layer, tables in enumerate(self.layers):
            tables.gradients.index_fill_(0, self.touched_rows(layer), 0.0)
            self.own_touched(layer).zero_()

    def checksum(self) -> tuple[int, ...]:
        """Of each layer's weights the sum of their bits, read as whole numbers: equal rows have equal ones."""
        return tuple(int(tables.weights.view(torch.int32).sum(dtype=torch.int64)) for tables in self.layers)

    def bytes_by_category(self) -> dict[str, int]:
        """Bytes of the tables over all layers, under the names of the host ledger."""
        totals = dict.fromkeys(_CATEGORIES.values(), 0)
        for tables in self.layers:
            for name, category in _CATEGORIES.items():
                table: torch.Tensor = getattr(tables, name)
                totals[category] += table.numel() * table.element_size()
        if self.copies:
            totals["adapter_bf16_copy"] = sum(copy.numel() * copy.element_size() for copy in self.copies)
        if self.hot:
            tables_of_hot = (table for index in self.hot for table in (index.activations, index.places))
            totals["hot_index"] = sum(table.numel() * table.element_size() for table in tables_of_hot)
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


def _empty_index(adapter_width: int) -> HotIndex:
    activations = torch.zeros(adapter_width, dtype=torch.int32)
    return HotIndex(activations, torch.full_like(activations, -1))


def _empty_tables(adapter_width: int, hidden_size: int, dtype: torch.dtype, zeros: Zeros) -> LayerTables:
    def table() -> torch.Tensor:
        return zeros((adapter_width, 2 * hidden_size), dtype)

    return LayerTables(
        weights=table(),
        first_moment=table(),
        second_moment=table(),
        gradients=table(),
        step_counts=zeros((adapter_width,), torch.int32),
        touched=zeros((adapter_width,), torch.bool),
    )
