"""The table of formats: each is told by its fields, read as it should be, and what cannot be used is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from places import ROOT

from meft.runtime.data.formats import FORMATS, read_entry, recognise, table
from meft.runtime.data.records import BadLineError, Chat, Completion, Text

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CALL = {"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"c": "X"}'}}
READ_CALL = CALL | {"function": {"name": "w", "arguments": {"c": "X"}}}
WITHOUT_ID = {"type": "function", "function": READ_CALL["function"]}
TOOL = {"type": "function", "function": {"name": "w", "parameters": {}}}


def read(value: Any) -> Any:
    return read_entry(recognise(value), value, where="f:1")


def asked(prompt: str, completion: str, *answers: str, system: str = "") -> Completion:
    return Completion(prompt, completion, answers, system=system, joined_by="\n")


@pytest.mark.parametrize(
    ("name", "value", "record"),
    [
        ("prompt/completion", {"prompt": "", "completion": " b", "id": 7}, Completion("", " b")),
        ("prompt/completion", {"prompt": TURNS[:1], "completion": TURNS[1:]}, Chat(tuple(TURNS))),
        ("text", {"text": " t "}, Text(" t ")),
        ("chat messages", {"messages": TURNS, "prompt": "q"}, Chat(tuple(TURNS))),
        ("Alpaca", {"instruction": "i", "input": "x", "output": "o", "text": "all"}, asked("i\n\nx", "o")),
        ("Alpaca", {"instruction": "i", "input": None, "output": "o"}, asked("i", "o")),
        ("Alpaca", {"instruction": "i", "input": "x", "output": None, "text": "t"}, Text("t")),
        ("Dolly", {"instruction": "i", "context": "c", "response": "r", "category": "x"}, asked("i\n\nc", "r")),
        ("question/answer", {"question": "q?", "answer": "a"}, asked("q?", "a", "a")),
        ("question/answer", {"question": "q?", "answer": ""}, None),
        ("question/answers", {"question": "q?", "answers": ["a", "b"]}, asked("q?", "a", "a", "b")),
        ("question/response", {"system_prompt": "s", "question": "q", "response": "r"}, asked("q", "r", system="s")),
        ("SQuAD", {"question": "q", "answers": {"text": ["a", "a"], "answer_start": [1, 1]}}, asked("q", "a", "a")),
        ("SQuAD", {"question": "q", "answers": {"text": [], "answer_start": []}}, None),
        ("SQuAD", {"question": "q", "answers": [{"text": "a"}], "context": "c"}, asked("q", "a", "a")),
        ("NQ-open", {"question": "q", "answer": ["a", "b"]}, asked("q", "a", "a", "b")),
        ("TriviaQA", {"question": "q", "answer": {"value": "v", "aliases": ["w", "v"]}}, asked("q", "v", "v", "w")),
        ("TriviaQA", {"question": "q", "answer": {"value": "<unk>", "aliases": []}}, None),
        ("TriviaQA", {"Question": "q", "Answer": {"Value": "v", "Aliases": ["w"]}}, asked("q", "v", "v", "w")),
        ("HotpotQA", {"question": "q", "answer": "yes", "supporting_facts": [["t", 0]]}, asked("q", "yes", "yes")),
        ("GSM8K", {"question": "q", "answer": "1<<1=1>>\n#### 1"}, asked("q", "1\n#### 1", "1")),
        (
            "MetaMathQA",
            {"query": "q", "response": "The answer is: 5", "type": "GSM"},
            asked("q", "The answer is: 5", "5"),
        ),
        ("query/response", {"query": "q", "response": "r"}, asked("q", "r")),
        ("problem/solution", {"problem": "q", "solution": "r", "level": "1"}, asked("q", "r")),
        ("inputs/targets", {"inputs": "q", "targets": "r", "task": "t"}, asked("q", "r")),
        ("article/highlights", {"article": "q", "highlights": "r", "id": "1"}, asked("q", "r")),
        ("Question/Response", {"Question": "q", "Complex_CoT": "c", "Response": "r"}, asked("q", "r")),
        ("prompt/completion", {"prompt": "q", "completion": "r", "label": True}, Completion("q", "r")),
        ("prompt/completion", {"prompt": "q", "completion": "r", "label": False}, None),
        ("LIMA", {"conversations": ["q", "a", "without answer"], "source": "x"}, Chat(tuple(TURNS))),
        ("LIMA", {"conversations": ["q"]}, None),
        ("Capybara", {"conversation": [{"input": "q", "output": "a"}] * 2}, Chat(tuple(TURNS * 2))),
        (
            "xLAM",
            {"query": "q", "answers": '[{"name": "w", "arguments": {"c": "X"}}]', "tools": '[{"name": "w"}]'},
            Chat(
                (TURNS[0], {"role": "assistant", "content": "", "tool_calls": [WITHOUT_ID]}),
                ({"type": "function", "function": {"name": "w"}},),
            ),
        ),
        ("ShareGPT", {"conversations": SHAREGPT}, Chat(tuple(TURNS))),
        ("ShareGPT", {"conversation": TURNS}, Chat(tuple(TURNS))),
        ("ShareGPT", {"conversations": SHAREGPT[1:] + SHAREGPT[:1]}, None),
        (
            "ShareGPT",
            {"system": "s", "conversations": SHAREGPT},
            Chat(({"role": "system", "content": "s"}, *TURNS)),
        ),
    ],
)
def test_a_format_is_told_by_its_fields(name: str, value: dict[str, Any], record: Any) -> None:
    if isinstance(record, Text) and "instruction" in value:  # without an output it is the text that it holds
        name = "text"
    assert recognise(value).name == name
    assert read(value) == record


def test_calls_with_string_arguments_and_without_content() -> None:
    for message in ({"content": None}, {}, {"content": "", "refusal": None, "audio": None}):
        chat = read({"messages": [TURNS[0], {"role": "assistant", "tool_calls": [CALL], **message}], "tools": [TOOL]})
        assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [READ_CALL]}
        assert chat.tools == (TOOL,)


def test_the_older_function_call_and_cells_that_hold_json() -> None:
    call = {"role": "assistant", "function_call": {"name": "w", "arguments": "{}"}}
    chat = read({"messages": [TURNS[0], call, {"role": "function", "name": "w", "content": "3"}], "functions": "[]"})
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool"]
    assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "w", "arguments": {}}
    assert read({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}) == Chat(
        tuple(TURNS)
    )


def test_sharegpt_calls_tools() -> None:
    turns = [SHAREGPT[0], {"from": "function_call", "value": '{"name": "w", "arguments": {"a": 1}}'}]
    turns += [{"from": "observation", "value": "3"}, SHAREGPT[1]]
    chat = read({"conversations": turns, "tools": '[{"name": "w", "parameters": {}}]'})
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert chat.tools == ({"type": "function", "function": {"name": "w", "parameters": {}}},)


def test_weights_silence_turns_and_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]
    chat = read(
        {
            "messages": [
                {"role": "user", "content": parts},
                {**TURNS[1], "weight": 0},
                TURNS[0],
                {**TURNS[1], "weight": 1},
            ]
        }
    )
    assert chat.messages[0]["content"] == "qr"
    assert (chat.silent, chat.unequal) == (frozenset({1}), False)
    assert read({"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}).unequal
    assert read({"messages": [{**TURNS[0], "weight": 1}, TURNS[1]]}).unequal


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "a JSON list, not an object"),
        (None, "a JSON null, not an object"),
        ({"id": 1}, "no known format has these fields: 'id'"),
        ({"prompt": "a", "completon": "b"}, "no known format has 'prompt' without one of 'completion', 'response'"),
        ({"completion": "b"}, "no known format has 'completion' without one of 'prompt', 'instruction'"),
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, "field 'answer' is a number, not as in TriviaQA or NQ"),
        ({"dialogue": "a"}, "field 'summary' is missing, which dialogue/summary needs"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences .'chosen', 'rejected'.: what is trained on is"),
        ({"conversations": ["a", 1]}, "field 'conversations' is a list, not as in ToolBench conversations or ShareGPT"),
        ({"prompt": "a", "completion": ["b"]}, "field 'completion' is a list, not a string"),
        ({"prompt": "a", "completion": " "}, "field 'completion' is empty"),
        ({"prompt": "a", "completion": "\ud800"}, "field 'completion' holds half of a surrogate pair"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "mixes the forms prompt/completion and text; keep one"),
        ({"text": None}, "field 'text' is null, which text needs"),
        ({"messages": []}, "'messages' must be a list of at least"),
        ({"messages": [3]}, "message 1: is a number, not an object"),
        ({"messages": [{"role": "user"}]}, "message 1: field 'content' is missing"),
        ({"messages": [{"role": "human", "content": "a"}]}, "message 1: unknown role 'human'; known: system"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the first message is the assistant's"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message has the role 'assistant'"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": None}]}, "message 2: field 'content' is missing"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": "x"}]}, "message 2: field 'weight' is 'x', not 0 or 1"),
        ({"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{}]}]}, "tool_calls.0. has no function with"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'; text"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "x", "value": "a"}]}, "of turn 2 is 'x'; known"),
        ({"question": "q", "answer": {"value": 3}}, "field 'value' is a number, not a string"),
        ({"question": "q", "answers": {"text": [1]}}, "must hold strings that are not empty"),
    ],
)
def test_what_cannot_be_used_is_named(value: Any, message: str) -> None:
    with pytest.raises(BadLineError, match=message):
        read(value)


def test_a_file_holds_one_format() -> None:
    text = next(each for each in FORMATS if each.name == "text")
    with pytest.raises(BadLineError, match="is Alpaca, and the file began as text; one file holds one format"):
        read_entry(text, {"instruction": "i", "output": "o"}, where="f:2")


def test_the_document_shows_the_table() -> None:
    assert table() in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "value", [{"messages": TURNS}, {"prompt": "p", "completion": "c", "system": "s"}, {"text": "t"}]
)
def test_a_record_reads_back_from_its_line(value: dict[str, Any]) -> None:
    record = read(value)
    assert read(json.loads(record.line())) == record
    assert "[[" in record.marked()
