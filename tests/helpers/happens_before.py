"""A checker of who waits for whom: a device of CPU tensors that remembers instead of being late.

Streams, host threads and the jobs of the cpu lane are *agents*. Each has a vector clock: what it knows of the others
through events, jobs and the order in which work was given to a stream. Every operator's reads and writes are compared,
per storage, with the last conflicting ones: if the agent of one knows nothing of the other, nothing orders them, and on
a GPU either may come first. No time passes and no luck is needed: the order in which things happen to run here does not
matter (L. Lamport 1978; C. J. Fidge 1988; Pozniansky and Schuster 2003 for races by vector clocks).

Memory is watched too. CUDA's caching allocator hands a freed block to the next allocation of the stream that it came
from: whoever else used it must be known to that stream by then.

What it takes for granted is what CUDA and torch say of themselves: a stream does its work in order, a copy between
pageable memory and the device blocks the host, and pinned memory is not reused while a copy needs it.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meft.runtime.device.device import MemoryPeaks
from meft.runtime.device.lanes import URGENT, Job, Overlapped

COPY = torch.ops.aten.copy_.default
READ_NUMBER = torch.ops.aten._local_scalar_dense.default
COMPUTE = "compute stream"
Clock = dict[str, int]


class Agent:
    """Someone who does one thing after the other. Its clock: up to which epoch it knows each agent, itself too."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {name: 1}
        self.version = 0
        """Counts what those who follow it have not heard yet."""
        self._followed: dict[str, int] = {}

    def learn(self, clock: Clock) -> None:
        """What comes now comes after all that the clock knows."""
        self.version += merge(self.clock, clock)

    def publish(self) -> Clock:
        """A clock for others to learn: all so far. What the agent does later is of a new epoch."""
        told = dict(self.clock)
        self.clock[self.name] += 1
        return told

    def follow(self, other: Agent) -> None:
        """What comes now comes after all that ``other`` has done so far."""
        if self is not other and self._followed.get(other.name) != other.version:
            self.learn(other.publish())
            self._followed[other.name] = other.version


def merge(clock: Clock, other: Clock) -> int:
    """Let ``clock`` know what ``other`` does; how much was new."""
    new = {name: epoch for name, epoch in other.items() if clock.get(name, 0) < epoch}
    clock.update(new)
    return len(new)


@dataclass(frozen=True)
class Access:
    """Bytes ``first <= byte < end`` of a storage, read or written by an agent in one of its epochs."""

    first: int
    end: int
    writes: bool
    agent: str
    epoch: int
    what: str

    def known_to(self, agent: Agent) -> bool:
        """Whether it comes before whatever the agent does next."""
        return agent.clock.get(self.agent, 0) >= self.epoch

    def __str__(self) -> str:
        return f"{'write' if self.writes else 'read'} by the {self.agent} [{self.what}]"


@dataclass
class Memory:
    """One storage: where it lies, and the accesses that a later one may conflict with."""

    on_device: bool
    watcher: weakref.ref[Any]
    accesses: list[Access] = field(default_factory=list)


class Checker:
    """Everything that the agents, the streams and the storages of one run share."""

    def __init__(self) -> None:
        self.findings: Counter[str] = Counter()
        self.operators = 0
        self.lock = threading.RLock()  # a storage may be freed amid our own work
        self.compute = Agent(COMPUTE)
        self._own = threading.local()
        self._memory: dict[int, Memory] = {}
        self._freed: list[Access] = []
        """What other streams did with device memory that is free since the compute stream's last allocation."""

    # --- whose turn it is ------------------------------------------------------------------------------------------

    @property
    def host(self) -> Agent:
        """The agent that this thread works for."""
        agent: Agent | None = getattr(self._own, "host", None)
        if agent is None:
            agent = self._own.host = Agent(f"host thread {threading.current_thread().name}")
        return agent

    @property
    def stream(self) -> Agent:
        """The stream that this thread gives device work to."""
        return getattr(self._own, "stream", self.compute)

    @property
    def label(self) -> str:
        """The job that this thread does, for findings."""
        return getattr(self._own, "label", "")

    @property
    def on_device(self) -> bool:
        """Whether what this thread allocates now lies on the device."""
        return getattr(self._own, "on_device", False)

    @contextmanager
    def doing(self, **own: Any) -> Iterator[None]:
        """Change what is this thread's own: ``host``, ``stream``, ``label``, ``on_device``."""
        before = {name: getattr(self, name) for name in own}
        self._own.__dict__.update(own)
        try:
            yield
        finally:
            self._own.__dict__.update(before)

    def give_to_stream(self) -> Agent:
        """The current stream, about to do what the host has just told it to."""
        stream = self.stream
        stream.follow(self.host)
        return stream

    # --- memory ----------------------------------------------------------------------------------------------------

    def adopt(self, tensor: torch.Tensor) -> None:
        """The tensor lies on the device."""
        self._memory_of(tensor, on_device=True).on_device = True

    def lies_on_device(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor was made by a device operator, or adopted."""
        memory = self._memory.get(tensor.untyped_storage()._cdata)
        return memory is not None and memory.on_device

    def access(self, agent: Agent, tensor: torch.Tensor, *, writes: bool, what: str, on_device: bool) -> None:
        """Compare with what others did to the same bytes, and remember."""
        if not tensor.numel():
            return
        first, end = span(tensor)
        mine = Access(first, end, writes, agent.name, agent.clock[agent.name], what)
        memory = self._memory_of(tensor, on_device=on_device)
        memory.accesses = [*(other for other in memory.accesses if not self._settled(other, mine, agent)), mine]
        agent.version += 1

    def allocate_on_device(self) -> None:
        """The compute stream may now be given any block that is free."""
        for access in self._freed:
            if not access.known_to(self.compute):
                self.findings[f"memory is given to the {COMPUTE} while it is still wanted: {access}"] += 1
        self._freed.clear()

    def _settled(self, other: Access, mine: Access, agent: Agent) -> bool:
        """Whether ``other`` can be forgotten: whoever conflicts with it conflicts with ``mine`` too."""
        if other.end <= mine.first or mine.end <= other.first:
            return False
        known = other.known_to(agent)
        if not known and (mine.writes or other.writes):
            self.findings[f"{mine} and {other}: nothing says which comes first"] += 1
        covered = mine.first <= other.first and other.end <= mine.end
        return known and covered and (mine.writes or (not other.writes and other.agent == mine.agent))

    def _memory_of(self, tensor: torch.Tensor, *, on_device: bool) -> Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        memory = self._memory.get(key)
        if memory is None:
            memory = self._memory[key] = Memory(on_device, weakref.ref(storage, lambda _: self._forget(key)))
        return memory

    def _forget(self, key: int) -> None:
        with self.lock:
            memory = self._memory.pop(key)
            if memory.on_device:
                self._freed += [access for access in memory.accesses if access.agent != COMPUTE]


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte in its storage, and the one after the last."""
    size = tensor.element_size()
    first = tensor.storage_offset() * size
    if tensor.is_contiguous():
        return first, first + tensor.numel() * size
    steps = sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (steps + 1) * size


class Watch(TorchDispatchMode):
    """Tells the checker of every operator of this thread."""

    def __init__(self, checker: Checker) -> None:
        super().__init__()
        self.checker = checker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then ask what it read and wrote."""
        del types
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.namespace != "prim" and not func.is_view:
            with self.checker.lock:
                self._note(func, args, kwargs, output)
        return output

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        checker = self.checker
        checker.operators += 1
        given = list(arguments(func, args, kwargs))
        on_device = checker.on_device or any(checker.lies_on_device(tensor) for tensor, _ in given)
        agent = checker.give_to_stream() if on_device else checker.host
        what = f"{func.overloadpacket.__name__} {checker.label}".strip()
        known = set()
        for tensor, writes in given:
            known.add(tensor.untyped_storage()._cdata)
            checker.access(agent, tensor, writes=writes, what=what, on_device=on_device)
        for tensor in tensors(output):
            if tensor.untyped_storage()._cdata not in known:
                if on_device:
                    checker.allocate_on_device()
                checker.access(agent, tensor, writes=True, what=what, on_device=on_device)
        if on_device and (func is READ_NUMBER or (func is COPY and not checker.on_device)):  # the host waits for these
            checker.host.learn(agent.publish())


def arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[torch.Tensor, bool]]:
    """Every tensor that an operator is given, and whether it writes there."""
    writes = writes_there(func)
    for given, name in zip(args, writes, strict=False):
        for tensor in tensors(given):
            yield tensor, writes[name]
    for name, given in kwargs.items():
        for tensor in tensors(given):
            yield tensor, writes[name]


@cache
def writes_there(func: Any) -> dict[str, bool]:
    """The arguments of an operator, in order, and whether it writes there."""
    given = func._schema.arguments
    return {each.name: each.alias_info is not None and each.alias_info.is_write for each in given}


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Of an argument or a result, which is a tensor, a list of such, or none."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)


# --- what the runtime sees -------------------------------------------------------------------------------------------


class CheckedEvent:
    """What the stream had done, and knew, when it was recorded."""

    def __init__(self, checker: Checker) -> None:
        self.checker, self.clock = checker, Clock()

    def record(self, stream: Agent | None = None) -> None:
        with self.checker.lock:
            stream = stream or self.checker.stream
            stream.follow(self.checker.host)
            self.clock = stream.publish()

    def wait(self, stream: Agent | None = None) -> None:
        with self.checker.lock:
            stream = stream or self.checker.stream
            stream.follow(self.checker.host)
            stream.learn(self.clock)

    def synchronize(self) -> None:
        with self.checker.lock:
            self.checker.host.learn(self.clock)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: Any) -> float:
        del end_event
        return 1.0


class CheckedStreams:
    """Streams that do nothing behind anyone's back, and know what could happen if they did."""

    def __init__(self, checker: Checker) -> None:
        self.checker, self._count = checker, 0

    def new_stream(self) -> Agent:
        self._count += 1
        return Agent(f"{('h2d', 'd2h')[self._count - 1]} stream")

    def new_event(self, *, timed: bool = False) -> CheckedEvent:
        del timed
        return CheckedEvent(self.checker)

    @contextmanager
    def use(self, stream: Agent) -> Iterator[None]:
        with self.checker.doing(stream=stream, on_device=True):
            yield


class CheckedDevice:
    """CPU tensors as a device with streams. ``checker.findings`` says what nothing orders."""

    kind = "emulated"
    name = "checked device"

    def __init__(self) -> None:
        self.checker = Checker()
        self.streams = CheckedStreams(self.checker)
        self.torch_device = torch.device("cpu")
        self.budget_bytes = 1 << 40

    @contextmanager
    def scope(self) -> Iterator[None]:
        with self.checker.doing(on_device=True):
            yield

    @contextmanager
    def host(self) -> Iterator[None]:
        with self.checker.doing(on_device=False):
            yield

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        del name
        yield

    def adopt(self, module: torch.nn.Module) -> torch.nn.Module:
        for tensor in (*module.parameters(), *module.buffers()):
            self.checker.adopt(tensor)
        return module

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def empty_cache(self) -> None:
        """There is none."""

    def reset_peaks(self) -> None:
        """There are none."""

    def peaks(self) -> MemoryPeaks:
        return MemoryPeaks(0, 0)


class CheckedJob(Job):
    """A job of the wrapped schedule; whoever has its result comes after it."""

    def __init__(self, checker: Checker, lane: str, name: str) -> None:
        super().__init__(None, lane, name, lambda: None)
        self.checker, self.finish = checker, Clock()
        self.inner: Job

    @property
    def done(self) -> bool:
        return self.inner.done

    @done.setter
    def done(self, value: bool) -> None:
        assert not value, "the wrapped job says when it is done"

    def result(self) -> Any:
        result = self.inner.result()
        with self.checker.lock:
            self.checker.host.learn(self.finish)
        return result


class CheckedLanes:
    """The overlapped schedule, each job between the clocks of those who issued it and of those whom it waits for.

    A copy lane does its jobs in the order of issue, so it is one agent. The cpu lane picks what is urgent: each of its
    jobs is an agent of its own, which knows only what it was told to wait for.
    """

    overlapped = True

    def __init__(self, checker: Checker) -> None:
        self.checker = checker
        self.lanes = Overlapped()
        self._issued = 0
        self._finished: Clock = {}

    @property
    def on_job(self) -> Any:
        return self.lanes.on_job

    @on_job.setter
    def on_job(self, told: Any) -> None:
        self.lanes.on_job = told

    def submit(
        self, lane: Any, name: str, work: Callable[[], Any], *, after: Iterable[Job] = (), urgency: int = URGENT
    ) -> Job:
        after = tuple(after)
        self._issued += 1
        with self.checker.lock:
            issued = self.checker.host.publish()
        agent = Agent(f"job {self._issued}, {name}") if lane == "cpu" else None
        job = CheckedJob(self.checker, lane, name)

        def checked() -> Any:
            own = {"label": name} if agent is None else {"label": name, "host": agent}
            with self.checker.doing(**own), Watch(self.checker):
                with self.checker.lock:
                    for clock in (issued, *(other.finish for other in after)):
                        self.checker.host.learn(clock)
                result = work()
                with self.checker.lock:
                    job.finish = self.checker.host.publish()
                    merge(self._finished, job.finish)
            return result

        inner = [other.inner if isinstance(other, CheckedJob) else other for other in after]
        job.inner = self.lanes.submit(lane, name, checked, after=inner, urgency=urgency)
        return job

    def drain(self) -> None:
        self.lanes.drain()
        with self.checker.lock:
            self.checker.host.learn(self._finished)

    def pause(self, seconds: float) -> None:
        self.lanes.pause(seconds)

    def close(self) -> None:
        self.lanes.close()
