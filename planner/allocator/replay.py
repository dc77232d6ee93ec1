"""Replay of a recorded stream through the caching allocator model, compared with what was recorded at every event.

Allocations and frees drive it. What the allocator did for them is the model's own business: a ``segment_alloc`` must
follow from the allocation behind it, and is judged with it; a run of ``segment_free`` is one flush of the cache, judged
at its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from meft.planner.allocator.caching import WHAT_TO_DO, CachingAllocator
from meft.planner.allocator.recording import RETURNED, TAKEN, Recording
from meft.planner.allocator.settings import AllocatorSettings
from meft.planner.base.errors import DeviceOutOfMemory, UsageError
from meft.planner.base.units import format_bytes


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """Where a replay with less memory ended: the event's number, counted from 1 (0: before the first), and why."""

    event: int
    message: str


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay came to, in bytes and numbers of events.

    ``exact_events`` are those at which the reserved bytes are the recorded ones; ``first_inexact_event`` counts from 1.
    ``retries`` are flushes that the capacity forced. The peaks include the start state.
    """

    events: int
    exact_events: int
    first_inexact_event: int | None
    peak_reserved_bytes: int
    final_reserved_bytes: int
    recorded_peak_reserved_bytes: int
    peak_allocated_bytes: int
    final_allocated_bytes: int
    retries: int
    expandable_segments: bool
    out_of_memory: OutOfMemory | None = None


def replay(
    recording: Recording, *, capacity_bytes: int | None = None, settings: AllocatorSettings | None = None
) -> ReplayResult:
    """Replay a recording; ``settings`` are as recorded where they are None, ``capacity_bytes`` unlimited.

    Running out of memory ends the replay and is part of the result. Raises :class:`UsageError`, naming the event, for a
    recording that contradicts itself or its start state.
    """
    if settings is None:
        settings = recording.settings or AllocatorSettings(expandable_segments=recording.expandable)
    if settings.expandable_segments:
        recording = recording.for_ranges()
    allocator = CachingAllocator(settings=settings)
    run = _Run(recording, allocator, _installed(recording, allocator))
    too_much = _limit(allocator, capacity_bytes)
    if too_much is not None:
        run.out_of_memory = OutOfMemory(0, too_much)
    else:
        run.play()
    return run.result()


def _installed(recording: Recording, allocator: CachingAllocator) -> dict[int, int]:
    """The handles of the blocks that are live at the start, by recorded address."""
    try:
        return allocator.install(recording.segments)
    except ValueError as error:
        raise UsageError(f"start state of {recording.source}: {error}") from None


def _limit(allocator: CachingAllocator, capacity_bytes: int | None) -> str | None:
    """Set the capacity. A start state above it is flushed, as it would have been before; says if that is too little."""
    allocator.capacity_bytes = capacity_bytes
    if capacity_bytes is None or allocator.reserved_bytes <= capacity_bytes:
        return None
    allocator.empty_cache()
    allocator.num_retries += 1
    allocator.reset_peaks()
    if allocator.reserved_bytes <= capacity_bytes:
        return None
    needed, capacity = format_bytes(allocator.reserved_bytes), format_bytes(capacity_bytes)
    return f"device out of memory: the recording starts with {needed} in use, more than the capacity of {capacity}"


@dataclass(slots=True)
class _Run:
    """A replay on its way: ``handles`` by recorded address, ``judged`` events so far, the ``inexact`` among them."""

    recording: Recording
    allocator: CachingAllocator
    handles: dict[int, int]
    judged: int = 0
    inexact: int = 0
    first_inexact: int | None = None
    out_of_memory: OutOfMemory | None = None

    def play(self) -> None:
        """Go through the events. This loop is a third of a replay."""
        allocator, handles, rec = self.allocator, self.handles, self.recording
        malloc, free = allocator.malloc, allocator.free
        announced = number = 0  # ``announced``: events that are judged with the next
        rows = zip(count(1), rec.actions, rec.addresses, rec.sizes, rec.streams, rec.reserved_bytes, strict=False)
        try:
            for number, action, address, size, stream, recorded in rows:
                if action == "alloc":
                    if address in handles:
                        raise self._twice(address, number)
                    handles[address] = malloc(size, stream)
                elif action == "free":
                    handle = handles.pop(address, None)
                    if handle is None:
                        raise self._never_allocated(address, number)
                    free(handle)
                elif action in TAKEN or self._goes_on(number):
                    announced += 1
                    continue
                else:
                    allocator.empty_cache()
                if allocator.reserved_bytes != recorded:
                    self._miss(number, announced)
                announced = 0
        except DeviceOutOfMemory as error:
            self.judged = number - 1 - announced
            self.out_of_memory = OutOfMemory(number, str(error).removesuffix(WHAT_TO_DO))
        else:
            self.judged = number
            self._end(announced)

    def _goes_on(self, number: int) -> bool:
        """Whether the flush that event ``number`` is part of goes on with the next."""
        return number < len(self.recording) and self.recording.actions[number] in RETURNED

    def _miss(self, number: int, announced: int) -> None:
        """The event does not agree with the recording, and with it the ``announced`` ones before it."""
        self.inexact += 1 + announced
        if self.first_inexact is None:
            self.first_inexact = number - announced

    def _end(self, announced: int) -> None:
        """Judge what the recording announces at its end: the last segments, which no allocation follows."""
        rec = self.recording
        taken = sum(rec.sizes[len(rec) - announced :])
        if announced and self.allocator.reserved_bytes + taken != rec.reserved_bytes[-1]:
            self._miss(len(rec), announced - 1)

    def result(self) -> ReplayResult:
        """What it has come to."""
        allocator, start = self.allocator, sum(segment.num_bytes for segment in self.recording.segments)
        return ReplayResult(
            events=len(self.recording),
            exact_events=self.judged - self.inexact,
            first_inexact_event=self.first_inexact,
            peak_reserved_bytes=allocator.peak_reserved_bytes,
            final_reserved_bytes=allocator.reserved_bytes,
            recorded_peak_reserved_bytes=max(start, max(self.recording.reserved_bytes)),
            peak_allocated_bytes=allocator.peak_allocated_bytes,
            final_allocated_bytes=allocator.allocated_bytes,
            retries=allocator.num_retries,
            expandable_segments=allocator.settings.expandable_segments,
            out_of_memory=self.out_of_memory,
        )

    def _never_allocated(self, address: int, number: int) -> UsageError:
        place = self.recording.place(number - 1)
        if self.recording.start_is_given:
            why = "neither an event before nor the start state allocates; is that the start state of this recording?"
        else:
            why = "no event before allocates: the recording starts warm, so give its start state with --init INIT.json"
        return UsageError(f"{place}: free of address {address}, which {why}")

    def _twice(self, address: int, number: int) -> UsageError:
        place = self.recording.place(number - 1)
        return UsageError(f"{place}: alloc at address {address}, which is allocated already; a free is missing before")
