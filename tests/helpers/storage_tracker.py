"""Follow every storage that torch operators allocate: a dispatch mode for tests that measure a real model.

Bytes are those of the storages as requested, without rounding to allocator blocks. Temporaries inside one kernel are
not seen, because they never become tensors.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Event:
    """An allocation (``num_bytes`` above zero) or a release (below) of storage ``number``, made by ``label``."""

    number: int
    num_bytes: int
    label: str


class StorageTracker(TorchDispatchMode):
    """Books of live storages while active, those of ``resident`` tensors included from the start."""

    def __init__(self, *, resident: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._live: dict[int, int] = {}
        for tensor in resident:
            self._enter(tensor, "resident")

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._enter(leaf, f"{func} {tuple(leaf.shape)} {leaf.dtype}")
        return result

    def peak_bytes(self, *, since: int = 0) -> int:
        """Most bytes live at once from event ``since`` on (``len(tracker.events)`` marks a moment)."""
        return self._peak(since)[0]

    def peak_holders(self, *, since: int = 0) -> Counter[str]:
        """Bytes by label at that peak: where to look when a closed form and a measurement differ."""
        held = {event.number: event for event in self.events[: self._peak(since)[1] + 1] if event.num_bytes > 0}
        for event in self.events[: self._peak(since)[1] + 1]:
            if event.num_bytes < 0:
                held.pop(event.number, None)
        total: Counter[str] = Counter()
        for event in held.values():
            total[event.label] += event.num_bytes
        return total

    def _peak(self, since: int) -> tuple[int, int]:
        live, peak, at = 0, 0, 0
        for index, event in enumerate(self.events):
            live += event.num_bytes
            if index >= since and live > peak:
                peak, at = live, index
        return peak, at

    def _enter(self, tensor: torch.Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._live or num_bytes == 0:
            return
        number = len(self.events)
        self._live[key] = number
        self.events.append(Event(number, num_bytes, label))
        weakref.finalize(storage, self._leave, key, number, num_bytes, label).atexit = False

    def _leave(self, key: int, number: int, num_bytes: int, label: str) -> None:
        if self._live.get(key) == number:
            del self._live[key]
        self.events.append(Event(number, -num_bytes, label))
