"""Data: what is learned from each form of line, how bad lines are told, and which example is seen when."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from meft.planner.base.errors import UsageError
from meft.runtime.data.examples import (
    IGNORE_INDEX,
    Example,
    batch_indices,
    batches,
    collate,
    pad_token_id,
    tokenize_record,
)
from meft.runtime.data.loading import DataOptions, load_dataset
from meft.runtime.data.records import BadLineError, Chat, Completion, Text

CHATML = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


class CharacterTokenizer:
    """One token per character (its code point); ``\\x02`` begins a text, ``\\x03`` ends it. Templates are functions."""

    eos_token_id: int | None = 3
    pad_token_id: int | None = None

    def __init__(self, template: Any = None) -> None:
        self.chat_template = template

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [2] * add_special_tokens + [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages: Sequence[Any], *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        return str(self.chat_template(messages, add_generation_prompt))


def plain_template(messages: Sequence[Any], add_generation_prompt: bool) -> str:
    text = "".join(f"[{message['role'][0]}]{message['content']};" for message in messages)
    return text + "[a]" * add_generation_prompt


def learned(example: Example) -> str:
    """The characters with loss, ``·`` for those without."""
    return "".join(chr(label) if label != IGNORE_INDEX else "·" for label in example.labels)


def conversation(*turns: tuple[str, str]) -> Chat:
    return Chat(tuple({"role": role, "content": content} for role, content in turns))


# --- what carries loss ---------------------------------------------------------------------------------------------


def test_completion_without_template_is_joined_as_it_stands() -> None:
    [example] = tokenize_record(Completion("ab", "cd"), CharacterTokenizer())
    assert example.input_ids == (2, ord("a"), ord("b"), ord("c"), ord("d"), 3)
    assert learned(example) == "···cd\x03"


def test_completion_goes_through_the_template_unless_raw() -> None:
    tokenizer = CharacterTokenizer(plain_template)
    [chat] = tokenize_record(Completion("ab", "cd"), tokenizer)
    assert "".join(map(chr, chat.input_ids)) == "[u]ab;[a]cd;"
    assert learned(chat) == "·········cd;"
    [raw] = tokenize_record(Completion("ab", "cd"), tokenizer, raw=True)
    assert learned(raw) == "···cd\x03"


def test_text_is_learned_whole_but_its_first_token_cannot_be_predicted() -> None:
    [example] = tokenize_record(Text("ab"), CharacterTokenizer())
    assert learned(example) == "\x02ab\x03"
    assert example.num_trained_tokens == 3


def test_text_without_an_end_token() -> None:
    tokenizer = CharacterTokenizer()
    tokenizer.eos_token_id = None
    assert learned(tokenize_record(Text("ab"), tokenizer)[0]) == "\x02ab"


def test_every_assistant_turn_of_a_conversation_is_learned() -> None:
    chat = conversation(("system", "s"), ("user", "q"), ("assistant", "A"), ("user", "r"), ("assistant", "B"))
    [example] = tokenize_record(chat, CharacterTokenizer(plain_template))
    assert "".join(map(chr, example.input_ids)) == "[s]s;[u]q;[a]A;[u]r;[a]B;"
    assert learned(example) == "·" * 13 + "A;" + "·" * 8 + "B;"


def test_what_follows_the_last_assistant_turn_carries_no_loss() -> None:
    chat = conversation(("user", "q"), ("assistant", "A"), ("user", "r"))
    [example] = tokenize_record(chat, CharacterTokenizer(plain_template))
    assert learned(example) == "·" * 8 + "A;" + "·" * 5


def test_template_without_generation_prompt_teaches_the_header_too() -> None:
    def template(messages: Sequence[Any], add_generation_prompt: bool) -> str:
        return plain_template(messages, False)

    [example] = tokenize_record(conversation(("user", "q"), ("assistant", "A")), CharacterTokenizer(template))
    assert learned(example) == "·····[a]A;"


def test_template_that_rewrites_earlier_turns_gives_one_example_per_turn() -> None:
    """The template drops the ``(thought)`` of all assistant turns but the last, as some reasoning models do."""

    def template(messages: Sequence[Any], add_generation_prompt: bool) -> str:
        last = len(messages) - 1
        kept = [
            message if index == last else {**message, "content": message["content"].split(")")[-1]}
            for index, message in enumerate(messages)
        ]
        return plain_template(kept, add_generation_prompt)

    chat = conversation(("user", "q"), ("assistant", "(x)A"), ("user", "r"), ("assistant", "(y)B"))
    first, second = tokenize_record(chat, CharacterTokenizer(template))
    assert "".join(map(chr, first.input_ids)) == "[u]q;[a](x)A;"
    assert learned(first) == "·" * 8 + "(x)A;"
    assert "".join(map(chr, second.input_ids)) == "[u]q;[a]A;[u]r;[a](y)B;"
    assert learned(second) == "·" * 18 + "(y)B;"


def test_template_in_which_turns_cannot_be_told_apart_is_refused() -> None:
    def template(messages: Sequence[Any], add_generation_prompt: bool) -> str:
        return f"{len(messages)} turns:" + plain_template(messages, add_generation_prompt)

    with pytest.raises(BadLineError, match="cannot be told apart; use text lines"):
        tokenize_record(conversation(("user", "q"), ("assistant", "A")), CharacterTokenizer(template))


def test_what_a_template_raises_is_told() -> None:
    def template(messages: Sequence[Any], add_generation_prompt: bool) -> str:
        raise RuntimeError("System role not supported")

    with pytest.raises(BadLineError, match=r"chat template refuses it \(System role not supported\)"):
        tokenize_record(conversation(("user", "q"), ("assistant", "A")), CharacterTokenizer(template))


def test_messages_need_a_template() -> None:
    with pytest.raises(BadLineError, match="needs a chat template and this tokenizer has none"):
        tokenize_record(conversation(("user", "q"), ("assistant", "A")), CharacterTokenizer())


def test_a_token_across_the_boundary_belongs_to_the_completion(glass_tokenizer: PreTrainedTokenizerFast) -> None:
    # "▁begin" + "ning" alone; joined with "s" nothing merges, but "be" + "ginning" does: ▁be|gin|ning -> ▁begin|ning
    prompt, completion = "Alice was be", "ginning"
    assert glass_tokenizer.convert_ids_to_tokens(glass_tokenizer.encode(prompt)) == ["Alice", "▁was", "▁be"]
    [example] = tokenize_record(Completion(prompt, completion), glass_tokenizer)
    assert glass_tokenizer.convert_ids_to_tokens(list(example.input_ids)) == [
        "Alice", "▁was", "▁begin", "ning", "<eos>",
    ]  # fmt: skip
    assert [label != IGNORE_INDEX for label in example.labels] == [False, False, True, True, True]


def test_label_golden_on_the_glass_tokenizer(glass_tokenizer: PreTrainedTokenizerFast) -> None:
    """Ids read off tests/helpers/glass.py's vocabulary: 4 special tokens, 91 characters, then the merges in order."""
    [example] = tokenize_record(Completion("Alice was", " very tired"), glass_tokenizer)
    assert glass_tokenizer.convert_ids_to_tokens(list(example.input_ids)) == [
        "Alice", "▁was", "▁very", "▁t", "i", "red", "<eos>",
    ]  # fmt: skip
    assert example.input_ids == (494, 160, 268, 92, 64, 259, 3)
    assert example.labels == (IGNORE_INDEX, IGNORE_INDEX, 268, 92, 64, 259, 3)


def test_a_jinja_template_on_a_real_tokenizer(glass_folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(glass_folder)
    tokenizer.chat_template = CHATML
    [example] = tokenize_record(conversation(("user", "who"), ("assistant", "Alice")), tokenizer)
    rendered = "<user>who\n<assistant>Alice\n"
    assert list(example.input_ids) == tokenizer.encode(rendered)
    trained = [label for label in example.labels if label != IGNORE_INDEX]
    assert tokenizer.convert_ids_to_tokens(trained) == ["Alice", "\n"]


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"), min_size=1))
def test_completion_labels_are_exactly_the_completion(prompt: str, completion: str) -> None:
    for tokenizer in (CharacterTokenizer(), CharacterTokenizer(plain_template)):
        [example] = tokenize_record(Completion(prompt, completion), tokenizer)
        end = "\x03" if tokenizer.chat_template is None else ";"
        if completion.endswith("\x03") and tokenizer.chat_template is None:
            end = ""  # it ends the text itself
        kept = [label for label in example.labels if label != IGNORE_INDEX]
        assert "".join(map(chr, kept)) == completion + end


# --- lines and files -----------------------------------------------------------------------------------------------


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_statistics_and_cutting(tmp_path: Path) -> None:
    # Tokens: begin 1, characters, end 1. "aaaa"+"b": 7, loses an "a" for 6; "aaaaaaa"+"b": 10, loses four; "x"+"hi": 5.
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "aaaa", "completion": "b"},
        {"prompt": "aaaaaaa", "completion": "b"},
        "\n",
        {"prompt": "x", "completion": "hi"},
    )
    dataset = load_dataset(path, CharacterTokenizer(), seq_len=6, options=DataOptions(allow_cut=True))
    assert [learned(example) for example in dataset.examples] == ["····b\x03", "····b\x03", "··hi\x03"]
    statistics = dataset.statistics
    assert (statistics.num_lines, statistics.num_examples) == (3, 3)
    assert statistics.longest_tokens == 10
    assert statistics.sequence_tokens == (5, 5, 5, 7, 7, 7, 7, 7, 10, 10, 10)
    assert (statistics.truncated_examples, statistics.dropped_examples) == (2, 0)
    assert (statistics.num_tokens, statistics.num_trained_tokens) == (17, 7)
    assert statistics.summary(6) == (
        "3 examples, 7 of 17 tokens with loss; longest 10 tokens for sequences of 6, 2 cut off; "
        "of 22 tokens in the file 17 used (77%), 5 lost; 1 of padding"
    )


def test_more_than_a_hundredth_cut_is_asked_about(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "completion": "b"}] * 99 + [{"prompt": "aaaaaaa", "completion": "b"}]
    path = write(tmp_path / "d.jsonl", *lines)
    assert load_dataset(path, CharacterTokenizer(), seq_len=6).statistics.truncated_examples == 1
    write(path, *lines, lines[-1])
    with pytest.raises(UsageError, match=r"2 of 101 examples \(2%\) are longer than .* 6 tokens .*--seq-len 10"):
        load_dataset(path, CharacterTokenizer(), seq_len=6)
    assert load_dataset(path, CharacterTokenizer(), seq_len=6, options=DataOptions(allow_cut=True)).examples


def test_nothing_left_within_the_sequence_is_refused(tmp_path: Path) -> None:
    """Of two answers the first does not fit, and conversations are cut at their end: 13 tokens before it."""
    turns = [("user", "aaaa"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    path = write(tmp_path / "d.jsonl", {"messages": [{"role": who, "content": said} for who, said in turns]})
    tokenizer, options = CharacterTokenizer(plain_template), DataOptions(allow_cut=True)
    with pytest.raises(UsageError, match=r"nothing to learn within 11 tokens in any of 1 lines; plan .* at least 12"):
        load_dataset(path, tokenizer, seq_len=11, options=options)
    assert load_dataset(path, tokenizer, seq_len=12, options=options).statistics.num_examples == 1


def test_lines_of_one_token_are_refused(tmp_path: Path) -> None:
    class Bare(CharacterTokenizer):
        eos_token_id = None

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return super().encode(text, add_special_tokens=False)

    with pytest.raises(UsageError, match="give lines of two tokens or more"):
        load_dataset(write(tmp_path / "d.jsonl", {"text": "a"}), Bare(), seq_len=8)


def test_the_first_bad_lines_are_named_and_all_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"text": "ok"}, *["oops\n"] * 7, {"text": "ok"})
    with pytest.raises(UsageError) as caught:
        load_dataset(path, CharacterTokenizer(), seq_len=8)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:5]] == [f"{path}:{number}" for number in range(2, 7)]
    assert lines[5:] == ["and 2 more: 7 of 9 lines cannot be used"]
    assert caught.value.exit_code == 2


def test_line_numbers_count_blank_lines_and_survive_windows_files(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "\xff"}\r\n')
    with pytest.raises(UsageError, match=r"d\.jsonl:3: not UTF-8 \(byte 11 of the line\)"):
        load_dataset(path, CharacterTokenizer(), seq_len=8)


def test_missing_empty_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.jsonl: no such file; what is read"):
        load_dataset(tmp_path / "none.jsonl", CharacterTokenizer(), seq_len=8)
    with pytest.raises(UsageError, match=r"is empty; what is read \(docs/data\.md\): chat messages, "):
        load_dataset(write(tmp_path / "e.jsonl", "\n \n"), CharacterTokenizer(), seq_len=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no data file in this folder; what is read: \.jsonl"):
        load_dataset(tmp_path / "empty", CharacterTokenizer(), seq_len=8)
    with pytest.raises(UsageError, match="at least 2 tokens"):
        load_dataset(tmp_path, CharacterTokenizer(), seq_len=1)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()})
    ),
)
OBJECTS = st.dictionaries(st.sampled_from(["prompt", "completion", "text", "messages", "id"]), JSON_VALUES, min_size=1)


@given(st.binary() | st.lists(OBJECTS.map(json.dumps), min_size=1, max_size=3).map("\n".join).map(str.encode))
@example(b'{"text": "\\ud800"}')
@example(b'{"text": 1e999}')
def test_any_bytes_are_either_data_or_a_usage_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    with contextlib.suppress(UsageError):
        dataset = load_dataset(path, CharacterTokenizer(plain_template), seq_len=8)
        assert dataset.examples
        assert all(one.num_trained_tokens for one in dataset.examples)


# --- batches -------------------------------------------------------------------------------------------------------


def test_collate_pads_right_to_the_fixed_shape() -> None:
    batch = collate([Example((5, 6, 7), (-100, 6, 7)), Example((8, 9), (-100, 9))], seq_len=4, pad_id=1)
    assert batch.input_ids.tolist() == [[5, 6, 7, 1], [8, 9, 1, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100], [-100, 9, -100, -100]]
    assert {tensor.dtype for tensor in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}
    assert batch.num_trained_tokens == 3


def test_collate_refuses_what_is_too_long() -> None:
    with pytest.raises(ValueError, match="example 0 has 3 tokens, more than seq_len 2"):
        collate([Example((5, 6, 7), (5, 6, 7))], seq_len=2, pad_id=0)


def test_pad_token_falls_back_to_the_end_of_text_and_then_zero() -> None:
    tokenizer = CharacterTokenizer()
    assert pad_token_id(tokenizer) == 3
    tokenizer.eos_token_id = None
    assert pad_token_id(tokenizer) == 0
    tokenizer.pad_token_id = 0
    tokenizer.eos_token_id = 3
    assert pad_token_id(tokenizer) == 0


@given(
    num_examples=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    epochs=st.integers(1, 4),
)
def test_every_epoch_shows_every_example_once(num_examples: int, batch_size: int, seed: int, epochs: int) -> None:
    steps = -(-epochs * num_examples // batch_size)
    seen = [
        index
        for step in range(steps)
        for index in batch_indices(step, num_examples=num_examples, batch_size=batch_size, seed=seed)
    ]
    assert len(seen) == steps * batch_size
    for epoch in range(epochs):
        assert Counter(seen[epoch * num_examples : (epoch + 1) * num_examples]) == Counter(range(num_examples))


def test_order_golden() -> None:
    """A change here would break every resumed run.

    ``random.Random("1:0")`` draws 0.73 0.42 0.37 0.53 0.82 0.10 0.52 0.14; sorted: 0.10 is number 5, 0.14 number 7 ...
    """
    assert batch_indices(0, num_examples=8, batch_size=8, seed=1) == [5, 7, 2, 1, 6, 3, 0, 4]


def test_epochs_and_seeds_differ() -> None:
    def order(epoch: int, seed: int) -> list[int]:
        return batch_indices(epoch, num_examples=50, batch_size=50, seed=seed)

    assert len({tuple(order(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9


def test_a_resumed_run_continues_with_the_very_next_batch() -> None:
    examples = [Example((index, index + 1), (-100, index + 1)) for index in range(5)]

    def ids(first_step: int) -> list[list[list[int]]]:
        stream = batches(examples, batch_size=2, seq_len=3, pad_id=0, seed=4, first_step=first_step, last_step=9)
        return [batch.input_ids.tolist() for batch in stream]

    assert ids(6) == ids(0)[6:]
    assert len(ids(0)) == 9
