"""``meft-run`` on the tiny model in this process: its exit code, and its one line of error."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from sessions import small_plan

from meft.planner.base.errors import MeftError
from meft.runtime.cli.run import command

WORDS = ("alice", "rabbit", "queen", "hatter")


class SmallRuns:
    """A plan (two micro-batches per optimizer step) and four facts in a folder, and runs of them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.plan = small_plan(model, choice={"top_k": 16}, seq_len=24, grad_accum=2)
        self.plan.save(folder / "plan.json")
        self.facts = folder / "facts.jsonl"
        facts = [{"prompt": f"The {word} said to", "completion": f" the {word}"} for word in WORDS]
        self.facts.write_text("".join(json.dumps(fact) + "\n" for fact in facts))

    def run(self, output: Path, *options: object) -> tuple[int, str]:
        """Exit code and error (or, without one, what went to standard error)."""
        words = [self.folder / "plan.json", "--model", self.model, "--data", self.facts, "--output-dir", output]
        words += ["--device", "emulated"]
        try:
            result = CliRunner().invoke(
                command,
                [str(word) for word in (*words, "--learning-rate", "1e-2", *options)],
                catch_exceptions=False,
                standalone_mode=False,
            )
        except MeftError as error:
            return error.exit_code, str(error)
        return 0, result.stderr
