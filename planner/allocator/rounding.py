"""What PyTorch's allocators round sizes to, for who needs no more of them."""

from __future__ import annotations

MIN_BLOCK_BYTES = 512
"""Blocks of device memory are multiples of it."""


def pinned_bytes(num_bytes: int) -> int:
    """Pinned host memory behind a request, in bytes: the next power of two (the host cache never splits a block).

    >>> pinned_bytes(129 * 2**20 + 2**19) == 256 * 2**20
    True
    """
    return 1 << (num_bytes - 1).bit_length() if num_bytes > 0 else 0
