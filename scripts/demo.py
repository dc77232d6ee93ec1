"""The demo: plan for SmolLM2-135M under a small device budget, train on airport facts, compare plan and measurement.

Runs the commands that a user would type, each shown before it runs; three of the questions are asked before and after.
The device is the emulated one, so that it works without a GPU: the same code, with every device byte counted and the
budget enforced.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

from meft.planner.base.errors import MeftError
from meft.planner.base.units import format_bytes
from meft.runtime.data.embedded import smollm2_folder

ASKED = 3
"""Questions that are asked before and after training."""
SCRIPTS = Path(__file__).parent
BIN = Path(sys.executable).parent


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--gpu-mem", default="1GB", show_default=True, help="Device budget, as meft-plan takes it.")
@click.option("--steps", type=click.IntRange(min=1), default=48, show_default=True, help="Micro-batches to train.")
@click.option("--questions", type=click.IntRange(min=ASKED), default=24, show_default=True, help="Airport facts.")
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
    plan, data, report = output_dir / "plan.json", output_dir / "airports.jsonl", output_dir / "report.json"
    _run("Facts that the model does not know", _make_facts(questions, data))
    _run(f"What does the model say to {ASKED} of them?", _ask(data))
    _run("What fits the budget?", _find_plan(plan, gpu_mem))
    _run("Train as planned, and measure", _train(plan, data, steps, output_dir))
    _run("Was the plan right?", ["meft-plan", "audit", str(plan), str(report)])
    _run("What does it say now?", [*_ask(data), "--adapter", str(output_dir)])
    _say_what_was_right(data)
    _keep_one_copy(output_dir)
    _say_what_is_left(output_dir, time.monotonic() - started)


def _make_facts(questions: int, data: Path) -> list[str]:
    script = os.path.relpath(SCRIPTS / "make_airport_questions.py")
    return [sys.executable, script, "--num", str(questions), "-o", str(data)]


def _ask(data: Path) -> list[str]:
    number = str(ASKED)
    return ["meft-run", "evaluate", str(data), "--eval-limit", number, "--show", number, "--max-new-tokens", "12"]


def _find_plan(plan: Path, gpu_mem: str) -> list[str]:
    command = ["meft-plan", "--model", "smollm2-135m", "--gpu", "emulated", "--gpu-mem", gpu_mem]
    command += ["--batch-size", "4", "--seq-len", "64", "--grad-accum", "2", "--top-k", "32"]
    return [*command, "--sparsity", "smollm2-airports", "-o", str(plan), "--plot", str(plan.with_suffix(".png"))]


def _train(plan: Path, data: Path, steps: int, folder: Path) -> list[str]:
    command = ["meft-run", str(plan), "--data", str(data), "--device", "emulated", "--steps", str(steps)]
    command += ["--learning-rate", "2e-3", "--warmup", "0.1", "--save-every", "0"]
    return [*command, "--output-dir", str(folder), "--overwrite"]


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


def _say_what_was_right(data: Path) -> None:
    answers = [json.loads(line)["completion"] for line in data.read_text(encoding="utf-8").splitlines()[:ASKED]]
    click.echo(f"(right: {', '.join(answers)})")


def _keep_one_copy(folder: Path) -> None:
    """The checkpoint holds the adapter too, with the optimizer's state: training could go on from it."""
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        title = f"The adapter is trained; what --resume would need goes ({size / 2**20:,.0f} MiB)"
        click.secho(f"\n{title}", bold=True)
        click.secho(f"$ rm -r {shlex.quote(str(checkpoint))}", fg="cyan")
        shutil.rmtree(checkpoint)


def _say_what_is_left(folder: Path, seconds: float) -> None:
    click.secho(f"\nDone in {seconds / 60:.1f} minutes. In {folder}:", bold=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            click.echo(f"  {path.relative_to(folder)}  {format_bytes(path.stat().st_size)}")


if __name__ == "__main__":
    main()
