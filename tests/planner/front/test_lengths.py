"""``--lengths``: files and distributions, and the estimate over orders of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import meft
from meft.planner.base.errors import MachineError, UsageError
from meft.planner.front import lengths as lengths_module
from meft.planner.front.lengths import MICRO_BATCHES, lengths_of, orders_of

SMALL = {"model": "smollm2-135m", "gpu": "rtx-3090", "batch_size": 2, "activation_checkpointing": False}


@pytest.mark.parametrize(
    "content",
    ["3\n5\n900\n", "[3, 5, 900]", '{"length": 3}\n{"input_ids": [1, 1, 1, 1, 1]}\n{"length": 900}\n'],
)
def test_a_file_of_lengths_is_cut(content: str, tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    file.write_text(content)
    assert lengths_of(str(file), most=512) == (3, 5, 512)


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "0 sequences"), ("many", "Expecting value"), ('{"text": "a"}', "it holds texts"), ("0", "no length")],
)
def test_a_file_of_something_else_is_refused(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    file.write_text(content)
    with pytest.raises(UsageError, match=says):
        lengths_of(str(file), most=512)


def test_a_distribution_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="'wide' is no number; give MEAN,STD such as 300,120"):
        lengths_of("300,wide", most=512)
    with pytest.raises(UsageError, match="give a mean from 1"):
        lengths_of("0,3", most=512)


def test_the_longest_sequence_is_in_every_order() -> None:
    lengths = (*(10,) * 999, 100)
    for order in orders_of(lengths, batch_size=2, batching="padded", most=100):
        assert len(order) == MICRO_BATCHES
        assert max(shape.seq_len for shape in order) == 100


def test_an_estimate_says_what_lengths_make_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths_module, "ORDERS", 2)
    monkeypatch.setattr(lengths_module, "MICRO_BATCHES", 4)
    file = tmp_path / "lengths"
    file.write_text("\n".join(str(20 + 7 * (number % 30)) for number in range(300)))
    estimate = meft.estimate("lora", lengths=str(file), **SMALL)
    fixed = meft.estimate("lora", seq_len=20 + 7 * 29, padding=True, **SMALL)
    spread = estimate.lengths
    assert spread is not None
    assert (spread.sequences, spread.longest, spread.orders) == (300, 223, 2)
    assert estimate.peak_reserved_bytes == fixed.peak_reserved_bytes
    assert spread.least_bytes < spread.median_bytes < spread.most_bytes
    assert spread.most_bytes > spread.peak_allocated_bytes
    assert 0.95 * fixed.peak_allocated_bytes < spread.peak_allocated_bytes <= fixed.peak_allocated_bytes
    assert estimate.verdict == spread.verdict == "fits"


def test_what_does_not_go_with_lengths_is_refused() -> None:
    with pytest.raises(UsageError, match="batching sorted: of which sequences"):
        meft.estimate("lora", batching="sorted", **SMALL)
    with pytest.raises(UsageError, match="told apart by flash attention alone"):
        meft.estimate("lora", lengths="100,10", batching="padding-free", **SMALL)
    with pytest.raises(UsageError, match="lengths does not go with"):
        meft.estimate("meft", lengths="100,10", model="smollm2-135m", gpu="rtx-3090")


def glass_lines(folder: Path, lines: list[dict]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def test_texts_are_as_long_as_meft_run_makes_them(glass_folder: Path, tmp_path: Path) -> None:
    """Against the runtime's own examples, which the tokenizer of transformers makes."""
    examples = pytest.importorskip("meft.runtime.data.examples")
    records = pytest.importorskip("meft.runtime.data.records")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(glass_folder)
    lines = [{"text": "The sea is green."}, {"prompt": "What is it? ", "completion": "A small boat."}, {"text": "a"}]
    made = [records.Text("The sea is green."), records.Completion("What is it? ", "A small boat."), records.Text("a")]
    expected = tuple(len(examples.tokenize_record(each, tokenizer, raw=True)[0].input_ids) for each in made)
    file = glass_lines(tmp_path, lines)
    assert lengths_of(str(file), most=512, tokenizer=str(glass_folder)) == expected
    plain = tmp_path / "plain.txt"
    plain.write_text("The sea is green.\n\na\n")
    assert lengths_of(str(plain), most=512, tokenizer=str(glass_folder)) == (expected[0], expected[2])


def test_texts_without_what_they_need_are_refused(glass_folder: Path, tmp_path: Path) -> None:
    file = glass_lines(tmp_path, [{"text": "a"}])
    with pytest.raises(UsageError, match="it holds texts; give --tokenizer DIR"):
        lengths_of(str(file), most=512)
    with pytest.raises(UsageError, match=r"no tokenizer\.json in it"):
        lengths_of(str(file), most=512, tokenizer=str(tmp_path))
    chat = glass_lines(tmp_path, [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(UsageError, match=r"sequence 1: no text.* chat template"):
        lengths_of(str(chat), most=512, tokenizer=str(glass_folder))
    with pytest.raises(UsageError, match=r"tokenizer .*: of which texts"):
        meft.estimate("lora", tokenizer=str(glass_folder), **SMALL)


def test_a_missing_tokenizers_package_says_what_to_install(
    glass_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meft.planner.base.packages.is_installed", lambda name: name != "tokenizers")
    with pytest.raises(MachineError, match=r"tokenizers is missing; install: pip install"):
        lengths_of(str(glass_lines(tmp_path, [{"text": "a"}])), most=512, tokenizer=str(glass_folder))
