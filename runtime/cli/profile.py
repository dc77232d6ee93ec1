"""``meft-profile``: measure this machine, a model's sparsity, or correct profiles by what runs observed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meft.planner.base.errors import MeftError, UsageError
from meft.planner.base.files import writing
from meft.planner.base.units import format_bytes
from meft.planner.base.version import VERSION
from meft.planner.records.plan import Plan
from meft.planner.records.report import Report
from meft.runtime.cli.run import run_command

if TYPE_CHECKING:
    from meft.planner.check.calibrate import ErrorRow
    from meft.planner.check.rates import Run
    from meft.planner.predict.prediction import ProfileSet
    from meft.planner.records.profile_file import ProfileFile
    from meft.runtime.profiling.gpu_check import PlanCheck
    from meft.runtime.profiling.hardware import Tell

PROGRAM = "meft-profile"
WIDTH_WITHOUT_TERMINAL = 160
_PATH = click.Path(path_type=Path)
_OUTPUT = click.option(
    "-o", "--output", type=_PATH, required=True, help="Where to write it; meft-plan reads it by --gpu FILE and others."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name=PROGRAM)
def command() -> None:
    """Measure what plans rest on, and let reports of runs correct it.

    Exit codes: 0 done, 1 unexpected, 2 usage or a bad file, 4 this machine cannot do it.
    """


@command.command()
@_OUTPUT
def hardware(output: Path) -> None:
    """Measure this machine: host, GPU and link, in less than a minute.

    Plan with `meft-plan --gpu FILE`. Without a GPU the emulated device is measured.
    """
    from meft.runtime.profiling.hardware import measure_hardware

    with _progress() as tell:
        measured = measure_hardware(tell, meft_version=VERSION)
    measured.save(output)
    show_measurements(measured)
    _say_how_to_plan(measured, output)


@command.command()
@click.option("--model", required=True, metavar="DIR|smollm2", help="Folder of a Hugging Face causal LM, or smollm2.")
@click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="FILE|airports|factbook",
    help="JSONL as meft-run reads it, or facts that come inside packages. May be given several times.",
)
@click.option("--text", "as_text", is_flag=True, help="The files are plain text.")
@click.option("--raw", is_flag=True, help="Join prompt and completion as they stand, without the chat template.")
@click.option("--adapter", type=_PATH, help="A trained adapter's folder instead of the model's own FFN rows.")
@click.option("--seq-len", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens of a sequence.")
@click.option(
    "--tokens",
    type=click.IntRange(min=2048),
    default=8192,
    show_default=True,
    help="In each of two halves, in groups of 2048; each half judges the law of the other.",
)
@_OUTPUT
def sparsity(output: Path, **given: Any) -> None:
    """Measure how many adapter rows real text activates in a model, and how well look-ahead finds them.

    Plan with `meft-plan --sparsity FILE`.
    """
    from meft.runtime.profiling.sparsity_profile import SparsityRequest, measure_sparsity

    with _progress() as tell:
        measured, error = measure_sparsity(SparsityRequest(**given), tell, meft_version=VERSION)
    measured.save(output)
    show_measurements(measured)
    click.echo(
        f"on text and {error.points} points (T, K, R) that the fit did not see, a layer's rows are {error.mean:.1%} "
        f"off in the mean, {error.worst_point:.1%} at the worst point; all layers' together {error.worst_total:.1%} at "
        f"most"
    )
    _say_how_to_plan(measured, output)


@command.command()
@click.argument("files", nargs=-1, type=_PATH, metavar="PLAN REPORT [PLAN REPORT]...")
@_OUTPUT
def calibrate(files: tuple[Path, ...], output: Path) -> None:
    """Correct profiles by runs: each PLAN with the REPORT of its run, all of one model on one device.

    Shows how far predictions were off before, and how far profiles corrected by the other runs are. Plan with
    `meft-plan --gpu FILE`.
    """
    from meft.planner.check.calibrate import calibrate as correct

    runs = _runs(files)
    profiles = _profiles_of(runs[0].plan)
    calibration = correct(runs, profiles)
    corrected = calibration.profiles
    file = _calibrated_file(calibration.notes, corrected)
    file.save(output)
    _show_errors(calibration.errors)
    for note in calibration.notes:
        click.echo(f"note: {note}")
    _say_how_to_plan(file, output)


@command.command("gpu-check")
@click.option("-o", "--output", type=_PATH, required=True, help="JSON; a page of text and traces go beside it.")
def gpu_check(output: Path) -> None:
    """Check plans against this machine's GPU: a few 7B-shaped steps from random weights, at two budgets.

    No model hub is needed; ten minutes at most. Without a GPU it says what it skips and exits 0.
    """
    import torch

    from meft.runtime.profiling.gpu_check import GpuCheck
    from meft.runtime.profiling.hardware import describe_machine

    machine = describe_machine()
    plans: list[PlanCheck] = []
    skipped = [NO_GPU]
    if torch.cuda.is_available():
        plans, skipped = _checks_here(output)
    check = GpuCheck(machine.name, machine.versions, tuple(plans), tuple(skipped))
    with writing(output):
        check.save(output)
    click.echo(check.text(), nl=False)
    click.echo(f"wrote {output} and {output.with_suffix('.txt')}: attach both to an issue")


NO_GPU = "steps of plans, memory by the driver, overlap: torch sees no CUDA device here"
CHECKED_MODELS = ("llama-7b", "llama-3.2-3b", "llama-3.2-1b")
"""From the largest on; the first that a plan is found for is taken."""
BUDGETS = (0.95, 0.75)
"""Shares of the memory that is free on the card."""


def _checks_here(output: Path) -> tuple[list[PlanCheck], list[str]]:
    """Measure the machine, plan with what was measured, run each plan; and what could not be done."""
    import torch

    from meft.planner.models.catalogue import load_model
    from meft.runtime.device.device import CudaDevice
    from meft.runtime.device.nvml import NvmlReader
    from meft.runtime.profiling.gpu_check import check_plan
    from meft.runtime.profiling.hardware import measure_hardware

    nvml = NvmlReader.open(torch.cuda.current_device())
    profile = output.with_suffix(".hardware.json")
    with _progress() as tell:
        measure_hardware(tell, meft_version=VERSION).save(profile)
    free_bytes, _ = torch.cuda.mem_get_info()
    checks: list[PlanCheck] = []
    skipped: list[str] = []
    for share in BUDGETS:
        plan = _first_plan(profile, round(share * free_bytes), skipped)
        if plan is None:
            continue
        _, config, _ = load_model(plan.request.model.name)
        trace = output.with_suffix(f".trace-{len(checks) + 1}.json")
        try:
            checks.append(check_plan(plan, config, make_device=CudaDevice, nvml=nvml, trace=trace))
        except MeftError as error:
            skipped.append(f"{plan.request.model.name} at {format_bytes(plan.request.gpu_mem_bytes)}: {error}")
    nvml.close()
    return checks, skipped


def _first_plan(profile: Path, gpu_mem_bytes: int, skipped: list[str]) -> Plan | None:
    """The plan of the largest of the models that fits; notes what did not."""
    import meft

    for model in CHECKED_MODELS:
        try:
            return meft.plan(model=model, gpu=str(profile), gpu_mem=gpu_mem_bytes, grad_accum=1)
        except MeftError as error:
            skipped.append(f"{model} at {format_bytes(gpu_mem_bytes)}: {str(error).splitlines()[0]}")
    return None


def _runs(files: tuple[Path, ...]) -> list[Run]:
    from meft.planner.check.rates import Run

    if not files or len(files) % 2:
        raise UsageError(
            f"{len(files)} files were given; give a plan and the report of its run, once or several times: "
            f"{PROGRAM} calibrate plan.json report.json -o FILE"
        )
    return [Run(Plan.load(plan), Report.load(report)) for plan, report in zip(files[::2], files[1::2], strict=True)]


def _profiles_of(plan: Plan) -> ProfileSet:
    """The profiles that the plan rests on, unchanged since; else a :class:`UsageError`."""
    from meft.planner.predict.prediction import ProfileSet

    profiles = ProfileSet.of(plan.request)
    for used in plan.inputs.profiles:
        found = getattr(profiles, used.kind, None)
        if found is not None and found.content_digest() != used.digest:
            raise UsageError(
                f"the {used.kind} profile {used.name} is not the one that the plan was made with; give runs of plans "
                f"that this version and these files make"
            )
    return profiles


def _calibrated_file(notes: tuple[str, ...], profiles: ProfileSet) -> ProfileFile:
    from meft.planner.records.profile_file import ProfileFile
    from meft.runtime.profiling.hardware import describe_machine

    return ProfileFile(
        meft_version=VERSION,
        machine=describe_machine(),
        measurements=(),
        warnings=notes,
        host=profiles.host,
        gpu=profiles.gpu,
        link=profiles.link,
        sparsity=profiles.sparsity,
    )


def _show_errors(errors: tuple[ErrorRow, ...]) -> None:
    """Before and after, each run predicted by profiles that the others corrected."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    if not errors:
        click.echo("one run: there is no other to judge its corrections by")
        return
    console = Console(highlight=False)
    console.print("Predicted over observed less one; after: by profiles that the other runs corrected", soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "quantity", "observed", "before", "after"):
        table.add_column(name, justify="left" if name == "quantity" else "right")
    for row in errors:
        table.add_row(str(row.run), row.quantity, f"{row.observed:,.6g}", f"{row.before:+.1%}", f"{row.after:+.1%}")
    console.print(table)


def show_measurements(file: ProfileFile) -> None:
    """Every measurement with its spread, then the warnings, on standard output."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_WITHOUT_TERMINAL
    console.print(file.machine.name, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("what", "median", "quartiles", "n", "with"):
        table.add_column(name, justify="right" if name in ("median", "n") else "left")
    for each in file.measurements:
        low, median, high = (_shown(value, each.unit) for value in (each.low_quartile, each.median, each.high_quartile))
        table.add_row(each.name, f"{median}{_unit(each.unit)}", f"{low} to {high}", str(each.repetitions), each.detail)
    console.print(table)
    for warning in file.warnings:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)


def _unit(unit: str) -> str:
    return {"share": "", "rows": ""}.get(unit, f" {unit}")


def _shown(value: float, unit: str) -> str:
    """A share as percent, rows in full, anything else with three digits and an SI prefix."""
    if unit == "share":
        return f"{value:.1%}"
    if unit == "rows":
        return f"{value:,.0f}"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{prefix}"
    return "0" if value == 0 else f"{value / 1e-6:.3g}u"


def _say_how_to_plan(file: ProfileFile, output: Path) -> None:
    options = f"--gpu {output}" if file.gpu is not None else f"--sparsity {output}"
    memory = " --gpu-mem 2GB" if file.gpu is not None and file.gpu.memory_total_bytes is None else ""
    click.echo(f"wrote {output} with {', '.join(file.sections())}; plan with: meft-plan {options}{memory}")


@contextmanager
def _progress() -> Iterator[Tell]:
    """A bar on a terminal, a line per stage elsewhere; on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:

        def line(what: str, stage: int, stages: int) -> None:
            if stage < stages:
                console.print(f"{PROGRAM}: {what} ({stage + 1}/{stages})", soft_wrap=True, markup=False)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=None)

        def advance(what: str, stage: int, stages: int) -> None:
            bar.update(task, description=what, completed=stage, total=stages)

        yield advance


def main() -> None:
    """Entry point: every error a user can cause is one line on standard error and a documented exit code."""
    run_command(command, PROGRAM, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    main()
