"""``meft-run --eval``, ``evaluate``, ``generate`` and ``prepare`` as users run them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from sessions import small_plan

from meft.planner.base.errors import UsageError
from meft.planner.records.plan import Plan
from meft.planner.records.report import Report
from meft.runtime.cli.run import command

WORDS = ("alice", "rabbit", "queen", "hatter")


def run(*arguments: object) -> str:
    """Run ``meft-run`` in this process; returns what it printed on standard output."""
    result = CliRunner().invoke(
        command, [str(each) for each in arguments], catch_exceptions=False, standalone_mode=False
    )
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory, glass_folder):
    """A plan, facts, and a run of 40 steps that was evaluated every 16 optimizer steps."""
    folder = tmp_path_factory.mktemp("cli-use")
    small_plan(glass_folder, choice={"top_k": 16}, seq_len=24).save(folder / "plan.json")
    facts = [{"prompt": f"The {word} said to", "completion": f" the {word}"} for word in WORDS]
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    run(folder / "plan.json", "--model", glass_folder, "--data", folder / "facts.jsonl", "--steps", 40,
        "--output-dir", folder / "out", "--learning-rate", "1e-2", "--eval", folder / "facts.jsonl", "--metric", "em",
        "--eval-every", 16, "--max-new-tokens", 8)  # fmt: skip
    return folder


def test_a_run_reports_its_evaluations(folder) -> None:
    report = Report.load(folder / "out" / "report.json")
    assert [each.optimizer_steps for each in report.evaluations] == [16, 32, 40]
    assert {each.metric for each in report.evaluations} == {"em"}
    assert all(each.items == 4 for each in report.evaluations)
    assert report.evaluations[-1].scores["exact_match"] == 1  # four facts by heart
    assert report.plan_digest == Plan.load(folder / "plan.json").content_digest()


def test_a_run_reports_where_keys_began_and_what_was_never_used(folder, glass_folder, tmp_path) -> None:
    run(folder / "plan.json", "--model", glass_folder, "--data", folder / "facts.jsonl", "--steps", 1,
        "--output-dir", tmp_path, "--key-init", "ffn")  # fmt: skip
    report = Report.load(tmp_path / "report.json")
    assert report.training.key_init == "ffn"
    assert [load.layer for load in report.expert_load] == [0, 1, 2, 3]
    for load, rows in zip(report.expert_load, report.observed.active_rows, strict=True):
        assert load.dead_rows == 128 - rows.total  # one step: the rows that were active are the ones in use


def test_evaluate_and_generate_give_what_the_run_saw(folder, glass_folder, tmp_path) -> None:
    adapter = ("--model", glass_folder, "--adapter", folder / "out" / "adapter", "--max-new-tokens", 8)
    said = run("evaluate", folder / "facts.jsonl", *adapter, "--show", 1, "-o", tmp_path / "scores.json")
    assert "? The alice said to\n> the alice" in said
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["scores"] == Report.load(folder / "out" / "report.json").evaluations[-1].scores
    assert run("generate", "The queen said to", *adapter).strip() == "the queen"
    assert "exact_match 0.000" in run("evaluate", folder / "facts.jsonl", "--model", glass_folder)


def test_rows_per_token_reach_the_answers(folder, glass_folder, tmp_path) -> None:
    """The best row of 128 alone is another adapter than all of them."""
    adapter = ("--model", glass_folder, "--adapter", folder / "out" / "adapter", "--max-new-tokens", 8)
    said = {rows: run("generate", "The queen said to", *adapter, "--rows-per-token", rows) for rows in (1, 128)}
    assert said[128].strip() == "the queen"
    assert said[1] != said[128]
    run("evaluate", folder / "facts.jsonl", *adapter, "--rows-per-token", 16, "-o", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["rows_per_token"] == 16


def test_a_least_score_reaches_the_answers(folder, glass_folder, tmp_path) -> None:
    """With a score that no row has, the base answers alone."""
    model = ("--model", glass_folder, "--max-new-tokens", 8)
    adapter = (*model, "--adapter", folder / "out")
    said = {score: run("generate", "The queen said to", *adapter, "--min-score", score) for score in (0, 1e6)}
    assert said[0].strip() == "the queen"
    assert said[1e6] == run("generate", "The queen said to", *model)
    run("evaluate", folder / "facts.jsonl", *adapter, "--min-score", 2.5, "-o", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["min_score"] == 2.5


def test_more_rows_than_in_training_are_a_note(folder, glass_folder) -> None:
    arguments = ["generate", "Alice", "--model", glass_folder, "--adapter", folder / "out", "--max-new-tokens", 1]
    result = CliRunner().invoke(command, [str(each) for each in (*arguments, "--rows-per-token", 128)])
    assert "note: rows per token 128: in training a token met" in result.stderr
    assert "note:" not in CliRunner().invoke(command, [str(each) for each in arguments]).stderr


def test_generate_answers_lines_of_standard_input(folder, glass_folder) -> None:
    arguments = ["generate", "--model", glass_folder, "--adapter", folder / "out" / "adapter", "--max-new-tokens", "8"]
    result = CliRunner().invoke(
        command,
        [str(each) for each in arguments],
        input="The queen said to\n\nThe hatter said to\n",
        standalone_mode=False,
        catch_exceptions=False,
    )
    assert result.stdout.split("\n") == ["the queen", "the hatter", ""]


def test_prepare_makes_lines_for_training_and_evaluation(tmp_path) -> None:
    source = tmp_path / "nq.jsonl"
    source.write_text('{"question": "who", "answer": ["me", "I"]}\n{"question": "x", "answer": []}\n')
    said = run("prepare", source, "-o", tmp_path / "lines.jsonl")
    assert "NQ-open (question, answer), JSON lines; 1 entries left out: nothing to learn" in said
    assert "1 items; scored by --metric em" in said
    line = json.loads((tmp_path / "lines.jsonl").read_text())
    assert line == {"prompt": "who", "completion": "me", "answers": ["me", "I"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "absent.jsonl"), "no such file"),
        (("evaluate", "airport"), "did you mean airports"),
        (("evaluate", "airports", "--metric", "iou"), "--metric iou does not fit airports"),
        (("generate", ""), "--prompt: is empty"),
        (("generate", "a", "--adapter", "absent"), "--adapter absent: no such folder"),
        (("generate", "a", "--rows-per-token", "4"), "there is no adapter; say which with --adapter"),
        (("evaluate", "airports", "--rows-per-token", "4"), "there is no adapter"),
        (("generate", "a", "--min-score", "4"), "--min-score 4.0: there is no adapter"),
    ],
)
def test_wrong_input_is_one_clear_error(glass_folder, arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        run(*arguments, "--model", glass_folder)


def test_evaluation_options_without_an_evaluation(folder) -> None:
    with pytest.raises(UsageError, match="belong to --eval"):
        run(folder / "plan.json", "--metric", "em")
    with pytest.raises(UsageError, match="to score without training: meft-run evaluate"):
        run(folder / "plan.json", "--eval", folder / "facts.jsonl")
