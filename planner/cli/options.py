"""The options that commands of ``meft-plan`` share, and how their values are read.

An option's value is either right or refused here with field, value and limit; what depends on the model or the card is
checked in :mod:`meft.planner.front.request`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from meft.planner.base.dtypes import AdapterDtype
from meft.planner.base.units import format_size_argument, parse_bytes, parse_count
from meft.planner.front.options import (
    AUTO,
    MAX_BATCH_SIZE,
    MAX_GPUS,
    MAX_GRAD_ACCUM,
    MAX_NODES,
    MAX_SEQ_LEN,
    MAX_SLOWDOWN,
    MAX_WIDTH,
    RUNNABLE_WEIGHTS,
    USUAL_BATCH_SIZE,
)
from meft.planner.records.plan import Attention, Objective, RowsInBackward, RowsPolicy, TokensSee
from meft.planner.records.routing import MAX_BALANCE_LOSS, MAX_CAPACITY_FACTOR, Routing

if TYPE_CHECKING:
    _IntType = click.ParamType[int]
else:  # only newer versions of click can be subscripted
    _IntType = click.ParamType

Command = TypeVar("Command", bound=Callable[..., Any])


class Size(_IntType):
    """A memory size, as :func:`~meft.planner.base.units.parse_bytes` reads it."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ARG002 - click's
        """Bytes; a bad size is a :class:`~meft.planner.base.errors.UsageError` that names the option."""
        if isinstance(value, int):
            return value
        return parse_bytes(value, field=param.opts[0] if param is not None else "size")


class Quantity(_IntType):
    """A number of things, as :func:`~meft.planner.base.units.parse_count` reads it."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ARG002 - click's
        """The number; a bad one is a :class:`~meft.planner.base.errors.UsageError` that names the option."""
        if isinstance(value, int):
            return value
        return parse_count(value, field=param.opts[0] if param is not None else "count")


class BatchSize(click.IntRange):
    """So many sequences, or ``auto``."""

    name = "integer range or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, ``auto``, or click's own usage error."""
        return value if value == AUTO else super().convert(value, param, ctx)


class FiniteRange(click.FloatRange):
    """A float range that refuses NaN, which is neither below nor above anything."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or click's own usage error."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


SIZE = Size()
COUNT = Quantity()
PATH = click.Path(path_type=Path)
PACKED = click.option(
    "--packed/--no-packed",
    default=None,
    help="Sequences hold several short texts, kept apart by a mask. [default: no]",
)


def budget_options(command: Command) -> Command:
    """The card, the host and what connects them."""
    return apply_options(
        command,
        click.option(
            "--gpu",
            metavar="NAME|FILE",
            help="Card whose memory and rates to plan for, or 'emulated', or a file of "
            "meft-profile: then host, link and sparsity are read from it too unless given.",
        ),
        click.option(
            "--gpu-mem",
            type=SIZE,
            help="GPU memory, as printed on the card's box: GB = GiB = 2^30 bytes here. MiB, GiB and bytes work too.",
        ),
        click.option("--host-mem", type=SIZE, help="The machine's RAM, not all for the plan. [default: this one's]"),
        click.option("--host", metavar="NAME|FILE", help="Class of host: its CPU rates."),
        click.option("--link", metavar="NAME|FILE", help="Class of host-device link. [default: the card's slot]"),
        click.option("--sparsity", metavar="NAME|FILE", help="Profile of how many rows a batch activates."),
        click.option(
            "--context-overhead",
            type=SIZE,
            help="What CUDA's context and modules take beside torch's allocator. [default: the card's range]",
        ),
    )


def workload_options(command: Command) -> Command:
    """The model and what a step trains on."""
    return apply_options(
        command,
        click.option(
            "--model", metavar="NAME|DIR|FILE", help="Built-in name, model folder, or config.json. [default: llama-7b]"
        ),
        click.option(
            "--batch-size",
            type=BatchSize(1, MAX_BATCH_SIZE),
            default=USUAL_BATCH_SIZE,
            show_default=True,
            help="Sequences of a step; auto splits 2 x --grad-accum of them into the steps that take least a token.",
        ),
        click.option("--seq-len", type=click.IntRange(1, MAX_SEQ_LEN), default=256, show_default=True),
        click.option(
            "--grad-accum",
            type=click.IntRange(1, MAX_GRAD_ACCUM),
            default=32,
            show_default=True,
            help="Steps (micro-batches) per optimizer step.",
        ),
        click.option(
            "--weights-dtype",
            type=click.Choice(RUNNABLE_WEIGHTS),
            help="Of the frozen model. [default: bf16; fp32 on the emulated device]",
        ),
        click.option(
            "--double-quant/--no-double-quant", default=None, help="Quantize the constants of nf4 weights too."
        ),
        click.option(
            "--adapter-dtype",
            type=click.Choice(get_args(AdapterDtype)),
            help="In which rows travel and compute. [default: fp32 beside fp32 weights, else bf16]",
        ),
        click.option(
            "--attention",
            type=click.Choice(get_args(Attention)),
            help="[default: sdpa; eager for Gemma 2, which transformers does not run with sdpa]",
        ),
        PACKED,
        click.option(
            "--activation-checkpointing/--no-activation-checkpointing",
            default=None,
            help="[default: the planner chooses]",
        ),
    )


def rank_options(command: Command) -> Command:
    """Several cards in one machine, and several machines."""
    return apply_options(
        command,
        click.option(
            "--gpus",
            type=click.IntRange(1, MAX_GPUS),
            default=1,
            show_default=True,
            help="Such cards in the machine: they share the host's rows, and divide --grad-accum.",
        ),
        click.option(
            "--gpus-per-link",
            type=click.IntRange(1, MAX_GPUS),
            default=1,
            show_default=True,
            help="Of them, those that share one link's bandwidth (behind a switch, or on one slot's lanes).",
        ),
        click.option(
            "--nodes",
            type=click.IntRange(1, MAX_NODES),
            default=1,
            show_default=True,
            help="Such machines, with rows on each as --rows says.",
        ),
        click.option(
            "--rows",
            type=click.Choice(get_args(RowsPolicy)),
            default="replicated",
            show_default=True,
            help="Of several machines: each has all rows, or owns its part of them, which the others ask it for.",
        ),
        click.option(
            "--shard-base",
            is_flag=True,
            help="Each of the --gpus has its part of the frozen layers, which they gather one by one (torch's FSDP2).",
        ),
        click.option(
            "--interconnect",
            metavar="RATE",
            help="What a machine sends to others, and at once receives: 25Gbit/s, 25GbE or 3.1GB/s.",
        ),
    )


def search_options(command: Command) -> Command:
    """What to look for, and choices that are made already."""
    return apply_options(
        decision_options(command),
        click.option(
            "--objective",
            type=click.Choice(get_args(Objective)),
            default="capacity",
            show_default=True,
            help="capacity: the widest adapter, then the largest K, then the fastest step. traffic: of that width and "
            "K the fewest bytes over the link. speed: the fastest step.",
        ),
        click.option(
            "--max-slowdown",
            type=FiniteRange(1.0, MAX_SLOWDOWN),
            help="Over the same adapter all on the GPU. [default: 1.587, the paper's 1 / 0.63]",
        ),
        click.option(
            "--min-trainable",
            type=FiniteRange(0.0, 1.0),
            help="Least trainable parameters for --objective speed, as a fraction of the model. [default: 0.1]",
        ),
        click.option(
            "--active-rows-quantile",
            type=FiniteRange(0.5, 1.0, min_open=True, max_open=True),
            help="Share of micro-batches whose active rows the cap must hold. [default: 0.99]",
        ),
    )


def _routing_options() -> tuple[Callable[[Any], Any], ...]:
    """How rows are found, and what some ways have of their own."""
    return (
        click.option(
            "--routing",
            type=click.Choice(get_args(Routing)),
            help="How a token finds its rows: among all; among those of experts that a trained router scores; that the "
            "means of their keys score; or of the one expert that a trained router gives the highest probability, or "
            "that a light router gives it which learnt from a trained one and then is frozen. "
            "[default: the planner chooses of the first two]",
        ),
        click.option(
            "--capacity-factor",
            type=FiniteRange(0.0, MAX_CAPACITY_FACTOR, min_open=True),
            help="Of routing switch: an expert takes so many times its even share of a micro-batch's tokens; the "
            "adapter adds nothing to those beyond. [default: 1.25]",
        ),
        click.option(
            "--router-jitter",
            type=FiniteRange(0.0, 1.0, max_open=True),
            help="Of routing switch: what the router reads in training is multiplied by 1 +- so much. [default: 0.01]",
        ),
        click.option(
            "--balance-loss",
            type=FiniteRange(0.0, MAX_BALANCE_LOSS),
            help="Of routings switch and stable: weight of the loss that keeps their experts equally busy. [default: "
            "0.01 and 0.3]",
        ),
        click.option(
            "--first-stage",
            type=FiniteRange(0.0, 1.0, min_open=True),
            help="Of routing stable: share of a run's steps in which it learns whom to choose; then that is frozen. "
            "[default: 0.1]",
        ),
    )


def decision_options(command: Command) -> Command:
    """Parts of a decision that the user may fix."""
    return apply_options(
        command,
        click.option("--adapter-width", type=click.IntRange(1, MAX_WIDTH), help="Rows per layer."),
        click.option("--top-k", type=click.IntRange(1, MAX_WIDTH), help="Rows per token."),
        click.option("--prefetch-depth", type=click.IntRange(min=0), help="Layers that rows are fetched ahead."),
        *_routing_options(),
        click.option("--rows-in-backward", type=click.Choice(get_args(RowsInBackward))),
        click.option(
            "--tokens-see",
            type=click.Choice(get_args(TokensSee)),
            help="Of a batch's active rows a token's output uses the union (the paper's way), or its own best K alone. "
            "[default: union]",
        ),
        click.option(
            "--token-chunks",
            type=click.IntRange(min=1),
            help="Parts of a batch's tokens, each with active rows and a cap of its own: a long sequence in the memory "
            "of a short one. [default: 1, more where nothing else fits]",
        ),
        click.option(
            "--hot-rows",
            type=click.IntRange(0, MAX_WIDTH),
            help="Rows per layer that live on the device with their optimizer state: the most often active ones.",
        ),
        click.option(
            "--bf16-copy/--no-bf16-copy",
            default=None,
            help="Keep a bf16 copy of all rows on the host to gather from: half the time for an eighth more "
            "host memory. [default: the planner chooses]",
        ),
    )


def apply_options(command: Command, *decorators: Callable[[Any], Any]) -> Command:
    """Add options to a command, in the order in which its help lists them."""
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def command_with(context: click.Context, changes: Mapping[str, str]) -> str:
    """The command line that was given, with options changed or added: one that can be typed as it stands.

    ``changes`` maps options to values; an empty value stands for a flag.
    """
    changed = {_parameter_of(context, option) for option in changes}
    words = ["meft-plan"]
    if context.info_name != "plan":
        words.append(context.info_name or "")
    for parameter in context.command.params:
        if parameter.name not in changed and _was_given(context, parameter):
            words += _words(parameter, context.params[parameter.name or ""])
    for option, value in changes.items():
        words += [option, value] if value else [option]
    return shlex.join(words)


def _parameter_of(context: click.Context, option: str) -> str | None:
    for parameter in context.command.params:
        if option in (*parameter.opts, *parameter.secondary_opts):
            return parameter.name
    return None


def _was_given(context: click.Context, parameter: click.Parameter) -> bool:
    source = context.get_parameter_source(parameter.name or "")
    return source is click.core.ParameterSource.COMMANDLINE


def _words(parameter: click.Parameter, value: Any) -> list[str]:
    if isinstance(value, bool):
        options = parameter.opts if value else parameter.secondary_opts
        return [options[0]]
    text = format_size_argument(value) if isinstance(parameter.type, Size) else str(value)
    return [text] if isinstance(parameter, click.Argument) else [parameter.opts[0], text]
