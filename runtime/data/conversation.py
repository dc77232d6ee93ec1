"""Conversations as people keep them, brought into the one shape that chat templates take.

OpenAI's messages: content that is null, missing, or a list of text parts; ``tool_calls`` with arguments as a JSON
string; the older ``function_call`` and ``functions``; ``weight``; reasoning under any of the names in use. ShareGPT's
turns: ``from`` and ``value`` with its many names for the same speakers. LIMA's, Capybara's, xLAM's and ToolBench's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from meft.runtime.data.metrics import FINISH, called_apis
from meft.runtime.data.records import BadLineError, Chat, Completion, Entry, Record, json_type

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
_TOOL_NAME = re.compile(r"""['"]name['"]\s*:\s*['"]([\w.\-]+)['"]""")
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


def read_alternating(entry: Entry) -> Chat | None:
    """LIMA's list of texts, the user's first; None where nothing answers."""
    said = entry.structure("conversations", list)
    roles = ("user", "assistant")
    spoken = [{"role": roles[place % 2], "content": text} for place, text in enumerate(said[: len(said) // 2 * 2])]
    return chat_of(spoken, (), field="conversations") if spoken else None


def read_exchanges(entry: Entry) -> Chat:
    """Capybara's list of inputs and outputs."""
    system = entry.optional("system", "system_prompt")
    messages = [{"role": "system", "content": system}] if system else []
    for each in entry.objects("conversation"):
        messages.append({"role": "user", "content": each.text("input")})
        messages.append({"role": "assistant", "content": each.text("output")})
    return chat_of(messages, (), field="conversation")


def read_calls(entry: Entry) -> Chat:
    """xLAM's query, the tools that it may call, and the calls that answer it."""
    calls = {"role": "assistant", "tool_calls": entry.structure("answers", list)}
    return chat_of([{"role": "user", "content": entry.text("query")}, calls], _tools(entry), field="answers")


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


# --- what tells conversations -----------------------------------------------------------------------------------------


def turns_of(value: Any) -> list[Any]:
    """Those of a list's items that can be turns."""
    return [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []


def speaks(field: str) -> Callable[[Mapping[str, Any]], bool]:
    """What tells ShareGPT's turns under a name."""

    def tells(value: Mapping[str, Any]) -> bool:
        found = value[field]
        if isinstance(found, str):
            return found.lstrip()[:1] == "["
        turns = turns_of(found)
        known = (str(turn.get("from")).lower() in SHAREGPT_ROLES or "role" in turn for turn in turns)
        return bool(turns) and any(known)

    return tells


# --- ToolBench: which of a tool's APIs to call ------------------------------------------------------------------------


def tool_prompt(query: str, apis: Iterable[str]) -> str:
    """A request and the names to choose among."""
    return f"{query}\nAPIs: {', '.join(apis)}\nWhich of them should be called?"


def toolbench_name(tool: str, api: str) -> str:
    """ToolBench's own name of an API: ``api_for_tool`` in lower case, other characters as single underscores."""
    return "_for_".join(re.sub(r"_+", "_", re.sub(r"\W", "_", part)).strip("_").lower() for part in (api, tool))


def _chosen(query: str, offered: Iterable[str], called: Iterable[str]) -> Record | None:
    gold = tuple(dict.fromkeys(called))
    prompt = tool_prompt(query, dict.fromkeys(name for name in offered if name != FINISH))
    return Completion(prompt, ", ".join(gold), gold, joined_by="\n") if gold else None


def read_toolbench_query(entry: Entry) -> Record | None:
    """A request with the APIs that it offers and those that are relevant."""
    offered = [toolbench_name(api.text("tool_name"), api.text("api_name")) for api in entry.objects("api_list")]
    gold = []
    for pair in entry.get("relevant APIs", list):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)):
            entry.fail("relevant APIs", "must hold pairs [tool_name, api_name]")
        gold.append(toolbench_name(*pair))
    return _chosen(entry.text("query"), offered, gold)


def read_toolbench(entry: Entry) -> Record | None:
    """ToolLLaMA's conversation: its request, the APIs that the system lists, and those that were called."""
    turns = [(turn.text("from"), turn.get("value", str)) for turn in entry.objects("conversations")]
    asked = [text for speaker, text in turns if speaker == "user"]
    if not asked:
        entry.fail("conversations", "has no turn from 'user'")
    offered = [name for speaker, text in turns if speaker == "system" for name in _TOOL_NAME.findall(text)]
    acting = [text for speaker, text in turns if speaker == "assistant" and "Action:" in text]
    called = [name for text in acting for name in sorted(called_apis(text))]
    return _chosen(asked[0].strip().removesuffix("Begin!").strip(), offered, called)


def is_toolbench(value: Mapping[str, Any]) -> bool:
    """ToolLLaMA's turns: a system that lists APIs, and an assistant that names its actions."""
    turns = [(str(turn.get("from")), str(turn.get("value"))) for turn in turns_of(value["conversations"])]
    return any(speaker == "system" and _TOOL_NAME.search(text) for speaker, text in turns) and any(
        speaker == "assistant" and "Action:" in text for speaker, text in turns
    )
