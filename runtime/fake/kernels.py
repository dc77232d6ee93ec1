"""What CUDA's operators allocate besides their results, and results that differ from the CPU's.

What is left out is small: buffers of large reductions, and of sorts within an indexed sum.

Letters: ``T`` tokens, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten

GEMMS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
"""What needs a cuBLAS handle and, the first time in a thread, its workspace."""

Temporaries = Sequence[tuple[str, int]]

_FEW_INDICES = 3072
"""Up to so many tokens the embedding's gradient is made without sorting them (Embedding.cu)."""
_ROWS_PER_SEGMENT = 10
_INDEX_BYTES = 8


def passing_bytes(func: Any, args: Any, output: Any) -> Temporaries:
    """Temporaries of one operator, name and bytes, in the order in which they come; they go with its end."""
    rule = _PASSING.get(func)
    return () if rule is None else rule(*args, output=output)


def fixed_output(func: Any, output: Any) -> Any:
    """The output with the dtypes that CUDA gives it."""
    rule = _FIXED.get(func)
    return output if rule is None else rule(output)


def _statistics_in_fp32(output: Any) -> Any:
    """LayerNorm's mean and reciprocal deviation: the CPU keeps them in the weight's dtype."""
    normalised, *statistics = output
    return (normalised, *(each if each.dtype == torch.float32 else each.float() for each in statistics))


def _embedding_gradient(
    grad: torch.Tensor, indices: torch.Tensor, rows: int, *_: Any, output: torch.Tensor
) -> Temporaries:
    """EmbeddingBackwardKernel.cu: tokens are sorted, and rows summed in fp32 by segments of ten equal tokens.

    ``grad [T, D]``, ``indices [T]``, ``output [V, D]``.
    """
    del grad
    tokens = indices.numel()
    if tokens <= _FEW_INDICES:
        return ()
    segments = min(tokens, rows)
    partial = tokens // _ROWS_PER_SEGMENT + segments
    by_index = (tokens, tokens, tokens, segments, segments, partial)  # sorted, their order, and where segments begin
    return [*(("segments", count * _INDEX_BYTES) for count in by_index), ("sums", partial * output.shape[-1] * 4)]


_FIXED: dict[Any, Callable[[Any], Any]] = {aten.native_layer_norm.default: _statistics_in_fp32}
_PASSING: dict[Any, Callable[..., Temporaries]] = {
    aten.embedding_dense_backward.default: _embedding_gradient,
}
