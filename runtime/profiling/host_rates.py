"""What this host does per second: the runtime's own work on rows, products and choices, by dtype and size.

Rows come from tables that no cache holds, layer after layer as in a step. Rates count bytes as the profile does:
read plus written. Letters: ``R`` adapter rows, ``D`` hidden size, ``T`` tokens, ``K`` rows per token, ``N`` experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from meft.planner.records.profile_file import Measurement
from meft.runtime.host.kernels import HostKernels
from meft.runtime.host.optimizer import AdamWSettings, update_layer
from meft.runtime.host.router import TopKRouter
from meft.runtime.host.store import HostStore
from meft.runtime.profiling.measure import sample

MIB = 1 << 20
COPY_BYTES = (MIB, 64 * MIB)
"""One size that a core's cache holds, one that it does not."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRODUCTS = ((128, 576, 1536), (512, 1024, 4096))
"""Tokens, hidden size, rows."""
SHORT = 4
KEYS_TOO_SHORT = "keys too short to cost arithmetic"
ADAMW_BYTES_PER_NUMBER = 28
"""Weight and two moments read and written, gradient read, in fp32."""


@dataclass(frozen=True)
class RowTables:
    """A store of ``layers`` tables ``[R, 2D]`` of which ``active`` rows of each layer are worked on."""

    layers: int = 12
    adapter_width: int = 1536
    hidden_size: int = 1024
    active: int = 400

    @property
    def numbers(self) -> int:
        """Numbers in the active rows of all layers."""
        return self.layers * self.active * 2 * self.hidden_size

    @property
    def detail(self) -> str:
        """For a measurement."""
        shape = f"{self.active} of {self.adapter_width} rows of 2 x {self.hidden_size} numbers"
        return f"{shape} in each of {self.layers} layers"


TABLES = RowTables()


def copies() -> Iterator[Measurement]:
    """Copying within host memory, read plus written."""
    for name, dtype in DTYPES.items():
        for size in COPY_BYTES:
            source = torch.ones(size // dtype.itemsize, dtype=dtype)
            target = torch.empty_like(source)
            taken = sample(lambda source=source, target=target: target.copy_(source))  # type: ignore[misc]
            yield taken.rate("host copy", "B/s", f"{name}, {size / MIB:.0f} MiB", amount=2 * size)


def products() -> Iterator[Measurement]:
    """Matrix products ``[T, D] x [D, R]``, as routing scores rows."""
    for name, dtype in DTYPES.items():
        for tokens, hidden, rows in PRODUCTS:
            left, right = torch.randn(tokens, hidden).to(dtype), torch.randn(rows, hidden).to(dtype)
            taken = sample(lambda left=left, right=right: left @ right.T)  # type: ignore[misc]
            flops = 2 * tokens * hidden * rows
            yield taken.rate("host product", "flop/s", f"{name}, {tokens} x {hidden} x {rows}", amount=flops)


def row_work(kernels: HostKernels) -> Iterator[Measurement]:
    """Gather, scatter and AdamW on rows, by the runtime's own code."""
    tables = TABLES
    store = HostStore(
        num_layers=tables.layers,
        adapter_width=tables.adapter_width,
        hidden_size=tables.hidden_size,
        kernels=kernels,
    )
    store.initialise(seed=0)
    chosen = _chosen(tables)
    for name, dtype in DTYPES.items():
        staging = torch.zeros(tables.active, 2 * tables.hidden_size, dtype=dtype)
        taken = sample(lambda staging=staging: _gather_all(store, chosen, staging))  # type: ignore[misc]
        moved = tables.numbers * (4 + dtype.itemsize)
        yield taken.rate("host gather", "B/s", f"{name}, {tables.detail}", amount=moved)
        taken = sample(lambda staging=staging: _accumulate_all(store, chosen, staging))  # type: ignore[misc]
        added = tables.numbers * (dtype.itemsize + 8)
        yield taken.rate("host scatter", "B/s", f"{name}, {tables.detail}", amount=added)
    landed = torch.full((tables.active, 2 * tables.hidden_size), 1e-3)
    taken = sample(lambda: _optimize(store), prepare=lambda: _accumulate_all(store, chosen, landed))
    amount = tables.numbers * ADAMW_BYTES_PER_NUMBER
    yield taken.rate("host AdamW", "B/s", f"fp32 with norm and clearing, {tables.detail}", amount=amount)


class RowWork:
    """Rows in bf16 gathered and their gradients added up, of all layers: what the host does in every step."""

    def __init__(self) -> None:
        tables = TABLES
        self.detail = f"bf16 gather and scatter, {tables.detail}"
        self._store = HostStore(
            num_layers=tables.layers, adapter_width=tables.adapter_width, hidden_size=tables.hidden_size
        )
        self._store.initialise(seed=0)
        self._chosen = _chosen(tables)
        self._staging = torch.zeros(tables.active, 2 * tables.hidden_size, dtype=torch.bfloat16)

    def run(self, kernels: HostKernels) -> None:
        """Once, by these kernels."""
        self._store.kernels = kernels
        _gather_all(self._store, self._chosen, self._staging)
        _accumulate_all(self._store, self._chosen, self._staging)


def _chosen(tables: RowTables) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randperm(tables.adapter_width, generator=generator)[: tables.active].sort().values
        for _ in range(tables.layers)
    ]


def _gather_all(store: HostStore, chosen: list[torch.Tensor], staging: torch.Tensor) -> None:
    for layer, rows in enumerate(chosen):
        store.gather(layer, rows, staging)


def _accumulate_all(store: HostStore, chosen: list[torch.Tensor], gradients: torch.Tensor) -> None:
    for layer, rows in enumerate(chosen):
        store.accumulate(layer, rows, gradients)


def _optimize(store: HostStore) -> None:
    store.squared_gradient_norm()
    for layer in range(store.num_layers):
        update_layer(store, layer, AdamWSettings(), learning_rate=1e-4)


def routing(kernels: HostKernels) -> Iterator[Measurement]:
    """Choosing rows: scores per second beyond the product, and what a layer and an expert cost besides."""
    tokens, width, top_k = 128, 3072, 64
    keys, queries = torch.randn(width, SHORT), torch.randn(tokens, SHORT)
    router = TopKRouter(top_k, width, 1, kernels)
    whole = sample(lambda: router.select(0, keys, queries, None))
    detail = f"top {top_k} of {width} rows for {tokens} tokens and their union, {KEYS_TOO_SHORT}"
    yield whole.rate("host top-K", "score/s", detail, amount=tokens * width)
    few, small = torch.randn(64, 8), torch.randn(4, 8)
    tiny = TopKRouter(1, 64, 1, kernels)
    alone = sample(lambda: tiny.select(0, few, small, None))
    yield alone.duration("host overhead per layer", "exact routing of 4 tokens over 64 rows: Python and calls")
    experts, probes = 48, torch.stack([torch.randperm(48)[:8] for _ in range(128)]).to(torch.int32)
    short, states = torch.randn(48 * 8, SHORT), torch.randn(128, SHORT)
    grouped = TopKRouter(8, 48 * 8, experts, kernels)
    taken = sample(lambda: grouped.select(0, short, states, probes))
    yield taken.duration(
        "host overhead per expert",
        f"Key-Experts routing of 128 tokens over 48 experts, {KEYS_TOO_SHORT}, over the experts",
        parts=experts,
    )
