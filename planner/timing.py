"""What every task of a step costs on a GPU, a link and a host, and the step time that follows.

GPU: the longer of arithmetic and memory traffic at the profile's efficiencies, plus one launch per kernel. Link:
latency plus bytes over the rate. Host: work over measured rates. The order of the tasks and what overlaps is the
program of :mod:`meft.planner.lanes`; every task's seconds come from here, for one decision or for arrays of them.

Letters: ``B`` micro-batch, ``S`` sequence length, ``T = B*S``, ``L`` layers, ``D`` hidden size, ``I`` intermediate
size, ``V`` vocabulary, ``R`` adapter rows per layer, ``A`` active rows, ``N`` experts, ``P`` probes, ``e`` and ``q``
bytes per number of rows and of hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meft.planner.architecture import ModelShape
from meft.planner.chrome import Event
from meft.planner.lanes import GpuSeconds, HostSeconds, LinkSeconds, StepCosts, baseline_seconds, simulate
from meft.planner.plan import Attention, Decision, Request, Timing, WeightsDtype
from meft.planner.profiles import GpuProfile, HostProfile, LinkProfile
from meft.planner.quantities import ADAPTER_DTYPE_BYTES, COMPUTE_DTYPE_BYTES, MASTER_BYTES, Flags, Floats, Ints, Reals
from meft.planner.sparsity import WindowRows, distinct_layers
from meft.planner.terms_adapter import CAST_ROWS
from meft.planner.transfer import (
    INPUT_TENSORS,
    LOSS_BYTES,
    NORM_BYTES,
    input_bytes,
    probe_bytes,
    query_bytes,
    row_bytes,
    row_expert_bytes,
)


@dataclass(frozen=True)
class Launches:
    """Kernels per layer and outside the layers, views left out.

    Counted by dispatching one training step of tiny random models of 2 and 4 layers on CPU with torch 2.13 and
    transformers 5.23, weights frozen, gradients flowing to the embeddings.
    """

    attention: int
    """Forward up to the FFN's entry, both norms included."""
    ffn: int
    """Forward, with the residual addition."""
    backward: int
    embedding: int
    """Before the first layer: embedding, positions, mask."""
    head: int
    """After the last layer: norm, head and loss, forward and backward."""


LLAMA_LAUNCHES = Launches(attention=32, ffn=6, backward=60, embedding=18, head=14 + 19)
"""RMS norms of 8 kernels each, rotary positions, gated FFN: LlamaForCausalLM."""
GPT2_LAUNCHES = Launches(attention=6, ffn=11, backward=21, embedding=10, head=7 + 6)
"""Layer norms of one kernel, learned positions, plain FFN: GPT2LMHeadModel."""

ADAPTER_FORWARD_LAUNCHES = 4  # 2 products, ReLU, sum with the FFN's output
ADAPTER_BACKWARD_LAUNCHES = 6  # 4 products, ReLU's mask, sum with the FFN's input gradient
GATE_FORWARD_LAUNCHES = 6  # scores, probe mask (2), masking, gate of each row, product with the activations
GATE_BACKWARD_LAUNCHES = 12  # gate of each row, 3 elementwise, membership (2), 3 products, probe mask (2), masking
ASSEMBLE_LAUNCHES = 2  # the rows admitted, the rows kept
ROUTER_LAUNCHES = 3  # scores, best P, int32

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


@dataclass(frozen=True)
class GpuRates:
    """What a step reaches: the profile's peaks times its efficiencies."""

    frozen_flops_per_second: float
    adapter_flops_per_second: float
    bytes_per_second: float
    launch_seconds: float

    def frozen_seconds(self, *, flops: float, num_bytes: float, launches: int) -> float:
        """A task in the frozen model's compute dtype."""
        return float(self._roofline(flops / self.frozen_flops_per_second, num_bytes, launches))

    def adapter_seconds(self, *, flops: Reals, num_bytes: Reals, launches: Reals) -> Floats:
        """A task in the adapter's dtype."""
        return self._roofline(flops / self.adapter_flops_per_second, num_bytes, launches)

    def _roofline(self, arithmetic_seconds: Reals, num_bytes: Reals, launches: Reals) -> Floats:
        traffic_seconds = num_bytes / self.bytes_per_second
        seconds: Floats = np.maximum(arithmetic_seconds, traffic_seconds) + launches * self.launch_seconds
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


def launches_of(shape: ModelShape) -> Launches:
    """Those of the counted model that ``shape`` resembles."""
    return LLAMA_LAUNCHES if shape.norm == "rmsnorm" else GPT2_LAUNCHES


def attention_parameters(shape: ModelShape) -> int:
    """Weights of the q, k, v and output projections of one layer."""
    return 2 * shape.hidden_size * shape.head_dim * (shape.num_heads + shape.num_kv_heads)


def ffn_parameters(shape: ModelShape) -> int:
    """Weights of one layer's FFN."""
    return (3 if shape.gated_mlp else 2) * shape.hidden_size * shape.intermediate_size


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
        launches=launches_of(request.model).attention,
    )


def ffn_seconds(request: Request, rates: GpuRates) -> float:
    """One layer's FFN, forward."""
    return _linear_seconds(
        request,
        rates,
        num_parameters=ffn_parameters(request.model),
        features=_ffn_features(request.model),
        more_flops=0.0,
        launches=launches_of(request.model).ffn,
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
        launches=launches_of(shape).backward,
    )


def embedding_seconds(request: Request, rates: GpuRates) -> float:
    """What comes before the first layer: rows of the embedding read and written, positions, mask."""
    num_bytes = 2 * request.tokens_per_step * request.model.hidden_size * COMPUTE_DTYPE_BYTES[request.weights_dtype]
    return rates.frozen_seconds(flops=0.0, num_bytes=num_bytes, launches=launches_of(request.model).embedding)


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
    return 2 * product + rates.frozen_seconds(flops=0.0, num_bytes=loss_bytes, launches=launches_of(request.model).head)


def _linear_seconds(
    request: Request, rates: GpuRates, *, num_parameters: int, features: int, more_flops: float, launches: int
) -> float:
    """Linear maps that read and write ``features`` numbers per token, with the other arithmetic of their part."""
    tokens = request.tokens_per_step
    num_bytes = (num_parameters + tokens * features) * COMPUTE_DTYPE_BYTES[request.weights_dtype]
    products = rates.frozen_seconds(
        flops=2 * num_parameters * tokens + more_flops, num_bytes=num_bytes, launches=launches
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
    stored = STORED_BYTES_PER_WEIGHT.get(request.weights_dtype)
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


def adapter_forward_seconds(rates: GpuRates, sizes: AdapterSizes, *, active_rows: Ints) -> Floats:
    """``ReLU(h K^T) V``: ``4*T*A*D`` flops; Key-Experts score again for the gate and multiply the activations by it.

    Traffic: rows, input and output, activations written, ReLU (2), read; with a gate 5 more passes over ``[T, A]``.
    """
    tokens, hidden, gated = sizes.tokens, sizes.hidden_size, sizes.key_experts
    flops = 4 * tokens * active_rows * hidden + 2 * tokens * sizes.num_experts * hidden * gated
    numbers = 2 * hidden * (active_rows + tokens) + (4 + 5 * gated) * tokens * active_rows
    launches = ADAPTER_FORWARD_LAUNCHES + GATE_FORWARD_LAUNCHES * gated
    return rates.adapter_seconds(flops=flops, num_bytes=numbers * sizes.element_bytes, launches=launches)


def adapter_backward_seconds(rates: GpuRates, sizes: AdapterSizes, *, active_rows: Ints) -> Floats:
    """Gradients of values, activations, keys and input: ``8*T*A*D`` flops; a gate adds its sum over each expert's rows
    (``2*T*A*N``) and the router's two products.

    Traffic: rows read and their gradients written, 3 ``[T, D]``, activations and their gradient in 7 passes; with a
    gate 9 more.
    """
    tokens, hidden, gated = sizes.tokens, sizes.hidden_size, sizes.key_experts
    gate_flops = 2 * tokens * sizes.num_experts * (active_rows + 2 * hidden) * gated
    numbers = hidden * (4 * active_rows + 3 * tokens) + (7 + 9 * gated) * tokens * active_rows
    return rates.adapter_seconds(
        flops=8 * tokens * active_rows * hidden + gate_flops,
        num_bytes=numbers * sizes.element_bytes,
        launches=ADAPTER_BACKWARD_LAUNCHES + GATE_BACKWARD_LAUNCHES * gated,
    )


def router_seconds(rates: GpuRates, sizes: AdapterSizes) -> Floats:
    """Scoring the experts for one layer and choosing each token's best; 0 for exact routing."""
    tokens, hidden, num_experts = sizes.tokens, sizes.hidden_size, sizes.num_experts
    numbers = hidden * (num_experts + tokens) + 2 * tokens * num_experts
    return sizes.key_experts * rates.adapter_seconds(
        flops=2 * tokens * num_experts * hidden, num_bytes=numbers * sizes.element_bytes, launches=ROUTER_LAUNCHES
    )


def router_adamw_seconds(rates: GpuRates, sizes: AdapterSizes, *, num_layers: int) -> Floats:
    """AdamW on all layers' fp32 routers, one launch per layer; 0 for exact routing."""
    numbers = num_layers * sizes.num_experts * sizes.hidden_size
    return sizes.key_experts * rates.adapter_seconds(
        flops=0.0, num_bytes=ADAMW_ARRAYS * MASTER_BYTES * numbers, launches=num_layers
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


# --- link and host ---------------------------------------------------------------------------------------------------


def copy_seconds(num_bytes: Ints, *, rate: Floats, latency: float) -> Floats:
    """A copy over the link, at ``rate`` bytes per second after ``latency`` seconds."""
    return latency + num_bytes / rate


def route_seconds(
    host: HostProfile, *, tokens: int, hidden_size: int, scored_rows: Ints, visited_experts: Ints
) -> Floats:
    """Choosing one layer's rows: ``2*T*D`` flops per scored row, top K over the scores, and Python around it.

    ``scored_rows`` is ``P * R/N`` per token; exact routing is one expert that everybody probes. ``visited_experts``
    are those whose tokens are scored together, one after the other: 0 for exact routing.
    """
    scores = tokens * scored_rows
    arithmetic = 2 * hidden_size * scores / host.gemm_flops_per_second.value
    selection = scores / host.select_scores_per_second.value
    python = host.overhead_seconds_per_layer.value + visited_experts * host.overhead_seconds_per_expert.value
    return arithmetic + selection + python


def gather_seconds(host: HostProfile, *, active_rows: Ints, hidden_size: int, adapter_dtype_bytes: int) -> Floats:
    """Reading fp32 rows and writing them to staging in the adapter's dtype."""
    num_bytes = active_rows * 2 * hidden_size * (MASTER_BYTES + adapter_dtype_bytes)
    return num_bytes / host.gather_bytes_per_second.value


def accumulate_seconds(host: HostProfile, *, active_rows: Ints, hidden_size: int, adapter_dtype_bytes: int) -> Floats:
    """Adding row gradients to the window's fp32 sum (read, read, write), and Python around it."""
    num_bytes = active_rows * 2 * hidden_size * (adapter_dtype_bytes + 2 * MASTER_BYTES)
    return num_bytes / host.scatter_bytes_per_second.value + host.overhead_seconds_per_layer.value


def adamw_seconds(host: HostProfile, *, rows: Ints, hidden_size: int) -> Floats:
    """AdamW on touched rows of the fp32 tables."""
    num_bytes = rows * 2 * hidden_size * ADAMW_ARRAYS * MASTER_BYTES
    return num_bytes / host.adamw_bytes_per_second.value


# --- the step --------------------------------------------------------------------------------------------------------


def step_costs(
    *,
    request: Request,
    gpu: GpuProfile,
    link: LinkProfile,
    host: HostProfile,
    adapter_width: Ints,
    num_experts: Ints,
    num_probes: Ints,
    key_experts: Flags,
    refetched: Flags,
    active_rows: NDArray[np.int64],
    window_active_rows: NDArray[np.int64],
    cached: WindowRows | None = None,
    gradients_on_device: bool = False,
) -> StepCosts:
    """Seconds of every task of a step.

    ``active_rows`` of a micro-batch and ``window_active_rows`` of an accumulation window are ``[L, ...]``, the other
    choices numbers or arrays over the same candidates. ``cached`` are the window's rows where some stay on the device.
    """
    moved = _moved_rows(active_rows, cached, gradients_on_device, request.grad_accum)
    scored_rows = num_probes * (adapter_width // num_experts)
    visited_experts = np.where(key_experts, np.minimum(num_experts, request.tokens_per_step * num_probes), 0)
    window_rows: Ints = window_active_rows.sum(axis=0)
    return StepCosts(
        gpu=_gpu_costs(request, gpu_rates(gpu, request), num_experts, key_experts, moved),
        link=_link_costs(request, link, num_probes, key_experts, refetched, moved),
        host=_host_costs(request, host, scored_rows, visited_experts, moved, window_rows),
    )


@dataclass(frozen=True)
class _MovedRows:
    """Rows of a micro-batch ``[L, ...]``, or ``[1, ...]`` where all layers are alike, by what becomes of them."""

    active: NDArray[np.int64]
    missing: NDArray[np.int64]
    overflow: NDArray[np.int64]
    gradients: NDArray[np.int64]
    """Whose gradients travel in the step."""
    summed: NDArray[np.int64]
    """Whose gradient sums travel at the window's end: a step's share."""
    is_cached: bool
    gradients_on_device: bool


def _moved_rows(
    active_rows: NDArray[np.int64], cached: WindowRows | None, gradients_on_device: bool, grad_accum: int
) -> _MovedRows:
    active = distinct_layers(active_rows)
    if cached is None:
        nothing = np.zeros_like(active)
        return _MovedRows(active, active, active, active, nothing, is_cached=False, gradients_on_device=False)
    missing, overflow = np.minimum(distinct_layers(cached.missing), active), distinct_layers(cached.overflow)
    kept = np.rint(distinct_layers(cached.kept) / grad_accum).astype(np.int64)
    return _MovedRows(
        active=active,
        missing=missing,
        overflow=overflow,
        gradients=overflow if gradients_on_device else active,
        summed=kept if gradients_on_device else np.zeros_like(kept),
        is_cached=True,
        gradients_on_device=gradients_on_device,
    )


def _gpu_costs(
    request: Request, rates: GpuRates, num_experts: Ints, key_experts: Flags, moved: _MovedRows
) -> GpuSeconds:
    rows = moved.active
    routed = AdapterSizes(
        tokens=request.tokens_per_step,
        hidden_size=request.model.hidden_size,
        element_bytes=ADAPTER_DTYPE_BYTES[request.adapter_dtype],
        num_experts=num_experts,
        key_experts=key_experts,
    )
    return GpuSeconds(
        embedding=embedding_seconds(request, rates),
        attention=attention_seconds(request, rates),
        router=router_seconds(rates, routed),
        ffn=ffn_seconds(request, rates),
        adapter_forward=np.asarray(adapter_forward_seconds(rates, routed, active_rows=rows)),
        loss_head=loss_head_seconds(request, rates),
        adapter_backward=np.asarray(adapter_backward_seconds(rates, routed, active_rows=rows)),
        frozen_backward=frozen_backward_seconds(request, rates),
        router_adamw=router_adamw_seconds(rates, routed, num_layers=request.model.num_layers) / request.grad_accum,
        assemble=np.asarray(assemble_seconds(rates, routed, active_rows=rows) * moved.is_cached),
        sum_gradients=np.asarray(sum_gradients_seconds(rates, routed, rows=rows) * moved.gradients_on_device),
    )


def _link_costs(
    request: Request,
    link: LinkProfile,
    num_probes: Ints,
    key_experts: Flags,
    refetched: Flags,
    moved: _MovedRows,
) -> LinkSeconds:
    tokens, hidden_size = request.tokens_per_step, request.model.hidden_size
    h2d, d2h, latency = link.h2d_bytes_per_second.value, link.d2h_bytes_per_second.value, link.latency_seconds.value
    h2d_backward = np.where(refetched, link.duplex_h2d_bytes_per_second.value, h2d)
    d2h_backward = np.where(refetched, link.duplex_d2h_bytes_per_second.value, d2h)
    element_bytes = ADAPTER_DTYPE_BYTES[request.adapter_dtype]

    def bytes_of(rows: Ints) -> Ints:
        return row_bytes(active_rows=rows, hidden_size=hidden_size, adapter_dtype_bytes=element_bytes)

    queries = query_bytes(
        tokens=tokens, hidden_size=hidden_size, compute_dtype_bytes=COMPUTE_DTYPE_BYTES[request.weights_dtype]
    )
    probes = probe_bytes(tokens=tokens, num_probes=num_probes)
    experts = key_experts * copy_seconds(row_expert_bytes(active_rows=moved.active), rate=h2d, latency=latency)
    hits = row_expert_bytes(active_rows=moved.active - moved.missing)
    places = moved.is_cached * copy_seconds(hits, rate=h2d, latency=latency)
    sums = moved.gradients_on_device * copy_seconds(
        bytes_of(moved.summed), rate=d2h_backward, latency=latency / request.grad_accum
    )
    return LinkSeconds(
        inputs=copy_seconds(input_bytes(tokens=tokens), rate=h2d, latency=INPUT_COPIES * latency),
        queries=copy_seconds(queries, rate=d2h, latency=latency),
        probes=key_experts * copy_seconds(probes, rate=d2h, latency=latency),
        rows=np.asarray(copy_seconds(bytes_of(moved.missing), rate=h2d, latency=latency) + experts + places),
        loss=copy_seconds(LOSS_BYTES, rate=d2h, latency=latency),
        rows_refetched=np.asarray(copy_seconds(bytes_of(moved.overflow), rate=h2d_backward, latency=latency)),
        row_gradients=np.asarray(copy_seconds(bytes_of(moved.gradients), rate=d2h_backward, latency=latency) + sums),
        router_norm=key_experts * copy_seconds(NORM_BYTES, rate=d2h, latency=latency) / request.grad_accum,
    )


def _host_costs(
    request: Request,
    host: HostProfile,
    scored_rows: Ints,
    visited_experts: Ints,
    moved: _MovedRows,
    window_rows: Ints,
) -> HostSeconds:
    hidden_size, element_bytes = request.model.hidden_size, ADAPTER_DTYPE_BYTES[request.adapter_dtype]

    def gather(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(
            gather_seconds(host, active_rows=rows, hidden_size=hidden_size, adapter_dtype_bytes=element_bytes)
        )

    return HostSeconds(
        route=route_seconds(
            host,
            tokens=request.tokens_per_step,
            hidden_size=hidden_size,
            scored_rows=scored_rows,
            visited_experts=visited_experts,
        ),
        gather=gather(moved.missing),
        gather_again=gather(moved.overflow),
        accumulate=np.asarray(
            accumulate_seconds(
                host,
                active_rows=moved.gradients + moved.summed,
                hidden_size=hidden_size,
                adapter_dtype_bytes=element_bytes,
            )
        ),
        adamw=adamw_seconds(host, rows=window_rows, hidden_size=hidden_size) / request.grad_accum,
    )


def step_timing(
    *,
    request: Request,
    decision: Decision,
    gpu: GpuProfile,
    link: LinkProfile,
    host: HostProfile,
    active_rows_per_layer: Sequence[int],
    window_active_rows_per_layer: Sequence[int],
    missing_rows_per_layer: Sequence[int] = (),
    overflow_rows_per_layer: Sequence[int] = (),
    kept_rows_per_layer: Sequence[int] = (),
    overlapped: bool = True,
    events: list[Event] | None = None,
) -> Timing:
    """The time of one decision; ``events`` collects its tasks, for :func:`meft.planner.chrome.chrome_trace`.

    ``overlapped=False``: under the sequential schedule.
    """
    cached = None
    if decision.cached_rows:
        by_kind = (missing_rows_per_layer, overflow_rows_per_layer, kept_rows_per_layer)
        cached = WindowRows(*(np.array(rows, dtype=np.int64) for rows in by_kind))
    refetched = decision.rows_in_backward == "refetched"
    num_layers = request.model.num_layers
    costs = step_costs(
        request=request,
        gpu=gpu,
        link=link,
        host=host,
        adapter_width=decision.adapter_width,
        num_experts=decision.num_experts,
        num_probes=decision.num_probes,
        key_experts=decision.routing == "key-experts",
        refetched=refetched,
        active_rows=np.array(active_rows_per_layer, dtype=np.int64),
        window_active_rows=np.array(window_active_rows_per_layer, dtype=np.int64),
        cached=cached,
        gradients_on_device=decision.gradients_on_device,
    )
    step = simulate(
        costs,
        num_layers=num_layers,
        prefetch_depth=decision.prefetch_depth,
        checkpointing=decision.activation_checkpointing,
        refetched=refetched,
        serial=gpu.shares_host_cores and not overlapped,
        overlapped=overlapped,
        events=events,
    )
    seconds, baseline = float(step.step_seconds), float(baseline_seconds(costs, num_layers=num_layers))
    return Timing(
        step_seconds=seconds,
        baseline_step_seconds=baseline,
        slowdown=seconds / baseline,
        busy_seconds={lane: float(busy) for lane, busy in step.busy_seconds.items()},
        tokens_per_second=request.tokens_per_step / seconds,
    )
