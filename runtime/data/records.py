"""What a line of training data is once it is understood: a completion, a text or a conversation.

Readers of formats (:mod:`meft.runtime.data.formats`) make records of entries, tokenizing makes examples of records.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

Message = Mapping[str, Any]


class BadLineError(ValueError):
    """An entry that cannot be used; the text says what is wrong with it, ``where`` in which part of the file."""

    def __init__(self, problem: str, where: str = "") -> None:
        super().__init__(problem)
        self.where = where


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what follows it. ``answers`` are the gold ones where they are not the completion alone."""

    prompt: str
    completion: str
    answers: tuple[str, ...] = ()
    system: str = ""
    joined_by: str = ""
    """Between prompt and completion where no chat template separates them."""

    def line(self) -> str:
        """The record as a line of training data, which reads back as it is."""
        fields: dict[str, Any] = {"prompt": self.prompt, "completion": self.completion}
        fields |= {"system": self.system} if self.system else {}
        return _line(fields | ({"answers": list(self.answers)} if self.answers else {}))

    def marked(self) -> str:
        """The record as text, ``[[`` and ``]]`` around what is learned."""
        return f"{_spoken('system', self.system)}{_spoken('prompt', self.prompt)}completion: [[{self.completion}]]"


@dataclass(frozen=True, slots=True)
class Text:
    """Running text, every token of which is learned."""

    text: str

    def line(self) -> str:
        """The record as a line of training data."""
        return _line({"text": self.text})

    def marked(self) -> str:
        """The record as text: all of it is learned."""
        return f"[[{self.text}]]"


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. Messages hold no nulls; arguments of tool calls are objects where they are valid JSON.

    ``silent`` are the places of assistant messages that carry no loss (``weight`` 0); ``unequal`` says that weights
    were given that a mask cannot follow.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    silent: frozenset[int] = frozenset()
    unequal: bool = False

    def line(self) -> str:
        """The record as a line of training data."""
        messages = [
            dict(message) | ({"weight": 0} if place in self.silent else {})
            for place, message in enumerate(self.messages)
        ]
        return _line({"messages": messages} | ({"tools": list(self.tools)} if self.tools else {}))

    def marked(self) -> str:
        """The record as text, ``[[`` and ``]]`` around what is learned."""
        return "\n".join(
            f"{message['role']}: [[{_said(message)}]]"
            if message["role"] == "assistant" and place not in self.silent
            else f"{message['role']}: {_said(message)}"
            for place, message in enumerate(self.messages)
        )


Record = Completion | Text | Chat


def _spoken(who: str, text: str) -> str:
    return f"{who}: {text}\n" if text else ""


def _said(message: Message) -> str:
    """What a message says: its content, and whatever else it holds as JSON."""
    more = {name: value for name, value in message.items() if name not in ("role", "content")}
    return str(message["content"]) + (f" {json.dumps(more, ensure_ascii=False)}" if more else "")


def _line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


# --- entries: the objects of a file -------------------------------------------------------------------------------

_JSON_NAMES: dict[type, str] = {
    str: "string",
    list: "list",
    dict: "object",
    int: "number",
    float: "number",
    bool: "boolean",
}


def json_type(value: object) -> str:
    """What JSON calls a value."""
    return _JSON_NAMES.get(type(value), "null" if value is None else type(value).__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a file and where it stands, for errors."""

    where: str
    value: Mapping[str, Any]

    def has(self, *fields: str) -> bool:
        """Whether every one of ``fields`` is there and not null."""
        return all(self.value.get(field) is not None for field in fields)

    def get(self, field: str, *kinds: type) -> Any:
        """A field of one of ``kinds``; a :class:`BadLineError` names place and field."""
        if field not in self.value:
            self.fail(field, "is missing")
        found = self.value[field]
        if kinds and (not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds)):
            wanted = " or ".join(_JSON_NAMES[kind] for kind in kinds)
            self.fail(field, f"is a {json_type(found)}, not a {wanted}")
        return found

    def text(self, field: str) -> str:
        """A string that says something, without the blanks around it."""
        found: str = self.get(field, str)
        return found.strip() or self.fail(field, "is empty")

    def optional(self, *fields: str) -> str:
        """The first of ``fields`` that is there, without the blanks around it; empty when none is."""
        return next((str(self.get(field, str)).strip() for field in fields if self.has(field)), "")

    def structure(self, field: str, *kinds: type) -> Any:
        """A list or an object, also where a table holds it as JSON in a cell."""
        found = self.value.get(field)
        if isinstance(found, str) and found.lstrip()[:1] in ("[", "{"):
            try:
                return Entry(self.where, {**self.value, field: json.loads(found)}).get(field, *kinds)
            except (ValueError, RecursionError):
                self.fail(field, "is a string that begins like JSON and is none")
        return self.get(field, *kinds)

    def objects(self, field: str) -> list[Entry]:
        """A list of objects, each an entry of its own."""
        listed = self.structure(field, list)
        for index, each in enumerate(listed):
            if not isinstance(each, dict):
                self.fail(f"{field}[{index}]", f"is a {json_type(each)}, not an object")
        return [Entry(f"{self.where}, {field}[{index}]", each) for index, each in enumerate(listed)]

    def strings(self, field: str, values: Sequence[Any] | None = None) -> tuple[str, ...]:
        """A list of strings that say something, each once; ``values`` if the list is not the field's own."""
        listed = self.structure(field, list) if values is None else values
        if not all(isinstance(each, str) and each.strip() for each in listed):
            self.fail(field, "must hold strings that are not empty")
        return tuple(dict.fromkeys(each.strip() for each in listed))

    def fail(self, field: str, problem: str) -> NoReturn:
        """Refuse the entry."""
        raise BadLineError(f"field {field!r} {problem}", self.where)
