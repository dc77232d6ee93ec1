"""Step time of the methods that train on the GPU alone: nothing waits for a host, so a step is the sum of its work.

The frozen model's terms, the roofline and the launch counts are those of :mod:`meft.planner.timing`; here are what a
dense adapter, LoRA and full fine-tuning add.

Letters: ``T`` tokens, ``L`` layers, ``D`` hidden size, ``V`` vocabulary, ``R`` adapter width, ``r`` LoRA rank, ``e``
bytes of an adapter element, ``q`` of a hidden-state element.
"""

from __future__ import annotations

from dataclasses import dataclass

from meft.planner import timing
from meft.planner.methods import Full, Lora, ParallelAdapter
from meft.planner.plan import Request
from meft.planner.profiles import GpuProfile, LinkProfile
from meft.planner.quantities import COMPUTE_DTYPE_BYTES
from meft.planner.terms_adapter import lora_parameters, parallel_adapter_parameters
from meft.planner.terms_weights import linear_sizes
from meft.planner.timing import GpuRates
from meft.planner.transfer import INPUT_TENSORS, LOSS_BYTES, input_bytes

DenseMethod = ParallelAdapter | Lora | Full

LORA_FORWARD_LAUNCHES = 5
"""Per adapted linear layer, from PEFT's forward: cast of the input, two products, scaling, sum."""
LORA_BACKWARD_LAUNCHES = 7
"""Four products, scaling, sum with the layer's input gradient, cast."""


@dataclass(frozen=True)
class _Layer:
    """Seconds that a method adds to each layer."""

    forward: float
    backward: float


def dense_step_seconds(
    *, request: Request, gpu: GpuProfile, link: LinkProfile, method: DenseMethod, activation_checkpointing: bool
) -> float:
    """One micro-batch forward and backward, with its share of the optimizer step and of the copies of its inputs."""
    rates, num_layers = timing.gpu_rates(gpu, request), request.model.num_layers
    added = _added(request, rates, method)
    forward = timing.attention_seconds(request, rates) + timing.ffn_seconds(request, rates) + added.forward
    # A parallel adapter starts the graph at layer 0: below it nothing needs a gradient.
    frozen_layers = num_layers - 1 if isinstance(method, ParallelAdapter) else num_layers
    return (
        _input_seconds(request, link)
        + timing.embedding_seconds(request, rates)
        + num_layers * (forward * (2 if activation_checkpointing else 1) + added.backward)
        + frozen_layers * timing.frozen_backward_seconds(request, rates)
        + timing.loss_head_seconds(request, rates)
        + _optimizer_seconds(request, rates, method) / request.grad_accum
    )


def _added(request: Request, rates: GpuRates, method: DenseMethod) -> _Layer:
    if isinstance(method, ParallelAdapter):
        return _parallel_adapter(request, rates, method)
    if isinstance(method, Lora):
        return _lora(request, rates, method)
    return _weight_gradients(request, rates)


def _parallel_adapter(request: Request, rates: GpuRates, method: ParallelAdapter) -> _Layer:
    """The sparse adapter's own arithmetic with every row active and no router."""
    sizes = timing.AdapterSizes(
        tokens=request.tokens_per_step,
        hidden_size=request.model.hidden_size,
        element_bytes=method.adapter_bytes,
        num_experts=1,
        key_experts=False,
    )
    forward = timing.adapter_forward_seconds(rates, sizes, active_rows=method.adapter_width)
    backward = timing.adapter_backward_seconds(rates, sizes, active_rows=method.adapter_width)
    return _Layer(float(forward), float(backward))


def _lora(request: Request, rates: GpuRates, method: Lora) -> _Layer:
    """Per adapted layer ``2*T*r*(in + out)`` flops forward and twice that backward."""
    tokens, rank = request.tokens_per_step, method.rank
    forward = backward = 0.0
    for name, (inputs, outputs) in linear_sizes(request.model).items():
        if name not in method.targets:
            continue
        flops = 2 * tokens * rank * (inputs + outputs)
        # Forward reads the input, writes and reads the inner activation, writes, scales and sums the output.
        numbers = tokens * (inputs + 2 * rank + 4 * outputs) + rank * (inputs + outputs)
        num_bytes = numbers * method.adapter_bytes
        forward += float(rates.adapter_seconds(flops=flops, num_bytes=num_bytes, launches=LORA_FORWARD_LAUNCHES))
        backward += float(
            rates.adapter_seconds(flops=2 * flops, num_bytes=2 * num_bytes, launches=LORA_BACKWARD_LAUNCHES)
        )
    return _Layer(forward, backward)


def _weight_gradients(request: Request, rates: GpuRates) -> _Layer:
    """Full fine-tuning multiplies once more per linear layer, and adds to gradients that are there."""
    num_parameters = request.model.linear_parameters_per_layer
    return _Layer(
        0.0,
        rates.frozen_seconds(
            flops=2 * num_parameters * request.tokens_per_step,
            num_bytes=2 * num_parameters * COMPUTE_DTYPE_BYTES[request.weights_dtype],
            launches=len(linear_sizes(request.model)),
        ),
    )


def _optimizer_seconds(request: Request, rates: GpuRates, method: DenseMethod) -> float:
    """AdamW reads and writes weight and moments and reads the gradient, in the parameters' dtype."""
    shape = request.model
    if isinstance(method, ParallelAdapter):
        width = method.adapter_width
        parameters = parallel_adapter_parameters(
            num_layers=shape.num_layers, hidden_size=shape.hidden_size, adapter_width=width
        )
        num_bytes = parameters * method.adapter_bytes
    elif isinstance(method, Lora):
        num_bytes = lora_parameters(shape, rank=method.rank, targets=method.targets) * method.adapter_bytes
    else:
        num_bytes = shape.num_parameters * COMPUTE_DTYPE_BYTES[request.weights_dtype]
    return float(rates.adapter_seconds(flops=0.0, num_bytes=timing.ADAMW_ARRAYS * num_bytes, launches=0))


def _input_seconds(request: Request, link: LinkProfile) -> float:
    latency = link.latency_seconds.value
    inputs = input_bytes(tokens=request.tokens_per_step)
    copies = timing.copy_seconds(
        inputs, rate=link.h2d_bytes_per_second.value, latency=INPUT_TENSORS * latency
    ) + timing.copy_seconds(LOSS_BYTES, rate=link.d2h_bytes_per_second.value, latency=latency)
    return float(copies)
