"""``meft-plan estimate``: what one configuration of a method needs, from options or from one JSON object."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import click

from meft.planner.base.dtypes import AdapterDtype
from meft.planner.base.errors import EXIT_DONE, EXIT_INFEASIBLE, UsageError, unknown_name
from meft.planner.base.schema import parse_json, read_text, validated
from meft.planner.cli.options import PACKED, Command, apply_options, budget_options, decision_options
from meft.planner.front.asked import EstimateRequest
from meft.planner.front.estimate import WEIGHTS, estimate_of
from meft.planner.front.options import MAX_BATCH_SIZE, MAX_GRAD_ACCUM, MAX_RANK, MAX_SEQ_LEN, MAX_WIDTH
from meft.planner.records.peft_methods import PEFT_PREFIX
from meft.planner.records.plan import Attention
from meft.planner.records.setup import METHOD_NAMES, Autocast, LossName, OffloadName, OptimizerName, optimizer_name
from meft.planner.terms.lengths import BATCHINGS

_METHODS = f"{', '.join(METHOD_NAMES[:-1])}, or {PEFT_PREFIX}TYPE"


class OptimizerChoice(click.Choice[str]):
    """An optimizer by its name, or by the one that transformers' ``TrainingArguments`` has for it."""

    def __init__(self) -> None:
        super().__init__(get_args(OptimizerName))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name of the optimizer here."""
        return str(super().convert(optimizer_name(value), param, ctx))


def setup_options(command: Command) -> Command:
    """The method's own options and the workload's."""
    return _method_options(_workload_options(_batch_options(command)))


def _method_options(command: Command) -> Command:
    """What is trained, beside which weights, in which dtypes."""
    option = click.option
    return apply_options(
        command,
        option("--rank", type=click.IntRange(1, MAX_RANK), help="Of lora and qlora. [default: 16; 64]"),
        option(
            "--target-modules",
            metavar="NAMES",
            help="Linear layers that LoRA adapts, by the names of their modules (q_proj,v_proj; c_attn), or attention, "
            "ffn, all-linear. [default: attention; all-linear for qlora]",
        ),
        option("--reduction", type=click.IntRange(min=2), help="Of lst: how much narrower. [default: 8]"),
        option("--dropped-layers", type=click.IntRange(min=0), help="Of lst: layers without a rung. [default: 0]"),
        option("--lora-dropout", type=click.FloatRange(0.0, 1.0, max_open=True), help="[default: 0]"),
        option("--active-rows", type=click.IntRange(1, MAX_WIDTH), help="MEFT: rows per layer that a batch activates."),
        option("--model", metavar="NAME|DIR|FILE", help="Name, folder, or config.json. [default: llama-7b]"),
        option(
            "--weights-dtype",
            type=click.Choice(WEIGHTS),
            help="[default: bf16, fp32 on the emulated device; nf4 for qlora]",
        ),
        option("--double-quant/--no-double-quant", default=None, help="Quantize nf4's scales too."),
        option(
            "--kbit-preparation/--no-kbit-preparation",
            default=None,
            help="PEFT's prepare_model_for_kbit_training: what is not quantized becomes fp32.",
        ),
        option(
            "--trl-casts/--no-trl-casts",
            default=None,
            help="TRL 0.x's casts of a 4-bit model with bf16=True: norms in fp32, embeddings and head in bf16.",
        ),
        option("--autocast", type=click.Choice(get_args(Autocast)), help="[default: none]"),
        option("--adapter-dtype", type=click.Choice(get_args(AdapterDtype)), help="[default: fp32; MEFT: bf16]"),
    )


def _batch_options(command: Command) -> Command:
    """What a step is given: its sequences, and how long they are."""
    option = click.option
    return apply_options(
        command,
        option("--batch-size", type=click.IntRange(1, MAX_BATCH_SIZE), help="[default: 2]"),
        option("--seq-len", type=click.IntRange(1, MAX_SEQ_LEN), help="[default: 256]"),
        option("--grad-accum", type=click.IntRange(1, MAX_GRAD_ACCUM), help="Steps per update. [default: 1; MEFT: 32]"),
        option(
            "--lengths",
            metavar="FILE|MEAN,STD",
            help="Sequences' lengths vary: as in a file (a length a line, JSON lines with input_ids, or texts for "
            "--tokenizer), or so distributed. --seq-len cuts them.",
        ),
        option("--tokenizer", metavar="DIR", help="Of the texts in --lengths FILE. [default: the model's folder]"),
        option("--batching", type=click.Choice(BATCHINGS), help="How batches are made of them. [default: padded]"),
        option("--padding/--no-padding", default=None, help="Batches are padded, so masks exist. [default: no]"),
    )


def _workload_options(command: Command) -> Command:
    """How a step runs: checkpointing, attention, optimizer, kernels and loss."""
    option = click.option
    return apply_options(
        command,
        option(
            "--activation-checkpointing/--no-activation-checkpointing",
            default=None,
            help="[default: on if need be]",
        ),
        option(
            "--reentrant/--no-reentrant",
            default=None,
            help="The kind of checkpointing (use_reentrant). [default: reentrant where PEFT prepares a 4-bit model]",
        ),
        option(
            "--offload",
            type=click.Choice(get_args(OffloadName)),
            help="Activations wait on the host: torch's save_on_cpu, TRL's and torchtune's OffloadActivations, or "
            "Unsloth's checkpoints. [default: none]",
        ),
        option(
            "--torch-compile",
            is_flag=True,
            default=None,
            help="The model runs through torch.compile: its peaks are a range. Of lora and full.",
        ),
        option("--attention", type=click.Choice(get_args(Attention)), help="[default: sdpa; eager for Gemma 2]"),
        option(
            "--repeated-heads",
            is_flag=True,
            default=None,
            help="Grouped heads are written out before the attention kernel, as transformers did up to 4.47.",
        ),
        PACKED,
        option("--optimizer", "--optim", type=OptimizerChoice(), help="Also by transformers' names. [default: adamw]"),
        option(
            "--optimizer-in-backward",
            is_flag=True,
            default=None,
            help="Update each parameter once its gradient is there, and let that go (torchtune).",
        ),
        option(
            "--master-weights",
            is_flag=True,
            default=None,
            help="fp32 copies of 16-bit trained parameters, which the optimizer updates (DeepSpeed).",
        ),
        option(
            "--kernels",
            metavar="NAMES",
            help="Fused kernels: those of liger, unsloth or foak, with their loss; or rms-norm, swiglu, rope, lora.",
        ),
        option("--loss", type=click.Choice(get_args(LossName)), help="[default: hf, which upcasts the logits]"),
        option(
            "--keep-outputs/--drop-outputs",
            default=None,
            help="The loop holds the model's outputs, and the logits with them, as stock loops do. [default: keep]",
        ),
    )


@click.command("estimate", short_help="What one configuration of a method needs.")
@click.option("--method", metavar="METHOD", help=f"{_METHODS}. Required, here or in --request.")
@click.option(
    "--peft-arg",
    metavar="NAME=VALUE",
    multiple=True,
    help="A field of the config of peft:TYPE, such as num_virtual_tokens=20; a value is JSON or text.",
)
@click.option("--peft-config", metavar="FILE", help="An adapter_config.json in place of --method and --peft-arg.")
@click.option(
    "--request",
    "request_file",
    metavar="FILE",
    help="A JSON object in place of options, or beside them: the options' names with underscores. - reads it from "
    "standard input.",
)
@setup_options
@decision_options
@budget_options
@click.option("--verify", is_flag=True, help="Trace the real model's code too (needs torch) and show both peaks.")
@click.option("--probe", is_flag=True, help="Run two steps on this machine's card and correct the rest by them.")
@click.option("--json", "as_json", is_flag=True, help="Print the estimate as JSON.")
@click.pass_context
def estimate_command(
    context: click.Context, /, *, request_file: str | None, verify: bool, probe: bool, as_json: bool, **given: Any
) -> None:
    """What one configuration of a method needs, and whether it fits: exit code 3 when it does not run.

    Activation checkpointing, attention, dropout and dtypes that are left open are chosen as compare chooses them, and
    the output says so.
    """
    asked = _asked(request_file, given)
    estimate, notes = estimate_of(asked, verify=verify, probe=probe)
    if as_json:
        click.echo(estimate.model_dump_json(indent=2))
    else:
        from meft.planner.render.methods import estimate_view
        from meft.planner.render.tables import show

        show(estimate_view(estimate, notes=notes))
    context.exit(EXIT_INFEASIBLE if estimate.verdict == "does-not-fit" else EXIT_DONE)


def _asked(request_file: str | None, given: dict[str, Any]) -> EstimateRequest:
    """The request file's fields, with what the command line says in their place."""
    options = {name: value for name, value in given.items() if value not in (None, ())}
    content: dict[str, Any] = {}
    source = "options"
    if request_file is not None:
        source = "--request standard input" if request_file == "-" else f"--request {request_file}"
        content = _request_content(request_file, source)
    if "peft_config" in options | content:
        options.setdefault("method", content.pop("method", "peft"))
    if "method" not in content and "method" not in options:
        raise UsageError(f"--method: which one? Give one of {_METHODS}")
    return validated(EstimateRequest, content | options, source=source)


def _request_content(request_file: str, source: str) -> dict[str, Any]:
    text = sys.stdin.read() if request_file == "-" else read_text(Path(request_file), kind="--request file")
    content = parse_json(text, source=source)
    if not isinstance(content, dict):
        raise UsageError(f"{source}: expected a JSON object, found {type(content).__name__}")
    for name in content:
        if name not in EstimateRequest.model_fields:
            raise unknown_name(f"field in {source}", name, EstimateRequest.model_fields)
    return content
