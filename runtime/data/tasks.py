"""Tasks from local files in their published formats: questions with gold answers, to learn from and to be scored on.

What a file is shows in its first entry:

===============================  =====================================================================================
own lines (JSONL)                ``{"prompt", "completion"}``, with ``"answers": [...]`` where others count too
Natural Questions, open (JSONL)  ``{"question": ..., "answer": [...]}``
Natural Questions, simplified    JSONL, also gzipped: ``question_text``, ``document_text``, ``annotations``; gold are
                                 the short answers of at most five tokens, as in NQ-open (Lee et al. 2019)
SQuAD 1.1 and 2.0 (JSON)         ``data / paragraphs / qas``; closed book: the question alone
ToolBench (JSON)                 queries with ``api_list`` and ``relevant APIs``; or ToolLLaMA ``conversations``
GSM8K (JSONL)                    ``{"question", "answer"}`` with the number after ``####``
MetaMathQA (JSON)                ``{"query", "response"}``; answers that are no number are left out
===============================  =====================================================================================

Entries are in the order of the file; ``limit`` stops reading there, so a prefix of a large JSONL file is cheap.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from meft.planner.base.errors import UsageError
from meft.runtime.data.metrics import FINISH, Metric, called_apis, final_number

NQ_OPEN_MAX_TOKENS = 5
FORMATS = (
    "prompt/completion lines, NQ-open, simplified Natural Questions, SQuAD, ToolBench, GSM8K and MetaMathQA are read"
)
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations for a calculator, which no output needs
_TOOL_NAME = re.compile(r"""['"]name['"]\s*:\s*['"]([\w.\-]+)['"]""")


@dataclass(frozen=True, slots=True)
class Item:
    """One question: what is asked, what is learnt, and every gold answer (for tools: the set of API names)."""

    prompt: str
    completion: str
    answers: tuple[str, ...]

    def line(self) -> str:
        """The item as a line of training data, which the reader of own lines reads back."""
        fields = {"prompt": self.prompt, "completion": self.completion, "answers": list(self.answers)}
        return json.dumps(fields, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Task:
    """Questions of one kind. ``metric`` scores them; ``left_out`` counts entries without a usable gold answer."""

    name: str
    metric: Metric
    items: tuple[Item, ...]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of a file and where it stands, for errors."""

    where: str
    value: dict[str, Any]

    def get(self, field: str, *kinds: type) -> Any:
        """A field of one of ``kinds``, or an error that names file, place and field."""
        if field not in self.value:
            self.fail(field, "is missing")
        found = self.value[field]
        if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
            wanted = " or ".join(_JSON_NAMES[kind] for kind in kinds)
            self.fail(field, f"must be a {wanted}, not {_JSON_NAMES.get(type(found), 'null')}")
        return found

    def text(self, field: str) -> str:
        """A string that says something."""
        found: str = self.get(field, str)
        return found.strip() or self.fail(field, "is empty")

    def objects(self, field: str) -> list[_Entry]:
        """A list of objects, each an entry of its own."""
        listed = self.get(field, list)
        return [_entry(f"{self.where}, {field}[{index}]", each) for index, each in enumerate(listed)]

    def fail(self, field: str, problem: str) -> NoReturn:
        """Refuse the entry."""
        raise UsageError(f"{self.where}: field '{field}' {problem}")


_JSON_NAMES: dict[type, str] = {
    str: "string",
    list: "list",
    dict: "object",
    int: "number",
    float: "number",
    bool: "bool",
}
Reader = Callable[[_Entry], Item | None]


def read_task(path: Path, *, metric: Metric | None = None, limit: int | None = None) -> Task:
    """Read up to ``limit`` items of a file.

    ``metric`` is needed only for own lines that are not scored by exact match; for a published format it must be that
    format's own.

    Raises:
        UsageError: no such file, an unknown format, an unusable entry (file, place, field), nothing usable, or a
            metric that does not fit.
    """
    entries = _entries(path)
    first = next(entries, None)
    if first is None:
        raise UsageError(f"{path}: is empty; {FORMATS}")
    name, own_metric, reader = _format(first, metric)
    if metric is not None and metric != own_metric:
        raise UsageError(f"{path}: --metric {metric} does not fit {name}, which is scored by {own_metric}")
    items, left_out = _take(reader, first, entries, limit)
    if not items:
        raise UsageError(f"{path}: none of {left_out:,} entries of {name} has a gold answer that can be used")
    return Task(name, own_metric, tuple(items), left_out)


def _take(reader: Reader, first: _Entry, rest: Iterator[_Entry], limit: int | None) -> tuple[list[Item], int]:
    items: list[Item] = []
    left_out = 0
    for entry in _chained(first, rest):
        item = reader(entry)
        if item is None:
            left_out += 1
            continue
        items.append(item)
        if len(items) == limit:
            break
    return items, left_out


def _chained(first: _Entry, rest: Iterator[_Entry]) -> Iterator[_Entry]:
    yield first
    yield from rest


def _format(entry: _Entry, metric: Metric | None) -> tuple[str, Metric, Reader]:
    """Name, metric and reader of the format that the first entry shows."""
    keys = entry.value.keys()
    if {"prompt", "completion"} <= keys:
        chosen = metric or "em"
        return "prompt/completion lines", chosen, lambda each: _own(each, chosen)
    if "question_text" in keys:
        return "simplified Natural Questions", "em", _simplified_nq
    if {"query", "response"} <= keys:
        return "MetaMathQA", "math", _metamath
    if "conversations" in keys:
        return "ToolBench conversations", "iou", _toolbench_conversation
    if "api_list" in keys:
        return "ToolBench", "iou", _toolbench_query
    if "question" in keys and "answers" in keys:
        return "SQuAD", "em", _squad
    if "question" in keys and isinstance(entry.value.get("answer"), str):
        return "GSM8K", "math", _gsm8k
    if "question" in keys and "answer" in keys:
        return "NQ-open", "em", _nq_open
    found = ", ".join(sorted(map(repr, keys))) or "none"
    raise UsageError(f"{entry.where}: no known format has these fields: {found}; {FORMATS}")


# --- entries of a file ----------------------------------------------------------------------------------------------


def _entries(path: Path) -> Iterator[_Entry]:
    """Entries of a JSON list, of SQuAD's tree, or of JSON lines, whichever the file is; gzipped where it says so."""
    yield from (_json_entries if _is_one_document(path) else _line_entries)(path)


def _is_one_document(path: Path) -> bool:
    """Whether the file is one JSON value, told by its first line: a list, SQuAD's root, or the start of something."""
    line = _first_line(path)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return line.lstrip()[:1] == "[" or path.name.removesuffix(".gz").endswith(".json")
    return isinstance(value, list) or (isinstance(value, dict) and "data" in value)


def _first_line(path: Path) -> str:
    """The first line that is not blank."""
    with _open(path) as file:
        return next((line for line in _lines(file, path) if line.strip()), "")


def _open(path: Path) -> Any:
    try:
        return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; {FORMATS}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {FORMATS}") from None


def _line_entries(path: Path) -> Iterator[_Entry]:
    with _open(path) as file:
        for number, line in enumerate(_lines(file, path), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where}: not JSON ({error}); {FORMATS}") from None
            yield _entry(where, value)


def _lines(file: Any, path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8 text; {FORMATS}") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise UsageError(f"{path}: is not a whole gzip file ({error})") from None


def _json_entries(path: Path) -> Iterator[_Entry]:
    with _open(path) as file:
        text = "".join(_lines(file, path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON that can be read ({error})") from None
    if isinstance(content, list):
        yield from (_entry(f"{path}, entry {index}", each) for index, each in enumerate(content, 1))
        return
    root = _entry(str(path), content)
    for article in root.objects("data"):
        for paragraph in article.objects("paragraphs"):
            yield from paragraph.objects("qas")


def _entry(where: str, value: Any) -> _Entry:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: must be an object, not {_JSON_NAMES.get(type(value), 'null')}; {FORMATS}")
    return _Entry(where, value)


def _strings(entry: _Entry, field: str) -> tuple[str, ...]:
    """A list of strings, each once."""
    listed = entry.get(field, list)
    if not all(isinstance(each, str) and each.strip() for each in listed):
        entry.fail(field, "must hold strings that are not empty")
    return tuple(dict.fromkeys(each.strip() for each in listed))


# --- one reader per format: an item, or None where an entry has no gold answer ---------------------------------------


def _own(entry: _Entry, metric: Metric) -> Item:
    prompt, completion = entry.get("prompt", str), entry.get("completion", str)
    if not completion.strip():
        entry.fail("completion", "is empty")
    if "answers" in entry.value:
        answers = _strings(entry, "answers") or entry.fail("answers", "is empty")
    else:
        answers = tuple(sorted(called_apis(completion))) if metric == "iou" else (completion.strip(),)
    if metric == "math" and all(final_number(answer) is None for answer in answers):
        entry.fail("completion", "holds no number, which --metric math compares")
    return Item(prompt, completion, answers)


def _nq_open(entry: _Entry) -> Item | None:
    answers = _strings(entry, "answer")
    return Item(entry.text("question"), answers[0], answers) if answers else None


def _simplified_nq(entry: _Entry) -> Item | None:
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
    question = entry.text("question_text")
    return Item(question, next(iter(answers)), tuple(answers)) if answers else None


def _squad(entry: _Entry) -> Item | None:
    answers = tuple(dict.fromkeys(answer.text("text") for answer in entry.objects("answers")))
    question = entry.text("question")
    if entry.value.get("is_impossible") or not answers:  # SQuAD 2.0: answerable by no text, so by no memory of one
        return None
    return Item(question, answers[0], answers)


def _gsm8k(entry: _Entry) -> Item:
    solution = _CALCULATOR.sub("", entry.text("answer"))
    _, marker, result = solution.rpartition("####")
    number = final_number(result) if marker else None
    if number is None:
        entry.fail("answer", "has no number after ####")
    return Item(entry.text("question"), solution, (str(number),))


def _metamath(entry: _Entry) -> Item | None:
    response = entry.text("response")
    _, marker, result = response.rpartition("The answer is")
    plain = result.strip(" :.$\n")
    number = final_number(plain) if re.fullmatch(r"[-+]?[\d,.]+%?(?:/\d+)?", plain) else None
    query = entry.text("query")
    return Item(query, response, (str(number),)) if marker and number is not None else None


def tool_prompt(query: str, apis: list[str]) -> str:
    """A request and the names to choose among."""
    return f"{query}\nAPIs: {', '.join(apis)}\nWhich of them should be called?"


def toolbench_name(tool: str, api: str) -> str:
    """ToolBench's own name of an API: ``api_for_tool`` in lower case, other characters as single underscores."""
    return "_for_".join(re.sub(r"_+", "_", re.sub(r"\W", "_", part)).strip("_").lower() for part in (api, tool))


def _toolbench_query(entry: _Entry) -> Item | None:
    offered = [toolbench_name(api.text("tool_name"), api.text("api_name")) for api in entry.objects("api_list")]
    gold: dict[str, None] = {}
    for pair in entry.get("relevant APIs", list):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)):
            entry.fail("relevant APIs", "must hold pairs [tool_name, api_name]")
        gold[toolbench_name(*pair)] = None
    prompt = tool_prompt(entry.text("query"), list(dict.fromkeys(offered)))
    return Item(prompt, ", ".join(gold), tuple(gold)) if gold else None


def _toolbench_conversation(entry: _Entry) -> Item | None:
    turns = [(turn.text("from"), turn.get("value", str)) for turn in entry.objects("conversations")]
    asked = [text for speaker, text in turns if speaker == "user"]
    if not asked:
        entry.fail("conversations", "has no turn from 'user'")
    offered = [name for speaker, text in turns if speaker == "system" for name in _TOOL_NAME.findall(text)]
    called = [
        name
        for speaker, text in turns
        if speaker == "assistant" and "Action:" in text
        for name in sorted(called_apis(text))
    ]
    gold = tuple(dict.fromkeys(called))
    query = asked[0].strip().removesuffix("Begin!").strip()
    prompt = tool_prompt(query, [name for name in dict.fromkeys(offered) if name != FINISH])
    return Item(prompt, ", ".join(gold), gold) if gold else None
