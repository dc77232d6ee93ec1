"""The ranks of one run: who they are, what those on a machine share, how they wait for each other.

A rank is a process that ``torchrun`` started (its environment says which one); ``torch.distributed`` brings them
together and carries what is told once. What is told in every step goes through counts in shared memory
(:mod:`meft.runtime.ranks.ordered`), whose waits end when the schedule does.

A rank that ends before its time ends the others: each watches the processes of its machine (a descriptor for each,
readable when the process is gone), and that of the launcher, and the machines' first ranks watch each other
(:mod:`meft.runtime.ranks.machines`); so none needs a time-out.

Letters: ``N`` ranks on a machine.
"""

from __future__ import annotations

import os
import select
import socket
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
from meft.runtime.ranks.machines import Leaders, Network, connected, groups, left_in_good_order
from meft.runtime.ranks.memory import SharedMemory
from meft.runtime.ranks.ordered import Counts

LONGEST = timedelta(days=365)
"""Of ``torch.distributed``'s waits: an evaluation may take hours, and processes that end are seen otherwise."""
STDERR = 2
LAUNCHER_GONE = b"meft-run: the launcher of the ranks is gone: stopped; what was saved is whole\n"
MACHINE_GONE = b"meft-run: the ranks of another machine are gone: stopped; what was saved is whole\n"
GRACE_SECONDS = 1.0
"""What the launcher has to note whose end was the first, before those that end because of it do."""
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 20e-6, 1e-3
COUNTS_PER_LINE = 8
"""Each rank's counts begin on a cache line of their own."""


@dataclass(frozen=True)
class Place:
    """Which of how many ranks this process is; each machine has ``per_machine`` of them, in a row."""

    rank: int
    size: int
    per_machine: int

    @property
    def machine(self) -> int:
        """Which machine it is on."""
        return self.rank // self.per_machine

    @property
    def machines(self) -> int:
        """How many there are."""
        return self.size // self.per_machine

    @property
    def local(self) -> int:
        """Which of its machine's ranks it is."""
        return self.rank % self.per_machine

    @classmethod
    def here(cls) -> Place | None:
        """As ``torchrun`` says in the environment; None for a process on its own.

        Raises:
            UsageError: the machines have different numbers of ranks.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if size % per_machine:
            raise UsageError(
                f"--nproc-per-node {per_machine}: there are {size} ranks in all, so another machine has another number "
                f"of them; give the same on every machine"
            )
        return cls(int(os.environ["RANK"]), size, per_machine) if size > 1 else None


class Peers:
    """This rank among the others. :meth:`join` brings them together, :meth:`leave` ends it in good order.

    ``rank`` of ``size`` counts those of all machines, ``local`` of ``here`` those of this one, which share its memory.
    """

    def __init__(self, place: Place, memory: SharedMemory, processes: list[int]) -> None:
        self.rank, self.size = place.rank, place.size
        self.local, self.here = place.local, place.per_machine
        self.machine, self.machines = place.machine, place.machines
        self.memory = memory
        self.waited_seconds = 0.0
        """In :meth:`wait`, whichever thread did."""
        self.network: Network | None = None
        """To this rank's mates, where there are several machines."""
        self.leaders: Leaders | None = None
        """Of several machines, in each one's first rank."""
        self._processes = processes
        self._barriers = self._meetings = 0
        self._arrived, self._released, self._met = self.counts(), self.counts(), self.counts()
        self._left = self.counts()

    @classmethod
    def join(cls, place: Place) -> Peers:
        """Meet the others; every rank calls this."""
        if place.machines == 1 or _is_loopback(os.environ["MASTER_ADDR"]):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=place.rank, world_size=place.size, timeout=LONGEST)
        memory = SharedMemory.create() if place.local == 0 else None
        descriptor = None if memory is None else memory.descriptor
        told: list[Any] = [None] * place.size
        dist.all_gather_object(told, (os.getpid(), descriptor, place.per_machine))
        numbers = sorted({number for _, _, number in told})
        if len(numbers) > 1:
            raise UsageError(f"--nproc-per-node: machines have {numbers} ranks; give the same on every machine")
        here = told[place.rank - place.local :][: place.per_machine]
        memory = memory or SharedMemory.open(*here[0][:2])
        peers = cls(place, memory, [process for process, *_ in here])
        if place.machines > 1:
            peers._meet_machines()
        peers._watch()
        peers.barrier()
        return peers

    def _meet_machines(self) -> None:
        mates, leaders = groups(machines=self.machines, ranks=self.here)
        self.network = Network(mates[self.local], machine=self.machine, machines=self.machines, wait=self.wait)
        if self.local == 0:
            self.leaders = Leaders.meet(leaders, machine=self.machine, machines=self.machines)

    # --- what is shared ------------------------------------------------------------------------------------------

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A table that all ranks of the machine have; they ask in the same order."""
        return self.memory.zeros(shape, dtype)

    def counts(self, each: int = 1) -> Counts:
        """``each`` counts of every rank of the machine, from 0 on."""
        each = -(-each // COUNTS_PER_LINE) * COUNTS_PER_LINE
        return Counts(self.zeros((self.here, each), torch.int64), rank=self.local)

    def share_of(self, count: int, local: int | None = None) -> range:
        """Of ``count`` things in a row, those that belong to one of the machine's ranks, by default this one."""
        return _part(range(count), self.local if local is None else local, self.here)

    def by_machine(self, things: range) -> list[range]:
        """A range divided among the machines."""
        return [_part(things, machine, self.machines) for machine in range(self.machines)]

    def own_rows_of(self, count: int, local: int) -> list[range]:
        """Of ``count`` rows that machines own, by machine, those of its rank ``local``."""
        return [_part(part, local, self.here) for part in self.by_machine(range(count))]

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
        """Wait until every rank of every machine has come here."""
        self._barriers += 1
        self._arrived.publish(self._barriers)
        if self.machines == 1 or self.leaders is not None:
            self.wait(lambda: self._arrived.reached(self._barriers))
        if self.machines == 1:
            return
        if self.leaders is not None:
            self.leaders.barrier()
            self._released.publish(self._barriers)
        self.wait(lambda: self._released.of(0) >= self._barriers)

    def meet_here(self) -> None:
        """Wait until every rank of this machine has come here."""
        self._meetings += 1
        self._met.publish(self._meetings)
        self.wait(lambda: self._met.reached(self._meetings))

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A machine's first rank does what is inside before its others: what it leaves on disk they find there."""
        if self.local:
            self.meet_here()
        yield
        if not self.local:
            self.meet_here()

    def from_first(self, thing: Any) -> Any:
        """What rank 0 has, in every rank; they wait for it."""
        self.barrier()
        told = [thing if self.rank == 0 else None]
        with connected():
            dist.broadcast_object_list(told, src=0)
        return told[0]

    def of_all(self, thing: Any) -> list[Any]:
        """What every rank has, in their order."""
        self.barrier()
        told: list[Any] = [None] * self.size
        with connected():
            dist.all_gather_object(told, thing)
        return told

    def sum_at_first(self, table: torch.Tensor) -> None:
        """Add the others' tables of whole numbers to rank 0's, and make theirs zero."""
        self.barrier()
        with connected():
            dist.reduce(table, dst=0)
        if self.rank:
            table.zero_()

    # --- the end -------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """All is done: wait for the others, then none minds that a process ends."""
        if self.machines > 1:
            self.barrier()
        if self.leaders is not None:
            self.leaders.part()
        self._left.publish(1)
        self.wait(lambda: self._left.reached(1))
        dist.destroy_process_group()

    def _watch(self) -> None:
        try:
            others = {os.pidfd_open(each): rank for rank, each in enumerate(self._processes) if rank != self.local}
            launcher = os.pidfd_open(os.getppid())
        except (AttributeError, OSError) as error:
            raise MachineError(
                f"several ranks watch each other's processes, which this system does not allow ({error}); run one "
                f"(--gpus 1)"
            ) from None
        connections = [] if self.leaders is None else self.leaders.connections
        arguments = (others, launcher, {connection.fileno(): connection for connection in connections})
        thread = threading.Thread(target=self._until_one_ends, args=arguments, name="meft-watch", daemon=True)
        thread.start()

    def _until_one_ends(self, others: dict[int, int], launcher: int, machines: dict[int, socket.socket]) -> None:
        poll = select.poll()
        for descriptor in (*others, launcher, *machines):
            poll.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                poll.unregister(descriptor)
                rank, machine = others.get(descriptor), machines.get(descriptor)
                if rank is not None and self._left.of(rank):
                    continue
                if machine is not None and left_in_good_order(machine):
                    continue
                if descriptor == launcher and self._left.of(self.local):
                    return
                time.sleep(GRACE_SECONDS)
                if not self.rank and rank is None:  # of a rank's end the launcher tells
                    os.write(STDERR, LAUNCHER_GONE if machine is None else MACHINE_GONE)
                os._exit(EXIT_UNEXPECTED)  # whatever the main thread does, and be it in code that knows no signals


def _part(things: range, number: int, of: int) -> range:
    """Part ``number`` of a range divided into ``of`` of nearly the same length."""
    first, count = things.start, len(things)
    return range(first + count * number // of, first + count * (number + 1) // of)


def _is_loopback(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")
