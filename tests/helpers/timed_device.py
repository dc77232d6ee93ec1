"""A GPU, a link and host kernels that take the time which a plan says, and do next to nothing else.

Everything between them is real: lanes, exchange, row cache, autograd, transformers' own modules, Python. So what a step
takes here beyond the plan is our own scheduling and Python, and nothing of a model's seven billion weights is needed:
the model has the plan's layers, each a few numbers wide, and its operators stand for the launches of kernels.

- *Compute.* A stream is the time at which it will have done all it was given. Each task of the step is given to it
  where the exchange says that it was computed (:class:`TimedClock`), as long as the plan's ``gpu`` lane has it. Its
  kernels run as they are launched: it begins when launching it did, and ends no earlier.
- *Link.* A copy takes as long as the plan has it, on its direction's stream (:class:`TimedEngine`).
- *Host kernels.* They sleep, so that they take no core from the threads that are measured (:class:`TimedKernels`), as
  long as the host's profile says without Python's share: that is real. They are given as many rows as the plan expects.

Of several ranks each has a device of its own, and the share of link and host that the plan gives it
(:func:`~meft.planner.timing.step.shared_rates`): what they add up, update and wait for is real (``timed_ranks.py``).

Time is the clock's: on a machine that has other things to do, all of it takes longer.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch

from meft.planner.base.quantities import ADAPTER_DTYPE_BYTES, COMPUTE_DTYPE_BYTES
from meft.planner.predict.prediction import ProfileSet, simulated_tasks
from meft.planner.records.plan import Direction, Plan
from meft.planner.records.profiles import HostProfile, LinkProfile
from meft.planner.timing.step import (
    accumulate_seconds,
    adamw_seconds,
    copy_seconds,
    gather_seconds,
    route_seconds,
    shared_rates,
)
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import BareDevice
from meft.runtime.device.engine import Copy, Pair, Part, TransferEngine, Views
from meft.runtime.device.lanes import Schedule
from meft.runtime.device.timeline import LaneClock
from meft.runtime.host.kernels import HostKernels
from meft.runtime.host.router import Selection, TopKRouter
from meft.runtime.profiling.launching import LaunchTimes, llama_of, narrowed
from meft.runtime.ranks.peers import Peers
from meft.runtime.session import session as session_module
from meft.runtime.session.documents import unpacked_sequences
from meft.runtime.session.session import Session, open_session

HIDDEN_SIZE, TOKENS_PER_SEQUENCE, VOCABULARY = 4, 4, 64
"""Of the model that stands for the plan's."""
OF_ROWS = ("rows", "rows_refetched", "row_gradients", "window_gradients")
"""What copies of rows ``[A, 2D]`` are counted as."""
UNIONS = 16
"""So many different sets of active rows take turns."""
SCALARS = 8
"""Copies of no more numbers are done, for they may be looked at."""
_PR_SET_TIMERSLACK = 29
_SPIN_SECONDS = 5e-6
_TRIED_SLEEPS, _TRIED_SECONDS = 51, 5e-4
_late_seconds = [_SPIN_SECONDS]
"""By how much sleeps end late here, since :func:`sharpen_timers` tried."""


def sharpen_timers() -> None:
    """Let sleeps of this thread, and of those that it starts, end within microseconds instead of 50 (Linux); and find
    out how late they end for all that, as a machine's that sleeps itself do."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    late = []
    for _ in range(_TRIED_SLEEPS):
        began = time.perf_counter()
        time.sleep(_TRIED_SECONDS)
        late.append(time.perf_counter() - began - _TRIED_SECONDS)
    _late_seconds[0] = max(statistics.median(late), _SPIN_SECONDS)


def sleep_until(moment: float) -> None:
    """Until ``time.perf_counter()`` says so; without the interpreter's lock, but for the last microseconds."""
    while (left := moment - time.perf_counter()) > 0:
        if left > _late_seconds[0]:
            time.sleep(left - _late_seconds[0])


class TimedStream:
    """A queue of a device: ``free_at`` is when it will have done all that it was given, ``given_seconds`` how much."""

    def __init__(self) -> None:
        self.free_at = 0.0
        self.given_seconds = 0.0

    def now(self) -> float:
        """When something given to it now would begin."""
        return max(self.free_at, time.perf_counter())

    def take(self, seconds: float, *, since: float = math.inf) -> None:
        """One more piece of work, given piece by piece ``since`` then or at once."""
        now = time.perf_counter()
        self.free_at = max(max(self.free_at, min(since, now)) + seconds, now)
        self.given_seconds += seconds


class TimedEvent:
    """A point of a stream."""

    def __init__(self, compute: TimedStream) -> None:
        self._compute = compute
        self.passed_at = 0.0

    def record(self, stream: TimedStream | None = None) -> None:
        """See :class:`meft.runtime.device.streams.Event`."""
        self.passed_at = (stream or self._compute).now()

    def wait(self, stream: TimedStream | None = None) -> None:
        """See :class:`meft.runtime.device.streams.Event`."""
        waiting = stream or self._compute
        waiting.free_at = max(waiting.free_at, self.passed_at)

    def synchronize(self) -> None:
        """See :class:`meft.runtime.device.streams.Event`."""
        sleep_until(self.passed_at)

    def query(self) -> bool:
        """See :class:`meft.runtime.device.streams.Event`."""
        return time.perf_counter() >= self.passed_at

    def elapsed_time(self, end_event: TimedEvent) -> float:
        """See :class:`meft.runtime.device.streams.Event`."""
        return (end_event.passed_at - self.passed_at) * 1e3


class TimedStreams:
    """The compute stream, and those that are asked for."""

    def __init__(self) -> None:
        self.compute = TimedStream()

    def new_stream(self) -> TimedStream:
        """See :class:`meft.runtime.device.streams.Streams`."""
        return TimedStream()

    def new_event(self, *, timed: bool = False) -> TimedEvent:
        """See :class:`meft.runtime.device.streams.Streams`."""
        del timed
        return TimedEvent(self.compute)

    def use(self, stream: TimedStream) -> AbstractContextManager[object]:
        """See :class:`meft.runtime.device.streams.Streams`; copies here name their stream."""
        del stream
        return nullcontext()


class TimedDevice(BareDevice):
    """This machine's CPU behind the runtime's interface, with streams."""

    name = "timed device"

    def __init__(self) -> None:
        super().__init__()
        self.streams: TimedStreams = TimedStreams()

    def synchronize(self) -> None:
        """Wait for the compute stream."""
        sleep_until(self.streams.compute.free_at)


class TimedClock(LaneClock):
    """Gives the compute stream each task where the exchange says that it was computed, before the clock looks."""

    def __init__(self, plan: Plan, profiles: ProfileSet, compute: TimedStream, *, keep: bool = False) -> None:
        super().__init__(keep=keep)
        self._compute = compute
        tasks = simulated_tasks(plan.request, plan.decision, profiles, plan.prediction.sparsity)
        self._seconds = {task.name: task.end_seconds - task.start_seconds for task in tasks if task.lane == "gpu"}
        self._seconds["attention 0"] += self._seconds["embedding"]
        for layer in range(plan.request.model.num_layers):
            if f"ffn {layer} again" in self._seconds:  # there checkpointing stops: nobody needs the adapter's output
                self._seconds[f"ffn {layer} again"] += self._seconds[f"adapter {layer} again"]
        self.in_backward = False
        self.launch = LaunchTimes()
        """What the thread that launches works, task by task."""
        self._launching_since = time.perf_counter()

    def give(self, name: str) -> None:
        """To the compute stream; a layer's forward is within backward a recompute."""
        again = self._seconds.get(f"{name} again") if self.in_backward else None
        self._compute.take(again if again is not None else self._seconds.get(name, 0.0), since=self._launching_since)
        self._launching_since = time.perf_counter()

    def computed(self, name: str) -> None:
        """See :class:`meft.runtime.device.timeline.LaneClock`."""
        self.launch.note(name)
        if name == "head and loss" or not name.startswith(("adapter backward", "head and loss")):
            self.give(name)
        if name == "head and loss":
            self.in_backward = True
        elif name == "backward 0":
            self.in_backward = False
        super().computed(name)

    def resume(self) -> None:
        """See :class:`meft.runtime.device.timeline.LaneClock`."""
        super().resume()
        self._launching_since = time.perf_counter()


class TimedEngine(TransferEngine):
    """Counts the bytes of the small model; a copy takes as long as the plan's model's would."""

    plan: Plan
    link: LinkProfile
    clock: TimedClock
    is_duplex: dict[Direction, bool]
    """Of each direction's copies under way: both are busy in a backward that fetches rows again."""

    def copies(self, direction: Direction, parts: Sequence[Part], **options: Any) -> Copy:
        """See :class:`TransferEngine`."""
        duplex = self.clock.in_backward and self.plan.decision.rows_in_backward == "refetched"

        def noted(views: Views) -> tuple[torch.Tensor, torch.Tensor]:
            self.is_duplex[direction] = duplex
            return views()

        return super().copies(direction, [Part(each.category, partial(noted, each.views)) for each in parts], **options)

    def seconds(self, pair: Pair, direction: Direction) -> float:
        """Of a copy of what ``pair`` stands for."""
        duplex = "duplex_" if self.is_duplex[direction] else ""
        rate = getattr(self.link, f"{duplex}{direction}_bytes_per_second").value
        latency = self.link.latency_seconds.value
        return float(copy_seconds(self.num_bytes(pair.source, pair.category), rate=rate, latency=latency))

    def num_bytes(self, source: torch.Tensor, category: str) -> int:
        """Of what ``source`` stands for: active rows ``[A, 2D]``, a router's gradients ``[N, D]``, or what the step's
        tokens have."""
        request = self.plan.request
        if category == "router_gradients":
            return source.numel() * source.element_size() * request.model.hidden_size // HIDDEN_SIZE
        if category in OF_ROWS:
            return source.shape[0] * 2 * request.model.hidden_size * ADAPTER_DTYPE_BYTES[request.adapter_dtype]
        if category == "queries":
            return request.tokens_per_step * request.model.hidden_size * COMPUTE_DTYPE_BYTES[request.weights_dtype]
        own_tokens = request.batch_size * TOKENS_PER_SEQUENCE
        scale = request.tokens_per_step // own_tokens if source.dim() == 2 else 1
        return source.numel() * source.element_size() * scale

    def _start(self, pair: Pair, direction: Direction) -> None:
        stream: TimedStream = self._streams[direction]
        stream.take(self.seconds(pair, direction))
        if pair.source.numel() <= SCALARS or not pair.source.is_floating_point():
            pair.target.copy_(pair.source)  # numbers that Python looks at, and indices


class TimedKernels(HostKernels):
    """The host's kernels for the plan's model: they sleep as long as the profile says, less Python's share."""

    def __init__(self, plan: Plan, host: HostProfile) -> None:
        super().__init__(num_threads=1)
        self.plan, self.host = plan, _without_python(host)
        self.sizes = {"hidden_size": plan.request.model.hidden_size}
        self.row = self.sizes | {"adapter_dtype_bytes": ADAPTER_DTYPE_BYTES[plan.request.adapter_dtype]}
        self.copied = plan.decision.bf16_copy and plan.request.adapter_dtype == "bf16"
        self.active = torch.empty(0, dtype=torch.int64)
        self.slept_seconds = 0.0
        self.most_touched = max(plan.prediction.sparsity.window_active_rows_per_layer) // plan.request.gpus

    def gather(self, table: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`HostKernels`."""
        del table, out
        self._sleep(gather_seconds(self.host, active_rows=rows.shape[0], bf16_copy=self.copied, **self.row))

    def accumulate(
        self, sums: torch.Tensor, touched: torch.Tensor, rows: torch.Tensor, gradients: torch.Tensor
    ) -> None:
        """See :class:`HostKernels`."""
        del sums, gradients
        touched.numpy()[rows.numpy()] = True
        self._sleep(accumulate_seconds(self.host, active_rows=rows.shape[0], **self.row))

    def squared_norm(self, sums: torch.Tensor, rows: torch.Tensor) -> float:
        """See :class:`HostKernels`; the plan has no time of its own for it."""
        del sums, rows
        return 1.0

    def adamw(self, *tables: torch.Tensor, **settings: Any) -> None:
        """See :class:`HostKernels`."""
        del settings
        rows = min(tables[-1].shape[0], self.most_touched)
        self._sleep(adamw_seconds(self.host, rows=rows, bf16_copy=self.copied, **self.sizes))

    def probed_scores(
        self, keys: torch.Tensor, queries: torch.Tensor, probes: torch.Tensor, *, num_experts: int
    ) -> torch.Tensor:
        """See :class:`HostKernels`; its time is with that of :meth:`top_rows`."""
        del keys, num_experts
        return torch.empty(queries.shape[0], probes.shape[1])

    def top_rows(
        self, scores: torch.Tensor, experts: torch.Tensor, *, rows_per_expert: int, top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`HostKernels`; as long as all of routing."""
        del experts, rows_per_expert, top_k
        tokens, decision = self.plan.request.tokens_per_step, self.plan.decision
        scored = decision.num_probes * (decision.adapter_width // decision.num_experts)
        self._sleep(route_seconds(self.host, tokens=tokens, scored_rows=scored, visited_experts=0, **self.sizes))
        return scores, torch.empty(0, dtype=torch.int64)

    def union(self, best: torch.Tensor, rows: torch.Tensor, *, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`HostKernels`: as many rows as the plan expects."""
        del best, rows, num_rows
        return self.active, torch.empty(0)

    def _sleep(self, seconds: Any) -> None:
        self.slept_seconds += float(seconds)
        sleep_until(time.perf_counter() + float(seconds))


class TimedRouter:
    """The real router on kernels that choose nothing: which rows it finds were drawn beforehand, as many as planned.

    Where rows of a window stay on the device they are drawn from as many as the plan has arrive in a window, so that
    about as many travel.
    """

    def __init__(self, plan: Plan, kernels: TimedKernels, *, seed: int = 0) -> None:
        decision, generator = plan.decision, torch.Generator().manual_seed(seed)
        self._kernels = kernels
        self._real = TopKRouter(decision.top_k, decision.active_rows_cap, decision.num_experts, kernels)
        self._counts = list(zip(plan.prediction.sparsity.active_rows_per_layer, _window_rows(plan), strict=True))
        self._drawn = {
            (count, of): [_draw(count, of, decision.adapter_width, generator) for _ in range(UNIONS)]
            for count, of in set(self._counts)
        }
        self._turns = [0] * len(self._counts)

    def select(self, layer: int, keys: torch.Tensor, queries: torch.Tensor, probes: torch.Tensor | None) -> Selection:
        """See :class:`meft.runtime.host.router.Router`."""
        self._turns[layer] += 1
        self._kernels.active = self._drawn[self._counts[layer]][self._turns[layer] % UNIONS]
        return self._real.select(layer, keys, queries, probes)


def _window_rows(plan: Plan) -> list[int]:
    """Per layer, of how many rows a rank's micro-batches of a window have theirs."""
    decision, sparsity = plan.decision, plan.prediction.sparsity
    if not decision.cached_rows:
        return [decision.adapter_width] * plan.request.model.num_layers
    arriving = [rows * plan.request.rounds for rows in sparsity.missing_rows_per_layer]
    return [
        min(max(active, rows), decision.adapter_width)
        for active, rows in zip(sparsity.active_rows_per_layer, arriving, strict=True)
    ]


def _draw(count: int, of: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` rows, ascending, of ``of`` that are spread over all ``width``."""
    rows = torch.randperm(of, generator=generator)[:count].sort().values
    return rows * width // of


@contextmanager
def timed_session(
    plan: Plan, profiles: ProfileSet, schedule: Schedule, *, keep: bool = False, peers: Peers | None = None
) -> Iterator[Session]:
    """A session of a plan of a real card on the timed device; ``keep`` keeps all tasks. With ``peers`` it is one of as
    many ranks as the plan has cards."""
    sharpen_timers()
    _, link, host = shared_rates(plan.request, profiles.gpu, profiles.link, profiles.host)
    device, kernels = TimedDevice(), TimedKernels(plan, host)
    clock = TimedClock(plan, profiles, device.streams.compute, keep=keep)
    small = narrowed(plan, hidden_size=HIDDEN_SIZE, vocab_size=VOCABULARY, seq_len=TOKENS_PER_SEQUENCE)
    with ExitStack() as stack:
        stack.enter_context(unpacked_sequences())
        stack.enter_context(mock.patch.object(session_module, "HostKernels", return_value=kernels))
        stack.enter_context(mock.patch.object(session_module, "TransferEngine", TimedEngine))
        router = TimedRouter(plan, kernels, seed=0 if peers is None else peers.rank)
        session = open_session(
            small, llama_of(small), device, seed=0, around=lambda _: router, schedule=schedule, clock=clock, peers=peers
        )
        stack.enter_context(closing(session))
        engine = session.engine
        assert isinstance(engine, TimedEngine)
        engine.link, engine.plan, engine.clock, engine.is_duplex = link, plan, clock, {}
        _give_backward_first(session, clock)
        yield session


def small_batch(plan: Plan) -> Batch:
    """A micro-batch for the model that stands for the plan's."""
    ids = torch.arange(plan.request.batch_size * TOKENS_PER_SEQUENCE).view(plan.request.batch_size, -1) % VOCABULARY
    return Batch(ids, ids.clone(), torch.ones_like(ids))


def _give_backward_first(session: Session, clock: TimedClock) -> None:
    """The adapter's backward is computed when its gradients leave, which is before the exchange says so."""
    send = session.exchange.send_gradients

    def send_gradients(layer: int) -> None:
        clock.give(f"adapter backward {layer}")
        send(layer)

    session.exchange.send_gradients = send_gradients  # type: ignore[method-assign]


def _without_python(host: HostProfile) -> HostProfile:
    """What is Python's is measured here."""
    names = ("overhead_seconds_per_layer", "overhead_seconds_per_expert")
    return host.model_copy(update={name: getattr(host, name).model_copy(update={"value": 0.0}) for name in names})
