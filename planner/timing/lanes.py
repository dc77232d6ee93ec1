"""How long a step takes, and each lane works in it: its program (:mod:`meft.planner.timing.program`, or that of token
chunks, :mod:`meft.planner.timing.chunks`) on four lanes, for one decision or many.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.quantities import Flags, Floats
from meft.planner.timing.chrome import Event
from meft.planner.timing.chunks import ChunkedProgram
from meft.planner.timing.program import Lanes, Program, StepCosts, StepTime

CHUNK_CANDIDATES = 8192
"""Candidates simulated together: 64 KiB per array, so that a core's cache holds the lanes."""


def simulate(
    costs: StepCosts,
    *,
    num_layers: int,
    prefetch_depth: int,
    checkpointing: Flags,
    refetched: Flags,
    serial: bool = False,
    overlapped: bool = True,
    host_launches: bool = True,
    events: list[Event] | None = None,
) -> StepTime:
    """Simulate one step of candidates that look ahead equally far; flags are one for all, or one per candidate.

    ``overlapped=False`` is the sequential schedule, whose one thread launches the gpu's tasks and does the host's work,
    each when its turn comes; ``host_launches=False`` asks what a worker alone would bring it, and ``serial`` makes
    every task wait for the one before. ``events`` collects the tasks of a single decision.
    """
    launch = None if serial else costs.launch
    lanes = Lanes(serial=serial, host_launches=host_launches and not overlapped, launch=launch, events=events)
    kind = Program if costs.token_chunks == 1 else ChunkedProgram
    program = kind(
        costs,
        lanes,
        num_layers=num_layers,
        prefetch_depth=prefetch_depth,
        checkpointing=checkpointing,
        refetched=refetched,
        overlapped=overlapped,
    )
    program.step()
    return StepTime(step_seconds=lanes.end_seconds(), busy_seconds=lanes.busy)


def simulate_candidates(
    costs: StepCosts,
    *,
    num_layers: int,
    prefetch_depth: NDArray[np.int64],
    checkpointing: NDArray[np.bool_],
    refetched: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Step seconds of every candidate: :func:`simulate` on those that look ahead equally far."""
    seconds = np.empty(len(prefetch_depth))
    for depth in sorted(set(prefetch_depth.tolist())):  # numpy.unique is slow to load
        members = np.flatnonzero(prefetch_depth == depth)
        for first in range(0, len(members), CHUNK_CANDIDATES):
            chunk = members[first : first + CHUNK_CANDIDATES]
            seconds[chunk] = simulate(
                costs.take(chunk),
                num_layers=num_layers,
                prefetch_depth=depth,
                checkpointing=_one_if_alike(checkpointing[chunk]),
                refetched=_one_if_alike(refetched[chunk]),
            ).step_seconds
    return seconds


def _one_if_alike(flags: NDArray[np.bool_]) -> Flags:
    return bool(flags[0]) if flags.all() or not flags.any() else flags


def baseline_seconds(costs: StepCosts, *, num_layers: int) -> Floats:
    """The same adapter all on the GPU with unlimited memory: the gpu lane's work, without recompute, and no more; or
    launching it, where that takes longer."""
    gpu = costs.gpu
    adapter = costs.token_chunks * _sum_layers(gpu.adapter_forward + gpu.adapter_backward, num_layers)
    frozen = num_layers * (gpu.attention + gpu.router + gpu.ffn) + (num_layers - 1) * gpu.frozen_backward
    computed = gpu.embedding + frozen + adapter + gpu.loss_head + gpu.router_adamw
    return computed if costs.launch is None else np.maximum(computed, costs.launch.of_layers(num_layers))


def _sum_layers(seconds: NDArray[np.float64], num_layers: int) -> Floats:
    total: Floats = seconds.sum(axis=0) if len(seconds) == num_layers else num_layers * seconds[0]
    return total
