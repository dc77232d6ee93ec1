"""Who does the work beside the device's computation, and when: the lanes ``h2d``, ``d2h`` and ``cpu``.

The runtime issues *jobs* in the order of its program; each names the lane that it runs on and the jobs that must be
over before. :class:`Sequential` does a job when it is issued. :class:`Overlapped` has one thread per lane. Either way a
job sees the same inputs, because what it depends on is declared, so the results are equal bit for bit.

A copy lane takes its jobs in the order of issue, as a CUDA stream does. The cpu lane takes, of the jobs that can run,
the most urgent, and of those the first issued: the rows of the next layer do not wait for gradients to be added up or
for the optimizer. A job only ever depends on jobs issued before it, so some job can always run.

Where several ranks train together a fourth lane, ``peers``, waits for the others (:mod:`meft.runtime.ranks`), in the
order of issue, so that the cpu lane never does; where they are on several machines a fifth, ``network``, exchanges with
the others, in the order of issue too, which is the same in all.

An exception in a job ends the schedule: whoever waits for any job, or issues one, gets it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

from meft.planner.records.plan import Lane

Worker = Lane | Literal["peers"]
Delay = Callable[[Worker, str], float]
"""Seconds to sleep before a job: for tests that look for races."""
OnJob = Callable[[Lane, str, float, float], None]
"""Told of every job that is work: lane, name, when it began and ended (``time.perf_counter``)."""

URGENT, SOON, LATER = range(3)
"""Of cpu jobs: what a layer waits for; what frees a buffer; what only the next window needs."""
WORKERS: tuple[Worker, ...] = ("h2d", "d2h", "cpu")
WORKERS_OF_RANKS: tuple[Worker, ...] = (*WORKERS, "peers")
WORKERS_OF_MACHINES: tuple[Worker, ...] = (*WORKERS_OF_RANKS, "network")


class Job:
    """Work on a lane, and its result."""

    def __init__(self, schedule: Overlapped | None, lane: Worker, name: str, work: Callable[[], Any]) -> None:
        self.lane, self.name = lane, name
        self.order = (0, 0)
        self.missing = 0
        """How many of the jobs that it comes after are not over."""
        self.followers: list[Job] = []
        """Those that come after it."""
        self.callers: list[threading.Lock] = []
        """Each held by a caller that waits for it; given up when it is over."""
        self._schedule, self._work, self._result = schedule, work, None
        self.done = False

    def run(self, on_job: OnJob | None) -> None:
        """Do the work; drop it, with what it holds on to."""
        started = time.perf_counter()
        self._result = self._work()
        self._work = _nothing
        if on_job is not None and self.lane != "peers" and self.lane != "network":
            on_job(self.lane, self.name, started, time.perf_counter())

    def result(self) -> Any:
        """Wait for the job; what its work returned, or the exception that ended the schedule."""
        if self._schedule is not None and not self.done:
            self._schedule.wait_for(self)
        return self._result


class Schedule(Protocol):
    """Where jobs are issued."""

    overlapped: bool
    on_job: OnJob | None

    def submit(
        self, lane: Worker, name: str, work: Callable[[], Any], *, after: Iterable[Job] = (), urgency: int = URGENT
    ) -> Job:
        """Issue a job that begins when every job in ``after`` is over."""
        ...

    def drain(self) -> None:
        """Wait until every job is over."""
        ...

    def pause(self, seconds: float) -> None:
        """Sleep within a job; ends early when the schedule is closed."""
        ...

    def ended(self) -> bool:
        """Whether it is closed, or something has ended it: a job that waits for others stops."""
        ...

    def close(self) -> None:
        """Drop what has not begun and end the threads. A closed schedule takes no jobs."""
        ...


class Sequential:
    """One thing after the other, in the order of issue: the schedule to read, and to compare with."""

    overlapped = False

    def __init__(self, on_job: OnJob | None = None) -> None:
        self.on_job = on_job

    def submit(
        self, lane: Worker, name: str, work: Callable[[], Any], *, after: Iterable[Job] = (), urgency: int = URGENT
    ) -> Job:
        """Do the job now."""
        del after, urgency
        job = Job(None, lane, name, work)
        job.run(self.on_job)
        job.done = True
        return job

    def drain(self) -> None:
        """Nothing is ever left to do."""

    def pause(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def ended(self) -> bool:
        """See :class:`Schedule`: it does nothing beside the caller."""
        return False

    def close(self) -> None:
        """There are no threads."""


class Overlapped:
    """A thread per lane. :meth:`close` must be called, or use it as a context manager.

    One lock guards all of it. Whoever has nothing to do sleeps on a lock of its own, and is woken once, when there is
    something: a lane when a job that it would take can run, a caller when the job that it asked for is over. Waking
    anybody for less costs every thread the interpreter's lock.
    """

    overlapped = True

    def __init__(
        self,
        *,
        on_job: OnJob | None = None,
        delay: Delay | None = None,
        workers: tuple[Worker, ...] = WORKERS,
        bind: Callable[[Worker], None] | None = None,
    ) -> None:
        """``bind`` is called by each lane's thread first, with its lane."""
        self.on_job = on_job
        self._delay = delay
        self._bind = bind
        self._lock = threading.Lock()
        self._sleeps_on = {lane: _held() for lane in workers}
        self._asleep: set[Worker] = set()
        self._callers: set[threading.Lock] = set()
        """Of all that wait for a job, or for all of them."""
        self._drains: list[threading.Lock] = []
        self._closing = threading.Event()
        self._waiting: dict[Worker, list[Job]] = {lane: [] for lane in workers}
        self._running = 0
        self._issued = 0
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"meft-{lane}", daemon=True) for lane in workers
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Overlapped:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self, lane: Worker, name: str, work: Callable[[], Any], *, after: Iterable[Job] = (), urgency: int = URGENT
    ) -> Job:
        """See :class:`Schedule`. Raises what ended the schedule, if something did."""
        job = Job(self, lane, name, work)
        with self._lock:
            self._check()
            self._issued += 1
            job.order = (urgency if lane == "cpu" else 0, self._issued)
            for other in after:
                if not other.done:
                    other.followers.append(job)
                    job.missing += 1
            self._waiting[lane].append(job)
            self._wake_for(job)
        return job

    def wait_for(self, job: Job) -> None:
        """Block until ``job`` is over. Raises what ended the schedule, if something did."""
        self._ask(lambda: job.done, job.callers)

    def drain(self) -> None:
        """See :class:`Schedule`. Raises what ended the schedule, if something did."""
        self._ask(self._idle, self._drains)
        with self._lock:
            self._check()

    def pause(self, seconds: float) -> None:
        """See :class:`Schedule`."""
        self._closing.wait(seconds)

    def ended(self) -> bool:
        """See :class:`Schedule`."""
        return self._closing.is_set() or self._error is not None

    def close(self) -> None:
        """See :class:`Schedule`; returns when the threads are gone."""
        with self._lock:
            self._closing.set()
            self._end()
        for thread in self._threads:
            thread.join()

    def _ask(self, is_so: Callable[[], bool], callers: list[threading.Lock]) -> None:
        """Sleep until something is so; whoever makes it so wakes the ``callers`` of it."""
        while True:
            with self._lock:
                if is_so():
                    return
                self._check()
                told = _held()
                callers.append(told)
                self._callers.add(told)
            try:
                told.acquire()
            finally:
                with self._lock:
                    self._callers.discard(told)

    def _idle(self) -> bool:
        return not (self._running or any(self._waiting.values()))

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closing.is_set():
            raise RuntimeError("the schedule is closed")

    def _work(self, lane: Worker) -> None:
        if self._bind is not None:
            self._bind(lane)
        while (job := self._next(lane)) is not None:
            try:
                if self._delay is not None:
                    self.pause(self._delay(lane, job.name))
                job.run(self.on_job)
            except BaseException as error:  # noqa: BLE001 - whoever waits for the job gets it
                self._fail(error)
                return
            self._finish(job)

    def _finish(self, job: Job) -> None:
        with self._lock:
            job.done = True
            self._running -= 1
            followers, job.followers = job.followers, []
            for follower in followers:
                follower.missing -= 1
                self._wake_for(follower)
            _release(job.callers)
            if self._drains and self._idle():
                _release(self._drains)

    def _wake_for(self, job: Job) -> None:
        """Wake the job's lane if it sleeps and would take the job now."""
        lane = job.lane
        if lane in self._asleep and not job.missing and (lane == "cpu" or self._waiting[lane][0] is job):
            self._asleep.discard(lane)
            self._sleeps_on[lane].release()

    def _next(self, lane: Worker) -> Job | None:
        """The job to do now, once there is one; None when the schedule ends."""
        while True:
            with self._lock:
                if self._closing.is_set() or self._error is not None:
                    return None
                job = self._ready(lane)
                if job is not None:
                    self._waiting[lane].remove(job)
                    self._running += 1
                    return job
                self._asleep.add(lane)
            self._sleeps_on[lane].acquire()

    def _ready(self, lane: Worker) -> Job | None:
        jobs = self._waiting[lane]
        if lane == "cpu":
            return min((job for job in jobs if not job.missing), key=lambda job: job.order, default=None)
        return jobs[0] if jobs and not jobs[0].missing else None

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
            self._running = 0
            self._end()

    def _end(self) -> None:
        """Drop what has not begun, and wake everybody."""
        for jobs in self._waiting.values():
            jobs.clear()
        for lane in self._asleep:
            self._sleeps_on[lane].release()
        self._asleep.clear()
        _release(self._callers)


def _held() -> threading.Lock:
    """A lock to sleep on: whoever acquires it waits until it is released."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def _release(locks: list[threading.Lock] | set[threading.Lock]) -> None:
    """Wake who sleeps on them, unless somebody has, and forget them."""
    for lock in locks:
        if lock.locked():
            lock.release()
    locks.clear()


def _nothing() -> None:
    """The work of a job that is over."""
