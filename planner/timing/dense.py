"""Step time of the methods that train on the GPU alone: a step is the sum of its work, or if that takes longer, of
telling the device to do it (:mod:`meft.planner.timing.launching`); nothing else waits for a host.

The frozen model's terms, the roofline and the launch counts are those of :mod:`meft.planner.timing.gpu`; here are what
a dense adapter, LoRA and full fine-tuning add.

Letters: ``T`` tokens, ``L`` layers, ``D`` hidden size, ``V`` vocabulary, ``R`` adapter width, ``r`` LoRA rank, ``e``
bytes of an adapter element, ``q`` of a hidden-state element.
"""

from __future__ import annotations

from dataclasses import dataclass

from meft.planner.base.quantities import ADAPTER_DTYPE_BYTES, COMPUTE_DTYPE_BYTES
from meft.planner.models.linears import Linear, linear_layers
from meft.planner.records.plan import Request
from meft.planner.records.profiles import GpuProfile, HostProfile, LinkProfile
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.peft import running
from meft.planner.simulation.stream import HostTraffic
from meft.planner.terms.offload import OFFLOADING
from meft.planner.timing import gpu as gpu_timing
from meft.planner.timing.gpu import GpuRates
from meft.planner.timing.launching import KernelLaunchSeconds
from meft.planner.timing.layer_kernels import OUTER, family_of, layer_kernels
from meft.planner.timing.step import copy_seconds
from meft.planner.traffic.transfer import INPUT_TENSORS, LOSS_BYTES, input_bytes

LORA_FORWARD_LAUNCHES = 5
"""Per adapted linear layer, from PEFT's forward: cast of the input, two products, scaling, sum."""
LORA_BACKWARD_LAUNCHES = 7
"""Four products, scaling, sum with the layer's input gradient, cast."""


@dataclass(frozen=True)
class _Layer:
    """Seconds, and kernels, that a method adds to each layer."""

    forward: float
    backward: float
    forward_launches: int = 0
    backward_launches: int = 0


def dense_step_seconds(
    *,
    setup: TrainingSetup,
    request: Request,
    gpu: GpuProfile,
    link: LinkProfile,
    host: HostProfile,
    moved: HostTraffic | None = None,
) -> float:
    """One micro-batch forward and backward, with its share of the optimizer step and of the copies of its inputs.

    Activations that are ``moved`` to the host and back are copied after the computation that makes and before that
    which needs them; on a stream of their own beside it, so that the longer of both counts.

    Autocast, 8-bit optimizers and fused losses are taken to need the time of the plain run.
    """
    request = _as_set_up(request, running(setup))
    rates, num_layers = gpu_timing.gpu_rates(gpu, request), setup.model.num_layers
    added = _added(setup, request, rates)
    forward = gpu_timing.attention_seconds(request, rates) + gpu_timing.ffn_seconds(request, rates) + added.forward
    # A parallel adapter starts the graph at layer 0: below it nothing needs a gradient. A ladder is beside all layers.
    frozen_layers = {"parallel-adapter": num_layers - 1, "lst": 0}.get(setup.method, num_layers)
    copies = _moved_seconds(setup, link, moved)
    beside = setup.offload != "none" and OFFLOADING[setup.offload].overlaps
    computed = (
        _input_seconds(request, link)
        + gpu_timing.embedding_seconds(request, rates)
        + num_layers * (forward * (2 if setup.activation_checkpointing else 1) + added.backward)
        + frozen_layers * gpu_timing.frozen_backward_seconds(request, rates)
        + gpu_timing.loss_head_seconds(request, rates)
        + _optimizer_seconds(setup, rates) / setup.grad_accum
    )
    seconds = max(computed, copies) if beside else computed + copies
    launch = KernelLaunchSeconds.of(host, gpu)
    return seconds if launch is None else max(seconds, _launching_seconds(setup, request, added, launch, frozen_layers))


def _launching_seconds(
    setup: TrainingSetup, request: Request, added: _Layer, launch: KernelLaunchSeconds, frozen_layers: int
) -> float:
    """``f * (L * (forward's kernels, twice with recompute) + outer ones) + b * (backward's kernels)``, where ``f`` and
    ``b`` are seconds for each. The optimizer's few are left out, and those that write quantized weights out."""
    element_bytes, outer = COMPUTE_DTYPE_BYTES[request.weights_dtype], OUTER[family_of(request.model)]
    kernels = layer_kernels(request.model, element_bytes=element_bytes, attention=request.attention)
    num_layers, times = request.model.num_layers, 2 if setup.activation_checkpointing else 1
    forward = times * (kernels.attention.launches + kernels.ffn.launches + added.forward_launches)
    backward = num_layers * added.backward_launches + frozen_layers * kernels.backward.launches
    return launch.forward * (num_layers * forward + outer.embedding + outer.head) + launch.backward * backward


def _moved_seconds(setup: TrainingSetup, link: LinkProfile, moved: HostTraffic | None) -> float:
    """Copies to the host and back; from ordinary memory at the pageable rates where those are known."""
    if moved is None or setup.offload == "none":
        return 0.0
    to_host, to_device = link.d2h_bytes_per_second, link.h2d_bytes_per_second
    if not OFFLOADING[setup.offload].pinned:
        to_host, to_device = (
            link.pageable_d2h_bytes_per_second or to_host,
            link.pageable_h2d_bytes_per_second or to_device,
        )
    seconds = moved.d2h_bytes / to_host.value + moved.h2d_bytes / to_device.value
    return float(seconds + moved.num_copies * link.latency_seconds.value)


def _as_set_up(request: Request, setup: TrainingSetup) -> Request:
    """The request with the setup's workload and dtypes, which is what the model's own terms read."""
    fields = ("model", "batch_size", "seq_len", "grad_accum", "weights_dtype", "double_quant", "attention")
    update = {name: getattr(setup, name) for name in (*fields, "adapter_dtype")}
    return request.model_copy(update=update)


def _added(setup: TrainingSetup, request: Request, rates: GpuRates) -> _Layer:
    if setup.method == "parallel-adapter":
        return _parallel_adapter(setup, rates)
    if setup.method == "full":
        return _weight_gradients(request, rates)
    return _lora(setup, rates)


def _parallel_adapter(setup: TrainingSetup, rates: GpuRates) -> _Layer:
    """The sparse adapter's own arithmetic with every row active and no router."""
    sizes = gpu_timing.AdapterSizes(
        tokens=setup.tokens,
        hidden_size=setup.model.hidden_size,
        element_bytes=ADAPTER_DTYPE_BYTES[setup.adapter_dtype],
        num_experts=1,
        key_experts=False,
    )
    width = setup.adapter_width or 0
    forward = gpu_timing.adapter_forward_seconds(rates, sizes, active_rows=width)
    backward = gpu_timing.adapter_backward_seconds(rates, sizes, active_rows=width)
    launches = gpu_timing.ADAPTER_FORWARD_LAUNCHES, gpu_timing.ADAPTER_BACKWARD_LAUNCHES
    return _Layer(float(forward), float(backward), *launches)


def _lora(setup: TrainingSetup, rates: GpuRates) -> _Layer:
    """Per adapted layer ``2*T*r*(in + out)`` flops forward and twice that backward."""
    layers = [_lora_layer(setup, rates, layer) for layer in _targeted(setup)]
    launches = len(layers) * LORA_FORWARD_LAUNCHES, len(layers) * LORA_BACKWARD_LAUNCHES
    return _Layer(sum(layer.forward for layer in layers), sum(layer.backward for layer in layers), *launches)


def _lora_layer(setup: TrainingSetup, rates: GpuRates, layer: Linear) -> _Layer:
    tokens, rank, both = setup.tokens, setup.rank or 0, layer.inputs + layer.outputs
    flops = 2 * tokens * rank * both
    # Forward reads the input, writes and reads the inner activation, writes, scales and sums the output.
    numbers = tokens * (layer.inputs + 2 * rank + 4 * layer.outputs) + rank * both
    num_bytes = numbers * ADAPTER_DTYPE_BYTES[setup.adapter_dtype]
    forward = rates.adapter_seconds(flops=flops, num_bytes=num_bytes, launches=LORA_FORWARD_LAUNCHES)
    backward = rates.adapter_seconds(flops=2 * flops, num_bytes=2 * num_bytes, launches=LORA_BACKWARD_LAUNCHES)
    return _Layer(float(forward), float(backward))


def _targeted(setup: TrainingSetup) -> list[Linear]:
    return [layer for layer in linear_layers(setup.model) if layer.name in setup.target_modules]


def _weight_gradients(request: Request, rates: GpuRates) -> _Layer:
    """Full fine-tuning multiplies once more per linear layer, and adds to gradients that are there."""
    num_parameters, launches = request.model.linear_parameters_per_layer, len(linear_layers(request.model))
    backward = rates.frozen_seconds(
        flops=2 * num_parameters * request.tokens_per_step,
        num_bytes=2 * num_parameters * COMPUTE_DTYPE_BYTES[request.weights_dtype],
        launches=launches,
    )
    return _Layer(0.0, backward, backward_launches=launches)


def _optimizer_seconds(setup: TrainingSetup, rates: GpuRates) -> float:
    """AdamW reads and writes weight and moments and reads the gradient, in the parameters' dtype."""
    shape, element_bytes = setup.model, ADAPTER_DTYPE_BYTES[setup.adapter_dtype]
    if setup.method == "parallel-adapter":
        num_bytes = shape.num_layers * 2 * (setup.adapter_width or 0) * shape.hidden_size * element_bytes
    elif setup.method == "full":
        num_bytes = shape.num_parameters * COMPUTE_DTYPE_BYTES[setup.weights_dtype]
    else:
        per_rank = sum(layer.inputs + layer.outputs for layer in _targeted(setup))
        num_bytes = shape.num_layers * (setup.rank or 0) * per_rank * element_bytes
    return float(rates.adapter_seconds(flops=0.0, num_bytes=gpu_timing.ADAMW_ARRAYS * num_bytes, launches=0))


def _input_seconds(request: Request, link: LinkProfile) -> float:
    latency = link.latency_seconds.value
    inputs = input_bytes(tokens=request.tokens_per_step)
    copies = copy_seconds(inputs, rate=link.h2d_bytes_per_second.value, latency=INPUT_TENSORS * latency) + copy_seconds(
        LOSS_BYTES, rate=link.d2h_bytes_per_second.value, latency=latency
    )
    return float(copies)
