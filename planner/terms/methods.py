"""What MEFT puts on the device beside the frozen model.

Letters: ``T`` tokens, ``L`` layers, ``D`` hidden size, ``R`` adapter rows per layer, ``A`` active rows of a layer,
``q`` bytes of a hidden-state element, ``e`` bytes of an adapter element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.dtypes import WeightsDtype
from meft.planner.base.quantities import COMPUTE_DTYPE_BYTES, Flags, Ints, chunk_tokens
from meft.planner.models.architecture import ModelShape
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Attention
from meft.planner.terms import adapter as ada
from meft.planner.terms.activations import largest
from meft.planner.terms.ledger import Row
from meft.planner.traffic import hot_rows as hot
from meft.planner.traffic.sparsity import distinct_layers


@dataclass(frozen=True, eq=False, repr=False)
class Workload:
    """What a step trains on and how."""

    batch_size: Ints
    seq_len: Ints
    weights_dtype: WeightsDtype = "bf16"
    attention: Attention = "sdpa"
    activation_checkpointing: Flags = False
    double_quant: bool = False
    packed: bool = False
    """Sequences hold several documents, each with positions of its own."""
    shards: int = 1
    """Cards that each have their part of the layers' matrices, and gather them layer by layer."""

    @property
    def tokens(self) -> Ints:
        """``T``."""
        return self.batch_size * self.seq_len

    @property
    def compute_bytes(self) -> int:
        """``q``."""
        return COMPUTE_DTYPE_BYTES[self.weights_dtype]


@dataclass(frozen=True, eq=False, repr=False)
class SparseAdapter:
    """MEFT: rows on the host, the active ones on the device. ``active_rows`` is ``[L]``, or ``[L, ...]`` for many."""

    active_rows: NDArray[np.int64]
    candidates: Candidates
    adapter_bytes: int
    """``e``."""


@dataclass(frozen=True, eq=False, repr=False)
class Trained:
    """What the adapter adds to a step.

    ``kept_*``: for backward by all layers, by the last, and by the one that keeps most; ``free_*``: how much of that
    is free again when the layer's FFN goes backward, and ``beside_ffn`` what the adapter holds then. ``held``: from
    forward to backward whether or not activations are checkpointed.
    """

    resident: tuple[Row, ...]
    kept_all: Ints
    kept_last: Ints
    kept_most: Ints
    free_last: Ints
    free_most: Ints
    forward: Ints
    backward: Ints
    beside_ffn: Ints = 0
    held: Ints = 0
    optimizer_temporary: Ints = 0


def trained_by(shape: ModelShape, workload: Workload, method: SparseAdapter) -> Trained:
    """What ``method`` adds to a step of ``workload`` on a model of ``shape``."""
    if method.candidates.token_chunks > 1:
        return _trained_by_chunks(shape, workload, method)
    tokens, e, chosen = workload.tokens, method.adapter_bytes, method.candidates
    per_layer = ada.adapter_inputs_bytes(tokens=tokens, hidden_size=shape.hidden_size, e=e) + ada.gates_bytes(
        tokens=tokens, num_experts=chosen.router_rows, key_experts=chosen.key_experts, e=e, switch=chosen.switch
    )

    def of_rows(active_rows: Ints) -> Ints:
        return per_layer + ada.adapter_activations_bytes(tokens=tokens, active_rows=active_rows, e=e)

    total = _plain(_total_of_layers(method.active_rows))
    kept_last = of_rows(_plain(method.active_rows[-1]))
    most = _plain(distinct_layers(method.active_rows).max(axis=0))
    router = _router_bytes(shape, method)
    return Trained(
        resident=_sparse_adapter_resident(shape, method),
        kept_all=(shape.num_layers - 1) * per_layer + of_rows(total),
        kept_last=kept_last,
        kept_most=of_rows(most),
        free_last=kept_last,
        free_most=of_rows(most),
        beside_ffn=tokens * shape.hidden_size * workload.compute_bytes,
        held=_routing_bytes(shape, workload, method),
        forward=ada.adapter_forward_bytes(
            tokens=tokens,
            hidden_size=shape.hidden_size,
            active_rows=most,
            key_experts=chosen.key_experts,
            e=e,
            q=workload.compute_bytes,
            top_k=chosen.top_k,
            own_rows=chosen.own_rows,
            num_experts=chosen.num_experts,
            switch=chosen.switch,
        ),
        backward=ada.adapter_backward_bytes(
            tokens=tokens,
            hidden_size=shape.hidden_size,
            active_rows=most,
            num_experts=chosen.num_experts,
            num_probes=chosen.num_probes,
            key_experts=chosen.key_experts,
            e=e,
            q=workload.compute_bytes,
            switch=chosen.switch,
            routers=chosen.routers,
        ),
        optimizer_temporary=largest(
            router, hot.hot_update_bytes(hidden_size=shape.hidden_size, hot_rows=chosen.hot_rows)
        ),
    )


def _trained_by_chunks(shape: ModelShape, workload: Workload, method: SparseAdapter) -> Trained:
    """The same where tokens come in chunks: a layer keeps its input alone, and what is as large as tokens times rows is
    there for one chunk at a time."""
    tokens, q, e, chosen = workload.tokens, workload.compute_bytes, method.adapter_bytes, method.candidates
    kept = ada.adapter_inputs_bytes(tokens=tokens, hidden_size=shape.hidden_size, e=q)
    sizes: dict[str, Any] = {
        "tokens": tokens,
        "chunk_tokens": chunk_tokens(int(tokens), chosen.token_chunks),
        "hidden_size": shape.hidden_size,
        "active_rows": _plain(method.active_rows.max(axis=0)),
        "num_experts": chosen.num_experts,
        "key_experts": chosen.key_experts,
        "e": e,
        "q": q,
    }
    return Trained(
        resident=_sparse_adapter_resident(shape, method),
        kept_all=shape.num_layers * kept,
        kept_last=kept,
        kept_most=kept,
        free_last=kept,
        free_most=kept,
        beside_ffn=tokens * shape.hidden_size * q,
        held=_routing_bytes(shape, workload, method),
        forward=ada.chunk_forward_bytes(**sizes, top_k=chosen.top_k, own_rows=chosen.own_rows),
        backward=ada.chunk_backward_bytes(**sizes, num_probes=chosen.num_probes),
        optimizer_temporary=_router_bytes(shape, method),
    )


def _routing_bytes(shape: ModelShape, workload: Workload, method: SparseAdapter) -> Ints:
    return shape.num_layers * ada.probes_bytes(
        tokens=workload.tokens, num_probes=method.candidates.num_probes, key_experts=method.candidates.key_experts
    )


def _router_bytes(shape: ModelShape, method: SparseAdapter) -> Ints:
    return ada.router_weights_bytes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_experts=method.candidates.router_rows,
        key_experts=method.candidates.key_experts,
    )


def _sparse_adapter_resident(shape: ModelShape, method: SparseAdapter) -> tuple[Row, ...]:
    chosen = method.candidates
    staging = ada.row_staging_bytes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        active_rows_cap=chosen.active_rows_cap,
        prefetch_depth=chosen.prefetch_depth,
        retained=chosen.retained,
        token_chunks=chosen.token_chunks,
        e=method.adapter_bytes,
    )
    gradients = ada.row_gradients_bytes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        active_rows_cap=chosen.active_rows_cap,
        prefetch_depth=chosen.prefetch_depth,
        e=method.adapter_bytes,
    )
    router, of_router = _router_bytes(shape, method), "N" if chosen.routers == 1 else f"{chosen.routers}N"
    kept = ada.kept_rows_bytes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        cached_rows=chosen.cached_rows,
        e=method.adapter_bytes,
    )
    sums = ada.gradient_sums_bytes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        cached_rows=chosen.cached_rows,
        gradients_on_device=chosen.gradients_on_device,
        hot_rows=chosen.hot_rows,
        e=method.adapter_bytes,
    )
    indices = ada.row_indices_bytes(
        num_layers=shape.num_layers,
        active_rows_cap=chosen.active_rows_cap,
        cached_rows=chosen.cached_rows,
        key_experts=chosen.key_experts,
        hot_rows=chosen.hot_rows,
        token_chunks=chosen.token_chunks,
    )
    return (
        *_hot_resident(shape, method),
        Row("resident", "kept_rows", kept, "rows [C, 2D] per layer that stay through an accumulation window"),
        Row("resident", "gradient_sums", sums, "fp32 sums [C, 2D] per layer of the kept rows' gradients"),
        Row("resident", "row_indices", indices, "int32 [cap] per layer: each row's expert, each resident row's place"),
        Row("resident", "row_staging", staging, "buffers [cap, 2D] for rows: p+1, or one per layer when retained"),
        Row("resident", "row_gradients", gradients, "min(p, 1)+1 buffers [cap, 2D] for row gradients"),
        Row("resident", "router_weights", router, f"Key-Experts routers, fp32 [{of_router}, D] per layer"),
        Row("resident", "router_gradients", router, "the routers' gradients, summed over an accumulation window"),
        Row("resident", "router_moments", 2 * router, "two AdamW moments of the routers"),
    )


def _hot_resident(shape: ModelShape, method: SparseAdapter) -> tuple[Row, ...]:
    of_rows = hot.hot_rows_bytes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        hot_rows=method.candidates.hot_rows,
        e=method.adapter_bytes,
    )
    of_states = hot.hot_states_bytes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        hot_rows=method.candidates.hot_rows,
        e=method.adapter_bytes,
    )
    because = "fp32 master weights where rows are bf16, two moments, gradient sums; two counts per row"
    return (
        Row("resident", "hot_rows", of_rows, "the most often active rows [H, 2D] per layer, there for good"),
        Row("resident", "hot_states", of_states, because),
    )


def _total_of_layers(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum over layers, of which those that are one by construction are counted."""
    distinct = distinct_layers(rows)
    total: NDArray[np.int64] = distinct.sum(axis=0) * (len(rows) // len(distinct))
    return total


def _plain(values: NDArray[np.int64]) -> Ints:
    """An int for a 0-d result, else the array."""
    return int(values) if np.ndim(values) == 0 else values
