"""From options to what is planned: the request, the profiles it rests on, and notes on what was taken for granted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from meft.planner.base.dtypes import AdapterDtype, WeightsDtype
from meft.planner.base.errors import UsageError
from meft.planner.base.names import looks_like_path
from meft.planner.base.schema import validated
from meft.planner.base.units import format_bytes, parse_rate
from meft.planner.front.options import AUTO, RequestOptions
from meft.planner.memory.budget import reserve_bytes
from meft.planner.memory.machine import machine_memory_bytes
from meft.planner.models.architecture import ModelShape
from meft.planner.models.catalogue import load_model
from meft.planner.models.stored import StoredMethod
from meft.planner.predict.prediction import ProfileSet
from meft.planner.records.plan import Attention, Request
from meft.planner.records.profile_catalogue import (
    gpu_names,
    load_defaults,
    load_gpu,
    load_host,
    load_link,
    load_sparsity,
    sections_in,
)
from meft.planner.records.profiles import GpuProfile, Section, SourcedRange
from meft.planner.records.routing import StableOptions, SwitchOptions

BOX_OVER_NVML = 1.1
"""A card's box may print up to a tenth more than NVML reports (48 GB: 45.0 GiB with ECC on an L40S)."""
EMULATED = "emulated"
WITHOUT_SDPA = ("gemma2",)
"""Model types that transformers runs with eager or flash attention only: they cap attention scores."""
_DTYPE_OF_STORED: dict[StoredMethod, WeightsDtype] = {"bitsandbytes-4bit": "nf4", "bitsandbytes-8bit": "int8"}
"""Of other methods the weights are computed in bf16."""


@dataclass(frozen=True)
class Planning:
    """Everything a plan is made from; ``notes`` say which values nobody gave."""

    request: Request
    profiles: ProfileSet
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Budget:
    gpu: GpuProfile
    gpu_name: str
    gpu_mem_bytes: int
    notes: tuple[str, ...]


def planning(options: RequestOptions) -> Planning:
    """Look up every name, fill in every default, and check what depends on model and card.

    Raises :class:`UsageError`.
    """
    if options.batch_size == AUTO:
        raise UsageError(
            "--batch-size auto: it goes with a plan; give a number, which is the same for all that is compared"
        )
    defaults = load_defaults()
    shape, _, model_path = load_model(options.model if options.model is not None else defaults.model)
    budget = _with_context(gpu_budget(options), options.context_overhead)
    gpu = budget.gpu
    beside = _beside_the_gpu(options)
    usual_host = EMULATED if gpu.shares_host_cores else defaults.host
    host_name = options.host or beside.get("host", usual_host)
    link_name = options.link or beside.get("link", gpu.link)
    sparsity_name = options.sparsity or beside.get("sparsity", defaults.sparsity)
    host, link = load_host(host_name), load_link(link_name)
    sparsity = load_sparsity(sparsity_name)
    options = _as_stored(options, shape, gpu)
    weights, adapter = _dtypes(options, gpu)
    _check_model(options, shape)
    _check_device(options, gpu, weights)
    _check_copy(options, adapter)
    _check_ranks(options)
    host_mem_bytes, host_notes = _host_budget(options, budget)
    fields = {
        "model": shape,
        "model_path": model_path,
        "gpu": budget.gpu_name,
        "host": _reference(host_name, host.key),
        "link": _reference(link_name, link.key),
        "sparsity": _reference(sparsity_name, sparsity.key),
        "gpu_mem_bytes": budget.gpu_mem_bytes,
        "host_mem_bytes": host_mem_bytes,
        "host_mem_basis": "this machine" if options.host_mem is None else "given",
        "weights_dtype": weights,
        "adapter_dtype": adapter,
        **_passed_on(options, shape),
    }
    return Planning(
        request=validated(Request, fields, source="options"),
        profiles=ProfileSet(gpu=gpu, link=link, host=host, sparsity=sparsity),
        notes=(
            *_stored_notes(shape),
            *budget.notes,
            *_beside_notes(options, beside),
            *host_notes,
            *_dtype_notes(gpu, weights),
        ),
    )


def default_gpu(gpu_mem_bytes: int) -> GpuProfile:
    """The card whose rates stand in where none is named: the paper's, or above its memory the smallest that holds it.

    Above every card it is the largest.
    """
    usual = load_gpu(load_defaults().gpu)
    if gpu_mem_bytes <= usual.total_bytes:
        return usual
    cards = [card for card in map(load_gpu, gpu_names()) if card.memory_total_bytes is not None]
    cards.sort(key=lambda card: (card.total_bytes, card.key))
    return next((card for card in cards if gpu_mem_bytes <= card.total_bytes * BOX_OVER_NVML), cards[-1])


def gpu_budget(options: RequestOptions) -> _Budget:
    """The card and how much of its memory there is; raises :class:`UsageError` where neither was given."""
    if options.gpu is None and options.gpu_mem is None:
        raise UsageError(
            "which GPU memory to plan for? Give --gpu-mem (such as --gpu-mem 24GB), --gpu (such as --gpu rtx-3090), "
            "or both"
        )
    if options.gpu is None:
        assert options.gpu_mem is not None
        gpu = default_gpu(options.gpu_mem)
        return _Budget(gpu, gpu.key, options.gpu_mem, (f"{gpu.key} stands in for the card: no --gpu was given",))
    gpu = load_gpu(options.gpu)
    name = _reference(options.gpu, gpu.key)
    if options.gpu_mem is None:
        return _Budget(gpu, name, gpu.total_bytes, ())
    if gpu.memory_total_bytes is None or options.gpu_mem <= gpu.total_bytes:
        return _Budget(gpu, name, options.gpu_mem, ())
    if options.gpu_mem > gpu.total_bytes * BOX_OVER_NVML:
        raise UsageError(
            f"--gpu-mem {format_bytes(options.gpu_mem)} is more than {gpu.key} has ({format_bytes(gpu.total_bytes)}); "
            f"give at most that, or leave --gpu-mem out"
        )
    return _Budget(gpu, name, gpu.total_bytes, (f"GPU memory: NVML's total of {gpu.key}, a little below --gpu-mem",))


def _with_context(budget: _Budget, overhead_bytes: int | None) -> _Budget:
    """The card with what the user says of its context, which is one figure and no range."""
    if overhead_bytes is None:
        return budget
    gpu, given = budget.gpu, f"--context-overhead {format_bytes(overhead_bytes)}"
    if gpu.shares_host_cores:
        raise UsageError(f"{given}: --gpu {gpu.key} has no CUDA context; leave it out")
    if overhead_bytes >= budget.gpu_mem_bytes:
        memory = format_bytes(budget.gpu_mem_bytes)
        raise UsageError(f"{given} leaves nothing of the {memory} of GPU memory; give less, such as 600MiB")
    context = SourcedRange(
        low_bytes=overhead_bytes, high_bytes=overhead_bytes, basis="measured", source="given on the command line"
    )
    return replace(budget, gpu=gpu.model_copy(update={"context": context}))


def _beside_the_gpu(options: RequestOptions) -> dict[Section, str]:
    """Profiles that the file of ``--gpu`` holds besides: they were measured on the same machine."""
    if options.gpu is None or not looks_like_path(options.gpu):
        return {}
    return dict.fromkeys(sections_in(options.gpu), options.gpu)


def _beside_notes(options: RequestOptions, beside: dict[Section, str]) -> tuple[str, ...]:
    given = {"gpu": options.gpu, "host": options.host, "link": options.link, "sparsity": options.sparsity}
    taken = [section for section in beside if given[section] is None]
    return (f"{' and '.join(taken)}: from {options.gpu} too",) if taken else ()


def _reference(given: str, key: str) -> str:
    """What finds the profile again: its key, or the file it came from."""
    return given if looks_like_path(given) else key


def _host_budget(options: RequestOptions, budget: _Budget) -> tuple[int, tuple[str, ...]]:
    """RAM, that of a machine with such a card: where it is this one, the emulated device's memory is not part of it."""
    if options.host_mem is not None:
        return options.host_mem, ()
    total = machine_memory_bytes()
    left, less = total, ""
    if budget.gpu.shares_host_cores:
        left -= budget.gpu_mem_bytes
        less = f", less {format_bytes(budget.gpu_mem_bytes)} for the emulated device"
    if left <= reserve_bytes(total):
        raise UsageError(
            f"--gpu-mem {format_bytes(budget.gpu_mem_bytes)}: the emulated device lives in this machine's RAM, which "
            f"has {format_bytes(total - reserve_bytes(total))} to spare; give less, or --host-mem to plan for another "
            f"machine"
        )
    note = (
        f"host memory: this machine's RAM, {format_bytes(total)}{less}, less {format_bytes(reserve_bytes(left))} for "
        f"all else; or give --host-mem"
    )
    return left, (note,)


def _as_stored(options: RequestOptions, shape: ModelShape, gpu: GpuProfile) -> RequestOptions:
    """The options with the weights' dtype that a quantized folder means: bitsandbytes' own, else 16 bits to compute."""
    stored = shape.stored
    if stored is None:
        return options
    if gpu.shares_host_cores and stored.method != "bitsandbytes-4bit":
        raise UsageError(
            f"--gpu {gpu.key}: {shape.name} stores its weights as {stored.title}, whose kernels need CUDA; plan "
            f"for one, or give a folder of 16-bit weights"
        )
    meant = _DTYPE_OF_STORED.get(stored.method, "bf16")
    given = options.weights_dtype
    if given not in (None, meant) or options.double_quant not in (None, stored.double_quant):
        asked = f"--weights-dtype {given}" if given not in (None, meant) else "--double-quant"
        raise UsageError(
            f"{asked}: {shape.name} stores its weights as {stored.title}, and they are planned as stored; leave it out"
        )
    return replace(options, weights_dtype=meant, double_quant=stored.double_quant)


def _stored_notes(shape: ModelShape) -> tuple[str, ...]:
    return () if shape.stored is None else (f"weights: {shape.stored.title}, as the folder stores them",)


def _dtypes(options: RequestOptions, gpu: GpuProfile) -> tuple[WeightsDtype, AdapterDtype]:
    """The emulated device computes in fp32 unless told otherwise: CPUs are slow in bf16."""
    weights: WeightsDtype = options.weights_dtype or ("fp32" if gpu.shares_host_cores else "bf16")
    adapter: AdapterDtype = options.adapter_dtype or ("fp32" if weights == "fp32" else "bf16")
    return weights, adapter


def _dtype_notes(gpu: GpuProfile, weights: WeightsDtype) -> tuple[str, ...]:
    if weights == "bf16" and gpu.bf16_flops_per_second is None and not gpu.shares_host_cores:
        return (f"{gpu.key} has no bf16 units: bf16 computes there at the rate of another format",)
    return ()


def _passed_on(options: RequestOptions, shape: ModelShape) -> dict[str, Any]:
    """Options that are the request's fields as they stand, where they were given."""
    names = {
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "grad_accum": options.grad_accum,
        "double_quant": options.double_quant,
        "attention": options.attention or _usual_attention(shape),
        "packed": options.packed,
        "activation_checkpointing": options.activation_checkpointing,
        "objective": options.objective,
        "max_slowdown": options.max_slowdown,
        "min_trainable_fraction": options.min_trainable,
        "adapter_width": options.adapter_width,
        "top_k": options.top_k,
        "prefetch_depth": options.prefetch_depth,
        "routing": options.routing,
        **_of_routing(options),
        "rows_in_backward": options.rows_in_backward,
        "tokens_see": options.tokens_see,
        "token_chunks": options.token_chunks,
        "hot_rows": options.hot_rows,
        "bf16_copy": options.bf16_copy,
        "active_rows_quantile": options.active_rows_quantile,
        "gpus": options.gpus,
        "gpus_per_link": options.gpus_per_link,
        "nodes": options.nodes,
        "rows": options.rows,
        "shard_base": options.shard_base,
        "interconnect_bytes_per_second": _interconnect(options),
    }
    return {name: value for name, value in names.items() if value is not None}


def _of_routing(options: RequestOptions) -> dict[str, SwitchOptions | StableOptions]:
    """What was said of a routing's own options, under the name of its record; nothing where nothing was."""
    given: dict[str, tuple[float | None, tuple[str, ...]]] = {
        "capacity_factor": (options.capacity_factor, ("switch",)),
        "router_jitter": (options.router_jitter, ("switch",)),
        "first_stage": (options.first_stage, ("stable",)),
        "balance_loss": (options.balance_loss, ("switch", "stable")),
    }
    said: dict[str, Any] = {}
    for name, (value, routings) in given.items():
        if value is None:
            continue
        if options.routing not in routings:
            its = " and ".join(routings)
            add = " or ".join(f"--routing {routing}" for routing in routings)
            alone = " alone" if len(routings) == 1 else ""
            raise UsageError(f"--{name.replace('_', '-')}: is of routing {its}{alone}; add {add} or leave it out")
        said[name.removeprefix("router_")] = value
    if not said:
        return {}
    return {"switch": SwitchOptions(**said)} if options.routing == "switch" else {"stable": StableOptions(**said)}


def _usual_attention(shape: ModelShape) -> Attention:
    return "eager" if _without_sdpa(shape) else "sdpa"


def _without_sdpa(shape: ModelShape) -> bool:
    if shape.measured is not None:
        return not shape.measured.sdpa
    return shape.model_type in WITHOUT_SDPA


def _check_model(options: RequestOptions, shape: ModelShape) -> None:
    if options.attention == "sdpa" and _without_sdpa(shape):
        raise UsageError(f"--attention sdpa: transformers does not run {shape.name} with it; give eager or flash")
    if options.seq_len > shape.max_positions:
        raise UsageError(
            f"--seq-len {options.seq_len}: {shape.name} has {shape.max_positions} positions; give at most that"
        )
    if options.prefetch_depth is not None and options.prefetch_depth >= shape.num_layers:
        raise UsageError(
            f"--prefetch-depth {options.prefetch_depth}: {shape.name} has {shape.num_layers} layers; "
            f"give at most {shape.num_layers - 1}"
        )
    width, top_k, hot_rows = options.adapter_width, options.top_k, options.hot_rows
    if width is not None and top_k is not None and top_k > width:
        raise UsageError(f"--top-k {top_k}: there are {width} rows (--adapter-width); give at most that")
    if width is not None and hot_rows is not None and hot_rows > width:
        raise UsageError(f"--hot-rows {hot_rows}: there are {width} rows (--adapter-width); give at most that")


def _check_ranks(options: RequestOptions) -> None:
    ranks, grad_accum = options.gpus * options.nodes, options.grad_accum
    if grad_accum % ranks:
        given = f"--gpus {options.gpus}" if options.nodes == 1 else f"--nodes {options.nodes} --gpus {options.gpus}"
        fitting = -(-grad_accum // ranks) * ranks
        raise UsageError(
            f"{given}: the {grad_accum} micro-batches of an optimizer step (--grad-accum) do not divide among "
            f"them; give --grad-accum {fitting}"
        )
    if options.shard_base and options.gpus == 1:
        raise UsageError("--shard-base: over which cards? It goes with --gpus")
    if ranks > 1 and options.hot_rows:
        raise UsageError(f"--hot-rows {options.hot_rows}: several devices have none; it goes with --gpus 1")


def _interconnect(options: RequestOptions) -> float | None:
    if options.nodes == 1:
        if options.rows == "owned":
            raise UsageError("--rows owned: by which machines? It goes with --nodes")
        if options.interconnect is not None:
            raise UsageError(f"--interconnect {options.interconnect}: between which machines? It goes with --nodes")
        return None
    if options.interconnect is None:
        raise UsageError(f"--nodes {options.nodes}: what is between them? Give --interconnect, as 25Gbit/s or 3.1GB/s")
    return parse_rate(options.interconnect, field="--interconnect")


def _check_copy(options: RequestOptions, adapter: AdapterDtype) -> None:
    if options.bf16_copy and adapter != "bf16":
        raise UsageError(
            f"--bf16-copy: the adapter's rows travel in {adapter}, as the host keeps them; it goes with "
            f"--adapter-dtype bf16"
        )


def _check_device(options: RequestOptions, gpu: GpuProfile, weights: WeightsDtype) -> None:
    if options.double_quant and weights != "nf4":
        raise UsageError(f"--double-quant: the weights are {weights}; it goes with --weights-dtype nf4")
    if gpu.shares_host_cores and options.attention == "flash":
        raise UsageError("--attention flash: it needs a CUDA device, --gpu emulated has none; give sdpa or eager")
