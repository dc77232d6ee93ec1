"""Windows of several ranks on the timed device (``timed_device.py``), each rank a process: what they took, and what
each lane was given to do. Their gradients, sums, updates and waits go through the runtime's own code and shared memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from queue import Queue
from typing import Any

import torch
from rank_runs import SECONDS, become_rank, fork_server, free_port
from timed_device import TimedKernels, TimedStreams, small_batch, timed_session

from meft.planner.predict.prediction import ProfileSet
from meft.planner.records.plan import Lane, Plan
from meft.runtime.device.lanes import WORKERS, WORKERS_OF_RANKS, Overlapped
from meft.runtime.ranks import ordered
from meft.runtime.ranks.peers import Peers, Place
from meft.runtime.ranks.rounds import Rounds
from meft.runtime.session.session import Session, WindowEnd

LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class RankWindow:
    """One rank's part in a window."""

    rank: int
    seconds: float
    """From when all began to when all were through with it, lanes and device idle."""
    given_seconds: dict[Lane, float]
    """Of work that each lane was given, whenever it was done."""
    waited_seconds: float
    """That jobs waited for the other ranks, whatever went on meanwhile."""
    missing_rows: int
    """Rows that travelled to the device in forward, over its micro-batches and layers."""


def timed_windows(
    plan: Plan, profiles: ProfileSet, *, windows: int, warm_up_rounds: int = 1, seconds: float = SECONDS
) -> list[list[RankWindow]]:
    """Windows of as many ranks as the plan has cards, after a short one that is not counted; by rank, in order.

    Raises :class:`queue.Empty` unless all are through within ``seconds``.
    """
    context, port, size = fork_server(), free_port(), plan.request.gpus
    told: Queue[list[RankWindow]] = context.Queue()
    given = (size, port, plan, profiles, windows, warm_up_rounds, told)
    ranks = [context.Process(target=_rank, args=(rank, *given)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    try:
        found = [told.get(timeout=seconds) for _ in ranks]
    finally:
        for rank in ranks:
            rank.join(timeout=1)
            rank.kill()
    return sorted(found, key=lambda windows: windows[0].rank)


def _rank(
    rank: int,
    size: int,
    port: int,
    plan: Plan,
    profiles: ProfileSet,
    windows: int,
    warm_up_rounds: int,
    told: Queue[list[RankWindow]],
) -> None:
    torch.set_num_threads(1)
    peers = None
    if size > 1:
        become_rank(rank, size, size, port)
        ordered.warm_up()
        peers = Peers.join(Place(rank, size, size))
    schedule = Overlapped(workers=WORKERS if peers is None else WORKERS_OF_RANKS)
    with timed_session(plan, profiles, schedule, peers=peers) as session:
        run = _Windows(session, None if peers is None else Rounds(peers))
        run.window(warm_up_rounds)
        found = [run.measured(rank) for _ in range(windows)]
    told.put(found)
    if peers is not None:
        peers.leave()


class _Windows:
    """Window after window of one rank, as the trainer has them."""

    def __init__(self, session: Session, rounds: Rounds | None) -> None:
        self._session, self._rounds, self._peers = session, rounds, session.peers
        self._batch, self._missing = small_batch(session.plan), 0

    def measured(self, rank: int) -> RankWindow:
        """A whole window."""
        self._missing, given, waited = 0, self._given(), self._waited()
        self._meet()
        started = time.perf_counter()
        self.window(self._session.plan.request.rounds)
        self._meet()
        seconds, now = time.perf_counter() - started, self._given()
        by_lane = {lane: now[lane] - given[lane] for lane in given}
        return RankWindow(rank, seconds, by_lane, self._waited() - waited, self._missing)

    def window(self, rounds: int) -> None:
        """So many micro-batches of each rank, and the optimizer's step; returns when this rank is idle."""
        session, end = self._session, WindowEnd(LEARNING_RATE, 1.0)
        scale = 1 / session.plan.request.grad_accum
        for number in range(rounds):
            closing = end if number == rounds - 1 else None
            result = session.step(self._batch, loss_scale=scale, window_end=closing, micro_batch=number)
            self._missing += sum(result.counters.missing_rows)
            if self._rounds is not None:
                self._rounds.tell(result.loss, stop=False, taking_part=session.plan.request.gpus)
        session.optimizer_step(learning_rate=LEARNING_RATE, max_norm=1.0)
        session.drain()
        session.device.synchronize()

    def _meet(self) -> None:
        if self._peers is not None:
            self._peers.barrier()

    def _waited(self) -> float:
        return 0.0 if self._peers is None else self._peers.waited_seconds

    def _given(self) -> dict[Lane, float]:
        streams, kernels = self._session.device.streams, self._session.store.kernels
        assert isinstance(streams, TimedStreams)
        assert isinstance(kernels, TimedKernels)
        copies: dict[Any, Any] = self._session.engine._streams
        return {
            "gpu": streams.compute.given_seconds,
            "h2d": copies["h2d"].given_seconds,
            "d2h": copies["d2h"].given_seconds,
            "cpu": kernels.slept_seconds,
        }
