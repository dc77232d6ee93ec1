"""Cores divided among kernels and Python, and threads that stay on theirs."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meft.planner.base.errors import UsageError
from meft.runtime.device.lanes import Overlapped
from meft.runtime.host.cores import bind_thread, listed, shares_of, usable_cores
from meft.runtime.host.kernels import HostKernels

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind threads")


@given(cores=st.sets(st.integers(0, 200), min_size=2), near=st.sets(st.integers(0, 200)), num_ranks=st.integers(1, 4))
def test_every_core_near_the_gpu_has_one_use(cores, near, num_ranks) -> None:
    used = cores & near or cores
    try:
        shares = [shares_of(cores, near=near, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    except UsageError:
        assert len(used) < 2 * num_ranks
        return
    each = [part for share in shares for part in (share.kernels, share.lanes)]
    assert frozenset().union(*each) == used
    assert sum(map(len, each)) == len(used)
    for share in shares:
        assert 1 <= len(share.lanes) <= 2
        assert len(share.lanes) <= len(share.kernels)


def test_thirty_two_cores_keep_two_for_python() -> None:
    assert str(shares_of(range(32))) == "cores 0-29 for the host's kernels, 30-31 for Python and copies"
    assert str(shares_of(range(4), near=(2, 3, 9))) == "cores 2 for the host's kernels, 3 for Python and copies"
    assert listed({0, 2, 3, 4, 8}) == "0,2-4,8"


def test_a_single_core_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"1 core for 1 rank, .* leave it out"):
        shares_of({5})
    with pytest.raises(UsageError, match="6 cores for 4 ranks"):
        shares_of(range(6), rank=0, num_ranks=4)


def test_lanes_and_kernels_run_where_they_are_bound() -> None:
    """Threads of the pool are bound as they begin; a lane's, before its first job; the caller's stays as it was."""
    allowed = usable_cores()
    one = frozenset({min(allowed)})
    seen: dict[str, frozenset[int]] = {}
    with Overlapped(bind=lambda lane: bind_thread(one if lane == "cpu" else allowed)) as lanes:
        for lane in ("cpu", "h2d"):
            lanes.submit(lane, "look", lambda lane=lane: seen.update({lane: usable_cores()})).result()
    assert seen == {"cpu": one, "h2d": allowed}
    assert usable_cores() == allowed


def test_a_pool_has_no_more_threads_than_cores_and_keeps_to_them(monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    cores = frozenset(sorted(usable_cores())[:2])
    kernels = HostKernels(cores=cores)
    assert kernels.num_threads == len(cores)
    assert HostKernels(cores=frozenset({0})).num_threads == 1
    if kernels._pool is not None:
        assert kernels._pool.submit(usable_cores).result() == cores
        assert kernels._pool.submit(lambda: threading.current_thread().name).result().startswith("meft-kernel")
    kernels.close()
