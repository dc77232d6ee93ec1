"""Recorded streams for tests: those of real GPUs beside the repository, and made ones in the same forms."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import SHARED

from meft.planner.allocator.blocks import RANGE_BYTES, SEGMENTS_END, UNMAPPED, Block, Pool, VirtualRange
from meft.planner.allocator.caching import CachingAllocator
from meft.planner.allocator.recording import Recording
from meft.planner.allocator.recording_files import load_recording
from meft.planner.allocator.settings import AllocatorSettings
from meft.planner.base.errors import DeviceOutOfMemory

MIB = 2**20
TRACES = SHARED / "traces"
TRACE_NAMES = (
    "attn_peak_cold",
    "bert_eval",
    "cs336_compile_train_small",
    "cs336_medium_infer_ctx1024",
    "cs336_medium_train_ctx512",
    "cs336_train_magma",
    "decomfl_cold_start",
    "fno_counterfactual",
)
HEADER = "time,action,addr,bytes,stream,total_allocated_after,total_reserved_after,device"


def trace_files(name: str) -> tuple[Path, Path]:
    """A real recording and its start state."""
    if not TRACES.is_dir():
        pytest.skip("needs the recorded allocator traces in ../shared/traces")
    return TRACES / f"{name}.csv.gz", TRACES / f"{name}.init.json.gz"


def load_trace(name: str) -> Recording:
    return load_recording(*trace_files(name))


def table(*events: tuple[str, int, int, int]) -> str:
    """A recording's text from (action, address, bytes, reserved after), on stream 0 of device 0."""
    lines = [f"{i},{action},{address},{size},0,0,{after},0" for i, (action, address, size, after) in enumerate(events)]
    return "\n".join([HEADER, *lines, ""])


FLUSHED = table(
    # 30 MiB allocated and freed, then 20; both segments go back in one flush, recorded segment by segment.
    ("segment_alloc", 700 * MIB, 30 * MIB, 30 * MIB),
    ("alloc", 700 * MIB, 30 * MIB, 30 * MIB),
    ("segment_alloc", 100 * MIB, 20 * MIB, 50 * MIB),
    ("alloc", 100 * MIB, 20 * MIB, 50 * MIB),
    ("free", 700 * MIB, 30 * MIB, 50 * MIB),
    ("free", 100 * MIB, 20 * MIB, 50 * MIB),
    ("segment_free", 700 * MIB, 30 * MIB, 20 * MIB),
    ("segment_free", 100 * MIB, 20 * MIB, 0),
    ("segment_alloc", 100 * MIB, 20 * MIB, 20 * MIB),
    ("alloc", 100 * MIB, 2 * MIB, 20 * MIB),
)
WARM_START = json.dumps(
    [
        {
            "addr": 1000 * MIB,
            "size": 20 * MIB,
            "stream": 0,
            "pool": "large",
            "live": [{"addr": 1002 * MIB, "size": 4 * MIB, "requested": 4 * MIB - 5}],
        }
    ]
)
WARM = table(("alloc", 1006 * MIB, 14 * MIB, 20 * MIB), ("free", 1002 * MIB, 4 * MIB - 5, 20 * MIB))


ADDRESS_OFFSET = SEGMENTS_END - 2**46
"""The model's addresses less this are such as a GPU has."""


class RecordedRange(VirtualRange):
    """A virtual range that says what it maps and unmaps."""

    note: Callable[[str, int, int], None]

    def _map(self, hole: Block, num_bytes: int, take: Callable[[int], bool]) -> Block | None:
        address, size = hole.address, -(-num_bytes // self.unit_bytes) * self.unit_bytes
        block = super()._map(hole, num_bytes, take)
        if block is not None:
            self.note("segment_map", address, size)
        return block

    def _unmap(self, block: Block) -> None:
        self.note("segment_unmap", block.address, block.size)
        super()._unmap(block)


class RecordingAllocator(CachingAllocator):
    """An allocator that records its history and its segments in the form of ``torch.cuda.memory._snapshot()``."""

    def __init__(self, capacity_bytes: int | None = None, settings: AllocatorSettings | None = None) -> None:
        self.history: list[dict[str, Any]] = []
        super().__init__(capacity_bytes, settings)

    def note(self, action: str, address: int, size: int, stream: int) -> None:
        entry = {
            "action": action,
            "addr": address - ADDRESS_OFFSET,
            "size": size,
            "stream": stream,
            "frames": [],
            "time_us": 1,
        }
        self.history.append(entry)

    def malloc(self, num_bytes: int, stream: int = 0) -> int:
        handle = super().malloc(num_bytes, stream)
        self.note("alloc", handle, num_bytes, stream)
        return handle

    def free(self, handle: int) -> None:
        block = self._blocks[handle]
        for action in ("free_requested", "free_completed"):
            self.note(action, handle, block.requested or 0, self.stream_of(block.pool))
        super().free(handle)

    def _add_segment(self, pool: Pool, address: int, num_bytes: int) -> Block:
        self.note("segment_alloc", address, num_bytes, self.stream_of(pool))
        return super()._add_segment(pool, address, num_bytes)

    def _give_back(self, block: Block) -> None:
        self.note("segment_free", block.address, block.size, self.stream_of(block.pool))
        super()._give_back(block)

    def _range(self, pool: Pool) -> VirtualRange:
        if pool.virtual_range is None:
            pool.virtual_range = RecordedRange(pool, SEGMENTS_END + self._num_ranges * RANGE_BYTES)
            stream = self.stream_of(pool)
            pool.virtual_range.note = lambda action, address, size: self.note(action, address, size, stream)
            self._num_ranges += 1
        return pool.virtual_range

    def stream_of(self, pool: Pool) -> int:
        return next(stream for stream, each in self._pools[pool.name].items() if each is pool)

    def snapshot(self, since: int = 0) -> dict[str, Any]:
        """The snapshot, its history from entry ``since`` on."""
        return {"segments": self.segments(), "device_traces": [self.history[since:]]}

    def segments(self) -> list[dict[str, Any]]:
        """Each segment, and each mapped stretch of a range."""
        mapped = [block for block in self._blocks.values() if block.requested != UNMAPPED]
        heads = [block for block in mapped if block.preceding is None or block.preceding.requested == UNMAPPED]
        return [self._segment(head) for head in sorted(heads, key=lambda head: head.address)]

    def _segment(self, head: Block) -> dict[str, Any]:
        chain: list[Block] = []
        block: Block | None = head
        while block is not None and block.requested != UNMAPPED:
            chain.append(block)
            block = block.following
        return {
            "device": 0,
            "address": head.address - ADDRESS_OFFSET,
            "total_size": sum(block.size for block in chain),
            "stream": self.stream_of(head.pool),
            "segment_type": head.pool.name,
            "segment_pool_id": (0, 0),
            "is_expandable": head.address >= SEGMENTS_END,
            "blocks": [
                {
                    "address": block.address - ADDRESS_OFFSET,
                    "size": block.size,
                    "requested_size": block.requested or 0,
                    "state": "inactive" if block.requested is None else "active_allocated",
                    "frames": [],
                }
                for block in chain
            ],
        }


def run_program(allocator: CachingAllocator, chance: random.Random, *, steps: int, live: list[int]) -> None:
    """Random allocations, frees and flushes on two streams; what runs out of memory is left out."""
    for _ in range(steps):
        action = chance.choices(("malloc", "free", "empty_cache"), (55, 42, 3))[0]
        if action == "malloc":
            size = chance.choice([chance.randint(1, most) for most in (4096, 2 * MIB, 12 * MIB, 60 * MIB)])
            with contextlib.suppress(DeviceOutOfMemory):
                live.append(allocator.malloc(size, chance.choice((0, 0, 7))))
        elif action == "free" and live:
            allocator.free(live.pop(chance.randrange(len(live))))
        elif action == "empty_cache":
            allocator.empty_cache()
