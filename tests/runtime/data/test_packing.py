"""Long texts and short ones: every token is in a sequence once, with loss once, and the counts add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft.planner.base.errors import UsageError
from meft.runtime.data.examples import IGNORE_INDEX, Example
from meft.runtime.data.loading import DataOptions, load_dataset, one_line, shown
from meft.runtime.data.packing import cut, joined, packed, windows


def text(length: int, first: int = 0) -> Example:
    ids = tuple(range(first, first + length))
    return Example(ids, ids)


def test_windows_with_and_without_context() -> None:
    assert [each.input_ids for each in windows(text(5), seq_len=2, stride=2)] == [(0, 1), (2, 3), (3, 4)]
    first, second, third = windows(text(8), seq_len=4, stride=2)
    assert (first.labels, second.labels) == ((0, 1, 2, 3), (IGNORE_INDEX, IGNORE_INDEX, 4, 5))
    assert third.input_ids == (4, 5, 6, 7)
    assert windows(text(3), seq_len=4, stride=4) == [text(3)]


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_every_token_of_a_text_is_learned_once(length: int, seq_len: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, seq_len - 1))
    made = windows(text(length), seq_len=seq_len, stride=stride)
    learned = [label for each in made for label in each.labels[1:] if label != IGNORE_INDEX]
    assert learned == list(range(1, length))
    assert all(len(each.input_ids) <= seq_len for each in made)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_packing_keeps_every_document_whole(lengths: list[int]) -> None:
    documents = [text(length, 100 * number) for number, length in enumerate(lengths)]
    made = packed(documents, seq_len=12)
    found = [
        each.input_ids[start:stop]
        for each in made
        for start, stop in zip(each.starts, [*each.starts[1:], len(each.input_ids)], strict=True)
    ]
    assert sorted(found) == sorted(document.input_ids for document in documents)
    assert all(len(each.input_ids) <= 12 for each in made)
    assert sum(len(each.input_ids) <= 6 for each in made) <= 1  # two half-empty sequences would be one


def test_nothing_predicts_a_packed_documents_first_token() -> None:
    example = joined([text(2), text(2, 5)])
    assert example == Example((0, 1, 5, 6), (IGNORE_INDEX, 1, IGNORE_INDEX, 6), (0, 2))


def test_a_prompt_loses_its_beginning_behind_the_head() -> None:
    example = Example(tuple(range(10)), (IGNORE_INDEX,) * 7 + (7, 8, 9))
    assert cut(example, seq_len=6, head=2).input_ids == (0, 1, 6, 7, 8, 9)
    assert cut(example, seq_len=10, head=2) is example
    longer = Example(tuple(range(10)), (IGNORE_INDEX,) * 2 + tuple(range(2, 10)))
    assert cut(longer, seq_len=4, head=1).input_ids == (0, 2, 3, 4)  # nothing of the prompt is left to lose
    two = Example(tuple(range(6)), (IGNORE_INDEX, 1, IGNORE_INDEX, IGNORE_INDEX, 4, 5))
    assert cut(two, seq_len=5, head=1).input_ids == (0, 1, 2, 3, 4)


def write(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_the_counts_add_up(glass_tokenizer, tmp_path: Path) -> None:
    texts = [{"text": "Alice was beginning to get very tired. " * count} for count in (1, 2, 9, 30)]
    path = write(tmp_path / "t.jsonl", *texts)
    for options in (DataOptions(packing="text"), DataOptions(), DataOptions(stride=7)):
        dataset = load_dataset(path, glass_tokenizer, seq_len=16, options=options)
        found = dataset.statistics
        assert found.lost_tokens == 0
        assert found.num_tokens == found.file_tokens + found.repeated_tokens
        assert found.num_tokens + found.padded_tokens == 16 * found.num_examples
    whole = load_dataset(path, glass_tokenizer, seq_len=512, options=DataOptions(packing="text")).statistics
    assert whole.num_examples == 1
    assert f"of {whole.file_tokens:,} tokens in the file {whole.file_tokens:,} used (100%), 0 lost" in whole.summary(
        512
    )


def test_prompts_are_packed_when_asked(glass_tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *[{"prompt": "Alice", "completion": " ran"}] * 6)
    alone = load_dataset(path, glass_tokenizer, seq_len=24).statistics
    assert alone.num_examples == 6
    together = load_dataset(path, glass_tokenizer, seq_len=24, options=DataOptions(packing="all"))
    assert together.statistics.num_examples < 6
    assert (
        together.statistics.num_trained_tokens
        == load_dataset(path, glass_tokenizer, seq_len=24).statistics.num_trained_tokens
    )


def test_a_stride_must_fit_the_window(glass_tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--stride 17: a window has 16 tokens; give 1 to 16"):
        load_dataset(
            write(tmp_path / "t.jsonl", {"text": "a"}), glass_tokenizer, seq_len=16, options=DataOptions(stride=17)
        )


def test_an_example_is_shown_with_what_carries_loss_marked(glass_tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"instruction": "Alice", "output": "ran"})
    dataset = load_dataset(path, glass_tokenizer, seq_len=24)
    assert dataset.samples == ("Alice[[\nran<eos>]]",)
    assert dataset.notes == (f"{path}: Alpaca (instruction, output), JSON lines",)
    assert one_line(dataset.samples[0]) == r"Alice[[\nran<eos>]]"
    assert shown(dataset.examples[0], glass_tokenizer) == dataset.samples[0]
    assert len(one_line("x" * 999)) <= 305
