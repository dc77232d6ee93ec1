"""Tasks from local files: questions with gold answers, to learn from and to be scored on.

What a file is shows in its first entry: see :mod:`meft.runtime.data.formats`. Entries are in the order of the file;
``limit`` stops reading there, so a prefix of a large JSONL file is cheap.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from meft.planner.base.errors import UsageError
from meft.runtime.data.containers import sources
from meft.runtime.data.formats import Format
from meft.runtime.data.metrics import Metric, called_apis, final_number
from meft.runtime.data.reading import Reading, open_source
from meft.runtime.data.records import Completion, Record


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


@dataclass(frozen=True)
class Prepared:
    """Records of a file as lines for ``--data``, and what the file is; no ``metric``: they are learned, not scored."""

    description: str
    records: tuple[Record, ...]
    metric: Metric | None


def read_task(path: Path, *, metric: Metric | None = None, limit: int | None = None) -> Task:
    """Read up to ``limit`` items of a file.

    ``metric`` is needed only for formats that are scored by exact match and shall be scored otherwise; where the
    format has another metric, it must be that.

    Raises:
        UsageError: no such file, an unknown format, an unusable entry (file, place, field), nothing usable, or a
            metric that does not fit.
    """
    reading = _opened(path)
    own = _metric(reading.format, metric, path)
    items = [_item(record, own, where) for where, record in islice(_records(reading), limit)]
    if not items:
        name = reading.format.name
        raise UsageError(f"{path}: none of {reading.left_out:,} entries of {name} has a gold answer that can be used")
    return Task(reading.format.name, own, tuple(items), reading.left_out)


def read_prepared(path: Path, *, metric: Metric | None = None, limit: int | None = None) -> Prepared:
    """Read up to ``limit`` records of a file of any format, scored or not; errors as in :func:`read_task`."""
    reading = _opened(path)
    own = None if reading.format.metric is None and metric is None else _metric(reading.format, metric, path)
    records: list[Record] = []
    for where, record in islice(_records(reading), limit):
        if own is not None and isinstance(record, Completion):
            item = _item(record, own, where)
            record = Completion(item.prompt, item.completion, item.answers, system=record.system)
        records.append(record)
    if not records:
        raise UsageError(f"{path}: none of {reading.num_rows:,} entries of {reading.format.name} can be used")
    return Prepared(reading.description(), tuple(records), own)


def _opened(path: Path) -> Reading:
    found, _ = sources([path])
    if len(found) != 1:
        raise UsageError(f"{path}: {len(found)} files; name one of them")
    return open_source(found[0], most_bad=0)


def _records(reading: Reading) -> Iterator[tuple[str, Record]]:
    """Places and records; the first entry that cannot be used ends it with an error."""
    for where, record in reading.records():
        if reading.bad:
            break
        yield where, record
    if reading.bad:
        raise UsageError(reading.bad[0])


def _metric(format_: Format, metric: Metric | None, path: Path) -> Metric:
    if format_.metric is None:
        raise UsageError(f"{path}: {format_.name} is learned and not scored; a task has questions and answers")
    if metric is None or metric == format_.metric or format_.name == "prompt/completion":
        return metric or format_.metric
    raise UsageError(f"{path}: --metric {metric} does not fit {format_.name}, which is scored by {format_.metric}")


def _item(record: Record, metric: Metric, where: str) -> Item:
    if not isinstance(record, Completion):
        raise UsageError(f"{where}: a conversation is learned and not scored; a task has questions and answers")
    answers = record.answers
    if not answers:
        answers = tuple(sorted(called_apis(record.completion))) if metric == "iou" else (record.completion.strip(),)
    if metric == "math" and all(final_number(answer) is None for answer in answers):
        raise UsageError(f"{where}: field 'completion' holds no number, which --metric math compares")
    return Item(record.prompt, record.completion, answers)
