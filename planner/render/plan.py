"""A plan for someone who has not read the paper: does it fit, what does it train, how fast; then what was decided.

Only reads records. What is known of a plan beyond this screen is in :mod:`meft.planner.render.details`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from meft.planner.base.options import torchrun_words
from meft.planner.base.quantities import chunk_tokens
from meft.planner.base.units import GIB, MIB, format_bytes, format_seconds
from meft.planner.memory.disk import disk
from meft.planner.records.plan import Objective, Plan, host_budget_of
from meft.planner.render.details import detail_sections, grouped_bytes, limits_used
from meft.planner.render.tables import Columns, Command, Paragraph, View, count, grid, lines, percent, section, stacked
from meft.planner.search.levers import Lever, reserved_at_most

if TYPE_CHECKING:
    from meft.planner.predict.scaling import Scaling

LEVERS_SHOWN = 4
PARTS_SHOWN = 3
"""Of what takes memory, the largest."""
_WANTED: dict[Objective, str] = {
    "capacity": "the widest adapter",
    "speed": "the fastest step",
    "traffic": "the widest adapter, moved with the fewest bytes,",
}
_LIMITS = {"device memory": "GPU memory", "host memory": "CPU memory", "slowdown": "--max-slowdown"}
_BUSIEST = {"gpu": "the GPU", "h2d": "the link", "d2h": "the link", "cpu": "the host", "network": "the network"}
_SHORT = {
    "frozen model": "model",
    "active rows and their gradients": "adapter rows",
    "kept for backward": "activations",
}
_HOST_PARTS = {
    "moments": ("adapter_moments",),
    "weights": ("adapter_weights", "adapter_bf16_copy"),
    "gradients": ("adapter_gradients",),
}


def plan_view(
    plan: Plan,
    *,
    path: str,
    notes: Sequence[str],
    verbose: bool,
    levers: Sequence[Lever] = (),
    scaling: Sequence[Scaling] = (),
    tokens: int | None = None,
) -> View:
    """The verdict, the decision, what it needs, and what would make it need less; ``verbose`` adds all the rest.

    ``tokens`` are those of a data set, whose hours are told.
    """
    parts: list[View] = [
        *_verdict(plan, tokens),
        section(_decision_title(plan), _decision(plan)),
        section("Needs, at most", _needs(plan)),
    ]
    if levers:
        parts.append(_levers(levers[: None if verbose else LEVERS_SHOWN]))
    if scaling:
        parts.append(_scaling(scaling))
    parts.append(lines([_rests_on(plan, notes)]))
    if verbose:
        parts += detail_sections(plan)
    parts.append(Command(next_command(plan, path), title="Next:"))
    return stacked(*parts)


def next_command(plan: Plan, path: str) -> list[str]:
    """What to type now, in words."""
    request = plan.request
    program = ["meft-run"] if request.nodes == 1 else torchrun_words(nodes=request.nodes, gpus=request.gpus)
    words = [*program, path, "--model", request.model_path or "DIR", "--data", "FILE.jsonl"]
    if plan.request.gpu == "emulated":
        words += ["--device", "emulated"]
    return words


# --- the verdict ----------------------------------------------------------------------------------------------------


def _verdict(plan: Plan, tokens: int | None) -> list[View]:
    request, prediction = plan.request, plan.prediction
    memory, timing = prediction.device_memory, prediction.timing
    spare = memory.allocator_budget_bytes - reserved_at_most(prediction)
    fits = f"{request.model.name} fits in {format_bytes(request.gpu_mem_bytes)} of GPU memory"
    trained, frozen = count(prediction.trainable_parameters), count(request.model.num_parameters)
    speed = f"{timing.tokens_per_second:,.0f} tokens/s"
    if tokens is not None:
        speed += f", {_hours(tokens, timing.tokens_per_second)}"
    where = "" if request.ranks == 1 else f" on each of {request.ranks} cards"
    step = f"a step of {request.batch_size} x {request.seq_len:,}{where} takes {format_seconds(timing.step_seconds)}"
    return [
        Paragraph(f"{fits}, with {format_bytes(spare)} to spare.", style="bold"),
        lines(
            [
                f"Trains {trained} weights beside its {frozen} frozen ones: {percent(prediction.trainable_fraction)}.",
                f"Speed: {speed}; {step}, {timing.slowdown:.2f} x as long as with all on the GPU.",
                *_verified(plan),
            ]
        ),
    ]


def _hours(tokens: int, tokens_per_second: float) -> str:
    if not tokens_per_second:
        return f"{_compact(tokens)} tokens never end"
    return f"{_compact(tokens)} tokens in {format_seconds(tokens / tokens_per_second)}"


def _compact(tokens: int) -> str:
    """``10,000,000`` as ``10 M``; what is not round stays whole."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if tokens >= unit and tokens % (unit // 1000) == 0:
            return f"{tokens / unit:g} {name}"
    return f"{tokens:,}"


def _verified(plan: Plan) -> list[str]:
    traced = plan.verification
    if traced is None:
        return []
    predicted, found = reserved_at_most(plan.prediction), traced.peak_reserved_bytes_at_cap
    text = f"Verified: the model's own code, traced, takes {format_bytes(found)}; {format_bytes(predicted)} predicted"
    if traced.cache_flushes_at_cap:
        text += f"; it fits only by giving back its cache {traced.cache_flushes_at_cap} times"
    return [f"{text}."]


# --- the decision ---------------------------------------------------------------------------------------------------


def _decision_title(plan: Plan) -> str:
    search = plan.search
    return f"Decision: {_WANTED[plan.request.objective]} of {search.feasible:,} choices that fit"


def _decision(plan: Plan) -> View:
    request, decision = plan.request, plan.decision
    rows = [
        ("adapter width", f"{decision.adapter_width:,}", _said(request.adapter_width, _about_width(plan))),
        ("top K", f"{decision.top_k:,}", _said(request.top_k, _about_top_k(plan))),
        ("routing", decision.routing, _said(request.routing, _about_routing(plan))),
        ("prefetch depth", f"{decision.prefetch_depth}", _said(request.prefetch_depth, _about_prefetch(plan))),
        *_kept_on_device(plan),
        (
            "checkpointing",
            "on" if decision.activation_checkpointing else "off",
            _said(request.activation_checkpointing, _about_checkpointing(plan)),
        ),
    ]
    return grid(("", "", ""), rows, right=(1,))


def _said(asked: object, about: str) -> str:
    return about if asked is None else f"{about} (as asked)"


def _about_width(plan: Plan) -> str:
    about = "learning rows a layer, in CPU memory"
    if plan.request.adapter_width is not None:
        return about
    name, used = limits_used(plan)[0]
    return f"{about}; {_LIMITS[name]} {percent(used)} used"


def _about_top_k(plan: Plan) -> str:
    chunks = plan.decision.token_chunks
    most = max(plan.prediction.sparsity.active_rows_per_layer) // chunks
    some = "batch" if chunks == 1 else f"chunk of {chunk_tokens(plan.request.tokens_per_step, chunks):,} tokens"
    return f"rows that each token uses; a {some} some {most:,} a layer, {plan.decision.active_rows_cap:,} at most"


def _about_routing(plan: Plan) -> str:
    decision = plan.decision
    if not decision.needs.in_experts:
        return "every token looks through all rows"
    share = decision.num_probes / decision.num_experts
    its = "the one that takes it" if decision.needs.one_expert else f"its best {decision.num_probes}"
    by = " by their mean keys" if decision.needs.means else ""
    return f"{decision.num_experts} groups of rows, a token looks through {its}{by} ({percent(share)} of rows)"


def _about_prefetch(plan: Plan) -> str:
    depth, recall = plan.decision.prefetch_depth, plan.prediction.sparsity.prefetch_recall
    if not depth:
        return "layers ahead; 0: rows are chosen exactly, and waited for"
    if plan.decision.token_chunks > 1:
        return f"of {plan.decision.token_chunks} token chunks that rows are fetched ahead, chosen exactly"
    return f"layers ahead that rows are fetched, which finds {percent(recall)} of the exact choice"


def _kept_on_device(plan: Plan) -> list[tuple[str, str, str]]:
    """Rows that live on the GPU, where some do or were asked about."""
    request, decision, sparsity = plan.request, plan.decision, plan.prediction.sparsity
    active = max(1, sum(sparsity.active_rows_per_layer))
    rows = []
    if decision.hot_rows or request.hot_rows is not None:
        known = any(number.name.startswith("sparsity.popularity") for number in plan.inputs.numbers)
        share = percent(sum(sparsity.hot_rows_per_layer) / active)
        about = f"the most used live on the GPU: {'' if known else 'at least '}{share} of a batch's"
        rows.append(("hot rows", f"{decision.hot_rows:,}", _said(request.hot_rows, about)))
    return rows


def _about_checkpointing(plan: Plan) -> str:
    if plan.decision.activation_checkpointing:
        return "saves memory: layers are computed again in backward"
    return "layers keep what backward needs, nothing is computed twice"


# --- what it needs --------------------------------------------------------------------------------------------------


def _needs(plan: Plan) -> View:
    request, prediction = plan.request, plan.prediction
    memory, on_host = prediction.device_memory, prediction.host_memory.total_bytes
    on_device = reserved_at_most(prediction) + memory.context_bytes.high_bytes
    device_parts = _parts(_device_parts(plan), _context(plan), total=on_device)
    host_parts = _parts(_host_parts(plan), total=on_host)
    written = disk(request, plan.decision)
    moved = round(prediction.transfer.window_bytes(request.rounds) / request.rounds)
    ratio = prediction.transfer.whole_adapter_offload_ratio
    host_budget = f"{format_bytes(host_budget_of(plan))} ({format_bytes(request.host_mem_bytes)} RAM)"
    checkpoint = f"a checkpoint, twice as one replaces another; the adapter alone {format_bytes(written.adapter_bytes)}"
    rows = [
        ("GPU memory", on_device, f"of {format_bytes(request.gpu_mem_bytes)}: {device_parts}"),
        ("CPU memory", on_host, f"of {host_budget}: {host_parts}"),
        ("disk", written.checkpoint_bytes, checkpoint),
        ("transfers", moved, f"a step; the whole adapter both ways would be {ratio:.2f} times as much"),
    ]
    return grid(("", "", ""), [(name, format_bytes(size), about) for name, size, about in rows], right=(1,))


def _device_parts(plan: Plan) -> dict[str, int]:
    """At the expected peak, by group."""
    memory = plan.prediction.device_memory
    groups = grouped_bytes(memory.entries)
    return {_SHORT.get(group, group): by_phase[memory.peak_phase] for group, by_phase in groups.items()}


def _host_parts(plan: Plan) -> dict[str, int]:
    sizes = {entry.category: entry.num_bytes for entry in plan.prediction.host_memory.entries}
    return {name: sum(sizes.get(each, 0) for each in categories) for name, categories in _HOST_PARTS.items()}


def _context(plan: Plan) -> tuple[str, int]:
    return "CUDA", plan.prediction.device_memory.context_bytes.high_bytes


def _parts(sizes: dict[str, int], *more: tuple[str, int], total: int) -> str:
    """The largest, and some more, in the unit of their total, which is said where it is not GiB."""
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:PARTS_SHOWN]
    unit, decimals, name = (GIB, 2, "") if total >= GIB else (MIB, 1, " MiB")
    told = [(part, f"{num_bytes / unit:,.{decimals}f}") for part, num_bytes in (*largest, *more)]
    shown = ", ".join(f"{part} {number}" for part, number in told if float(number.replace(",", "")))
    return f"{shown}{name}" if shown else f"all below 0.1{name}"


# --- levers ---------------------------------------------------------------------------------------------------------


def _levers(levers: Sequence[Lever]) -> Columns:
    rows = [
        (
            f"  {lever.change}{'' if lever.fits else ' (does not fit)'}",
            _change(lever.device_bytes),
            _change(lever.host_bytes),
            _speed(lever.tokens_per_second_ratio),
            percent(lever.trainable_fraction),
            lever.option,
        )
        for lever in levers
    ]
    headers = ("One change alone", "GPU memory", "CPU memory", "tokens/s", "trains", "give")
    return grid(headers, rows, right=(1, 2, 3, 4), optional=(4, 5))


def _change(num_bytes: int) -> str:
    if abs(num_bytes) < MIB:
        return "same"
    return f"{'+' if num_bytes > 0 else ''}{format_bytes(num_bytes)}"


def _speed(ratio: float) -> str:
    return "same" if abs(ratio - 1) < 0.0005 else f"{ratio - 1:+.1%}".replace("%", " %")


# --- several cards --------------------------------------------------------------------------------------------------


def _scaling(scaling: Sequence[Scaling]) -> Columns:
    rows = [
        (
            f"  {each.gpus}" if each.nodes == 1 else f"  {each.nodes} x {each.gpus}",
            f"{each.tokens_per_second:,.0f}",
            percent(each.efficiency),
            format_bytes(each.host_bytes),
            _BUSIEST[each.busiest],
        )
        for each in scaling
    ]
    memory = "CPU memory" if all(each.nodes == 1 for each in scaling) else "CPU memory of each"
    return grid(("Cards", "tokens/s", "efficiency", memory, "works longest"), rows, right=(1, 2, 3))


# --- what it rests on -----------------------------------------------------------------------------------------------


def _rests_on(plan: Plan, notes: Sequence[str]) -> str:
    request, numbers = plan.request, plan.inputs.numbers
    assumed = sum(number.basis == "assumed" for number in numbers)
    profiles = ", ".join(dict.fromkeys([request.gpu, request.link, request.host, request.sparsity]))
    return "; ".join([f"Rests on {profiles} ({assumed} of {len(numbers)} numbers assumed)", *notes])
