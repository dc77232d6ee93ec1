"""Host tables on huge pages: one entry of the processor's address cache covers 2 MiB of a table instead of 4 KiB.

Rows are read here and there in tables of gigabytes, and each 4 KiB page would need its own entry. Linux gives huge
pages to private memory that asks for them (``transparent_hugepage/enabled``: ``madvise`` or ``always``); where it does
not, a table lies on ordinary pages and nothing else changes.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch._subclasses.fake_tensor import FakeTensor

HUGE_PAGE_BYTES = 2 << 20


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A table of zeros, resident at once: memory that the machine lacks is missed at the start, not in a step.

    A fake table under a mode of fake tensors, as in a rehearsal: it has no memory.
    """
    size, fake = math.prod(shape) * dtype.itemsize, isinstance(torch.empty(0), FakeTensor)
    if fake or size < 2 * HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has rules of its own
    with contextlib.suppress(OSError):  # a kernel built without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=dtype).reshape(shape).zero_()
