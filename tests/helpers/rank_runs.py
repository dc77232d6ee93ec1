"""Runs of several ranks without a launcher: forks of one process that has loaded everything, so that they begin at
once. Each is ``meft-run`` with the environment that ``torchrun`` would give it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

SECONDS = 120
"""No test waits as long: a rank that hangs is ended, and its test fails."""


def start_ranks(
    size: int,
    words: Sequence[object],
    folder: Path,
    *,
    machines: int = 1,
    elsewhere: Sequence[object] | None = None,
) -> list[ForkServerProcess]:
    """Begin ``meft-run`` with these arguments in ``size`` ranks; what they say goes to ``folder/said-RANK.txt``.

    Of several ``machines`` the ranks share memory, and watch each other's processes, only with those of their own;
    all but the first are given ``elsewhere`` instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context, port = fork_server(), free_port()
    here = size // machines
    ranks = []
    for rank in range(size):
        given = words if rank < here or elsewhere is None else elsewhere
        arguments = [str(word) for word in given]
        ranks.append(context.Process(target=_rank, args=(rank, size, here, port, arguments, folder)))
    for rank in ranks:
        rank.start()
    return ranks


def run_ranks(size: int, words: Sequence[object], folder: Path, *, machines: int = 1) -> list[int | None]:
    """The same, to their end: their exit codes."""
    return ended(start_ranks(size, words, folder, machines=machines))


def ended(ranks: Sequence[ForkServerProcess], seconds: float = SECONDS) -> list[int | None]:
    """Exit codes of all, negative for a signal; ranks that do not end are killed, and have None."""
    for rank in ranks:
        rank.join(seconds)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        if rank.exitcode is None:
            rank.kill()
            rank.join()
    return codes


def said(folder: Path, rank: int = 0) -> str:
    """What a rank wrote to standard error."""
    return (folder / f"said-{rank}.txt").read_text()


def fork_server() -> ForkServerContext:
    """Whose processes have loaded everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_preload"])
    with _path_for_server():
        forkserver.ensure_running()
    return context


def free_port() -> int:
    """One on which ranks can meet."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def become_rank(rank: int, size: int, here: int, port: int) -> None:
    """Give this process the environment that ``torchrun`` would give rank ``rank`` of ``size``, ``here`` a machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank % here, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": here}
    numbers["MASTER_PORT"] = port
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}


@contextmanager
def _path_for_server() -> Iterator[None]:
    """The fork server imports what it preloads from where this process would."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _rank(rank: int, size: int, here: int, port: int, arguments: list[str], folder: Path) -> None:
    become_rank(rank, size, here, port)
    with (folder / f"said-{rank}.txt").open("w") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["meft-run", *arguments]
    import torch

    from meft.runtime.cli import run
    from meft.runtime.training.interrupts import Interrupts

    torch.set_num_threads(1)
    with Interrupts().installed() as interrupts:
        run.main(interrupts)
