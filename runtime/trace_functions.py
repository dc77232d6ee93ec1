"""Functions whose memory on CUDA differs from what the CPU does for the same call; see also the books' operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from meft.runtime.trace_attention import scaled_dot_product_attention
from meft.runtime.trace_autocast import autocast_dtype

aten = torch.ops.aten


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """On CUDA one kernel makes the output and a mask of one byte an element."""
    if not training or not 0 < p < 1 or inplace:
        return aten.dropout(input, p, training)  # type: ignore[no-any-return]
    output: torch.Tensor = aten.native_dropout(input, p, True)[0]
    return output


def _softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """On CUDA fp16 goes into an fp32 softmax as it is, without a copy."""
    if dtype is None and autocast_dtype() is not None:
        dtype = torch.float32
    if input.dtype == torch.float16 and dtype == torch.float32:
        return aten._softmax(input, dim, True)  # type: ignore[no-any-return]
    return aten.softmax(input, dim, dtype)  # type: ignore[no-any-return]


_REPLACED: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.dropout: _dropout,
    F.softmax: _softmax,
}


class CudaFunctions(TorchFunctionMode):
    """While active, replaces the functions above."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, or what stands for it."""
        del types
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))
