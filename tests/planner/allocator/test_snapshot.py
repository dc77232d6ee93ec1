"""Snapshots of torch's: read as plain data whatever is in them, and undone to where their history starts."""

from __future__ import annotations

import io
import math
import os
import pickle
import random
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import MIB, RecordingAllocator, run_program

from meft.planner.allocator.caching import LiveBlock, Segment
from meft.planner.allocator.history import recording_of
from meft.planner.allocator.replay import replay
from meft.planner.allocator.settings import AllocatorSettings
from meft.planner.allocator.snapshot import unpickle_plain
from meft.planner.base.errors import UsageError


def unpickled(data: bytes) -> object:
    return unpickle_plain(io.BytesIO(data), source="s.pickle")


# --- plain data ---------------------------------------------------------------------------------------------------

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner), st.tuples(inner, inner), st.dictionaries(st.text(), inner)),
    max_leaves=12,
)


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
@settings(deadline=None, max_examples=80)
def test_plain_data_of_every_protocol_is_read_as_the_standard_library_reads_it(content: object, protocol: int) -> None:
    assert unpickled(pickle.dumps(content, protocol)) == content


def test_shared_and_cyclic_lists_and_special_numbers_are_read() -> None:
    shared: list[Any] = [1, -1, 2**40, -(2**70), 255, 65536]
    cyclic: list[Any] = [shared, shared]
    cyclic.append(cyclic)
    read: Any = unpickled(pickle.dumps({"a": cyclic, "nan": math.nan, "long": list(range(2000))}))
    assert read["a"][0] is read["a"][1]
    assert read["a"][2] is read["a"]
    assert math.isnan(read["nan"])
    assert read["long"][-1] == 1999


# --- what is not plain data ---------------------------------------------------------------------------------------


class Runs:
    """Unpickling this calls a function with arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class WithState:
    def __init__(self) -> None:
        self.text = "x"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"segments": [{"blocks": [bad]}]}], ids=["top", "deep"])
def test_a_pickle_that_would_run_a_command_runs_nothing(protocol: int, wrap: Any, tmp_path: Path) -> None:
    made = tmp_path / "made"
    data = pickle.dumps(wrap(Runs(os.system, f"touch {made}")), protocol)
    with pytest.raises(
        UsageError, match=r"plain data only, and never run: it asks for 'system' of module '(posix|nt)'"
    ):
        unpickled(data)
    assert not made.exists()
    pickle.loads(data)  # it is armed: the standard library's reader runs it
    assert made.exists()


@pytest.mark.parametrize(
    "content",
    [
        Runs(eval, "1"),
        Runs(open, "/dev/null"),
        WithState(),
        {"a set": {1}},
        frozenset("a"),
        [b"bytes"],
        bytearray(b"bytes"),
        complex(1, 2),
        Path(),
        print,
        int,
        re.compile("a"),
    ],
    ids=lambda content: type(content).__name__,
)
def test_anything_but_plain_data_is_refused(content: object) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(UsageError, match=r"^s.pickle: a pickle is read as plain data only, and never run: it "):
            unpickled(pickle.dumps(content, protocol))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "it asks for 'system' of module 'os'"),
        (b"(S'true'\nios\nsystem\n.", "it has the instruction STRING"),
        (b"(ios\nsystem\n.", "it asks for 'system' of module 'os'"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "it asks for 'system' of module 'os'"),
        (b"\x80\x04\x8c\x0bbuiltins\n..\x8c\x04eval\x93.", "it asks for 'eval' of module"),
        (b"\x80\x02\x82\x01.", "it has the instruction EXT1"),
        (b"\x80\x02P0\n.", "it has the instruction PERSID"),
        (b"\x80\x02NQ.", "it has the instruction BINPERSID"),
        (b"\x80\x02NNR.", "it has the instruction REDUCE"),
        (b"\x80\x02}}b.", "it has the instruction BUILD"),
        (b"\x80\x02N)\x81.", "it has the instruction NEWOBJ"),
        (b"\x80\x04N)}\x92.", "it has the instruction NEWOBJ_EX"),
        (b"\x80\x05\x97.", "it has the instruction NEXT_BUFFER"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "it has the instruction BYTEARRAY8"),
        (b"\x80\x02]K\x01K\x02s.", "it stores items in a list"),
        (b"\x80\x02}K\x01K\x02s.", "it has the key 1, where only text is expected"),
        (b"\x80\x02}(K\x01K\x02u.", "it has the key 1, where only text is expected"),
        (b"}(K\x01K\x02d.", "it has the key 1, where only text is expected"),
    ],
)
def test_instructions_that_do_more_than_build_data_are_refused_by_name(program: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        unpickled(program)


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"\x80\x04",
        b"\x80\x63N.",  # a protocol that is not there
        b"\x80\x04]",
        b"\x80\x02h\x07.",  # memory that was never filled
        b"\x80\x02u.",
        b"\x80\x02}(X\x01\x00\x00\x00au.",  # a key without its value
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # text that is longer than the file
        b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"abc.",
        b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N",
        b"\x80\x02X\x01\x00\x00\x00\xff.",
        b"I" + b"9" * 5000 + b"\n.",
        b"\xff\xff\xff",
        pickle.dumps({"segments": list(range(100))})[:-20],
    ],
)
def test_a_damaged_pickle_is_one_line(program: bytes) -> None:
    with pytest.raises(UsageError, match=r"^s.pickle: not a whole pickle \(\w+\); is it truncated or damaged\?$"):
        unpickled(program)


def test_a_pickle_does_not_get_the_memory_that_it_asks_for() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Slot 2**30 of the memory: the reader in C makes room for twice as many.
    assert unpickled(b"\x80\x02Nr" + (2**30).to_bytes(4, "little") + b".") is None
    with pytest.raises(UsageError):
        unpickled(b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b".")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


def test_keys_that_would_be_hashed_without_end_are_refused() -> None:
    nested = b")" + b"q\x00h\x00\x86" * 200  # each tuple holds the one before twice
    with pytest.raises(UsageError, match="it has the key a tuple"):
        unpickled(b"\x80\x02}" + nested + b"Ns.")


@given(st.binary(max_size=60))
@settings(deadline=None, max_examples=300)
def test_random_bytes_are_data_or_one_line(data: bytes) -> None:
    try:
        unpickled(b"\x80\x04" + data)
    except UsageError as caught:
        text = str(caught)
    else:
        return
    assert text.startswith("s.pickle: ")
    assert len(text) < 300


# --- by hand ------------------------------------------------------------------------------------------------------


def segment(address: int, size: int, kind: str, *blocks: tuple[int, int, bool], **more: Any) -> dict[str, Any]:
    """A segment of a snapshot with its blocks as (size, requested, live)."""
    listed, at = [], address
    for block_size, requested, live in blocks:
        state = "active_allocated" if live else "inactive"
        listed.append({"address": at, "size": block_size, "requested_size": requested, "state": state, "frames": []})
        at += block_size
    fields = {"device": 0, "address": address, "total_size": size, "stream": 0, "segment_type": kind}
    return fields | {"segment_pool_id": (0, 0), "is_expandable": False, "blocks": listed} | more


def entry(action: str, address: int, size: int, **more: Any) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, "frames": [], "time_us": 1} | more


BASE = 140 * 10**12 // (2 * MIB) * 2 * MIB


def hand_made() -> dict[str, Any]:
    """A 20 MiB segment with 4 MiB live and a small one; the history frees 8 MiB and allocates the small block."""
    large = segment(BASE, 20 * MIB, "large", (4 * MIB, 4 * MIB - 10, True), (16 * MIB, 0, False))
    small = segment(BASE + 64 * MIB, 2 * MIB, "small", (1024, 600, True), (2 * MIB - 1024, 0, False))
    history = [
        entry("free_requested", BASE + 4 * MIB, 8 * MIB - 1),
        entry("free_completed", BASE + 4 * MIB, 8 * MIB - 1),
        entry("segment_alloc", BASE + 64 * MIB, 2 * MIB),
        entry("alloc", BASE + 64 * MIB, 600),
        entry("oom", 0, 5 * MIB, device_free=10) | {"addr": None},
        entry("snapshot", 0, 600),
    ]
    return {"segments": [large, small], "device_traces": [history, []], "external_annotations": []}


def test_a_history_is_undone_to_the_state_it_starts_in() -> None:
    recording = recording_of(hand_made(), source="s")
    live = (LiveBlock(BASE, 4 * MIB, 4 * MIB - 10), LiveBlock(BASE + 4 * MIB, 8 * MIB, 8 * MIB - 1))
    assert recording.segments == (Segment(BASE, 20 * MIB, 0, "large", live),)
    assert recording.actions == ["free", "segment_alloc", "alloc"]
    assert recording.reserved_bytes == [20 * MIB, 22 * MIB, 22 * MIB]
    assert recording.place(2) == "s: event 4"
    result = replay(recording)
    assert (result.events, result.exact_events) == (3, 3)
    assert (result.peak_reserved_bytes, result.final_allocated_bytes) == (22 * MIB, 4 * MIB + 1024)


def test_the_same_as_json_without_what_newer_versions_added() -> None:
    content = hand_made()
    for each in content["segments"]:
        for name in ("device", "segment_pool_id", "is_expandable"):
            del each[name]
        for block in each["blocks"]:
            del block["address"]
    assert recording_of(content, source="s") == recording_of(hand_made(), source="s")


def test_memory_that_awaits_another_stream_is_still_in_use() -> None:
    content = hand_made()
    content["segments"][0]["blocks"][1:] = [
        {"size": 8 * MIB, "requested_size": 8 * MIB - 1, "state": "active_awaiting_free"},
        {"size": 8 * MIB, "requested_size": 0, "state": "inactive"},
    ]
    del content["device_traces"][0][1]  # requested, not completed
    for block in content["segments"][0]["blocks"]:
        block.pop("address", None)
    result = replay(recording_of(content, source="s"))
    assert (result.events, result.exact_events) == (2, 2)
    assert result.final_allocated_bytes == 12 * MIB + 1024


def test_a_remainder_that_cannot_be_free_belongs_to_the_block_before_it() -> None:
    # 11.5 MiB lay in a segment of 12: the 0.5 MiB behind it is no block of the large pool.
    content = {
        "segments": [segment(BASE, 12 * MIB, "large", (12 * MIB, 0, False))],
        "device_traces": [[entry("free_completed", BASE, 11 * MIB + MIB // 2)]],
    }
    (start,) = recording_of(content, source="s").segments
    assert start.live == (LiveBlock(BASE, 12 * MIB, 11 * MIB + MIB // 2),)


def test_the_next_block_shows_where_one_ended() -> None:
    # 9.5 MiB asked for in a block of 10: what comes to lie behind it, while it lives, begins at 10.
    content = {
        "segments": [segment(BASE, 20 * MIB, "large", (20 * MIB, 0, False))],
        "device_traces": [
            [
                entry("alloc", BASE + 10 * MIB, 8 * MIB),
                entry("free_completed", BASE + 10 * MIB, 8 * MIB),
                entry("free_completed", BASE, 9 * MIB + MIB // 2),
            ]
        ],
    }
    (start,) = recording_of(content, source="s").segments
    assert start.live == (LiveBlock(BASE, 10 * MIB, 9 * MIB + MIB // 2),)


def test_a_range_reaches_down_to_where_its_history_maps() -> None:
    # At the start only 20..40 MiB of the range are mapped. 10 MiB go into the hole before that, 30 behind it.
    blocks = ((10 * MIB, 10 * MIB, True), (10 * MIB, 0, False), (20 * MIB, 20 * MIB, True), (30 * MIB, 30 * MIB, True))
    content = {
        "segments": [segment(BASE, 80 * MIB, "large", *blocks, (10 * MIB, 0, False), is_expandable=True)],
        "device_traces": [
            [
                entry("segment_map", BASE, 20 * MIB),
                entry("alloc", BASE, 10 * MIB),
                entry("segment_map", BASE + 40 * MIB, 40 * MIB),
                entry("alloc", BASE + 40 * MIB, 30 * MIB),
            ]
        ],
    }
    result = replay(recording_of(content, source="s"))
    assert (result.events, result.exact_events, result.expandable_segments) == (4, 4, True)
    assert result.final_reserved_bytes == 80 * MIB


def test_settings_of_the_process_are_those_of_the_replay() -> None:
    content = hand_made() | {"allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}}
    assert recording_of(content, source="s").settings == AllocatorSettings(max_split_bytes=64 * MIB)
    content["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"] = "garbage_collection_threshold:0.6"
    with pytest.raises(
        UsageError, match=r"^s: allocator_settings.PYTORCH_CUDA_ALLOC_CONF: garbage_collection_threshold"
    ):
        recording_of(content, source="s")
    given_instead = AllocatorSettings()
    assert recording_of(content, source="s", settings=given_instead).settings is given_instead


def test_one_of_several_devices_is_picked() -> None:
    content = hand_made()
    content["device_traces"][1] = [entry("alloc", BASE + 512 * MIB, 8)]
    content["segments"].append(segment(BASE + 512 * MIB, 2 * MIB, "small", (2 * MIB, 8, True), device=1))
    with pytest.raises(UsageError, match=r"^s: histories of devices 0, 1; choose one, such as --device 0$"):
        recording_of(content, source="s")
    assert len(recording_of(content, source="s", device=0)) == 3
    assert recording_of(content, source="s", device=1).segments[0].num_bytes == 2 * MIB
    with pytest.raises(UsageError, match=r"^s: no history of device 2; there is one of 0, 1$"):
        recording_of(content, source="s", device=2)


# --- round trips --------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.booleans(), st.one_of(st.none(), st.integers(60 * MIB, 300 * MIB)))
@settings(deadline=None, max_examples=50)
def test_undoing_the_tail_of_a_run_gives_the_state_it_began_in(
    seed: int, expandable: bool, capacity: int | None
) -> None:
    chance = random.Random(seed)
    mode = AllocatorSettings(expandable_segments=expandable)
    allocator, live = RecordingAllocator(capacity, mode), list[int]()
    run_program(allocator, chance, steps=60, live=live)
    before, since = allocator.segments(), len(allocator.history)
    run_program(allocator, chance, steps=60, live=live)
    if len(allocator.history) == since:
        return
    recording = recording_of(allocator.snapshot(since), source="s")
    stretches = [each for each in recording.segments if each.num_bytes]
    assert [
        (each["address"], each["total_size"], each["stream"], each["segment_type"], each["is_expandable"])
        for each in before
    ] == [(each.address, each.num_bytes, each.stream, each.pool, each.expandable) for each in stretches]
    blocks = [block for each in before for block in each["blocks"] if block["state"] != "inactive"]
    found = [block for each in stretches for block in each.live]
    assert [(block["address"], block["requested_size"]) for block in blocks] == [
        (block.address, block.requested_bytes) for block in found
    ]
    sizes = [block["size"] for block in blocks]
    if expandable or sizes == [block.num_bytes for block in found]:  # which in default mode it is but for a few
        result = replay(recording, settings=mode)
        assert result.exact_events == result.events
        assert result.final_allocated_bytes == allocator.allocated_bytes


def test_the_unknown_remainders_are_few() -> None:
    unlike = total = 0
    for seed in range(40):
        chance, live = random.Random(seed), list[int]()
        allocator = RecordingAllocator()
        run_program(allocator, chance, steps=60, live=live)
        before, since = allocator.segments(), len(allocator.history)
        run_program(allocator, chance, steps=60, live=live)
        found = {
            block.address: block
            for each in recording_of(allocator.snapshot(since), source="s").segments
            for block in each.live
        }
        for block in (block for each in before for block in each["blocks"] if block["state"] != "inactive"):
            unlike += found[block["address"]].num_bytes != block["size"]
            total += 1
    assert total > 300
    assert unlike / total < 0.02


# --- what is malformed --------------------------------------------------------------------------------------------


def changed(**fields: Any) -> dict[str, Any]:
    content = hand_made()
    content["device_traces"][0][1] |= fields
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "s: the snapshot is a list; expected an object"),
        ({}, "s: the snapshot.device_traces is missing"),
        ({"device_traces": 5}, "s: device_traces is 5; expected a list"),
        ({"device_traces": [[], []]}, "s: the snapshot has no history to replay; call torch.cuda.memory._record"),
        ({"device_traces": [[entry("snapshot", 0, 0)]]}, "s: the snapshot.segments is missing"),
        (changed(action="malloc"), "s: device_traces[0][1].action is 'malloc'; expected one of alloc"),
        (changed(action=[[]]), "s: device_traces[0][1].action is a list"),
        (changed(addr=-1), "s: device_traces[0][1].addr is -1; expected a whole number from 0"),
        (changed(size=10**6000), "s: device_traces[0][1].size is a number of 19932 bits"),
        (changed(stream="0"), "s: device_traces[0][1].stream is '0'; expected a whole number"),
        (changed(addr=BASE), f"s: event 2: free of 8388607 bytes at {BASE}, but something is allocated there"),
        (changed(action="alloc"), "s: event 2: alloc of 8388607 bytes at 1"),
        (changed(action="segment_alloc"), "s: event 2: segment_alloc of 8388607 bytes"),
        (
            changed(action="segment_map", addr=5 * MIB),
            "s: event 2: segment_map of 8388607 bytes at 5242880, but that is",
        ),
        (hand_made() | {"segments": []}, "s: event 4: alloc of 600 bytes"),
        (hand_made() | {"segments": 3}, "s: segments is 3; expected a list"),
        (changed(addr=8 * MIB), "s: a block at 8388608 lies in no segment"),
        (
            hand_made() | {"allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": 5}},
            "s: allocator_settings.PYTORCH_CUDA_ALLOC",
        ),
    ],
)
def test_a_malformed_snapshot_is_one_line(content: object, message: str) -> None:
    with pytest.raises(UsageError, match="^" + re.escape(message)):
        recording_of(content, source="s")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment_pool_id": (0, 1)}, "s: segments[0] is of a private pool (CUDA graphs or MemPool)"),
        ({"segment_type": "huge"}, "s: segments[0].segment_type is 'huge'; expected small or large"),
        ({"total_size": 0}, "s: segments[0].total_size is 0; expected a whole number from 1"),
        ({"blocks": None}, "s: segments[0].blocks is None; expected a list"),
        ({"blocks": [{"size": 5}]}, "s: segments[0].blocks[0].state is missing"),
        ({"blocks": [{"size": -5, "state": "inactive"}]}, "s: segments[0].blocks[0].size is -5"),
        (
            {"blocks": [{"size": 512, "state": "active_allocated", "requested_size": 600}]},
            "s: segments[0].blocks[0].requested_size is 600; expected a whole number from 0 to 512",
        ),
    ],
)
def test_a_malformed_segment_is_one_line(fields: dict[str, Any], message: str) -> None:
    content = hand_made()
    content["segments"][0] |= fields
    with pytest.raises(UsageError, match="^" + re.escape(message)):
        recording_of(content, source="s")
