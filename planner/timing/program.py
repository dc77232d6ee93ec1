"""The runtime's program of one step on its lanes, simulated. What each task costs:
:mod:`meft.planner.timing.step`.

Lanes are ``gpu``, ``h2d``, ``d2h`` and ``cpu``, on several machines ``network`` too. Each does its tasks in the order
in which the runtime issues them; a task starts when its lane is free and what it needs is done, so nothing is left to
chance. *Overlapped*, the host's work has a thread of its own; in *sequence* one thread works and launches: a gpu task
issued after host work starts after it. In sequence on the emulated device, every task waits for the one before.
Overlapped there, the lanes are threads that share cores: they run at once, each the slower for it; once
:mod:`meft.planner.check.calibrate` has seen runs, that is in the rates.

Where the host's profile says how long launching takes (:mod:`meft.planner.timing.launching`), the thread that launches
is one more agent, in sequence the one that works for the host. It launches in the order of issue; before an adapter it
waits until its rows' copy is issued, and before it goes backward until that of its gradient buffer's last content is.

Forward, layer ``l`` (``p`` is the prefetch depth): attention; its result, the hidden state at the FFN's entry, leaves
for the host (with the best experts for Key-Experts); the FFN; the adapter, once its rows are there. Layer 0's hidden
state serves layers ``0 .. p``, layer ``l``'s serves layer ``l + p``, the last ``p`` layers send none. A layer's own
rows are chosen and gathered while the device computes the FFN, the rows of later layers at once too, or in sequence
while it computes FFN and adapter. Rows cached on the device are copied there beside those that travelled. A ring slot
is never waited for here: layer ``l + p`` takes that of layer ``l - 1``, done long ago.

Backward, from the last layer down: with checkpointing, the layer's forward again; the adapter's backward, once the
gradient slot it writes to has been emptied (1 slot, or 2 with look-ahead); row gradients to the host, which in sequence
adds them up before it launches anything more; if rows are refetched, those of layer ``l - p - 1`` are gathered and
copied when the slot is free, which is when this layer's adapter is done; the frozen layer's backward. Layer 0's input
needs no gradient, so its frozen part has none. Row gradients and refetched rows leave at the same moment, so where rows
are refetched both directions run at the link's duplex rates; every other copy has the link to itself.

Where the base is sharded over cards, a layer's weights are gathered before it runs, in forward and for its backward
(without checkpointing not for layer 0's), while the one before it is computed; the first and, in backward, the last
wait for theirs. They take both directions at the duplex rates.

After the last micro-batch of an accumulation window the optimizer runs; a step carries its ``1 / grad_accum`` share,
after backward, since clipping needs the whole gradient's norm first. Hot rows are updated on the device, and then
their keys go to the host.

On several machines row gradients go to those that add them up before any are added, and at a window's end the sums go
to all, before the optimizer: a step carries its share of that too.

Times are plain numbers or arrays over candidates: one program serves the search and the final word on its winner.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.quantities import Flags, Floats, Ints
from meft.planner.records.plan import LANES, Lane
from meft.planner.timing.chrome import Event
from meft.planner.timing.launching import LaunchSeconds

# --- lanes -----------------------------------------------------------------------------------------------------------


class Lanes:
    """FIFO lanes. Times are numbers, or arrays with one time per candidate.

    ``serial``: one lane for all. ``host_launches``: gpu tasks wait for the host work issued before them. With
    ``launch`` the thread that launches is an agent too, in sequence the one that does the host's work: a gpu task's
    kernels run as they are launched, so it ends no earlier than its launching; that it starts no earlier follows, as
    the task before has ended by then.
    """

    def __init__(
        self,
        *,
        serial: bool = False,
        host_launches: bool = True,
        launch: LaunchSeconds | None = None,
        events: list[Event] | None = None,
    ) -> None:
        self.busy: dict[Lane, Floats] = dict.fromkeys(LANES, 0.0)
        self._free: dict[Lane, Floats] = dict.fromkeys(LANES, 0.0)
        self._serial = serial
        self._host_launches = host_launches
        self._host_worked = False
        self._launch = launch
        self._launched: Floats = 0.0
        self._events = events

    def run(
        self, lane: Lane, name: str, seconds: Floats, *after: Floats, known: Floats = 0.0, done: Flags = True
    ) -> Floats:
        """Do a task on ``lane`` once the lane is free and every time in ``after`` has passed; returns when it ends.

        A gpu task cannot be launched before ``known``; it is ``done``, or takes no time.
        """
        if done is not True:
            seconds = seconds * done
        if lane == "gpu" and self._host_launches and self._host_worked:
            after = (*after, self._free["cpu"])
            self._host_worked = False
        queue: Lane = "cpu" if self._serial else lane
        start = self._free.get(queue, 0.0)
        for time in after:
            start = np.maximum(start, time)
        end = start + seconds
        if lane == "gpu" and self._launch is not None:
            end = np.maximum(end, self._launches(self._launch.seconds_of(name) * done, known))
        self._free[queue] = end
        self.busy[lane] = self.busy.get(lane, 0.0) + seconds
        self._host_worked |= lane == "cpu"
        if self._events is not None:
            self._events.append(Event(lane, name, float(start), float(end)))
        return end

    def _launches(self, seconds: Floats, known: Floats) -> Floats:
        """When the thread has launched a task; in sequence it works for the host, too."""
        self._launched = np.maximum(self._free["cpu"] if self._host_launches else self._launched, known) + seconds
        if self._host_launches:
            self._free["cpu"] = self._launched
        return self._launched

    def end_seconds(self) -> Floats:
        """When the last lane falls idle."""
        end: Floats = 0.0
        for free in self._free.values():
            end = np.maximum(end, free)
        return end


def overlapped_seconds(gather: Floats, copy: Floats, *, chunks: Ints) -> Floats:
    """How long before all is gathered a copy can begin that goes in ``chunks`` equal parts, as if it went in one.

    Part ``i`` is copied once it is gathered and the part before has been, so the last arrives a part's copy after all
    is gathered, or all copies after the first part is, whichever is later.
    """
    return (1 - 1 / chunks) * np.minimum(gather, copy)


# --- the program -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class _Seconds:
    """Seconds of tasks, each a number or an array over candidates.

    Fields in ``PER_LAYER`` depend on the layer's active rows and have the layer as first axis: ``L`` long, or 1 where
    every layer is alike.
    """

    PER_LAYER: ClassVar[frozenset[str]] = frozenset()

    def take(self, candidates: NDArray[np.int64]) -> Self:
        """The seconds of these candidates alone."""

        def taken(name: str, seconds: Floats) -> Floats:
            layer_axes = 1 if name in self.PER_LAYER else 0
            varies = isinstance(seconds, np.ndarray) and seconds.ndim > layer_axes
            return seconds[..., candidates] if isinstance(seconds, np.ndarray) and varies else seconds

        return replace(self, **{each.name: taken(each.name, getattr(self, each.name)) for each in fields(self)})


def _nothing() -> NDArray[np.float64]:
    """No seconds, whatever the layer."""
    return np.zeros(1)


@dataclass(frozen=True, eq=False, repr=False)
class GpuSeconds(_Seconds):
    """Tasks of the gpu lane. One layer's, but for the embedding, the head with the loss, and the optimizer's share."""

    PER_LAYER: ClassVar = frozenset(
        ("adapter_forward", "adapter_backward", "assemble", "sum_gradients", "activate_again")
    )

    embedding: Floats
    attention: Floats
    router: Floats
    ffn: Floats
    adapter_forward: NDArray[np.float64]
    loss_head: Floats
    adapter_backward: NDArray[np.float64]
    frozen_backward: Floats
    router_adamw: Floats
    assemble: NDArray[np.float64] = field(default_factory=_nothing)
    """Cached rows: bringing those on the device and those that travelled together."""
    sum_gradients: NDArray[np.float64] = field(default_factory=_nothing)
    """Adding row gradients to their sums on the device."""
    activate_again: NDArray[np.float64] = field(default_factory=_nothing)
    """Token chunks: a chunk's activations once more in backward."""
    hot_adamw: Floats | None = None
    """A step's share; None where no rows are hot."""
    unpack: Floats | None = None
    """Sharded base: a layer's weights copied into the buffer and out of it; None where each card has all."""


@dataclass(frozen=True, eq=False, repr=False)
class LinkSeconds(_Seconds):
    """Copies, of both directions, and between machines; ``router_norm``, ``hot_keys`` and sums of row gradients are a
    step's share."""

    PER_LAYER: ClassVar = frozenset(("rows", "rows_refetched", "row_gradients", "exchange"))

    inputs: Floats
    queries: Floats
    probes: Floats
    rows: NDArray[np.float64]
    """With the row's experts for Key-Experts."""
    loss: Floats
    rows_refetched: NDArray[np.float64]
    row_gradients: NDArray[np.float64]
    router_norm: Floats
    hot_keys: Floats = 0.0
    chunks: Ints = 1
    """Copies that :attr:`rows` are."""
    exchange: NDArray[np.float64] | None = None
    """Row gradients to the machines that add them up; None for one machine."""
    sums: Floats = 0.0
    """Between machines, a step's share of what a window's end costs."""
    weights: Floats = 0.0
    """Sharded base: one layer's weights from the other cards, and at once this card's part of them to those."""
    weights_sent: Floats = 0.0


@dataclass(frozen=True, eq=False, repr=False)
class HostSeconds(_Seconds):
    """Tasks of the cpu lane; ``adamw`` and ``hot_keys`` are a step's share."""

    PER_LAYER: ClassVar = frozenset(("gather", "accumulate", "gather_again"))

    route: Floats
    gather: NDArray[np.float64]
    accumulate: NDArray[np.float64]
    adamw: Floats
    gather_again: NDArray[np.float64] | None = None
    """In backward, where it is not what :attr:`gather` is."""
    hot_keys: Floats = 0.0


@dataclass(frozen=True, eq=False, repr=False)
class StepCosts:
    """Seconds of every task of a step."""

    gpu: GpuSeconds
    link: LinkSeconds
    host: HostSeconds
    token_chunks: int = 1
    """Parts of the tokens that rows come for one after the other: tasks of rows and of the adapter are one part's."""
    launch: LaunchSeconds | None = None
    """Of one layer's tasks; None where it is not known."""

    def take(self, candidates: NDArray[np.int64]) -> StepCosts:
        """The costs of these candidates alone."""
        lanes = (self.gpu.take(candidates), self.link.take(candidates), self.host.take(candidates))
        return StepCosts(*lanes, token_chunks=self.token_chunks, launch=self.launch)


@dataclass(frozen=True, eq=False, repr=False)
class StepTime:
    """Length of a step and how long each lane works in it."""

    step_seconds: Floats
    busy_seconds: dict[Lane, Floats]


class Program:
    """Issues a micro-batch's tasks in the runtime's order."""

    def __init__(
        self,
        costs: StepCosts,
        lanes: Lanes,
        *,
        num_layers: int,
        prefetch_depth: int,
        checkpointing: Flags,
        refetched: Flags,
        overlapped: bool,
    ) -> None:
        self.overlapped = overlapped
        self.gpu, self.link, self.host = costs.gpu, costs.link, costs.host
        self.run = lanes.run
        self.num_layers = num_layers
        self.depth = min(prefetch_depth, num_layers - 1)
        self.checkpointing = checkpointing
        self.refetched = refetched
        self.adapter_forward = self._by_layer(costs.gpu.adapter_forward)
        self.adapter_backward = self._by_layer(costs.gpu.adapter_backward)
        self.rows = self._by_layer(costs.link.rows)
        self.rows_refetched = self._by_layer(costs.link.rows_refetched)
        self.row_gradients = self._by_layer(costs.link.row_gradients)
        self.in_parts = bool(np.any(np.asarray(costs.link.chunks) > 1))
        self.gather = self._by_layer(costs.host.gather)
        self.accumulate = self._by_layer(costs.host.accumulate)
        again = costs.host.gather if costs.host.gather_again is None else costs.host.gather_again
        self.gather_again = self._by_layer(again)
        self.assemble = self._by_layer(costs.gpu.assemble)
        self.sum_gradients = self._by_layer(costs.gpu.sum_gradients)
        self.exchange = None if costs.link.exchange is None else self._by_layer(costs.link.exchange)
        self.all_added: Floats = 0.0
        """When backward's last gradients are added up."""
        self.rows_there: list[Floats] = [0.0] * num_layers
        """When each layer's rows are on the device."""
        self.sent: list[Floats] = [0.0] * num_layers
        """When their copy is issued, which whoever launches the adapter waits for."""
        self.coming: dict[int, Floats] = {}
        """When the weights of layers that are being gathered are there."""

    def _by_layer(self, seconds: NDArray[np.float64]) -> list[Floats]:
        return list(seconds) if len(seconds) == self.num_layers else [seconds[0]] * self.num_layers

    def step(self) -> None:
        """All of it."""
        inputs = self.run("h2d", "inputs", self.link.inputs)
        embedded = self.run("gpu", "embedding", self.gpu.embedding, inputs)
        self.gather_weights(0, embedded)
        for layer in range(self.num_layers):
            self.forward(layer)
        loss = self.run("gpu", "head and loss", self.gpu.loss_head)
        self.run("d2h", "loss", self.link.loss, loss)
        self.gather_weights(self.num_layers - 1, loss, again=True)
        backward_done = self.backward()
        self.optimizer_share(backward_done)

    def forward(self, layer: int) -> None:
        """One layer, and the choice of rows that its hidden state serves."""
        self.unpack_weights(layer, layer + 1)
        last = min(layer + self.depth, self.num_layers - 1)
        targets = range(0 if layer == 0 else layer + self.depth, last + 1)
        hidden = self.run("gpu", f"attention {layer}", self.gpu.attention)
        arrived = self.send_queries(layer, targets, hidden)
        if self.overlapped:
            for target in targets:
                self.fetch(target, arrived[target])
        self.run("gpu", f"ffn {layer}", self.gpu.ffn)
        if not self.overlapped and layer in targets:
            self.fetch(layer, arrived[layer])
        seconds = self.adapter_forward[layer] + self.assemble[layer]
        self.run("gpu", f"adapter {layer}", seconds, self.rows_there[layer], known=self.sent[layer])
        for target in targets:
            if not self.overlapped and target != layer:
                self.fetch(target, arrived[target])

    def gather_weights(self, layer: int, begins: Floats, *, again: bool = False) -> None:
        """A sharded base: bring a layer's weights, if there is one, for its forward or, ``again``, its backward."""
        if self.gpu.unpack is None or not 0 <= layer < self.num_layers:
            return
        name, done = f"weights {layer}{' again' * again}", self.needs_weights(layer, again=again)
        came = self.run("h2d", name, self.link.weights * done, begins)
        sent = self.run("d2h", name, self.link.weights_sent * done, begins)
        self.coming[layer] = np.maximum(came, sent)

    def unpack_weights(self, layer: int, following: int, *, again: bool = False) -> None:
        """The layer's weights are wanted; those of the ``following`` are on their way from then on."""
        if self.gpu.unpack is not None:
            name, done = f"unpack {layer}{' again' * again}", self.needs_weights(layer, again=again)
            begins = self.run("gpu", name, self.gpu.unpack * done, self.coming.pop(layer))
            self.gather_weights(following, begins, again=again)

    def needs_weights(self, layer: int, *, again: bool) -> Flags:
        """All but layer 0 in backward, which it has with checkpointing alone: else its input needs no gradient."""
        return self.checkpointing if again and layer == 0 else True

    def send_queries(self, layer: int, targets: range, hidden: Floats) -> dict[int, Floats]:
        """Hidden state and probes to the host; returns when the host has what it needs for each target."""
        if not targets:
            return {}
        scored = {target: self.run("gpu", f"router {target}", self.gpu.router) for target in targets}
        self.run("d2h", f"queries {layer}", self.link.queries, hidden)
        return {target: self.run("d2h", f"probes {target}", self.link.probes, scored[target]) for target in targets}

    def fetch(self, layer: int, arrived: Floats) -> None:
        """Choose a layer's rows on the host, gather them and send them."""
        self.run("cpu", f"route {layer}", self.host.route, arrived)
        gathered = self.run("cpu", f"gather {layer}", self.gather[layer])
        if self.in_parts:
            gathered = gathered - overlapped_seconds(self.gather[layer], self.rows[layer], chunks=self.link.chunks)
        self.sent[layer] = gathered
        self.rows_there[layer] = self.run("h2d", f"rows {layer}", self.rows[layer], gathered)

    def backward(self) -> Floats:
        """Every layer from the last down, then the gradients still on their way; returns when the gpu is done.

        A gradient buffer is free once its last content has left and, in sequence, was added up; overlapped, only the
        next copy waits for that.
        """
        slots = min(self.depth, 1) + 1
        done: Floats = 0.0
        arrived: dict[int, Floats] = {}
        left: dict[int, Floats] = {}
        added: dict[int, Floats] = {}
        for layer in reversed(range(self.num_layers)):
            self.unpack_weights(layer, layer - 1, again=True)
            self.recompute(layer)
            emptied = (left if self.overlapped else added).get(layer + slots, 0.0)
            seconds = self.adapter_backward[layer] + self.sum_gradients[layer]
            if np.any(self.refetched):
                seconds = seconds + self.assemble[layer] * self.refetched
            known = np.maximum(self.sent[layer], added.get(layer + 2 * slots, 0.0))
            done = self.run("gpu", f"adapter backward {layer}", seconds, self.rows_there[layer], emptied, known=known)
            if self.overlapped:
                added[layer + 1] = self.accumulate_gradients(layer + 1, arrived)
            landing_free = added.get(layer + slots, 0.0)
            copied = self.run("d2h", f"row gradients {layer}", self.row_gradients[layer], done, landing_free)
            arrived[layer] = left[layer] = copied
            if not self.overlapped:
                added[layer] = self.accumulate_gradients(layer, arrived)
            self.refetch(layer - self.depth - 1, done)
            if layer:
                self.run("gpu", f"backward {layer}", self.gpu.frozen_backward)
        for layer in sorted(arrived, reverse=True):
            self.all_added = self.accumulate_gradients(layer, arrived)
        return done

    def recompute(self, layer: int) -> None:
        """The layer's forward again, if its activations were not kept; its rows are known."""
        if np.any(self.checkpointing):
            done = self.checkpointing  # in no time by those that do not
            self.run("gpu", f"attention {layer} again", self.gpu.attention, done=done)
            self.run("gpu", f"ffn {layer} again", self.gpu.ffn, done=done)
            there, sent = self.rows_there[layer], self.sent[layer]
            self.run("gpu", f"adapter {layer} again", self.adapter_forward[layer], there, known=sent * done, done=done)

    def accumulate_gradients(self, layer: int, arrived: dict[int, Floats]) -> Floats:
        """Add the layer's row gradients to the window's sum on the host, if there are any; returns when it is done."""
        if layer not in arrived:
            return 0.0
        there = arrived.pop(layer)
        if self.exchange is not None:
            there = self.run("network", f"exchange gradients {layer}", self.exchange[layer], there)
        return self.run("cpu", f"accumulate {layer}", self.accumulate[layer], there)

    def refetch(self, layer: int, slot_free: Floats) -> None:
        """Send the rows of a layer that left the ring once more."""
        if np.any(self.refetched) and layer >= 0:
            done = self.refetched  # in no time by those that retain them, whose rows are there as they were
            gathered = self.run("cpu", f"gather {layer} again", self.gather_again[layer] * done)
            landed = self.run("h2d", f"rows {layer} again", self.rows_refetched[layer] * done, gathered, slot_free)
            self.rows_there[layer] = np.where(done, landed, self.rows_there[layer])
            self.sent[layer] = np.where(done, gathered, self.sent[layer])

    def optimizer_share(self, backward_done: Floats) -> None:
        """This step's share of the window's optimizer step."""
        norm = self.run("d2h", "router norm", self.link.router_norm, backward_done)
        shared: Floats = 0.0
        if self.exchange is not None:
            shared = self.run("network", "exchange sums", self.link.sums, self.all_added)
        self.run("cpu", "adamw", self.host.adamw, norm, shared)
        self.run("gpu", "router adamw", self.gpu.router_adamw)
        if self.gpu.hot_adamw is not None:
            updated = self.run("gpu", "hot adamw", self.gpu.hot_adamw)
            keys = self.run("d2h", "hot keys", self.link.hot_keys, updated)
            self.run("cpu", "hot keys", self.host.hot_keys, keys)
