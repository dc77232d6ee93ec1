"""Going on with other data than the checkpoint was made with is refused in words."""

from __future__ import annotations

import json
import shutil

import pytest
from processes import run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, plan_path, data):
    """The output folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("stopped")
    run("meft-run", plan_path, "--data", data, "--steps", 2, "--output-dir", folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "has 36 examples then, 35 now; give the same data and options"),
        (lambda lines: [lines[0].replace("alice", "Bob"), *lines[1:]], "has as many examples, 36, but other tokens"),
    ],
)
def test_what_changed_is_said(change, message, stopped, plan_path, data, tmp_path) -> None:
    other, folder = tmp_path / "other.jsonl", tmp_path / "out"
    shutil.copytree(stopped, folder)
    other.write_text("".join(line + "\n" for line in change(data.read_text().splitlines())))
    done = run("meft-run", plan_path, "--data", other, "--resume", "--steps", 4, "--output-dir", folder, expect=2)
    line = done.stderr.splitlines()[-1]
    assert "the data is not what the checkpoint was made with: " in line
    assert f"{other} (it was {data} then) {message}" in line
    assert "--overwrite" in line


def test_older_checkpoints_do_not_say_how_many_they_had(stopped, plan_path, data, tmp_path) -> None:
    from meft.runtime.session.checkpoint import TRAINING_STATE, TrainingState

    folder = tmp_path / "out"
    shutil.copytree(stopped, folder)
    path = next(folder.glob("checkpoint-*")) / TRAINING_STATE
    state = TrainingState.load(path).model_copy(update={"data": "", "num_examples": 0})
    state.save(path)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    done = run("meft-run", plan_path, "--data", other, "--resume", "--steps", 4, "--output-dir", folder, expect=2)
    assert f"{other} has 1 examples, which are not those of then" in done.stderr
