"""Tables of HTML for notebooks. Every text is escaped here; what calls this only formats numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], *, notes: Iterable[str] = ()) -> str:
    """A title, a table (its first column to the left, the others to the right), and notes below it.

    Headers that are all empty are left out.

    >>> html_table("a < b", ("", ""), [("x", "1 & 2")]).count("&")
    2
    """
    parts = [f"<div><strong>{escape(title)}</strong><table>"]
    if any(headers):
        parts.append(f"<thead>{_row('th', headers)}</thead>")
    parts.append(f"<tbody>{''.join(_row('td', row) for row in rows)}</tbody></table>")
    parts += [f"<div>{escape(note)}</div>" for note in notes]
    return "".join([*parts, "</div>"])


def _row(tag: str, cells: Sequence[str]) -> str:
    sides = ["left", *["right"] * (len(cells) - 1)]
    written = (
        f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for side, cell in zip(sides, cells, strict=True)
    )
    return f"<tr>{''.join(written)}</tr>"
