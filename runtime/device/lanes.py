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
        self.after: tuple[Job, ...] = ()
        self.order = (0, 0)
        self.awaited_by: set[threading.Condition] = set()
        """To be told when it is over."""
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

    One lock guards all of it, but whoever waits has a condition of its own: a lane is told of jobs issued to it and of
    those that its own jobs wait for, a caller of the job that it asked for. Telling everybody of everything costs each
    thread the interpreter's lock at every job.
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
        self._to_do = {lane: threading.Condition(self._lock) for lane in workers}
        self._asking: set[threading.Condition] = set()
        """Of callers that wait for a job, or for all of them."""
        self._idle = threading.Condition(self._lock)
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
            job.after = tuple(other for other in after if not other.done)
            for other in job.after:
                other.awaited_by.add(self._to_do[lane])
            self._waiting[lane].append(job)
            if not job.after:
                self._to_do[lane].notify()
        return job

    def wait_for(self, job: Job) -> None:
        """Block until ``job`` is over. Raises what ended the schedule, if something did."""
        with self._lock:
            if job.done:
                return
            over = threading.Condition(self._lock)
            job.awaited_by.add(over)
            self._ask(over, lambda: job.done)

    def drain(self) -> None:
        """See :class:`Schedule`. Raises what ended the schedule, if something did."""
        with self._lock:
            self._ask(self._idle, lambda: not (self._running or any(self._waiting.values())))
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

    def _ask(self, told: threading.Condition, is_so: Callable[[], bool]) -> None:
        """Wait, with the lock, until something is so; ``told`` is notified when it may be."""
        self._asking.add(told)
        try:
            while not is_so():
                self._check()
                told.wait()
        finally:
            self._asking.discard(told)

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
            job.after = ()
            self._running -= 1
            awaited_by, job.awaited_by = job.awaited_by, set()
            for told in awaited_by:
                told.notify_all()
            if not self._running:
                self._idle.notify_all()

    def _next(self, lane: Worker) -> Job | None:
        """The job to do now, once there is one; None when the schedule ends."""
        with self._lock:
            while True:
                if self._closing.is_set() or self._error is not None:
                    return None
                job = self._ready(lane)
                if job is not None:
                    self._waiting[lane].remove(job)
                    self._running += 1
                    return job
                self._to_do[lane].wait()

    def _ready(self, lane: Worker) -> Job | None:
        jobs = self._waiting[lane]
        candidates = jobs if lane == "cpu" else jobs[:1]
        able = [job for job in candidates if all(other.done for other in job.after)]
        return min(able, key=lambda job: job.order, default=None)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
            self._running = 0
            self._end()

    def _end(self) -> None:
        """Drop what has not begun, and tell everybody."""
        for jobs in self._waiting.values():
            jobs.clear()
        for told in (*self._to_do.values(), *self._asking, self._idle):
            told.notify_all()


def _nothing() -> None:
    """The work of a job that is over."""
