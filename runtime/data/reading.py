"""One file's records: its format by a look at its first entry, then every entry, and what could not be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from meft.planner.base.errors import UsageError
from meft.planner.base.kinds import DATA, kind_of, other_kind
from meft.runtime.data.containers import WHAT_IS_READ, Row, Source
from meft.runtime.data.formats import Format, known_formats, read_entry, recognise
from meft.runtime.data.records import BadLineError, Record

MAX_REPORTED_LINES = 5
ACCEPTED = f"what is read (docs/data.md): {known_formats()}; as {WHAT_IS_READ}"


@dataclass
class Reading:
    """The records of one file, what they are, and what could not be used."""

    source: Source
    format: Format
    left_out: int = 0
    num_rows: int = 0
    bad: list[str] = field(default_factory=list)
    unused: dict[str, None] = field(default_factory=dict)
    """Fields that the format does not read."""
    _first: list[Row] = field(default_factory=list)
    _rest: Iterator[Row] = field(default_factory=lambda: iter(()))

    def records(self) -> Iterator[tuple[str, Record]]:
        """Place and record of every entry that can be used, in the order of the file."""
        for rows in (self._first, self._rest):
            for row in rows:
                self.num_rows += 1
                try:
                    record = self._read(row)
                except BadLineError as error:
                    self.refuse(row.where, error)
                    continue
                if record is None:
                    self.left_out += 1
                else:
                    yield row.where, record

    def refuse(self, where: str, error: BadLineError) -> None:
        """Note an entry that cannot be used."""
        self.bad.append(f"{error.where or where}: {error}")

    def description(self) -> str:
        """What the file is, in words."""
        text = f"{self.source.path}: {self.format.name} ({', '.join(self.format.needs)}), {self.source.container}"
        if self.unused:
            text += f"; fields not used: {', '.join(self.unused)}"
        if self.left_out:
            text += f"; {self.left_out:,} entries left out: nothing to learn (no answer, or nobody asked)"
        return text

    def _read(self, row: Row) -> Record | None:
        if row.problem:
            raise BadLineError(row.problem)
        record = read_entry(self.format, row.value, where=row.where)
        for name, value in row.value.items():
            if name not in self.format.reads and name not in self.unused and value not in (None, "", [], {}):
                self.unused[name] = None
        return record


def open_source(source: Source, *, most_bad: int = MAX_REPORTED_LINES) -> Reading:
    """Look at the first entry that is one, after at most so many that are none.

    Raises:
        UsageError: the file is empty, or none of its entries is of a known format.
    """
    rows = source.rows()
    first: list[Row] = []
    bad: list[str] = []
    for row in rows:
        first.append(row)
        try:
            if row.problem:
                raise BadLineError(row.problem)
            _refuse_other_kind(row.value, source)
            format_ = recognise(row.value)
        except BadLineError as error:
            bad.append(f"{error.where or row.where}: {error}")
            if len(bad) > most_bad:
                break
            continue
        return Reading(source, format_, _first=first, _rest=rows)
    if not bad:
        raise UsageError(f"{source.path}: is empty; {ACCEPTED}")
    num_lines = len(first) + sum(1 for _ in rows) if most_bad else len(first)
    unknown = any("no known format" in problem or " needs (found " in problem for problem in bad)
    raise bad_lines_error(bad, num_lines=num_lines, hint=ACCEPTED if unknown else "")


def _refuse_other_kind(value: Any, source: Source) -> None:
    """A plan or another file of this project in the place of data is called so."""
    kind = kind_of(value) if isinstance(value, dict) else None
    if kind not in (None, DATA):
        raise other_kind(source.path, found=str(kind), wanted=DATA)


def bad_lines_error(bad: Sequence[str], *, num_lines: int, hint: str = "") -> UsageError:
    """The first bad entries, how many there are, and what to try."""
    shown = list(bad[:MAX_REPORTED_LINES])
    more = len(bad) - len(shown)
    if more:
        shown.append(f"and {more:,} more: {len(bad):,} of {num_lines:,} lines cannot be used")
    return UsageError("\n".join(shown) + (f"; {hint}" if hint else ""))
