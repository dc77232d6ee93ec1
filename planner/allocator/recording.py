"""Recorded streams of a caching allocator: the events in columns, and the state in which they start.

A recording is a CSV table with one event per line and the columns ``action``, ``addr``, ``bytes`` (as requested),
``stream`` and ``total_reserved_after``; ``time``, ``total_allocated_after`` and ``device`` may be there. Actions are
``alloc`` and ``free``, and what the allocator did for them: ``segment_alloc`` and ``segment_map``, ``segment_free`` and
``segment_unmap``. Its start state is a JSON list of segments ``{"addr", "size", "stream", "pool", "live"}``, with the
live blocks of each as ``{"addr", "size", "requested"}``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meft.planner.allocator.blocks import UNIT_BYTES
from meft.planner.allocator.caching import LiveBlock, Segment
from meft.planner.allocator.settings import AllocatorSettings
from meft.planner.base.errors import UsageError
from meft.planner.base.units import MAX_BYTES

TAKEN = ("segment_alloc", "segment_map")
RETURNED = ("segment_free", "segment_unmap")
ACTIONS = ("alloc", "free", *TAKEN, *RETURNED)
MAX_ADDRESS = 1 << 57
MAX_STREAM = 1 << 63
LIMITS = {"addr": MAX_ADDRESS, "bytes": MAX_BYTES, "stream": MAX_STREAM, "device": 1 << 10}
LIMITS |= {"total_reserved_after": MAX_BYTES, "total_allocated_after": MAX_BYTES}
"""The largest value of each column."""
REQUIRED = ("action", "addr", "bytes", "stream", "total_reserved_after")
_MAX_DIGITS = 19


@dataclass(frozen=True, slots=True)
class Recording:
    """Events by columns of equal length, and the segments that were there before the first.

    ``positions`` says where each event stands in its source (``line`` or ``event``); ``settings`` are those it was made
    under, where it says so.
    """

    source: str
    actions: Sequence[str]
    addresses: Sequence[int]
    sizes: Sequence[int]
    streams: Sequence[int]
    reserved_bytes: Sequence[int]
    positions: Sequence[int]
    allocated_bytes: Sequence[int] | None = None
    segments: tuple[Segment, ...] = ()
    start_is_given: bool = False
    position_name: str = "line"
    settings: AllocatorSettings | None = None

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def expandable(self) -> bool:
        """Whether it was made with expandable segments, as far as it says."""
        return any(segment.expandable for segment in self.segments) or not {"segment_map", "segment_unmap"}.isdisjoint(
            self.actions
        )

    def place(self, index: int) -> str:
        """Names the source and the event in it."""
        return f"{self.source}: {self.position_name} {self.positions[index]}"

    def starting_with(self, segments: Iterable[Segment]) -> Recording:
        """The same events with their start state."""
        return replace(self, segments=tuple(segments), start_is_given=True)

    def for_ranges(self) -> Recording:
        """For replaying with expandable segments: start segments that can be stretches of virtual ranges are.

        That is where the recording says so of some, where it maps memory, and where every segment is whole units at
        whole units' distance. Others stay fixed, as in a program that turns the setting on late.
        """
        if any(segment.expandable for segment in self.segments):
            return self
        if not self.expandable and not _are_whole_units(self.segments):
            return self
        return replace(self, segments=tuple(replace(segment, expandable=True) for segment in self.segments))


def read_events(text: str, *, source: str, device: int | None = None) -> Recording:
    """Read the table of a recording; ``device`` picks one where it has several.

    Raises :class:`UsageError`: one line with ``source``, line, column, value and what is expected.
    """
    rows = _rows(text, source=source)
    columns = _columns(rows, source=source)
    lines: Sequence[int] = range(2, len(rows) + 1)
    columns, lines = _of_device(columns, lines, source=source, device=device)
    numbers = {name: _numbers(columns[name], name, lines, source=source) for name in LIMITS if name in columns}
    return Recording(
        source=source,
        actions=_actions(columns["action"], lines, source=source),
        addresses=numbers["addr"],
        sizes=numbers["bytes"],
        streams=numbers["stream"],
        reserved_bytes=numbers["total_reserved_after"],
        allocated_bytes=numbers.get("total_allocated_after"),
        positions=lines,
    )


def read_segments(content: object, *, source: str) -> tuple[Segment, ...]:
    """The start state of a recording from its JSON content.

    Raises :class:`UsageError`: one line with ``source``, field, value and what is expected.
    """
    return tuple(
        _segment(each, f"{source}: segments[{index}]") for index, each in enumerate(a_list(content, f"{source}: it"))
    )


def _segment(content: object, place: str) -> Segment:
    fields = an_object(content, place)
    pool = field_of(fields, "pool", place)
    if pool not in ("small", "large"):
        raise UsageError(f"{place}.pool is {shown(pool)}; expected small or large")
    expandable = fields.get("expandable", False)
    if not isinstance(expandable, bool):
        raise UsageError(f"{place}.expandable is {shown(expandable)}; expected true or false")
    live = a_list(field_of(fields, "live", place), f"{place}.live")
    return Segment(
        address=number_of(fields, "addr", place, most=MAX_ADDRESS),
        num_bytes=number_of(fields, "size", place, least=1, most=MAX_BYTES),
        stream=number_of(fields, "stream", place, most=MAX_STREAM),
        pool=pool,
        live=tuple(_live_block(each, f"{place}.live[{index}]") for index, each in enumerate(live)),
        expandable=expandable,
    )


def _live_block(content: object, place: str) -> LiveBlock:
    fields = an_object(content, place)
    size = number_of(fields, "size", place, least=1, most=MAX_BYTES)
    return LiveBlock(
        address=number_of(fields, "addr", place, most=MAX_ADDRESS),
        num_bytes=size,
        requested_bytes=number_of(fields, "requested", place, most=size),
    )


# --- values that come from outside --------------------------------------------------------------------------------


def shown(value: object) -> str:
    """A value in an error: short whatever it is, and safe for one that is huge or nested without end."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 100:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else repr(value[:37] + "...")
    return f"a {type(value).__name__}"


def an_object(value: object, place: str) -> Mapping[str, Any]:
    """``value`` if it is a mapping."""
    if not isinstance(value, dict):
        raise UsageError(f"{place} is {shown(value)}; expected an object with named fields")
    return value


def a_list(value: object, place: str) -> Sequence[Any]:
    """``value`` if it is a list."""
    if not isinstance(value, list | tuple):
        raise UsageError(f"{place} is {shown(value)}; expected a list")
    return value


def field_of(fields: Mapping[str, Any], name: str, place: str) -> Any:
    """A field that must be there."""
    if name not in fields:
        raise UsageError(f"{place}.{name} is missing")
    return fields[name]


def number_of(fields: Mapping[str, Any], name: str, place: str, *, least: int = 0, most: int) -> int:
    """A field that must be a whole number from ``least`` to ``most``."""
    value = fields.get(name)
    if type(value) is int and least <= value <= most:
        return value
    value = field_of(fields, name, place)
    raise UsageError(f"{place}.{name} is {shown(value)}; expected a whole number from {least} to {most}")


# --- the table ----------------------------------------------------------------------------------------------------


def _rows(text: str, *, source: str) -> list[list[str]]:
    try:
        rows = list(csv.reader(text.removeprefix("\ufeff").splitlines(), strict=True))
    except csv.Error as error:
        raise UsageError(f"{source}: not a CSV table ({error}); expected lines such as {','.join(REQUIRED)}") from None
    while rows and not any(rows[-1]):
        rows.pop()
    if not rows:
        raise UsageError(f"{source}: empty; expected a header with {', '.join(REQUIRED)} and a line per event")
    return rows


def _columns(rows: list[list[str]], *, source: str) -> dict[str, Sequence[str]]:
    header, events = rows[0], rows[1:]
    for name in REQUIRED:
        if name not in header:
            raise UsageError(f"{source}: line 1: column {name} is missing; expected {', '.join(REQUIRED)} at least")
    for index, row in enumerate(events):
        if len(row) != len(header):
            raise UsageError(
                f"{source}: line {index + 2}: {len(row)} values, but the header has {len(header)}; is it cut short?"
            )
    if not events:
        raise UsageError(f"{source}: line 2: no event follows the header; expected a line per event")
    return dict(zip(header, zip(*events, strict=True), strict=True))


def _of_device(
    columns: dict[str, Sequence[str]], lines: Sequence[int], *, source: str, device: int | None
) -> tuple[dict[str, Sequence[str]], Sequence[int]]:
    """The columns and line numbers of one device."""
    names = sorted(set(columns.get("device", ())))
    if device is None:
        if len(names) > 1:
            raise UsageError(f"{source}: events of devices {', '.join(names)}; choose one, such as --device {names[0]}")
        return columns, lines
    if str(device) not in names:
        raise UsageError(f"{source}: no event of device {device}; it has {', '.join(names) or 'no device column'}")
    kept = [index for index, name in enumerate(columns["device"]) if name == str(device)]
    return {name: [column[index] for index in kept] for name, column in columns.items()}, [lines[i] for i in kept]


def _actions(values: Sequence[str], lines: Sequence[int], *, source: str) -> list[str]:
    """The column of actions, each the one string that the code has for it, which makes comparing them quick."""
    known = {action: action for action in ACTIONS}
    try:
        return [known[value] for value in values]
    except KeyError:
        index = next(index for index, value in enumerate(values) if value not in known)
    expected = ", ".join(ACTIONS)
    raise UsageError(f"{source}: line {lines[index]}: action is {shown(values[index])}; expected one of {expected}")


def _numbers(values: Sequence[str], name: str, lines: Sequence[int], *, source: str) -> list[int]:
    """A column of whole numbers; all at once where nothing is wrong with them."""
    together = "".join(values)
    if together.isascii() and together.isdecimal() and all(values) and max(map(len, values)) <= _MAX_DIGITS:
        numbers = list(map(int, values))
        if max(numbers) <= LIMITS[name]:
            return numbers
    index = next(index for index, value in enumerate(values) if not _is_number(value, most=LIMITS[name]))
    place, limit = f"{source}: line {lines[index]}", LIMITS[name]
    raise UsageError(f"{place}: {name} is {shown(values[index])}; expected a whole number from 0 to {limit}")


def _is_number(value: str, *, most: int) -> bool:
    return value.isascii() and value.isdecimal() and len(value) <= _MAX_DIGITS and int(value) <= most


def _are_whole_units(segments: Sequence[Segment]) -> bool:
    """Whether these can be mapped stretches of one virtual range per pool and stream."""
    bases: dict[tuple[str, int], int] = {}
    for segment in segments:
        unit = UNIT_BYTES[segment.pool]
        base = bases.setdefault((segment.pool, segment.stream), segment.address % unit)
        if segment.address % unit != base or segment.num_bytes % unit:
            return False
    return True
