"""Which decisions of the grid fit device and host memory, without an array of all their bytes.

Every term of the ledgers varies along a few of the grid's axes; those that vary along the same ones are summed first,
and what is left of a limit is compared with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.quantities import ADAPTER_DTYPE_BYTES, Ints
from meft.planner.memory.device import device_ledger
from meft.planner.memory.host import host_bytes_by_category
from meft.planner.predict.prediction import ProfileSet
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Request
from meft.planner.search.space import CAP_AXIS, CHECKPOINTING_AXIS, NUM_AXES, Space
from meft.planner.terms.activations import largest
from meft.planner.terms.ledger import STEP_PHASES, Row, phase_bytes
from meft.planner.terms.methods import SparseAdapter, Workload


class GridSum:
    """A sum of terms over the grid, in parts by the axes along which they vary."""

    def __init__(self, terms: Iterable[Ints]) -> None:
        self._parts: dict[tuple[int, ...], NDArray[np.int64]] = {}
        for term in terms:
            array = np.asarray(term, dtype=np.int64)
            array = array.reshape((1,) * (NUM_AXES - array.ndim) + array.shape)
            known = self._parts.get(array.shape)
            self._parts[array.shape] = array if known is None else known + array

    @property
    def least(self) -> int:
        """No place has less."""
        return sum(int(part.min()) for part in self._parts.values())

    def at(self, index: tuple[int, ...]) -> int:
        """The sum at a place of the grid."""
        return sum(int(part[_along(part, index)]) for part in self._parts.values())

    def of(self, axes: tuple[NDArray[np.int64], ...]) -> NDArray[np.int64]:
        """The sums at some places, given by the axes; ``[n]``."""
        total = np.zeros(len(axes[0]), np.int64)
        for part in self._parts.values():
            total += part[tuple(axis if length > 1 else 0 for axis, length in zip(axes, part.shape, strict=True))]
        return total

    def at_cap(self, cap: int, routings: NDArray[np.int64]) -> GridSum:
        """The sum at a cap with some routings: a grid whose axis of caps is 1 long."""
        of_cap = (part.take([min(cap, part.shape[CAP_AXIS] - 1)], axis=CAP_AXIS) for part in self._parts.values())
        return GridSum(part.take(routings, axis=-1) if part.shape[-1] > 1 else part for part in of_cap)

    def on(self, cache: int, depth: int) -> NDArray[np.int64]:
        """The sums at a cache and a prefetch depth where there is one cap, ``[checkpointing, backward, routings]``, 1
        where alike."""
        return _at(list(self._parts.values()), cache, depth)[:, :, 0]

    def rest_of(self, most: Ints, depth: int) -> Callable[[int], NDArray[np.bool_]]:
        """Where the sum is no more than ``most`` (a number, or one of each routing) at a prefetch depth: a function of
        the cache, whose result is ``[checkpointing, backward, caps, routings]``, or 1 where alike."""
        again = [part for part in self._parts.values() if part.shape[CHECKPOINTING_AXIS] > 1]
        others = [part for part in self._parts.values() if part.shape[CHECKPOINTING_AXIS] == 1]
        room, of_caches = most - _at([part for part in again if part.shape[0] == 1], 0, depth), again + others
        of_caches = [part for part in of_caches if part.shape[0] > 1]
        taken = _at([part for part in others if part.shape[0] == 1], 0, depth)

        def fits(cache: int) -> NDArray[np.bool_]:
            within: NDArray[np.bool_] = taken + _at(of_caches, cache, depth) <= room
            return within

        return fits


def _at(parts: list[NDArray[np.int64]], cache: int, depth: int) -> NDArray[np.int64]:
    """The sum of parts at a cache and a prefetch depth."""
    return _total([part[_along(part, (cache, depth))] for part in parts])


def _total(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The sum of arrays, the smallest first; 0 of none."""
    return reduce(np.add, sorted(parts, key=lambda each: each.size), np.zeros((1,) * 4, np.int64))


def _along(part: NDArray[np.int64], index: tuple[int, ...]) -> tuple[int, ...]:
    """The index into a part that is 1 long where it does not vary."""
    return tuple(min(place, length - 1) for place, length in zip(index, part.shape, strict=False))


def device_sum(space: Space, request: Request, profiles: ProfileSet) -> GridSum:
    """Peak allocated device bytes with every layer's rows at the cap."""
    first, *others = space.activation_checkpointing
    whole = _ledger(space.candidates, space, request, profiles, checkpointing=first)
    # what only some phases have depends on neither cache, look-ahead nor rows in backward
    alike = replace(space.candidates_at(0), prefetch_depth=space.prefetch_depths[0])
    ledgers = [whole, *(_ledger(alike, space, request, profiles, checkpointing=again) for again in others)]
    peaks = []
    for ledger in ledgers:
        totals = phase_bytes(row for row in ledger if row.phase != "resident")
        peaks.append(np.broadcast_to(largest(*(totals[phase] for phase in STEP_PHASES)), space.caps.shape))
    by_checkpointing = np.expand_dims(np.stack(peaks), 1)
    return GridSum([by_checkpointing, *(row.num_bytes for row in whole if row.phase == "resident")])


def _ledger(
    candidates: Candidates, space: Space, request: Request, profiles: ProfileSet, *, checkpointing: bool
) -> tuple[Row, ...]:
    """Of candidates of the grid, with checkpointing or without, of which only a step's phases know."""
    num_layers = request.model.num_layers
    workload = Workload(
        batch_size=request.batch_size,
        seq_len=request.seq_len,
        weights_dtype=request.weights_dtype,
        double_quant=request.double_quant,
        attention=request.attention,
        packed=request.packed,
        activation_checkpointing=checkpointing,
        shards=request.base_shards,
    )
    at_cap = np.broadcast_to(space.caps, (num_layers, *space.caps.shape))
    method = SparseAdapter(at_cap, candidates, ADAPTER_DTYPE_BYTES[request.adapter_dtype])
    return device_ledger(shape=request.model, workload=workload, method=method, gpu=profiles.gpu)


def host_sum(space: Space, request: Request) -> tuple[GridSum, NDArray[np.int64]]:
    """Tables and buffers in host memory without a bf16 copy of the rows; and what a copy takes besides, of each
    routing."""
    candidates = replace(space.candidates, bf16_copy=True)
    sizes = host_bytes_by_category(request=request, candidates=candidates)
    of_copy = np.broadcast_to(sizes.pop("adapter_bf16_copy"), space.top_k.shape)
    return GridSum(sizes.values()), of_copy
