"""What the gpu lane's tasks take: the frozen model's, forward and backward, and the adapter's.

Products take the longer of arithmetic and memory traffic at the profile's efficiencies; elementwise kernels between
them (:mod:`meft.planner.timing.layer_kernels`) take their traffic; each kernel takes a launch. For one decision or for
arrays of them.

Letters: ``B`` micro-batch, ``S`` sequence length, ``T = B*S``, ``L`` layers, ``D`` hidden size, ``I`` intermediate
size, ``V`` vocabulary, ``R`` adapter rows per layer, ``A`` active rows, ``N`` experts, ``P`` probes, ``e`` and ``q``
bytes per number of rows and of hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meft.planner.base.dtypes import WeightsDtype
from meft.planner.base.quantities import (
    ADAPTER_DTYPE_BYTES,
    COMPUTE_DTYPE_BYTES,
    MASTER_BYTES,
    Flags,
    Floats,
    Ints,
    Reals,
)
from meft.planner.models.architecture import ModelShape
from meft.planner.records.plan import Attention, Request
from meft.planner.records.profiles import GpuProfile
from meft.planner.terms.adapter import CAST_ROWS
from meft.planner.timing.layer_kernels import OUTER, Kernels, LayerKernels, family_of, layer_kernels
from meft.planner.traffic.hot_rows import HOT_CHUNK_ROWS
from meft.planner.traffic.transfer import INPUT_TENSORS

ADAPTER_FORWARD_LAUNCHES = 4  # 2 products, ReLU, sum with the FFN's output
ADAPTER_BACKWARD_LAUNCHES = 6  # 4 products, ReLU's mask, sum with the FFN's input gradient
GATE_FORWARD_LAUNCHES = 6  # scores, probe mask (2), masking, gate of each row, product with the activations
GATE_BACKWARD_LAUNCHES = 12  # gate of each row, 3 elementwise, membership (2), 3 products, probe mask (2), masking
OWN_ROWS_LAUNCHES = 4  # best K (2), comparison, filling
OWN_GATED_LAUNCHES = 2  # rows of experts that are not probed: comparison, filling
ASSEMBLE_LAUNCHES = 2  # the rows admitted, the rows kept
ROUTER_LAUNCHES = 3  # scores, best P, int32
SWITCH_READS = 4  # for the experts, for the gate, and through both products of backward
SWITCH_LAUNCHES = (
    4 * 2 + 6 + 9 + 17
)  # random numbers and their product; counting; gate and balance loss; their gradients

STABLE_READS = 3 * 2 + 3  # inputs cast three times; what goes to them through the gate written, read and added
STABLE_PASSES = 24  # over fp32 [T, N]: the scores of both routers, their losses and gradients
STABLE_LAUNCHES = 3 + 2 * 6 + 21 + 31 + 2  # casts; gate, twice; what both learn; its gradients; to the inputs

SCORE_BACKWARD_FACTOR: dict[Attention, float] = {"eager": 2.0, "sdpa": 2.5, "flash": 2.5}
"""Attention products backward over forward: 4 over 2, and 5 over 2 where the kernel computes the scores again."""

INPUT_COPIES = INPUT_TENSORS
"""Each input tensor is a copy of its own."""
ADAMW_ARRAYS = 7
"""Weight and two moments, each read and written; the gradient, read."""
STORED_BYTES_PER_WEIGHT: dict[WeightsDtype, float] = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Quantised weights, for the time to read them; nf4 with its fp32 constant per block of 64."""
LOSS_BYTES_PER_LOGIT = {2: 6 + 8 + 8 + 6, 4: 8 + 8}
"""Traffic of HF's causal-LM loss by ``q``: upcast (2+4) if needed, log-softmax (4+4), its backward (4+4), downcast
(4+2)."""


# --- the GPU ---------------------------------------------------------------------------------------------------------


HOT_ADAMW_PASSES = 9 + 2 + 6 + 24 + 9 + 2
"""fp32 numbers read and written per number of a hot row: its squared norm in fp64, the scale, copies of weights and
moments, AdamW's ten operations on them, what is kept of each, clearing and the bf16 rows."""
HOT_ADAMW_LAUNCHES = 36
"""Per layer and chunk of rows: these operations, and those on the counts."""


@dataclass(frozen=True)
class GpuRates:
    """What a step reaches: the profile's peaks times its efficiencies."""

    frozen_flops_per_second: float
    adapter_flops_per_second: float
    bytes_per_second: float
    launch_seconds: float

    def frozen_seconds(self, *, flops: float, num_bytes: float, launches: int, elementwise_bytes: float = 0) -> float:
        """Products in the frozen model's compute dtype that move ``num_bytes``, and the kernels between them."""
        return float(self._seconds(flops / self.frozen_flops_per_second, num_bytes, elementwise_bytes, launches))

    def adapter_seconds(
        self, *, flops: Reals, num_bytes: Reals, launches: Reals, elementwise_bytes: Reals = 0
    ) -> Floats:
        """The same in the adapter's dtype."""
        return self._seconds(flops / self.adapter_flops_per_second, num_bytes, elementwise_bytes, launches)

    def _seconds(self, arithmetic: Reals, num_bytes: Reals, elementwise_bytes: Reals, launches: Reals) -> Floats:
        products = np.maximum(arithmetic, num_bytes / self.bytes_per_second)
        between = np.add(elementwise_bytes / self.bytes_per_second, launches * self.launch_seconds)
        seconds: Floats = np.add(products, between)
        return seconds


def gpu_rates(gpu: GpuProfile, request: Request) -> GpuRates:
    """The rates of the dtypes that compute: quantised weights compute in 16 bits, the adapter in its own dtype."""
    peaks = {4: gpu.fp32_flops_per_second.value, 2: _half_flops_per_second(gpu, request.weights_dtype)}
    efficiency = gpu.matmul_efficiency.value
    return GpuRates(
        frozen_flops_per_second=peaks[COMPUTE_DTYPE_BYTES[request.weights_dtype]] * efficiency,
        adapter_flops_per_second=peaks[ADAPTER_DTYPE_BYTES[request.adapter_dtype]] * efficiency,
        bytes_per_second=gpu.memory_bytes_per_second.value * gpu.memory_efficiency.value,
        launch_seconds=gpu.kernel_launch_seconds.value,
    )


def _half_flops_per_second(gpu: GpuProfile, weights_dtype: WeightsDtype) -> float:
    """The rate of bf16 (fp16 for fp16 weights), else of the other, else of fp32: a card that emulates both."""
    formats = [gpu.bf16_flops_per_second, gpu.fp16_flops_per_second]
    if weights_dtype == "fp16":
        formats.reverse()
    return next((rate.value for rate in formats if rate is not None), gpu.fp32_flops_per_second.value)


def _kernels(request: Request) -> LayerKernels:
    return layer_kernels(
        request.model, element_bytes=COMPUTE_DTYPE_BYTES[request.weights_dtype], attention=request.attention
    )


def attention_parameters(shape: ModelShape) -> int:
    """Weights of the q, k, v and output projections of one layer."""
    return shape.attention_parameters_per_layer


def ffn_parameters(shape: ModelShape) -> int:
    """Weights of one layer's FFN that a token meets."""
    return shape.active_mlp_parameters_per_layer


def score_flops(*, shape: ModelShape, tokens: int, seq_len: int, attention: Attention) -> int:
    """Scores and their product with the values; flash leaves out the half that the causal mask hides."""
    flops = 4 * tokens * seq_len * shape.num_heads * shape.head_dim
    return flops // 2 if attention == "flash" else flops


def attention_seconds(request: Request, rates: GpuRates) -> float:
    """One layer's attention, forward, with both norms."""
    return _linear_seconds(
        request,
        rates,
        num_parameters=attention_parameters(request.model),
        features=_attention_features(request.model),
        more_flops=_score_flops(request),
        kernels=_kernels(request).attention,
    )


def ffn_seconds(request: Request, rates: GpuRates) -> float:
    """One layer's FFN, forward."""
    return _linear_seconds(
        request,
        rates,
        num_parameters=ffn_parameters(request.model),
        features=_ffn_features(request.model),
        more_flops=0.0,
        kernels=_kernels(request).ffn,
    )


def frozen_backward_seconds(request: Request, rates: GpuRates) -> float:
    """One frozen layer, backward: as many products with the weights as forward, for the input gradients alone."""
    shape = request.model
    return _linear_seconds(
        request,
        rates,
        num_parameters=attention_parameters(shape) + ffn_parameters(shape),
        features=_attention_features(shape) + _ffn_features(shape),
        more_flops=SCORE_BACKWARD_FACTOR[request.attention] * _score_flops(request),
        kernels=_kernels(request).backward,
    )


def embedding_seconds(request: Request, rates: GpuRates) -> float:
    """What comes before the first layer: rows of the embedding read and written, positions, mask."""
    num_bytes = 2 * request.tokens_per_step * request.model.hidden_size * COMPUTE_DTYPE_BYTES[request.weights_dtype]
    return rates.frozen_seconds(flops=0.0, num_bytes=num_bytes, launches=OUTER[family_of(request.model)].embedding)


def loss_head_seconds(request: Request, rates: GpuRates) -> float:
    """The head's product forward and backward, and the loss on its logits both ways."""
    tokens, hidden_size, vocab_size = request.tokens_per_step, request.model.hidden_size, request.model.vocab_size
    element_bytes = COMPUTE_DTYPE_BYTES[request.weights_dtype]
    product = rates.frozen_seconds(
        flops=2 * tokens * hidden_size * vocab_size,
        num_bytes=(hidden_size * vocab_size + tokens * (hidden_size + vocab_size)) * element_bytes,
        launches=0,
    )
    loss_bytes = tokens * vocab_size * LOSS_BYTES_PER_LOGIT[element_bytes]
    return 2 * product + rates.frozen_seconds(
        flops=0.0, num_bytes=loss_bytes, launches=OUTER[family_of(request.model)].head
    )


def _linear_seconds(
    request: Request, rates: GpuRates, *, num_parameters: int, features: int, more_flops: float, kernels: Kernels
) -> float:
    """Linear maps that read and write ``features`` numbers per token, with the rest of their part of a layer."""
    tokens = request.tokens_per_step
    num_bytes = (num_parameters + tokens * features) * COMPUTE_DTYPE_BYTES[request.weights_dtype]
    products = rates.frozen_seconds(
        flops=2 * num_parameters * tokens + more_flops,
        num_bytes=num_bytes,
        launches=kernels.launches,
        elementwise_bytes=kernels.elementwise_bytes(request.model, tokens=tokens, seq_len=request.seq_len),
    )
    return products + dequantise_seconds(request, rates, num_parameters=num_parameters)


def _attention_features(shape: ModelShape) -> int:
    """In and out of q, k, v (one input) and of the output projection."""
    return 2 * shape.hidden_size + 2 * shape.head_dim * (shape.num_heads + shape.num_kv_heads)


def _ffn_features(shape: ModelShape) -> int:
    """In and out of the FFN, and each of its ``[T, I]`` once."""
    return 2 * shape.hidden_size + (3 if shape.gated_mlp else 2) * shape.intermediate_size


def _score_flops(request: Request) -> int:
    return score_flops(
        shape=request.model,
        tokens=request.tokens_per_step,
        seq_len=request.seq_len,
        attention=request.attention,
    )


def dequantise_seconds(request: Request, rates: GpuRates, *, num_parameters: int) -> float:
    """Reading quantised weights and writing them in 16 bits, before each product with them; 0 for other weights."""
    in_folder = request.model.stored
    usual = STORED_BYTES_PER_WEIGHT.get(request.weights_dtype)
    stored = in_folder.bits / 8 if usual is None and in_folder is not None else usual
    if stored is None:
        return 0.0
    per_weight = stored + COMPUTE_DTYPE_BYTES[request.weights_dtype]
    return rates.frozen_seconds(flops=0, num_bytes=num_parameters * per_weight, launches=0)


@dataclass(frozen=True)
class AdapterSizes:
    """What the adapter's tasks depend on beside its active rows; ``element_bytes`` is ``e``."""

    tokens: int
    hidden_size: int
    element_bytes: int
    num_experts: Ints
    key_experts: Flags
    own_rows: Flags = False
    switch: Flags = False
    routers: int = 1

    @property
    def router_rows(self) -> Ints:
        """``N``, or ``2N`` with a light router."""
        return self.routers * self.num_experts


def adapter_forward_seconds(rates: GpuRates, sizes: AdapterSizes, *, active_rows: Ints) -> Floats:
    """``ReLU(h K^T) V``: ``4*T*A*D`` flops; Key-Experts score again for the gate and multiply the activations by it.

    The products read rows, input and activations and write activations and output; elementwise are ReLU, the sum with
    the FFN's output, and with a gate 5 more passes over ``[T, A]``. Where a token sees its own rows alone, its best are
    found (one pass), the others compared and filled (3 passes and twice their mask), and so are before that, with a
    gate, rows of experts that it does not probe.
    """
    tokens, hidden, gated = sizes.tokens, sizes.hidden_size, sizes.key_experts
    own = sizes.own_rows
    masking = own * (4 * sizes.element_bytes + 2 + (3 * sizes.element_bytes + 2) * gated)
    flops = 4 * tokens * active_rows * hidden + 2 * tokens * sizes.router_rows * hidden * gated
    return rates.adapter_seconds(
        flops=flops,
        num_bytes=(2 * hidden * (active_rows + tokens) + 2 * tokens * active_rows) * sizes.element_bytes,
        launches=ADAPTER_FORWARD_LAUNCHES
        + GATE_FORWARD_LAUNCHES * gated
        + own * (OWN_ROWS_LAUNCHES + OWN_GATED_LAUNCHES * gated),
        elementwise_bytes=((2 + 5 * gated) * tokens * active_rows + 3 * tokens * hidden) * sizes.element_bytes
        + masking * tokens * active_rows,
    )


def activate_seconds(rates: GpuRates, sizes: AdapterSizes, *, active_rows: Ints) -> Floats:
    """``ReLU(h K^T)`` alone, ``2*T*A*D`` flops, as backward of a chunk computes it once more: half of
    :func:`adapter_forward_seconds`, and with Key-Experts the gate's scores and each row's gate again."""
    tokens, hidden, gated = sizes.tokens, sizes.hidden_size, sizes.key_experts
    return rates.adapter_seconds(
        flops=2 * tokens * active_rows * hidden + 2 * tokens * sizes.num_experts * hidden * gated,
        num_bytes=(hidden * (active_rows + tokens) + tokens * active_rows) * sizes.element_bytes,
        launches=ADAPTER_FORWARD_LAUNCHES // 2
        + (GATE_FORWARD_LAUNCHES - 1) * gated
        + sizes.own_rows * (OWN_ROWS_LAUNCHES + OWN_GATED_LAUNCHES * gated),
        elementwise_bytes=(2 + 2 * gated) * tokens * active_rows * sizes.element_bytes,
    )


def adapter_backward_seconds(rates: GpuRates, sizes: AdapterSizes, *, active_rows: Ints) -> Floats:
    """Gradients of values, activations, keys and input: ``8*T*A*D`` flops; a gate adds its sum over each expert's rows
    (``2*T*A*N``) and the router's two products.

    Each of four products reads or writes half the rows or their gradients, one ``[T, D]`` and one ``[T, A]``;
    elementwise are ReLU's mask, the sum with the FFN's input gradient, and with a gate 9 more passes over ``[T, A]``.
    """
    tokens, hidden, gated = sizes.tokens, sizes.hidden_size, sizes.key_experts
    gate_flops = 2 * tokens * (sizes.num_experts * active_rows + 2 * sizes.router_rows * hidden) * gated
    return rates.adapter_seconds(
        flops=8 * tokens * active_rows * hidden + gate_flops,
        num_bytes=4 * (hidden * (active_rows + tokens) + tokens * active_rows) * sizes.element_bytes,
        launches=ADAPTER_BACKWARD_LAUNCHES + GATE_BACKWARD_LAUNCHES * gated,
        elementwise_bytes=((3 + 9 * gated) * tokens * active_rows + 3 * tokens * hidden) * sizes.element_bytes,
    )


def router_seconds(rates: GpuRates, sizes: AdapterSizes) -> Floats:
    """Scoring the experts for one layer and choosing each token's best; 0 for exact routing.

    A switch router draws random numbers ``[T, D]`` and multiplies by them, in fp32: here, for the gate in forward, and
    twice in backward, all counted here. It counts each expert's tokens, and its gate is a softmax. What a stable router
    adds is counted here too: of its first stage, in which the light router learns; the second has less.
    """
    tokens, hidden, num_experts = sizes.tokens, sizes.hidden_size, sizes.num_experts
    numbers = hidden * (num_experts + tokens) + 2 * tokens * num_experts
    if sizes.routers == 1:
        more, launches = SWITCH_READS * (3 * tokens * hidden + 4 * tokens * num_experts), SWITCH_LAUNCHES
    else:
        more, launches = STABLE_READS * tokens * hidden + STABLE_PASSES * tokens * num_experts, STABLE_LAUNCHES
    return sizes.key_experts * rates.adapter_seconds(
        flops=2 * tokens * num_experts * hidden,
        num_bytes=numbers * sizes.element_bytes,
        launches=ROUTER_LAUNCHES + sizes.switch * launches,
        elementwise_bytes=sizes.switch * more * MASTER_BYTES,
    )


def router_adamw_seconds(rates: GpuRates, sizes: AdapterSizes, *, num_layers: int) -> Floats:
    """AdamW on all layers' fp32 routers, one launch per layer; 0 for exact routing."""
    numbers = num_layers * sizes.router_rows * sizes.hidden_size
    return sizes.key_experts * rates.adapter_seconds(
        flops=0.0, num_bytes=ADAMW_ARRAYS * MASTER_BYTES * numbers, launches=num_layers
    )


def hot_adamw_seconds(rates: GpuRates, *, hidden_size: int, num_layers: int, hot_rows: Ints) -> Floats:
    """Norm and AdamW of all layers' hot rows, written as separate operations on some rows at a time."""
    numbers = num_layers * hot_rows * 2 * hidden_size
    chunks = num_layers * -(-hot_rows // HOT_CHUNK_ROWS)
    return rates.adapter_seconds(
        flops=0.0, num_bytes=HOT_ADAMW_PASSES * MASTER_BYTES * numbers, launches=HOT_ADAMW_LAUNCHES * chunks
    )


def assemble_seconds(rates: GpuRates, sizes: AdapterSizes, *, active_rows: Ints) -> Floats:
    """Cached rows: each active row copied once on the device, to the others or to those kept."""
    num_bytes = 2 * 2 * sizes.hidden_size * active_rows * sizes.element_bytes
    return rates.adapter_seconds(flops=0.0, num_bytes=num_bytes, launches=ASSEMBLE_LAUNCHES)


def sum_gradients_seconds(rates: GpuRates, sizes: AdapterSizes, *, rows: Ints) -> Floats:
    """Row gradients read, cast where they are not fp32, and added to fp32 sums (read and written)."""
    cast = 2 * MASTER_BYTES if sizes.element_bytes != MASTER_BYTES else 0
    num_bytes = 2 * sizes.hidden_size * rows * (sizes.element_bytes + cast + 2 * MASTER_BYTES)
    launches = ASSEMBLE_LAUNCHES + (-(-rows // CAST_ROWS) if cast else 0)
    return rates.adapter_seconds(flops=0.0, num_bytes=num_bytes, launches=launches)
