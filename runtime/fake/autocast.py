"""CUDA's autocast on CPU tensors: the CPU's own, with the operators that only CUDA's lists run in fp32.

The two devices agree on what runs in 16 bits (matrix products, attention) and on the cache: the 16-bit copy of an fp32
leaf that requires a gradient lives until the outermost autocast context ends. They differ in what runs in fp32; CUDA's
lists are in torch's header ATen/autocast_mode.h, and the part of them that decoders use is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_map

_FP32 = (
    "exp",
    "expm1",
    "log",
    "reciprocal",
    "rsqrt",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "nll_loss",
    "logsumexp",
)
_FP32_UNLESS_A_DTYPE_IS_GIVEN = ("softmax.int", "log_softmax.int", "cumsum", "prod", "sum", "sum.dim_IntList")

_KEY = "AutocastCPU"


@contextmanager
def cuda_lists() -> Iterator[None]:
    """Inside, autocast on CPU tensors follows CUDA's lists. For the whole process, so nothing else may run beside."""
    library = torch.library.Library("aten", "IMPL")
    for names, kernel_of in ((_FP32, _in_fp32), (_FP32_UNLESS_A_DTYPE_IS_GIVEN, _with_fp32_dtype)):
        for name in names:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", _KEY):
                library.impl(name, kernel_of(_overload(name)), _KEY)
    enabled = torch.is_autocast_enabled
    try:
        # without a device the question is about CUDA; the tensors that stand for CUDA's lie on the CPU
        with mock.patch.object(torch, "is_autocast_enabled", lambda device_type="cpu": enabled(device_type)):
            yield
    finally:
        library._destroy()


def autocast_dtype() -> torch.dtype | None:
    """The dtype of the autocast that is active here, or None."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def without_autocast() -> Any:
    """A guard: operators inside run as they are, as inside of an operator that autocast has handled."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def cast_to(value: Any, dtype: torch.dtype) -> Any:
    """A floating tensor in ``dtype`` (float64 stays); anything else as it is."""
    eligible = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if eligible else value


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _in_fp32(operator: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        cast_args, cast_kwargs = tree_map(lambda value: cast_to(value, torch.float32), (args, kwargs))
        with without_autocast():
            return operator(*cast_args, **cast_kwargs)

    return kernel


def _with_fp32_dtype(operator: Any) -> Callable[..., Any]:
    def kernel(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        arguments = list(args)
        given = [value for value in arguments if isinstance(value, torch.dtype)]
        if dtype is None and not given and args[0].is_floating_point() and args[0].dtype != torch.float64:
            dtype = torch.float32
        with without_autocast():
            return operator(*arguments, **kwargs) if given else operator(*arguments, dtype=dtype, **kwargs)

    return kernel
