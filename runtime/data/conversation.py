"""Conversations as people keep them, brought into the one shape that chat templates take.

OpenAI's messages: content that is null, missing, or a list of text parts; ``tool_calls`` with arguments as a JSON
string; the older ``function_call`` and ``functions``; ``weight``; reasoning under any of the names in use. ShareGPT's
turns: ``from`` and ``value`` with its many names for the same speakers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from meft.runtime.data.records import BadLineError, Chat, Entry, json_type

ROLES = ("system", "developer", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names under which messages carry what an assistant thought before it spoke."""
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT_PARTS = ("thinking", "reasoning")


def read_messages(entry: Entry, field: str = "messages") -> Chat:
    """OpenAI's format, and what libraries make of it."""
    listed = entry.structure(field, list)
    return chat_of(listed, _tools(entry), field=field)


def read_prompted(entry: Entry) -> Chat:
    """``prompt`` and ``completion`` as lists of messages: loss on those of the completion alone."""
    prompt, completion = entry.structure("prompt", list), entry.structure("completion", list)
    chat = chat_of([*prompt, *completion], _tools(entry), field="prompt and completion")
    asked = {place for place in range(len(prompt)) if chat.messages[place]["role"] == "assistant"}
    if all(message["role"] != "assistant" for message in chat.messages[len(prompt) :]):
        raise BadLineError("the completion holds no message of the assistant, so there is nothing to learn")
    return Chat(chat.messages, chat.tools, chat.silent | asked, chat.unequal)


def read_sharegpt(entry: Entry, field: str = "conversations") -> Chat | None:
    """ShareGPT's turns; None where there is no turn of the user's before the assistant's."""
    messages = [_turn(turn, number) for number, turn in enumerate(entry.objects(field), 1)]
    system = entry.optional("system", "system_prompt")
    if system and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    if not spoken or spoken[0] != "user" or "assistant" not in spoken:
        return None
    return chat_of(messages, _tools(entry), field=field)


def chat_of(listed: Sequence[Any], tools: Sequence[Any], *, field: str) -> Chat:
    """Messages, checked one by one; a :class:`BadLineError` says which is wrong with what."""
    if not listed:
        raise BadLineError(f"{field!r} must be a list of at least a user's and an assistant's message")
    messages, silent, unequal = [], set(), False
    for place, message in enumerate(listed):
        try:
            made, weight = _message(message)
        except BadLineError as error:
            raise BadLineError(f"message {place + 1}: {error}") from None
        messages.append(made)
        if made["role"] == "assistant" and weight == 0:
            silent.add(place)
        unequal |= weight not in (None, 0, 1) or (made["role"] != "assistant" and weight not in (None, 0))
    if messages[0]["role"] == "assistant":
        raise BadLineError("the first message is the assistant's; a conversation starts with system or user")
    if all(message["role"] != "assistant" for message in messages):
        raise BadLineError("no message has the role 'assistant', so there is nothing to learn")
    return Chat(tuple(messages), tuple(tools), frozenset(silent), unequal)


def _message(message: Any) -> tuple[dict[str, Any], float | None]:
    """The message without nulls, and its weight."""
    if not isinstance(message, dict):
        raise BadLineError(f"is a {json_type(message)}, not an object with role and content")
    entry = Entry("", {name: value for name, value in message.items() if value is not None})
    role = entry.text("role")
    role = "tool" if role == "function" else role
    if role not in ROLES:
        raise BadLineError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
    made = dict(entry.value) | {"role": role}
    weight = _weight(made)
    calls = _calls(made)
    thoughts = _content(entry, made)
    if calls:
        made["tool_calls"] = calls
    if role == "assistant" and not (made["content"].strip() or calls or thoughts):
        entry.fail("content", "is empty" if entry.has("content") else "is missing")
    if role != "assistant" and "content" not in entry.value:
        entry.fail("content", "is missing")
    return made, weight


def _weight(made: dict[str, Any]) -> float | None:
    weight = made.pop("weight", None)
    if weight is not None and (not isinstance(weight, int | float) or weight < 0):
        raise BadLineError(f"field 'weight' is {weight!r}, not 0 or 1")
    return weight


def _content(entry: Entry, made: dict[str, Any]) -> bool:
    """Put the content as one string and thoughts found in its parts in place; whether there are thoughts."""
    content = entry.value.get("content", made.pop("refusal", ""))
    if isinstance(content, list):
        texts, thoughts = _parts(content)
        content = texts
        if thoughts and not any(made.get(name) for name in THOUGHTS):
            made[THOUGHTS[0]] = thoughts
    if not isinstance(content, str):
        entry.fail("content", f"is a {json_type(content)}, not a string")
    made["content"] = content
    for name in THOUGHTS:
        if name in made and not (isinstance(made[name], str) and made[name].strip()):
            del made[name]
    return any(name in made for name in THOUGHTS)


def _parts(parts: Sequence[Any]) -> tuple[str, str]:
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        said = part if isinstance(part, str) else _said(part, kind)
        if said is None:
            raise BadLineError(f"field 'content' holds a part of type {kind!r}; text alone is trained on")
        (thoughts if kind in _THOUGHT_PARTS else texts).append(said)
    return "".join(texts), "".join(thoughts)


def _said(part: Any, kind: str) -> str | None:
    """The text of a part, None where it holds none."""
    if not isinstance(part, dict) or kind not in (*_TEXT_PARTS, *_THOUGHT_PARTS):
        return None
    names = ("text", kind)
    return next((part[name] for name in names if isinstance(part.get(name), str)), None)


def _calls(made: dict[str, Any]) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's shape, their arguments as objects where they are valid JSON."""
    listed = made.pop("tool_calls", None)
    old = made.pop("function_call", None)
    if isinstance(listed, str):
        listed = _decoded(listed)
    if old is not None and not listed:
        listed = [{"type": "function", "function": old}]
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise BadLineError(f"field 'tool_calls' is a {json_type(listed)}, not a list")
    return [_call(call, number) for number, call in enumerate(listed)]


def _call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadLineError(f"tool_calls[{number}] has no function with a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        decoded = _decoded(arguments) if arguments.strip() else {}
        arguments = decoded if isinstance(decoded, dict) else arguments
    elif not isinstance(arguments, dict):
        raise BadLineError(f"tool_calls[{number}] has arguments that are a {json_type(arguments)}, not an object")
    around = {name: value for name, value in call.items() if name in ("id", "type", "index")}
    return {"type": "function", **around, "function": {"name": function["name"], "arguments": arguments}}


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _tools(entry: Entry) -> list[Any]:
    """``tools``, or the older ``functions``, also as a JSON string."""
    field = next((name for name in ("tools", "functions") if entry.has(name) and entry.value[name] != ""), None)
    if field is None:
        return []
    listed = entry.structure(field, list)
    for index, tool in enumerate(listed):
        if not isinstance(tool, Mapping):
            entry.fail(f"{field}[{index}]", f"is a {json_type(tool)}, not an object")
    return [tool if "function" in tool else {"type": "function", "function": dict(tool)} for tool in listed]


def _turn(turn: Entry, number: int) -> dict[str, Any]:
    """One of ShareGPT's turns as a message; with ``role`` and ``content`` it is one already."""
    if turn.has("role") and not turn.has("from"):
        return dict(turn.value)
    speaker = turn.text("from")
    role = SHAREGPT_ROLES.get(speaker.lower())
    if role is None:
        turn.fail("from", f"of turn {number} is {speaker!r}; known: {', '.join(SHAREGPT_ROLES)}")
    value = turn.get("value", str)
    if speaker.lower() in _CALLS:
        decoded = _decoded(value)
        listed = decoded if isinstance(decoded, list) else [decoded]
        return {"role": role, "tool_calls": listed}
    made: dict[str, Any] = {"role": role, "content": value}
    return made | ({"weight": turn.value["weight"]} if turn.has("weight") else {})
