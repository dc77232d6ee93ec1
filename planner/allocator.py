"""PyTorch's native CUDA caching allocator as a small deterministic machine (default mode, torch 2.0 to 2.13).

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
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from meft.planner.errors import DeviceOutOfMemory
from meft.planner.units import MIB, format_bytes

MIN_BLOCK_BYTES = 512
SMALL_LIMIT_BYTES = 1 * MIB
"""Blocks up to this size live in the small pool; also what may stay unsplit in a block of the large pool."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
BIG_REQUEST_BYTES = 10 * MIB
"""Blocks from this size on get a segment of their own size, rounded up to ``SEGMENT_ROUND_BYTES``."""
SEGMENT_ROUND_BYTES = 2 * MIB

NO_BLOCK = 0
"""The handle of a request for 0 bytes: torch gives such a tensor a null pointer and no block."""

PoolName = Literal["small", "large"]

# Addresses are the model's own and never used twice, so there must be room for many flushes: 2**59 bytes below the
# first segment are millions of times the memory of a card.
_ADDRESS_BITS = 60
_ADDRESS_MASK = (1 << _ADDRESS_BITS) - 1
_FIRST_SEGMENT_END = 1 << 59


def round_block(num_bytes: int) -> int:
    """Size of the block that serves a request, in bytes: the next multiple of 512, at least 512.

    >>> [round_block(n) for n in (1, 512, 513)]
    [512, 512, 1024]
    """
    return max(-(-num_bytes // MIN_BLOCK_BYTES), 1) * MIN_BLOCK_BYTES


def pinned_bytes(num_bytes: int) -> int:
    """Pinned host memory behind a request, in bytes: the next power of two (the host cache never splits a block).

    >>> pinned_bytes(129 * 2**20 + 2**19) == 256 * 2**20
    True
    """
    return 1 << (num_bytes - 1).bit_length() if num_bytes > 0 else 0


@dataclass(frozen=True, slots=True)
class PoolRule:
    """What makes a pool: the largest remainder that is not split off a block."""

    name: PoolName
    unsplit_bytes: int

    def segment_bytes(self, block_bytes: int) -> int:
        """Size of the new segment reserved for a block, in bytes."""
        if self.name == "small":
            return SMALL_SEGMENT_BYTES
        if block_bytes < BIG_REQUEST_BYTES:
            return LARGE_SEGMENT_BYTES
        return -(-block_bytes // SEGMENT_ROUND_BYTES) * SEGMENT_ROUND_BYTES


POOL_RULES = {
    "small": PoolRule("small", unsplit_bytes=0),
    "large": PoolRule("large", unsplit_bytes=SMALL_LIMIT_BYTES),
}


@dataclass(frozen=True, slots=True)
class LiveBlock:
    """An allocated block of a recorded segment; ``num_bytes`` is the block, ``requested_bytes`` what was asked for."""

    address: int
    num_bytes: int
    requested_bytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A recorded segment; whatever its live blocks leave is free."""

    address: int
    num_bytes: int
    stream: int
    pool: PoolName
    live: tuple[LiveBlock, ...]


@dataclass(slots=True, eq=False)
class _Pool:
    """The free blocks of one pool and stream, as sorted keys: size above, address below, so best fit is a bisection."""

    rule: PoolRule
    free_keys: list[int] = field(default_factory=list)


class _Block:
    """A stretch of one segment, linked to its neighbours there; ``requested`` is None while it is free."""

    __slots__ = ("address", "following", "pool", "preceding", "requested", "size")

    def __init__(self, address: int, size: int, pool: _Pool) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.requested: int | None = None
        self.preceding: _Block | None = None
        self.following: _Block | None = None

    @property
    def free_key(self) -> int:
        return self.size << _ADDRESS_BITS | self.address


class CachingAllocator:
    """One device's caching allocator. Handles are the addresses of blocks, as in torch.

    ``allocated_bytes`` counts whole blocks (rounded, with unsplit remainders), ``requested_bytes`` what was asked for,
    ``reserved_bytes`` the segments; each has a peak. ``num_retries`` counts flushes forced by ``capacity_bytes``.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        if capacity_bytes is not None and capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; it must be above 0, or None for no limit")
        self.capacity_bytes = capacity_bytes
        self.allocated_bytes = 0
        self.requested_bytes = 0
        self.reserved_bytes = 0
        self.num_retries = 0
        self._pools: dict[tuple[PoolName, int], _Pool] = {}
        self._blocks: dict[int, _Block] = {}
        self._lowest_address = _FIRST_SEGMENT_END
        self.reset_peaks()

    def reset_peaks(self) -> None:
        """Let the peaks start again from what is allocated, requested and reserved now."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_requested_bytes = self.requested_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def malloc(self, num_bytes: int, stream: int = 0) -> int:
        """Allocate and return the block's handle; 0 bytes take no block and return ``NO_BLOCK``.

        Raises :class:`DeviceOutOfMemory` when the capacity does not allow a needed segment even after the flush; the
        allocator stays usable, as it was but for the flush.
        """
        if num_bytes <= 0:
            return _no_block(num_bytes)
        size = round_block(num_bytes)
        pool = self._pool("small" if size <= SMALL_LIMIT_BYTES else "large", stream)
        keys = pool.free_keys
        index = bisect_left(keys, size << _ADDRESS_BITS)
        if index < len(keys):
            block = self._blocks[keys.pop(index) & _ADDRESS_MASK]
        else:
            block = self._reserve(pool, size, num_bytes)
        if block.size - size > pool.rule.unsplit_bytes:
            rest = self._cut(block, size)
            insort(keys, rest.free_key)
        self._occupy(block, num_bytes)
        return block.address

    def free(self, handle: int) -> None:
        """Release a block, merging it with its free neighbours; freeing ``NO_BLOCK`` does nothing.

        Raises :class:`ValueError` for a handle that is not allocated (freed twice, or never given out).
        """
        if handle == NO_BLOCK:
            return
        block = self._blocks.get(handle)
        if block is None or block.requested is None:
            raise ValueError(f"handle {handle} is not an allocated block: freed twice, or never given out")
        self.allocated_bytes -= block.size
        self.requested_bytes -= block.requested
        block.requested = None
        following, preceding = block.following, block.preceding
        if following is not None and following.requested is None:
            _forget_free(following)
            self._join(block, following)
        if preceding is not None and preceding.requested is None:
            _forget_free(preceding)
            self._join(preceding, block)
            block = preceding
        insort(block.pool.free_keys, block.free_key)

    def empty_cache(self) -> None:
        """Give every wholly free segment, of all pools and streams, back to the device."""
        for pool in self._pools.values():
            kept = []
            for key in pool.free_keys:
                block = self._blocks[key & _ADDRESS_MASK]
                if block.preceding is None and block.following is None:
                    del self._blocks[block.address]
                    self.reserved_bytes -= block.size
                else:
                    kept.append(key)
            pool.free_keys[:] = kept  # in place: malloc, which flushes in mid-search, goes on with this list

    def install(self, segments: Iterable[Segment]) -> dict[int, int]:
        """Start warm, from recorded segments; returns the handle of each live block by its recorded address.

        The segments keep their order and distances but move to the top of the address range, so that new ones fit
        below them. The peaks start from what is installed.
        Raises :class:`ValueError` when this allocator is not fresh, when segments or blocks overlap or leave their
        segment, or when they exceed the capacity.
        """
        if self._blocks:
            raise ValueError("install recorded segments into a fresh allocator, before the first malloc")
        ordered = sorted(segments, key=lambda segment: segment.address)
        _check_recorded(ordered, self.capacity_bytes)
        shift = _FIRST_SEGMENT_END - (ordered[-1].address + ordered[-1].num_bytes) if ordered else 0
        handles: dict[int, int] = {}
        for segment in ordered:
            handles |= self._install_segment(segment, shift)
        self._lowest_address = min(self._blocks, default=_FIRST_SEGMENT_END)
        self.reset_peaks()
        return handles

    def _install_segment(self, segment: Segment, shift: int) -> dict[int, int]:
        """Carve one recorded segment, moved by ``shift``, into its live blocks and the free blocks between them."""
        block = self._add_segment(segment.address + shift, segment.num_bytes, self._pool(segment.pool, segment.stream))
        handles: dict[int, int] = {}
        for live in sorted(segment.live, key=lambda live: live.address):
            handles[live.address] = address = live.address + shift
            if address > block.address:
                free, block = block, self._cut(block, address - block.address)
                insort(free.pool.free_keys, free.free_key)
            rest = self._cut(block, live.num_bytes) if live.num_bytes < block.size else None
            self._occupy(block, live.requested_bytes)
            if rest is None:
                return handles
            block = rest
        insort(block.pool.free_keys, block.free_key)
        return handles

    def _pool(self, name: PoolName, stream: int) -> _Pool:
        pool = self._pools.get((name, stream))
        if pool is None:
            pool = self._pools[name, stream] = _Pool(POOL_RULES[name])
        return pool

    def _reserve(self, pool: _Pool, block_bytes: int, num_bytes: int) -> _Block:
        """Reserve a new segment, flushing the cache once if the capacity asks for it; returns it as one block."""
        segment_bytes = pool.rule.segment_bytes(block_bytes)
        if not self._fits(segment_bytes):
            self.empty_cache()
            self.num_retries += 1
            if not self._fits(segment_bytes):
                raise self._out_of_memory(num_bytes, segment_bytes)
        block = self._add_segment(self._place_segment(segment_bytes), segment_bytes, pool)
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return block

    def _fits(self, segment_bytes: int) -> bool:
        return self.capacity_bytes is None or self.reserved_bytes + segment_bytes <= self.capacity_bytes

    def _place_segment(self, segment_bytes: int) -> int:
        """Address of a new segment: below all earlier ones."""
        self._lowest_address -= segment_bytes
        return self._lowest_address

    def _add_segment(self, address: int, num_bytes: int, pool: _Pool) -> _Block:
        block = self._blocks[address] = _Block(address, num_bytes, pool)
        self.reserved_bytes += num_bytes
        return block

    def _occupy(self, block: _Block, num_bytes: int) -> None:
        """Mark a block, already off the free list, as allocated for a request of ``num_bytes``."""
        block.requested = num_bytes
        self.requested_bytes += num_bytes
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        if self.requested_bytes > self.peak_requested_bytes:
            self.peak_requested_bytes = self.requested_bytes

    def _cut(self, block: _Block, size: int) -> _Block:
        """Shorten a block to ``size`` bytes and return the rest of it as the next block, not yet on the free list."""
        rest = _Block(block.address + size, block.size - size, block.pool)
        rest.preceding, rest.following = block, block.following
        if rest.following is not None:
            rest.following.preceding = rest
        block.size, block.following = size, rest
        self._blocks[rest.address] = rest
        return rest

    def _join(self, first: _Block, second: _Block) -> None:
        """Undo a cut: ``first`` takes over ``second``, its next block. Neither may be on the free list."""
        first.size += second.size
        first.following = second.following
        if first.following is not None:
            first.following.preceding = first
        del self._blocks[second.address]

    def _out_of_memory(self, num_bytes: int, segment_bytes: int) -> DeviceOutOfMemory:
        capacity = self.capacity_bytes or 0
        short = self.reserved_bytes + segment_bytes - capacity
        return DeviceOutOfMemory(
            f"device out of memory: {format_bytes(num_bytes)} requested (a new segment of "
            f"{format_bytes(segment_bytes)}), {format_bytes(self.allocated_bytes)} allocated, "
            f"{format_bytes(self.reserved_bytes)} reserved, capacity {format_bytes(capacity)}, "
            f"{format_bytes(short)} short; plan again with a smaller budget, batch or sequence, or raise --gpu-mem"
        )


def _no_block(num_bytes: int) -> int:
    if num_bytes < 0:
        raise ValueError(f"cannot allocate {num_bytes} bytes; give 0 or more")
    return NO_BLOCK


def _forget_free(block: _Block) -> None:
    """Take a free block off its pool's free list."""
    keys = block.pool.free_keys
    del keys[bisect_left(keys, block.free_key)]


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
