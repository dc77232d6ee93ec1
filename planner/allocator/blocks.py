"""The pieces of the caching allocator: blocks, the free list of a pool, and a pool's virtual range.

A *block* is a stretch of a segment, linked to its neighbours there. A *pool* holds the free blocks of one size class
and stream. With expandable segments a pool has one *virtual range* instead of many segments: mapped memory grows and
shrinks in it by whole units, and what is not mapped is a block too, which no request can take before it is mapped.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from meft.planner.base.units import MIB

PoolName = Literal["small", "large"]

SMALL_LIMIT_BYTES = 1 * MIB
"""Blocks up to this size live in the small pool; also what may stay unsplit in a block of the large pool."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
BIG_REQUEST_BYTES = 10 * MIB
"""Blocks from this size on get a segment of their own size, rounded up to ``SEGMENT_ROUND_BYTES``."""
SEGMENT_ROUND_BYTES = 2 * MIB
UNIT_BYTES: dict[PoolName, int] = {"small": SMALL_SEGMENT_BYTES, "large": LARGE_SEGMENT_BYTES}
"""What a virtual range is mapped in."""

# Addresses are the model's own and never used twice. Segments lie below 2**59, each below all earlier ones: room for
# many flushes, millions of times the memory of a card. Virtual ranges lie above.
ADDRESS_BITS = 60
ADDRESS_MASK = (1 << ADDRESS_BITS) - 1
SEGMENTS_END = 1 << 59
RANGE_BYTES = 1 << 44
"""Far more than any card has, so that a range never runs out. In torch it spans 9/8 of the card's memory, and is joined
by another if holes use that up."""

UNMAPPED = -1


class Block:
    """A stretch of memory between its neighbours.

    ``requested`` is what was asked for, None while it is free, ``UNMAPPED`` in a hole. ``free_key`` is where it stands
    on the free list.
    """

    __slots__ = ("address", "following", "free_key", "pool", "preceding", "requested", "size")
    free_key: int

    def __init__(
        self,
        pool: Pool,
        address: int,
        size: int,
        requested: int | None = None,
        preceding: Block | None = None,
        following: Block | None = None,
    ) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.requested = requested
        self.preceding = preceding
        self.following = following

    @property
    def room(self) -> int:
        """What a free block can become by mapping the hole behind it."""
        following = self.following
        return self.size + (following.size if following is not None and following.requested == UNMAPPED else 0)


@dataclass(slots=True, eq=False)
class Pool:
    """The free blocks of one pool and stream, as sorted keys: size above, address below, so best fit is a bisection.

    ``blocks`` is the allocator's: every free or allocated block by its address.
    """

    name: PoolName
    unsplit_bytes: int
    """The largest remainder that is not split off a block."""
    blocks: dict[int, Block]
    free_keys: list[int] = field(default_factory=list)
    virtual_range: VirtualRange | None = None

    def segment_bytes(self, block_bytes: int) -> int:
        """Size of the new segment reserved for a block, in bytes."""
        if self.name == "small":
            return SMALL_SEGMENT_BYTES
        if block_bytes < BIG_REQUEST_BYTES:
            return LARGE_SEGMENT_BYTES
        return -(-block_bytes // SEGMENT_ROUND_BYTES) * SEGMENT_ROUND_BYTES

    def free_blocks(self) -> list[Block]:
        """From the smallest to the largest, ties by address."""
        return [self.blocks[key & ADDRESS_MASK] for key in self.free_keys]

    def remember(self, block: Block) -> None:
        """Put a free block on the free list."""
        key = block.free_key = block.size << ADDRESS_BITS | block.address
        insort(self.free_keys, key)

    def forget(self, block: Block) -> None:
        """Take a block off the free list."""
        del self.free_keys[bisect_left(self.free_keys, block.free_key)]

    def cut(self, block: Block, size: int) -> Block:
        """Shorten a block to ``size`` bytes and return the rest of it as the next block, not yet on the free list."""
        address, following = block.address + size, block.following
        rest = self.blocks[address] = Block(self, address, block.size - size, block.requested, block, following)
        if following is not None:
            following.preceding = rest
        block.size = size
        block.following = rest
        return rest

    def join(self, first: Block, second: Block) -> None:
        """Undo a cut: ``first`` takes over ``second``, its next block. Neither may be on the free list."""
        first.size += second.size
        following = first.following = second.following
        if following is not None:
            following.preceding = first
        del self.blocks[second.address]

    def release(self, block: Block) -> Block:
        """Make a block free: merge it with its free neighbours and put it on the free list. Returns what it became.

        :meth:`forget` and :meth:`remember` are written out: this is half of what a replay does.
        """
        block.requested = None
        keys, following, preceding = self.free_keys, block.following, block.preceding
        if following is not None and following.requested is None:
            del keys[bisect_left(keys, following.free_key)]
            self.join(block, following)
        if preceding is not None and preceding.requested is None:
            del keys[bisect_left(keys, preceding.free_key)]
            self.join(preceding, block)
            block = preceding
        key = block.free_key = block.size << ADDRESS_BITS | block.address
        insort(keys, key)
        return block


class VirtualRange:
    """Address space of one pool, mapped in units; what is mapped counts as reserved.

    ``holes`` are the unmapped blocks in the order of their addresses, each a whole number of units; the last one
    reaches to the end of the range.
    """

    def __init__(self, pool: Pool, start: int) -> None:
        self.start = start
        self.unit_bytes = UNIT_BYTES[pool.name]
        self._pool = pool
        length = RANGE_BYTES // self.unit_bytes * self.unit_bytes
        hole = pool.blocks[start] = Block(pool, start, length, UNMAPPED)
        self.holes = [hole]

    def grow(self, size: int, take: Callable[[int], bool]) -> Block | None:
        """Map what is missing at the lowest place where ``size`` bytes have room; returns that free block.

        ``take`` reserves bytes or says that the device has no more. Then the result is None; what was mapped up to
        there stays, free.
        """
        block = self._lowest_room(size)
        if block.requested == UNMAPPED:
            mapped = self._map(block, min(size, block.size), take)
            if mapped is None:
                return None
            block = mapped
        while block.size < size:
            hole = block.following
            assert hole is not None  # there is room, so a hole follows
            mapped = self._map(hole, min(size - block.size, hole.size), take)
            if mapped is None:
                return None
            block = mapped
        self._pool.forget(block)
        return block

    def shrink(self, block: Block) -> int:
        """Unmap the whole units inside a free block; returns their bytes."""
        unit = self.unit_bytes
        first = -(-(block.address - self.start) // unit) * unit + self.start
        end = (block.address + block.size - self.start) // unit * unit + self.start
        if first >= end:
            return 0
        self._pool.forget(block)
        if first > block.address:
            before, block = block, self._pool.cut(block, first - block.address)
            self._pool.remember(before)
        if end < block.address + block.size:
            self._pool.remember(self._pool.cut(block, end - block.address))
        self._unmap(block)
        return end - first

    def place(self, address: int, size: int) -> Block:
        """Map ``size`` bytes at ``address``, behind all that is mapped: how a recorded state is laid out."""
        hole = self.holes.pop()
        if address > hole.address:
            before, hole = hole, self._pool.cut(hole, address - hole.address)
            self.holes.append(before)
        self.holes.append(self._pool.cut(hole, size))
        hole.requested = None
        return hole

    def missing_bytes(self, size: int) -> int:
        """What would be mapped for a block of ``size`` bytes, at the lowest place that has room."""
        block: Block | None = self._lowest_room(size)
        missing = 0
        while size > 0 and block is not None:
            if block.requested == UNMAPPED:
                missing += -(-min(size, block.size) // self.unit_bytes) * self.unit_bytes
            size -= block.size
            block = block.following
        return missing

    def _lowest_room(self, size: int) -> Block:
        """The first hole, or the free block before it, from which free blocks and holes make ``size`` bytes."""
        for hole in self.holes:
            before = hole.preceding
            start = before if before is not None and before.requested is None else hole
            if _room_from(start, size):
                return start
        raise AssertionError("a virtual range never runs out")

    def _map(self, hole: Block, num_bytes: int, take: Callable[[int], bool]) -> Block | None:
        """Map the first units of a hole; returns the free block that they become part of."""
        num_bytes = -(-num_bytes // self.unit_bytes) * self.unit_bytes
        if not take(num_bytes):
            return None
        index = self.holes.index(hole)
        self.holes[index : index + 1] = [self._pool.cut(hole, num_bytes)] if num_bytes < hole.size else []
        return self._pool.release(hole)

    def _unmap(self, block: Block) -> None:
        """Turn a block, off the free list, into a hole, one with the holes beside it."""
        block.requested = UNMAPPED
        following, preceding = block.following, block.preceding
        if following is not None and following.requested == UNMAPPED:
            self.holes.remove(following)
            self._pool.join(block, following)
        if preceding is not None and preceding.requested == UNMAPPED:
            self._pool.join(preceding, block)
        else:
            insort(self.holes, block, key=_address)


def _address(block: Block) -> int:
    return block.address


def _room_from(block: Block | None, size: int) -> bool:
    """Whether free blocks and holes, from this one on, make ``size`` bytes."""
    found = 0
    while found < size and block is not None and (block.requested is None or block.requested == UNMAPPED):
        found += block.size
        block = block.following
    return found >= size
