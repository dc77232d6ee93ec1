"""Memory that all ranks of a machine map: without a name, so that the kernel frees it with the last process.

A ``memfd`` has no name in any file system and is not bound by the size of ``/dev/shm`` (64 MB in many containers); the
other ranks open it through ``/proc`` of the process that made it. Tables lie one after the other, in the order in which
they are asked for, which is the same in every rank.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os

import torch

from meft.planner.base.errors import MachineError
from meft.planner.base.units import format_bytes
from meft.runtime.host.huge_pages import HUGE_PAGE_BYTES

NAME = "meft-ranks-{process}"
"""What ``/proc`` shows of it; ``process`` made it."""


class SharedMemory:
    """One file in memory. ``zeros`` must be called in the same order in every rank."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.num_bytes = 0
        """Mapped so far, as long as tables are; rounding to pages is not counted."""
        self._end = 0

    @classmethod
    def create(cls) -> SharedMemory:
        """Make it, in the rank that the others open it from.

        Raises:
            MachineError: the system has no such memory.
        """
        if not hasattr(os, "memfd_create"):
            raise MachineError("ranks share tables through memfd, which this system has not; run one (--gpus 1)")
        return cls(os.memfd_create(NAME.format(process=os.getpid())))

    @classmethod
    def open(cls, process: int, descriptor: int) -> SharedMemory:
        """Map what another process has made, by its id and its number for the file there."""
        path = f"/proc/{process}/fd/{descriptor}"
        try:
            return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise MachineError(
                f"the ranks' shared memory: {path} cannot be opened ({error.strerror}); ranks must be processes of one "
                f"user on one machine"
            ) from None

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next table, of zeros until some rank writes: resident at once, on huge pages where the kernel gives them.

        Raises:
            MachineError: the machine has no room for it.
        """
        size = math.prod(shape) * dtype.itemsize
        large = size >= 2 * HUGE_PAGE_BYTES
        start = _rounded(self._end, HUGE_PAGE_BYTES if large else mmap.ALLOCATIONGRANULARITY)
        self._end = start + max(size, 1)
        self.num_bytes += size
        try:
            os.posix_fallocate(self.descriptor, start, max(size, 1))  # makes the file longer, never shorter
            mapping = mmap.mmap(self.descriptor, max(size, 1), mmap.MAP_SHARED, offset=start)
        except OSError as error:
            raise MachineError(
                f"host memory: no room for {format_bytes(size)} more of the ranks' shared tables ({error.strerror}); "
                f"close other programs or plan again with a smaller --host-mem"
            ) from None
        if large and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel that gives shared memory none
                mapping.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape)).reshape(shape)

    def close(self) -> None:
        """Tables that are mapped stay; nobody else can open it any more."""
        os.close(self.descriptor)


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
