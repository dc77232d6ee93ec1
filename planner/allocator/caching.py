"""PyTorch's native CUDA caching allocator as a small deterministic machine (torch 2.0 to 2.13).

Feed it the allocations and frees of a program and it says what ``torch.cuda.memory_allocated`` and
``memory_reserved`` would have been after each. Nothing here touches a device or imports torch.

The rules, in the order a request meets them:

1. A request rounds up to a *block* of a multiple of 512 bytes. Blocks up to 1 MiB belong to the small pool, larger
   ones to the large pool; a pool exists once per stream, and nothing is reused across pools or streams.
2. The best fit among the pool's free blocks is the smallest that is big enough; ties take the lowest address.
3. Without a fit a new *segment* is reserved: 2 MiB (small), 20 MiB (blocks under 10 MiB), else the block rounded up to
   2 MiB. If the capacity does not allow it, every wholly free segment of every pool goes back to the device and the
   segment is tried once more; then the device is out of memory.
4. The block is split off when what remains is any block at all (small) or more than 1 MiB (large); a smaller remainder
   stays inside the block and counts as allocated.
5. A freed block merges with its free neighbours in the segment. The segment stays reserved.

New segments lie below all earlier ones. That matters only for ties, and is what real recordings show.

With *expandable segments* a pool has one virtual range instead of segments. 2: from the best fit on, the next larger
block is taken instead while it can grow less far, by mapping the hole behind it. 3: at the lowest address where free
memory and holes make enough room, what is missing is mapped in units of 2 MiB (small) or 20 MiB (large). 4: any
remainder is split off, in both pools. A flush unmaps every whole unit that is free.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from meft.planner.allocator.blocks import (
    ADDRESS_BITS,
    ADDRESS_MASK,
    RANGE_BYTES,
    SEGMENTS_END,
    SMALL_LIMIT_BYTES,
    UNIT_BYTES,
    Block,
    Pool,
    PoolName,
    VirtualRange,
)
from meft.planner.allocator.rounding import MIN_BLOCK_BYTES
from meft.planner.allocator.settings import NO_SPLIT_LIMIT, AllocatorSettings
from meft.planner.base.errors import DeviceOutOfMemory
from meft.planner.base.units import format_bytes

NO_BLOCK = 0
"""The handle of a request for 0 bytes: torch gives such a tensor a null pointer and no block."""

WHAT_TO_DO = "; plan again with a smaller budget, batch or sequence, or raise --gpu-mem"


def round_block(num_bytes: int) -> int:
    """Size of the block that serves a request, in bytes: the next multiple of 512, at least 512.

    >>> [round_block(n) for n in (1, 512, 513)]
    [512, 512, 1024]
    """
    return max(-(-num_bytes // MIN_BLOCK_BYTES), 1) * MIN_BLOCK_BYTES


def round_to_division(num_bytes: int, divisions: int) -> int:
    """The block where ``roundup_power2_divisions`` is set: a step between powers of two, each cut in ``divisions``.

    >>> [round_to_division(n * 1024, 4) for n in (1, 1200, 1537, 2048)]
    [1024, 1310720, 1835008, 2097152]
    """
    if divisions == 1 or num_bytes <= MIN_BLOCK_BYTES * divisions:
        return round_block(num_bytes)
    step = (1 << (num_bytes.bit_length() - 1)) // divisions
    return -(-num_bytes // step) * step


@dataclass(frozen=True, slots=True)
class LiveBlock:
    """An allocated block of a recorded segment; ``num_bytes`` is the block, ``requested_bytes`` what was asked for."""

    address: int
    num_bytes: int
    requested_bytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A recorded segment, or a mapped stretch of a virtual range; whatever its live blocks leave is free.

    A stretch of 0 bytes only says that its virtual range reaches down to there.
    """

    address: int
    num_bytes: int
    stream: int
    pool: PoolName
    live: tuple[LiveBlock, ...]
    expandable: bool = False


FreeLayout: TypeAlias = frozenset[tuple[PoolName, int, tuple[int, ...]]]
"""By pool and stream the free blocks' sizes and addresses, each pair as one number."""


class CachingAllocator:
    """One device's caching allocator. Handles are the addresses of blocks, as in torch.

    ``allocated_bytes`` counts whole blocks (rounded, with unsplit remainders), ``requested_bytes`` what was asked for,
    ``reserved_bytes`` the segments or what is mapped; each has a peak. ``num_retries`` counts flushes forced by
    ``capacity_bytes``, the memory that the device has for this allocator.
    """

    def __init__(self, capacity_bytes: int | None = None, settings: AllocatorSettings | None = None) -> None:
        if capacity_bytes is not None and capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; it must be above 0, or None for no limit")
        self.capacity_bytes = capacity_bytes
        self.settings = settings or AllocatorSettings()
        self.allocated_bytes = 0
        self.requested_bytes = 0
        self.reserved_bytes = 0
        self.num_retries = 0
        self._pools: dict[PoolName, dict[int, Pool]] = {"small": {}, "large": {}}
        self._small, self._large = self._pools["small"], self._pools["large"]
        self._blocks: dict[int, Block] = {}
        self._lowest_address = SEGMENTS_END
        self._num_ranges = 0
        self._split_limit = self.settings.max_split_bytes or NO_SPLIT_LIMIT
        self._divisions = self.settings.roundup_power2_divisions
        self._best_fit_is_taken = not self.settings.expandable_segments and self._split_limit == NO_SPLIT_LIMIT
        self.reset_peaks()

    def reset_peaks(self) -> None:
        """Let the peaks start again from what is allocated, requested and reserved now."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_requested_bytes = self.requested_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    # malloc and free are where replaying a recording spends its time: they do without calls where they can.

    def malloc(self, num_bytes: int, stream: int = 0) -> int:
        """Allocate and return the block's handle; 0 bytes take no block and return ``NO_BLOCK``.

        Raises :class:`DeviceOutOfMemory` when the capacity does not allow a needed segment even after the flush; the
        allocator stays usable, as it was but for the flush.
        """
        if num_bytes <= 0:
            return _no_block(num_bytes)
        size = num_bytes + 511 & -512
        if self._divisions != 1:
            size = round_to_division(num_bytes, self._divisions)
        try:
            pool = (self._small if size <= SMALL_LIMIT_BYTES else self._large)[stream]
        except KeyError:
            pool = self._new_pool("small" if size <= SMALL_LIMIT_BYTES else "large", stream)
        keys = pool.free_keys
        index = bisect_left(keys, size << ADDRESS_BITS)
        if not self._best_fit_is_taken:
            index = self._taken(pool, index, size)
        if index < len(keys):
            block = self._blocks[keys.pop(index) & ADDRESS_MASK]
        else:
            block = self._extend(pool, size, num_bytes)
        rest_bytes = block.size - size
        if rest_bytes > pool.unsplit_bytes and size < self._split_limit:
            rest = pool.cut(block, size)
            key = rest.free_key = rest_bytes << ADDRESS_BITS | rest.address
            insort(keys, key)
        block.requested = num_bytes
        requested = self.requested_bytes = self.requested_bytes + num_bytes
        allocated = self.allocated_bytes = self.allocated_bytes + block.size
        if allocated > self.peak_allocated_bytes:
            self.peak_allocated_bytes = allocated
        if requested > self.peak_requested_bytes:
            self.peak_requested_bytes = requested
        return block.address

    def free(self, handle: int) -> None:
        """Release a block, merging it with its free neighbours; freeing ``NO_BLOCK`` does nothing.

        Raises :class:`ValueError` for a handle that is not allocated (freed twice, or never given out).
        """
        block = self._blocks.get(handle)
        if block is None or block.requested is None or block.requested < 0:
            if handle == NO_BLOCK:
                return
            raise ValueError(f"handle {handle} is not an allocated block: freed twice, or never given out")
        self.allocated_bytes -= block.size
        self.requested_bytes -= block.requested
        block.pool.release(block)

    def empty_cache(self) -> None:
        """Give every wholly free segment and free unit, of all pools and streams, back to the device."""
        for pools in self._pools.values():
            for pool in pools.values():
                for block in pool.free_blocks():
                    if pool.virtual_range is not None and block.address >= SEGMENTS_END:
                        self.reserved_bytes -= pool.virtual_range.shrink(block)
                    elif block.preceding is None and block.following is None:
                        self._give_back(block)

    def free_layout(self) -> FreeLayout:
        """Which free blocks there are, by pool and stream; with what is live, all that later requests depend on."""
        return frozenset(
            (name, stream, tuple(pool.free_keys))
            for name, pools in self._pools.items()
            for stream, pool in pools.items()
        )

    def install(self, segments: Iterable[Segment]) -> dict[int, int]:
        """Start warm, from recorded segments; returns the handle of each live block by its recorded address.

        Segments keep their order and distances but move to the top of the address range, so that new ones fit
        below them. Mapped stretches keep their distances in the virtual range of their pool and stream, the first at
        its start. The peaks start from what is installed.
        Raises :class:`ValueError` when this allocator is not fresh, when segments or blocks overlap or leave their
        segment, when they exceed the capacity, or when stretches cannot be of one virtual range.
        """
        if self._blocks:
            raise ValueError("install recorded segments into a fresh allocator, before the first malloc")
        ordered = sorted(segments, key=lambda segment: segment.address)
        _check_recorded(ordered, self.capacity_bytes)
        fixed = [segment for segment in ordered if not segment.expandable]
        shift = SEGMENTS_END - (fixed[-1].address + fixed[-1].num_bytes) if fixed else 0
        self._lowest_address = min((segment.address + shift for segment in fixed), default=SEGMENTS_END)
        first_of: dict[Pool, Segment] = {}
        handles: dict[int, int] = {}
        for segment in ordered:
            pool = self._pools[segment.pool].get(segment.stream) or self._new_pool(segment.pool, segment.stream)
            if segment.expandable:
                address = self._stretch_address(pool, segment, first_of.setdefault(pool, segment))
                if not segment.num_bytes:
                    continue
                block = self._range(pool).place(address, segment.num_bytes)
            else:
                block = self._add_segment(pool, segment.address + shift, segment.num_bytes)
            self.reserved_bytes += segment.num_bytes
            handles |= self._carve(block, segment)
        self.reset_peaks()
        return handles

    def _carve(self, block: Block, segment: Segment) -> dict[int, int]:
        """Cut a segment's one block into its live blocks and the free blocks between them."""
        pool, shift = block.pool, block.address - segment.address
        handles: dict[int, int] = {}
        for live in sorted(segment.live, key=lambda live: live.address):
            handles[live.address] = address = live.address + shift
            before = None
            if address > block.address:
                before, block = block, pool.cut(block, address - block.address)
            rest = pool.cut(block, live.num_bytes) if live.num_bytes < block.size else None
            block.requested = live.requested_bytes
            if before is not None:
                pool.release(before)
            self.requested_bytes += live.requested_bytes
            self.allocated_bytes += block.size
            if rest is None:
                return handles
            block = rest
        pool.release(block)
        return handles

    def _stretch_address(self, pool: Pool, segment: Segment, first: Segment) -> int:
        """Where a recorded stretch lies in the virtual range of its pool, whose first stretch is ``first``."""
        unit, offset = UNIT_BYTES[pool.name], segment.address - first.address
        if not self.settings.expandable_segments:
            raise ValueError("the recorded segments are expandable; turn expandable segments on")
        if offset % unit or segment.num_bytes % unit or offset + segment.num_bytes > RANGE_BYTES // 2:
            raise ValueError(
                f"segment at {segment.address} of {segment.num_bytes} bytes is not of whole {format_bytes(unit)} units "
                f"of the range that begins at {first.address}"
            )
        return self._range(pool).start + offset

    def _new_pool(self, name: PoolName, stream: int) -> Pool:
        unsplit = SMALL_LIMIT_BYTES if name == "large" and not self.settings.expandable_segments else 0
        pool = self._pools[name][stream] = Pool(name, unsplit, self._blocks)
        return pool

    def _range(self, pool: Pool) -> VirtualRange:
        if pool.virtual_range is None:
            pool.virtual_range = VirtualRange(pool, SEGMENTS_END + self._num_ranges * RANGE_BYTES)
            self._num_ranges += 1
        return pool.virtual_range

    def _taken(self, pool: Pool, index: int, size: int) -> int:
        """Which free block serves ``size`` bytes when the best fit is at ``index``, where settings have a say."""
        keys = pool.free_keys
        if index == len(keys):
            return index
        if self.settings.expandable_segments:
            return _least_room(pool, index)
        found = keys[index] >> ADDRESS_BITS
        rounding = self.settings.max_non_split_rounding_bytes
        limit = self._split_limit if size < self._split_limit else size + rounding
        return index if found < limit else len(keys)

    def _extend(self, pool: Pool, size: int, num_bytes: int) -> Block:
        """Reserve memory for a block, flushing the cache if the capacity asks for it."""
        block = self._try_extend(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._try_extend(pool, size)
        if block is None:
            self.empty_cache()
            self.num_retries += 1
            block = self._try_extend(pool, size)
        if block is None:
            raise self._out_of_memory(pool, size, num_bytes)
        return block

    def _try_extend(self, pool: Pool, size: int) -> Block | None:
        """A new free block of at least ``size`` bytes, not on the free list; None where the capacity has none."""
        if self.settings.expandable_segments:
            return self._range(pool).grow(size, self._take)
        segment_bytes = pool.segment_bytes(size)
        if not self._take(segment_bytes):
            return None
        return self._add_segment(pool, self._place_segment(segment_bytes), segment_bytes)

    def _take(self, num_bytes: int) -> bool:
        """Reserve bytes of the device, if it has them."""
        if self.capacity_bytes is not None and self.reserved_bytes + num_bytes > self.capacity_bytes:
            return False
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Before a flush: give back the smallest oversize block that would do, else the largest until they would."""
        if self._split_limit == NO_SPLIT_LIMIT:
            return False
        wanted = max(size, self._split_limit)
        whole = [block for block in pool.free_blocks() if block.preceding is None and block.following is None]
        oversize = [block for block in whole if block.size >= self._split_limit]
        enough = [block for block in oversize if block.size >= wanted]
        released = 0
        for block in enough[:1] or reversed(oversize):
            if released >= wanted:
                break
            released += block.size
            self._give_back(block)
        return released >= wanted

    def _place_segment(self, segment_bytes: int) -> int:
        """Address of a new segment: below all earlier ones."""
        self._lowest_address -= segment_bytes
        return self._lowest_address

    def _add_segment(self, pool: Pool, address: int, num_bytes: int) -> Block:
        block = self._blocks[address] = Block(pool, address, num_bytes)
        return block

    def _give_back(self, block: Block) -> None:
        """Return a segment that is one free block to the device."""
        block.pool.forget(block)
        del self._blocks[block.address]
        self.reserved_bytes -= block.size

    def _out_of_memory(self, pool: Pool, size: int, num_bytes: int) -> DeviceOutOfMemory:
        capacity, what = self.capacity_bytes or 0, "a new segment of "
        needed = pool.segment_bytes(size)
        if self.settings.expandable_segments:
            needed, what = self._range(pool).missing_bytes(size), "mapping another "
        short = self.reserved_bytes + needed - capacity
        return DeviceOutOfMemory(
            f"device out of memory: {format_bytes(num_bytes)} requested ({what}{format_bytes(needed)}), "
            f"{format_bytes(self.allocated_bytes)} allocated, {format_bytes(self.reserved_bytes)} reserved, "
            f"capacity {format_bytes(capacity)}, {format_bytes(short)} short{WHAT_TO_DO}"
        )


def _least_room(pool: Pool, index: int) -> int:
    """With virtual ranges: from the best fit go on while the next larger free block can grow less far."""
    blocks, keys = pool.blocks, pool.free_keys
    block = blocks[keys[index] & ADDRESS_MASK]
    while block.address >= SEGMENTS_END and index + 1 < len(keys):
        larger = blocks[keys[index + 1] & ADDRESS_MASK]
        if larger.room >= block.room:
            break
        block, index = larger, index + 1
    return index


def _no_block(num_bytes: int) -> int:
    if num_bytes < 0:
        raise ValueError(f"cannot allocate {num_bytes} bytes; give 0 or more")
    return NO_BLOCK


def _check_recorded(segments: list[Segment], capacity_bytes: int | None) -> None:
    """Refuse recorded segments (sorted by address) that overlap, hold blocks they cannot, or exceed the capacity."""
    end = 0
    for segment in segments:
        if segment.address < end:
            raise ValueError(f"segment at {segment.address} overlaps the one before it, which ends at {end}")
        end = segment.address + segment.num_bytes
        block_end = segment.address
        for live in sorted(segment.live, key=lambda live: live.address):
            if live.num_bytes <= 0 or live.address < block_end or live.address + live.num_bytes > end:
                raise ValueError(
                    f"block at {live.address} of {live.num_bytes} bytes overlaps another or leaves its segment "
                    f"{segment.address}..{end}"
                )
            block_end = live.address + live.num_bytes
    total = sum(segment.num_bytes for segment in segments)
    if capacity_bytes is not None and total > capacity_bytes:
        raise ValueError(f"the recorded segments hold {total} bytes, more than the capacity of {capacity_bytes}")
