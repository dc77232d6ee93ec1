"""The caching allocator in the plainest form, to which the fast one must be equal event by event.

Nothing is linked, sorted or kept up to date: an arena (a segment, or a virtual range) is its live blocks and, for a
range, the units that are mapped. What is free, what is a hole and every total are worked out anew each time, so merging
needs no code. Slow; for programs of a few hundred events.
"""

from __future__ import annotations

from dataclasses import dataclass, field

KIB, MIB = 2**10, 2**20
TOP = 2**59
RANGE_LENGTH = 2**44


class NoMemory(Exception):
    """The capacity does not suffice."""


@dataclass
class Arena:
    start: int
    length: int
    small: bool
    stream: int
    unit: int | None = None
    mapped: set[int] = field(default_factory=set)
    live: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Block and requested size by address."""

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def reserved(self) -> int:
        return self.length if self.unit is None else len(self.mapped) * self.unit

    def mapped_stretches(self) -> list[tuple[int, int]]:
        if self.unit is None:
            return [(self.start, self.end)]
        stretches: list[tuple[int, int]] = []
        for index in sorted(self.mapped):
            begin = self.start + index * self.unit
            if stretches and stretches[-1][1] == begin:
                stretches[-1] = (stretches[-1][0], begin + self.unit)
            else:
                stretches.append((begin, begin + self.unit))
        return stretches

    def free(self) -> list[tuple[int, int]]:
        """(size, address) of everything mapped between live blocks."""
        found = []
        for begin, end in self.mapped_stretches():
            at = begin
            for address, (size, _) in sorted(self.live.items()):
                if begin <= address < end:
                    found.append((address - at, at))
                    at = address + size
            found.append((end - at, at))
        return [(size, address) for size, address in found if size]

    def holes(self) -> list[tuple[int, int]]:
        """(begin, end) of what is not mapped."""
        found, at = [], self.start
        for begin, end in [*self.mapped_stretches(), (self.end, self.end)]:
            if begin > at:
                found.append((at, begin))
            at = end
        return found


class NaiveAllocator:
    def __init__(
        self,
        capacity: int | None = None,
        *,
        expandable: bool = False,
        max_split: int | None = None,
        divisions: int = 1,
    ) -> None:
        self.capacity, self.expandable, self.max_split, self.divisions = capacity, expandable, max_split, divisions
        self.arenas: list[Arena] = []
        self.lowest = TOP
        self.num_ranges = 0
        self.retries = 0
        self.peaks = (0, 0, 0)

    @property
    def allocated(self) -> int:
        return sum(size for arena in self.arenas for size, _ in arena.live.values())

    @property
    def requested(self) -> int:
        return sum(requested for arena in self.arenas for _, requested in arena.live.values())

    @property
    def reserved(self) -> int:
        return sum(arena.reserved for arena in self.arenas)

    def note_peaks(self) -> None:
        now = (self.allocated, self.requested, self.reserved)
        self.peaks = tuple(max(pair) for pair in zip(self.peaks, now, strict=True))  # type: ignore[assignment]

    def malloc(self, num_bytes: int, stream: int = 0) -> int:
        if num_bytes == 0:
            return 0
        size = self.rounded(num_bytes)
        small = size <= MIB
        found = self.best_fit(size, small, stream) or self.extended(size, small, stream)
        arena, address, free_size = found
        rest = free_size - size
        if self.expandable or small:
            split = rest >= 512
        else:
            split = rest > MIB and (self.max_split is None or size < self.max_split)
        arena.live[address] = (size if split else free_size, num_bytes)
        self.note_peaks()
        return address

    def free(self, handle: int) -> None:
        if handle:
            (arena,) = [arena for arena in self.arenas if handle in arena.live]
            del arena.live[handle]

    def empty_cache(self) -> None:
        for arena in self.arenas:
            for size, address in arena.free():
                if arena.unit is not None:
                    for index in list(arena.mapped):
                        begin = arena.start + index * arena.unit
                        if address <= begin and begin + arena.unit <= address + size:
                            arena.mapped.remove(index)
        self.arenas = [arena for arena in self.arenas if arena.unit is not None or arena.live]

    def rounded(self, num_bytes: int) -> int:
        step = 512
        if self.divisions > 1 and num_bytes > 512 * self.divisions:
            floor = 512
            while floor * 2 <= num_bytes:
                floor *= 2
            step = floor // self.divisions
        size = step
        while size < num_bytes:
            size += step * max(1, (num_bytes - size) // step)
        return size

    def best_fit(self, size: int, small: bool, stream: int) -> tuple[Arena, int, int] | None:
        free = [
            (free_size, address, arena)
            for arena in self.arenas
            if (arena.small, arena.stream) == (small, stream)
            for free_size, address in arena.free()
            if free_size >= size
        ]
        free.sort(key=lambda each: each[:2])
        if not free:
            return None
        free_size, address, arena = free[0]
        for larger_size, larger_address, larger_arena in free[1:]:
            if arena.unit is None or self.room(larger_arena, larger_address, larger_size) >= self.room(
                arena, address, free_size
            ):
                break
            free_size, address, arena = larger_size, larger_address, larger_arena
        if self.max_split is not None:
            if size < self.max_split and free_size >= self.max_split:
                return None
            if size >= self.max_split and free_size >= size + 20 * MIB:
                return None
        return arena, address, free_size

    def room(self, arena: Arena, address: int, size: int) -> int:
        behind = address + size
        return size + sum(end - begin for begin, end in arena.holes() if begin == behind and arena.unit is not None)

    def extended(self, size: int, small: bool, stream: int) -> tuple[Arena, int, int]:
        grow = self.grow_range if self.expandable else self.new_segment
        found = grow(size, small, stream)
        if found is None and self.release_oversize(size, small, stream):
            found = grow(size, small, stream)
        if found is None:
            self.empty_cache()
            self.retries += 1
            found = grow(size, small, stream)
        if found is None:
            raise NoMemory
        return found

    def fits(self, num_bytes: int) -> bool:
        return self.capacity is None or self.reserved + num_bytes <= self.capacity

    def new_segment(self, size: int, small: bool, stream: int) -> tuple[Arena, int, int] | None:
        length = 2 * MIB
        if not small:
            length = 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
        if not self.fits(length):
            return None
        self.lowest -= length
        self.arenas.append(Arena(self.lowest, length, small, stream))
        return self.arenas[-1], self.lowest, length

    def release_oversize(self, size: int, small: bool, stream: int) -> bool:
        if self.max_split is None:
            return False
        wanted = max(size, self.max_split)
        idle = [arena for arena in self.arenas if (arena.small, arena.stream) == (small, stream) and not arena.live]
        idle.sort(key=lambda arena: (arena.length, arena.start))
        enough = [arena for arena in idle if arena.length >= wanted]
        if enough:
            self.arenas.remove(enough[0])
            return True
        released = 0
        while released < wanted and idle and idle[-1].length >= self.max_split:
            released += idle[-1].length
            self.arenas.remove(idle.pop())
        return released >= wanted

    def grow_range(self, size: int, small: bool, stream: int) -> tuple[Arena, int, int] | None:
        arena = self.range_of(small, stream)
        assert arena.unit is not None
        start = self.lowest_room(arena, size)
        need_end = start + size
        for begin, end in arena.holes():
            if end <= start or begin >= need_end:
                continue
            first = (begin - arena.start) // arena.unit
            last = (min(end, need_end) - arena.start + arena.unit - 1) // arena.unit
            if not self.fits((last - first) * arena.unit):
                return None
            arena.mapped |= set(range(first, last))
            self.note_peaks()
        (free_size,) = [free_size for free_size, address in arena.free() if address == start]
        return arena, start, free_size

    def range_of(self, small: bool, stream: int) -> Arena:
        for arena in self.arenas:
            if arena.unit is not None and (arena.small, arena.stream) == (small, stream):
                return arena
        unit = 2 * MIB if small else 20 * MIB
        start = TOP + self.num_ranges * RANGE_LENGTH
        self.num_ranges += 1
        self.arenas.append(Arena(start, RANGE_LENGTH // unit * unit, small, stream, unit))
        return self.arenas[-1]

    def lowest_room(self, arena: Arena, size: int) -> int:
        """The lowest hole, or the free stretch that ends at it, from which there is room up to the next live block."""
        ends_at = {address + free_size: address for free_size, address in arena.free()}
        for begin, _ in arena.holes():
            start = ends_at.get(begin, begin)
            barrier = min((address for address in arena.live if address > start), default=arena.end)
            if barrier - start >= size:
                return start
        raise AssertionError("a range never runs out")
