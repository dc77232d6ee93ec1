"""A recording from a snapshot of torch's own: the content of ``torch.cuda.memory._snapshot()``.

A snapshot has the segments as they are at its end, and for each device a history of what the allocator did, which is
the tail of the run when more has happened than it keeps. Undoing the history from its end gives the state it starts in.

What cannot be known that way is how large a block was of which history has the end but not the start: its request is
known, not the remainder that stayed unsplit in it. In the large pool a free block is always larger than 1 MiB, so a gap
up to that behind a block belongs to it, and so does what lies before the first block that is put behind it while it
lives. Else no remainder is assumed, which may show as an inexact event.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meft.planner.allocator.blocks import LARGE_SEGMENT_BYTES, SMALL_LIMIT_BYTES, SMALL_SEGMENT_BYTES, PoolName
from meft.planner.allocator.caching import LiveBlock, Segment, round_to_division
from meft.planner.allocator.recording import (
    MAX_ADDRESS,
    MAX_STREAM,
    Recording,
    a_list,
    an_object,
    field_of,
    number_of,
    shown,
)
from meft.planner.allocator.settings import AllocatorSettings, parse_settings
from meft.planner.base.errors import UsageError
from meft.planner.base.units import MAX_BYTES

_AS_RECORDED = {
    "alloc": "alloc",
    "free_completed": "free",  # from here on the memory can be used again
    "segment_alloc": "segment_alloc",
    "segment_free": "segment_free",
    "segment_map": "segment_map",
    "segment_unmap": "segment_unmap",
}
_WITHOUT_EFFECT = ("free_requested", "oom", "snapshot", "user_defined")
_RESERVED_SIGN = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


@dataclass(frozen=True, slots=True)
class _Event:
    """One entry of a history, under the recording's name; ``position`` counts from 1 in the history."""

    action: str
    address: int
    size: int
    stream: int
    position: int


@dataclass(slots=True)
class _Stretch:
    """A segment, or a mapped stretch of a virtual range."""

    address: int
    size: int
    stream: int
    pool: PoolName
    expandable: bool

    @property
    def end(self) -> int:
        return self.address + self.size


@dataclass(slots=True)
class _Block:
    """A live block; ``size`` is None where only its request is known."""

    requested: int
    size: int | None


@dataclass(slots=True)
class _State:
    """What the allocator holds, by address; ``range_starts`` are the lowest addresses that the history maps."""

    stretches: dict[int, _Stretch] = field(default_factory=dict)
    live: dict[int, _Block] = field(default_factory=dict)
    range_starts: dict[tuple[PoolName, int], int] = field(default_factory=dict)


def recording_of(
    content: object, *, source: str, device: int | None = None, settings: AllocatorSettings | None = None
) -> Recording:
    """The history of one device as a recording with its start state; ``settings`` replace those the snapshot names.

    Raises :class:`UsageError`: one line with ``source``, field, value and what is expected; also for a history that
    contradicts the segments, and for private pools, which the allocator model does not have.
    """
    snapshot = an_object(content, f"{source}: the snapshot")
    device = _device(snapshot, source=source, device=device)
    settings = settings or _settings(snapshot, source=source)
    events = _events(snapshot["device_traces"][device], f"{source}: device_traces[{device}]")
    state = _final_state(snapshot, source=source, device=device)
    small = {event.address for event in events if event.action == "alloc" and event.size <= SMALL_LIMIT_BYTES}
    for event in reversed(events):
        _undo(state, event, small, f"{source}: event {event.position}")
    starts = sorted(state.stretches.values(), key=lambda stretch: stretch.address)
    _find_sizes(state, starts, events, divisions=1 if settings is None else settings.roundup_power2_divisions)
    return Recording(
        source=source,
        actions=[event.action for event in events],
        addresses=[event.address for event in events],
        sizes=[event.size for event in events],
        streams=[event.stream for event in events],
        reserved_bytes=_reserved(events, sum(stretch.size for stretch in starts)),
        positions=[event.position for event in events],
        segments=_segments(state, starts, source=source),
        start_is_given=True,
        position_name="event",
        settings=settings,
    )


# --- what the snapshot says ---------------------------------------------------------------------------------------


def _device(snapshot: Mapping[str, Any], *, source: str, device: int | None) -> int:
    """The device whose history there is, or the one that is asked for."""
    traces = a_list(field_of(snapshot, "device_traces", f"{source}: the snapshot"), f"{source}: device_traces")
    with_history = [index for index, trace in enumerate(traces) if trace]
    if device is not None and device not in with_history:
        raise UsageError(f"{source}: no history of device {device}; there is one of {_names(with_history)}")
    if not with_history:
        raise UsageError(
            f"{source}: the snapshot has no history to replay; call torch.cuda.memory._record_memory_history() before "
            f"what is to be recorded"
        )
    if device is None and len(with_history) > 1:
        chosen = f"choose one, such as --device {with_history[0]}"
        raise UsageError(f"{source}: histories of devices {_names(with_history)}; {chosen}")
    return with_history[0] if device is None else device


def _names(devices: Sequence[int]) -> str:
    return ", ".join(map(str, devices)) or "none"


def _events(trace: object, place: str) -> list[_Event]:
    events = []
    for index, entry in enumerate(a_list(trace, place)):
        here = f"{place}[{index}]"
        fields = an_object(entry, here)
        action = fields.get("action")
        if not isinstance(action, str) or (action not in _AS_RECORDED and action not in _WITHOUT_EFFECT):
            expected = ", ".join((*_AS_RECORDED, *_WITHOUT_EFFECT))
            raise UsageError(f"{here}.action is {shown(action)}; expected one of {expected}")
        if action not in _WITHOUT_EFFECT:
            address = number_of(fields, "addr", here, most=MAX_ADDRESS)
            size = number_of(fields, "size", here, most=MAX_BYTES)
            stream = number_of(fields, "stream", here, most=MAX_STREAM)
            events.append(_Event(_AS_RECORDED[action], address, size, stream, index + 1))
    return events


def _final_state(snapshot: Mapping[str, Any], *, source: str, device: int) -> _State:
    state = _State()
    segments = a_list(field_of(snapshot, "segments", f"{source}: the snapshot"), f"{source}: segments")
    for index, each in enumerate(segments):
        place = f"{source}: segments[{index}]"
        fields = an_object(each, place)
        if fields.get("device", device) == device:
            _enter_segment(state, fields, place)
    return state


def _enter_segment(state: _State, fields: Mapping[str, Any], place: str) -> None:
    pool_id = fields.get("segment_pool_id", (0, 0))
    if isinstance(pool_id, list | tuple) and any(number != 0 for number in pool_id):
        raise UsageError(f"{place} is of a private pool (CUDA graphs or MemPool), which is not modelled")
    kind = field_of(fields, "segment_type", place)
    if kind not in ("small", "large"):
        raise UsageError(f"{place}.segment_type is {shown(kind)}; expected small or large")
    address = number_of(fields, "address", place, most=MAX_ADDRESS)
    state.stretches[address] = _Stretch(
        address=address,
        size=number_of(fields, "total_size", place, least=1, most=MAX_BYTES),
        stream=number_of(fields, "stream", place, most=MAX_STREAM),
        pool=kind,
        expandable=fields.get("is_expandable") is True,
    )
    for index, each in enumerate(a_list(field_of(fields, "blocks", place), f"{place}.blocks")):
        here = f"{place}.blocks[{index}]"
        block = an_object(each, here)
        size = number_of(block, "size", here, least=1, most=MAX_BYTES)
        block_address = number_of(block, "address", here, most=MAX_ADDRESS) if "address" in block else address
        if str(field_of(block, "state", here)).startswith("active"):
            requested = number_of(block, "requested_size", here, most=size) if "requested_size" in block else size
            state.live[block_address] = _Block(requested, size)
        address = block_address + size


def _settings(snapshot: Mapping[str, Any], *, source: str) -> AllocatorSettings | None:
    """From ``PYTORCH_CUDA_ALLOC_CONF`` of the process, which newer snapshots carry."""
    given = snapshot.get("allocator_settings")
    text = given.get("PYTORCH_CUDA_ALLOC_CONF") if isinstance(given, dict) else None
    if not text:
        return None
    place = f"{source}: allocator_settings.PYTORCH_CUDA_ALLOC_CONF"
    if not isinstance(text, str):
        raise UsageError(f"{place} is {shown(text)}; expected text")
    return parse_settings(text, source=place)


# --- undoing ------------------------------------------------------------------------------------------------------


def _undo(state: _State, event: _Event, small: set[int], place: str) -> None:
    """Make the state what it was before the event; ``small`` are addresses of blocks of the small pool."""
    if event.action == "alloc":
        if state.live.pop(event.address, None) is None:
            raise _contradiction(place, event, "but nothing is allocated there afterwards")
    elif event.action == "free":
        if event.address in state.live:
            raise _contradiction(place, event, "but something is allocated there afterwards")
        state.live[event.address] = _Block(event.size, None)
    elif event.action == "segment_alloc":
        stretch = state.stretches.pop(event.address, None)
        if stretch is None or stretch.size != event.size:
            raise _contradiction(place, event, "but no such segment is there afterwards")
    elif event.action == "segment_free":
        pool: PoolName = "small" if event.size == SMALL_SEGMENT_BYTES else "large"
        state.stretches[event.address] = _Stretch(event.address, event.size, event.stream, pool, expandable=False)
    elif event.action == "segment_map":
        _take_out(state, event, place)
    else:
        _put_back(state, event, small)


def _contradiction(place: str, event: _Event, why: str) -> UsageError:
    return UsageError(
        f"{place}: {event.action} of {event.size} bytes at {event.address}, {why}; segments and history of the "
        f"snapshot do not go together"
    )


def _take_out(state: _State, event: _Event, place: str) -> None:
    """Undo a mapping: cut it out of the stretch that it is part of."""
    begin, end = event.address, event.address + event.size
    whole = next((one for one in state.stretches.values() if one.address <= begin and end <= one.end), None)
    if whole is None:
        raise _contradiction(place, event, "but that is not mapped afterwards")
    del state.stretches[whole.address]
    lowest = state.range_starts.get((whole.pool, whole.stream), begin)
    state.range_starts[whole.pool, whole.stream] = min(lowest, begin)
    for address, stop in ((whole.address, begin), (end, whole.end)):
        if address < stop:
            state.stretches[address] = _Stretch(address, stop - address, whole.stream, whole.pool, expandable=True)


def _put_back(state: _State, event: _Event, small: set[int]) -> None:
    """Undo an unmapping: the stretch is there again, one with those beside it."""
    stretch = _Stretch(event.address, event.size, event.stream, _pool_of(state, event, small), expandable=True)
    for other in list(state.stretches.values()):
        alike = other.expandable and (other.stream, other.pool) == (stretch.stream, stretch.pool)
        if alike and (other.end == stretch.address or stretch.end == other.address):
            del state.stretches[other.address]
            first = min(stretch.address, other.address)
            stretch = _Stretch(first, stretch.size + other.size, other.stream, other.pool, expandable=True)
    state.stretches[stretch.address] = stretch


def _pool_of(state: _State, event: _Event, small: set[int]) -> PoolName:
    """The pool of unmapped memory, which its event does not say.

    That of the stretch beside it, if there is one; else small where it is no whole number of the large pool's units, or
    where a block of the small pool begins in it at some time.
    """
    begin, end = event.address, event.address + event.size
    for other in state.stretches.values():
        if other.expandable and other.stream == event.stream and (other.end == begin or other.address == end):
            return other.pool
    if event.size % LARGE_SEGMENT_BYTES or any(begin <= address < end for address in small):
        return "small"
    return "large"


# --- the start ----------------------------------------------------------------------------------------------------


def _reserved(events: Sequence[_Event], start: int) -> list[int]:
    """Reserved bytes after each event."""
    reserved = []
    for event in events:
        start += _RESERVED_SIGN.get(event.action, 0) * event.size
        reserved.append(start)
    return reserved


def _find_sizes(state: _State, starts: Sequence[_Stretch], events: Sequence[_Event], *, divisions: int) -> None:
    """Settle the sizes of live blocks of which only the request is known."""
    addresses = sorted(state.live)
    begins = [stretch.address for stretch in starts]
    open_ends: dict[int, int] = {}
    for address, following in zip(addresses, [*addresses[1:], MAX_ADDRESS * 2], strict=False):
        block, index = state.live[address], bisect_right(begins, address) - 1
        if block.size is not None or index < 0:
            continue
        stretch, end = starts[index], address + round_to_division(block.requested, divisions)
        gap = min(following, stretch.end) - end
        block.size = end - address
        if stretch.pool == "large" and not stretch.expandable:
            if 0 < gap <= SMALL_LIMIT_BYTES:
                block.size += gap
            elif gap > SMALL_LIMIT_BYTES:
                open_ends[end] = address
    _find_ends(state, open_ends, events)


def _find_ends(state: _State, open_ends: dict[int, int], events: Sequence[_Event]) -> None:
    """Let the first block that is put close behind a live one show where that ends; ``open_ends`` maps end to start."""
    ends = sorted(open_ends)
    end_of = {address: end for end, address in open_ends.items()}
    for event in events:
        if event.action == "free":
            open_ends.pop(end_of.get(event.address, -1), None)
        elif event.action == "alloc":
            index = bisect_right(ends, event.address) - 1
            if index >= 0 and event.address - ends[index] <= SMALL_LIMIT_BYTES and ends[index] in open_ends:
                address = open_ends.pop(ends[index])
                state.live[address].size = event.address - address


def _segments(state: _State, starts: Sequence[_Stretch], *, source: str) -> tuple[Segment, ...]:
    """The start state as a recording has it."""
    live_of: dict[int, list[LiveBlock]] = {stretch.address: [] for stretch in starts}
    begins = [stretch.address for stretch in starts]
    for address, block in sorted(state.live.items()):
        index = bisect_right(begins, address) - 1
        if index < 0 or address >= starts[index].end or block.size is None:
            raise UsageError(
                f"{source}: a block at {address} lies in no segment; segments and history do not go together"
            )
        live_of[begins[index]].append(LiveBlock(address, block.size, block.requested))
    stretches = [
        Segment(one.address, one.size, one.stream, one.pool, tuple(live_of[one.address]), one.expandable)
        for one in starts
    ]
    return (*_anchors(state, starts), *stretches)


def _anchors(state: _State, starts: Sequence[_Stretch]) -> list[Segment]:
    """Empty stretches where a virtual range reaches further down than what is mapped of it at the start."""
    first: dict[tuple[PoolName, int], int] = {}
    for one in reversed(starts):
        first[one.pool, one.stream] = one.address
    return [
        Segment(address, 0, stream, pool, (), expandable=True)
        for (pool, stream), address in state.range_starts.items()
        if address < first.get((pool, stream), 0)
    ]
