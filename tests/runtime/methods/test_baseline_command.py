"""``meft-run baseline`` from the command line: a folder that the other commands take, and wrong input in one line."""

from __future__ import annotations

import json

import pytest
from peft import PeftModel
from transformers import LlamaForCausalLM

from meft.planner.base.errors import UsageError
from meft.runtime.cli.baseline import baseline_command
from meft.runtime.cli.run import command
from meft.runtime.methods.run import MethodReport

PROMPT = ["--method", "peft:prompt-tuning", "--peft-arg", "num_virtual_tokens=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "facts.jsonl"
    lines = [{"prompt": f"The {word} said to", "completion": " the queen"} for word in ("alice", "rabbit", "hatter")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_baseline(glass_folder, data, folder, *options: object) -> None:
    given = ["--model", glass_folder, "--data", data, "--seq-len", 24, "--steps", 2, "--output-dir", folder, *options]
    baseline_command.main([str(each) for each in given], standalone_mode=False)


@pytest.mark.parametrize("method", [PROMPT, ["--method", "parallel-adapter", "--adapter-width", "8"]])
def test_what_it_writes_is_used_by_the_other_commands(glass_folder, data, tmp_path, capsys, method) -> None:
    run_baseline(glass_folder, data, tmp_path, *method, "--eval", data, "--max-new-tokens", 2)
    assert {each.name for each in tmp_path.iterdir()} == {"adapter", "checkpoint-00000002", "report.json"}
    report = MethodReport.load(tmp_path / "report.json")
    assert (report.steps, len(report.loss_per_step), len(report.evaluations)) == (2, 2, 1)
    assert report.h2d_bytes_per_step == 2 * 2 * 24 * 8
    assert "numbers trained" in capsys.readouterr().out
    used = ["--model", str(glass_folder), "--adapter", str(tmp_path)]
    command.main(["evaluate", str(data), *used, "--max-new-tokens", "2"], standalone_mode=False)
    scored = capsys.readouterr().out
    assert f"exact_match {report.evaluations[0].scores['exact_match']:.3f}" in scored
    with pytest.raises(UsageError, match="chooses rows of a MEFT adapter"):
        command.main(["generate", "The queen", *used, "--rows-per-token", "2"], standalone_mode=False)


def test_peft_itself_reads_the_folder(glass_folder, data, tmp_path) -> None:
    run_baseline(glass_folder, data, tmp_path, "--method", "peft:ia3")
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(glass_folder), tmp_path / "adapter")
    assert loaded.peft_config["default"].peft_type == "IA3"


def test_a_run_is_not_overwritten_unasked_and_goes_on(glass_folder, data, tmp_path, capsys) -> None:
    run_baseline(glass_folder, data, tmp_path, *PROMPT)
    with pytest.raises(UsageError, match="--resume"):
        run_baseline(glass_folder, data, tmp_path, *PROMPT)
    run_baseline(glass_folder, data, tmp_path, *PROMPT, "--resume", "--steps", "3")
    assert "resumed from" in capsys.readouterr().err
    assert MethodReport.load(tmp_path / "report.json").steps == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--method: which one"),
        (["--method", "meft"], "is trained by a plan"),
        (["--method", "peft"], "which of its methods"),
        (["--method", "lroa"], "did you mean lora"),
        (["--method", "lora", "--peft-arg", "r=8"], "is of peft:TYPE; lora has options of its own"),
        (["--method", "full", "--rank", "8"], "--rank 8: is of lora, qlora"),
        (["--method", "qlora", "--weights-dtype", "fp32"], "qlora has nf4 weights"),
        (["--method", "full", "--weights-dtype", "nf4"], "trains the model's own weights"),
        (["--method", "lora", "--peft-config", "x.json"], "--peft-config says method and settings"),
        (["--peft-config", "nowhere.json"], "nowhere.json: no such file"),
        (["--method", "peft:ia3", "--peft-arg", "r"], "give name=value"),
        (["--method", "lora", "--epochs", "1"], "both say how long"),
    ],
)
def test_wrong_input_is_one_line(glass_folder, data, tmp_path, options, says) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        run_baseline(glass_folder, data, tmp_path / "out", *options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
