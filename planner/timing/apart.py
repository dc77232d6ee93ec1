"""Step seconds of many candidates at once, forward and backward apart, and layers that repeat each other skipped.

The same tasks, lanes and order as the program of :mod:`meft.planner.timing.program`, which is the one to read; this one
adds in another order, so its seconds agree with that one's to within rounding (:data:`WITHIN`), not to the bit. Three
things make it quick:

* When forward ends, every lane is idle: the gpu waited for the last layer's rows, and those for all that the other
  lanes had to do. So backward takes as long as if it began with empty lanes, and the seconds of the two add up.
  Backward knows nothing of probes, forward nothing of checkpointing and of rows fetched again.
* Where layers are alike, each moves the lanes on by the same function, of maxima and sums. Once a layer (or as many as
  it takes for a slot to come round) moved all lanes on by one and the same time, so do all that follow.
* Nothing is kept but the times that later tasks wait for.

One task may start before backward does: the first gather of rows that are fetched again, which waits for nothing. It
is taken to start as late as it may; where that could show, the seconds are *doubtful*.

Seconds of tasks are numbers, ``[n]`` over candidates, or ``[L, n]`` by layer (``[1, n]`` where layers are alike).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from typing import Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.quantities import Floats
from meft.planner.timing.program import StepCosts

Seconds: TypeAlias = NDArray[np.float64]
State: TypeAlias = list[Seconds]
"""Times ``[n]`` that the next layers wait for, the gpu's first."""

T = TypeVar("T", bound="_Tasks")
_Layer: TypeAlias = Callable[[T, State, int], State]
"""What a layer does to a state: with its tasks, from the state before it, and its number."""

WITHIN = 1e-9
"""Relative difference from the program's seconds that is allowed for; rounding, and layers taken to repeat each other,
make less than a hundredth of it."""
EVEN = 1e-13
"""Lanes move on alike if their times differ by no more than this share of the time that has passed."""
CHUNK = 8192
"""Candidates at a time: 64 KiB per array."""


@dataclass(frozen=True, eq=False, repr=False)
class _Tasks(ABC):
    """Seconds of tasks."""

    @property
    @abstractmethod
    def by_layer(self) -> Seconds:
        """Some task's seconds ``[L, n]``; all have as many layers."""

    @property
    def count(self) -> int:
        """``n``."""
        return int(self.by_layer.shape[-1])

    @property
    def alike(self) -> bool:
        """Whether one layer is as all."""
        return len(self.by_layer) == 1

    def take(self, candidates: NDArray[np.int64] | slice) -> Self:
        """Those of some candidates."""
        taken = {
            each.name: value[..., candidates] if isinstance(candidates, slice) else value.take(candidates, axis=-1)
            for each in fields(self)
            if isinstance(value := getattr(self, each.name), np.ndarray)
        }
        return replace(self, **taken)


@dataclass(frozen=True, eq=False, repr=False)
class Forward(_Tasks):
    """What forward is made of, with the embedding before it."""

    start: float
    attention: float
    ffn: float
    queries: float
    router: Seconds
    probes: Seconds
    adapter: Seconds
    """``[L, n]``, with the rows' assembly."""
    host: Seconds
    """``[L, n]``: routing and gathering."""
    rows: Seconds
    """``[L, n]``."""

    @property
    def by_layer(self) -> Seconds:
        """Rows'."""
        return self.rows


@dataclass(frozen=True, eq=False, repr=False)
class Backward(_Tasks):
    """What follows forward: head and loss, backward, and the step's share of the optimizer."""

    head: float
    loss: float
    frozen_forward: float
    """Attention and FFN again, with checkpointing."""
    adapter_forward: Seconds
    """``[L, n]``, again."""
    adapter_backward: Seconds
    """``[L, n]``, with what else the device does then."""
    frozen_backward: float
    row_gradients: Seconds
    """``[L, n]``."""
    accumulate: Seconds
    """``[L, n]``."""
    gather_again: Seconds
    """``[L, n]``."""
    rows_again: Seconds
    """``[L, n]``."""
    idle_before: Seconds
    """Least time from the host's last gather to the end of the head, ``[n]``."""
    exchange: Seconds | None
    """``[L, n]``, between machines; None for one."""
    sums: Floats
    router_norm: Floats
    adamw: Floats
    router_adamw: Floats
    hot_adamw: Floats | None
    """None where no rows are hot."""
    hot_keys: Floats
    """Sending the hot rows' keys, and below writing them."""
    hot_written: Floats

    @property
    def by_layer(self) -> Seconds:
        """Accumulation's."""
        return self.accumulate


def forward_tasks(costs: StepCosts) -> Forward:
    """Forward's part of a step's costs, whose arrays are all ``[n]`` or ``[L, n]``."""
    gpu, link, host = costs.gpu, costs.link, costs.host
    return Forward(
        start=float(link.inputs + gpu.embedding),
        attention=float(gpu.attention),
        ffn=float(gpu.ffn),
        queries=float(link.queries),
        router=np.asarray(gpu.router),
        probes=np.asarray(link.probes),
        adapter=gpu.adapter_forward + gpu.assemble,
        host=host.route + host.gather,
        rows=link.rows,
    )


def backward_tasks(costs: StepCosts, *, refetched: bool) -> Backward:
    """Backward's part of a step's costs, whose arrays are all ``[n]`` or ``[L, n]``."""
    gpu, link, host = costs.gpu, costs.link, costs.host
    adapter = gpu.adapter_backward + gpu.sum_gradients
    head = float(gpu.loss_head)
    return Backward(
        head=head,
        loss=float(link.loss),
        frozen_forward=float(gpu.attention + gpu.ffn),
        adapter_forward=gpu.adapter_forward,
        adapter_backward=adapter + gpu.assemble if refetched else adapter,
        frozen_backward=float(gpu.frozen_backward),
        row_gradients=link.row_gradients,
        accumulate=host.accumulate,
        gather_again=host.gather if host.gather_again is None else host.gather_again,
        rows_again=link.rows_refetched,
        idle_before=link.rows[-1] + gpu.adapter_forward[-1] + head,
        exchange=link.exchange,
        sums=link.sums,
        router_norm=link.router_norm,
        adamw=host.adamw,
        router_adamw=gpu.router_adamw,
        hot_adamw=gpu.hot_adamw,
        hot_keys=link.hot_keys,
        hot_written=host.hot_keys,
    )


def _of(seconds: Seconds, layer: int) -> Seconds:
    """A layer's."""
    of_layer: Seconds = seconds[layer if len(seconds) > 1 else 0]
    return of_layer


# --- layers that repeat each other -----------------------------------------------------------------------------------


def _repeated(
    layer_of: _Layer[T], tasks: T, state: State, layers: Sequence[int], *, period: int, first_look: bool = True
) -> State:
    """The state after these layers, each of which does the same to it: run until one, or ``period`` of them, moved all
    times on alike, and then taken on by that for all that are left; the candidates that this is not true of go on."""
    look = period + 1 if first_look else 2 * period + 1 + (len(layers) - 1) % period
    if not tasks.alike or look >= len(layers):
        return reduce(lambda before, layer: layer_of(tasks, before, layer), layers, state)
    past = [state]
    for layer in layers[:look]:
        past.append(layer_of(tasks, past[-1], layer))
    now, left = past[-1], len(layers) - look
    after, even = _taken_on(now, past[-2], times=left)
    going_on = np.flatnonzero(~even)
    if len(going_on) and not first_look and period > 1:
        before = past[-1 - period]
        found, even = _taken_on(_some(now, going_on), _some(before, going_on), times=left // period)
        _put(after, going_on, found)
        going_on = going_on[~even]
    if len(going_on):
        rest, kept = _some(now, going_on), tasks.take(going_on)
        rest = _repeated(layer_of, kept, rest, layers[look:], period=period, first_look=False)
        _put(after, going_on, rest)
    return after


def _taken_on(now: State, before: State, *, times: int) -> tuple[State, NDArray[np.bool_]]:
    """The state when the time from ``before`` has passed some ``times`` more; and where it is true: all lanes moved on
    alike."""
    moved = [later - earlier for later, earlier in zip(now, before, strict=True)]
    even = reduce(np.maximum, moved) - reduce(np.minimum, moved) <= EVEN * now[0]
    by = times * moved[0]
    return [later + by for later in now], even


def _some(state: State, candidates: NDArray[np.int64]) -> State:
    return [times.take(candidates) for times in state]


def _put(state: State, candidates: NDArray[np.int64], found: State) -> None:
    for times, those in zip(state, found, strict=True):
        times[candidates] = those


# --- forward ---------------------------------------------------------------------------------------------------------


def forward_seconds(tasks: Forward, *, num_layers: int, prefetch_depth: int) -> Seconds:
    """When the last layer's forward is done, ``[n]``."""
    depth = min(prefetch_depth, num_layers - 1)
    return _in_chunks(tasks, partial(_forward_chunk, num_layers=num_layers, depth=depth))


def _forward_chunk(tasks: Forward, *, num_layers: int, depth: int) -> Seconds:
    count = tasks.count
    if depth == 0:
        start = [np.full(count, tasks.start)]
        return _repeated(_forward_layer_at_once, tasks, start, range(num_layers), period=1)[0]
    state = _first_forward_layer(tasks, depth)
    layer_of = partial(_forward_layer, depth=depth)
    gpu, _, _, *rows = _repeated(layer_of, tasks, state, range(1, num_layers - depth), period=depth + 1)
    for layer, arrived in enumerate(rows, start=num_layers - depth):
        gpu = np.maximum(gpu + (tasks.attention + tasks.ffn), arrived) + _of(tasks.adapter, layer)
    return gpu


def _forward_layer_at_once(tasks: Forward, state: State, layer: int) -> State:
    """Without look-ahead; the state is the gpu's time alone: the other lanes are idle when a layer begins."""
    hidden = state[0] + tasks.attention
    scored = hidden + tasks.router
    arrived = np.maximum(hidden + tasks.queries, scored) + tasks.probes
    rows = arrived + _of(tasks.host, layer) + _of(tasks.rows, layer)
    return [np.maximum(scored + tasks.ffn, rows) + _of(tasks.adapter, layer)]


def _first_forward_layer(tasks: Forward, depth: int) -> State:
    """Layer 0, whose hidden state serves the first ``depth + 1`` layers."""
    hidden = tasks.start + tasks.attention
    gpu, sent = hidden + np.zeros(tasks.count), np.asarray(hidden + tasks.queries)
    host = landed = np.zeros(1)
    rows = []
    for layer in range(depth + 1):
        gpu = gpu + tasks.router
        sent = np.maximum(sent, gpu) + tasks.probes
        host = np.maximum(host, sent) + _of(tasks.host, layer)
        landed = np.maximum(landed, host) + _of(tasks.rows, layer)
        rows.append(landed)
    gpu = np.maximum(gpu + tasks.ffn, rows[0]) + _of(tasks.adapter, 0)
    return [gpu, sent, host, *rows[1:]]


def _forward_layer(tasks: Forward, state: State, layer: int, *, depth: int) -> State:
    """A layer that serves the one ``depth`` further on. The state: gpu, what was sent to the host, the host, and when
    the rows of the next ``depth`` layers arrive."""
    gpu, sent, host, *rows = state
    hidden = gpu + tasks.attention
    scored = hidden + tasks.router
    sent = np.maximum(np.maximum(sent, hidden) + tasks.queries, scored) + tasks.probes
    host = np.maximum(host, sent) + _of(tasks.host, layer + depth)
    landed = np.maximum(rows[-1], host) + _of(tasks.rows, layer + depth)
    gpu = np.maximum(scored + tasks.ffn, rows[0]) + _of(tasks.adapter, layer)
    return [gpu, sent, host, *rows[1:], landed]


# --- backward --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class _BackwardProgram:
    """The discrete choices of backward. The state: gpu, host, the network, when the last ``slots`` row gradients left
    (the latest first), when those before the last were added up (if there are two slots), and when the rows of the next
    ``depth + 1`` layers arrive (if they are fetched again). Of one machine the network is where the host is."""

    depth: int
    checkpointing: bool
    refetched: bool

    @property
    def slots(self) -> int:
        return min(self.depth, 1) + 1

    @property
    def period(self) -> int:
        """Layers until every slot's turn comes again."""
        return math.lcm(self.slots, self.depth + 1) if self.refetched else self.slots

    def layer(self, tasks: Backward, state: State, layer: int, *, fetches: bool = True) -> State:
        """Any but the last of the model, which comes first."""
        gpu, host, network, *times = state
        left, added, rows = times[: self.slots], times[self.slots : 2 * self.slots - 1], times[2 * self.slots - 1 :]
        gpu = self.recomputed(tasks, gpu, rows, layer)
        gpu = np.maximum(gpu, left[-1]) + _of(tasks.adapter_backward, layer)
        there = network = self.crossed(tasks, network, left[0], layer + 1)
        host = np.maximum(host, there) + _of(tasks.accumulate, layer + 1)
        landing_free = added[0] if added else host
        leaves = np.maximum(np.maximum(left[0], gpu), landing_free) + _of(tasks.row_gradients, layer)
        added = [host] if added else []
        if self.refetched:
            host, rows = self.fetched_again(tasks, host, rows, layer, gpu, fetches=fetches)
        network = host if tasks.exchange is None else network
        return [gpu + (tasks.frozen_backward if layer else 0.0), host, network, leaves, *left[:-1], *added, *rows]

    def crossed(self, tasks: Backward, network: Seconds, left: Seconds, layer: int) -> Seconds:
        """When the layer's row gradients are with those that add them up; they ``left`` the device."""
        return left if tasks.exchange is None else np.maximum(network, left) + _of(tasks.exchange, layer)

    def first_layer(self, tasks: Backward, layer: int) -> State:
        """The last of the model: no row gradients are on their way yet, and its rows are there."""
        start = np.zeros(tasks.count)
        rows = [start] * (self.depth + 1) if self.refetched else []
        gpu = self.recomputed(tasks, start, rows, layer) + _of(tasks.adapter_backward, layer)
        leaves = np.maximum(gpu, tasks.loss) + _of(tasks.row_gradients, layer)
        host = -tasks.idle_before
        if self.refetched:
            host, rows = self.fetched_again(tasks, host, rows, layer, gpu, fetches=layer > self.depth)
        none = [start] * (self.slots - 1)
        network = host if tasks.exchange is None else start
        return [gpu + (tasks.frozen_backward if layer else 0.0), host, network, leaves, *none, *none, *rows]

    def recomputed(self, tasks: Backward, gpu: Seconds, rows: State, layer: int) -> Seconds:
        """When the layer is ready to go backward: its forward done again, and its rows there."""
        if self.checkpointing:
            gpu = gpu + tasks.frozen_forward
        gpu = np.maximum(gpu, rows[0]) if rows else gpu
        return gpu + _of(tasks.adapter_forward, layer) if self.checkpointing else gpu

    def fetched_again(
        self, tasks: Backward, host: Seconds, rows: State, layer: int, done: Seconds, *, fetches: bool
    ) -> tuple[Seconds, State]:
        """The host's time and the rows that are to arrive, with those that take the slot of this layer's."""
        if not fetches:
            return host, [*rows[1:], rows[-1]]
        target = layer - self.depth - 1
        host = host + _of(tasks.gather_again, target)
        landed = np.maximum(np.maximum(rows[-1], host), done) + _of(tasks.rows_again, target)
        return host, [*rows[1:], landed]

    def run(self, tasks: Backward, *, num_layers: int) -> Seconds:
        """Seconds from the end of forward to the end of the step, ``[n]``."""
        state = self.first_layer(tasks, num_layers - 1)
        fetching = range(num_layers - 2, self.depth if self.refetched else 0, -1)
        state = _repeated(self.layer, tasks, state, fetching, period=self.period)
        for layer in range(num_layers - 2 - len(fetching), -1, -1):
            state = self.layer(tasks, state, layer, fetches=False)
        gpu, host, network, leaves, *_ = state
        there = self.crossed(tasks, network, leaves, 0)
        host = np.maximum(host, there) + _of(tasks.accumulate, 0)
        return tasks.head + _optimizer(tasks, gpu, host, leaves)


def _optimizer(tasks: Backward, gpu: Seconds, host: Seconds, leaves: Seconds) -> Seconds:
    """When the step's share of the optimizer is done."""
    host = host + tasks.sums
    leaves = np.maximum(leaves, gpu) + tasks.router_norm
    host = np.maximum(host, leaves) + tasks.adamw
    gpu = gpu + tasks.router_adamw
    if tasks.hot_adamw is not None:
        gpu = gpu + tasks.hot_adamw
        leaves = np.maximum(leaves, gpu) + tasks.hot_keys
        host = np.maximum(host, leaves) + tasks.hot_written
    return np.maximum(np.maximum(gpu, leaves), host)


def backward_seconds(
    tasks: Backward, *, num_layers: int, prefetch_depth: int, checkpointing: bool, refetched: bool
) -> Seconds:
    """Seconds from the end of forward to the end of the step, ``[n]``; nan where doubtful."""
    program = _BackwardProgram(min(prefetch_depth, num_layers - 1), checkpointing, refetched)
    seconds = _in_chunks(tasks, partial(program.run, num_layers=num_layers))
    if refetched:
        seconds[_doubtful(tasks, checkpointing=checkpointing)] = np.nan
    return seconds


def _doubtful(tasks: Backward, *, checkpointing: bool) -> NDArray[np.bool_]:
    """Where rows fetched again, were they gathered for the first time earlier than assumed, might arrive earlier."""
    ready = _of(tasks.adapter_backward, -1)
    if checkpointing:
        ready = ready + tasks.frozen_forward + _of(tasks.adapter_forward, -1)
    late: NDArray[np.bool_] = tasks.gather_again.max(axis=0) - tasks.idle_before > ready * (1 - WITHIN)
    return late


# --- bounds ----------------------------------------------------------------------------------------------------------


def least_forward(tasks: Forward, *, num_layers: int) -> Seconds:
    """No forward is shorter, ``[n]``: what the gpu does, what the host does, and what the link brings, with what comes
    before and after each."""
    frozen = num_layers * (tasks.attention + tasks.router + tasks.ffn)
    first, last = tasks.attention + tasks.probes, _of(tasks.adapter, -1)
    host = first + _sum(tasks.host, num_layers) + _of(tasks.rows, -1) + last
    link = first + _of(tasks.host, 0) + _sum(tasks.rows, num_layers) + last
    return tasks.start + np.maximum(frozen + _sum(tasks.adapter, num_layers), np.maximum(host, link))


def least_backward(tasks: Backward, *, num_layers: int, checkpointing: bool) -> Seconds:
    """No backward is shorter, ``[n]``; see :func:`least_forward`. Rows fetched again are left out."""
    adapter = _sum(tasks.adapter_backward, num_layers)
    if checkpointing:
        adapter = adapter + num_layers * tasks.frozen_forward + _sum(tasks.adapter_forward, num_layers)
    gpu = (num_layers - 1) * tasks.frozen_backward + adapter
    first = _of(tasks.adapter_backward, -1)
    host = _of(tasks.row_gradients, -1) + _sum(tasks.accumulate, num_layers)
    link = _sum(tasks.row_gradients, num_layers) + _of(tasks.accumulate, 0)
    return tasks.head + np.maximum(gpu, first + np.maximum(host, link)) + tasks.adamw


def _sum(seconds: Seconds, num_layers: int) -> Seconds:
    """Of all layers."""
    total: Seconds = num_layers * seconds[0] if len(seconds) == 1 else seconds.sum(axis=0)
    return total


def _in_chunks(tasks: T, seconds_of: Callable[[T], Seconds]) -> Seconds:
    """``seconds_of`` on some candidates at a time."""
    count = tasks.count
    parts = [seconds_of(tasks.take(slice(first, first + CHUNK))) for first in range(0, count, CHUNK)]
    return np.concatenate(parts) if parts else np.empty(0)
