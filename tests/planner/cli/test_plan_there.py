"""``meft-plan -o``: what is there already is not lost without a word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from meft.planner.cli.main import command
from meft.planner.records.plan import Plan

REPLACED = "held another plan, which this one has replaced"


def plan(path: Path, *options: object) -> Result:
    words = ["--gpu-mem", "24GB", "--host-mem", "64GB", "--adapter-width", 1024, "-o", path, *options]
    return CliRunner().invoke(command, [str(word) for word in words])


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_another_plan_is_replaced_and_that_is_said(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = tmp_path / "plan.json"
    assert REPLACED not in plan(path).stderr
    assert REPLACED not in plan(path, *options).stderr  # the same plan
    done = plan(path, "--top-k", 32, *options)
    assert done.stderr == f"meft-plan: {path} {REPLACED}\n"
    assert REPLACED not in done.stdout
    assert Plan.load(path).decision.top_k == 32


@pytest.mark.parametrize("text", ["notes", "{", '{"a": 1}', "[1]", ""])
def test_what_is_no_plan_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    done = plan(path)
    assert done.exit_code == 2
    assert done.stderr == (
        f"meft-plan: -o {path}: what is there is no plan, and would be lost; remove it, or choose another name\n"
    )
    assert path.read_text() == text


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """A rename over /dev/null would be."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert plan(pipe).exit_code == 2
    assert pipe.is_fifo()
