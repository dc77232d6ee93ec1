"""What the models say of one decision, and from which numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meft.planner.base.quantities import ADAPTER_DTYPE_BYTES, COMPUTE_DTYPE_BYTES, Ints
from meft.planner.memory.budget import host_budget
from meft.planner.memory.device import predict_device_memory
from meft.planner.memory.host import host_memory
from meft.planner.memory.replayed import emulated_reserved_bytes
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import (
    Decision,
    HostMemory,
    Inputs,
    NumberUsed,
    Plan,
    Prediction,
    ProfileUsed,
    Request,
    Sparsity,
    Timing,
)
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
from meft.planner.records.profiles import GpuProfile, HostProfile, LinkProfile, SparsityProfile, sourced_numbers
from meft.planner.timing.chrome import Event
from meft.planner.timing.step import step_timing
from meft.planner.traffic.chunks import predict_chunked_sparsity
from meft.planner.traffic.hot_rows import HotRows
from meft.planner.traffic.sparsity import hot_rows_among, predict_sparsity
from meft.planner.traffic.transfer import step_transfer


@dataclass(frozen=True)
class ProfileSet:
    """The profiles that a prediction rests on."""

    gpu: GpuProfile
    link: LinkProfile
    host: HostProfile
    sparsity: SparsityProfile

    @classmethod
    def of(cls, request: Request) -> ProfileSet:
        """Those that a request names."""
        return cls(
            gpu=load_gpu(request.gpu),
            link=load_link(request.link),
            host=load_host(request.host),
            sparsity=load_sparsity(request.sparsity),
        )


def simulated_tasks(request: Request, decision: Decision, profiles: ProfileSet, sparsity: Sparsity) -> list[Event]:
    """The tasks of a step with these active rows, as its timing is simulated."""
    events: list[Event] = []
    timing_of(request, decision, profiles, sparsity, events=events)
    return events


def timing_of(
    request: Request,
    decision: Decision,
    profiles: ProfileSet,
    sparsity: Sparsity,
    *,
    events: list[Event] | None = None,
) -> Timing:
    """The time of a step with these active rows; ``events`` collects its tasks."""
    return step_timing(
        request=request,
        decision=decision,
        gpu=profiles.gpu,
        link=profiles.link,
        host=profiles.host,
        active_rows_per_layer=sparsity.active_rows_per_layer,
        window_active_rows_per_layer=sparsity.window_active_rows_per_layer,
        missing_rows_per_layer=sparsity.missing_rows_per_layer,
        overflow_rows_per_layer=sparsity.overflow_rows_per_layer,
        kept_rows_per_layer=sparsity.kept_rows_per_layer,
        hot=_hot(decision, profiles, sparsity),
        events=events,
    )


def _hot(decision: Decision, profiles: ProfileSet, sparsity: Sparsity) -> HotRows | None:
    """The hot rows among those that are active in a micro-batch and in a window."""
    in_step, in_window = (
        np.array(rows, dtype=np.int64)
        for rows in (sparsity.active_rows_per_layer, sparsity.window_active_rows_per_layer)
    )
    return hot_rows_among(
        profiles.sparsity,
        hot_rows=decision.hot_rows,
        adapter_width=decision.adapter_width,
        active_rows=in_step,
        window_active_rows=in_window,
    )


def predict(
    request: Request,
    decision: Decision,
    profiles: ProfileSet,
    active_rows_per_layer: Sequence[int] | None = None,
    *,
    replayed: bool = True,
) -> Prediction:
    """Memory, traffic and time of a decision; ``replayed`` as :func:`predict_device_memory` has it.

    ``active_rows_per_layer`` are a micro-batch's, one number per layer, when they are known, from a run say; without
    them the sparsity profile tells what to expect. Raises :class:`ValueError` unless each is between 0 and the cap.
    """
    sparsity = _sparsity(request, decision, profiles.sparsity, active_rows_per_layer)
    rows = sparsity.active_rows_per_layer
    trainable = adapter_parameters(request, Candidates.of(decision))
    return Prediction(
        device_memory=predict_device_memory(request=request, decision=decision, gpu=profiles.gpu, replayed=replayed),
        host_memory=_host_memory(request, decision, profiles),
        transfer=step_transfer(
            request=request,
            decision=decision,
            active_rows_per_layer=rows,
            missing_rows_per_layer=sparsity.missing_rows_per_layer,
            overflow_rows_per_layer=sparsity.overflow_rows_per_layer,
            kept_rows_per_layer=sparsity.kept_rows_per_layer,
            hot_rows_per_layer=sparsity.hot_rows_per_layer,
            window_rows_per_layer=sparsity.window_active_rows_per_layer,
        ),
        timing=timing_of(request, decision, profiles, sparsity),
        sparsity=sparsity,
        trainable_parameters=int(trainable),
        trainable_fraction=float(trainable / request.model.num_parameters),
    )


def _host_memory(request: Request, decision: Decision, profiles: ProfileSet) -> HostMemory:
    """With what the plan may use, and what its run takes at most."""
    memory = host_memory(request=request, decision=decision)
    on_card = not profiles.gpu.shares_host_cores
    budget = host_budget(request, decision, total_bytes=memory.total_bytes, on_card=on_card)
    return memory.model_copy(update={"machine": budget})


def repriced(plan: Plan, gpu: GpuProfile, *, packed: bool) -> Plan:
    """The plan with device memory for a run whose sequences are ``packed``, or are not; as it is where that is what it
    says already, and where no closed form could say otherwise."""
    request = plan.request
    if packed == request.packed or request.model.measured is not None:
        return plan
    request = request.model_copy(update={"packed": packed})
    memory = predict_device_memory(request=request, decision=plan.decision, gpu=gpu)
    budget = plan.prediction.device_memory.allocator_budget_bytes
    memory = memory.model_copy(update={"allocator_budget_bytes": budget})
    prediction = plan.prediction.model_copy(update={"device_memory": memory})
    return plan.model_copy(update={"request": request, "prediction": prediction})


def without_workspaces(plan: Plan) -> Plan:
    """The plan without cuBLAS workspaces, which a rehearsal of a plan for a card has none of; reserved is then what the
    emulated device's step reserves, where the plan's own was counted."""
    memory = plan.prediction.device_memory
    size = sum(entry.num_bytes for entry in memory.entries if entry.category == "cublas_workspaces")
    peaks = ("peak_allocated_bytes", "peak_reserved_bytes")
    less: dict[str, Any] = {name: getattr(memory, name) - size for name in peaks}
    if size and memory.reserved_basis == "counted":
        less["peak_reserved_bytes"] = emulated_reserved_bytes(plan.request, plan.decision)
    less["entries"] = tuple(entry for entry in memory.entries if entry.category != "cublas_workspaces")
    prediction = plan.prediction.model_copy(update={"device_memory": memory.model_copy(update=less)})
    return plan.model_copy(update={"prediction": prediction})


def adapter_parameters(request: Request, candidates: Candidates) -> Ints:
    """Trainable ones: keys and values of every row, and for Key-Experts the routers, ``L * (2*R + N) * D``."""
    vectors = 2 * candidates.adapter_width + candidates.router_rows * candidates.key_experts
    return request.model.num_layers * request.model.hidden_size * vectors


def _sparsity(request: Request, decision: Decision, profile: SparsityProfile, given: Sequence[int] | None) -> Sparsity:
    """What the profile expects, with the given rows in place of its own.

    The window's rows are then those expected, but no fewer than a micro-batch's and no more than all of its sum.
    """
    if decision.token_chunks > 1:
        expected = predict_chunked_sparsity(profile, request=request, decision=decision)
    else:
        expected = predict_sparsity(profile, request=request, decision=decision)
    if given is None:
        return expected
    rows = np.array(given, dtype=np.int64)
    if len(rows) != request.model.num_layers:
        raise ValueError(f"active rows are given for {len(rows)} layers, the model has {request.model.num_layers}")
    most = decision.active_rows_cap * decision.token_chunks
    if rows.min() < 0 or rows.max() > most:
        raise ValueError(f"active rows {list(given)} are not all between 0 and the cap {most}")
    window = np.clip(expected.window_active_rows_per_layer, rows, rows * request.grad_accum)
    update = {
        "active_rows_per_layer": tuple(rows.tolist()),
        "window_active_rows_per_layer": tuple(window.tolist()),
        "basis": "measured",
    }
    hot = hot_rows_among(
        profile,
        hot_rows=decision.hot_rows,
        adapter_width=decision.adapter_width,
        active_rows=rows,
        window_active_rows=window,
    )
    if hot is not None:
        update |= {"hot_rows_per_layer": tuple(hot.active.tolist())}
        rows = rows - hot.active
    if decision.cached_rows or decision.token_chunks > 1:
        missing = np.minimum(expected.missing_rows_per_layer, rows)
        overflow = np.minimum(expected.overflow_rows_per_layer, missing)
        update |= {
            "missing_rows_per_layer": tuple(missing.tolist()),
            "overflow_rows_per_layer": tuple(overflow.tolist()),
        }
    return expected.model_copy(update=update)


# --- where the numbers come from -------------------------------------------------------------------------------------


def inputs_used(request: Request, decision: Decision, profiles: ProfileSet) -> Inputs:
    """Each profile by its digest, and each of their numbers that the prediction of ``decision`` rests on."""
    used = (
        ProfileUsed(kind="gpu", name=profiles.gpu.key, digest=profiles.gpu.content_digest()),
        ProfileUsed(kind="link", name=profiles.link.key, digest=profiles.link.content_digest()),
        ProfileUsed(kind="host", name=profiles.host.key, digest=profiles.host.content_digest()),
        ProfileUsed(kind="sparsity", name=profiles.sparsity.key, digest=profiles.sparsity.content_digest()),
        ProfileUsed(kind="model", name=request.model.name, digest=request.model.content_digest()),
    )
    numbers = (
        *_rates("gpu", profiles.gpu, unused=_unused_by_gpu(request, profiles.gpu)),
        *_context(profiles.gpu),
        *_rates("link", profiles.link, unused=_unused_by_link(request, decision)),
        *_rates("host", profiles.host, unused=_unused_by_host(profiles.gpu)),
        *_sparsity_numbers(profiles.sparsity, prefetch_depth=decision.prefetch_depth),
    )
    return Inputs(profiles=used, numbers=numbers)


def _rates(
    prefix: str, profile: GpuProfile | LinkProfile | HostProfile, *, unused: frozenset[str]
) -> Iterator[NumberUsed]:
    for name, number in sourced_numbers(profile):
        if name not in unused:
            yield NumberUsed(name=f"{prefix}.{name}", value=number.value, basis=number.basis, source=number.source)


def _unused_by_host(gpu: GpuProfile) -> frozenset[str]:
    """What launching takes, where the device's rates have it; without it nobody is beside the host's kernels."""
    names = (name for name in HostProfile.model_fields if name.startswith(("launch_", "busy_", "bound_")))
    return frozenset(names if gpu.shares_host_cores else ())


def _unused_by_gpu(request: Request, gpu: GpuProfile) -> frozenset[str]:
    """The total, which the budget stands for, and the rates of formats in which nothing computes."""
    element_bytes = {COMPUTE_DTYPE_BYTES[request.weights_dtype], ADAPTER_DTYPE_BYTES[request.adapter_dtype]}
    formats = ("bf16_flops_per_second", "fp16_flops_per_second", "fp32_flops_per_second")
    half = next(name for name in formats if getattr(gpu, name) is not None)
    used = {half} if 2 in element_bytes else set()
    if 4 in element_bytes:
        used.add("fp32_flops_per_second")
    return frozenset({"memory_total_bytes", *formats} - used)


def _unused_by_link(request: Request, decision: Decision) -> frozenset[str]:
    """Copies are pinned; both directions are busy at once only where rows are fetched again, or weights gathered."""
    pageable = {"pageable_h2d_bytes_per_second", "pageable_d2h_bytes_per_second"}
    duplex = {"duplex_h2d_bytes_per_second", "duplex_d2h_bytes_per_second"}
    both = decision.rows_in_backward == "refetched" or request.shard_base
    return frozenset(pageable if both else pageable | duplex)


def _context(gpu: GpuProfile) -> Iterator[NumberUsed]:
    for name in ("low_bytes", "high_bytes"):
        value, context = getattr(gpu.context, name), gpu.context
        yield NumberUsed(name=f"gpu.context_{name}", value=value, basis=context.basis, source=context.source)


def _sparsity_numbers(profile: SparsityProfile, *, prefetch_depth: int) -> Iterator[NumberUsed]:
    alphas = [layer.alpha for layer in profile.layers]
    recalls = profile.prefetch_recall_by_depth
    values = {"alpha": alphas[0]}
    if len(alphas) > 1:
        values = {"alpha_lowest": min(alphas), "alpha_mean": sum(alphas) / len(alphas), "alpha_highest": max(alphas)}
    values["spread_fraction"] = profile.spread_fraction
    values["prefetch_recall"] = recalls[min(prefetch_depth, len(recalls) - 1)]
    values |= {f"popularity_of_top_{point.rows:g}": point.traffic for point in profile.popularity}
    for name, value in values.items():
        yield NumberUsed(name=f"sparsity.{name}", value=value, basis=profile.basis, source=profile.source)
