"""Options of other tools are told by what they are called here."""

from __future__ import annotations

import click
import pytest

from meft.planner.base.options import OF_THE_PLAN, OF_THE_RUN, as_typed, option_hint

RUN = ["--learning-rate", "--steps", "--output-dir", "--gpu-mem", "--data", "--max-grad-norm", "--resume"]
PLAN = [
    "--gpu-mem",
    "--host-mem",
    "--seq-len",
    "--batch-size",
    "--adapter-width",
    "--output",
    "--model",
    "--grad-accum",
]


@pytest.mark.parametrize(
    ("given", "known", "program", "hint"),
    [
        ("--lr", RUN, "meft-run", "did you mean --learning-rate?"),
        ("--learning_rate", RUN, "meft-run", "did you mean --learning-rate?"),
        ("--lr=1e-3", RUN, "meft-run", "did you mean --learning-rate?"),
        ("-lr", RUN, "meft-run", "did you mean --learning-rate?"),
        ("--num_train_epochs", RUN, "meft-run", "did you mean --steps?"),
        ("--epochs", [*RUN, "--epochs"], "meft-run", "did you mean --epochs?"),
        ("--output", RUN, "meft-run", "did you mean --output-dir?"),
        ("--output_dir", PLAN, "meft-plan", "did you mean --output?"),
        ("--bs", RUN, "meft-run", "the plan decides that: meft-plan --batch-size"),
        ("--max_length", RUN, "meft-run", "the plan decides that: meft-plan --seq-len"),
        ("--bs", PLAN, "meft-plan", "did you mean --batch-size?"),
        ("--vram", PLAN, "meft-plan", "did you mean --gpu-mem?"),
        ("--gpu-memory", PLAN, "meft-plan", "did you mean --gpu-mem?"),
        ("--max-length", PLAN, "meft-plan", "did you mean --seq-len?"),
        ("--rank", PLAN, "meft-plan", "did you mean --adapter-width?"),
        ("--rank", [*PLAN, "--target-modules"], "meft-plan", "did you mean --adapter-width?"),
        ("--gradient_accumulation_steps", PLAN, "meft-plan", "did you mean --grad-accum?"),
        ("--lr", PLAN, "meft-plan", "that is told to the run: meft-run plan.json --learning-rate"),
        ("--setps", RUN, "meft-run", "did you mean --steps?"),
        ("--bananas", RUN, "meft-run", ""),
    ],
)
def test_hints(given: str, known: list[str], program: str, hint: str) -> None:
    assert option_hint(given, known, program=program) == hint


def test_the_whole_word_of_a_short_option() -> None:
    assert as_typed("-l", ["plan.json", "-lr", "1e-3"]) == "-lr"
    assert as_typed("--lr", ["--lr"]) == "--lr"
    assert as_typed("-x", ["plan.json"]) == "-x"


def options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


def test_what_another_command_is_said_to_take_it_takes() -> None:
    from meft.planner.cli.plan import plan_command
    from meft.runtime.cli.run import train_command

    assert set(OF_THE_PLAN) <= options(plan_command)
    assert set(OF_THE_RUN) <= options(train_command)
    assert not set(OF_THE_RUN) & options(plan_command)
    assert not set(OF_THE_PLAN) & options(train_command)
