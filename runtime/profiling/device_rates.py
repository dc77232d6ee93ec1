"""What the device does per second, and the link to it: products, memory, kernel launches, copies of many sizes.

The same code measures a CUDA device and the emulated one, whose device memory is the host's and whose link is a copy
within it. Letters: ``T`` tokens, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from meft.planner.records.profile_file import Measurement
from meft.planner.timing.layer_kernels import LAYERS
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.profiling.measure import CopyLine, Sample, fit_copies, measurement, sample

MIB = 1 << 20
CUDA_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HOST_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CUDA_PRODUCTS = ((512, 4096, 4096), (2048, 4096, 11008), (8192, 8192, 8192))
HOST_PRODUCTS = ((128, 576, 1536), (512, 576, 1536), (512, 1024, 1024))
"""``T x D`` by ``D x D'``, from what a step's products are like to what reaches the peak."""
LINK_SIZES = (64 << 10, 256 << 10, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
HOST_LINK_SIZES = (64 << 10, 256 << 10, MIB, 4 * MIB)
"""The emulated device's copies stay as small as its rows."""
UNCACHED_BYTES = 128 * MIB
"""Copied before the same memory's turn comes again: more than a cache holds."""
WEIGHTS_BYTES = 4 * MIB
"""About a linear layer of a small model in fp32; more than a core's own caches hold."""
BF16_CAPABILITY = (8, 0)
"""The first cards with bf16 units."""
LOSS_BYTES_PER_LOGIT = 16
"""fp32 log-softmax and its backward, each read and written."""


@dataclass(frozen=True)
class StepKernels:
    """Shapes of the products of a small LLaMA-like layer, for what a step reaches of the peak."""

    tokens: int = 128
    hidden_size: int = 576
    intermediate_size: int = 1536
    vocab_size: int = 16384


def dtypes_of(device: torch.device) -> dict[str, torch.dtype]:
    """Formats that the device has units for."""
    if device.type != "cuda":
        return HOST_DTYPES
    with_bf16 = torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    return {name: dtype for name, dtype in CUDA_DTYPES.items() if name != "bf16" or with_bf16}


def products(device: torch.device) -> Iterator[Measurement]:
    """Matrix products by dtype and shape."""
    for name, dtype in dtypes_of(device).items():
        for tokens, inner, outer in CUDA_PRODUCTS if device.type == "cuda" else HOST_PRODUCTS:
            left = torch.randn(tokens, inner, device=device).to(dtype)
            right = torch.randn(inner, outer, device=device).to(dtype)
            taken = sample(lambda left=left, right=right: left @ right, device=device)  # type: ignore[misc]
            detail = f"{name}, {tokens} x {inner} x {outer}"
            yield taken.rate(f"device product {name}", "flop/s", detail, amount=2 * tokens * inner * outer)


def memory(device: torch.device) -> Iterator[Measurement]:
    """Device memory, read plus written; on CUDA far beyond its caches."""
    size = (256 if device.type == "cuda" else 64) * MIB
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    taken = sample(lambda: target.copy_(source), device=device)
    yield taken.rate("device memory", "B/s", f"copy of {size // MIB} MiB, read + written", amount=2 * size)


def step_products(device: torch.device, kernels: StepKernels | None = None) -> Iterator[Measurement]:
    """Products as a step has them, forward and backward through one layer's linear maps, and the loss."""
    shape = kernels or StepKernels()
    hidden, inner = shape.hidden_size, shape.intermediate_size
    dtype = torch.bfloat16 if "bf16" in dtypes_of(device) and device.type == "cuda" else torch.float32
    maps = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
    weights = [torch.randn(out, into, device=device).to(dtype) for into, out in maps]
    inputs = [torch.randn(shape.tokens, into, device=device).to(dtype) for into, _ in maps]
    outputs = [torch.randn(shape.tokens, out, device=device).to(dtype) for _, out in maps]

    def both_ways() -> None:
        for weight, given, gradient in zip(weights, inputs, outputs, strict=True):
            functional.linear(given, weight)
            gradient @ weight

    flops = sum(4 * shape.tokens * into * out for into, out in maps)
    detail = f"{dtype}, linear maps of a layer {hidden} to {inner}, {shape.tokens} tokens, forward and backward"
    yield sample(both_ways, device=device).rate("step products", "flop/s", detail, amount=flops)
    logits = torch.randn(shape.tokens, shape.vocab_size, device=device, requires_grad=True)
    labels = torch.randint(shape.vocab_size, (shape.tokens,), device=device)

    def loss() -> None:
        functional.cross_entropy(logits, labels).backward()
        logits.grad = None

    moved = LOSS_BYTES_PER_LOGIT * shape.tokens * shape.vocab_size
    detail = f"fp32 cross-entropy of [{shape.tokens}, {shape.vocab_size}] logits, forward and backward"
    yield sample(loss, device=device).rate("step memory", "B/s", detail, amount=moved)


def launches(device: torch.device, count: int = 200) -> Iterator[Measurement]:
    """Small elementwise kernels one after the other: what each costs besides its work."""
    small = torch.ones(128, 576, device=device)

    def many() -> None:
        for _ in range(count):
            small.mul_(1.0)

    yield sample(many, device=device).duration("kernel launch", f"{count} products of [128, 576] in place", parts=count)


def booked_launches() -> Iterator[Measurement]:
    """What an operator costs on the emulated device besides its work: Python, autograd and the books.

    The slope over layers of the time of a step of a model too small to compute anything, over the launches that
    :mod:`meft.planner.timing.layer_kernels` counts for a layer. Between its products memory is read as weights are in a
    real step, off the clock: the interpreter is slower when its own data has left the cache.
    """
    fewer, more = 2, 6
    steps = {layers: _tiny_steps(layers) for layers in (fewer, more)}
    layer = LAYERS["llama", 4, "fused"]
    each = layer.attention.launches + layer.ffn.launches + layer.backward.launches
    pairs = zip(sorted(steps[more].seconds), sorted(steps[fewer].seconds), strict=False)
    slopes = [(longer - shorter) / ((more - fewer) * each) for longer, shorter in pairs]
    slowest = steps[fewer].median / (fewer * each)  # as if a step were launches alone; for a machine that stalls
    seconds = [slope for slope in slopes if slope > 0] or [slowest]
    detail = (
        f"a step of {more} tiny LLaMA layers on the emulated device less one of {fewer}, over {each} launches a layer"
    )
    yield measurement("kernel launch", "s", detail, seconds)


class _Weights:
    """Stands for a product's weights: reads memory that nothing else uses, and says how long that took."""

    def __init__(self) -> None:
        self._memory = np.ones(WEIGHTS_BYTES // 8)
        self.seconds = 0.0

    def read(self, *_: object) -> None:
        """As a hook of a module or a tensor; numpy, so that the books do not see it."""
        began = time.perf_counter()
        self._memory.sum()
        self.seconds += time.perf_counter() - began


def _tiny_steps(layers: int) -> Sample:
    """Seconds of steps of a tiny model, reading of weights left out."""
    weights = _Weights()
    step = _tiny_step(layers, weights)
    return sample(step, clock=lambda: time.perf_counter() - weights.seconds)


def _tiny_step(layers: int, weights: _Weights) -> Callable[[], None]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    device = EmulatedDevice(1 << 30)
    model = device.adopt(LlamaForCausalLM(config).requires_grad_(False))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _module, _inputs, output: _read_both_ways(weights, output))
    states = torch.ones(1, 8, 32)
    device.books.adopt(states)

    def step() -> None:
        with device.scope():
            out = model(inputs_embeds=states.clone().requires_grad_(), use_cache=False)
            out.logits.sum().backward()

    return step


def _read_both_ways(weights: _Weights, output: torch.Tensor) -> None:
    weights.read()
    output.register_hook(weights.read)


# --- the link ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinkMeasured:
    """Copies both ways: by size alone, and both at once at the largest size; fitted to latency and bandwidth."""

    measurements: tuple[Measurement, ...]
    lines: dict[str, CopyLine]
    """By ``"h2d pinned"``, ``"d2h pinned"``, ``"h2d pageable"``, ``"d2h pageable"``; pageable alone without CUDA."""
    duplex: dict[str, Sample]
    """By ``"h2d"`` and ``"d2h"``: copies of the largest size while the other way is busy too; none without CUDA."""
    duplex_bytes: int


def link(device: torch.device) -> LinkMeasured:
    """Measure every size, pinned and pageable, each way alone; on CUDA also both ways at the same time."""
    measurements: list[Measurement] = []
    lines: dict[str, CopyLine] = {}
    sizes = LINK_SIZES if device.type == "cuda" else HOST_LINK_SIZES
    for kind in ("pinned", "pageable") if device.type == "cuda" else ("pageable",):
        for way in ("h2d", "d2h"):
            medians = []
            for size in sizes:
                taken = _one_way(device, way, size, pinned=kind == "pinned")
                medians.append(taken.median)
                measurements.append(taken.rate(f"{way} {kind}", "B/s", f"{size // 1024} KiB", amount=size))
            lines[f"{way} {kind}"] = fit_copies(sizes, medians)
    duplex = _both_ways(device, sizes[-1]) if device.type == "cuda" else {}
    for way, taken in duplex.items():
        detail = f"{sizes[-1] // 1024} KiB while as much goes the other way"
        measurements.append(taken.rate(f"{way} duplex", "B/s", detail, amount=sizes[-1]))
    where = "" if device.type == "cuda" else " of copies that no cache holds"
    measurements.extend(_fitted(lines, f"{len(sizes)} sizes{where}"))
    return LinkMeasured(tuple(measurements), lines, duplex, sizes[-1])


def _fitted(lines: dict[str, CopyLine], through: str) -> Iterator[Measurement]:
    for name, line in lines.items():
        detail = f"latency + bytes / rate through {through}, at most {line.worst_error_fraction:.0%} off"
        yield measurement(f"{name} fitted rate", "B/s", detail, [line.bytes_per_second])
        yield measurement(f"{name} fitted latency", "s", detail, [line.latency_seconds])


def _one_way(device: torch.device, way: str, size: int, *, pinned: bool) -> Sample:
    """Copies of ``size`` bytes. Without CUDA each is of other memory than those before it: rows are gathered past the
    cache, layer after layer, so that no copy finds its own there."""
    places = 1 if device.type == "cuda" else UNCACHED_BYTES // size
    host = torch.ones(places, size, dtype=torch.uint8, pin_memory=pinned)
    there = torch.ones(places, size, dtype=torch.uint8, device=device)
    pairs = itertools.cycle(zip(host, there, strict=True) if way == "h2d" else zip(there, host, strict=True))

    def copy() -> None:
        source, target = next(pairs)
        target.copy_(source, non_blocking=pinned)

    return sample(copy, device=device, seconds=0.1)


def _both_ways(device: torch.device, size: int, repetitions: int = 20) -> dict[str, Sample]:
    """Seconds of each direction by its own stream's events, several copies in a row so that both stay busy."""
    streams = {way: torch.cuda.Stream(device) for way in ("h2d", "d2h")}
    hosts = {way: torch.zeros(size, dtype=torch.uint8, pin_memory=True) for way in streams}
    there = {way: torch.zeros(size, dtype=torch.uint8, device=device) for way in streams}
    torch.cuda.synchronize(device)
    marks: dict[str, list[torch.cuda.Event]] = {way: [] for way in streams}
    for _ in range(repetitions + 1):
        for way, stream in streams.items():
            source, target = (hosts[way], there[way]) if way == "h2d" else (there[way], hosts[way])
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
                mark = torch.cuda.Event(enable_timing=True)
                mark.record(stream)
            marks[way].append(mark)
    torch.cuda.synchronize(device)
    return {
        way: Sample(tuple(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)))
        for way, events in marks.items()
    }
