"""The demo: plan for SmolLM2-135M under a small device budget, train on airport facts, compare plan and measurement.

Runs the commands that a user would type, each shown before it runs. The device is the emulated one, so that it works
without a GPU: the same code, with every device byte counted and the budget enforced.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click

from meft.planner.base.errors import MeftError
from meft.runtime.data.embedded import smollm2_folder

SCRIPTS = Path(__file__).parent
BIN = Path(sys.executable).parent


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--gpu-mem", default="1GB", show_default=True, help="Device budget, as meft-plan takes it.")
@click.option("--steps", type=click.IntRange(min=1), default=60, show_default=True, help="Micro-batches to train.")
@click.option("--questions", type=click.IntRange(min=1), default=200, show_default=True, help="Airport facts.")
@click.option(
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Where the plan, the report, the adapter and the pictures go.",
)
def main(gpu_mem: str, steps: int, questions: int, output_dir: Path) -> None:
    """Plan, run and audit on the embedded model; takes a few minutes on two cores."""
    started = time.monotonic()
    try:
        smollm2_folder(click.echo)
    except MeftError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(error.exit_code) from error
    for title, command in _commands(gpu_mem, steps, questions, output_dir):
        _run(title, command)
    _say_what_is_left(output_dir, time.monotonic() - started)


def _commands(gpu_mem: str, steps: int, questions: int, folder: Path) -> list[tuple[str, list[str]]]:
    plan, data, report = str(folder / "plan.json"), str(folder / "airports.jsonl"), str(folder / "report.json")
    make_questions = [sys.executable, os.path.relpath(SCRIPTS / "make_airport_questions.py")]
    facts = [*make_questions, "--num", str(questions), "-o", data]
    find_plan = ["meft-plan", "--model", "smollm2-135m", "--gpu", "emulated", "--gpu-mem", gpu_mem]
    find_plan += ["--batch-size", "4", "--seq-len", "64", "--grad-accum", "2", "--top-k", "32"]
    find_plan += ["--sparsity", "smollm2-airports", "-o", plan, "--plot", str(folder / "plan.png")]
    train = ["meft-run", plan, "--data", data, "--device", "emulated", "--steps", str(steps)]
    train += ["--learning-rate", "2e-3", "--warmup", "0.1", "--output-dir", str(folder), "--overwrite"]
    return [
        ("Facts that the model does not know", facts),
        ("What fits the budget?", find_plan),
        ("Train as planned, and measure", train),
        ("Was the plan right?", ["meft-plan", "audit", plan, report]),
    ]


def _run(title: str, command: list[str]) -> None:
    """Show and run one command; its exit code ends the demo when it is not 0."""
    program, *arguments = command
    name = "python" if program == sys.executable else program
    click.secho(f"\n{title}", bold=True)
    click.secho(f"$ {shlex.join([name, *arguments])}", fg="cyan")
    sys.stdout.flush()
    # The environment need not be active: its commands are beside its interpreter (joining an absolute path keeps that).
    code = subprocess.run([BIN / program, *arguments], check=False).returncode
    if code != 0:
        click.echo(f"Error: {name} ended with exit code {code}", err=True)
        raise SystemExit(code)


def _say_what_is_left(folder: Path, seconds: float) -> None:
    click.secho(f"\nDone in {seconds / 60:.1f} minutes. In {folder}:", bold=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            click.echo(f"  {path.relative_to(folder)}  {path.stat().st_size / 2**10:,.0f} KiB")


if __name__ == "__main__":
    main()
