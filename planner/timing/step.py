"""What every task of a step costs on a GPU, a link and a host, and the step time that follows.

GPU: :mod:`meft.planner.timing.gpu`. Link: latency plus bytes over the rate. Host: work over measured rates. The order
of the tasks and what overlaps is the program of :mod:`meft.planner.timing.program`; every task's seconds come from
here, for one decision or for arrays of them.

Letters: ``T`` tokens of a micro-batch, ``L`` layers, ``D`` hidden size, ``R`` adapter rows per layer, ``A`` active
rows, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.quantities import (
    ADAPTER_DTYPE_BYTES,
    BF16_BYTES,
    COMPUTE_DTYPE_BYTES,
    MASTER_BYTES,
    Flags,
    Floats,
    Ints,
    aligned_rows,
    chunk_tokens,
)
from meft.planner.records.candidates import Candidates, same_for_all
from meft.planner.records.plan import Decision, Request, Timing
from meft.planner.records.profiles import GpuProfile, HostProfile, LinkProfile, sourced_numbers
from meft.planner.timing.chrome import Event
from meft.planner.timing.cores import beside_python, python_share
from meft.planner.timing.gpu import (
    ADAMW_ARRAYS,
    INPUT_COPIES,
    AdapterSizes,
    GpuRates,
    activate_seconds,
    adapter_backward_seconds,
    adapter_forward_seconds,
    assemble_seconds,
    attention_seconds,
    embedding_seconds,
    ffn_seconds,
    frozen_backward_seconds,
    gpu_rates,
    hot_adamw_seconds,
    loss_head_seconds,
    router_adamw_seconds,
    router_seconds,
    sum_gradients_seconds,
)
from meft.planner.timing.interconnect import (
    exchange_between,
    gathered_share,
    rows_between,
    scores_between,
    sums_between,
    weights_between,
)
from meft.planner.timing.lanes import baseline_seconds, simulate
from meft.planner.timing.launching import launch_seconds
from meft.planner.timing.moved_rows import MovedRows, moved_in_chunks, moved_rows
from meft.planner.timing.program import GpuSeconds, HostSeconds, LinkSeconds, StepCosts
from meft.planner.traffic.hot_rows import HOT_NORM_BYTES, HotRows, hot_key_bytes
from meft.planner.traffic.sparsity import WindowRows
from meft.planner.traffic.transfer import (
    LOSS_BYTES,
    NORM_BYTES,
    input_bytes,
    probe_bytes,
    query_bytes,
    router_gradient_bytes,
    row_bytes,
    row_expert_bytes,
)

P = TypeVar("P", GpuProfile, LinkProfile, HostProfile)

WRITTEN_THROUGH_CACHE = 2
"""Bytes over the memory bus for each that an ordinary store writes: its line is read first."""

# --- link and host ---------------------------------------------------------------------------------------------------


def copy_seconds(num_bytes: Ints, *, rate: Floats, latency: Floats) -> Floats:
    """A copy over the link, at ``rate`` bytes per second after ``latency`` seconds."""
    return latency + num_bytes / rate


def route_seconds(
    host: HostProfile,
    *,
    tokens: int,
    hidden_size: int,
    scored_rows: Ints,
    visited_experts: Ints,
    scored_means: Ints = 0,
) -> Floats:
    """Choosing one layer's rows: ``2*T*D`` flops per scored row, top K over the scores, and Python around it.

    ``scored_rows`` is ``P * R/N`` per token; exact routing is one expert that everybody probes. ``visited_experts``
    are those whose tokens are scored together, one after the other: 0 for exact routing. ``scored_means`` are experts'
    means, scored and chosen among as rows are.
    """
    scores = tokens * (scored_rows + scored_means)
    arithmetic = 2 * hidden_size * scores / host.gemm_flops_per_second.value
    selection = scores / host.select_scores_per_second.value
    python = host.overhead_seconds_per_layer.value + visited_experts * host.overhead_seconds_per_expert.value
    return arithmetic + selection + python


def means_seconds(host: HostProfile, *, adapter_width: Ints, hidden_size: int) -> Floats:
    """Taking the means of one layer's keys anew: ``R*D`` fp32 numbers read, at the rate at which rows are gathered."""
    return adapter_width * hidden_size * MASTER_BYTES / host.gather_bytes_per_second.value


def gather_seconds(
    host: HostProfile, *, active_rows: Ints, hidden_size: int, adapter_dtype_bytes: int, bf16_copy: bool = False
) -> Floats:
    """Reading rows and writing them to staging in the adapter's dtype: bf16 ones from the copy, or rounded from fp32.

    Rows that keep their dtype are written past the cache. Rounded ones go through it, and it first reads what is about
    to be overwritten, so what is written counts twice. By that the copy halves the time; measured on small-2core, at
    the sizes of a 7B model's layer: 0.38 to 0.45 of it, with rows a quarter as long 0.50 to 0.63.
    """
    rounded = adapter_dtype_bytes != MASTER_BYTES and not bf16_copy
    read_bytes = adapter_dtype_bytes if bf16_copy else MASTER_BYTES
    written_bytes = adapter_dtype_bytes * (WRITTEN_THROUGH_CACHE if rounded else 1)
    num_bytes = active_rows * 2 * hidden_size * (read_bytes + written_bytes)
    return num_bytes / host.gather_bytes_per_second.value


def accumulate_seconds(host: HostProfile, *, active_rows: Ints, hidden_size: int, adapter_dtype_bytes: int) -> Floats:
    """Adding row gradients to the window's fp32 sum (read, read, write), and Python around it."""
    num_bytes = active_rows * 2 * hidden_size * (adapter_dtype_bytes + 2 * MASTER_BYTES)
    return num_bytes / host.scatter_bytes_per_second.value + host.overhead_seconds_per_layer.value


def adamw_seconds(host: HostProfile, *, rows: Ints | Floats, hidden_size: int, bf16_copy: bool = False) -> Floats:
    """AdamW on touched rows of the fp32 tables, and the copy's rows written in the same pass, through the cache.

    Measured on small-2core: 1.11 to 1.26 of the time without a copy, where this says 1.14.
    """
    copied_bytes = bf16_copy * BF16_BYTES * WRITTEN_THROUGH_CACHE
    num_bytes = rows * 2 * hidden_size * (ADAMW_ARRAYS * MASTER_BYTES + copied_bytes)
    return num_bytes / host.adamw_bytes_per_second.value


# --- several ranks ---------------------------------------------------------------------------------------------------


def shared_rates(
    request: Request, gpu: GpuProfile, link: LinkProfile, host: HostProfile
) -> tuple[GpuProfile, LinkProfile, HostProfile]:
    """What one of several ranks has while all work: its share of the host's rates, and of a link that cards share.

    The emulated device and its link are the host's cores and memory, so they are divided too.
    """
    ranks = request.gpus
    if ranks == 1:
        return gpu, link, host
    on_host = gpu.shares_host_cores
    cards = ranks if on_host else min(ranks, request.gpus_per_link)
    return (_divided(gpu, ranks) if on_host else gpu), _divided(link, cards), _divided(host, ranks)


def _divided(profile: P, by: int) -> P:
    """The profile with every rate divided."""
    rates = {
        name: number.model_copy(update={"value": number.value / by})
        for name, number in sourced_numbers(profile)
        if name.endswith("_per_second")
    }
    return profile.model_copy(update=rates)


def exchange_seconds(request: Request, link: LinkProfile, candidates: Candidates) -> Floats:
    """A step's share of what ranks exchange of the routers: gradients to the host, and the window's sums back.

    Row gradients are added up as they land, by the host's lane, as for one rank; so are these, which are few.
    """
    latency, layers = link.latency_seconds.value, request.model.num_layers
    one_way = router_gradient_bytes(
        num_layers=layers,
        num_experts=candidates.router_rows,
        hidden_size=request.model.hidden_size,
        key_experts=candidates.key_experts,
        ranks=request.ranks,
    )
    some = one_way > 0
    sent = copy_seconds(one_way, rate=link.d2h_bytes_per_second.value, latency=layers * latency)
    back = copy_seconds(one_way, rate=link.h2d_bytes_per_second.value, latency=layers * latency)
    return some * (sent + back / request.rounds)


# --- the step --------------------------------------------------------------------------------------------------------


def step_costs(
    *,
    request: Request,
    gpu: GpuProfile,
    link: LinkProfile,
    host: HostProfile,
    candidates: Candidates,
    active_rows: NDArray[np.int64],
    window_active_rows: NDArray[np.int64],
    cached: WindowRows | None = None,
    hot: HotRows | None = None,
) -> StepCosts:
    """Seconds of every task of a step.

    ``active_rows`` of a micro-batch and ``window_active_rows`` of an accumulation window are ``[L, ...]`` over the
    candidates' axes; ``cached`` are the window's rows where some stay on the device, ``hot`` those of rows that are
    there for good. Raises :class:`ValueError` where some candidates sum gradients on the device, or have a bf16 copy,
    and others do not.
    """
    ((costs,),) = step_costs_of_choices(
        request=request,
        gpu=gpu,
        link=link,
        host=host,
        candidates=candidates,
        active_rows=active_rows,
        window_active_rows=window_active_rows,
        cached=cached,
        hot=hot,
        copied=(candidates.bf16_copy,),
        retained=(candidates.retained,),
    )
    return costs


def step_costs_of_choices(
    *,
    request: Request,
    gpu: GpuProfile,
    link: LinkProfile,
    host: HostProfile,
    candidates: Candidates,
    active_rows: NDArray[np.int64],
    window_active_rows: NDArray[np.int64],
    cached: WindowRows | None,
    hot: HotRows | None,
    copied: Sequence[Flags],
    retained: Sequence[Flags],
) -> list[list[StepCosts]]:
    """:func:`step_costs` of the candidates by whether the host keeps a bf16 copy and by whether rows are retained. The
    first is the host's affair and the second the link's: each lane's costs are the same objects for all of the rest."""
    gpu, link, host = shared_rates(request, gpu, link, host)
    on_device = same_for_all(candidates.gradients_on_device)
    if candidates.token_chunks > 1:
        assert cached is not None
        moved = moved_in_chunks(active_rows, cached, candidates.token_chunks)
    else:
        moved = moved_rows(active_rows, cached, on_device, request.rounds, hot)
    window_rows: Ints = (window_active_rows if hot is None else window_active_rows - hot.in_window).sum(axis=0)
    rates = gpu_rates(gpu, request)
    of_gpu = _gpu_costs(request, rates, candidates, moved)
    launch = launch_seconds(request, gpu, host)
    if launch is not None:
        layer_seconds = float(of_gpu.attention + of_gpu.ffn + of_gpu.frozen_backward)
        host = beside_python(host, python_share(launch, layer_seconds), bound=candidates.bound)
    of_link = [
        _link_costs(request, link, replace(candidates, retained=choice), moved, window_rows) for choice in retained
    ]
    of_host = [
        _host_costs(request, host, replace(candidates, bf16_copy=choice), moved, window_rows) for choice in copied
    ]
    weights = weights_between(request, link, rates)
    if weights is not None:
        of_gpu = replace(of_gpu, unpack=weights.unpack)
        of_link = [replace(costs, weights=weights.came, weights_sent=weights.sent) for costs in of_link]
    if hot is not None:
        update = _hot_update(request, gpu, link, host, hot.per_layer)
        of_gpu = replace(of_gpu, hot_adamw=update.adamw)
        of_link = [replace(costs, hot_keys=update.sent) for costs in of_link]
        of_host = [replace(costs, hot_keys=update.written) for costs in of_host]
    chunks = candidates.token_chunks
    return [
        [StepCosts(of_gpu, link_costs, host_costs, chunks, launch) for link_costs in of_link] for host_costs in of_host
    ]


class _HotUpdate(NamedTuple):
    """A step's share of updating the hot rows on the device, and of telling the host their keys."""

    adamw: Floats
    sent: Floats
    written: Floats


def _hot_update(request: Request, gpu: GpuProfile, link: LinkProfile, host: HostProfile, hot_rows: Ints) -> _HotUpdate:
    num_layers, hidden_size = request.model.num_layers, request.model.hidden_size
    keys = hot_key_bytes(num_layers=num_layers, hidden_size=hidden_size, hot_rows=hot_rows)
    adamw = hot_adamw_seconds(
        gpu_rates(gpu, request), hidden_size=hidden_size, num_layers=num_layers, hot_rows=hot_rows
    )
    sent = copy_seconds(
        keys + HOT_NORM_BYTES,
        rate=link.d2h_bytes_per_second.value,
        latency=(num_layers + 1) * link.latency_seconds.value,
    )
    written = 2 * keys / host.gather_bytes_per_second.value + num_layers * host.overhead_seconds_per_layer.value
    return _HotUpdate(adamw / request.rounds, sent / request.rounds, written / request.rounds)


def _gpu_costs(request: Request, rates: GpuRates, candidates: Candidates, moved: MovedRows) -> GpuSeconds:
    rows, chunks = aligned_rows(moved.active, most=candidates.adapter_width), candidates.token_chunks
    routed = AdapterSizes(
        tokens=request.tokens_per_step,
        hidden_size=request.model.hidden_size,
        element_bytes=ADAPTER_DTYPE_BYTES[request.adapter_dtype],
        num_experts=candidates.num_experts,
        key_experts=candidates.key_experts,
        own_rows=candidates.own_rows,
        switch=candidates.switch,
        routers=candidates.routers,
    )
    chunk = replace(routed, tokens=chunk_tokens(routed.tokens, chunks))
    return GpuSeconds(
        embedding=embedding_seconds(request, rates),
        attention=attention_seconds(request, rates),
        router=router_seconds(rates, routed),
        ffn=ffn_seconds(request, rates),
        adapter_forward=np.asarray(adapter_forward_seconds(rates, chunk, active_rows=rows)),
        loss_head=loss_head_seconds(request, rates),
        adapter_backward=np.asarray(adapter_backward_seconds(rates, chunk, active_rows=rows)),
        frozen_backward=frozen_backward_seconds(request, rates),
        router_adamw=router_adamw_seconds(rates, routed, num_layers=request.model.num_layers) / request.rounds,
        assemble=np.asarray(assemble_seconds(rates, routed, active_rows=moved.assembled) * moved.has_places),
        sum_gradients=np.asarray(
            sum_gradients_seconds(rates, routed, rows=moved.added) * (moved.gradients_on_device or moved.hot.any())
        ),
        activate_again=np.asarray(activate_seconds(rates, chunk, active_rows=rows) * (chunks > 1)),
    )


def _link_costs(
    request: Request, link: LinkProfile, candidates: Candidates, moved: MovedRows, window_rows: Ints
) -> LinkSeconds:
    tokens, hidden_size = request.tokens_per_step, request.model.hidden_size
    key_experts, refetched = candidates.key_experts, candidates.refetched
    h2d, d2h, latency = link.h2d_bytes_per_second.value, link.d2h_bytes_per_second.value, link.latency_seconds.value
    h2d_backward = np.where(refetched, link.duplex_h2d_bytes_per_second.value, h2d)
    d2h_backward = np.where(refetched, link.duplex_d2h_bytes_per_second.value, d2h)
    element_bytes = ADAPTER_DTYPE_BYTES[request.adapter_dtype]

    def bytes_of(rows: Ints) -> Ints:
        return row_bytes(active_rows=rows, hidden_size=hidden_size, adapter_dtype_bytes=element_bytes)

    queries = query_bytes(
        tokens=tokens, hidden_size=hidden_size, compute_dtype_bytes=COMPUTE_DTYPE_BYTES[request.weights_dtype]
    )
    probes = probe_bytes(tokens=tokens, num_probes=candidates.num_probes)
    experts = key_experts * copy_seconds(row_expert_bytes(active_rows=moved.active), rate=h2d, latency=latency)
    hits = row_expert_bytes(active_rows=moved.active - moved.missing)
    places = moved.has_places * copy_seconds(hits, rate=h2d, latency=latency)
    chunks = candidates.gather_chunks
    sums = moved.gradients_on_device * copy_seconds(
        bytes_of(moved.summed), rate=d2h_backward, latency=latency / request.rounds
    )
    return LinkSeconds(
        inputs=copy_seconds(input_bytes(tokens=tokens), rate=h2d, latency=INPUT_COPIES * latency),
        queries=copy_seconds(queries, rate=d2h, latency=latency),
        probes=key_experts * copy_seconds(probes, rate=d2h, latency=latency),
        rows=np.asarray(copy_seconds(bytes_of(moved.missing), rate=h2d, latency=chunks * latency) + experts + places),
        loss=copy_seconds(LOSS_BYTES, rate=d2h, latency=latency),
        rows_refetched=np.asarray(copy_seconds(bytes_of(moved.overflow), rate=h2d_backward, latency=latency)),
        row_gradients=np.asarray(copy_seconds(bytes_of(moved.gradients), rate=d2h_backward, latency=latency) + sums),
        router_norm=key_experts * copy_seconds(NORM_BYTES, rate=d2h, latency=latency) / request.rounds
        + exchange_seconds(request, link, candidates),
        chunks=chunks,
        exchange=exchange_between(request, rows=moved.gradients + moved.summed),
        sums=sums_between(request, candidates, window_rows=window_rows),
    )


def _host_costs(
    request: Request,
    host: HostProfile,
    candidates: Candidates,
    moved: MovedRows,
    window_rows: Ints,
) -> HostSeconds:
    hidden_size, element_bytes = request.model.hidden_size, ADAPTER_DTYPE_BYTES[request.adapter_dtype]
    tokens = chunk_tokens(request.tokens_per_step, candidates.token_chunks)
    probes, experts = candidates.num_probes, candidates.num_experts
    copied = same_for_all(candidates.bf16_copy) and request.adapter_dtype == "bf16"
    owners = request.ranks if candidates.owned else request.gpus
    of_owner = window_rows if owners == 1 else window_rows / owners
    copies = gathered_share(request, candidates)

    def gather(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        moved_rows = rows if copies == 1 else np.ceil(copies * rows).astype(np.int64)
        seconds = gather_seconds(
            host, active_rows=moved_rows, hidden_size=hidden_size, adapter_dtype_bytes=element_bytes, bf16_copy=copied
        )
        return np.asarray(seconds + rows_between(request, candidates, rows=rows))

    means = means_seconds(host, adapter_width=candidates.adapter_width, hidden_size=hidden_size) / request.rounds
    route = route_seconds(
        host,
        tokens=tokens,
        hidden_size=hidden_size,
        scored_rows=probes * (candidates.adapter_width // experts),
        visited_experts=np.where(candidates.in_experts, np.minimum(experts, tokens * probes), 0),
        scored_means=experts * candidates.means,
    )
    return HostSeconds(
        route=route + means * candidates.means + scores_between(request, candidates),
        gather=gather(moved.missing) + (candidates.gather_chunks - 1) * host.overhead_seconds_per_layer.value,
        gather_again=gather(moved.overflow),
        accumulate=np.asarray(
            accumulate_seconds(
                host,
                active_rows=moved.gradients + moved.summed,
                hidden_size=hidden_size,
                adapter_dtype_bytes=element_bytes,
            )
        ),
        adamw=adamw_seconds(host, rows=of_owner, hidden_size=hidden_size, bf16_copy=copied) / request.rounds,
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
    hot: HotRows | None = None,
    overlapped: bool = True,
    events: list[Event] | None = None,
) -> Timing:
    """The time of one decision; ``events`` collects its tasks, for :func:`meft.planner.timing.chrome.chrome_trace`.

    ``overlapped=False``: under the sequential schedule.
    """
    cached = None
    if decision.cached_rows or decision.token_chunks > 1:
        kept = kept_rows_per_layer or (0,) * request.model.num_layers
        by_kind = (missing_rows_per_layer, overflow_rows_per_layer, kept)
        cached = WindowRows(*(np.array(rows, dtype=np.int64) for rows in by_kind))
    num_layers = request.model.num_layers
    costs = step_costs(
        request=request,
        gpu=gpu,
        link=link,
        host=host,
        candidates=Candidates.of(decision),
        active_rows=np.array(active_rows_per_layer, dtype=np.int64),
        window_active_rows=np.array(window_active_rows_per_layer, dtype=np.int64),
        cached=cached,
        hot=hot,
    )
    step = simulate(
        costs,
        num_layers=num_layers,
        prefetch_depth=decision.prefetch_depth,
        checkpointing=decision.activation_checkpointing,
        refetched=decision.rows_in_backward == "refetched",
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
        tokens_per_second=request.ranks * request.tokens_per_step / seconds,
    )
