"""The caching allocator model: by hand, by properties, and against streams recorded on real GPUs."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_allocator import NaiveAllocator, NoMemory
from recordings import TRACE_NAMES, load_trace

from meft.planner.allocator.blocks import SMALL_SEGMENT_BYTES
from meft.planner.allocator.caching import (
    NO_BLOCK,
    CachingAllocator,
    LiveBlock,
    Segment,
    round_block,
    round_to_division,
)
from meft.planner.allocator.recording import Recording
from meft.planner.allocator.settings import AllocatorSettings, parse_settings
from meft.planner.base.errors import DeviceOutOfMemory, UsageError

MIB = 2**20


# --- rounding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_bytes", "block"), [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB + 1, MIB + 512)])
def test_blocks_are_multiples_of_512(num_bytes: int, block: int) -> None:
    assert round_block(num_bytes) == block


# --- segments and splits, by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_bytes", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),  # the last size of the small pool
        (MIB + 1, 20 * MIB),  # the first of the large pool: rounds to 1 MiB + 512
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),  # from 10 MiB: rounded up to 2 MiB, and 10 is a multiple
        (10 * MIB + 1, 12 * MIB),
        (10 * MIB - 511, 10 * MIB),  # rounds to 10 MiB before the segment is chosen
    ],
)
def test_segment_size_by_request(num_bytes: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(num_bytes)
    assert allocator.reserved_bytes == reserved


@pytest.mark.parametrize(
    ("num_bytes", "allocated"),
    [
        (11 * MIB, 12 * MIB),  # segment 12: the remainder of exactly 1 MiB is not split and counts
        (11 * MIB - 512, 11 * MIB - 512),  # remainder 1 MiB + 512: split off
        (12 * MIB - 511, 12 * MIB),  # remainder 0
        (MIB, MIB),  # small: 1 MiB of 2 is split off
        (600, 1024),
    ],
)
def test_unsplit_remainder_counts_as_allocated(num_bytes: int, allocated: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(num_bytes)
    assert allocator.allocated_bytes == allocated
    assert allocator.requested_bytes == num_bytes


def test_small_pool_splits_the_smallest_remainder() -> None:
    allocator = CachingAllocator()
    allocator.malloc(MIB)
    allocator.malloc(MIB - 512)  # leaves 512 bytes of the 2 MiB segment, which is a block of its own
    allocator.malloc(512)
    assert allocator.allocated_bytes == allocator.reserved_bytes == 2 * MIB


def test_best_fit_takes_the_smallest_block_that_is_big_enough() -> None:
    allocator = CachingAllocator()
    # One 20 MiB segment: 8, 2, 4, 2 MiB and 4 MiB free behind them; then the 8 and the 4 become holes.
    eight, _, four, _ = [allocator.malloc(size * MIB) for size in (8, 2, 4, 2)]
    allocator.free(eight)
    allocator.free(four)
    assert allocator.malloc(4 * MIB) == four  # not the hole of 8; of the two of 4 MiB, the one at the lower address
    assert allocator.malloc(6 * MIB) == eight  # past the 4 MiB at the end, which is too small
    assert allocator.reserved_bytes == 20 * MIB


def test_ties_across_segments_take_the_newer_one_because_it_lies_lower() -> None:
    allocator = CachingAllocator()
    older, newer = allocator.malloc(32 * MIB), allocator.malloc(32 * MIB)
    assert newer < older
    allocator.free(older)
    allocator.free(newer)
    assert allocator.malloc(32 * MIB) == newer


def test_pools_and_streams_do_not_share() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(2 * MIB))  # 20 MiB of the large pool, stream 0, all free
    allocator.malloc(2 * MIB, stream=1)
    assert allocator.reserved_bytes == 40 * MIB
    allocator.malloc(512)  # the small pool takes its own 2 MiB
    assert allocator.reserved_bytes == 42 * MIB


def test_a_freed_block_merges_with_both_neighbours() -> None:
    allocator = CachingAllocator()
    first, middle, last = [allocator.malloc(6 * MIB) for _ in range(3)]  # 18 of 20 MiB
    for handle in (first, last, middle):
        allocator.free(handle)
    assert allocator.malloc(20 * MIB) == first  # one whole block again
    assert allocator.reserved_bytes == 20 * MIB


def test_freed_memory_stays_reserved_until_the_cache_is_emptied() -> None:
    allocator = CachingAllocator()
    kept = allocator.malloc(MIB)
    gone = allocator.malloc(30 * MIB)
    allocator.free(gone)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (MIB, 32 * MIB)
    allocator.empty_cache()  # the 2 MiB segment of the small pool is half in use and stays
    assert allocator.reserved_bytes == 2 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert allocator.peak_reserved_bytes == 32 * MIB


def test_peaks_and_their_reset() -> None:
    allocator = CachingAllocator()
    handle = allocator.malloc(30 * MIB - 1)  # block and segment of 30 MiB
    allocator.free(handle)
    allocator.malloc(100)
    assert (allocator.peak_requested_bytes, allocator.peak_allocated_bytes) == (30 * MIB - 1, 30 * MIB)
    assert allocator.peak_reserved_bytes == 32 * MIB  # and 2 MiB for the small pool
    allocator.empty_cache()
    allocator.reset_peaks()
    assert (allocator.peak_requested_bytes, allocator.peak_allocated_bytes) == (100, 512)
    assert allocator.peak_reserved_bytes == 2 * MIB


def test_zero_bytes_take_no_block() -> None:
    allocator = CachingAllocator()
    assert allocator.malloc(0) == NO_BLOCK
    allocator.free(NO_BLOCK)
    assert allocator.reserved_bytes == allocator.peak_allocated_bytes == 0


def test_wrong_use_is_refused() -> None:
    allocator = CachingAllocator()
    with pytest.raises(ValueError, match="cannot allocate -1 bytes"):
        allocator.malloc(-1)
    handle = allocator.malloc(512)
    allocator.free(handle)
    with pytest.raises(ValueError, match=f"handle {handle} is not an allocated block"):
        allocator.free(handle)
    with pytest.raises(ValueError, match="handle 12345 is not an allocated block"):
        allocator.free(12345)
    with pytest.raises(ValueError, match="capacity_bytes is 0"):
        CachingAllocator(0)


# --- capacity -----------------------------------------------------------------------------------------------------


def test_a_full_device_flushes_free_segments_of_every_pool_and_retries() -> None:
    allocator = CachingAllocator(capacity_bytes=44 * MIB)
    allocator.free(allocator.malloc(512, stream=3))  # 2 MiB, small pool of another stream, wholly free
    kept = allocator.malloc(20 * MIB)
    allocator.free(allocator.malloc(22 * MIB))  # 44 MiB reserved
    allocator.malloc(24 * MIB)  # fits only without both free segments: 20 + 24 = 44
    assert (allocator.num_retries, allocator.reserved_bytes) == (1, 44 * MIB)
    allocator.free(kept)


def test_out_of_memory_names_every_figure_and_leaves_the_books_right() -> None:
    allocator = CachingAllocator(capacity_bytes=50 * MIB)
    kept = allocator.malloc(30 * MIB)
    allocator.free(allocator.malloc(12 * MIB))
    # 12 of 42 MiB are flushed; 30 + 22 exceed 50 by 2.
    with pytest.raises(DeviceOutOfMemory) as caught:
        allocator.malloc(21 * MIB)
    assert str(caught.value) == (
        "device out of memory: 21.0 MiB requested (a new segment of 22.0 MiB), 30.0 MiB allocated, 30.0 MiB reserved, "
        "capacity 50.0 MiB, 2.0 MiB short; plan again with a smaller budget, batch or sequence, or raise --gpu-mem"
    )
    assert caught.value.exit_code == 4
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (30 * MIB, 30 * MIB)
    assert (allocator.num_retries, allocator.peak_reserved_bytes) == (1, 42 * MIB)
    allocator.malloc(20 * MIB)  # exactly the rest
    allocator.free(kept)
    assert allocator.allocated_bytes == 20 * MIB


# --- a warm start -------------------------------------------------------------------------------------------------


def warm_segments() -> list[Segment]:
    """20 MiB with 2 MiB free, 4 live, 6 free, 8 live; and a small segment with its first 512 bytes live."""
    large = (LiveBlock(1002 * MIB, 4 * MIB, 4 * MIB), LiveBlock(1012 * MIB, 8 * MIB, 8 * MIB - 100))
    small = (LiveBlock(500 * MIB, 512, 8),)
    return [Segment(1000 * MIB, 20 * MIB, 0, "large", large), Segment(500 * MIB, 2 * MIB, 0, "small", small)]


def test_a_warm_start_restores_blocks_and_holes() -> None:
    allocator = CachingAllocator()
    handles = allocator.install(warm_segments())
    assert set(handles) == {1002 * MIB, 1012 * MIB, 500 * MIB}
    assert allocator.reserved_bytes == allocator.peak_reserved_bytes == 22 * MIB
    assert allocator.allocated_bytes == 12 * MIB + 512
    assert allocator.requested_bytes == 12 * MIB - 100 + 8
    assert allocator.malloc(6 * MIB) == handles[1002 * MIB] + 4 * MIB  # the hole between the two
    assert allocator.malloc(2 * MIB) == handles[1002 * MIB] - 2 * MIB  # the hole in front
    allocator.malloc(MIB)
    assert allocator.reserved_bytes == 22 * MIB
    assert allocator.malloc(2 * MIB) < min(handles.values())  # a new segment lies below the recorded ones


def test_a_warm_start_frees_and_merges_like_a_cold_one() -> None:
    allocator = CachingAllocator()
    for handle in allocator.install(warm_segments()).values():
        allocator.free(handle)
    allocator.malloc(20 * MIB)
    allocator.malloc(MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (21 * MIB, 22 * MIB)


def test_an_empty_warm_start_is_a_cold_one() -> None:
    allocator = CachingAllocator()
    assert allocator.install([]) == {}
    allocator.malloc(1)
    assert allocator.reserved_bytes == SMALL_SEGMENT_BYTES


def test_impossible_recordings_are_refused() -> None:
    segment = Segment(0, 2 * MIB, 0, "small", ())
    with pytest.raises(ValueError, match="segment at 1024 overlaps"):
        CachingAllocator().install([segment, Segment(1024, 2 * MIB, 0, "small", ())])
    with pytest.raises(ValueError, match="leaves its segment"):
        CachingAllocator().install([Segment(0, 2 * MIB, 0, "small", (LiveBlock(2 * MIB - 512, 1024, 600),))])
    live = (LiveBlock(0, 1024, 600), LiveBlock(512, 512, 8))
    with pytest.raises(ValueError, match="overlaps another"):
        CachingAllocator().install([Segment(0, 2 * MIB, 0, "small", live)])
    with pytest.raises(ValueError, match="more than the capacity"):
        CachingAllocator(MIB).install([segment])
    used = CachingAllocator()
    used.malloc(1)
    with pytest.raises(ValueError, match="fresh allocator"):
        used.install([segment])


# --- expandable segments ------------------------------------------------------------------------------------------

EXPANDABLE = AllocatorSettings(expandable_segments=True)


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ((1,), 2 * MIB),  # one unit of the small range
        ((MIB, MIB, 512), 4 * MIB),  # two fill a unit, the third maps another
        ((MIB + 1,), 20 * MIB),  # one unit of the large range
        ((20 * MIB,), 20 * MIB),
        ((20 * MIB + 1,), 40 * MIB),  # 20 MiB + 512: two units
        ((15 * MIB, 15 * MIB), 40 * MIB),  # the second grows from the 5 MiB left: 10 more are needed
        ((15 * MIB, 4 * MIB, 2 * MIB), 40 * MIB),  # 1 MiB left, which is split off all the same
    ],
)
def test_expandable_segments_reserve_whole_units(sizes: tuple[int, ...], reserved: int) -> None:
    allocator = CachingAllocator(settings=EXPANDABLE)
    handles = [allocator.malloc(size) for size in sizes]
    assert allocator.reserved_bytes == allocator.peak_reserved_bytes == reserved
    assert allocator.allocated_bytes == sum(map(round_block, sizes))  # no remainder stays inside a block
    for handle in handles:
        allocator.free(handle)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_a_flush_unmaps_units_that_are_wholly_free_and_growth_fills_the_lowest_hole_first() -> None:
    allocator = CachingAllocator(settings=EXPANDABLE)
    front, middle, back = [allocator.malloc(size * MIB) for size in (10, 50, 20)]  # 80 MiB: four units
    allocator.free(middle)  # 10..60 MiB: the units at 20 and 40 are wholly free, half of the first is not
    allocator.empty_cache()
    assert allocator.reserved_bytes == 40 * MIB
    assert allocator.malloc(48 * MIB) == front + 10 * MIB  # the 10 MiB free and both units again
    assert allocator.reserved_bytes == 80 * MIB
    assert allocator.malloc(6 * MIB) == back + 20 * MIB  # 2 MiB are free before ``back``; the range grows at its end
    assert allocator.reserved_bytes == 100 * MIB


def test_the_end_of_a_range_counts_as_what_it_can_grow_to() -> None:
    allocator = CachingAllocator(settings=EXPANDABLE)
    first, _, _ = [allocator.malloc(size * MIB) for size in (8, 8, 2)]  # 18 of 20 MiB
    allocator.free(first)
    # 2 MiB at the end fit best, but can grow without limit: the 8 MiB at the front, which cannot grow, are taken.
    assert allocator.malloc(2 * MIB) == first


def test_expandable_segments_map_page_by_page_where_memory_is_short() -> None:
    allocator = CachingAllocator(50 * MIB, EXPANDABLE)
    kept = allocator.malloc(30 * MIB)  # two units of 20 MiB
    with pytest.raises(DeviceOutOfMemory, match=r"mapping another 20.0 MiB.*40.0 MiB reserved.*10.0 MiB short"):
        allocator.malloc(11 * MIB)
    allocator.malloc(10 * MIB)
    allocator.free(kept)
    # 50 of 50 MiB would be needed for both pools; the free unit is unmapped for the small pool's.
    for _ in range(11):
        allocator.malloc(MIB)
    assert (allocator.reserved_bytes, allocator.num_retries) == (32 * MIB, 2)


def test_a_recorded_range_is_laid_out_with_its_holes() -> None:
    live = (LiveBlock(1000 * MIB, 4 * MIB, 4 * MIB), LiveBlock(1010 * MIB, 8 * MIB, 8 * MIB - 100))
    segments = [
        Segment(1000 * MIB, 20 * MIB, 0, "large", live, expandable=True),
        Segment(1040 * MIB, 20 * MIB, 0, "large", (), expandable=True),
    ]
    allocator = CachingAllocator(settings=EXPANDABLE)
    handles = allocator.install(segments)
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (40 * MIB, 12 * MIB)
    # 22 MiB have room from behind the second block: 2 free, the hole of 20, and the 20 behind that.
    assert allocator.malloc(22 * MIB) == handles[1010 * MIB] + 8 * MIB
    assert allocator.reserved_bytes == 60 * MIB


def test_a_recorded_range_must_be_one() -> None:
    first = Segment(1000 * MIB, 20 * MIB, 0, "large", (), expandable=True)
    odd = Segment(1030 * MIB, 20 * MIB, 0, "large", (), expandable=True)
    with pytest.raises(ValueError, match=r"is not of whole 20\.0 MiB units"):
        CachingAllocator(settings=EXPANDABLE).install([first, odd])
    with pytest.raises(ValueError, match="turn expandable segments on"):
        CachingAllocator().install([first])


def test_fixed_segments_from_before_stay_in_use_beside_a_range() -> None:
    allocator = CachingAllocator(settings=EXPANDABLE)
    allocator.install([Segment(0, 30 * MIB, 0, "large", ())])
    allocator.malloc(29 * MIB)
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (30 * MIB, 29 * MIB)  # 1 MiB is split off
    allocator.malloc(2 * MIB)
    assert allocator.reserved_bytes == 50 * MIB


# --- settings -----------------------------------------------------------------------------------------------------


def test_blocks_from_the_split_limit_on_are_kept_whole() -> None:
    allocator = CachingAllocator(settings=AllocatorSettings(max_split_bytes=32 * MIB))
    handle = allocator.malloc(40 * MIB)
    allocator.free(handle)
    allocator.malloc(10 * MIB)  # not from the 40 MiB
    assert allocator.reserved_bytes == 50 * MIB
    assert allocator.malloc(33 * MIB) == handle  # 7 MiB too large, less than 20
    assert allocator.allocated_bytes == 50 * MIB  # and not split
    allocator.free(handle)
    allocator.free(allocator.malloc(60 * MIB))
    assert allocator.malloc(38 * MIB) == handle
    allocator.malloc(36 * MIB)  # 60 is 24 too large
    assert allocator.reserved_bytes == 50 * MIB + 60 * MIB + 36 * MIB


def test_short_of_memory_oversize_blocks_go_first_the_largest_before_the_others() -> None:
    allocator = CachingAllocator(142 * MIB, AllocatorSettings(max_split_bytes=32 * MIB))
    allocator.free(allocator.malloc(4 * MIB))  # 20 MiB, never oversize
    for handle in [allocator.malloc(size * MIB) for size in (36, 40, 44)]:
        allocator.free(handle)
    allocator.malloc(70 * MIB)  # 44 and 40 make 84
    assert (allocator.reserved_bytes, allocator.num_retries) == (20 * MIB + 36 * MIB + 70 * MIB, 0)
    allocator.malloc(20 * MIB)  # the 20 MiB
    allocator.malloc(30 * MIB)  # the 36 MiB, as no request below the limit may take it
    assert (allocator.reserved_bytes, allocator.num_retries) == (120 * MIB, 0)


@pytest.mark.parametrize(
    ("num_bytes", "divisions", "block"),
    [
        (1200, 4, 1536),  # not above 4 x 512
        (2049, 4, 2560),  # 2048, 2560, 3072, 3584
        (5 * MIB + 1, 4, 6 * MIB),
        (8 * MIB, 4, 8 * MIB),  # a power of two stays
        (9 * MIB, 2, 12 * MIB),
        (9 * MIB, 1, 9 * MIB),
    ],
)
def test_requests_round_up_to_a_division_of_a_power_of_two(num_bytes: int, divisions: int, block: int) -> None:
    assert round_to_division(num_bytes, divisions) == block


def test_settings_are_read_as_torch_takes_them() -> None:
    text = "max_split_size_mb:128, roundup_power2_divisions:8,backend:native,release_lock_on_cudamalloc:True"
    assert parse_settings(text) == AllocatorSettings(max_split_bytes=128 * MIB, roundup_power2_divisions=8)
    assert parse_settings("expandable_segments:True") == EXPANDABLE
    assert parse_settings("max_non_split_rounding_mb:64").max_non_split_rounding_bytes == 64 * MIB
    assert parse_settings("") == parse_settings("expandable_segments:False") == AllocatorSettings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("garbage_collection_threshold:0.8", "garbage_collection_threshold:0.8 is not modelled, it goes by the age"),
        ("backend:cudaMallocAsync", "backend:cudaMallocAsync is not modelled, only the native"),
        ("roundup_power2_divisions:[256:1,>:4]", "list in brackets, which is not modelled"),
        ("roundup_power2_divisions:3", "must be a power of two"),
        ("roundup_power2_divisions:-1", "roundup_power2_divisions:-1 is not a whole number"),
        ("max_split_size_mb:10", "must be at least 20 MiB"),
        ("max_split_size_mb:64,expandable_segments:True", "does not go with expandable_segments"),
        ("max_split_size:64", "did you mean max_split_size_mb"),
        ("expandable_segments:yes", "neither True nor False"),
        ("expandable_segments", "'expandable_segments' is not a setting"),
    ],
)
def test_other_settings_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_settings(text)


# --- properties ---------------------------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(0, 4096), st.integers(0, 3 * MIB), st.integers(0, 40 * MIB))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("malloc"), SIZES, st.integers(0, 1)),
        st.tuples(st.just("free"), st.integers(0, 1000), st.just(0)),
        st.tuples(st.just("empty_cache"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


def run(allocator: CachingAllocator, steps: Iterable[tuple[str, int, int]]) -> Iterator[dict[int, int]]:
    """Apply random steps, yielding the live handles and their requested bytes after each that did not run out."""
    live: dict[int, int] = {}
    for action, number, stream in steps:
        if action == "malloc":
            try:
                handle = allocator.malloc(number, stream)
            except DeviceOutOfMemory:
                continue
            if handle != NO_BLOCK:
                assert handle not in live
                live[handle] = number
        elif action == "free" and live:
            handle = list(live)[number % len(live)]
            allocator.free(handle)
            del live[handle]
        elif action == "empty_cache":
            allocator.empty_cache()
        yield live


CAPACITIES = st.one_of(st.none(), st.integers(2 * MIB, 100 * MIB))
MODES = {
    "default": AllocatorSettings(),
    "expandable": AllocatorSettings(expandable_segments=True),
    "max_split": AllocatorSettings(max_split_bytes=21 * MIB),
    "roundup": AllocatorSettings(roundup_power2_divisions=4),
    "expandable and roundup": AllocatorSettings(expandable_segments=True, roundup_power2_divisions=2),
}
EACH_MODE = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def naive(capacity: int | None, mode: AllocatorSettings) -> NaiveAllocator:
    return NaiveAllocator(
        capacity,
        expandable=mode.expandable_segments,
        max_split=mode.max_split_bytes,
        divisions=mode.roundup_power2_divisions,
    )


def program(seed: int) -> Iterator[tuple[str, int, int]]:
    """A long program with many sizes, on the edges between the rules too, and three streams, one of them busiest."""
    chance = random.Random(seed)
    edges = (512, MIB, MIB + 1, 10 * MIB, 20 * MIB, 21 * MIB, 22 * MIB, 40 * MIB)
    for _ in range(chance.choice((60, 200))):
        size = chance.choice((*(chance.randint(0, most) for most in (4096, 2 * MIB, 12 * MIB, 60 * MIB)), *edges))
        action = chance.choices(("malloc", "free", "empty_cache"), (55, 42, 3))[0]
        yield action, size, chance.choice((0, 0, 0, 1, 7))


@EACH_MODE
@given(seed=st.integers(0, 2**32), capacity=st.one_of(st.none(), st.integers(2 * MIB, 160 * MIB)))
@settings(deadline=None, max_examples=60)
def test_the_allocator_equals_the_naive_one_at_every_event(
    mode: AllocatorSettings, seed: int, capacity: int | None
) -> None:
    fast, plain = CachingAllocator(capacity, mode), naive(capacity, mode)
    live: list[int] = []
    for action, number, stream in program(seed):
        if action == "malloc":
            try:
                expected = plain.malloc(number, stream)
            except NoMemory:
                with pytest.raises(DeviceOutOfMemory):
                    fast.malloc(number, stream)
            else:
                assert fast.malloc(number, stream) == expected
                live.append(expected)
        elif action == "free" and live:
            handle = live.pop(number % len(live))
            plain.free(handle)
            fast.free(handle)
        elif action == "empty_cache":
            plain.empty_cache()
            fast.empty_cache()
        assert (fast.allocated_bytes, fast.requested_bytes) == (plain.allocated, plain.requested)
        assert (fast.reserved_bytes, fast.num_retries) == (plain.reserved, plain.retries)
    assert (fast.peak_allocated_bytes, fast.peak_requested_bytes, fast.peak_reserved_bytes) == plain.peaks


@given(STEPS, CAPACITIES)
@settings(deadline=None, max_examples=150)
def test_books_hold_at_every_step(steps: list[tuple[str, int, int]], capacity: int | None) -> None:
    allocator = CachingAllocator(capacity)
    for live in run(allocator, steps):
        assert allocator.requested_bytes == sum(live.values())
        assert sum(map(round_block, live.values())) <= allocator.allocated_bytes <= allocator.reserved_bytes
        # What stays inside a block without a request for it: up to 511 bytes, and up to 1 MiB unsplit.
        assert allocator.allocated_bytes - allocator.requested_bytes <= len(live) * (MIB + 511)
        assert allocator.peak_reserved_bytes >= allocator.reserved_bytes
        assert allocator.reserved_bytes % (2 * MIB) == 0
        assert capacity is None or allocator.peak_reserved_bytes <= capacity


@given(STEPS)
@settings(deadline=None, max_examples=150)
def test_live_blocks_never_overlap(steps: list[tuple[str, int, int]]) -> None:
    for live in run(CachingAllocator(), steps):
        stretches = sorted((handle, handle + round_block(size)) for handle, size in live.items())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(stretches))


@given(STEPS, CAPACITIES)
@settings(deadline=None, max_examples=150)
def test_freeing_everything_restores_whole_segments(steps: list[tuple[str, int, int]], capacity: int | None) -> None:
    allocator = CachingAllocator(capacity)
    live: dict[int, int] = {}
    for state in run(allocator, steps):
        live = state
    for handle in live:
        allocator.free(handle)
    assert allocator.allocated_bytes == allocator.requested_bytes == 0
    allocator.empty_cache()  # gives back only segments that are one free block
    assert allocator.reserved_bytes == 0


# --- recorded streams: that reserved is exact is in test_replay.py ------------------------------------------------


class RecordedPlacement(CachingAllocator):
    """The allocator with new segments where the recorded driver put them, which no rule predicts."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        rows = zip(recording.actions, recording.addresses, recording.sizes, strict=True)
        self.recorded = ((address, size) for action, address, size in rows if action == "segment_alloc")
        self.shift = 0

    def _place_segment(self, segment_bytes: int) -> int:
        address, size = next(self.recorded)
        assert size == segment_bytes
        return address + self.shift


@pytest.mark.parametrize("name", TRACE_NAMES)
def test_every_block_gets_its_recorded_address_when_segments_lie_where_they_lay(name: str) -> None:
    recording = load_trace(name)
    assert recording.allocated_bytes is not None
    allocator = RecordedPlacement(recording)
    handles = allocator.install(recording.segments)
    shift = allocator.shift = next((handle - address for address, handle in handles.items()), 0)
    rows = zip(recording.actions, recording.addresses, recording.sizes, recording.allocated_bytes, strict=True)
    for index, (action, address, size, allocated) in enumerate(rows):
        if action == "alloc":
            assert allocator.malloc(size) == address + shift, recording.place(index)
        elif action == "free":
            allocator.free(address + shift)
        assert allocator.allocated_bytes == allocated, recording.place(index)
