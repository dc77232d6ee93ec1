"""``meft-run baseline``: train another method than MEFT in the same loop and the same books."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from meft.planner.base.errors import UsageError, unknown_name
from meft.planner.base.units import format_bytes, format_seconds, parse_bytes
from meft.planner.records.peft_methods import PEFT_PREFIX, PeftMethod, method_of
from meft.planner.records.setup import TrainingSetup
from meft.runtime.cli.data import data_options, known_tokens_option, reading_options
from meft.runtime.cli.display import display_of
from meft.runtime.cli.use import base_folder
from meft.runtime.data.metrics import METRICS, evaluation_line
from meft.runtime.training.interrupts import Interrupts

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)
METHODS = ("lora", "qlora", "parallel-adapter", "full", "bitfit", "lst")
"""Besides ``peft:TYPE``."""
DEFAULT_STEPS = 100
USUAL_RANK, USUAL_WIDTH, USUAL_REDUCTION = 16, 64, 8


def method_options(function: Any) -> Any:
    """Which method, at which size, beside which weights."""
    option = click.option
    options = (
        option("--method", metavar="METHOD", help=f"{', '.join(METHODS)}, or {PEFT_PREFIX}TYPE for any type of peft."),
        option(
            "--peft-arg",
            "peft_arguments",
            metavar="NAME=VALUE",
            multiple=True,
            help="A field of the config of peft:TYPE, such as num_virtual_tokens=20; a value is JSON or text.",
        ),
        option("--peft-config", type=_PATH, help="An adapter_config.json in place of --method and --peft-arg."),
        option("--rank", type=_COUNT, help=f"Of lora and qlora.  [default: {USUAL_RANK}]"),
        option("--target-modules", metavar="NAMES", help="Linear layers of lora and qlora.  [default: all-linear]"),
        option("--adapter-width", type=_COUNT, help=f"Of parallel-adapter.  [default: {USUAL_WIDTH}]"),
        option(
            "--reduction", type=click.IntRange(min=2), help=f"Of lst: how much narrower.  [default: {USUAL_REDUCTION}]"
        ),
        option("--dropped-layers", type=click.IntRange(min=0), help="Of lst: layers without a rung.  [default: 0]"),
        option(
            "--weights-dtype",
            type=click.Choice(["fp32", "bf16", "fp16", "nf4"]),
            help="[default: fp32 on the emulated device, bf16 on a card; nf4 for qlora]",
        ),
        option("--attention", type=click.Choice(["sdpa", "eager", "flash"]), default="sdpa", show_default=True),
        option("--activation-checkpointing", is_flag=True, help="Compute layers again in backward."),
        option("--batch-size", type=_COUNT, default=2, show_default=True),
        option("--seq-len", type=click.IntRange(min=2), default=256, show_default=True),
        option("--grad-accum", type=_COUNT, default=1, show_default=True, help="Micro-batches per update."),
    )
    for each in reversed(options):
        function = each(function)
    return function


def run_options(function: Any) -> Any:
    """How a run goes."""
    option = click.option
    options = (
        option("--model", type=_PATH, help="Folder of the model [default: the embedded SmolLM2-135M]."),
        option("--device", type=click.Choice(["auto", "cuda", "emulated"]), default="auto", show_default=True),
        option("--gpu-mem", help="What the device's allocator may reserve, e.g. 1GiB.  [default: no limit]"),
        option("--steps", type=_COUNT, help=f"Micro-batches in all.  [default: {DEFAULT_STEPS}]"),
        option("--epochs", type=click.FloatRange(min=0, min_open=True), help="Times through the data instead."),
        option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True),
        option("--warmup", type=click.FloatRange(0, 1), default=0.02, show_default=True, help="Fraction of the steps."),
        option("--weight-decay", type=click.FloatRange(min=0), default=0.0, show_default=True),
        option("--max-grad-norm", type=click.FloatRange(min=0), default=1.0, show_default=True, help="0: no clipping."),
        option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
        option(
            "--save-every",
            type=click.IntRange(min=0),
            default=100,
            show_default=True,
            help="Optimizer steps between checkpoints; 0: only at the end.",
        ),
        option("--output-dir", type=_PATH, default=Path("output"), show_default=True),
        option("--overwrite", is_flag=True, help="Replace what an earlier run left there."),
        option("--resume", is_flag=True, help="Go on from the newest checkpoint in --output-dir."),
        option("--eval", "eval_task", metavar="FILE|NAME", help="Score the model on it: see meft-run evaluate."),
        option("--eval-every", type=click.IntRange(min=0), default=0, show_default=True, help="0: only at the end."),
        option("--metric", type=click.Choice(METRICS), help="[default: what the format is scored by, else em]"),
        option("--eval-limit", type=_COUNT, help="The first so many items only."),
        option("--eval-batch-size", type=_COUNT, default=8, show_default=True),
        option("--max-new-tokens", type=_COUNT, default=32, show_default=True, help="Of each answer."),
        option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of lines."),
    )
    for each in reversed(options):
        function = each(function)
    return function


@click.command("baseline", short_help="Train another method (LoRA, QLoRA, any of peft) in the same books.")
@method_options
@data_options
@known_tokens_option
@run_options
@click.pass_obj
def baseline_command(noted: Interrupts | None, /, as_json: bool, **given: Any) -> None:
    """Train --method on --data; what it learnt goes to --output-dir/adapter, what it took to report.json.

    A method of peft is saved as peft saves it. meft-run generate and evaluate take the folder with --adapter. Exit
    codes are those of running a plan.
    """
    with (noted or Interrupts()).installed() as interrupts:
        options = _options(given)
        from meft.runtime.methods.run import run_method

        with display_of(interrupts) as display:
            report = run_method(options, say=display.say, on_step=display.on_step, interrupts=interrupts)
        if as_json:
            click.echo(report.to_json(), nl=False)
        else:
            _print(report, options.output_dir)
        interrupts.check_trained()


def setup_of(given: dict[str, Any], folder: Path, *, emulated: bool) -> TrainingSetup:
    """Take the options of :func:`method_options` out of ``given``; the run that they describe."""
    from meft.runtime.methods.opening import ALL_LINEAR, model_shape
    from meft.runtime.methods.peft_methods import checked

    method, peft = _method(given.pop("method"), given.pop("peft_arguments"), given.pop("peft_config"))
    rank, targets, width = (given.pop(name) for name in ("rank", "target_modules", "adapter_width"))
    reduction, dropped = given.pop("reduction"), given.pop("dropped_layers")
    for name, value, of in (
        ("--rank", rank, ("lora", "qlora")),
        ("--target-modules", targets, ("lora", "qlora")),
        ("--adapter-width", width, ("parallel-adapter",)),
        ("--reduction", reduction, ("lst",)),
        ("--dropped-layers", dropped, ("lst",)),
    ):
        if value is not None and method not in of:
            raise UsageError(f"{name} {value}: is of {', '.join(of)}; peft:TYPE takes --peft-arg")
    lora = method in ("lora", "qlora")
    dtype = given.pop("weights_dtype") or ("nf4" if method == "qlora" else "fp32" if emulated else "bf16")
    names = tuple(targets.replace(",", " ").split()) if targets else ALL_LINEAR
    shared = ("attention", "activation_checkpointing", "batch_size", "seq_len", "grad_accum")
    return TrainingSetup(
        model=model_shape(folder),
        method=method,
        peft=None if peft is None else checked(peft),
        rank=(rank or USUAL_RANK) if lora else None,
        target_modules=names if lora else (),
        adapter_width=(width or USUAL_WIDTH) if method == "parallel-adapter" else None,
        reduction=(reduction or USUAL_REDUCTION) if method == "lst" else None,
        dropped_layers=dropped or 0,
        weights_dtype=dtype,
        double_quant=method == "qlora",
        emulated=emulated,
        outputs_kept=False,
        **{name: given.pop(name) for name in shared},
    )


def _method(text: str | None, arguments: tuple[str, ...], config: Path | None) -> tuple[str, PeftMethod | None]:
    method, peft = method_of(text, arguments, config)
    if method is None:
        raise UsageError(f"--method: which one? Give one of {', '.join(METHODS)}, or {PEFT_PREFIX}TYPE")
    if method == "meft":
        raise UsageError("--method meft: is trained by a plan: meft-plan -o plan.json, then meft-run plan.json")
    if peft is None and method not in METHODS:
        raise unknown_name("method", method, (*METHODS, f"{PEFT_PREFIX}TYPE"))
    return method, peft


def _options(given: dict[str, Any]) -> Any:
    import torch

    from meft.runtime.host.optimizer import AdamWSettings
    from meft.runtime.methods.run import MethodOptions
    from meft.runtime.training.training import TrainingOptions
    from meft.runtime.use.evaluation import EvaluationOptions

    folder = base_folder(given.pop("model"))
    device = given["device"]
    emulated = device == "emulated" or (device == "auto" and not torch.cuda.is_available())
    setup = setup_of(given, folder, emulated=emulated)
    steps, epochs = given.pop("steps"), given.pop("epochs")
    if None not in (steps, epochs):
        raise UsageError(f"--steps {steps} and --epochs {epochs:g}: both say how long; give one of them")
    task, every = given.pop("eval_task"), given.pop("eval_every")
    asking = {
        "metric": given.pop("metric"),
        "limit": given.pop("eval_limit"),
        "batch_size": given.pop("eval_batch_size"),
        "max_new_tokens": given.pop("max_new_tokens"),
    }
    if task is None and (every or asking["metric"] or asking["limit"]):
        raise UsageError("--metric, --eval-limit and --eval-every belong to --eval; say what to evaluate on")
    training = TrainingOptions(
        steps=steps or DEFAULT_STEPS,
        learning_rate=given.pop("learning_rate"),
        warmup_fraction=given.pop("warmup"),
        max_norm=given.pop("max_grad_norm") or None,
        seed=given.pop("seed"),
        save_every=given.pop("save_every"),
        known_token_weight=given.pop("known_token_weight"),
    )
    gpu_mem = given.pop("gpu_mem")
    if gpu_mem is not None:
        given["gpu_mem_bytes"] = parse_bytes(gpu_mem, field="--gpu-mem")
    given |= reading_options(given)
    return MethodOptions(
        setup=setup,
        model=folder,
        training=training,
        epochs=epochs,
        settings=AdamWSettings(weight_decay=given.pop("weight_decay")),
        evaluation=None if task is None else EvaluationOptions(task, every=every, **asking),
        **given,
    )


def _print(report: Any, folder: Path) -> None:
    losses = report.loss_per_step
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    traffic = format_bytes(report.h2d_bytes_per_step + report.d2h_bytes_per_step)
    click.echo(f"{report.method} on the {report.device}: {report.trainable_parameters:,} numbers trained")
    click.echo(
        f"device memory: {format_bytes(report.peak_allocated_bytes)} allocated, "
        f"{format_bytes(report.peak_reserved_bytes)} reserved; traffic {traffic} a step; "
        f"{format_seconds(report.seconds_per_step)} a step"
    )
    click.echo(f"loss {first:.3f} -> {last:.3f} (means of the first and last {tenth} of {report.steps} steps)")
    for result in report.evaluations[-1:]:
        click.echo(evaluation_line(result))
    click.echo(f"wrote {folder / 'adapter'} and {folder / 'report.json'}")
