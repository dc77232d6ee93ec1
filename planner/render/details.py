"""All that a plan says, section by section: what ``--verbose`` shows under the first screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from meft.planner.base.quantities import chunk_tokens
from meft.planner.base.units import GIB, MIB, format_bytes, format_seconds
from meft.planner.records.plan import (
    HostBudget,
    MemoryEntry,
    Objective,
    ParetoPoint,
    Phase,
    Plan,
    Verification,
    host_budget_of,
)
from meft.planner.render.tables import View, count, grid, lines, percent, section, stacked
from meft.planner.search.levers import reserved_at_most
from meft.planner.terms.ledger import STEP_PHASES
from meft.planner.timing.chrome import lanes_of

PARETO_ROWS = 5

GROUPS: dict[str, tuple[str, ...]] = {
    "frozen model": (
        "frozen_model",
        "linear_weights",
        "other_weights",
        "rotary_frequencies",
        "block_rounding",
        *("dequantized_weight", "gathered_weights"),
    ),
    "active rows and their gradients": ("row_staging", "row_gradients", "row_indices", "kept_rows", "gradient_sums"),
    "hot rows and their optimizer": ("hot_rows", "hot_states"),
    "router": ("router_weights", "router_gradients", "router_moments"),
    "trained on the device": ("trainable_weights", "optimizer_moments", "gradients"),
    "kept for backward": (
        "model_activations",
        "norms",
        "attention",
        "ffn",
        "adapter",
        "routing",
        "layer_inputs",
        "rotary_tables",
        "attention_mask",
        "kv_cache",
        "final_norm",
    ),
    "logits and loss": ("loss_chain", "logits", "logit_softcap"),
    "temporaries": ("forward_temporaries", "backward_temporaries", "optimizer_temporary", "block_remainders"),
    "inputs and workspaces": ("inputs", "cublas_workspaces"),
}
"""Categories of the ledger as a person reads them; what is in none of them goes under "other"."""
OTHER = "other"
_WANTED: dict[Objective, str] = {
    "capacity": "most adaptation capacity",
    "speed": "fastest step",
    "traffic": "most adaptation capacity with least traffic",
}
_PHASE_TITLES: dict[Phase, str] = {
    "resident": "resident",
    "forward": "forward",
    "loss": "loss",
    "backward": "backward",
    "optimizer_step": "optimizer",
}


def grouped_bytes(entries: Iterable[MemoryEntry]) -> dict[str, dict[Phase, int]]:
    """Bytes by group and phase of the step; what is resident counts in every phase."""
    group_of = {category: group for group, categories in GROUPS.items() for category in categories}
    sizes = {group: dict.fromkeys(STEP_PHASES, 0) for group in (*GROUPS, OTHER)}
    for entry in entries:
        by_phase = sizes[group_of.get(entry.category, OTHER)]
        for phase in STEP_PHASES if entry.phase == "resident" else (entry.phase,):
            by_phase[phase] += entry.num_bytes
    return {group: by_phase for group, by_phase in sizes.items() if any(by_phase.values())}


# --- a plan ---------------------------------------------------------------------------------------------------------


def detail_sections(plan: Plan) -> list[View]:
    """Every choice with its reason, every table, every entry and number with its source."""
    parts = [
        _headline(plan),
        section(_decision_title(plan), _decision(plan)),
        section(_device_title(plan), _device(plan)),
        *([] if plan.verification is None else [section("Verified", _verification(plan, plan.verification))]),
        section(_host_title(plan), _host(plan)),
        section("Transfer per step", _transfer(plan)),
        section(_time_title(plan), _lanes(plan)),
    ]
    if plan.search.pareto:
        parts.append(section("Trade-offs: this plan (*) and others that nothing beats", _pareto(plan)))
    parts.append(section("What this rests on", lines(_basis_lines(plan))))
    parts.append(section("Device ledger", ledger(plan.prediction.device_memory.entries)))
    return [*parts, *_sources(plan)]


def limits_used(plan: Plan) -> list[tuple[str, float]]:
    """The share of each limit that the plan uses, the tightest first."""
    request, prediction = plan.request, plan.prediction
    memory = prediction.device_memory
    used = [
        ("device memory", reserved_at_most(plan.prediction) / max(memory.allocator_budget_bytes, 1)),
        ("host memory", prediction.host_memory.total_bytes / host_budget_of(plan)),
        ("slowdown", prediction.timing.slowdown / request.max_slowdown),
    ]
    return sorted(used, key=lambda item: -item[1])


def _headline(plan: Plan) -> View:
    request = plan.request
    weights = request.weights_dtype + (" (double-quantized)" if request.double_quant else "")
    return lines(
        [
            f"Plan for {request.model.name}: batch {request.batch_size} x {request.seq_len} tokens, "
            f"grad_accum {request.grad_accum}, {weights} weights, {request.adapter_dtype} adapter, {request.attention}"
            + (", packed" if request.packed else ""),
            f"Budget: {format_bytes(request.gpu_mem_bytes)} GPU memory, {format_bytes(request.host_mem_bytes)} "
            f"host memory ({request.host_mem_basis})",
        ]
    )


def _decision_title(plan: Plan) -> str:
    search, objective = plan.search, plan.request.objective
    return f"Decision: {_WANTED[objective]} of {search.feasible:,} that fit, {search.candidates:,} weighed"


def _decision(plan: Plan) -> View:
    decision = plan.decision
    rows = [
        ("adapter width", f"{decision.adapter_width:,}", _why_width(plan)),
        ("top K", f"{decision.top_k:,}", _given(plan.request.top_k, "rows that each token chooses")),
        *_tokens_see(plan),
        *_token_chunks(plan),
        *_owned(plan),
        *_sharded(plan),
        ("active rows cap", f"{decision.active_rows_cap:,}", _why_cap(plan)),
        ("prefetch depth", str(decision.prefetch_depth), _why_prefetch(plan)),
        ("routing", decision.routing, _given(plan.request.routing, _why_routing(plan))),
        ("rows in backward", decision.rows_in_backward, _given(plan.request.rows_in_backward, _why_backward(plan))),
        ("rows cached", f"{decision.cached_rows:,}", _why_cached(plan)),
        ("hot rows", f"{decision.hot_rows:,}", _given(plan.request.hot_rows, _why_hot(plan))),
        *_copy(plan),
        *([("cores", "bound", "the host's kernels apart from Python, faster so")] if decision.bind_cores else ()),
        ("checkpointing", "on" if decision.activation_checkpointing else "off", _why_checkpointing(plan)),
    ]
    return grid(("", "", ""), rows, right=(1,))


def _tokens_see(plan: Plan) -> list[tuple[str, str, str]]:
    """Where it is not the usual union."""
    if plan.decision.tokens_see == "union":
        return []
    return [("tokens see", "own rows", "of those that travel a token's output uses its own best K alone (as asked)")]


def _owned(plan: Plan) -> list[tuple[str, str, str]]:
    """Where machines have each their own."""
    if plan.decision.rows == "replicated":
        return []
    width, nodes = plan.decision.adapter_width, plan.request.nodes
    return [("rows", "owned", f"each of {nodes} machines has {width // nodes:,} of a layer's, and asks for the others")]


def _sharded(plan: Plan) -> list[tuple[str, str, str]]:
    """Where each card has its part of the base."""
    if not plan.request.shard_base:
        return []
    shape, gpus = plan.request.model, plan.request.gpus
    return [("base", "sharded", f"each of {gpus} cards has its part of the {shape.num_layers} layers' matrices")]


def _token_chunks(plan: Plan) -> list[tuple[str, str, str]]:
    """Where there are several."""
    chunks, sparsity = plan.decision.token_chunks, plan.prediction.sparsity
    if chunks == 1:
        return []
    size = chunk_tokens(plan.request.tokens_per_step, chunks)
    share = 1 - sum(sparsity.missing_rows_per_layer) / max(1, sum(sparsity.active_rows_per_layer))
    why = f"of {size:,} tokens, each with rows of its own; {percent(share)} of them are there from the one before"
    return [("token chunks", f"{chunks:,}", _given(plan.request.token_chunks, why))]


def _given(asked: object, why: str) -> str:
    return why if asked is None else f"{why} (as asked)"


def _why_width(plan: Plan) -> str:
    prediction = plan.prediction
    size = f"{count(prediction.trainable_parameters)} trainable, {percent(prediction.trainable_fraction)} of the model"
    if plan.request.adapter_width is not None:
        return f"{size} (as asked)"
    name, used = limits_used(plan)[0]
    return f"{size}; {name} is {percent(used)} used"


def _why_cap(plan: Plan) -> str:
    sparsity = plan.prediction.sparsity
    chunks = plan.decision.token_chunks
    rows = [rows_of_layer // chunks for rows_of_layer in sparsity.active_rows_per_layer]
    most = max(rows)
    spare = plan.decision.active_rows_cap / most - 1 if most else 0.0
    why = f"{most:,} expected{' in the busiest layer' if min(rows) != most else ''}, {percent(spare)} room above"
    if sparsity.quantile is not None and sparsity.quantile_rows_per_layer:
        why += f"; {percent(sparsity.quantile)} of batches need at most {max(sparsity.quantile_rows_per_layer):,}"
    return why


def _why_prefetch(plan: Plan) -> str:
    depth, recall = plan.decision.prefetch_depth, plan.prediction.sparsity.prefetch_recall
    if depth == 0:
        chunks = plan.decision.gather_chunks
        why = "rows are chosen exactly, and waited for" + f", in {chunks} parts" * (chunks > 1)
    elif plan.decision.token_chunks > 1:
        why = f"fetched {depth} chunk{'s' * (depth > 1)} ahead within a layer; rows are chosen exactly"
    else:
        why = f"fetched {depth} layer{'s' * (depth > 1)} ahead; finds {percent(recall)} of the exact choice"
    return _given(plan.request.prefetch_depth, why)


def _why_routing(plan: Plan) -> str:
    decision = plan.decision
    if not decision.needs.in_experts:
        return "every row is scored for every token"
    share = decision.num_probes / decision.num_experts
    rows = decision.adapter_width // decision.num_experts
    probed = (
        f"{decision.num_probes} probed{' by mean key' if decision.needs.means else ''}: {percent(share)} of rows scored"
    )
    why = f"{decision.num_experts} experts of {rows} rows, {probed}"
    if decision.stable is not None:
        learns = decision.stable
        return (
            f"{why}; learnt in {percent(learns.first_stage)} of a run's steps (balance loss {learns.balance_loss:g}), "
            f"then by the light router as it is then: memory, traffic and time are the first stage's, which has more"
        )
    if decision.switch is None:
        return why
    options = decision.switch
    return (
        f"{why}; an expert takes {options.capacity_factor:g} of its even share of tokens, jitter {options.jitter:g}, "
        f"balance loss {options.balance_loss:g}"
    )


def _why_backward(plan: Plan) -> str:
    if plan.decision.rows_in_backward == "retained":
        return "kept until backward, so they travel once"
    return "fetched again, so the device holds few layers' rows at a time"


def _why_cached(plan: Plan) -> str:
    if not plan.decision.cached_rows:
        return "every active row travels in every step"
    sparsity = plan.prediction.sparsity
    share = sum(sparsity.missing_rows_per_layer) / max(1, sum(sparsity.active_rows_per_layer))
    gradients = ", their gradients once per window" if plan.decision.gradients_on_device else ""
    return f"per layer, through a window of {plan.request.rounds}: {percent(share)} of rows travel{gradients}"


def _why_hot(plan: Plan) -> str:
    sparsity, decision = plan.prediction.sparsity, plan.decision
    known = any(number.name.startswith("sparsity.popularity") for number in plan.inputs.numbers)
    unknown = "" if known else f"; {plan.request.sparsity} does not say how popular rows are"
    if not decision.hot_rows:
        return f"no row lives on the device{unknown}"
    share = sum(sparsity.hot_rows_per_layer) / max(1, sum(sparsity.active_rows_per_layer))
    some = percent(share) if known else f"at least {percent(share)}"
    return f"live on the device, chosen after {decision.hot_after_steps} steps: {some} of active rows{unknown}"


def _copy(plan: Plan) -> list[tuple[str, str, str]]:
    """Only a bf16 adapter may have one."""
    if plan.request.adapter_dtype != "bf16":
        return []
    sizes = {entry.category: entry.num_bytes for entry in plan.prediction.host_memory.entries}
    why = "rows are gathered from fp32, rounded on the way"
    if plan.decision.bf16_copy:
        why = f"rows are gathered from it in half the time; {format_bytes(sizes['adapter_bf16_copy'])} of host memory"
    return [("bf16 copy", "on" if plan.decision.bf16_copy else "off", _given(plan.request.bf16_copy, why))]


def _why_checkpointing(plan: Plan) -> str:
    why = "layers are recomputed in backward" if plan.decision.activation_checkpointing else "no recomputation needed"
    return _given(plan.request.activation_checkpointing, why)


def _device_title(plan: Plan) -> str:
    memory = plan.prediction.device_memory
    context = f"{format_bytes(memory.context_bytes.low_bytes)} - {format_bytes(memory.context_bytes.high_bytes)}"
    budget = format_bytes(memory.allocator_budget_bytes)
    title = f"Device memory: at most {format_bytes(reserved_at_most(plan.prediction))} reserved of {budget}"
    return title + (f" (CUDA context: {context})" if memory.context_bytes.high_bytes else "")


def _device(plan: Plan) -> View:
    memory = plan.prediction.device_memory
    sizes = grouped_bytes(memory.entries)
    unit, name = _unit(memory.peak_allocated_bytes)
    table = [(group, *(_cell(by_phase[phase], unit) for phase in STEP_PHASES)) for group, by_phase in sizes.items()]
    totals = {phase: sum(by_phase[phase] for by_phase in sizes.values()) for phase in STEP_PHASES}
    table.append(("allocated", *(f"{totals[phase] / unit:,.2f}" for phase in STEP_PHASES)))
    headers = (name, *(_PHASE_TITLES[phase] + ("*" * (phase == memory.peak_phase)) for phase in STEP_PHASES))
    after = (
        f"* expected peak: {format_bytes(memory.peak_allocated_bytes)} allocated, "
        f"{format_bytes(memory.peak_reserved_bytes)} reserved ({memory.reserved_basis}), process "
        f"{format_bytes(memory.process_bytes.low_bytes)} - {format_bytes(memory.process_bytes.high_bytes)}"
    )
    least_first = sorted(range(len(STEP_PHASES)), key=lambda place: totals[STEP_PHASES[place]])
    optional = [place + 1 for place in least_first if STEP_PHASES[place] != memory.peak_phase]
    view = grid(headers, table, right=range(1, len(headers)), wrapping=0, optional=optional)
    return stacked(view, lines([after]))


def _verification(plan: Plan, traced: Verification) -> View:
    memory = plan.prediction.device_memory
    pairs = (
        ("allocated, expected rows", memory.peak_allocated_bytes, traced.peak_allocated_bytes),
        ("reserved, expected rows", memory.peak_reserved_bytes, traced.peak_reserved_bytes),
        ("allocated, rows at the cap", memory.peak_allocated_bytes_at_cap, traced.peak_allocated_bytes_at_cap),
        ("reserved, rows at the cap", memory.peak_reserved_bytes_at_cap, traced.peak_reserved_bytes_at_cap),
    )
    rows = [
        (name, format_bytes(predicted), format_bytes(found), f"{found / predicted:.3f}")
        for name, predicted, found in pairs
        if predicted is not None
    ]
    after = "two steps of the model's own code, replayed through the allocator"
    if traced.cache_flushes_at_cap:
        after += f"; it stays within the budget only by giving back its cache {traced.cache_flushes_at_cap} times"
    return stacked(grid(("peak", "predicted", "traced", "ratio"), rows, right=(1, 2, 3)), lines([after]))


def _unit(largest_bytes: int) -> tuple[int, str]:
    return (GIB, "GiB") if largest_bytes >= GIB else (MIB, "MiB")


def _cell(num_bytes: int, unit: int) -> str:
    return f"{num_bytes / unit:,.2f}" if num_bytes else "-"


def _host_title(plan: Plan) -> str:
    total = format_bytes(plan.prediction.host_memory.total_bytes)
    return f"Host memory: {total} of {format_bytes(host_budget_of(plan))}"


def _host(plan: Plan) -> View:
    total = plan.prediction.host_memory.total_bytes
    entries = sorted(plan.prediction.host_memory.entries, key=lambda entry: -entry.num_bytes)
    large = [entry for entry in entries if entry.num_bytes >= total / 100]
    rest = total - sum(entry.num_bytes for entry in large)
    names = [entry.category.removeprefix("adapter_").replace("_", " ") for entry in large]
    texts = [f"{name} {format_bytes(entry.num_bytes)}" for name, entry in zip(names, large, strict=True)]
    parts = ", ".join([*texts, *([f"staging and counts {format_bytes(rest)}"] if rest else [])])
    machine = plan.prediction.host_memory.machine
    return lines([parts] if machine is None else [parts, *_of_machine(machine)])


def _of_machine(machine: HostBudget) -> list[str]:
    """What the plan leaves of the RAM, and what each phase of a run takes at most."""
    peaks = ", ".join(f"{peak.phase} {format_bytes(peak.num_bytes)}" for peak in machine.peaks)
    return [
        f"{format_bytes(machine.budget_bytes)} of the machine's {format_bytes(machine.machine_bytes)} are the plan's, "
        f"{format_bytes(machine.reserve_bytes)} are left to the system, Python and all else",
        f"at most, by phase: {peaks}",
    ]


def _transfer(plan: Plan) -> View:
    transfer = plan.prediction.transfer
    rows = [
        (
            entry.category.replace("_", " "),
            format_bytes(entry.num_bytes) if entry.direction == "h2d" else "",
            format_bytes(entry.num_bytes) if entry.direction == "d2h" else "",
        )
        for entry in sorted(transfer.entries, key=lambda entry: -entry.num_bytes)
        if entry.per == "step" and entry.direction in ("h2d", "d2h") and entry.num_bytes >= MIB
    ]
    total = ("total", format_bytes(transfer.h2d_bytes_per_step), format_bytes(transfer.d2h_bytes_per_step))
    once = transfer.h2d_bytes_per_optimizer_step + transfer.d2h_bytes_per_optimizer_step
    after = []
    if once >= MIB:
        total_bytes = transfer.window_bytes(plan.request.rounds) / plan.request.rounds
        after.append(
            f"and once in {plan.request.rounds} steps {format_bytes(once)} of sums: "
            f"{format_bytes(round(total_bytes))} per step in all"
        )
    if plan.request.nodes > 1:
        after.append(
            f"between the machines {format_bytes(transfer.network_bytes_per_step)} for a step of one card, and once in "
            f"{plan.request.rounds} {format_bytes(transfer.network_bytes_per_optimizer_step)} of "
            f"{'squares and routers' if plan.decision.rows == 'owned' else 'sums'}"
        )
    if plan.request.shard_base:
        after.append(f"between the cards {format_bytes(transfer.cards_bytes_per_step)} of weights to each, and from it")
    offload = f"moving the whole adapter both ways would cost {transfer.whole_adapter_offload_ratio:.2f} times as much"
    return stacked(grid(("", "to device", "to host"), [*rows, total], right=(1, 2)), lines([*after, offload]))


def _time_title(plan: Plan) -> str:
    timing = plan.prediction.timing
    return (
        f"Time per step: {format_seconds(timing.step_seconds)} ({timing.tokens_per_second:,.0f} tokens/s), "
        f"{timing.slowdown:.2f} x the {format_seconds(timing.baseline_step_seconds)} if all were on the GPU "
        f"(limit {plan.request.max_slowdown:.2f})"
    )


def _lanes(plan: Plan) -> View:
    timing = plan.prediction.timing
    busy = [
        f"{lane} {format_seconds(timing.busy_seconds[lane])} "
        f"({percent(timing.busy_seconds[lane] / timing.step_seconds if timing.step_seconds else 0.0)})"
        for lane in lanes_of(timing)
    ]
    return lines([f"busy: {', '.join(busy)}"])


def _pareto(plan: Plan) -> View:
    others = [point for point in plan.search.pareto if point.decision != plan.decision]
    rows = [
        (
            f"{point.decision.adapter_width:,}" + ("*" * (point.decision == plan.decision)),
            str(point.decision.top_k),
            str(point.decision.prefetch_depth),
            f"{point.decision.num_experts} experts" if point.decision.needs.in_experts else "exact",
            point.decision.rows_in_backward,
            "on" if point.decision.activation_checkpointing else "off",
            count(point.trainable_parameters)
            if point.moved_bytes_per_step is None
            else format_bytes(point.moved_bytes_per_step),
            format_seconds(point.step_seconds),
            format_bytes(point.peak_reserved_bytes),
            format_bytes(point.host_bytes),
        )
        for point in (_chosen(plan), *_spread(others, PARETO_ROWS - 1))
    ]
    wanted = "traffic" if plan.request.objective == "traffic" else "trainable"
    headers = ("width", "K", "ahead", "routing", "backward", "ckpt", wanted, "step", "device", "host")
    return grid(headers, rows, right=(0, 1, 2, 6, 7, 8, 9), optional=(4, 3, 2, 5, 9, 1))


def _chosen(plan: Plan) -> ParetoPoint:
    prediction, accum = plan.prediction, plan.request.rounds
    moved = prediction.transfer.window_bytes(accum) / accum if plan.request.objective == "traffic" else None
    return ParetoPoint(
        decision=plan.decision,
        moved_bytes_per_step=None if moved is None else round(moved),
        trainable_parameters=prediction.trainable_parameters,
        step_seconds=prediction.timing.step_seconds,
        peak_reserved_bytes=reserved_at_most(plan.prediction),
        host_bytes=prediction.host_memory.total_bytes,
    )


def _spread(points: Sequence[ParetoPoint], how_many: int) -> list[ParetoPoint]:
    """Points from the widest adapter to the fastest step, evenly picked with both ends."""
    ordered = sorted(points, key=lambda point: (-point.trainable_parameters, point.step_seconds))
    if len(ordered) <= how_many:
        return ordered
    return [ordered[round(index * (len(ordered) - 1) / (how_many - 1))] for index in range(how_many)]


def _basis_lines(plan: Plan) -> list[str]:
    request, prediction = plan.request, plan.prediction
    found = Counter(number.basis for number in plan.inputs.numbers)
    bases = ", ".join(f"{found[basis]} {basis}" for basis in ("counted", "measured", "assumed") if found[basis])
    return [
        f"rates: {request.gpu}, {request.link}, {request.host}; {bases} numbers",
        f"memory, traffic: counted; reserved: {prediction.device_memory.reserved_basis}; active rows: "
        f"{prediction.sparsity.basis} ({request.sparsity})",
    ]


def ledger(entries: Iterable[MemoryEntry]) -> View:
    """Every entry with its reason."""
    rows = [
        (entry.phase, entry.category, format_bytes(entry.num_bytes), entry.basis, entry.because) for entry in entries
    ]
    return grid(("phase", "category", "bytes", "basis", "because"), rows, right=(2,), optional=(3,))


def _sources(plan: Plan) -> list[View]:
    numbers = [(n.name, f"{n.value:.6g}", n.basis, n.source) for n in plan.inputs.numbers]
    profiles = [(used.kind, used.name, used.digest[:12]) for used in plan.inputs.profiles]
    return [
        section("Host ledger", ledger(plan.prediction.host_memory.entries)),
        section("Profiles", grid(("kind", "name", "digest"), profiles)),
        section("Numbers", grid(("name", "value", "basis", "source"), numbers, right=(1,))),
    ]
