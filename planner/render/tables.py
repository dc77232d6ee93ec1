"""Tables that lose nothing to a narrow terminal, and the words for numbers. Bytes become GiB nowhere else.

A table that is too wide leaves out whole columns, the least important first, and says which; where even those that
must be there do not fit, its rows are stacked. A number is never cut, nor a cell.

Colour and width follow the terminal; piped, the text is plain and 100 columns wide (or ``COLUMNS``).
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 100
GAP, NARROW_GAP = 2, 1
_GLUE = "\N{NO-BREAK SPACE}"
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:[KMG]iB|B|[BMk]|%|us|ms|s|min|h|days)(?!\w))")
READABLE_WIDTH = 24
"""A column of text is not wrapped narrower than this, or its longest word, as long as columns can be left out."""


def show(view: RenderableType) -> None:
    """Print on standard output: in the terminal's colours and width, or plain without trailing spaces."""
    piped = not sys.stdout.isatty()
    console = Console(highlight=False, width=PIPED_WIDTH if piped and "COLUMNS" not in os.environ else None)
    if not piped:
        console.print(view)
        return
    with console.capture() as captured:
        console.print(view)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The widest form that fits."""
        for left_out in range(len(self.optional) + 1):
            shown = [index for index in range(len(self.headers)) if index not in self.optional[:left_out]]
            for gap in (self.gap, min(NARROW_GAP, self.gap)):
                if sum(map(self._least_width, shown)) + gap * (len(shown) - 1) <= options.max_width:
                    yield self._table(shown, gap, options.max_width)
                    if left_out:
                        names = ", ".join(self.headers[index] for index in sorted(self.optional[:left_out]))
                        yield Paragraph(f"(too narrow for: {names})", style="dim")
                    return
        yield self._stacked()

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

    def _table(self, shown: Sequence[int], gap: int, width: int) -> Table:
        headed = any(self.headers)
        table = Table(box=None, show_header=headed, header_style="dim", pad_edge=False, padding=(0, gap, 0, 0))
        left = width - gap * (len(shown) - 1)
        widths = {index: max(map(len, self._cells(index))) for index in shown if index != self.wrapping}
        for index in shown:
            justify: Literal["left", "right"] = "right" if index in self.right else "left"
            table.add_column(Text(self.headers[index]), justify=justify, no_wrap=True)
        room = left - sum(widths.values())
        for row in self.rows:
            table.add_row(*(Text(row[index] if index in widths else wrapped(row[index], room)) for index in shown))
        return table

    def _stacked(self) -> RenderableType:
        """Each row as its first cell, and under it the others by name."""
        parts: list[RenderableType] = [Paragraph(self.headers[0], style="dim")] if self.headers[0].strip() else []
        for row in self.rows:
            if row[0]:
                parts.append(Paragraph(row[0]))
            cells = [
                " ".join(filter(None, (header, cell)))
                for header, cell in zip(self.headers[1:], row[1:], strict=True)
                if cell
            ]
            parts.append(Padding(Paragraph(", ".join(cells)), (0, 0, 0, 2)))
        return Group(*parts)


class Paragraph:
    """Text that wraps between words, a number never apart from its unit."""

    def __init__(self, text: str, *, style: str = "") -> None:
        self.text = text
        self.style = style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As many lines as it takes."""
        yield Text(wrapped(self.text, options.max_width), style=self.style, overflow="fold")


class Command:
    """A command line to be typed: where it is too long it goes on after a backslash, as a shell reads it."""

    def __init__(self, words: Sequence[str], *, title: str = "") -> None:
        self.words = [shlex.quote(word) for word in words]
        self.title = title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """No word is broken."""
        first, *units = self._units()
        parts, line = [], f"{self.title} {first}".strip()
        for unit in units:
            if len(line) + len(unit) + len(" \\") >= options.max_width:
                parts.append(f"{line} \\")
                line = f"  {unit}"
            else:
                line += f" {unit}"
        for text in (*parts, line):
            yield Text(text, overflow="fold")

    def _units(self) -> list[str]:
        """Words, an option with its value."""
        units: list[str] = []
        for word in self.words:
            if units and units[-1].startswith("--") and " " not in units[-1] and not word.startswith("-"):
                units[-1] += f" {word}"
            else:
                units.append(word)
        return units


def section(title: str, body: RenderableType) -> RenderableType:
    """A heading in bold and what is under it, indented."""
    return Group(Paragraph(title, style="bold"), Padding(body, (0, 0, 0, 2)))


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


def lines(texts: Iterable[str]) -> RenderableType:
    """Plain lines, wrapped."""
    return Group(*map(Paragraph, texts))


def wrapped(text: str, width: int) -> str:
    """Lines of at most ``width``, unless a word is longer; a number and its unit stay together, an indent is kept."""
    indent = text[: len(text) - len(text.lstrip())]
    parts = textwrap.wrap(
        _glued(text), max(width, 1), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(parts).replace(_GLUE, " ")


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
