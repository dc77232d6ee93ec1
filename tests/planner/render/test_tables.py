"""Tables at any width: whole columns go, or rows are stacked, and nothing is cut."""

from __future__ import annotations

import shlex
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft.planner.render.tables import Columns, Command, View, lines, section, show, wrapped

HEADERS = ("method", "size", "device", "traffic", "fits")
ROWS = [("parallel-adapter", "1,536", "20.44 GiB", "1,007 MiB", "yes"), ("lora", "16", "16.55 GiB", "8.0 KiB", "no")]


def rendered(view: View, width: int) -> str:
    return "\n".join(line.text.rstrip() for line in view.lines(width))


def table() -> Columns:
    return Columns(HEADERS, ROWS, right=(1, 2, 3), optional=(3, 1))


def test_where_there_is_room_all_columns_show() -> None:
    # 16 + 5 + 9 + 9 + 4 and four gaps of two
    assert rendered(table(), 51).splitlines() == [
        "method             size     device    traffic  fits",
        "parallel-adapter  1,536  20.44 GiB  1,007 MiB  yes",
        "lora                 16  16.55 GiB    8.0 KiB  no",
    ]


def test_then_gaps_narrow_then_columns_go_by_priority_and_that_is_said() -> None:
    assert rendered(table(), 47).splitlines()[1] == "parallel-adapter 1,536 20.44 GiB 1,007 MiB yes"
    without_traffic = rendered(table(), 46)
    assert without_traffic.splitlines() == [
        "method             size     device  fits",
        "parallel-adapter  1,536  20.44 GiB  yes",
        "lora                 16  16.55 GiB  no",
        "(too narrow for: traffic)",
    ]
    assert "(too narrow for: size, traffic)" in rendered(table(), 33)


def test_where_what_must_show_has_no_room_rows_are_stacked() -> None:
    assert rendered(table(), 30).splitlines() == [
        "method",
        "parallel-adapter",
        "  size 1,536, device",
        "  20.44 GiB, traffic",
        "  1,007 MiB, fits yes",
        "lora",
        "  size 16, device 16.55 GiB,",
        "  traffic 8.0 KiB, fits no",
    ]


@given(
    cells=st.lists(st.integers(0, 10**15), min_size=1, max_size=8),
    width=st.integers(30, 200),
    droppable=st.integers(0, 8),
)
def test_whole_numbers_at_every_width(cells: list[int], width: int, droppable: int) -> None:
    headers = [f"h{index}" for index in range(len(cells) + 1)]
    row = ["name", *(f"{cell:,}" for cell in cells)]
    optional = list(range(1, len(row)))[:droppable]
    text = rendered(section("title", Columns(headers, [row], optional=optional)), width)
    assert all(len(line) <= width for line in text.splitlines())
    words = {word.rstrip(",") for word in text.split()}
    told = text.split("(too narrow for: ")[1] if "too narrow for" in text else ""
    for header, cell in zip(headers, row, strict=True):
        assert cell in words or (header in told and headers.index(header) in optional)


def test_text_wraps_between_words_and_keeps_a_number_with_its_unit() -> None:
    assert wrapped("at most 23.4 GiB of it", 12) == "at most\n23.4 GiB of\nit"
    assert wrapped("uses 99.7 % now", 9) == "uses\n99.7 %\nnow"
    assert wrapped("  --weights-dtype nf4 more", 22) == "  --weights-dtype nf4\n  more"
    assert rendered(lines(["3.0 h it takes"]), 9) == "3.0 h it\ntakes"


@pytest.mark.parametrize("width", [24, 40, 60, 100])
def test_a_command_can_be_typed_as_it_stands(width: int) -> None:
    words = ["meft-run", "my plan.json", "--model", "DIR", "--data", "FILE.jsonl", "--device", "emulated"]
    text = rendered(Command(words, title="Next:"), width)
    assert shlex.split(text.replace("\\\n", " "))[1:] == words
    assert all(line.endswith("\\") for line in text.splitlines()[:-1])


def test_an_option_stays_with_its_value() -> None:
    text = rendered(Command(["meft-run", "--model", "DIR", "--data", "F"]), 22)
    assert text == "meft-run --model DIR \\\n  --data F"


def test_styles_go_to_a_terminal_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    view = section("title", table())
    show(view)
    assert capsys.readouterr().out.splitlines() == rendered(view, 100).splitlines()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    show(view)
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert (title, header[:4], header[-4:]) == ("\x1b[1mtitle\x1b[0m", "\x1b[2m", "\x1b[0m")
    assert rows == rendered(view, 60).splitlines()[2:]
