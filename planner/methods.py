"""What a training method puts on the device beside the frozen model: MEFT, and the dense methods it is compared with.

Letters: ``T`` tokens, ``L`` layers, ``D`` hidden size, ``R`` adapter rows per layer, ``A`` active rows of a layer,
``q`` bytes of a hidden-state element, ``e`` bytes of an adapter element.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meft.planner import activations as act
from meft.planner import terms_adapter as ada
from meft.planner.architecture import ModelShape
from meft.planner.ledger import Row
from meft.planner.plan import Attention, WeightsDtype
from meft.planner.quantities import COMPUTE_DTYPE_BYTES, Flags, Ints
from meft.planner.terms_weights import LinearName, linear_sizes


@dataclass(frozen=True)
class Workload:
    """What a step trains on and how. ``padded`` batches need a mask tensor where all-ones masks do not.

    ``outputs_kept``: the loop holds on to the model's outputs, so logits (and without checkpointing the KV cache)
    live through backward; stock loops that keep ``outputs`` in a variable do, the MEFT runtime does not.
    """

    batch_size: Ints
    seq_len: Ints
    weights_dtype: WeightsDtype = "bf16"
    attention: Attention = "sdpa"
    activation_checkpointing: Flags = False
    double_quant: bool = False
    grad_accum: int = 1
    padded: bool = True
    outputs_kept: bool = False

    @property
    def tokens(self) -> Ints:
        """``T``."""
        return self.batch_size * self.seq_len

    @property
    def compute_bytes(self) -> int:
        """``q``."""
        return COMPUTE_DTYPE_BYTES[self.weights_dtype]


@dataclass(frozen=True)
class SparseAdapter:
    """MEFT: rows on the host, the active ones on the device. ``active_rows`` is ``[L]``, or ``[L, candidates]``."""

    active_rows: NDArray[np.int64]
    active_rows_cap: Ints
    prefetch_depth: Ints
    retained: Flags
    key_experts: Flags
    num_experts: Ints
    num_probes: Ints
    adapter_bytes: int
    cached_rows: Ints = 0
    gradients_on_device: Flags = False


@dataclass(frozen=True)
class ParallelAdapter:
    """The same adapter, dense, trained on the device with AdamW in its own dtype."""

    adapter_width: Ints
    adapter_bytes: int = 4


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside linear layers; with quantized weights this is QLoRA. PEFT keeps them in fp32."""

    rank: Ints
    targets: tuple[LinearName, ...] = ("q", "k", "v", "o")
    adapter_bytes: int = 4


@dataclass(frozen=True)
class Full:
    """Every weight trained, gradients and moments in the weights' dtype (fp32, bf16 or fp16)."""


Method = SparseAdapter | ParallelAdapter | Lora | Full


@dataclass(frozen=True)
class Trained:
    """What a method adds to a step.

    ``kept_*``: for backward by all layers, by the last, and by the one that keeps most; ``free_*``: how much of that
    is free again when the layer's FFN goes backward, and ``beside_ffn`` what the method holds then. ``held``: from
    forward to backward whether or not activations are checkpointed. ``first_gradients`` and ``last_gradients``: those
    that are there when the FFN of the last layer, and of layer 0, goes backward; ``head_gradients`` precede them.
    ``whole_first_layer``: gradients flow through all of layer 0, not from its FFN on.
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
    gradients: Ints = 0
    first_gradients: Ints = 0
    last_gradients: Ints = 0
    head_gradients: Ints = 0
    optimizer_temporary: Ints = 0
    head_inputs: Ints = 0
    whole_first_layer: bool = False


def trained_by(shape: ModelShape, workload: Workload, method: Method) -> Trained:
    """What ``method`` adds to a step of ``workload`` on a model of ``shape``."""
    if isinstance(method, SparseAdapter):
        return _sparse_adapter(shape, workload, method)
    if isinstance(method, ParallelAdapter):
        return _parallel_adapter(shape, workload, method)
    if isinstance(method, Lora):
        return _lora(shape, workload, method)
    return _full(shape, workload)


def _sparse_adapter(shape: ModelShape, workload: Workload, method: SparseAdapter) -> Trained:
    tokens, e = workload.tokens, method.adapter_bytes
    per_layer = ada.adapter_inputs_bytes(tokens=tokens, hidden_size=shape.hidden_size, e=e) + ada.gates_bytes(
        tokens=tokens, num_experts=method.num_experts, key_experts=method.key_experts, e=e
    )

    def of_rows(active_rows: Ints) -> Ints:
        return per_layer + ada.adapter_activations_bytes(tokens=tokens, active_rows=active_rows, e=e)

    total = _plain(method.active_rows.sum(axis=0))
    kept_last = of_rows(_plain(method.active_rows[-1]))
    most = _plain(method.active_rows.max(axis=0))
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
            key_experts=method.key_experts,
            e=e,
            q=workload.compute_bytes,
        ),
        backward=ada.adapter_backward_bytes(
            tokens=tokens,
            hidden_size=shape.hidden_size,
            active_rows=most,
            num_experts=method.num_experts,
            num_probes=method.num_probes,
            key_experts=method.key_experts,
            e=e,
            q=workload.compute_bytes,
        ),
        optimizer_temporary=router,
    )


def _routing_bytes(shape: ModelShape, workload: Workload, method: SparseAdapter) -> Ints:
    return shape.num_layers * ada.probes_bytes(
        tokens=workload.tokens, num_probes=method.num_probes, key_experts=method.key_experts
    )


def _router_bytes(shape: ModelShape, method: SparseAdapter) -> Ints:
    return ada.router_weights_bytes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_experts=method.num_experts,
        key_experts=method.key_experts,
    )


def _sparse_adapter_resident(shape: ModelShape, method: SparseAdapter) -> tuple[Row, ...]:
    staging = ada.row_staging_bytes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        active_rows_cap=method.active_rows_cap,
        prefetch_depth=method.prefetch_depth,
        retained=method.retained,
        e=method.adapter_bytes,
    )
    gradients = ada.row_gradients_bytes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        active_rows_cap=method.active_rows_cap,
        prefetch_depth=method.prefetch_depth,
        e=method.adapter_bytes,
    )
    router = _router_bytes(shape, method)
    kept = ada.kept_rows_bytes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        cached_rows=method.cached_rows,
        e=method.adapter_bytes,
    )
    sums = ada.gradient_sums_bytes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        cached_rows=method.cached_rows,
        gradients_on_device=method.gradients_on_device,
        e=method.adapter_bytes,
    )
    indices = ada.row_indices_bytes(
        num_layers=shape.num_layers,
        active_rows_cap=method.active_rows_cap,
        cached_rows=method.cached_rows,
        key_experts=method.key_experts,
    )
    return (
        Row("resident", "kept_rows", kept, "rows [C, 2D] per layer that stay through an accumulation window"),
        Row("resident", "gradient_sums", sums, "fp32 sums [C, 2D] per layer of the kept rows' gradients"),
        Row("resident", "row_indices", indices, "int32 [cap] per layer: each row's expert, each kept row's place"),
        Row("resident", "row_staging", staging, "buffers [cap, 2D] for rows: p+1, or one per layer when retained"),
        Row("resident", "row_gradients", gradients, "min(p, 1)+1 buffers [cap, 2D] for row gradients"),
        Row("resident", "router_weights", router, "Key-Experts routers, fp32 [N, D] per layer"),
        Row("resident", "router_gradients", router, "the routers' gradients, summed over an accumulation window"),
        Row("resident", "router_moments", 2 * router, "two AdamW moments of the routers"),
    )


def _parallel_adapter(shape: ModelShape, workload: Workload, method: ParallelAdapter) -> Trained:
    tokens, hidden, width, e = workload.tokens, shape.hidden_size, method.adapter_width, method.adapter_bytes
    kept = ada.parallel_adapter_saved_bytes(tokens=tokens, hidden_size=hidden, adapter_width=width, e=e)
    weights = e * ada.parallel_adapter_parameters(num_layers=shape.num_layers, hidden_size=hidden, adapter_width=width)
    return Trained(
        resident=_trained_resident(weights),
        kept_all=shape.num_layers * kept,
        kept_last=kept,
        kept_most=kept,
        free_last=kept,
        free_most=kept,
        forward=tokens * hidden * e,
        backward=ada.parallel_adapter_backward_bytes(
            tokens=tokens,
            hidden_size=hidden,
            adapter_width=width,
            e=e,
            q=workload.compute_bytes,
            summed=workload.grad_accum > 1,
        ),
        beside_ffn=tokens * hidden * workload.compute_bytes,
        gradients=weights,
        first_gradients=weights // shape.num_layers,
        last_gradients=weights,
        optimizer_temporary=weights,
    )


def _lora(shape: ModelShape, workload: Workload, method: Lora) -> Trained:
    tokens, rank, q, e = workload.tokens, method.rank, workload.compute_bytes, method.adapter_bytes
    targets = tuple(target for target in method.targets if target in linear_sizes(shape))
    eager = act.attention_used(shape, workload.attention) == "eager"
    kept = ada.lora_saved_bytes(shape, tokens=tokens, rank=rank, targets=targets, eager=eager, e=e, q=q)
    free = ada.lora_freed_bytes(shape, tokens=tokens, rank=rank, targets=targets, e=e)
    added = ada.lora_backward_bytes(shape, tokens=tokens, rank=rank, targets=targets, e=e, q=q)
    weights = e * ada.lora_parameters(shape, rank=rank, targets=targets)
    return Trained(
        resident=_trained_resident(weights),
        kept_all=shape.num_layers * kept,
        kept_last=kept,
        kept_most=kept,
        free_last=free,
        free_most=free,
        forward=added,
        backward=added,
        gradients=weights,
        first_gradients=weights // shape.num_layers,
        last_gradients=weights,
        optimizer_temporary=weights,
        whole_first_layer=True,
    )


def _full(shape: ModelShape, workload: Workload) -> Trained:
    tokens, q = workload.tokens, workload.compute_bytes
    eager = act.attention_used(shape, workload.attention) == "eager"
    kept = ada.full_saved_bytes(shape, tokens=tokens, eager=eager, q=q)
    weights = shape.num_parameters * q
    free = tokens * shape.intermediate_size * q
    down = shape.hidden_size * shape.intermediate_size
    after_down = shape.linear_parameters_per_layer - down + shape.head_parameters
    return Trained(
        resident=_trained_resident(weights, of_the_model=True),
        kept_all=shape.num_layers * kept,
        kept_last=kept,
        kept_most=kept,
        free_last=free,
        free_most=free,
        forward=0,
        backward=free + (q * down if workload.grad_accum > 1 else 0),
        gradients=weights,
        first_gradients=q * (shape.embedding_parameters + down),
        last_gradients=weights - q * after_down,
        head_gradients=q * shape.embedding_parameters,
        optimizer_temporary=weights,
        head_inputs=2 * tokens * shape.hidden_size * q,
        whole_first_layer=True,
    )


def _trained_resident(weights: Ints, *, of_the_model: bool = False) -> tuple[Row, ...]:
    moments = Row("resident", "optimizer_moments", 2 * weights, "two AdamW moments in the parameters' dtype")
    if of_the_model:
        return (moments,)
    return (Row("resident", "trainable_weights", weights, "the trained parameters"), moments)


def _plain(values: NDArray[np.int64]) -> Ints:
    """An int for a 0-d result, else the array."""
    return int(values) if np.ndim(values) == 0 else values
