"""A stream of allocations for torch's memory viewer and for trace viewers.

:func:`memory_snapshot` has the fields of ``torch.cuda.memory._snapshot()`` that pytorch.org/memory_viz reads, and
``meft-plan replay`` too; :func:`memory_counters` is a Chrome trace, in which a microsecond stands for one event.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from meft.planner.allocator.blocks import SEGMENTS_END, SMALL_SEGMENT_BYTES
from meft.planner.allocator.caching import CachingAllocator

TOP_ADDRESS = 1 << 47
"""Segments lie below it: real addresses have no more bits."""


class Shown(NamedTuple):
    """Tensor ``tensor`` comes with ``num_bytes``, or goes, with ``num_bytes`` negative; ``phase`` and ``name`` say when
    and what it is."""

    tensor: int
    num_bytes: int
    phase: str
    name: str


def memory_snapshot(events: Iterable[Shown]) -> dict[str, Any]:
    """The events with the allocator's own, and the segments as they are at the end."""
    allocator = CachingAllocator(None)
    history: list[dict[str, Any]] = []
    segments: dict[int, int] = {}
    live: dict[int, tuple[int, int, int, list[dict[str, Any]]]] = {}
    for event in events:
        frames = [{"name": event.name, "filename": event.phase, "line": 0}]
        if event.num_bytes < 0:
            address, _, requested, _ = live.pop(event.tensor)
            allocator.free(address - TOP_ADDRESS + SEGMENTS_END)
            for action in ("free_requested", "free_completed"):
                history.append(_entry(action, address, requested, frames))
            continue
        reserved, allocated = allocator.reserved_bytes, allocator.allocated_bytes
        handle = allocator.malloc(event.num_bytes)
        address = handle - SEGMENTS_END + TOP_ADDRESS
        if allocator.reserved_bytes > reserved:  # a new segment begins with the block that it is for
            segments[address] = allocator.reserved_bytes - reserved
            history.append(_entry("segment_alloc", address, segments[address], frames))
        history.append(_entry("alloc", address, event.num_bytes, frames))
        live[event.tensor] = (address, allocator.allocated_bytes - allocated, event.num_bytes, frames)
    blocks = sorted(live.values(), key=lambda block: block[0])
    found = [_segment(address, size, blocks) for address, size in sorted(segments.items())]
    return {"segments": found, "device_traces": [history], "external_annotations": []}


def memory_counters(events: Iterable[Shown]) -> dict[str, Any]:
    """Allocated and reserved bytes after each event, and the phases, as a Chrome trace."""
    allocator = CachingAllocator(None)
    handles: dict[int, int] = {}
    shown: list[dict[str, Any]] = []
    phase, began, number = "", 0, 0
    for number, event in enumerate(events):
        if event.num_bytes > 0:
            handles[event.tensor] = allocator.malloc(event.num_bytes)
        else:
            allocator.free(handles.pop(event.tensor))
        if event.phase != phase:
            shown += _span(phase, began, number)
            phase, began = event.phase, number
        values = {
            "allocated": allocator.allocated_bytes,
            "cached": allocator.reserved_bytes - allocator.allocated_bytes,
        }
        shown.append({"name": "device memory, bytes", "ph": "C", "pid": 0, "ts": number, "args": values})
    shown += _span(phase, began, number + 1)
    return {"displayTimeUnit": "ms", "traceEvents": shown}


def _span(phase: str, began: int, ended: int) -> list[dict[str, Any]]:
    return [{"name": phase, "ph": "X", "pid": 0, "tid": 0, "ts": began, "dur": ended - began}] if phase else []


def _entry(action: str, address: int, size: int, frames: list[dict[str, Any]]) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, "frames": frames}


def _segment(address: int, size: int, live: list[tuple[int, int, int, list[dict[str, Any]]]]) -> dict[str, Any]:
    """One segment with its blocks, free ones between those that are live."""
    blocks, at, used = [], address, 0
    for begin, num_bytes, requested, frames in live:
        if not address <= begin < address + size:
            continue
        if begin > at:
            blocks.append({"address": at, "size": begin - at, "requested_size": 0, "state": "inactive", "frames": []})
        state: dict[str, Any] = {"state": "active_allocated", "frames": frames}
        blocks.append({"address": begin, "size": num_bytes, "requested_size": requested} | state)
        at, used = begin + num_bytes, used + num_bytes
    if at < address + size:
        rest = address + size - at
        blocks.append({"address": at, "size": rest, "requested_size": 0, "state": "inactive", "frames": []})
    kind = "small" if size == SMALL_SEGMENT_BYTES else "large"
    return {
        "device": 0,
        "address": address,
        "total_size": size,
        "allocated_size": used,
        "active_size": used,
        "stream": 0,
        "segment_type": kind,
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": blocks,
    }
