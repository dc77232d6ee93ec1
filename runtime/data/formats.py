"""The formats of training data and tasks, one table: which fields tell each, and what becomes of an entry.

The table :data:`FORMATS` is in order of preference: the first whose ``needs`` are all there (and whose ``tells``, where
fields alone do not tell it, agrees) is the format of a file, by its first entry. Every other entry must be of the same.
The one in ``docs/data.md`` is made of it.

A reader gives a :class:`~meft.runtime.data.records.Record`, or None for an entry with nothing to learn, such as a
question that no text answers: those are left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from meft.runtime.data.conversation import (
    is_toolbench,
    read_alternating,
    read_calls,
    read_exchanges,
    read_messages,
    read_prompted,
    read_sharegpt,
    read_toolbench,
    read_toolbench_query,
    speaks,
    turns_of,
)
from meft.runtime.data.metrics import Metric, final_number
from meft.runtime.data.records import BadLineError, Completion, Entry, Record, Text, json_type

NQ_OPEN_MAX_TOKENS = 5
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations for a calculator, which no output needs
_NO_ANSWER = ("<unk>",)  # what TriviaQA has in the place of its test split's answers


@dataclass(frozen=True)
class Format:
    """One way of writing data down.

    ``reads`` are all fields that the reader looks at; others are named when the file is read. ``metric`` scores an
    output where the format is a task; ``learns`` says in words what is seen and learned.
    """

    name: str
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    learns: str
    read: Callable[[Entry], Record | None]
    metric: Metric | None = None
    tells: Callable[[Mapping[str, Any]], bool] = lambda _: True

    def fits(self, value: Mapping[str, Any]) -> bool:
        """Whether an entry is of this format."""
        return all(value.get(field) is not None for field in self.needs) and self.tells(value)


def recognise(value: Any) -> Format:
    """The format of an entry; a :class:`BadLineError` where there is none, or two that say different things."""
    if not isinstance(value, dict):
        raise BadLineError(f"a JSON {json_type(value)}, not an object")
    fitting = [format_ for format_ in FORMATS if format_.fits(value)]
    if {"prompt/completion", "text"} <= {format_.name for format_ in fitting}:
        raise BadLineError("mixes the forms prompt/completion and text; keep one")
    if fitting:
        return fitting[0]
    raise BadLineError(_unknown(value))


def _unknown(value: Mapping[str, Any]) -> str:
    """What is missing of the formats that come nearest, or which fields are there."""
    there = ", ".join(map(repr, value)) or "none"
    if {"chosen", "rejected"} <= value.keys():
        return "preferences ('chosen', 'rejected'): what is trained on is an answer; give prompt and completion"
    nearest = max(sum(field in value for field in format_.needs) for format_ in FORMATS)
    near = [each for each in FORMATS if sum(field in value for field in each.needs) == nearest]
    if not nearest:
        return f"no known format has these fields: {there}"
    absent = list(dict.fromkeys(field for each in near for field in each.needs if value.get(field) is None))
    whole = [each for each in near if all(value.get(field) is not None for field in each.needs)]
    if whole:
        field, names = whole[0].needs[-1], dict.fromkeys(each.name for each in whole)
        return f"field {field!r} is a {json_type(value[field])}, not as in {' or '.join(names)}"
    if len(absent) == 1 or any(field in value for field in absent):
        first = next((field for field in absent if field in value), absent[0])
        of = next(each.name for each in near if first in each.needs)
        return f"field {first!r} is {'null' if first in value else 'missing'}, which {of} needs (found {there})"
    shared = next(field for field in near[0].needs if field in value)
    return f"no known format has {shared!r} without one of {', '.join(map(repr, absent))} (found {there})"


def read_entry(format_: Format, value: Any, *, where: str) -> Record | None:
    """An entry of a file whose format is known; a :class:`BadLineError` says what is wrong, or that it is another."""
    if not isinstance(value, dict):
        raise BadLineError(f"a JSON {json_type(value)}, not an object")
    if not format_.fits(value):
        other = next((each for each in FORMATS if each.fits(value)), None)
        related = other is not None and (set(other.needs) & set(format_.needs) or set(other.reads) & set(format_.needs))
        if other is not None and not related:
            raise BadLineError(f"is {other.name}, and the file began as {format_.name}; one file holds one format")
    record = format_.read(Entry(where, value))
    if record is not None:
        _refuse_surrogates(record)
    return record


def _refuse_surrogates(record: Record) -> None:
    try:
        record.line().encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; no tokenizer can read one
        fields = ("prompt", "completion", "text")
        named = next((name for name in fields if _has_surrogate(getattr(record, name, ""))), "messages")
        raise BadLineError(f"field {named!r} holds half of a surrogate pair (\\ud800 to \\udfff)") from None


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


# --- readers: an entry becomes a record, or None --------------------------------------------------------------------


def _own(entry: Entry) -> Record | None:
    if isinstance(entry.value.get("prompt"), list):
        return read_prompted(entry)
    prompt, completion = entry.get("prompt", str), entry.get("completion", str)
    if not completion.strip():
        entry.fail("completion", "is empty")
    if entry.value.get("label") is False:  # KTO's kind of an answer that nobody wants
        return None
    answers: tuple[str, ...] = ()
    if entry.has("answers"):
        answers = entry.strings("answers") or entry.fail("answers", "is empty")
    return Completion(prompt, completion, answers, system=entry.optional("system"))


def _text(entry: Entry) -> Text:
    entry.text("text")
    return Text(entry.value["text"])


def _asked(
    question: tuple[str, ...], answer: str, *, more: tuple[str, ...] = (), system: tuple[str, ...] = ()
) -> Callable[[Entry], Record | None]:
    """A reader of two plain fields: the first of ``question`` that is there, a blank line and ``more``, then
    ``answer``."""

    def read(entry: Entry) -> Record | None:
        name = next((each for each in question if entry.has(each)), question[0])
        prompt, extra = entry.text(name), entry.optional(*more) if more else ""
        completion = entry.optional(answer) if answer in entry.value else entry.text(answer)
        if not completion:
            return None
        asked = f"{prompt}\n\n{extra}" if extra else prompt
        return Completion(asked, completion, system=entry.optional(*system) if system else "", joined_by="\n")

    return read


def _question(entry: Entry, answers: tuple[str, ...], *, field: str = "question") -> Completion | None:
    """A closed-book question; None without an answer."""
    question = entry.text(field)
    answers = tuple(each for each in answers if each not in _NO_ANSWER)
    return Completion(question, answers[0], answers, joined_by="\n") if answers else None


def _squad(entry: Entry) -> Record | None:
    """``answers`` as published (a list of objects), as ``datasets`` has it (an object of lists), or plain."""
    if entry.value.get("is_impossible"):  # SQuAD 2.0: answerable by no text, so by no memory of one
        return _question(entry, ())
    answers = entry.structure("answers", list, dict)
    if isinstance(answers, dict):
        texts = Entry(f"{entry.where}, answers", answers).structure("text", list)
        return _question(entry, entry.strings("answers", texts))
    if all(isinstance(each, str) for each in answers):
        return _question(entry, entry.strings("answers", answers))
    return _question(entry, tuple(dict.fromkeys(answer.text("text") for answer in entry.objects("answers"))))


def _nq_open(entry: Entry) -> Record | None:
    return _question(entry, entry.strings("answer") if entry.has("answer") else _nothing(entry))


def _triviaqa(question: str, answer: str, value: str, aliases: str) -> Callable[[Entry], Record | None]:
    def read(entry: Entry) -> Record | None:
        given = Entry(f"{entry.where}, {answer}", entry.structure(answer, dict))
        first = given.optional(value)
        others = given.strings(aliases) if given.has(aliases) else ()
        return _question(entry, tuple(dict.fromkeys((first, *others))) if first else (), field=question)

    return read


def _plain_question(entry: Entry) -> Record | None:
    answer = entry.optional("answer") if entry.has("answer") else ""
    return _question(entry, (answer,) if answer else _nothing(entry))


def _nothing(entry: Entry) -> tuple[str, ...]:
    """No answers, where the field for them is there, though null or empty."""
    entry.get("answer")
    return ()


def _gsm8k(entry: Entry) -> Record:
    solution = _CALCULATOR.sub("", entry.text("answer"))
    _, marker, result = solution.rpartition("####")
    number = final_number(result) if marker else None
    if number is None:
        entry.fail("answer", "has no number after ####")
    return Completion(entry.text("question"), solution, (str(number),), joined_by="\n")


def _metamath(entry: Entry) -> Record | None:
    response = entry.text("response")
    _, marker, result = response.rpartition("The answer is")
    plain = result.strip(" :.$\n")
    number = final_number(plain) if re.fullmatch(r"[-+]?[\d,.]+%?(?:/\d+)?", plain) else None
    query = entry.text("query")
    return Completion(query, response, (str(number),), joined_by="\n") if marker and number is not None else None


def _simplified_nq(entry: Entry) -> Record | None:
    tokens = entry.text("document_text").split(" ")
    answers: dict[str, None] = {}
    for annotation in entry.objects("annotations"):
        for span in annotation.objects("short_answers"):
            first, last = span.get("start_token", int), span.get("end_token", int)
            if not 0 <= first < last <= len(tokens):
                span.fail("end_token", f"{last} does not fit start_token {first} and {len(tokens)} tokens")
            words = [word for word in tokens[first:last] if not (word.startswith("<") and word.endswith(">"))]
            if words and len(words) <= NQ_OPEN_MAX_TOKENS:
                answers[" ".join(words)] = None
    return _question(entry, tuple(answers), field="question_text")


# --- what tells formats of the same fields apart --------------------------------------------------------------------


def _is(field: str, *kinds: type) -> Callable[[Mapping[str, Any]], bool]:
    def tells(value: Mapping[str, Any]) -> bool:
        found = value[field]
        if isinstance(found, str) and str not in kinds:  # a table's cell
            return found.lstrip()[:1] in {"[" if kind is list else "{" for kind in kinds}
        return isinstance(found, kinds)

    return tells


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _has_solution(value: Mapping[str, Any]) -> bool:
    return isinstance(value["answer"], str) and "####" in value["answer"]


def _has_final_answer(value: Mapping[str, Any]) -> bool:
    return {"type", "original_question"} <= value.keys() or "The answer is" in str(value["response"])


# --- the table ------------------------------------------------------------------------------------------------------


PAIRS: dict[str, tuple[str, ...]] = {
    "question": ("response", "solution", "long_answer", "correct_answer"),
    "Question": ("Answer", "Response"),
    "prompt": ("response", "output", "answer", "canonical_solution"),
    "instruction": ("completion", "answer"),
    "input": ("output", "response", "target"),
    "inputs": ("targets",),
    "query": ("answer",),
    "problem": ("solution", "answer"),
    "user": ("assistant",),
    "human": ("assistant", "bot"),
    "article": ("highlights",),
    "document": ("summary",),
    "dialogue": ("summary",),
}
"""Plain fields of published data: what is asked, and names under which the answer to it is found."""
_PLAIN = {f"{asked}/{said}" for asked, several in PAIRS.items() for said in several}


def _pair(asked: str, said: str) -> Format:
    """Two plain fields, and perhaps a system prompt."""
    system = ("system_prompt", "system")
    read = _asked((asked,), said, system=system)
    return Format(
        f"{asked}/{said}", (asked, said), (asked, said, *system), f"the {asked}; loss on the {said}", read, "em"
    )


_CLOSED = "closed book: the question alone; loss on the first answer"
FORMATS: tuple[Format, ...] = (
    Format(
        "chat messages",
        ("messages",),
        ("messages", "tools", "functions"),
        "the conversation through the chat template; loss on every assistant message whose `weight` is not 0",
        read_messages,
        tells=_is("messages", list),
    ),
    Format(
        "ToolBench conversations",
        ("conversations",),
        ("conversations",),
        "the request and the names of its APIs; loss on the names of those that were called",
        read_toolbench,
        "iou",
        is_toolbench,
    ),
    Format(
        "ShareGPT",
        ("conversations",),
        ("conversations", "tools", "system", "system_prompt"),
        "as chat messages; turns by `from` and `value`; conversations that the assistant begins are left out",
        read_sharegpt,
        tells=speaks("conversations"),
    ),
    Format(
        "ShareGPT",
        ("conversation",),
        ("conversation", "tools", "system", "system_prompt"),
        "the same under another name",
        lambda entry: read_sharegpt(entry, "conversation"),
        tells=speaks("conversation"),
    ),
    Format(
        "LIMA",
        ("conversations",),
        ("conversations",),
        "a list of texts, the user's and the assistant's by turns, as chat messages",
        read_alternating,
        tells=lambda value: _is_list_of_strings(value["conversations"]),
    ),
    Format(
        "Capybara",
        ("conversation",),
        ("conversation", "system", "system_prompt"),
        "a list of `input` and `output`, as chat messages",
        read_exchanges,
        tells=lambda value: any({"input", "output"} <= turn.keys() for turn in turns_of(value["conversation"])),
    ),
    Format(
        "xLAM",
        ("query", "answers", "tools"),
        ("query", "answers", "tools"),
        "the query with its tools, as chat messages; loss on the calls",
        read_calls,
    ),
    Format(
        "ToolBench",
        ("api_list",),
        ("query", "api_list", "relevant APIs"),
        "the request and the names of its APIs; loss on the names of the relevant ones",
        read_toolbench_query,
        "iou",
    ),
    Format(
        "prompt/completion",
        ("prompt", "completion"),
        ("prompt", "completion", "answers", "system", "tools", "label"),
        "the prompt; loss on the completion; both may be lists of messages; left out where `label` is false",
        _own,
        "em",
    ),
    Format(
        "Alpaca",
        ("instruction", "output"),
        ("instruction", "input", "output", "system"),
        "the instruction, a blank line and the input; loss on the output",
        _asked(("instruction",), "output", more=("input",), system=("system",)),
        "em",
    ),
    Format(
        "Dolly",
        ("instruction", "response"),
        ("instruction", "context", "response"),
        "the instruction, a blank line and the context; loss on the response",
        _asked(("instruction",), "response", more=("context", "input")),
        "em",
    ),
    Format(
        "MetaMathQA",
        ("query", "response"),
        ("query", "response"),
        "the query; loss on the response; answers that are no number are left out",
        _metamath,
        "math",
        _has_final_answer,
    ),
    _pair("query", "response"),
    Format(
        "simplified Natural Questions",
        ("question_text",),
        ("question_text", "document_text", "annotations"),
        f"{_CLOSED}, of at most five tokens as in NQ-open",
        _simplified_nq,
        "em",
    ),
    Format(
        "SQuAD",
        ("question", "answers"),
        ("question", "answers", "is_impossible"),
        f"{_CLOSED}; questions without one are left out",
        _squad,
        "em",
        lambda value: _is("answers", list, dict)(value) and not _is_list_of_strings(value["answers"]),
    ),
    Format(
        "question/answers",
        ("question", "answers"),
        ("question", "answers"),
        f"{_CLOSED}",
        _squad,
        "em",
        lambda value: _is_list_of_strings(value["answers"]),
    ),
    Format(
        "TriviaQA",
        ("question", "answer"),
        ("question", "answer"),
        f"{_CLOSED}; its aliases count too",
        _triviaqa("question", "answer", "value", "aliases"),
        "em",
        _is("answer", dict),
    ),
    Format(
        "TriviaQA",
        ("Question", "Answer"),
        ("Question", "Answer"),
        "the same as published",
        _triviaqa("Question", "Answer", "Value", "Aliases"),
        "em",
        _is("Answer", dict),
    ),
    Format(
        "NQ-open",
        ("question", "answer"),
        ("question", "answer"),
        f"{_CLOSED}",
        _nq_open,
        "em",
        _is("answer", list),
    ),
    Format(
        "HotpotQA",
        ("question", "answer", "supporting_facts"),
        ("question", "answer"),
        f"{_CLOSED}",
        _plain_question,
        "em",
    ),
    Format(
        "GSM8K",
        ("question", "answer"),
        ("question", "answer"),
        "the question; loss on the whole solution without the calculator's marks",
        _gsm8k,
        "math",
        _has_solution,
    ),
    Format(
        "question/answer",
        ("question", "answer"),
        ("question", "answer"),
        "the question; loss on the answer",
        _plain_question,
        "em",
        _is("answer", str),
    ),
    *(_pair(asked, said) for asked, several in PAIRS.items() for said in several),
    Format("text", ("text",), ("text",), "every token of the text and the end-of-text token after it", _text),
)


def known_formats() -> str:
    """Their names, for errors."""
    names = dict.fromkeys(format_.name for format_ in FORMATS if format_.name not in _PLAIN)
    return ", ".join([*names, "plain fields"])


def table() -> str:
    """The formats as the table of ``docs/data.md``."""
    lines = ["| format | told by | seen and learned | scored by |", "|---|---|---|---|"]
    for format_ in FORMATS:
        fields = ", ".join(f"`{field}`" for field in format_.needs)
        if format_.name not in _PLAIN:
            lines.append(f"| {format_.name} | {fields} | {format_.learns} | {format_.metric or '-'} |")
    for asked, several in PAIRS.items():
        said = ", ".join(f"`{each}`" for each in several)
        lines.append(f"| plain fields | `{asked}` and one of {said} | the {asked}; loss on the other | em |")
    return "\n".join(lines) + "\n"
