"""Host memory of the adapter: its tables, and the buffers that copies go through.

Tables, all fp32 ``[R, 2D]`` per layer: weights, two AdamW moments, the accumulation window's gradient sum; and per row
an int32 step count and a bool that says whether the window touched it. Buffers are pinned on CUDA, as they are: memory
of their own that is registered, where torch's pinned allocator would round each up to a power of two.

Of several ranks each has its buffers, while the tables are there once; those that gradients land in are shared too, so
that whoever owns a row adds it up. Of several machines this is each one's memory; where each has its own rows alone,
``R`` is its part of them in every table but the rows' squares.

The frozen model is on the device and has no copy here.

Letters: ``L`` layers, ``R`` adapter rows per layer, ``D`` hidden size, ``T`` tokens, ``p`` prefetch depth,
``P`` probes, ``N`` experts.
"""

from __future__ import annotations

import numpy as np

from meft.planner.base.quantities import (
    ADAPTER_DTYPE_BYTES,
    BF16_BYTES,
    COMPUTE_DTYPE_BYTES,
    INDEX_BYTES,
    MASTER_BYTES,
    Flags,
    Ints,
    smaller,
)
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Decision, HostMemory, MemoryEntry, Request
from meft.planner.terms.activations import choose
from meft.planner.traffic.network import buffer_bytes_per_rank
from meft.planner.traffic.owned import owner_buffer_bytes
from meft.planner.traffic.transfer import layers_queried, router_gradient_bytes

_FLAG_BYTES = 1
_SQUARE_BYTES = 8
_ROW_BYTES = 8
_MOMENTS = 2

_BECAUSE = {
    "adapter_weights": "fp32 keys and values of all rows, L * R * 2D",
    "adapter_moments": "two fp32 AdamW moments per weight",
    "adapter_gradients": "fp32 sum of the row gradients of an accumulation window, as large as the weights",
    "step_counts": "int32 update count per row",
    "touched_flags": "bool per row: has a gradient in this window",
    "row_staging": "p+1 buffers [cap, 2D] that gathered rows leave from",
    "gradient_landing": "min(p, 1)+1 buffers [cap, 2D] where row gradients arrive",
    "adapter_bf16_copy": "bf16 copy of all rows, to gather from",
    "cache_index": "int32 per row and int64 per cached row: which rows are on the device, and where",
    "hot_index": "two int32 per row: how often it was active until the hot rows were chosen, and a hot row's place",
    "query_landing": "p+1 buffers [T, D] where hidden states arrive, or as many as layers send one",
    "probes_landing": "Key-Experts: p+1 buffers [T, P] int32 where the probed experts arrive",
    "row_experts_landing": "Key-Experts: p+1 buffers [cap] int32 that the active rows' experts leave from",
    "gradient_rows": "several ranks: for each gradient landing an int64 [cap], which rows it is of",
    "row_squares": "several ranks: fp64 per row, its gradient's sum of squares, for clipping",
    "router_landing": "several ranks: where the routers' gradients of each arrive, fp32 L * [N, D]",
    "router_sums": "several ranks: sums of the routers' gradients, fp32 L * [N, D]",
    "network_buffers": "several machines: what each rank sends rows, sums and routers' numbers from, and receives in",
    "router_means": "centroids: the mean of each expert's keys, fp32 L * [N, D], in each process",
    "row_positions_landing": "p+1 buffers [cap] int32 that the places of rows on the device leave from",
}
_STAGING = (
    "row_staging",
    "gradient_landing",
    "query_landing",
    "probes_landing",
    "row_experts_landing",
    "row_positions_landing",
)


def table_bytes(*, num_layers: Ints, adapter_width: Ints, hidden_size: Ints) -> Ints:
    """One fp32 table ``[R, 2D]`` per layer."""
    return num_layers * adapter_width * 2 * hidden_size * MASTER_BYTES


def step_count_bytes(*, num_layers: Ints, adapter_width: Ints) -> Ints:
    """One int32 per row."""
    return num_layers * adapter_width * INDEX_BYTES


def touched_flag_bytes(*, num_layers: Ints, adapter_width: Ints) -> Ints:
    """One bool per row."""
    return num_layers * adapter_width * _FLAG_BYTES


def cache_index_bytes(*, num_layers: Ints, adapter_width: Ints, cached_rows: Ints) -> Ints:
    """A place per row and a row per place, where rows are cached at all."""
    return (cached_rows > 0) * num_layers * (adapter_width * INDEX_BYTES + cached_rows * _ROW_BYTES)


def hot_index_bytes(*, num_layers: Ints, adapter_width: Ints, hot_rows: Ints) -> Ints:
    """A count and a place per row, where rows are hot at all."""
    return (hot_rows > 0) * num_layers * adapter_width * 2 * INDEX_BYTES


def router_means_bytes(*, num_layers: Ints, num_experts: Ints, hidden_size: Ints, means: Flags) -> Ints:
    """Centroids: the mean of each expert's keys, fp32 ``[N, D]`` per layer."""
    return choose(means, num_layers * num_experts * hidden_size * MASTER_BYTES, 0)


def row_buffer_bytes(*, active_rows_cap: Ints, hidden_size: Ints, adapter_dtype_bytes: Ints) -> Ints:
    """One buffer ``[cap, 2D]`` for rows or their gradients."""
    return active_rows_cap * 2 * hidden_size * adapter_dtype_bytes


def query_buffer_bytes(*, tokens: Ints, hidden_size: Ints, compute_dtype_bytes: Ints) -> Ints:
    """One buffer ``[T, D]`` for hidden states."""
    return tokens * hidden_size * compute_dtype_bytes


def ring_slots(*, prefetch_depth: Ints, num_layers: int) -> Ints:
    """``p + 1``: a layer's rows and those of the layers that look-ahead fetches, of which there are ``L`` at most."""
    return smaller(prefetch_depth + 1, num_layers)


def gradient_slots(*, prefetch_depth: Ints, num_layers: int) -> Ints:
    """Row gradients on the way at once: one, or two with look-ahead."""
    return ring_slots(prefetch_depth=np.minimum(prefetch_depth, 1), num_layers=num_layers)


def host_bytes_by_category(*, request: Request, candidates: Candidates) -> dict[str, Ints]:
    """Every category's bytes, zeros included."""
    num_layers, hidden_size = request.model.num_layers, request.model.hidden_size
    adapter_width, prefetch_depth = candidates.adapter_width, candidates.prefetch_depth
    active_rows_cap, key_experts = candidates.active_rows_cap, candidates.key_experts
    held = adapter_width // request.nodes if candidates.owned else adapter_width
    cached_rows, hot_rows = candidates.cached_rows, candidates.hot_rows
    table = table_bytes(num_layers=num_layers, adapter_width=held, hidden_size=hidden_size)
    row_buffer = row_buffer_bytes(
        active_rows_cap=active_rows_cap,
        hidden_size=hidden_size,
        adapter_dtype_bytes=ADAPTER_DTYPE_BYTES[request.adapter_dtype],
    )
    query_buffer = query_buffer_bytes(
        tokens=request.tokens_per_step,
        hidden_size=hidden_size,
        compute_dtype_bytes=COMPUTE_DTYPE_BYTES[request.weights_dtype],
    )
    probes = request.tokens_per_step * candidates.num_probes * INDEX_BYTES
    slots = ring_slots(prefetch_depth=prefetch_depth, num_layers=num_layers)
    chunked = candidates.token_chunks > 1
    queried = layers_queried(num_layers=num_layers, prefetch_depth=prefetch_depth, token_chunks=candidates.token_chunks)
    indices = active_rows_cap * INDEX_BYTES
    copied = candidates.bf16_copy if request.adapter_dtype == "bf16" else 0
    sizes: dict[str, Ints] = {
        "adapter_weights": table,
        "adapter_bf16_copy": copied * (table // MASTER_BYTES * BF16_BYTES),
        "cache_index": cache_index_bytes(num_layers=num_layers, adapter_width=adapter_width, cached_rows=cached_rows),
        "hot_index": hot_index_bytes(num_layers=num_layers, adapter_width=adapter_width, hot_rows=hot_rows),
        "adapter_moments": _MOMENTS * table,
        "adapter_gradients": table,
        "step_counts": step_count_bytes(num_layers=num_layers, adapter_width=held),
        "touched_flags": touched_flag_bytes(num_layers=num_layers, adapter_width=held),
        "row_staging": slots * row_buffer,
        "gradient_landing": gradient_slots(prefetch_depth=prefetch_depth, num_layers=num_layers) * row_buffer,
        "query_landing": smaller(slots, queried) * query_buffer,
        "probes_landing": key_experts * slots * probes,
        "row_experts_landing": key_experts * slots * indices,
        "row_positions_landing": ((cached_rows + hot_rows > 0) | chunked) * slots * indices,
        "router_means": router_means_bytes(
            num_layers=num_layers, num_experts=candidates.num_experts, hidden_size=hidden_size, means=candidates.means
        ),
    }
    return sizes if request.ranks == 1 else _of_ranks(request, candidates, sizes)


def _of_ranks(request: Request, candidates: Candidates, sizes: dict[str, Ints]) -> dict[str, Ints]:
    """The same of several ranks: buffers of each, tables once, and what they share to add gradients up."""
    ranks, num_layers, hidden_size = request.gpus, request.model.num_layers, request.model.hidden_size
    machines = request.nodes
    slots = gradient_slots(prefetch_depth=candidates.prefetch_depth, num_layers=num_layers)
    cap, row_dtype = candidates.active_rows_cap, ADAPTER_DTYPE_BYTES[request.adapter_dtype]
    routers = router_gradient_bytes(
        num_layers=num_layers,
        num_experts=candidates.router_rows,
        hidden_size=hidden_size,
        key_experts=candidates.key_experts,
        ranks=request.ranks,
    )
    network: Ints = 0
    if machines > 1:
        network = buffer_bytes_per_rank(
            machines=machines,
            ranks=ranks,
            slots=slots,
            active_rows_cap=cap,
            adapter_width=candidates.adapter_width,
            hidden_size=hidden_size,
            adapter_dtype_bytes=row_dtype,
            router_numbers=routers // MASTER_BYTES,
            owned=candidates.owned,
        )
        if candidates.owned:
            network = network + _of_owners(request, candidates)
    own = {name: ranks * sizes[name] for name in (*_STAGING, "cache_index", "router_means")}
    return (
        sizes
        | own
        | {
            "gradient_rows": ranks * slots * cap * _ROW_BYTES,
            "row_squares": num_layers * candidates.adapter_width * _SQUARE_BYTES,
            "router_landing": ranks * routers,
            "router_sums": routers,
            "network_buffers": ranks * network,
        }
    )


def _of_owners(request: Request, candidates: Candidates) -> Ints:
    """Of a rank that asks the machines that own rows, and answers."""
    return owner_buffer_bytes(
        machines=request.nodes,
        tokens=request.tokens_per_step,
        num_probes=candidates.num_probes,
        num_experts=candidates.num_experts,
        active_rows_cap=candidates.active_rows_cap,
        adapter_width=candidates.adapter_width,
        hidden_size=request.model.hidden_size,
        adapter_dtype_bytes=ADAPTER_DTYPE_BYTES[request.adapter_dtype],
        compute_dtype_bytes=COMPUTE_DTYPE_BYTES[request.weights_dtype],
        means=candidates.means,
    )


def host_total_bytes(*, request: Request, candidates: Candidates) -> Ints:
    """All of it, for the search."""
    total: Ints = sum(host_bytes_by_category(request=request, candidates=candidates).values())
    return total


def host_memory(*, request: Request, decision: Decision) -> HostMemory:
    """The ledger of a decision."""
    sizes = host_bytes_by_category(request=request, candidates=Candidates.of(decision))
    entries = tuple(_entry(name, int(num_bytes)) for name, num_bytes in sizes.items() if num_bytes)
    return HostMemory(entries=entries, total_bytes=sum(entry.num_bytes for entry in entries))


def _entry(category: str, num_bytes: int) -> MemoryEntry:
    return MemoryEntry(
        place="host",
        phase="resident",
        category=category,
        num_bytes=num_bytes,
        basis="counted",
        because=_BECAUSE[category],
    )
