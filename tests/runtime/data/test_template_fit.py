"""What a chat template loses of a conversation is refused or said; what it prints wrong is given otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from meft.runtime.data.examples import IGNORE_INDEX, tokenize_record
from meft.runtime.data.formats import read_entry, recognise
from meft.runtime.data.records import BadLineError
from meft.runtime.data.template_fit import TemplateFit, kinds_given

PLAIN = (
    "{% for m in messages %}({{ m.role }}){{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}(assistant){% endif %}"
)
CALLS = "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} ARGUMENTS ENDCALL{% endfor %}"
WHOLE = (
    "{% for t in tools or [] %}TOOL {{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}({{ m.role }}){% if m.thinking %}THINK {{ m.thinking }} ENDTHINK{% endif %}{{ m.content }}"
    + CALLS
    + "\n{% endfor %}{% if add_generation_prompt %}(assistant){% endif %}"
)
AS_OBJECT = WHOLE.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")
AS_TEXT = WHOLE.replace("ARGUMENTS", "{{ c.function.arguments }}")
JOINED = WHOLE.replace("ARGUMENTS", "{{ ' ' + c.function.arguments }}")
NO_ARGUMENTS = WHOLE.replace("ARGUMENTS", "")
DROPS_THOUGHTS = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")
LAST_THOUGHT = PLAIN.replace("m.content", "m.content if loop.last else m.content.split('</think>')[-1]")

CALL = {"type": "function", "function": {"name": "look", "arguments": '{"city": "Rome", "days": 3}'}}
TOOL = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {}}}
ASK = {"role": "user", "content": "q"}
CALLING = {"messages": [ASK, {"role": "assistant", "content": "so", "tool_calls": [CALL]}], "tools": [TOOL]}
SILENT = {
    "messages": [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ASK,
        {"role": "assistant", "content": "x"},
    ]
}
THINKING = {"messages": [ASK, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]}
TAGGED = {"messages": [ASK, {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}]}


class Characters:
    """One token per character; the real tokenizer renders the template."""

    eos_token_id = pad_token_id = None

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer, self.chat_template = tokenizer, template

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options))


def examples(tokenizer: Any, template: str, value: dict[str, Any], *allowed: str) -> list[tuple[str, str]]:
    """Text and what is learned of it."""
    characters = Characters(tokenizer, template)
    record = read_entry(recognise(value), value, where="f:1")
    assert record is not None
    found = tokenize_record(record, characters, fit=TemplateFit(characters, allowed))
    return [
        ("".join(map(chr, each.input_ids)), "".join(chr(x) for x in each.labels if x != IGNORE_INDEX)) for each in found
    ]


@pytest.mark.parametrize(
    ("template", "value", "lost"),
    [
        (PLAIN, CALLING, r"tool_calls \(message 2\) and tools \(message 1\); --allow-loss-of tool_calls,tools trains"),
        (NO_ARGUMENTS, CALLING, r"tool_calls \(message 2\);"),
        (PLAIN, THINKING, r"thoughts \(message 2\); --allow-loss-of thoughts"),
        (DROPS_THOUGHTS, TAGGED, r"thoughts \(message 2\)"),
        (PLAIN.replace("{{ m.content }}", "{% if m.role != 'user' %}{{ m.content }}{% endif %}"), TAGGED, "content"),
    ],
)
def test_what_a_template_leaves_out_is_refused(glass_tokenizer, template, value, lost) -> None:
    with pytest.raises(BadLineError, match=lost):
        examples(glass_tokenizer, template, value)


def test_what_may_be_lost_is_counted(glass_tokenizer) -> None:
    tokenizer = Characters(glass_tokenizer, PLAIN)
    fit = TemplateFit(tokenizer, ("tools", "tool_calls"))
    record = read_entry(recognise(CALLING), CALLING, where="f:1")
    for _ in range(2):
        tokenize_record(record, tokenizer, fit=fit)
    assert fit.lost == {"tool_calls": 2, "tools": 2}
    with pytest.raises(BadLineError, match=r"leaves out tools \(message 1\); --allow-loss-of tools"):
        examples(glass_tokenizer, PLAIN, CALLING, "tool_calls")


def test_a_turn_of_which_nothing_is_left_teaches_nothing(glass_tokenizer) -> None:
    [(text, learned)] = examples(glass_tokenizer, PLAIN, SILENT, "tool_calls")
    assert text == "(user)q\n(assistant)\n(user)q\n(assistant)x\n"
    assert learned == "x\n"


@pytest.mark.parametrize("template", [AS_OBJECT, AS_TEXT, JOINED])
def test_arguments_come_out_as_json(glass_tokenizer, template) -> None:
    """Whether the template prints an object, what it is given, or a string that it joins to others."""
    [(_, learned)] = examples(glass_tokenizer, template, CALLING)
    assert '{"city": "Rome", "days": 3}' in learned
    assert learned.startswith("soCALL look")


def test_thoughts_go_by_the_name_that_the_template_reads(glass_tokenizer) -> None:
    [(_, learned)] = examples(glass_tokenizer, AS_OBJECT, THINKING)
    assert learned == "THINK hm ENDTHINKa"


def test_thoughts_that_a_template_drops_later_are_learned_in_their_own_turn(glass_tokenizer) -> None:
    value = {"messages": [*TAGGED["messages"], ASK, {"role": "assistant", "content": "<think>\nso\n</think>\n\nb"}]}
    first, second = examples(glass_tokenizer, LAST_THOUGHT, value)
    assert first[1] == "<think>\nhm\n</think>\n\na\n"
    assert second[0].startswith("(user)q\n(assistant)\n\na\n(user)q")
    assert second[1] == "<think>\nso\n</think>\n\nb\n"


def test_weights_between(glass_tokenizer) -> None:
    value = {"messages": [ASK, {"role": "assistant", "content": "a", "weight": 0.5}]}
    with pytest.raises(BadLineError, match="weights other than 0 and 1"):
        examples(glass_tokenizer, PLAIN, value)
    assert examples(glass_tokenizer, PLAIN, value, "weights")[0][1] == "a\n"


def test_kinds_are_named_on_the_command_line() -> None:
    assert kinds_given("tools, tool-calls") == ("tools", "tool_calls")
    with pytest.raises(ValueError, match="'tool' is"):
        kinds_given("tool")
