"""Tables that lose nothing to a narrow terminal, and the words for numbers. Bytes become GiB nowhere else.

A table that is too wide leaves out whole columns, the least important first, and says which; where even those that
must be there do not fit, its rows are stacked. A number is never cut, nor a cell.

Style and width follow the terminal; piped, the text is plain and 100 columns wide (or ``COLUMNS``). A view is what can
say its lines at a width; nothing here needs more of a library than ``click``'s styles, and a plan starts the sooner.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, Protocol, TypeAlias

import click

PIPED_WIDTH = 100
GAP, NARROW_GAP = 2, 1
INDENT = 2
_GLUE = "\N{NO-BREAK SPACE}"
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:[KMG]iB|B|[BMk]|%|us|ms|s|min|h|days)(?!\w))")
READABLE_WIDTH = 24
"""A column of text is not wrapped narrower than this, or its longest word, as long as columns can be left out."""

Style: TypeAlias = Literal["plain", "dim", "bold"]


@dataclass(frozen=True)
class Line:
    """A line of a view, all of it in one style."""

    text: str
    style: Style = "plain"


class View(Protocol):
    """What can be shown."""

    def lines(self, width: int) -> Iterator[Line]:
        """Its lines, none longer than ``width`` columns unless a word of it is."""


def show(view: View) -> None:
    """Print on standard output: in the terminal's styles and width, or plain without trailing spaces."""
    width = PIPED_WIDTH
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        import shutil  # slow to load

        width = shutil.get_terminal_size().columns
    for line in view.lines(width):
        text = line.text.rstrip()
        click.echo(text if line.style == "plain" else click.style(text, **{line.style: True}))


@dataclass(frozen=True)
class Group:
    """Views one below the other."""

    parts: tuple[View, ...]

    def lines(self, width: int) -> Iterator[Line]:
        """Of each in turn."""
        for part in self.parts:
            yield from part.lines(width)


@dataclass(frozen=True)
class Indented:
    """A view further to the right."""

    view: View

    def lines(self, width: int) -> Iterator[Line]:
        """Its lines where there is so much less room."""
        for line in self.view.lines(max(width - INDENT, 1)):
            yield Line(" " * INDENT + line.text, line.style)


class Columns:
    """A table without lines that fits any width.

    ``right`` are columns of numbers, ``wrapping`` the one whose text may take several lines (none of them: nothing
    wraps). ``optional`` are columns that may go, the first to go first.
    """

    def __init__(
        self,
        headers: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        right: Iterable[int] = (),
        wrapping: int | None = None,
        optional: Sequence[int] = (),
        gap: int = GAP,
    ) -> None:
        self.headers = tuple(headers)
        self.rows = [tuple(row) for row in rows]
        self.right = frozenset(right)
        self.wrapping = wrapping
        self.optional = tuple(optional)
        self.gap = gap

    def lines(self, width: int) -> Iterator[Line]:
        """The widest form that fits."""
        for left_out in range(len(self.optional) + 1):
            shown = [index for index in range(len(self.headers)) if index not in self.optional[:left_out]]
            for gap in (self.gap, min(NARROW_GAP, self.gap)):
                if sum(map(self._least_width, shown)) + gap * (len(shown) - 1) <= width:
                    yield from self._table(shown, gap, width)
                    if left_out:
                        names = ", ".join(self.headers[index] for index in sorted(self.optional[:left_out]))
                        yield from Paragraph(f"(too narrow for: {names})", style="dim").lines(width)
                    return
        yield from self._stacked().lines(width)

    def _cells(self, index: int) -> list[str]:
        return [self.headers[index], *(row[index] for row in self.rows)]

    def _least_width(self, index: int) -> int:
        """What a column needs so that nothing in it is cut: for text that wraps the longest word."""
        cells = self._cells(index)
        widest = max(map(len, cells))
        if index != self.wrapping:
            return widest
        longest_word = max((len(word) for cell in cells for word in _glued(cell).split(" ")), default=0)
        return max(longest_word, min(READABLE_WIDTH, widest))

    def _table(self, shown: Sequence[int], gap: int, width: int) -> Iterator[Line]:
        widths = {index: max(map(len, self._cells(index))) for index in shown}
        if self.wrapping in widths:
            others = sum(length for index, length in widths.items() if index != self.wrapping)
            widths[self.wrapping] = min(widths[self.wrapping], width - gap * (len(shown) - 1) - others)

        def across(texts: Iterable[str]) -> str:
            return (" " * gap).join(
                text.rjust(widths[index]) if index in self.right else text.ljust(widths[index])
                for index, text in zip(shown, texts, strict=True)
            )

        if any(self.headers):
            yield Line(across(self.headers[index] for index in shown), "dim")
        for row in self.rows:
            cells = [
                wrapped(row[index], widths[index]).split("\n") if index == self.wrapping else [row[index]]
                for index in shown
            ]
            for texts in zip_longest(*cells, fillvalue=""):
                yield Line(across(texts))

    def _stacked(self) -> View:
        """Each row as its first cell, and under it the others by name."""
        parts: list[View] = [Paragraph(self.headers[0], style="dim")] if self.headers[0].strip() else []
        for row in self.rows:
            if row[0]:
                parts.append(Paragraph(row[0]))
            cells = [
                " ".join(filter(None, (header, cell)))
                for header, cell in zip(self.headers[1:], row[1:], strict=True)
                if cell
            ]
            parts.append(Indented(Paragraph(", ".join(cells))))
        return Group(tuple(parts))


class Paragraph:
    """Text that wraps between words, a number never apart from its unit."""

    def __init__(self, text: str, *, style: Style = "plain") -> None:
        self.text = text
        self.style = style

    def lines(self, width: int) -> Iterator[Line]:
        """As many as it takes."""
        for text in wrapped(self.text, width).split("\n"):
            yield from (Line(part, self.style) for part in _folded(text, width))


class Command:
    """A command line to be typed: where it is too long it goes on after a backslash, as a shell reads it."""

    def __init__(self, words: Sequence[str], *, title: str = "") -> None:
        self.words = [shlex.quote(word) for word in words]
        self.title = title

    def lines(self, width: int) -> Iterator[Line]:
        """No word is broken unless it is longer than a line."""
        first, *units = self._units()
        parts, line = [], f"{self.title} {first}".strip()
        for unit in units:
            if len(line) + len(unit) + len(" \\") >= width:
                parts.append(f"{line} \\")
                line = f"  {unit}"
            else:
                line += f" {unit}"
        for text in (*parts, line):
            yield from (Line(part) for part in _folded(text, width))

    def _units(self) -> list[str]:
        """Words, an option with its value."""
        units: list[str] = []
        for word in self.words:
            if units and units[-1].startswith("--") and " " not in units[-1] and not word.startswith("-"):
                units[-1] += f" {word}"
            else:
                units.append(word)
        return units


def stacked(*parts: View) -> View:
    """One below the other."""
    return Group(parts)


def section(title: str, body: View) -> View:
    """A heading in bold and what is under it, indented."""
    return stacked(Paragraph(title, style="bold"), Indented(body))


def grid(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[int] = (),
    wrapping: int | None = None,
    optional: Sequence[int] = (),
    gap: int = GAP,
) -> Columns:
    """A table whose last column wraps, or the one that ``wrapping`` names."""
    wraps = len(headers) - 1 if wrapping is None else wrapping
    return Columns(headers, rows, right=right, wrapping=wraps, optional=optional, gap=gap)


def lines(texts: Iterable[str]) -> View:
    """Plain lines, wrapped."""
    return Group(tuple(map(Paragraph, texts)))


def wrapped(text: str, width: int) -> str:
    """Lines of at most ``width``, unless a word is longer; a number and its unit stay together, an indent is kept."""
    indent = text[: len(text) - len(text.lstrip())]
    parts = textwrap.wrap(
        _glued(text), max(width, 1), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(parts).replace(_GLUE, " ")


def _folded(text: str, width: int) -> list[str]:
    """A line in parts of at most ``width``: only a word that is longer than a line comes to more than one."""
    return [text[first : first + width] for first in range(0, len(text), max(width, 1))] or [""]


def _glued(text: str) -> str:
    return _BEFORE_UNIT.sub(_GLUE, text)


def percent(fraction: float) -> str:
    """``0.239`` as ``23.9 %``."""
    return f"{fraction:.1%}".replace("%", " %")


def count(number: float) -> str:
    """``1610612736`` as ``1.61 B``."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f}"
