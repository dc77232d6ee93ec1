"""What CUDA's operators allocate besides their results, and results that differ from the CPU's.

Letters: ``B`` batch, ``S`` sequence length, ``H`` heads, ``G`` key-value heads, ``d`` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten

GEMMS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
"""What needs a cuBLAS handle and, the first time in a thread, its workspace."""

Temporaries = Sequence[tuple[str, int]]

FIX_OUTPUTS: dict[Any, Callable[..., Any]] = {}
_PASSING: dict[Any, Callable[..., Temporaries]] = {}


def passing_bytes(func: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Temporaries:
    """Temporaries of one operator, name and bytes, in the order in which they come; they go with its end."""
    rule = _PASSING.get(func)
    return () if rule is None else rule(*args, output=output, **kwargs)
