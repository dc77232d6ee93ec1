"""``meft-run``: execute a plan, measure it, and put prediction and observation side by side.

Training is the default command; what uses its result is in :mod:`meft.runtime.cli.use`.
"""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from meft.planner.base.errors import EXIT_UNEXPECTED, MeftError, UsageError
from meft.planner.base.options import one_line
from meft.planner.base.packages import missing_package
from meft.planner.base.units import format_bytes, format_seconds, parse_bytes
from meft.planner.base.version import VERSION
from meft.planner.records.plan import Plan
from meft.planner.records.report import Comparison, Report
from meft.runtime.cli.baseline import baseline_command
from meft.runtime.cli.compare import compare_command
from meft.runtime.cli.data import data_options, known_tokens_option, prepare_command, reading_options
from meft.runtime.cli.display import display_of
from meft.runtime.cli.export import export_command
from meft.runtime.cli.prune import prune_command
from meft.runtime.cli.use import adapter_folder, evaluate_command, evaluation_options, generate_command
from meft.runtime.data.metrics import evaluation_line
from meft.runtime.ranks.launch import end, launch, ranks_to_launch, wait_for_first_rank
from meft.runtime.training.interrupts import Interrupts, no_interrupt_ignored

if TYPE_CHECKING:  # torch is loaded only once there is a plan to run
    from meft.runtime.training.options import RunOptions
    from meft.runtime.use.evaluation import EvaluationOptions

DEFAULT_COMMAND = "train"
EXIT_INTERRUPTED = 130
INTERRUPTED = "interrupted; the last checkpoint is in the output folder, if one was due"
_PATH = click.Path(path_type=Path)
_LABELS = {
    "device_allocated_bytes": "device memory, allocated peak",
    "device_reserved_bytes": "device memory, reserved peak",
    "device_process_bytes": "device memory, whole process (NVML)",
    "host_adapter_bytes": "host memory of the adapter",
    "h2d_bytes_per_step": "host to device, per step",
    "d2h_bytes_per_step": "device to host, per step",
    "active_rows_per_layer": "active rows per layer",
    "step_seconds": "step time",
}


class RunGroup(click.Group):
    """A group whose default command is to run a plan: ``meft-run plan.json``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """What is no command is a plan."""
        own = {"--version", *self.get_help_option_names(ctx)}
        if args and args[0] not in own and args[0] not in self.commands:
            self._refuse_misspelt(args[0])
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)

    def _refuse_misspelt(self, word: str) -> None:
        """What is no file and nearly a command is one, misspelt."""
        near = difflib.get_close_matches(word, self.commands, n=1, cutoff=0.75)
        if near and not Path(word).exists():
            raise UsageError(f"{word}: no such plan and no such command; did you mean {near[0]}?")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options of running a plan, the group's own, and the commands."""
        with click.Context(self.commands[DEFAULT_COMMAND], parent=ctx, info_name=DEFAULT_COMMAND) as run:
            records = [record for param in run.command.get_params(run) if (record := param.get_help_record(run))]
        with formatter.section("Options of running a plan, the default command"):
            formatter.write_dl([record for record in records if not record[0].startswith("-h")])
        super().format_options(ctx, formatter)


@click.command(DEFAULT_COMMAND, short_help="Train as the plan says, and compare (the default).")
@click.argument("plan", type=_PATH)
@click.option("--model", help="Folder of the model [default: where the plan found it].")
@data_options
@click.option("--replay", type=_PATH, help="Ordinary text (JSONL) to train on beside the data: less is forgotten.")
@click.option("--replay-share", type=float, help="Of the examples, those that are replayed.  [default: 0.1]")
@known_tokens_option
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Micro-batches in all; more than before makes a resumed run longer.  [default: 100; --resume: as before]",
)
@click.option(
    "--epochs",
    type=click.FloatRange(min=0, min_open=True),
    help="Times through the data instead of --steps, 0.5 for half of it.",
)
@click.option("--output-dir", type=_PATH, default=Path("output"), show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the adapter and checkpoints of an earlier run there.")
@click.option("--adapter", type=_PATH, help="Start from this trained adapter instead of a fresh one.")
@click.option("--device", type=click.Choice(["auto", "cuda", "emulated"]), default="auto", show_default=True)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    help="Ranks on this machine, each with a device, that share one host store.  [default: the plan's]",
)
@click.option(
    "--nodes",
    type=click.IntRange(min=1),
    help="Machines with as many ranks each; torchrun begins them.  [default: the plan's]",
)
@click.option("--gpu-mem", help="Another device budget than the plan's, e.g. 20GiB.")
@click.option("--rehearse", is_flag=True, help="One step under fake tensors: books without weights, data or GPU.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the newest checkpoint in --output-dir; with more steps, at the rates of a run of so many.",
)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=1e-4, show_default=True)
@click.option("--warmup", type=click.FloatRange(0, 1), default=0.02, show_default=True, help="Fraction of the steps.")
@click.option("--weight-decay", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--max-grad-norm", type=click.FloatRange(min=0), default=1.0, show_default=True, help="0: no clipping.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--key-init",
    type=click.Choice(["random", "ffn"]),
    default="random",
    show_default=True,
    help="Where the adapter's keys begin: anywhere, or at rows of the model's own FFN.",
)
@click.option(
    "--save-every",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="Optimizer steps between checkpoints; 0: only at the end.",
)
@click.option(
    "--divergence-factor",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    help="Stop when the loss is so many times the first ones for 20 optimizer steps; 0: never.",
)
@click.option(
    "--schedule",
    type=click.Choice(["overlapped", "sequential"]),
    default="overlapped",
    show_default=True,
    help="Transfers, host and device at once, or one after the other; the results are the same.",
)
@click.option(
    "--link-gbps",
    type=click.FloatRange(min=0, min_open=True),
    help="Emulated device: slow each direction of the link down to so many GB/s.",
)
@click.option(
    "--bind-cores/--no-bind-cores",
    default=None,
    help="Keep the host's kernels on cores of their own, near the GPU, apart from Python and the copies. "
    "[default: as planned]",
)
@click.option("--trace", type=_PATH, help="Write the last step's tasks as a Chrome trace (chrome://tracing, Perfetto).")
@click.option("--eval", "eval_task", metavar="FILE|NAME", help="Score the adapter on it: see meft-run evaluate.")
@evaluation_options
@click.option(
    "--eval-every",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Optimizer steps between evaluations; 0: only at the end.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    help="Stop after so many evaluations in a row that were no better than the best; adapter-best has that one.",
)
@click.option("--log", type=_PATH, help="Append a line of JSON per step, optimizer step, checkpoint and evaluation.")
@click.option("--tensorboard", type=_PATH, help="Folder for TensorBoard's files (needs the package tensorboard).")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of a table.")
@click.pass_obj
def train_command(noted: Interrupts | None, /, plan: Path, as_json: bool, rehearse: bool, **given: Any) -> None:
    """Run PLAN and compare what it needs with what was predicted.

    Writes report.json, the adapter and a checkpoint to --output-dir. A step is one micro-batch; the plan's
    grad_accum of them make one optimizer step. The learning rate rises over --warmup and falls to zero at the last
    step. Exit codes: 0 done, 1 unexpected, 2 usage or a bad file, 4 this machine cannot run the plan (its disk
    included), or the device budget was exceeded, 130 and 143 interrupted after a checkpoint.
    """
    with (noted or Interrupts()).installed() as interrupts:
        interrupts.check()
        loaded = Plan.load(plan)
        gpus = ranks_to_launch(given.pop("gpus"), given.pop("nodes"), loaded, rehearse=rehearse)
        if given["adapter"] is not None:
            given["adapter"] = adapter_folder(given["adapter"])
        options = _options(given)
        from meft.runtime.training.runner import check_run, run_rehearsal, run_training

        interrupts.check()
        if gpus > 1:
            check_run(loaded, options, ranks=gpus)
            sys.exit(launch(sys.argv[1:], ranks=gpus))
        with display_of(interrupts) as display:
            report = (run_rehearsal if rehearse else run_training)(loaded, options, display)
        if report is None:
            interrupts.check_trained()
            return
        if as_json:
            click.echo(report.to_json(), nl=False)
        else:
            print_report(report, options.output_dir / "report.json")
        interrupts.check_trained()


COMMANDS = [
    train_command,
    baseline_command,
    compare_command,
    evaluate_command,
    generate_command,
    prepare_command,
    export_command,
    prune_command,
]


@click.group(
    cls=RunGroup,
    commands=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    options_metavar="",
    subcommand_metavar="PLAN [OPTIONS] | COMMAND [OPTIONS]",
)
@click.version_option(VERSION, prog_name="meft-run")
@click.pass_context
def command(ctx: click.Context) -> None:
    """Run PLAN, compare what it needs with what was predicted, and use what it learnt.

    Exit codes: 0 done, 1 unexpected, 2 usage or a bad file, 4 this machine cannot run the plan, or the device budget
    was exceeded, 130 and 143 interrupted.
    """
    noted: Interrupts | None = ctx.obj
    if noted is not None and ctx.invoked_subcommand != DEFAULT_COMMAND:
        noted.hand_back()


def main(noted: Interrupts | None = None) -> None:
    """Run the program; ``noted`` has noted signals so far, see :mod:`meft.runtime.cli.start`."""
    run_command(command, "meft-run", interrupted=INTERRUPTED, obj=noted)


def run_command(command: click.Command, program: str, *, interrupted: str, obj: object = None) -> None:
    """Run a command: every error a user can cause is one line on standard error and a documented exit code."""
    try:
        with no_interrupt_ignored(program, interrupted):
            command.main(prog_name=program, standalone_mode=False, obj=obj)
    except (click.exceptions.Abort, KeyboardInterrupt):  # the second, where click has not begun or has ended
        _fail(program, interrupted, EXIT_INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        said = one_line(error, program=program, default_command=DEFAULT_COMMAND, arguments=sys.argv[1:])
        _fail(program, said, error.exit_code)
    except Exception as error:
        wait_for_first_rank()
        known = missing_package(error) or error
        if isinstance(known, MeftError):
            _fail(program, str(known), known.exit_code)
        if os.environ.get("MEFT_DEBUG"):
            raise
        _fail(program, f"unexpected {type(error).__name__}: {error} (MEFT_DEBUG=1 shows where)", EXIT_UNEXPECTED)


def print_report(report: Report, path: Path) -> None:
    """The comparison as a table, and what the run did, on standard output."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"Predicted against observed on the {report.device.name}", soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("quantity")
    for name in ("predicted", "observed", "ratio"):
        table.add_column(name, justify="right")
    for row in report.comparison:
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(_LABELS[row.quantity], _shown(row, row.predicted), _shown(row, row.observed), ratio)
    console.print(table)
    for line in _summary(report):
        console.print(line, soft_wrap=True)
    console.print(f"wrote {path}", soft_wrap=True)


def _summary(report: Report) -> list[str]:
    if report.rehearsal:
        return ["a rehearsal of one step: nothing was computed, the active rows are the plan's own"]
    losses, observed = report.training.loss_per_step, report.observed
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    steps = f"{report.training.steps} steps, {report.training.optimizer_steps} optimizer steps"
    lines = [f"loss {first:.3f} -> {last:.3f} (means of the first and last {tenth} of {steps})"]
    busiest = max(observed.active_rows, key=lambda layer: layer.max)
    if busiest.p99 is not None:
        counts = f"mean {busiest.mean:,.0f}, median {busiest.median:,.0f}, p99 {busiest.p99:,.0f}, max {busiest.max:,}"
        lines.append(f"active rows of the busiest layer, {busiest.layer}: {counts} over {observed.steps} steps")
    hot = sum(layer.hot_total or 0 for layer in observed.active_rows)
    if hot:
        share = hot / sum(layer.total for layer in observed.active_rows)
        lines.append(f"hot rows, on the device in {observed.hot_windows} windows, were {share:.1%} of all active rows")
    if observed.prefetch_recall not in (None, 1.0):
        lines.append(f"look-ahead routing found {observed.prefetch_recall:.1%} of the exact choice")
    if observed.dropped_rows:
        lines.append(f"active_rows_cap cost {observed.dropped_rows:,} rows: plan again with a higher cap if that hurts")
    dead = sum(layer.dead_experts for layer in report.expert_load)
    if dead:
        experts = sum(layer.num_experts for layer in report.expert_load)
        lines.append(f"{dead:,} of {experts:,} experts were never used: fewer experts, or more probes, would use them")
    if report.evaluations:
        lines.append(evaluation_line(report.evaluations[-1]))
    if observed.device_memory.process_bytes is None:
        lines.append(f"NVML: {observed.device_memory.process_bytes_source}")
    return lines


def _shown(row: Comparison, value: float) -> str:
    if row.quantity.endswith("_seconds"):
        return format_seconds(value)
    return f"{value:,.0f}" if row.quantity == "active_rows_per_layer" else format_bytes(value)


def _options(given: dict[str, Any]) -> RunOptions:
    from meft.runtime.host.optimizer import AdamWSettings
    from meft.runtime.training.options import DEFAULT_STEPS, Length, RunOptions
    from meft.runtime.training.training import TrainingOptions

    given |= reading_options(given)
    gpu_mem, patience, evaluation = given.pop("gpu_mem"), given.pop("patience"), _evaluation(given)
    if patience is not None and (evaluation is None or not evaluation.every):
        raise UsageError(
            f"--patience {patience}: counts evaluations; say what to evaluate with --eval and --eval-every"
        )
    length = Length(given.pop("steps"), given.pop("epochs"))
    if None not in (length.steps, length.epochs):
        raise UsageError(f"--steps {length.steps} and --epochs {length.epochs:g}: both say how long; give one of them")
    training = TrainingOptions(
        steps=length.steps or DEFAULT_STEPS,
        learning_rate=given.pop("learning_rate"),
        warmup_fraction=given.pop("warmup"),
        max_norm=given.pop("max_grad_norm") or None,
        seed=given.pop("seed"),
        save_every=given.pop("save_every"),
        patience=patience,
        divergence_factor=given.pop("divergence_factor"),
        known_token_weight=given.pop("known_token_weight"),
    )
    return RunOptions(
        training=training,
        length=length,
        settings=AdamWSettings(weight_decay=given.pop("weight_decay")),
        gpu_mem_bytes=None if gpu_mem is None else parse_bytes(gpu_mem, field="--gpu-mem"),
        evaluation=evaluation,
        **given,
    )


def _evaluation(given: dict[str, Any]) -> EvaluationOptions | None:
    """Take the options of an evaluation out; None without --eval, where they would mean nothing."""
    from meft.runtime.use.evaluation import EvaluationOptions

    task, every = given.pop("eval_task"), given.pop("eval_every")
    names = ("metric", "limit", "batch_size", "max_new_tokens", "rows_per_token", "min_score")
    values = {name: given.pop(name) for name in names}
    if task is not None:
        return EvaluationOptions(task, every=every, **values)
    if every or any(values[name] is not None for name in ("metric", "limit", "rows_per_token", "min_score")):
        options = "--metric, --eval-limit, --eval-every, --rows-per-token and --min-score"
        raise UsageError(f"{options} belong to --eval; say what to evaluate on")
    return None


def _fail(program: str, message: str, exit_code: int) -> NoReturn:
    click.echo(f"{program}: {message}", err=True)
    end(exit_code)
