"""Ranks on several machines: what goes over the network between them, and how each learns that another is gone.

On every machine the ranks with the same place there are *mates*; what ranks exchange in training goes between mates,
through all-to-all of gloo, whose bytes are counted here. The first rank of a machine is its *leader*: what is told once
in a round goes between leaders, who pass it on through their machine's shared memory.

A machine that ends closes the connection that its leader has with the first one; one that is cut off or loses power
answers no keep-alive. Leaders watch these connections, as ranks watch processes.

Letters: ``M`` machines, ``N`` ranks on each.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from meft.planner.base.errors import EXIT_UNEXPECTED, MeftError

Per = Literal["step", "optimizer_step"]
WORD_BYTES, TO_SAY_IT_SECONDS = 16, 10.0
"""By which the first machine knows the others."""
FAREWELL = b"."
"""What a leader sends before it ends in good order."""
IDLE_SECONDS, INTERVAL_SECONDS, PROBES = 5, 5, 3
"""Of TCP's keep-alive: a machine that answers nothing is gone after 20 seconds."""


class MachineLost(MeftError):
    """The connection to another machine's rank broke."""

    exit_code = EXIT_UNEXPECTED

    def __init__(self) -> None:
        super().__init__(
            "a rank on another machine has ended, or the network to it has; what was saved is whole: go on with "
            "--resume"
        )


class Wait(Protocol):
    """:meth:`meft.runtime.ranks.peers.Peers.wait`."""

    def __call__(self, ready: Callable[[], bool], *, ended: Callable[[], bool]) -> None:
        """Return when ``ready()``."""
        ...


@contextmanager
def connected() -> Iterator[None]:
    """Inside, what gloo says of a connection that broke is :class:`MachineLost`."""
    try:
        yield
    except (dist.DistBackendError, RuntimeError) as error:
        if "gloo" not in str(error):
            raise
        raise MachineLost from None


@dataclass(frozen=True)
class About:
    """What is exchanged: as what it is counted, and when whoever waits for it need wait no more."""

    category: str
    per: Per
    ended: Callable[[], bool]


class Network:
    """What a rank exchanges with its mates. One thread uses it, in the same order in all of them."""

    def __init__(self, group: Any, *, machine: int, machines: int, wait: Wait) -> None:
        self._group, self._wait = group, wait
        self.machine, self.machines = machine, machines
        self.counted_bytes: Counter[tuple[str, Per]] = Counter()
        """Sent to others, by category and what it was sent for."""

    @property
    def others(self) -> list[int]:
        """The other machines, in their order."""
        return [machine for machine in range(self.machines) if machine != self.machine]

    def swap(
        self,
        sent: torch.Tensor,
        received: torch.Tensor,
        about: About,
        *,
        counts: Sequence[int],
        expected: Sequence[int],
    ) -> None:
        """Send each machine its part of ``sent`` and put the parts of all, one after the other, into ``received``.

        Both are contiguous; along the first axis part ``i`` of ``sent`` is ``counts[i]`` long, and what machine ``i``
        sends ``expected[i]``. This machine's own parts are empty.
        """
        source, target = sent[: sum(counts)], received[: sum(expected)]
        with connected():
            work = dist.all_to_all_single(
                _as_bytes(target),
                _as_bytes(source),
                output_split_sizes=[count * _row_bytes(received) for count in expected],
                input_split_sizes=[count * _row_bytes(sent) for count in counts],
                group=self._group,
                async_op=True,
            )
            self._wait(work.is_completed, ended=about.ended)
            work.wait()
        self.counted_bytes[about.category, about.per] += source.numel() * source.element_size()

    def tell(self, numbers: torch.Tensor, about: About) -> torch.Tensor:
        """Send row ``i`` of int64 ``[M, n]`` to machine ``i``; what each has sent this one, the same shape."""
        told = torch.zeros_like(numbers)
        once = [int(machine != self.machine) for machine in range(self.machines)]
        swapped = torch.zeros(self.machines - 1, numbers.shape[1], dtype=torch.int64)
        self.swap(numbers[self.others], swapped, about, counts=once, expected=once)
        told[self.others] = swapped
        return told


class Leaders:
    """The first ranks of all machines, as one of them has the others."""

    def __init__(self, group: Any, connections: list[socket.socket]) -> None:
        self._group, self.connections = group, connections
        self.counted_bytes = 0
        """Sent to others by :meth:`gather`."""

    @classmethod
    def meet(cls, group: Any, *, machine: int, machines: int) -> Leaders:
        """Connect the first with each of the others, to learn of their end."""
        address, told = os.environ["MASTER_ADDR"], list[Any]((None, None))
        if machine == 0:
            with socket.create_server(("", 0), family=_family(address), backlog=machines) as server:
                told = [server.getsockname()[1], secrets.token_bytes(WORD_BYTES)]
                with connected():
                    dist.broadcast_object_list(told, src=0, group=group)
                connections = accept(server, word=told[1], count=machines - 1)
        else:
            with connected():
                dist.broadcast_object_list(told, src=0, group=group)
            connections = [socket.create_connection((address, told[0]))]
            connections[0].sendall(told[1])
        for connection in connections:
            _keep_alive(connection)
        return cls(group, connections)

    def gather(self, numbers: torch.Tensor) -> torch.Tensor:
        """What all leaders have, stacked in the order of machines."""
        machines = dist.get_world_size(self._group)
        each = list(torch.empty(machines, *numbers.shape, dtype=numbers.dtype))
        with connected():
            dist.all_gather(each, numbers, group=self._group)
        self.counted_bytes += (machines - 1) * numbers.numel() * numbers.element_size()
        return torch.stack(each)

    def tell(self, numbers: torch.Tensor) -> torch.Tensor:
        """What the first has, in all of them."""
        with connected():
            dist.broadcast(numbers, src=0, group=self._group)
        return numbers

    def send(self, table: torch.Tensor) -> None:
        """Send the first a contiguous table, which :meth:`receive` takes there."""
        with connected():
            dist.send(_as_bytes(table), dst=0, group=self._group)

    def receive(self, table: torch.Tensor, machine: int) -> None:
        """Take what another machine's leader sends."""
        with connected():
            dist.recv(_as_bytes(table), group_src=machine, group=self._group)

    def barrier(self) -> None:
        """Wait for all leaders."""
        with connected():
            dist.barrier(group=self._group)

    def part(self) -> None:
        """Say that the end of this machine's ranks is in good order."""
        for connection in self.connections:
            connection.sendall(FAREWELL)


def groups(*, machines: int, ranks: int) -> tuple[list[Any], Any]:
    """Process groups of mates, by their place on a machine, and of the leaders; every rank makes all of them."""
    mates = [[machine * ranks + place for machine in range(machines)] for place in range(ranks)]
    with connected():
        return [dist.new_group(each) for each in mates], dist.new_group(mates[0])


def accept(server: socket.socket, *, word: bytes, count: int) -> list[socket.socket]:
    """The first connections that begin with the word; whoever says something else, or nothing, is no rank of ours."""
    found: list[socket.socket] = []
    while len(found) < count:
        connection, _ = server.accept()
        connection.settimeout(TO_SAY_IT_SECONDS)
        try:
            said = connection.recv(len(word), socket.MSG_WAITALL)
        except OSError:
            said = b""
        connection.settimeout(None)
        if secrets.compare_digest(said, word):
            found.append(connection)
        else:
            connection.close()
    return found


def left_in_good_order(connection: socket.socket) -> bool:
    """Of a connection that has something to say: whether it is a farewell, and no end without one."""
    try:
        return connection.recv(1) == FAREWELL
    except OSError:
        return False


def _family(address: str) -> socket.AddressFamily:
    return socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, IDLE_SECONDS),
        (socket.TCP_KEEPINTVL, INTERVAL_SECONDS),
        (socket.TCP_KEEPCNT, PROBES),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _row_bytes(table: torch.Tensor) -> int:
    return math.prod(table.shape[1:]) * table.element_size()


def _as_bytes(table: torch.Tensor) -> torch.Tensor:
    return table.reshape(-1).view(torch.uint8)
