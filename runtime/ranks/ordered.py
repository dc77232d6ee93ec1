"""Numbers that processes tell each other through shared memory, in an order that every processor keeps.

Whoever sees a count also sees all that was written before it was set: a fence stands between. x86 keeps that order by
itself, other processors (aarch64) do not.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import types
from numba.extending import intrinsic as _numba_intrinsic

from meft.runtime.host.compiled import compiled

intrinsic: Any = _numba_intrinsic  # called without its first parameter, which no type checker can know


def _fence_code(context: Any) -> Any:
    """Nothing before it is moved behind it, and nothing behind it before it."""
    del context

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature, arguments
        builder.fence("seq_cst")
        return target.get_dummy_value()

    return types.void(), code


_fence: Any = intrinsic(_fence_code)
"""A call of it in a kernel is the fence."""


@compiled()
def _store(numbers: Any, place: int, value: int) -> None:
    _fence()
    numbers[place] = value


@compiled()
def _load(numbers: Any, place: int) -> int:
    value: int = numbers[place]
    _fence()
    return value


class Counts:
    """int64 counts ``[N, n]`` in shared memory: row ``r`` is written by rank ``r`` alone, and only ever grows."""

    def __init__(self, table: torch.Tensor, *, rank: int) -> None:
        self._numbers = table.view(-1).numpy()
        self._ranks, self._each = table.shape
        self._own = rank * self._each

    def publish(self, value: int, place: int = 0) -> None:
        """This rank has come to ``value``; what it wrote before is there for whoever sees that."""
        _store(self._numbers, self._own + place, value)

    def of(self, rank: int, place: int = 0) -> int:
        """How far a rank has come."""
        return int(_load(self._numbers, rank * self._each + place))

    def reached(self, value: int, place: int = 0) -> bool:
        """Whether every rank has come to ``value``."""
        return all(self.of(rank, place) >= value for rank in range(self._ranks))


def warm_up() -> None:
    """Compile both, or load them from the cache."""
    counts = Counts(torch.zeros(1, 1, dtype=torch.int64), rank=0)
    counts.publish(1)
    counts.of(0)
