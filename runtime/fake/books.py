"""Books that log what a CUDA device would allocate, where the CPU on which the model is traced does otherwise.

Three things differ below the level of operators:

- Gradients that meet. Autograd adds the second gradient of a tensor to the first in place, if nothing else holds the
  first. While a dispatch mode is active it never does (it cannot know the mode), so the books do it: they recognise
  the engine's own additions and count references as the engine would.
- Workspaces. cuBLAS takes one per thread that multiplies: the program's, and autograd's own thread.
- Temporaries inside one operator; see :mod:`meft.runtime.fake.kernels`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meft.runtime.device.books import DeviceBooks
from meft.runtime.device.event_log import EventLog
from meft.runtime.fake.kernels import GEMMS, Temporaries, fixed_output, passing_bytes

aten = torch.ops.aten
_ENGINE = "_engine_run_backward"
_WEIGHTS = ("linear_weights", "other_weights", "trainable_weights")
_MADE_AS: list[str] = []


@contextmanager
def made_as(category: str) -> Iterator[None]:
    """For stand-ins that do not know the books: what is allocated inside is entered under ``category``."""
    _MADE_AS.append(category)
    try:
        yield
    finally:
        _MADE_AS.pop()


class CudaBooks(DeviceBooks):
    """Device books with CUDA's choices. ``categorise`` names what an operator allocates now.

    ``scalars_on_host``: while set, a tensor without dimensions is one that the program keeps on the host.
    """

    def __init__(self, *, workspace_bytes: int, categorise: Callable[[], str]) -> None:
        super().__init__()
        self.log: EventLog = EventLog()
        self.scalars_on_host = False
        self._workspace_bytes = workspace_bytes
        self._categorise = categorise
        self._threads_with_workspace: set[bool] = set()
        self._unshared = _references_of_unshared()

    def execute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run ``func`` as CUDA would, as far as memory goes."""
        if func is aten.add.Tensor and self._is_accumulation(args) and self._is_unshared(args[0]):
            return args[0]  # written into the first gradient: nothing is allocated
        output = fixed_output(func, self.run(func, args, kwargs))
        if func is aten._to_copy.default and self.log.phase != "resident" and self._is_weight(args[0]):
            with self.category("autocast_weights"):
                self._enter(output, func)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and not (self.scalars_on_host and leaf.dim() == 0):
                self._enter(leaf, func)
        if func in GEMMS:
            self._take_workspace()
        self._pass_by(passing_bytes(func, args, output))
        return output

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operator itself."""
        return func(*args, **kwargs)

    def category_of(self, tensor: torch.Tensor, func: Any) -> str:
        """The category set by :meth:`category`, or by :func:`made_as`, or what the trace says."""
        if self._category is not None:
            return super().category_of(tensor, func)
        return _MADE_AS[-1] if _MADE_AS else self._categorise()

    def _pass_by(self, temporaries: Temporaries) -> None:
        """Temporaries inside one operator: all are there before the first goes."""
        handles = [self.allocator.malloc(num_bytes) for _, num_bytes in temporaries]
        numbers = [self.log.allocated(num_bytes, self._categorise(), label) for label, num_bytes in temporaries]
        for handle, number in zip(reversed(handles), reversed(numbers), strict=True):
            self.allocator.free(handle)
            self.log.released(number)

    def entered_as(self, tensor: torch.Tensor) -> str:
        """The category of a tensor in the books."""
        return self._live[tensor.untyped_storage()._cdata].category

    def _take_workspace(self) -> None:
        thread = in_backward()
        if self._workspace_bytes and thread not in self._threads_with_workspace:
            self._threads_with_workspace.add(thread)
            self.log.allocated(self._workspace_bytes, "cublas_workspaces", "workspace")
            self.allocator.malloc(self._workspace_bytes)

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return entry is not None and entry.category in _WEIGHTS

    def _is_accumulation(self, args: Any) -> bool:
        """Whether the engine itself adds: not Python code. (No derivative formula in C++ adds.)"""
        return in_backward() and not torch.is_grad_enabled() and len(args) == 2 and _engine_calls()

    def _is_unshared(self, gradient: torch.Tensor) -> bool:
        """Autograd's condition for adding in place: nothing else holds the tensor or its storage, and it is dense."""
        return _references(gradient) == self._unshared and _is_dense(gradient)


def in_backward() -> bool:
    """Whether autograd runs, recomputed layers included: on CUDA in a thread of its own."""
    return torch._C._current_graph_task_id() != -1


# --- gradients that meet -----------------------------------------------------------------------------------------


def _engine_calls() -> bool:
    """Whether the innermost frame that is not the dispatch machinery's own is the call of autograd's engine."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_machinery(frame):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == _ENGINE


_MACHINERY = (
    "meft.runtime.device.books",
    "meft.runtime.fake.books",
    "meft.runtime.fake.script_books",
    "contextlib",
    "torch._compile",
    "torch._dynamo",
    "torch.utils._python",
)


def _is_machinery(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(_MACHINERY)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether every element has its own place and there is no gap between them."""
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _references(tensor: torch.Tensor) -> tuple[int, int]:
    """References to a tensor and to its storage, those of the mode that asks included."""
    of_tensor: int = tensor._use_count()  # type: ignore[attr-defined]
    return of_tensor, torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@cache
def _references_of_unshared() -> tuple[int, int]:
    """What :func:`_references` says of a gradient that only the engine holds: two products that meet at a leaf."""
    seen: list[tuple[int, int]] = []

    class Probe(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten.add.Tensor and not torch.is_grad_enabled():
                seen.append(_references(args[0]))
            output = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(output):
                if isinstance(leaf, torch.Tensor):
                    leaf.untyped_storage()  # as the books look at it
            return output

    leaf = torch.ones(2, requires_grad=True)
    with Probe():
        inner = leaf * 1.0
        ((inner * 2.0) * (inner * 3.0)).sum().backward()
    return seen[0]
