"""Replay of recordings: those of real GPUs, exact at every event, and small ones that can be checked by hand."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import (
    FLUSHED,
    HEADER,
    MIB,
    TRACE_NAMES,
    WARM,
    WARM_START,
    RecordingAllocator,
    load_trace,
    run_program,
    table,
)

from meft.planner.allocator.caching import LiveBlock, Segment
from meft.planner.allocator.recording import Recording, read_events, read_segments
from meft.planner.allocator.replay import ReplayResult, replay
from meft.planner.allocator.settings import AllocatorSettings
from meft.planner.base.errors import UsageError

EXPANDABLE = AllocatorSettings(expandable_segments=True)


def recording(text: str, start: str | None = None) -> Recording:
    events = read_events(text, source="trace.csv")
    return events if start is None else events.starting_with(read_segments(json.loads(start), source="init.json"))


@pytest.mark.parametrize("name", TRACE_NAMES)
def test_reserved_is_exact_at_every_event_of_a_recording(name: str) -> None:
    real = load_trace(name)
    result = replay(real)
    assert (result.exact_events, result.first_inexact_event) == (len(real), None)
    assert result.peak_reserved_bytes == result.recorded_peak_reserved_bytes
    assert result.final_reserved_bytes == real.reserved_bytes[-1]
    assert real.allocated_bytes is not None
    assert result.peak_allocated_bytes == max(real.allocated_bytes)
    assert result.final_allocated_bytes == real.allocated_bytes[-1]
    assert result.retries == 0


@pytest.mark.parametrize("name", TRACE_NAMES)
def test_a_recording_fits_into_its_own_peak_and_no_less_without_a_flush(name: str) -> None:
    real = load_trace(name)
    peak = replay(real).peak_reserved_bytes
    assert replay(real, capacity_bytes=peak).retries == 0
    less = replay(real, capacity_bytes=peak - 1)
    assert less.retries > 0 or less.out_of_memory is not None
    assert less.peak_reserved_bytes < peak


def test_a_run_of_segment_frees_is_one_flush() -> None:
    result = replay(recording(FLUSHED))
    assert result == ReplayResult(
        events=10,
        exact_events=10,
        first_inexact_event=None,
        peak_reserved_bytes=50 * MIB,
        final_reserved_bytes=20 * MIB,
        recorded_peak_reserved_bytes=50 * MIB,
        peak_allocated_bytes=50 * MIB,
        final_allocated_bytes=2 * MIB,
        retries=0,
        expandable_segments=False,
    )


def test_events_that_differ_are_counted_with_what_announced_them() -> None:
    # Recorded with 24 MiB for a request of 2, where the model has 20; the flush goes back to the same 0.
    text = table(
        ("alloc", 500 * MIB, 512, 2 * MIB),
        ("segment_alloc", 100 * MIB, 24 * MIB, 26 * MIB),
        ("alloc", 100 * MIB, 2 * MIB, 26 * MIB),
        ("free", 100 * MIB, 2 * MIB, 26 * MIB),
        ("segment_free", 100 * MIB, 24 * MIB, 2 * MIB),
        ("free", 500 * MIB, 512, 2 * MIB),
    )
    result = replay(recording(text))
    assert (result.events, result.exact_events, result.first_inexact_event) == (6, 3, 2)
    assert (result.peak_reserved_bytes, result.recorded_peak_reserved_bytes) == (22 * MIB, 26 * MIB)


@pytest.mark.parametrize(("reserved", "exact"), [(22 * MIB, 2), (24 * MIB, 1)])
def test_a_segment_at_the_very_end_is_judged_by_what_it_adds(reserved: int, exact: int) -> None:
    text = table(("alloc", 500 * MIB, 512, 2 * MIB), ("segment_alloc", 100 * MIB, 20 * MIB, reserved))
    result = replay(recording(text))
    assert (result.events, result.exact_events) == (2, exact)
    assert result.first_inexact_event == (None if exact == 2 else 2)


def test_a_flush_at_the_very_end_is_judged_too() -> None:
    events = [("alloc", 100 * MIB, 30 * MIB, 30 * MIB), ("free", 100 * MIB, 30 * MIB, 30 * MIB)]
    result = replay(recording(table(*events, ("segment_free", 100 * MIB, 30 * MIB, 0))))
    assert (result.events, result.exact_events, result.final_reserved_bytes) == (3, 3, 0)


def test_a_warm_recording_needs_its_start_state() -> None:
    assert replay(recording(WARM, WARM_START)).exact_events == 2
    with pytest.raises(
        UsageError, match=r"^trace.csv: line 3: free of address \d+, which no event .* --init INIT.json$"
    ):
        replay(recording(WARM))
    with pytest.raises(
        UsageError, match=r"^trace.csv: line 3: free of address \d+, which neither .* of this recording\?$"
    ):
        replay(recording(WARM, "[]"))


def test_a_recording_that_allocates_twice_at_one_address_is_refused() -> None:
    text = table(("alloc", 500 * MIB, 512, 2 * MIB), ("alloc", 500 * MIB, 512, 2 * MIB))
    with pytest.raises(UsageError, match=r"^trace.csv: line 3: alloc at address \d+, which is allocated already"):
        replay(recording(text))


def test_an_impossible_start_state_is_refused() -> None:
    live = (LiveBlock(0, 30 * MIB, 5),)
    with pytest.raises(UsageError, match=r"^start state of trace.csv: block at 0 of .* leaves its segment"):
        replay(recording(WARM).starting_with([Segment(0, 20 * MIB, 0, "large", live)]))


def test_a_smaller_device_flushes_and_counts_it() -> None:
    # 30 freed, 20 live: 22 more do not fit 60 MiB beside both, and do without the 30.
    text = table(
        ("alloc", 700 * MIB, 30 * MIB, 30 * MIB),
        ("alloc", 100 * MIB, 20 * MIB, 50 * MIB),
        ("free", 700 * MIB, 30 * MIB, 50 * MIB),
        ("alloc", 900 * MIB, 32 * MIB, 82 * MIB),
    )
    result = replay(recording(text), capacity_bytes=60 * MIB)
    assert (result.retries, result.final_reserved_bytes, result.out_of_memory) == (1, 52 * MIB, None)
    assert (result.exact_events, result.first_inexact_event) == (3, 4)


def test_out_of_memory_ends_the_replay_and_says_where() -> None:
    result = replay(recording(FLUSHED), capacity_bytes=45 * MIB)
    assert result.out_of_memory is not None
    assert result.out_of_memory.event == 4  # announced by event 3, which is not judged without it
    assert result.out_of_memory.message == (
        "device out of memory: 20.0 MiB requested (a new segment of 20.0 MiB), 30.0 MiB allocated, 30.0 MiB reserved, "
        "capacity 45.0 MiB, 5.0 MiB short"
    )
    assert (result.events, result.exact_events, result.retries) == (10, 2, 1)


def test_a_start_state_above_the_capacity_is_flushed_first() -> None:
    idle = Segment(2000 * MIB, 40 * MIB, 0, "large", ())
    warm = recording(WARM, WARM_START)
    both = warm.starting_with([*warm.segments, idle])
    result = replay(both, capacity_bytes=30 * MIB)
    assert (result.retries, result.peak_reserved_bytes, result.out_of_memory) == (1, 20 * MIB, None)
    short = replay(both, capacity_bytes=10 * MIB)
    assert short.out_of_memory is not None
    assert short.out_of_memory.event == short.exact_events == 0
    assert "starts with 20.0 MiB in use, more than the capacity of 10.0 MiB" in short.out_of_memory.message


# --- expandable segments ------------------------------------------------------------------------------------------

MAPPED = table(
    ("segment_map", 0, 20 * MIB, 20 * MIB),
    ("alloc", 0, 12 * MIB, 20 * MIB),
    ("segment_map", 20 * MIB, 20 * MIB, 40 * MIB),
    ("alloc", 12 * MIB, 24 * MIB, 40 * MIB),
    ("free", 12 * MIB, 24 * MIB, 40 * MIB),
    ("segment_unmap", 20 * MIB, 20 * MIB, 20 * MIB),
    ("alloc", 12 * MIB, 8 * MIB, 20 * MIB),
)


def test_a_recording_that_maps_memory_is_replayed_with_expandable_segments() -> None:
    result = replay(recording(MAPPED))
    assert (result.exact_events, result.expandable_segments) == (7, True)
    default = replay(recording(MAPPED), settings=AllocatorSettings())
    assert not default.expandable_segments
    assert default.exact_events < 7


def test_expandable_segments_can_be_tried_on_any_recording() -> None:
    result = replay(recording(FLUSHED), settings=EXPANDABLE)
    # 40 MiB in two units, then 50 in three; after the flush one unit for 2 MiB.
    assert (result.peak_reserved_bytes, result.final_reserved_bytes) == (60 * MIB, 20 * MIB)


def test_start_segments_of_whole_units_are_taken_for_a_range_and_others_stay_fixed() -> None:
    unit = {"addr": 1000 * MIB, "size": 20 * MIB, "stream": 0, "pool": "large", "live": []}
    text = table(("alloc", 1000 * MIB, 38 * MIB, 40 * MIB))
    assert replay(recording(text, json.dumps([unit])), settings=EXPANDABLE).final_reserved_bytes == 40 * MIB
    odd = unit | {"addr": 1100 * MIB, "size": 22 * MIB}
    assert replay(recording(text, json.dumps([unit, odd])), settings=EXPANDABLE).final_reserved_bytes == 82 * MIB
    said = [unit | {"expandable": True}, odd]
    assert replay(recording(text, json.dumps(said)), settings=EXPANDABLE).final_reserved_bytes == 62 * MIB


def table_of(history: list[dict[str, Any]]) -> str:
    """A recording's table from a history that starts cold."""
    signs = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
    reserved, lines = 0, [HEADER]
    for entry in history:
        action = entry["action"].replace("free_completed", "free")
        reserved += signs.get(action, 0) * entry["size"]
        if action != "free_requested":
            lines.append(f"0,{action},{entry['addr']},{entry['size']},{entry['stream']},0,{reserved},0")
    return "\n".join(lines)


@given(st.integers(0, 2**32), st.booleans(), st.one_of(st.none(), st.integers(60 * MIB, 300 * MIB)))
@settings(deadline=None, max_examples=80)
def test_what_the_model_did_is_replayed_exactly(seed: int, expandable: bool, capacity: int | None) -> None:
    """Its flushes for want of memory, too, are flushes in the recording and need no capacity to happen again."""
    mode = AllocatorSettings(expandable_segments=expandable)
    allocator = RecordingAllocator(capacity, mode)
    allocator.malloc(1)
    run_program(allocator, random.Random(seed), steps=80, live=[])
    result = replay(recording(table_of(allocator.history)), settings=mode)
    assert result.events == result.exact_events
    assert result.final_reserved_bytes == allocator.reserved_bytes
    assert result.final_allocated_bytes == allocator.allocated_bytes
    assert result.peak_allocated_bytes == allocator.peak_allocated_bytes


# --- what is malformed --------------------------------------------------------------------------------------------

ONE = "0,alloc,1024,512,0,512,2097152,0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv: empty; expected a header"),
        (HEADER, "t.csv: line 2: no event follows the header"),
        (
            HEADER.replace("addr", "address") + f"\n{ONE}",
            "t.csv: line 1: column addr is missing; expected action, addr",
        ),
        (f"{HEADER}\n{ONE}\n0,alloc,1024,512", "t.csv: line 3: 4 values, but the header has 8; is it cut short?"),
        (
            f"{HEADER}\n{ONE}\n{ONE.replace('512', '-512', 1)}",
            "t.csv: line 3: bytes is '-512'; expected a whole number",
        ),
        (f"{HEADER}\n{ONE.replace('512', '5e2', 1)}", "t.csv: line 2: bytes is '5e2'; expected a whole number from 0"),
        (f"{HEADER}\n{ONE.replace('512', '', 1)}", "t.csv: line 2: bytes is ''"),
        (f"{HEADER}\n{ONE.replace('512', '5_12', 1)}", "t.csv: line 2: bytes is '5_12'"),
        (f"{HEADER}\n{ONE.replace('512', '٥١٢', 1)}", "t.csv: line 2: bytes is '٥١٢'"),
        (f"{HEADER}\n{ONE.replace('1024', '9' * 5000, 1)}", "t.csv: line 2: addr is '9999"),
        (f"{HEADER}\n{ONE.replace('1024', str(2**58), 1)}", f"t.csv: line 2: addr is '{2**58}'; expected"),
        (f"{HEADER}\n{ONE.replace('2097152', 'nan', 1)}", "t.csv: line 2: total_reserved_after is 'nan'"),
        (
            f"{HEADER}\n{ONE.replace('alloc', 'malloc', 1)}",
            "t.csv: line 2: action is 'malloc'; expected one of alloc, free",
        ),
        (f"{HEADER}\n{ONE}\n{ONE[:-1]}1", "t.csv: events of devices 0, 1; choose one, such as --device 0"),
        (f'{HEADER}\n"{ONE}', "t.csv: not a CSV table (unexpected end of data)"),
    ],
)
def test_a_malformed_table_is_one_line_with_place_value_and_what_is_expected(text: str, message: str) -> None:
    with pytest.raises(UsageError, match="^" + re.escape(message)):
        read_events(text, source="t.csv")


def test_one_device_of_several_is_picked_with_its_own_line_numbers() -> None:
    text = f"{HEADER}\n{ONE}\n0,free,4096,512,0,0,0,1\n"
    assert replay(read_events(text, source="t.csv", device=0)).events == 1
    with pytest.raises(UsageError, match=r"^t.csv: line 3: free of address 4096"):
        replay(read_events(text, source="t.csv", device=1))
    with pytest.raises(UsageError, match=r"^t.csv: no event of device 2; it has 0, 1$"):
        read_events(text, source="t.csv", device=2)


def test_columns_are_found_by_name_and_more_are_welcome() -> None:
    text = "note,total_reserved_after,stream,bytes,addr,action\nx,2097152,0,512,1024,alloc\n\n"
    result = replay(read_events("\ufeff" + text, source="t.csv"))
    assert (result.events, result.exact_events) == (1, 1)


START = {"addr": 0, "size": 2 * MIB, "stream": 0, "pool": "small", "live": [{"addr": 0, "size": 512, "requested": 8}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "i.json: it is a dict; expected a list"),
        ([5], "i.json: segments[0] is 5; expected an object"),
        ([START, START | {"size": -1}], "i.json: segments[1].size is -1; expected a whole number from 1"),
        ([START | {"addr": "0"}], "i.json: segments[0].addr is '0'; expected a whole number"),
        ([START | {"stream": True}], "i.json: segments[0].stream is True; expected a whole number"),
        ([START | {"addr": 1.5}], "i.json: segments[0].addr is 1.5"),
        ([START | {"size": 10**400}], "i.json: segments[0].size is a number of 1329 bits"),
        ([START | {"pool": "medium"}], "i.json: segments[0].pool is 'medium'; expected small or large"),
        ([START | {"expandable": 1}], "i.json: segments[0].expandable is 1; expected true or false"),
        ([START | {"live": 3}], "i.json: segments[0].live is 3; expected a list"),
        ([START | {"live": [{"addr": 0, "size": 512}]}], "i.json: segments[0].live[0].requested is missing"),
        (
            [START | {"live": [{"addr": 0, "size": 512, "requested": 513}]}],
            "i.json: segments[0].live[0].requested is 513; expected a whole number from 0 to 512",
        ),
    ],
)
def test_a_malformed_start_state_is_one_line_with_its_field(content: object, message: str) -> None:
    with pytest.raises(UsageError, match="^" + re.escape(message)):
        read_segments(content, source="i.json")
