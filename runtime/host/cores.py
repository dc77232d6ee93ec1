"""Which cores do what: the host's kernels on most of them, Python and the copies' lanes on the rest, apart.

Threads that the system moves about share caches and memory channels with whatever runs there; ZenFlow reports 2.59
times the speed of its offloaded optimizer from binding alone. Bound are the calling thread, which tells the GPU what to
do, the lanes' threads, and the kernels' threads, with those that torch's products begin from the lane of the host.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from meft.planner.base.errors import UsageError

MOST_LANE_CORES = 2
"""One for Python, one for the copies' lanes, which mostly wait."""
CORES_PER_LANE_CORE = 4
"""With fewer cores than twice that, one does both."""


@dataclass(frozen=True)
class CoreShares:
    """Cores of the host's kernels and products, and those of Python and the copies' lanes."""

    kernels: frozenset[int]
    lanes: frozenset[int]

    def __str__(self) -> str:
        return f"cores {listed(self.kernels)} for the host's kernels, {listed(self.lanes)} for Python and copies"


def shares_of(allowed: Iterable[int], *, near: Iterable[int] = (), rank: int = 0, num_ranks: int = 1) -> CoreShares:
    """Divide the cores that a process may use: those ``near`` the GPU if any are, a range of them for each rank of the
    machine, and of that the last ones for Python and copies.

    Raises :class:`UsageError` where a rank has fewer than two.
    """
    usable = frozenset(allowed)
    cores = sorted(usable & frozenset(near) or usable)
    own = cores[len(cores) * rank // num_ranks : len(cores) * (rank + 1) // num_ranks]
    if len(own) < 2:
        raise UsageError(
            f"--bind-cores: {len(cores)} core{'s' * (len(cores) != 1)} for {num_ranks} rank{'s' * (num_ranks != 1)}, "
            f"and each needs one for the host's kernels and one for Python and copies; leave it out, or give the "
            f"process more cores"
        )
    lanes = min(MOST_LANE_CORES, max(1, len(own) // CORES_PER_LANE_CORE))
    return CoreShares(frozenset(own[:-lanes]), frozenset(own[-lanes:]))


def usable_cores() -> frozenset[int]:
    """The cores that this process may use. Raises :class:`UsageError` on systems that do not bind threads."""
    if not hasattr(os, "sched_getaffinity"):
        raise UsageError("--bind-cores: this system does not bind threads to cores (Linux does); leave it out")
    return frozenset(os.sched_getaffinity(0))


def bind_thread(cores: frozenset[int]) -> None:
    """The calling thread, and those that it begins, run on these cores alone from now on."""
    os.sched_setaffinity(0, cores)


def listed(cores: Iterable[int]) -> str:
    """Cores as the system lists them: ``0-3,8``."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][-1] + 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
