"""Runs that go on: longer than they were, from a trained adapter, by epochs, until nothing improves; and their log."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from meft.planner.records.report import Report
from meft.runtime.host.optimizer import scheduled_learning_rate
from meft.runtime.session.checkpoint import TrainingState, latest_checkpoint
from meft.runtime.training.options import Length

PEAK = 1e-2


class Killed(BaseException):
    """Like SIGKILL, nothing on the way catches it."""


def report(folder: Path) -> Report:
    return Report.load(folder / "report.json")


def events(path: Path, name: str) -> list[dict]:
    return [event for event in map(json.loads, path.read_text().splitlines()) if event["event"] == name]


def rates(first: int, last: int, *, total: int) -> tuple[float, ...]:
    return tuple(
        scheduled_learning_rate(step, total_steps=total, peak=PEAK, warmup_fraction=0.02) for step in range(first, last)
    )


@pytest.fixture(scope="module")
def four(small, tmp_path_factory) -> Path:
    """A finished run of four steps, extended to eight."""
    folder = tmp_path_factory.mktemp("four") / "out"
    assert small.run(folder, "--steps", 4, "--log", folder.parent / "log.jsonl")[0] == 0
    assert small.run(folder, "--resume", "--steps", 8, "--log", folder.parent / "log.jsonl")[0] == 0
    return folder


def test_more_steps_make_a_run_longer_at_the_rates_of_the_longer_run(four) -> None:
    training = report(four).training
    assert training.steps == 8
    assert training.learning_rate_per_optimizer_step == rates(0, 2, total=2) + rates(2, 4, total=4)
    assert TrainingState.load(latest_checkpoint(four) / "training_state.json").total_steps == 8


def test_a_run_cannot_be_made_shorter_or_go_on_past_its_end(small, four) -> None:
    code, said = small.run(four, "--resume", "--steps", 6)
    assert code == 2
    assert said.endswith("the run was to be 8 steps long, now 6; it can be made longer, not shorter")


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_adapter(small, four) -> None:
    weights = (four / "adapter" / "meft_adapter.safetensors").read_bytes()
    shutil.rmtree(four / "adapter")
    code, said = small.run(four, "--resume")
    assert code == 2
    assert said == (
        f"--steps 8: the run is complete, and its adapter is in {four / 'adapter'}; give more steps to train on"
    )
    assert (four / "adapter" / "meft_adapter.safetensors").read_bytes() == weights


@pytest.mark.parametrize("before", ["adapter", "report"])
def test_a_run_killed_before_its_report_gets_adapter_and_report(small, tmp_path, monkeypatch, before) -> None:
    """With the evaluation that was due at the end; the report is the one of a run that nothing happened to."""
    task = ("--eval", small.facts, "--metric", "em", "--max-new-tokens", 2)
    assert small.run(tmp_path / "straight", "--steps", 4, *task)[0] == 0
    folder, place = tmp_path / "out", {"adapter": "_save_adapter", "report": "_save_report"}[before]

    def killed(*_args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"meft.runtime.training.runner.{place}", killed)
        with pytest.raises(Killed):
            small.run(folder, "--steps", 4, *task)
    assert not (folder / "report.json").exists()
    assert small.run(folder, "--resume", *task)[0] == 0
    ours, theirs = report(folder), report(tmp_path / "straight")
    for part in ("training", "device", "expert_load", "plan_digest"):
        assert getattr(ours, part) == getattr(theirs, part)
    for part in ("steps", "device_memory", "transfer", "active_rows", "prefetch_recall"):
        assert getattr(ours.observed, part) == getattr(theirs.observed, part)
    assert [each.scores for each in ours.evaluations] == [each.scores for each in theirs.evaluations]
    weights = "adapter/meft_adapter.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()
    assert "the run is complete" in small.run(folder, "--resume", *task)[1]


def test_a_longer_run_killed_before_its_report_gets_the_longer_one(small, tmp_path, monkeypatch) -> None:
    """The report that is there is the shorter run's."""
    folder = tmp_path / "out"
    assert small.run(folder, "--steps", 2)[0] == 0

    def killed(*_args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("meft.runtime.training.runner._save_report", killed)
        with pytest.raises(Killed):
            small.run(folder, "--resume", "--steps", 4)
    assert report(folder).training.steps == 2
    assert small.run(folder, "--resume")[0] == 0
    assert (report(folder).training.steps, report(folder).observed.steps) == (4, 2)


def test_a_run_killed_after_the_evaluation_that_ended_it_gets_its_report(small, tmp_path, monkeypatch) -> None:
    """Patience was at its end; its checkpoint is from before that evaluation, which is made up for."""
    from meft.runtime.training.training import Trainer

    folder, real = tmp_path / "out", Trainer._evaluate
    task = ("--eval", small.facts, "--metric", "em", "--eval-every", 1, "--max-new-tokens", 2, "--patience", 1)
    options = ("--learning-rate", 1e-9, "--save-every", 1, *task)

    def killed(self) -> None:
        if self.steps_done == 4:
            raise Killed
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", killed)
        with pytest.raises(Killed):
            small.run(folder, "--steps", 20, *options)
    for _ in range(2):  # the second finds the report, and the evaluation in the checkpoint
        code, said = small.run(folder, "--resume", *options)
        assert [each.optimizer_steps for each in report(folder).evaluations] == [1, 2]
        assert report(folder).training.steps == 4
    assert (code, said) == (2, "--patience 1: it ended this run after step 4; give a larger one to train on")


def test_a_complete_run_of_an_older_version_without_a_report_says_what_to_do(small, four, tmp_path) -> None:
    folder = shutil.copytree(four, tmp_path / "out")
    (folder / "report.json").unlink()
    (latest_checkpoint(folder) / "observed.json").unlink()
    code, said = small.run(folder, "--resume")
    assert code == 2
    assert said.endswith("does not say what a report needs; give more steps to train on")


def test_a_trained_adapter_is_where_a_run_starts(small, four, tmp_path) -> None:
    """The first loss is the trained adapter's; moments begin anew, so the run is not the resumed one."""
    code, said = small.run(tmp_path / "next", "--steps", 2, "--adapter", four / "adapter")
    assert code == 0
    assert f"starting from the adapter in {four / 'adapter'}" in said
    fresh, trained = report(four).training.loss_per_step[0], report(tmp_path / "next").training.loss_per_step[0]
    assert trained < 0.8 * fresh
    assert small.run(tmp_path / "out", "--adapter", four / "adapter", "--resume")[0] == 2
    assert small.run(tmp_path / "out", "--adapter", four / "adapter", "--key-init", "ffn")[0] == 2
    assert "is the folder of a model" in small.run(tmp_path / "out", "--adapter", small.model)[1]


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 2), (1, 4), (2.2, 8), (1e-9, 1)])
def test_epochs_are_times_through_the_data(epochs, steps) -> None:
    """Of seven examples in twos, one epoch is three and a half batches."""
    assert Length(epochs=epochs).total_steps(num_examples=7, batch_size=2, before=None) == steps


def test_the_length_of_a_run_without_one() -> None:
    assert Length().total_steps(num_examples=7, batch_size=2, before=None) == 100
    assert Length().total_steps(num_examples=7, batch_size=2, before=40) == 40


def test_epochs_on_the_command_line(small, tmp_path) -> None:
    """Four examples in twos: an epoch and a half is three steps."""
    assert small.run(tmp_path / "out", "--epochs", 1.5)[0] == 0
    assert report(tmp_path / "out").training.steps == 3
    code, said = small.run(tmp_path / "out", "--epochs", 1.5, "--steps", 3)
    assert (code, said) == (2, "--steps 3 and --epochs 1.5: both say how long; give one of them")


def test_a_run_ends_when_its_evaluations_no_longer_improve(small, tmp_path) -> None:
    """Nothing is learnt at a rate of nearly nothing: the first evaluation stays the best."""
    folder, log = tmp_path / "out", tmp_path / "log.jsonl"
    task = ("--eval", small.facts, "--metric", "em", "--eval-every", 1, "--max-new-tokens", 2, "--patience", 2)
    code, said = small.run(folder, "--steps", 20, "--learning-rate", 1e-9, *task, "--log", log)
    assert code == 0
    assert "stopped after step 6: 2 evaluations in a row were no better" in said
    assert f"the best evaluation was after optimizer step 1; its adapter: {folder / 'adapter-best'}" in said
    assert [each.optimizer_steps for each in report(folder).evaluations] == [1, 2, 3]
    assert (folder / "adapter-best" / "meft_config.json").is_file()
    assert latest_checkpoint(folder).name == "checkpoint-00000006"
    assert events(log, "end") == [{"event": "end", "step": 6, "reason": "patience"}]
    code, said = small.run(folder, "--resume", "--learning-rate", 1e-9, *task)
    assert code == 2
    assert said == "--patience 2: it ended this run after step 6; give a larger one to train on"
    code, said = small.run(folder, "--resume", "--learning-rate", 1e-9, *task[:-1], 3)
    assert code == 0
    assert [each.optimizer_steps for each in report(folder).evaluations] == [1, 2, 3, 4]


def test_an_evaluation_that_a_kill_left_out_is_made_up_for(small, tmp_path, monkeypatch) -> None:
    """A checkpoint is written before its window's evaluation."""
    from meft.runtime.training.training import Trainer

    folder = tmp_path / "out"
    task = ("--eval", small.facts, "--metric", "em", "--eval-every", 1, "--max-new-tokens", 2, "--save-every", 1)

    def killed(_self) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", killed)
        with pytest.raises(Killed):
            small.run(folder, "--steps", 4, *task)
    assert latest_checkpoint(folder).name == "checkpoint-00000002"
    assert small.run(folder, "--resume", *task)[0] == 0
    assert [each.optimizer_steps for each in report(folder).evaluations] == [1, 2]


def test_patience_needs_evaluations(small, tmp_path) -> None:
    for options in ((), ("--eval", small.facts)):
        code, said = small.run(tmp_path / "out", "--patience", 2, *options)
        assert (code, said) == (
            2,
            "--patience 2: counts evaluations; say what to evaluate with --eval and --eval-every",
        )


def test_the_log_has_a_line_of_json_for_everything(four) -> None:
    log, training = four.parent / "log.jsonl", report(four).training
    assert [event["step"] for event in events(log, "step")] == list(range(1, 9))
    assert tuple(event["loss"] for event in events(log, "step")) == training.loss_per_step
    windows = events(log, "optimizer_step")
    assert [event["step"] for event in windows] == [2, 4, 6, 8]
    assert tuple(event["learning_rate"] for event in windows) == training.learning_rate_per_optimizer_step
    assert tuple(event["gradient_norm"] for event in windows) == training.gradient_norm_per_optimizer_step
    assert [(event["step"], event["total_steps"]) for event in events(log, "begin")] == [(0, 4), (4, 8)]
    assert [event["reason"] for event in events(log, "end")] == ["done", "done"]
    assert [Path(event["folder"]).name for event in events(log, "checkpoint")] == [
        "checkpoint-00000004",
        "checkpoint-00000008",
    ]


def test_a_log_that_cannot_be_written_is_one_line_before_the_first_step(small, tmp_path) -> None:
    code, said = small.run(tmp_path / "out", "--steps", 2, "--log", tmp_path / "none" / "log.jsonl")
    assert code == 4
    assert said == f"{tmp_path / 'none' / 'log.jsonl'}: cannot be written (No such file or directory)"
    assert not (tmp_path / "out").exists()


def test_tensorboard_is_optional_and_asked_for_by_name(small, tmp_path, monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else real(name))
    code, said = small.run(tmp_path / "out", "--steps", 2, "--tensorboard", tmp_path / "board")
    assert code == 4
    assert said.startswith("--tensorboard: the package tensorboard is not installed; pip install tensorboard")


def test_tensorboard_gets_curves(small, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert small.run(tmp_path / "out", "--steps", 4, "--tensorboard", tmp_path / "board")[0] == 0
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    curve = [(point.step, point.value) for point in board.Scalars("step/loss")]
    assert [step for step, _ in curve] == [1, 2, 3, 4]
    assert [value for _, value in curve] == pytest.approx(report(tmp_path / "out").training.loss_per_step)
