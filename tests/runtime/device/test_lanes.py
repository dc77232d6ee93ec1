"""The lanes by themselves: what is done when, who is woken, and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rank_checks import until

from meft.runtime.device.lanes import WORKERS, Job, Overlapped, Sequential

SECONDS = 60
"""No lane that works needs as long; one that nobody wakes is found by it."""


def test_the_cpu_lane_takes_the_most_urgent_job_that_can_run() -> None:
    gate, done = threading.Event(), []
    with Overlapped() as lanes:
        first = lanes.submit("cpu", "first", gate.wait)
        copy = lanes.submit("h2d", "copy", gate.wait)
        jobs = [
            lanes.submit("cpu", "later", lambda: done.append("later"), urgency=2),
            lanes.submit("cpu", "waits", lambda: done.append("waits"), after=[first, copy], urgency=0),
            lanes.submit("cpu", "soon", lambda: done.append("soon"), urgency=1),
            lanes.submit("cpu", "urgent", lambda: done.append("urgent"), urgency=0),
        ]
        gate.set()
        for job in jobs:
            job.result()
    assert [name for name in done if name != "waits"] == ["urgent", "soon", "later"]


def test_copy_lanes_keep_the_order_of_issue() -> None:
    gate, done = threading.Event(), []
    with Overlapped() as lanes:
        blocked = lanes.submit("cpu", "gate", gate.wait)
        lanes.submit("h2d", "first", lambda: done.append(1), after=[blocked])
        second = lanes.submit("h2d", "second", lambda: done.append(2))
        assert not second.done
        gate.set()
        second.result()
    assert done == [1, 2]


def test_results_and_drain() -> None:
    with Overlapped() as lanes:
        assert lanes.submit("cpu", "sum", lambda: 1 + 1).result() == 2
        slow = lanes.submit("d2h", "slow", lambda: lanes.pause(0.02))
        lanes.drain()
        assert slow.done
    assert Sequential().submit("cpu", "sum", lambda: 3).result() == 3


# --- any jobs at all -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Issued:
    """A job to issue: the places of those that it comes after, and whether the caller waits for it before the next."""

    lane: str
    after: tuple[int, ...]
    urgency: int
    awaited: bool


@st.composite
def programs(draw: st.DrawFn) -> list[Issued]:
    """Jobs that come after some of those before."""
    program = []
    for place in range(draw(st.integers(1, 25))):
        before = st.lists(st.integers(0, place - 1), max_size=3) if place else st.just([])
        lane, urgency = draw(st.sampled_from(WORKERS)), draw(st.integers(0, 2))
        program.append(Issued(lane, tuple(draw(before)), urgency, draw(st.integers(0, 4)) == 0))
    return program


@dataclass
class Seen:
    """What happened, in order."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    began: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    too_early: list[int] = field(default_factory=list)

    def work_of(self, place: int, after: tuple[int, ...]) -> Callable[[], int]:
        def work() -> int:
            with self.lock:
                self.began.append(place)
                if not set(after) <= set(self.ended):
                    self.too_early.append(place)
            with self.lock:
                self.ended.append(place)
            return place

        return work


def in_time(work: Callable[[], Any]) -> None:
    """Run in a thread of its own, which must end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), "somebody sleeps whom nobody wakes"


def issue(lanes: Overlapped, program: list[Issued], seen: Seen) -> list[Job]:
    jobs: list[Job] = []
    for place, each in enumerate(program):
        after = [jobs[other] for other in each.after]
        work = seen.work_of(place, each.after)
        jobs.append(lanes.submit(each.lane, str(place), work, after=after, urgency=each.urgency))
        if each.awaited:
            assert jobs[-1].result() == place
    return jobs


@settings(max_examples=150, phases=(Phase.explicit, Phase.generate))  # to shrink, each example would be waited for
@given(program=programs(), asked=st.lists(st.integers(0, 24), max_size=4))
def test_every_job_is_done_once_after_those_that_it_names_and_everybody_is_woken(program, asked) -> None:
    """Whatever the jobs, with several threads that wait for some of them or for all."""
    seen, results = Seen(), []
    with Overlapped() as lanes:

        def run() -> None:
            jobs = issue(lanes, program, seen)
            wanted = [jobs[place % len(jobs)] for place in asked]
            waits = [*(job.result for job in wanted), lanes.drain]
            callers = [threading.Thread(target=wait, daemon=True) for wait in waits]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
            results.extend(job.result() for job in jobs)

        in_time(run)
    assert results == list(range(len(program)))
    assert sorted(seen.ended) == results
    assert seen.too_early == []
    for lane in ("h2d", "d2h"):
        order = [place for place in seen.began if program[place].lane == lane]
        assert order == sorted(order)


@pytest.mark.parametrize("how", ["an error", "closing"])
def test_whoever_waits_is_told_when_the_schedule_ends(how) -> None:
    """Callers of a job that never begins, of all jobs, and lanes that have nothing to do."""
    gate, told = threading.Event(), []
    lanes = Overlapped()

    def fails() -> None:
        gate.wait()
        raise OSError("no luck")

    first = lanes.submit("cpu", "first", fails if how == "an error" else gate.wait)
    never = lanes.submit("h2d", "never", lambda: None, after=[first, lanes.submit("d2h", "copy", gate.wait)])

    def ask(wait: Callable[[], Any]) -> None:
        try:
            wait()
        except (OSError, RuntimeError) as error:
            told.append(str(error))

    waits = (never.result, never.result, lanes.drain)
    callers = [threading.Thread(target=ask, args=(wait,), daemon=True) for wait in waits]
    for caller in callers:
        caller.start()
    until(lambda: len(never.callers) == 2)
    if how == "closing":
        closing = threading.Thread(target=lanes.close)
        closing.start()
        until(lanes.ended)
    gate.set()
    for caller in callers:
        in_time(caller.join)
    in_time(lanes.close)
    assert told == ["no luck" if how == "an error" else "the schedule is closed"] * 3
    with pytest.raises((OSError, RuntimeError)):
        lanes.submit("cpu", "late", lambda: None)
