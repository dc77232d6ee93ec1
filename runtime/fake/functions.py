"""Functions whose memory on CUDA differs from what the CPU does for the same call; see also the books' operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.nn import functional as F

from meft.runtime.fake.attention import scaled_dot_product_attention
from meft.runtime.fake.autocast import autocast_dtype

aten = torch.ops.aten


@contextmanager
def cuda_functions() -> Iterator[None]:
    """Inside, the functions below stand in ``torch.nn.functional``.

    They are put there rather than into a torch function mode, because such a mode is off within ``backward``, where
    activation checkpointing runs layers again.
    """
    replaced = {
        "scaled_dot_product_attention": scaled_dot_product_attention,
        "dropout": _dropout,
        "softmax": _softmax,
    }
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(F, name, function))
        yield


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
