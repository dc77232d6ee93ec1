"""What a chat template makes of a conversation, and what it leaves out without a word.

Templates are written for one model's habits: many know nothing of tools, drop what an assistant thought, or print a
tool call's arguments twice quoted. So a conversation is rendered a second time with a mark in the place of each thing
that it says; a mark that does not come out belongs to something that the model would never see. The marks stand for
what they replace by place and kind alone, so that conversations of one shape are asked about once.

A template takes the arguments of tool calls as objects or as JSON text: whichever comes out as JSON is used.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meft.runtime.data.chat_template import TemplateError, rendered
from meft.runtime.data.conversation import THOUGHTS
from meft.runtime.data.records import BadLineError, Chat, Message

KINDS = ("tools", "tool_calls", "thoughts", "content", "weights")
"""What can be lost: descriptions of tools, calls of them, what an assistant thought, what anybody said, and how much
each message should count."""
_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class _Mark:
    """What stands for something that a conversation says: of which kind, in which message (counted from 1)."""

    text: str
    kind: str
    message: int


@dataclass
class TemplateFit:
    """A tokenizer's template, asked what it loses; ``allowed`` are the kinds that may be lost."""

    tokenizer: Any
    allowed: Collection[str] = ()
    lost: dict[str, int] = field(default_factory=dict)
    """In how many conversations something of each kind was lost, as allowed."""
    _known: dict[str, tuple[bool, tuple[_Mark, ...]]] = field(default_factory=dict)

    def fitted(self, chat: Chat) -> Chat:
        """The conversation as the template takes it.

        Raises:
            BadLineError: the template refuses it, or loses what may not be lost.
        """
        chat = Chat(self._thoughts_named(chat.messages), chat.tools, chat.silent, chat.unequal)
        marked, marks = _marked(chat)
        key = json.dumps([marked.messages, marked.tools], default=str)
        if key not in self._known:
            self._known[key] = self._judged(marked, marks)
        as_text, missing = self._known[key]
        self._note(missing, chat)
        if missing:
            chat = _without_empty_turns(chat, missing)
        return _with_text_arguments(chat) if as_text else chat

    def render(self, chat: Chat, until: int | None = None, *, add_generation_prompt: bool = False) -> str:
        """The conversation up to a message as text; a :class:`BadLineError` where the template refuses it."""
        try:
            return self._render(chat, until, add_generation_prompt=add_generation_prompt)
        except TemplateError as error:
            raise BadLineError(f"the tokenizer's chat template refuses it ({error})") from error

    def _render(self, chat: Chat, until: int | None, *, add_generation_prompt: bool = False) -> str:
        messages = chat.messages[:until]
        return rendered(self.tokenizer, messages, tools=chat.tools, add_generation_prompt=add_generation_prompt)

    def _thoughts_named(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Thoughts under the name that the template reads, where it reads another than the data's."""
        template = self.tokenizer.chat_template
        known = [name for name in THOUGHTS if name in str(template)] if isinstance(template, str | dict) else []
        if not known or not any(name in message for message in messages for name in THOUGHTS):
            return tuple(messages)
        return tuple(_renamed(message, known) for message in messages)

    def _judged(self, marked: Chat, marks: Sequence[_Mark]) -> tuple[bool, tuple[_Mark, ...]]:
        """Whether arguments must be text, and the marks that do not come out."""
        arguments = any("tool_calls" in message for message in marked.messages)
        as_objects = self._missing(marked, marks)
        if arguments and (as_objects is None or _any_call(as_objects) or self._quoted_wrong(marked, marks)):
            in_text = _with_text_arguments(marked)
            as_text = self._missing(in_text, marks)
            if as_text is not None and not _any_call(as_text) and not self._quoted_wrong(in_text, marks):
                return True, as_text
        return False, as_objects or ()

    def _missing(self, marked: Chat, marks: Sequence[_Mark]) -> tuple[_Mark, ...] | None:
        """Marks that do not come out where their message is learned from; None if the template refuses."""
        missing: list[_Mark] = []
        waiting = list(marks)
        for turn, message in enumerate(marked.messages, 1):
            if message["role"] != "assistant":
                continue
            try:
                text = self._render(marked, turn)
            except TemplateError:
                return None
            missing += [mark for mark in waiting if mark.message <= turn and mark.text not in text]
            waiting = [mark for mark in waiting if mark.message > turn]
        return tuple(missing)

    def _quoted_wrong(self, marked: Chat, marks: Sequence[_Mark]) -> bool:
        """Whether arguments come out in Python's spelling, or as a string inside a string."""
        last = max(place for place, message in enumerate(marked.messages, 1) if message["role"] == "assistant")
        text = self._render(marked, last)
        calls = (mark.text for mark in marks if mark.kind == "tool_calls")
        return any(f"'{mark}'" in text or f'\\"{mark}' in text for mark in calls)

    def _note(self, missing: Sequence[_Mark], chat: Chat) -> None:
        found = {mark.kind: mark.message for mark in reversed(missing)}
        if chat.unequal:
            found["weights"] = 0
        refused = {kind: message for kind, message in found.items() if kind not in self.allowed}
        if refused:
            raise BadLineError(_refusal(refused))
        for kind in found:
            self.lost[kind] = self.lost.get(kind, 0) + 1


def _refusal(refused: Mapping[str, int]) -> str:
    option = f"--allow-loss-of {','.join(refused)} trains without"
    if set(refused) == {"weights"}:
        return f"weights other than 0 and 1, or of others than the assistant, cannot be followed; {option} them"
    places = [f"{kind} (message {place})" if place else kind for kind, place in refused.items()]
    return f"the chat template leaves out {' and '.join(places)}; {option}, or give another template"


def _renamed(message: Message, known: Sequence[str]) -> Message:
    given = next((name for name in THOUGHTS if name in message), None)
    if given is None or given in known:
        return message
    return {name: value for name, value in message.items() if name != given} | {known[0]: message[given]}


def _without_empty_turns(chat: Chat, missing: Sequence[_Mark]) -> Chat:
    """No loss on a turn of which nothing is left: it would teach to say nothing."""
    places = {mark.message - 1 for mark in missing if mark.kind != "tools"}
    empty = {place for place in places if not chat.messages[place]["content"].strip()}
    return Chat(chat.messages, chat.tools, chat.silent | empty, chat.unequal)


def _any_call(missing: Sequence[_Mark]) -> bool:
    return any(mark.kind == "tool_calls" for mark in missing)


def _with_text_arguments(chat: Chat) -> Chat:
    """The same with the arguments of its calls as JSON text."""
    messages = []
    for message in chat.messages:
        calls = [
            call | {"function": call["function"] | {"arguments": _as_text(call["function"]["arguments"])}}
            for call in message.get("tool_calls", ())
        ]
        messages.append({**message, **({"tool_calls": calls} if calls else {})})
    return Chat(tuple(messages), chat.tools, chat.silent, chat.unequal)


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


# --- marks ----------------------------------------------------------------------------------------------------------


class _Marker:
    """Gives out marks: words that no template holds and none changes by trimming or quoting."""

    def __init__(self) -> None:
        self.marks: list[_Mark] = []

    def new(self, kind: str, message: int) -> str:
        mark = f"zq{len(self.marks)}x{message}qz"
        self.marks.append(_Mark(mark, kind, message))
        return mark


def _marked(chat: Chat) -> tuple[Chat, tuple[_Mark, ...]]:
    """The conversation with a mark for each thing that it says, and the marks."""
    marker = _Marker()
    tools = tuple(_marked_tool(tool, marker) for tool in chat.tools)
    messages = tuple(_marked_message(message, number, marker) for number, message in enumerate(chat.messages, 1))
    return Chat(messages, tools), tuple(marker.marks)


def _marked_tool(tool: Mapping[str, Any], marker: _Marker) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return dict(tool)
    marks = {
        name: marker.new("tools", 1)
        for name in ("name", "description")
        if isinstance(function.get(name), str) and function[name]
    }
    return {**tool, "function": {**function, **marks}}


def _marked_message(message: Message, number: int, marker: _Marker) -> dict[str, Any]:
    made = dict(message)
    made["content"] = _marked_content(message["content"], number, marker, message["role"] == "assistant")
    for name in THOUGHTS:
        if name in message:
            made[name] = marker.new("thoughts", number)
    if "tool_calls" in message:
        made["tool_calls"] = [_marked_call(call, number, marker) for call in message["tool_calls"]]
    return made


def _marked_content(content: str, number: int, marker: _Marker, thinks: bool) -> str:
    """A mark in place of the text, and one in place of the thoughts that it holds in the usual tags."""
    if not content.strip():
        return content
    before, close, after = content.partition(_CLOSE)
    if not (thinks and close):
        return marker.new("content", number)
    opening = _OPEN if _OPEN in before else ""
    thoughts = marker.new("thoughts", number) if before.replace(_OPEN, "").strip() else ""
    return f"{opening}\n{thoughts}\n{close}\n\n{marker.new('content', number) if after.strip() else ''}"


def _marked_call(call: Mapping[str, Any], number: int, marker: _Marker) -> dict[str, Any]:
    function = call["function"]
    name = marker.new("tool_calls", number)
    return {**call, "function": {"name": name, "arguments": _marked_values(function["arguments"], number, marker)}}


def _marked_values(value: Any, number: int, marker: _Marker) -> Any:
    if isinstance(value, Mapping):
        return {name: _marked_values(each, number, marker) for name, each in value.items()}
    if isinstance(value, list):
        return [_marked_values(each, number, marker) for each in value]
    return value if value == "" else marker.new("tool_calls", number)


def kinds_given(text: str) -> tuple[str, ...]:
    """The kinds of ``--allow-loss-of``; a :class:`ValueError` for one that is unknown."""
    kinds = tuple(_split(text))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"{unknown[0]!r} is" if unknown else "nothing is")
    return kinds


def _split(text: str) -> Iterator[str]:
    return (part.strip().replace("-", "_") for part in text.split(",") if part.strip())
