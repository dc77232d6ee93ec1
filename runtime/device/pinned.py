"""Pinned host memory that takes as many bytes as it has: pages of its own, registered with CUDA as they are.

torch's pinned allocator rounds every buffer up to a power of two, and keeps it for the next that asks: right for what
comes and goes with each batch. A buffer that stays as long as the session is registered instead. Pages are its own, as
CUDA registers whole pages and none of them twice.
"""

from __future__ import annotations

import math
import mmap
import sys

import torch


class _RegisteredPages(mmap.mmap):
    """Anonymous memory that CUDA knows from :meth:`register` until the last tensor in it is gone."""

    address: int | None = None

    def register(self, address: int, num_bytes: int) -> None:
        """Pin them, in every context of this process."""
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))
        self.address = address

    def __del__(self) -> None:
        if self.address is None or sys.is_finalizing():  # the driver lets go of all with the process
            return
        torch.cuda.synchronize()  # a copy that was issued may still read them
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.address))


def registered_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in pinned memory of exactly its size, whose values are zeros at first."""
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    pages = _RegisteredPages(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(pages, dtype=dtype, count=count).reshape(shape)
    pages.register(tensor.data_ptr(), count * dtype.itemsize)
    return tensor
