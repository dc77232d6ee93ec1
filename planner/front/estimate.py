"""What one configuration of a method needs: the request for it, its checks, and the estimate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meft.planner.base.dtypes import WeightsDtype
from meft.planner.base.errors import Infeasible, InfeasibleError, UsageError
from meft.planner.base.units import format_bytes, parse_bytes
from meft.planner.base.version import VERSION
from meft.planner.front.asked import LORA, SAYS_NOTHING, EstimateRequest, check_applies, check_range
from meft.planner.front.lengths import over_lengths, with_lengths
from meft.planner.front.options import RequestOptions
from meft.planner.front.probed import corrected, probed
from meft.planner.front.request import Planning, planning
from meft.planner.front.traced import as_its_trace, with_terms
from meft.planner.models.architecture import ModelShape
from meft.planner.models.catalogue import load_model
from meft.planner.models.kernels import LOSS_OF, KernelName, fused_lora_of, resolve_kernels
from meft.planner.models.linears import passed_over, resolve_targets
from meft.planner.predict.comparison import (
    USUAL_SIZES,
    USUAL_TOP_K,
    checkpointing_choices,
    first_that_fits,
    without_limits,
)
from meft.planner.predict.compiled import check_compiled, with_range
from meft.planner.predict.estimates import (
    Estimate,
    dense_stream,
    estimate_dense,
    estimate_meft,
    reserved_at_most,
    with_trace,
    with_verdict,
)
from meft.planner.predict.prediction import predict
from meft.planner.predict.verification import traced_plan, traced_setup
from meft.planner.records.ladder import kept_layers, side_shape
from meft.planner.records.peft_methods import method_of
from meft.planner.records.plan import Decision, Plan, Request
from meft.planner.records.profile_catalogue import load_defaults
from meft.planner.records.setup import TrainingSetup
from meft.planner.search.search import make_plan
from meft.planner.simulation.peft import has_closed_form
from meft.planner.simulation.stream import Stream, stream_peaks

WEIGHTS: tuple[WeightsDtype, ...] = ("bf16", "fp16", "fp32", "nf4")
USUAL_GRAD_ACCUM = {"meft": 32}
"""Where nothing is said: MEFT's is the paper's, a dense method updates after every micro-batch."""

_WITHOUT_CLOSED_FORM = ("bitfit", "peft")


def estimate_of(
    asked: EstimateRequest, *, verify: bool = False, probe: bool = False
) -> tuple[Estimate, tuple[str, ...]]:
    """The estimate, and what was taken for granted; with ``verify`` traced as well, with ``probe`` corrected by two
    steps on a card that is there.

    Raises :class:`UsageError` for what does not go together.
    """
    check_applies(asked)
    if asked.torch_compile:
        check_range(asked, verify=verify, probe=probe)
    if asked.kind == "meft":
        if probe:
            raise UsageError("--probe: MEFT's own steps are measured by meft-profile gpu-check; leave it out here")
        return _estimate_meft(asked, verify=verify)
    asked, lengths = with_lengths(asked)
    planned, setup, notes = dense_setup(asked)
    estimate, setup = _dense_estimate(asked, planned, setup)
    measured = None
    if probe:
        measured = probed(planned, setup, _config(planned))
        planned = corrected(planned, estimate, measured)
        estimate, setup = _dense_estimate(asked, planned, setup)
    estimate = _judged(asked, estimate, planned, setup, lengths, verify=verify)
    if setup.compiled:
        gpu, budget = planned.profiles.gpu, planned.request.gpu_mem_bytes
        estimate = with_range(estimate, setup, gpu=gpu, gpu_mem_bytes=budget)
    if measured is not None:
        ran = {} if measured.peak_reserved_bytes is not None else {"verdict": "does-not-fit", "fits": False}
        estimate = estimate.model_copy(update={"probed": measured, **ran})
    return estimate, notes


def _dense_estimate(asked: EstimateRequest, planned: Planning, setup: TrainingSetup) -> tuple[Estimate, TrainingSetup]:
    """With checkpointing as asked, or where that is open as the card needs it; and the setup that this is."""
    profiles = planned.profiles
    tried: list[Estimate] = []
    flags = checkpointing_choices(False if asked.kind == "lst" else asked.activation_checkpointing)
    for flag in flags:
        variant = setup.model_copy(update={"activation_checkpointing": flag})
        stream = _traced(planned, variant) if _is_traced(variant) else None
        tried.append(
            estimate_dense(
                variant,
                request=planned.request,
                gpu=profiles.gpu,
                link=profiles.link,
                host=profiles.host,
                stream=stream,
            )
        )
        if tried[-1].fits:
            break
    estimate = first_that_fits(tried)
    estimate = estimate.model_copy(update={"chosen": _chosen(asked, estimate, without=tried[0])})
    return estimate, setup.model_copy(update={"activation_checkpointing": estimate.activation_checkpointing})


def _judged(
    asked: EstimateRequest,
    estimate: Estimate,
    planned: Planning,
    setup: TrainingSetup,
    lengths: tuple[int, ...],
    *,
    verify: bool,
) -> Estimate:
    """The verdict on what runs: over lengths that vary, on the traced run, or on the simulated one."""
    gpu, budget = planned.profiles.gpu, planned.request.gpu_mem_bytes
    if lengths:
        return over_lengths(asked, estimate, setup, lengths, planned)
    if verify:
        return with_trace(estimate, _traced(planned, setup), gpu=gpu, gpu_mem_bytes=budget)
    if not estimate.fits:
        stream = _traced(planned, setup) if _is_traced(setup) else dense_stream(setup, gpu)
        return with_verdict(estimate, stream, stream_peaks(stream), gpu=gpu, gpu_mem_bytes=budget)
    return estimate


def _is_traced(setup: TrainingSetup) -> bool:
    """Whether no closed form knows the run."""
    if setup.model.measured is not None:
        return True
    return setup.method in _WITHOUT_CLOSED_FORM and not has_closed_form(setup)


def _traced(planned: Planning, setup: TrainingSetup) -> Stream:
    """The run itself, traced."""
    return traced_setup(setup, _config(planned), workspace_bytes=_workspace(planned))


def _chosen(asked: EstimateRequest, estimate: Estimate, *, without: Estimate) -> tuple[str, ...]:
    """What was left open and what was taken, as in ``compare``; ``without`` is without activation checkpointing."""
    texts = []
    if asked.activation_checkpointing is None:
        needed = f"without it {format_bytes(reserved_at_most(without))}"
        why = needed if estimate.activation_checkpointing else "it fits without"
        flag = "on" if estimate.activation_checkpointing else "off"
        texts.append(f"checkpointing: {flag}, chosen as compare does: {why}")
    others = {
        "attention": f"{estimate.attention} attention",
        "lora_dropout": "no dropout" if asked.kind in LORA else "",
        "weights_dtype": f"{estimate.weights_dtype} weights",
        "adapter_dtype": "" if estimate.adapter_dtype is None else f"{estimate.adapter_dtype} adapter",
    }
    open_ones = [text for name, text in others.items() if text and getattr(asked, name) is None]
    if open_ones:
        texts.append(f"{', '.join(open_ones)}: chosen as compare does")
    return tuple(texts)


def dense_setup(asked: EstimateRequest) -> tuple[Planning, TrainingSetup, tuple[str, ...]]:
    """The run that a request for a dense method describes, on which card, and notes.

    Without activation checkpointing where the request leaves that open.
    """
    given, double_quant = _weights(asked)
    planned = _planning(replace(_options(asked), weights_dtype=given))
    weights = given or planned.request.weights_dtype
    shape, usual = planned.request.model, USUAL_SIZES[asked.kind]
    if shape.stored is not None:
        if asked.kind == "full":
            raise UsageError(
                f"--method full: {shape.name} stores its weights as {shape.stored.title}, which no step trains"
            )
        double_quant = planned.request.double_quant
    names, emulated = asked.target_names or (usual.targets,), _as_baseline(asked, planned)
    lora = asked.kind in LORA
    setup = TrainingSetup(
        model=shape,
        method=asked.kind,
        peft=method_of(asked.method, asked.peft_arg, asked.peft_config)[1],
        emulated=emulated,
        rank=(asked.rank or usual.size) if lora else None,
        target_modules=resolve_targets(shape, names) if lora else (),
        lora_dropout=bool(asked.lora_dropout),
        adapter_width=(asked.adapter_width or usual.size) if asked.kind == "parallel-adapter" else None,
        reduction=(asked.reduction or usual.size) if asked.kind == "lst" else None,
        dropped_layers=asked.dropped_layers or 0,
        weights_dtype=weights,
        double_quant=double_quant,
        kbit_preparation=bool(asked.kbit_preparation),
        trl_casts=bool(asked.trl_casts),
        reentrant=asked.reentrant,
        autocast=asked.autocast or "none",
        adapter_dtype=asked.adapter_dtype or "fp32",
        batch_size=asked.batch_size,
        seq_len=asked.seq_len,
        grad_accum=asked.grad_accum or 1,
        activation_checkpointing=bool(asked.activation_checkpointing),
        attention=planned.request.attention,
        repeated_heads=bool(asked.repeated_heads),
        offload=asked.offload or "none",
        compiled=bool(asked.torch_compile),
        packed=planned.request.packed,
        optimizer=asked.optimizer or "adamw",
        optimizer_in_backward=bool(asked.optimizer_in_backward),
        master_weights=bool(asked.master_weights),
        kernels=_kernels(asked, shape),
        loss=asked.loss or next((LOSS_OF[name] for name in asked.kernel_names if name in LOSS_OF), "hf"),
        padded=bool(asked.padding),
        outputs_kept=asked.keep_outputs is not False and not emulated,
    )
    _check_setup(setup)
    ignored = passed_over(shape, names) if lora else ()
    notes = tuple(f"target {name}: {shape.name} has no such layer, as PEFT it is passed over" for name in ignored)
    return planned, setup, (*notes, *planned.notes)


def _kernels(asked: EstimateRequest, shape: ModelShape) -> tuple[KernelName, ...]:
    """The fused kernels; those of LoRA come with a library where it fuses this run's."""
    fuses = fused_lora_of(asked.kernel_names, quantized=asked.kind == "qlora", dropout=bool(asked.lora_dropout))
    found = resolve_kernels(shape, [*asked.kernel_names, *(["lora"] if asked.kind in LORA and fuses else [])])
    if "lora" in found and asked.kind not in LORA:
        raise UsageError(f"--kernels lora: --method {asked.kind} trains no LoRA; leave it out")
    return found


def _as_baseline(asked: EstimateRequest, planned: Planning) -> bool:
    """Whether the run is what ``meft-run baseline`` makes of it on the emulated device: nothing of another loop is
    asked for."""
    loop = ("autocast", "optimizer", "optimizer_in_backward", "master_weights", "kernels", "loss", "padding",
            "keep_outputs", "kbit_preparation", "trl_casts", "reentrant", "repeated_heads", "offload", "torch_compile",
            "lora_dropout", "adapter_dtype")  # fmt: skip
    said = any(getattr(asked, name) not in (None, *SAYS_NOTHING.get(name, ())) for name in loop)
    return planned.profiles.gpu.shares_host_cores and not said


def usual_meft(planned: Planning) -> tuple[Estimate, ...]:
    """MEFT at its usual size, where the request leaves that open, and as lean as the planner knows: the same at every
    budget, without activation checkpointing and with it, or as asked."""
    found = []
    for flag in checkpointing_choices(planned.request.activation_checkpointing):
        asked = replace(planned, request=planned.request.model_copy(update={"activation_checkpointing": flag}))
        decision = _leanest(asked, _at_usual_size(asked.request)).decision
        found.append(estimate_meft(planned.request, decision, predict(planned.request, decision, planned.profiles)))
    return tuple(found)


def _meft_plan(planned: Planning, *, active_rows: int | None) -> Plan:
    """The paper's width and K where the request leaves them open: what the planner makes of the card's memory, or,
    where nothing fits, the leanest that it weighs."""
    request = planned.request
    usual = _at_usual_size(request)
    on_the_card = usual.model_copy(update={"gpu_mem_bytes": request.gpu_mem_bytes})
    found = make_plan(on_the_card, planned.profiles, meft_version=VERSION)
    if isinstance(found, Infeasible):
        found = _leanest(planned, usual)
    decision = found.decision
    if active_rows is not None:
        decision = _with_rows(decision, active_rows)
    rows = None if active_rows is None else [active_rows] * request.model.num_layers
    prediction = predict(request, decision, planned.profiles, rows)
    return found.model_copy(update={"decision": decision, "prediction": prediction})


def _at_usual_size(request: Request) -> Request:
    """The paper's width and K where they are open, and no limits."""
    width = request.adapter_width or USUAL_SIZES["meft"].size
    top_k = request.top_k or min(USUAL_TOP_K, width or USUAL_TOP_K)
    chosen = {"adapter_width": width, "top_k": top_k, "bf16_copy": bool(request.bf16_copy)}
    return without_limits(request.model_copy(update=chosen))


def _leanest(planned: Planning, unlimited: Request) -> Plan:
    """What takes least device memory where the request leaves it open: rows are fetched again and none kept."""
    lean = {"activation_checkpointing": True, "rows_in_backward": "refetched", "prefetch_depth": 0, "hot_rows": 0}
    left_open = {name: value for name, value in lean.items() if getattr(unlimited, name) is None}
    found = make_plan(unlimited.model_copy(update=left_open), planned.profiles, meft_version=VERSION)
    if isinstance(found, Infeasible):
        raise InfeasibleError(f"no such configuration: {found.message}", found)
    update = {"cached_rows": 0, "gradients_on_device": False}
    return found.model_copy(update={"decision": found.decision.model_copy(update=update)})


def _with_rows(decision: Decision, active_rows: int) -> Decision:
    if not decision.top_k <= active_rows <= decision.adapter_width:
        limits = f"--top-k {decision.top_k} and --adapter-width {decision.adapter_width}"
        raise UsageError(f"--active-rows {active_rows}: it is not between {limits}")
    return decision.model_copy(update={"active_rows_cap": active_rows})


def _weights(asked: EstimateRequest) -> tuple[WeightsDtype | None, bool]:
    """The weights' dtype as far as method and request say it, and whether their scales are quantized too."""
    given = asked.weights_dtype
    if given == "int8":
        raise UsageError(f"weights_dtype int8: estimate knows {', '.join(WEIGHTS)}")
    if asked.kind == "qlora" and given not in (None, "nf4"):
        raise UsageError(f"--weights-dtype {given}: qlora has nf4 weights; use --method lora")
    if asked.kind == "full" and given == "nf4":
        raise UsageError("--weights-dtype nf4: full trains its weights; give fp32, bf16 or fp16")
    weights: WeightsDtype | None = given or ("nf4" if asked.kind == "qlora" else None)
    if asked.double_quant and weights != "nf4":
        raise UsageError(f"--double-quant: the weights are {weights or 'bf16'}; it goes with --weights-dtype nf4")
    return weights, asked.kind == "qlora" if asked.double_quant is None else asked.double_quant


def _check_setup(setup: TrainingSetup) -> None:
    if setup.method == "lst":
        side_shape(setup.model, setup.reduction or 0)
        kept_layers(setup.model.num_layers, setup.dropped_layers)
        if setup.weights_dtype == "nf4" or setup.autocast != "none":
            raise UsageError(
                "--method lst: its side network is fp32 beside weights that are not quantized, no autocast"
            )
    if setup.attention == "flash" and setup.weights_dtype == "fp32" and setup.autocast == "none":
        raise UsageError(
            "--attention flash: it computes in 16 bits, the weights are fp32; give sdpa, or --autocast bf16"
        )
    if setup.repeated_heads and (setup.attention == "eager" or setup.model.num_heads == setup.model.num_kv_heads):
        raise UsageError(
            f"--repeated-heads: {setup.attention} attention of {setup.model.name} has no grouped heads that a kernel "
            f"takes as they are; leave it out"
        )
    if setup.offload == "unsloth" and setup.reentrant is False:
        raise UsageError("--offload unsloth: its checkpoints are reentrant; leave --no-reentrant out, or give trl")
    if setup.offload != "none" and _is_traced(setup):
        raise UsageError(
            f"--offload {setup.offload}: it is simulated, and --method {setup.label} of {setup.model.name} is traced; "
            f"leave it out"
        )
    if setup.compiled:
        check_compiled(setup, traced=_is_traced(setup))
    if setup.packed and setup.padded:
        raise UsageError("--packed: packed sequences are told apart by their positions, without padding; give one")
    if setup.optimizer_in_backward and setup.grad_accum > 1:
        raise UsageError(
            f"--optimizer-in-backward: it updates at every micro-batch, so --grad-accum {setup.grad_accum} cannot be; "
            f"give 1"
        )
    trained = setup.weights_dtype if setup.method == "full" else setup.adapter_dtype
    if setup.master_weights and trained == "fp32":
        raise UsageError("--master-weights: what is trained is fp32 already; give 16-bit weights, or leave it out")


def _options(asked: EstimateRequest) -> RequestOptions:
    """The request's budgets and workload, for the look-up of names and the checks that a plan has."""
    return RequestOptions(
        model=asked.model,
        gpu=asked.gpu,
        gpu_mem=_size(asked.gpu_mem, "--gpu-mem"),
        host_mem=_size(asked.host_mem, "--host-mem"),
        context_overhead=_size(asked.context_overhead, "--context-overhead"),
        host=asked.host,
        link=asked.link,
        sparsity=asked.sparsity,
        batch_size=asked.batch_size,
        seq_len=asked.seq_len,
        grad_accum=asked.grad_accum or USUAL_GRAD_ACCUM.get(asked.kind, 1),
        weights_dtype=asked.weights_dtype,
        double_quant=asked.double_quant,
        adapter_dtype=asked.adapter_dtype,
        attention=asked.attention,
        packed=asked.packed,
        activation_checkpointing=asked.activation_checkpointing,
        adapter_width=asked.adapter_width if asked.kind == "meft" else None,
        top_k=asked.top_k,
        prefetch_depth=asked.prefetch_depth,
        routing=asked.routing,
        capacity_factor=asked.capacity_factor,
        router_jitter=asked.router_jitter,
        balance_loss=asked.balance_loss,
        first_stage=asked.first_stage,
        rows_in_backward=asked.rows_in_backward,
        tokens_see=asked.tokens_see,
        token_chunks=asked.token_chunks,
        hot_rows=asked.hot_rows,
        bf16_copy=asked.bf16_copy,
    )


def _size(given: int | str | None, field: str) -> int | None:
    return None if given is None else parse_bytes(str(given), field=field)


def _estimate_meft(asked: EstimateRequest, *, verify: bool) -> tuple[Estimate, tuple[str, ...]]:
    """A MEFT decision with what was given, and the planner's choice, unbound by host and time, for the rest."""
    planned = _planning(_options(asked))
    if planned.request.model.measured is not None:
        planned = with_terms(planned, _config(planned))
    plan = _meft_plan(planned, active_rows=asked.active_rows)
    if planned.request.model.measured is not None:
        request = as_its_trace(planned.request, plan.decision, _config(planned), planned.profiles.gpu)
        rows = plan.prediction.sparsity.active_rows_per_layer
        prediction = predict(request, plan.decision, planned.profiles, rows)
        plan = plan.model_copy(update={"request": request, "prediction": prediction})
    estimate = estimate_meft(planned.request, plan.decision, plan.prediction)
    estimate = estimate.model_copy(update={"chosen": _chosen(asked, estimate, without=_plain(planned, plan))})
    if verify:
        traced = traced_plan(plan, _config(planned), workspace_bytes=_workspace(planned))
        budget = planned.request.gpu_mem_bytes
        estimate = with_trace(estimate, traced, gpu=planned.profiles.gpu, gpu_mem_bytes=budget)
    return estimate, planned.notes


def _plain(planned: Planning, plan: Plan) -> Estimate:
    """The same decision without activation checkpointing."""
    decision = plan.decision.model_copy(update={"activation_checkpointing": False})
    rows = plan.prediction.sparsity.active_rows_per_layer
    return estimate_meft(planned.request, decision, predict(planned.request, decision, planned.profiles, rows))


def _config(planned: Planning) -> dict[str, Any]:
    """The Hugging Face config of the request's model."""
    return load_model(planned.request.model_path or planned.request.model.name)[1]


def _workspace(planned: Planning) -> int:
    return int(planned.profiles.gpu.workspace_bytes.value)


def _planning(options: RequestOptions) -> Planning:
    """As for a plan, but the default card will do where none is named."""
    if options.gpu is None and options.gpu_mem is None:
        default = load_defaults().gpu
        planned = planning(replace(options, gpu=default))
        return replace(planned, notes=(f"card {default}: no --gpu was given", *planned.notes))
    return planning(options)
