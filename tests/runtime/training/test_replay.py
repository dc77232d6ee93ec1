"""Ordinary text among what is to be learnt: how much of it, and in a run."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from sessions import random_examples, small_plan

from meft.planner.base.errors import UsageError
from meft.planner.records.report import Report
from meft.runtime.cli.run import command
from meft.runtime.data.examples import batch_indices
from meft.runtime.data.loading import Dataset, DataStatistics
from meft.runtime.training.replay import num_replayed, with_replay


@given(st.integers(1, 10_000), st.floats(0.01, 0.9))
def test_the_share_is_that_of_all_examples(num_examples, share) -> None:
    count = num_replayed(num_examples, share)
    assert count >= 1
    assert abs(count - share * (count + num_examples)) <= 1


@pytest.mark.parametrize("share", [0.0, -0.1, 0.91, float("nan")])
def test_another_share_is_refused(share) -> None:
    with pytest.raises(UsageError, match=r"--replay-share .*more than 0 and at most 0.9"):
        num_replayed(10, share)


def test_replayed_text_is_mixed_in_anew_every_epoch() -> None:
    facts, text = random_examples(18, length=8), random_examples(5, length=8, seed=1)
    data = Dataset(tuple(facts), DataStatistics.__new__(DataStatistics))
    mixed = with_replay(data, text, share=0.25, seed=0)
    assert mixed.examples[:18] == tuple(facts)
    assert len(mixed.examples) == 24
    replayed = mixed.examples[18:]
    assert set(replayed) == set(text)  # six of five: one comes twice
    assert replayed != with_replay(data, text, share=0.25, seed=1).examples[18:]
    epoch = [index for step in range(4) for index in batch_indices(step, num_examples=24, batch_size=6, seed=0)]
    assert sorted(epoch) == list(range(24))
    assert epoch[-6:] != list(range(18, 24))


def test_a_run_replays_text_and_says_so(glass_folder, tmp_path) -> None:
    small_plan(glass_folder, seq_len=24).save(tmp_path / "plan.json")
    (tmp_path / "facts.jsonl").write_text('{"prompt": "Alice", "completion": " x"}\n' * 4)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "The queen said to the rabbit"}) + "\n")
    model = ["plan.json", "--model", str(glass_folder), "--data", "facts.jsonl", "--epochs", "1"]
    tokens = {}
    for name, options in (("plain", []), ("replayed", ["--replay", "text.jsonl", "--replay-share", "0.5"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            done = CliRunner().invoke(command, [*model, "--output-dir", name, *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert ("text.jsonl: 4 examples replayed (1 there are)" in done.stderr) == bool(options)
        report = Report.load(tmp_path / name / "report.json")
        tokens[name] = report.training.steps, report.training.tokens
    assert tokens["replayed"][0] == 2 * tokens["plain"][0]
    assert tokens["replayed"][1] > 2 * tokens["plain"][1]
    alone = CliRunner().invoke(command, [str(tmp_path / "plan.json"), *model[1:], "--replay-share", "0.5"])
    assert isinstance(alone.exception, UsageError)
    assert "--replay-share 0.5: of what? Give a file with --replay" in str(alone.exception)
