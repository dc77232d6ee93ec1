"""``meft-plan estimate`` and ``meft-plan compare``: what other methods need for the same workload."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any

import click

from meft.planner.cli_options import (
    RequestOptions,
    all_weights_workload_options,
    budget_options,
    decision_options,
    search_options,
    workload_options,
)
from meft.planner.cli_request import Planning, planning
from meft.planner.comparison import (
    DENSE_NAMES,
    METHOD_NAMES,
    USUAL_SIZES,
    USUAL_TOP_K,
    DenseChoice,
    DenseName,
    Estimate,
    MethodComparison,
    MethodName,
    MethodRow,
    compare_dense,
    estimate_dense,
    estimate_meft,
    without_limits,
)
from meft.planner.errors import InfeasibleError, UsageError, unknown_name
from meft.planner.plan import WeightsDtype
from meft.planner.profiles import load_defaults
from meft.planner.search import Infeasible, make_plan, predict
from meft.planner.terms_weights import LINEAR_NAMES, LinearName

MAX_RANK = 1 << 16
_GROUPS: dict[str, tuple[LinearName, ...]] = {"all-linear": LINEAR_NAMES, "attention": ("q", "k", "v", "o")}
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "rank": ("lora", "qlora"),
    "target_modules": ("lora", "qlora"),
    "adapter_width": ("meft", "parallel-adapter"),
    "top_k": ("meft",),
    "prefetch_depth": ("meft",),
    "routing": ("meft",),
    "rows_in_backward": ("meft",),
    "keep_outputs": ("parallel-adapter", "lora", "qlora", "full"),
    "padding": ("parallel-adapter", "lora", "qlora", "full"),
}


@click.command("estimate", short_help="What one configuration of a method needs.")
@click.option("--method", type=click.Choice(METHOD_NAMES), required=True)
@budget_options
@all_weights_workload_options
@click.option("--rank", type=click.IntRange(1, MAX_RANK), help="Of lora and qlora. [default: 16; 64]")
@click.option(
    "--target-modules",
    metavar="NAMES",
    help="Linear layers that lora and qlora adapt: q,k,v,o,gate,up,down, all-linear or attention.",
)
@decision_options
@click.option("--padding/--no-padding", default=None, help="Batches are padded, so mask tensors exist. [default: no]")
@click.option(
    "--keep-outputs/--drop-outputs",
    default=None,
    help="Stock loops hold on to the model's outputs, so that logits live through backward. [default: keep]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the estimate as JSON.")
def estimate_command(*, method: MethodName, as_json: bool, **given: Any) -> None:
    """What one configuration of a method needs, whether or not it fits."""
    _check_applies(method, given)
    rank, targets = given.pop("rank"), given.pop("target_modules")
    loop = {"padded": bool(given.pop("padding")), "outputs_kept": given.pop("keep_outputs") is not False}
    options = RequestOptions.taken_from(given)
    if method == "meft":
        estimate, notes = _estimate_meft(options)
    else:
        estimate, notes = _estimate_dense(method, options, rank=rank, targets=targets, **loop)
    if as_json:
        click.echo(estimate.model_dump_json(indent=2))
        return
    from meft.planner.render import show
    from meft.planner.render_methods import estimate_view

    show(estimate_view(estimate, notes=notes))


@click.command("compare", short_help="Every method side by side.")
@budget_options
@workload_options
@search_options
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare_command(*, as_json: bool, **given: Any) -> None:
    """Every method side by side: at its usual size, and at the largest size that fits."""
    planned = planning(RequestOptions.taken_from(given))
    comparison = compare_methods(planned)
    if as_json:
        click.echo(comparison.model_dump_json(indent=2))
        return
    from meft.planner.render import show
    from meft.planner.render_methods import comparison_view

    show(comparison_view(comparison))


def compare_methods(planned: Planning) -> MethodComparison:
    """MEFT as it would be planned, and the dense methods."""
    request, profiles = planned.request, planned.profiles
    base: WeightsDtype = "bf16" if request.weights_dtype == "nf4" else request.weights_dtype
    names = [name for name in DENSE_NAMES if name != "qlora" or not profiles.gpu.shares_host_cores]
    dense = [
        compare_dense(name, request=request, gpu=profiles.gpu, link=profiles.link, weights_dtype=base) for name in names
    ]
    notes = [
        "device: peak reserved; traffic and step: per micro-batch, the optimizer's share included",
        f"dense methods: fp32 adapters, AdamW, {base} weights (QLoRA: nf4, double-quantized), no padding, outputs kept",
    ]
    if len(names) < len(DENSE_NAMES):
        notes.append("qlora: its kernels need a CUDA device")
    return MethodComparison(request=request, rows=(_meft_row(planned), *dense), notes=(*notes, *planned.notes))


def parse_targets(text: str) -> tuple[LinearName, ...]:
    """Names of linear layers, with or without ``_proj``, or a group's name."""
    if text in _GROUPS:
        return _GROUPS[text]
    known: dict[str, LinearName] = {name: name for name in LINEAR_NAMES}
    found: list[LinearName] = []
    for word in text.replace(" ", ",").split(","):
        name = word.strip().removesuffix("_proj")
        if name and name not in known:
            raise unknown_name("linear layer in --target-modules", word, [*known, *_GROUPS])
        if name and known[name] not in found:
            found.append(known[name])
    if not found:
        raise UsageError(f"--target-modules {text!r}: it names no layer; give such as q,v or all-linear")
    return tuple(name for name in LINEAR_NAMES if name in found)


def _check_applies(method: MethodName, given: dict[str, Any]) -> None:
    for name, methods in _ONLY_FOR.items():
        if given[name] is not None and method not in methods:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} does not go with --method {method}; it is of {', '.join(methods)}")


def _estimate_dense(
    method: DenseName,
    options: RequestOptions,
    *,
    rank: int | None,
    targets: str | None,
    padded: bool,
    outputs_kept: bool,
) -> tuple[Estimate, tuple[str, ...]]:
    usual = USUAL_SIZES[method]
    quantized = method == "qlora"
    if quantized and options.weights_dtype not in (None, "nf4"):
        raise UsageError(f"--weights-dtype {options.weights_dtype}: qlora has nf4 weights; use --method lora")
    if method == "full" and options.weights_dtype in ("int8", "nf4"):
        raise UsageError(f"--weights-dtype {options.weights_dtype}: full trains its weights; give fp32, bf16 or fp16")
    weights = "nf4" if quantized else options.weights_dtype
    double_quant = quantized if options.double_quant is None else options.double_quant
    planned = _planning(replace(options, weights_dtype=weights, double_quant=double_quant))
    choice = DenseChoice(
        method=method,
        size=rank or options.adapter_width or usual.size,
        targets=usual.targets if targets is None else parse_targets(targets),
        weights_dtype=planned.request.weights_dtype,
        double_quant=planned.request.double_quant,
        adapter_dtype=options.adapter_dtype or "fp32",
        activation_checkpointing=bool(options.activation_checkpointing),
        padded=padded,
        outputs_kept=outputs_kept,
    )
    profiles = planned.profiles
    return estimate_dense(choice, request=planned.request, gpu=profiles.gpu, link=profiles.link), planned.notes


def _estimate_meft(options: RequestOptions) -> tuple[Estimate, tuple[str, ...]]:
    """A MEFT decision with what was given, and the planner's choice, unbound by any budget, for the rest."""
    planned = _planning(replace(options, activation_checkpointing=bool(options.activation_checkpointing)))
    return _usual_meft(planned), planned.notes


def _planning(options: RequestOptions) -> Planning:
    """As for a plan, but the default card will do where none is named."""
    if options.gpu is None and options.gpu_mem is None:
        default = load_defaults().gpu
        planned = planning(replace(options, gpu=default))
        return replace(planned, notes=(f"card {default}: no --gpu was given", *planned.notes))
    return planning(options)


def _usual_meft(planned: Planning) -> Estimate:
    """The paper's width and K where the request leaves them open, priced under the request's real budget."""
    request = planned.request
    width = request.adapter_width or USUAL_SIZES["meft"].size
    top_k = request.top_k or min(USUAL_TOP_K, width or USUAL_TOP_K)
    fixed = request.model_copy(update={"adapter_width": width, "top_k": top_k})
    found = make_plan(without_limits(fixed), planned.profiles, meft_version=version("meft"))
    if isinstance(found, Infeasible):
        raise InfeasibleError(f"no such configuration: {found.message}")
    return estimate_meft(request, found.decision, predict(request, found.decision, planned.profiles))


def _meft_row(planned: Planning) -> MethodRow:
    found = make_plan(planned.request, planned.profiles, meft_version=version("meft"))
    if isinstance(found, Infeasible):
        largest, because = None, found.message
    else:
        largest = estimate_meft(found.request, found.decision, found.prediction)
        because = f"what meft-plan chooses, K {found.decision.top_k}"
    return MethodRow(
        method="meft",
        usual=_usual_meft(planned),
        usual_because=USUAL_SIZES["meft"].because,
        largest=largest,
        largest_because=because,
    )
