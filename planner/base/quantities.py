"""What the term functions of the models are made of: numbers or arrays of candidates alike, and bytes per element.

A term written for :data:`Ints` gives one number for one decision and an array for an array of decisions. Where a term
needs every layer, the layers are the first axis and the candidates the ones after it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.dtypes import AdapterDtype, WeightsDtype

Ints: TypeAlias = int | NDArray[np.int64]
Floats: TypeAlias = float | NDArray[np.floating[Any]]
Reals: TypeAlias = float | NDArray[np.number[Any]]
Flags: TypeAlias = bool | NDArray[np.bool_]

ADAPTER_DTYPE_BYTES: dict[AdapterDtype, int] = {"fp32": 4, "bf16": 2}
"""``e``: bytes per number of the rows and row gradients that travel."""

COMPUTE_DTYPE_BYTES: dict[WeightsDtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 2, "nf4": 2}
"""``q``: bytes per number of the hidden states; quantised weights compute in 16 bits."""

MASTER_BYTES = 4
"""Bytes per number of the fp32 tables on the host: weights, moments, accumulated gradients."""
BF16_BYTES = 2
"""Bytes per number of the host's bf16 copy of the rows."""
INDEX_BYTES = 4
"""Bytes of an int32: probes, expert ids, step counts."""

ALIGNED_ROWS = 64
"""A GPU's products are fastest, and of 16-bit numbers several times so, where no extent or leading dimension is odd:
multiples of 8 numbers, on an A100 of 64 (NVIDIA, Matrix Multiplication Background User's Guide, table 1)."""


def aligned_rows(rows: Ints, *, most: Ints) -> Ints:
    """Rows that products are made of: ``rows`` and as many of zeros as make whole 64s, no more than ``most``."""
    return np.minimum(-(-rows // ALIGNED_ROWS) * ALIGNED_ROWS, most)


def smaller(a: Ints, b: Ints) -> Ints:
    """The lesser of each two; of two numbers a number."""
    found = np.minimum(a, b)
    return int(found) if np.ndim(found) == 0 else found


def chunk_tokens(tokens: int, token_chunks: int) -> int:
    """Tokens of each chunk of a micro-batch but the last, which has what is left over: ``T / C``, rounded up."""
    return -(-tokens // token_chunks)
