"""What the lanes themselves cost: ``python benchmarks/lanes.py [--rounds 15]``.

*A job* is one of thirty that go round the three lanes, each waiting for the one before, issued at once. *A hop* is one
that the caller issues and waits for. Jobs do nothing, so all of it is our own scheduling and Python. Both in
microseconds, wall-clock and processor time of the process, medians and quartiles of rounds in turn.

It asks of the lanes only what they have always had, so that it measures older revisions too: in a worktree of one,
``PYTHONPATH=build/typing python /path/to/benchmarks/lanes.py``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import cycle, islice

import click

from meft.runtime.device.lanes import Job, Overlapped

LANES = ("cpu", "h2d", "d2h")
CHAINS, JOBS = 20, 30
HOPS = 200
MICROSECONDS = 1e6


def nothing() -> None:
    """The work of a job."""


def chain(lanes: Overlapped) -> int:
    """Issue chains of jobs and wait for the end of each; how many there were."""
    for _ in range(CHAINS):
        after: tuple[Job, ...] = ()
        for lane in islice(cycle(LANES), JOBS):
            after = (lanes.submit(lane, "nothing", nothing, after=after),)
        after[0].result()
    return CHAINS * JOBS


def hops(lanes: Overlapped) -> int:
    """Issue jobs and wait for each; how many there were."""
    for lane in islice(cycle(LANES), HOPS):
        lanes.submit(lane, "nothing", nothing).result()
    return HOPS


def microseconds(work: Callable[[Overlapped], int], lanes: Overlapped) -> tuple[float, float]:
    """Wall-clock and processor time of each job."""
    wall, processor = time.perf_counter(), time.process_time()
    jobs = work(lanes)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return wall / jobs * MICROSECONDS, processor / jobs * MICROSECONDS


@click.command()
@click.option("--rounds", type=click.IntRange(min=2), default=15, show_default=True)
def main(rounds: int) -> None:
    """Measure a job of a chain, and a hop."""
    measured: dict[str, list[tuple[float, float]]] = {"a job": [], "a hop": []}
    with Overlapped() as lanes:
        chain(lanes)
        for _ in range(rounds):
            measured["a job"].append(microseconds(chain, lanes))
            measured["a hop"].append(microseconds(hops, lanes))
    for name, times in measured.items():
        for what, values in zip(("wall-clock", "processor"), zip(*times, strict=True), strict=True):
            low, middle, high = statistics.quantiles(values, n=4)
            click.echo(f"{name}, {what:10} {middle:6.1f} us ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
