"""What PyTorch's allocators round sizes to, for who needs no more of them."""

from __future__ import annotations

MIN_BLOCK_BYTES = 512
"""Blocks of device memory are multiples of it."""
