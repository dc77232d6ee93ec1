"""The ranks of one run on one machine: who they are, what they share, how they wait for each other.

A rank is a process that ``torchrun`` started (its environment says which one); ``torch.distributed`` brings them
together and carries what is told once. What is told in every step goes through counts in shared memory
(:mod:`meft.runtime.ranks.ordered`), whose waits end when the schedule does.

A rank that ends before its time ends the others: each watches the processes of all (a descriptor for each, readable
when the process is gone), and that of the launcher, and so needs no time-out.

Letters: ``N`` ranks.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from meft.planner.base.errors import EXIT_UNEXPECTED, MachineError, UsageError
from meft.runtime.ranks.memory import SharedMemory
from meft.runtime.ranks.ordered import Counts

LONGEST = timedelta(days=365)
"""Of ``torch.distributed``'s waits: an evaluation may take hours, and processes that end are seen otherwise."""
STDERR = 2
GRACE_SECONDS = 1.0
"""What the launcher has to note whose end was the first, before those that end because of it do."""
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 20e-6, 1e-3
COUNTS_PER_LINE = 8
"""Each rank's counts begin on a cache line of their own."""


@dataclass(frozen=True)
class Place:
    """Which of how many ranks this process is."""

    rank: int
    size: int

    @classmethod
    def here(cls) -> Place | None:
        """As ``torchrun`` says in the environment; None for a process on its own.

        Raises:
            UsageError: the ranks are spread over several machines.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if local != size:
            raise UsageError(
                f"--nnodes: {size} ranks on several machines, {local} of them here; ranks share one machine's memory, "
                f"so give --nnodes 1"
            )
        return cls(int(os.environ["RANK"]), size) if size > 1 else None


class Peers:
    """This rank among the others. :meth:`join` brings them together, :meth:`leave` ends it in good order."""

    def __init__(self, place: Place, memory: SharedMemory, processes: list[int]) -> None:
        self.rank, self.size = place.rank, place.size
        self.memory = memory
        self.waited_seconds = 0.0
        """In :meth:`wait`, whichever thread did."""
        self._processes = processes
        self._barriers = 0
        self._arrived = self.counts()
        self._left = self.counts()

    @classmethod
    def join(cls, place: Place) -> Peers:
        """Meet the others; every rank calls this."""
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=place.rank, world_size=place.size, timeout=LONGEST)
        memory = SharedMemory.create() if place.rank == 0 else None
        told: list[Any] = [None] * place.size
        dist.all_gather_object(told, (os.getpid(), None if memory is None else memory.descriptor))
        memory = memory or SharedMemory.open(*told[0])
        peers = cls(place, memory, [process for process, _ in told])
        peers._watch()
        peers.barrier()
        return peers

    # --- what is shared ------------------------------------------------------------------------------------------

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A table that all ranks have; they ask in the same order."""
        return self.memory.zeros(shape, dtype)

    def counts(self, each: int = 1) -> Counts:
        """``each`` counts of every rank, from 0 on."""
        each = -(-each // COUNTS_PER_LINE) * COUNTS_PER_LINE
        return Counts(self.zeros((self.size, each), torch.int64), rank=self.rank)

    def share_of(self, count: int, rank: int | None = None) -> range:
        """Of ``count`` things in a row, those that belong to a rank, by default this one."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    # --- waiting -------------------------------------------------------------------------------------------------

    def wait(self, ready: Callable[[], bool], *, ended: Callable[[], bool] = lambda: False) -> None:
        """Return when ``ready()``, or raise :class:`RuntimeError` when ``ended()``."""
        started, pause = time.perf_counter(), SHORTEST_PAUSE_SECONDS
        while not ready():
            if ended():
                raise RuntimeError("the schedule is closed")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        self.waited_seconds += time.perf_counter() - started

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self._barriers += 1
        self._arrived.publish(self._barriers)
        self.wait(lambda: self._arrived.reached(self._barriers))

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Rank 0 does what is inside before the others: what it leaves on disk they find there."""
        if self.rank:
            self.barrier()
        yield
        if not self.rank:
            self.barrier()

    def from_first(self, thing: Any) -> Any:
        """What rank 0 has, in every rank; they wait for it."""
        self.barrier()
        told = [thing if self.rank == 0 else None]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def of_all(self, thing: Any) -> list[Any]:
        """What every rank has, in their order."""
        self.barrier()
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, thing)
        return told

    def sum_at_first(self, table: torch.Tensor) -> None:
        """Add the others' tables of whole numbers to rank 0's, and make theirs zero."""
        self.barrier()
        dist.reduce(table, dst=0)
        if self.rank:
            table.zero_()

    # --- the end -------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """All is done: wait for the others, then none minds that a process ends."""
        self._left.publish(1)
        self.wait(lambda: self._left.reached(1))
        dist.destroy_process_group()

    def _watch(self) -> None:
        try:
            others = {os.pidfd_open(each): rank for rank, each in enumerate(self._processes) if rank != self.rank}
            launcher = os.pidfd_open(os.getppid())
        except (AttributeError, OSError) as error:
            raise MachineError(
                f"several ranks watch each other's processes, which this system does not allow ({error}); run one "
                f"(--gpus 1)"
            ) from None
        thread = threading.Thread(target=self._until_one_ends, args=(others, launcher), name="meft-watch", daemon=True)
        thread.start()

    def _until_one_ends(self, others: dict[int, int], launcher: int) -> None:
        poll = select.poll()
        for descriptor in (*others, launcher):
            poll.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                poll.unregister(descriptor)
                rank = others.get(descriptor)
                if rank is not None and self._left.of(rank):
                    continue
                if rank is None and self._left.of(self.rank):
                    return
                time.sleep(GRACE_SECONDS)
                if rank is None and not self.rank:  # of a rank's end the launcher tells
                    os.write(STDERR, b"meft-run: the launcher of the ranks is gone: stopped; what was saved is whole\n")
                os._exit(EXIT_UNEXPECTED)  # whatever the main thread does, and be it in code that knows no signals
