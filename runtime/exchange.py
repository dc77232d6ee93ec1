"""The row exchange: which rows are on the device when, and how they and their gradients travel.

One micro-batch goes through it like this (``p`` is the prefetch depth, ``L`` the number of layers):

- Forward. At layer ``j``'s FFN its hidden state goes to the host, which chooses rows for layer ``j + p`` (layer 0's
  hidden state serves layers ``0 .. p``), gathers them and sends them to the ring slot that layer ``j - 1`` has left.
- Backward. The rows are known. The ring still holds the last ``p + 1`` layers; when layer ``l`` is done, its slot takes
  the rows of layer ``l - p - 1``. With ``rows_in_backward = retained`` every layer has its own slot and nothing is
  fetched again.
- Row gradients go to the host as soon as a layer has them and are added to the window's sum there.

With ``cached_rows`` rows that the window has brought stay on the device (:mod:`meft.runtime.row_cache`), and with
``gradients_on_device`` their gradients are summed there and leave once, when the window's last micro-batch is through.

Everything but the device's own computation is a job of a lane (:mod:`meft.runtime.lanes`). Overlapped, rows are routed
while the device computes the FFN; in sequence, after it.

``p = 0`` is exact: a layer's rows come from its own hidden state.

Letters: ``T`` tokens, ``D`` hidden size, ``A`` active rows of a layer, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from meft.planner.allocator import pinned_bytes
from meft.planner.plan import Decision
from meft.runtime.device import Device
from meft.runtime.device_rows import DeviceRows, GradientSlot, Landing
from meft.runtime.engine import COPY_DONE, Copy, TransferEngine
from meft.runtime.host_store import HostStore
from meft.runtime.lanes import LATER, SOON, Job
from meft.runtime.optimizer import AdamWSettings, update_layer
from meft.runtime.router import Router, Selection
from meft.runtime.row_cache import NoCache, Placement, RowCache, WindowCache
from meft.runtime.timeline import LaneClock


@dataclass
class LayerState:
    """What is known of one layer in this micro-batch."""

    route: Job | None = None
    """Gives the :class:`Placement`."""
    probes: torch.Tensor | None = None
    """int32 ``[T, P]`` on the device: the experts that each token probes."""
    went_backward: bool = False

    @property
    def selection(self) -> Placement | None:
        """The layer's active rows, once they are chosen."""
        return None if self.route is None else self.route.result()


@dataclass
class StepCounters:
    """What a micro-batch did, for the report; per layer, but for the dropped rows."""

    active_rows: list[int]
    missing_rows: list[int]
    """Those that were not on the device."""
    overflow_rows: list[int]
    """Those that were not kept there either."""
    dropped_rows: int = 0


@dataclass
class RowExchange:
    """Moves rows to the device and their gradients back, obeying the plan's decision.

    ``router_weights`` are the Key-Experts routers, ``[N, D]`` per layer on the device; empty for exact routing.
    ``cache`` replaces the decision's own (a rehearsal passes one that needs no data).
    """

    device: Device
    engine: TransferEngine
    store: HostStore
    router: Router
    decision: Decision
    adapter_dtype: torch.dtype
    router_weights: list[torch.nn.Parameter]
    cache: RowCache | None = None
    clock: LaneClock | None = None
    counters: StepCounters = field(init=False)

    def __post_init__(self) -> None:
        decision, num_layers = self.decision, self.store.num_layers
        self.schedule = self.engine.schedule
        self.depth = min(decision.prefetch_depth, num_layers - 1)
        self.in_backward = False
        self.closes_window = False
        self.window_open = False
        """Micro-batches have run whose gradients no optimizer step has used."""
        self.after_last_gradients: Callable[[int], None] | None = None
        """Called for each layer of a window's last backward, once the layer's gradients are on their way."""
        if self.cache is None:
            self.cache = _cache_of(decision, num_layers)
        self._on_device = DeviceRows.make(
            self.device,
            decision,
            num_layers=num_layers,
            hidden_size=self.store.hidden_size,
            dtype=self.adapter_dtype,
            sums_dtype=self.store.dtype,
        )
        self._row_staging = [Landing(self._host_rows()) for _ in range(self.depth + 1)]
        self._gradients = [
            GradientSlot(self._on_device.new_rows("row_gradients"), Landing(self._host_rows()))
            for _ in range(min(self.depth, 1) + 1)
        ]
        self._turn = 0
        self._host_buffers: dict[tuple[str, int], Landing] = {}
        self._held: dict[int, torch.Tensor] = {}
        self._accumulated: list[Job | None] = [None] * num_layers
        self._updated: list[Job | None] = [None] * num_layers
        self._sums_sent: set[int] = set()
        self._kept = [0] * num_layers
        self._token_mask: torch.Tensor | None = None
        self._next_token_mask: torch.Tensor | None = None
        self.observer: Callable[[int, torch.Tensor], None] | None = None
        self.layers = [LayerState() for _ in range(num_layers)]
        self.counters = self._new_counters()

    # --- forward -----------------------------------------------------------------------------------------------

    def expect_tokens(self, token_mask: torch.Tensor) -> None:
        """For the next forward only: a host bool ``[T]`` that leaves padding out of the choice of rows."""
        self._next_token_mask = token_mask

    def begin_forward(self) -> None:
        """Open a micro-batch; the model's own forward calls this."""
        self.in_backward = False
        self._token_mask, self._next_token_mask = self._next_token_mask, None
        self._settle_without_backward()
        self.window_open = True
        self.layers = [LayerState() for _ in self.layers]
        self.counters = self._new_counters()
        self._on_device.empty_ring()
        self._resume()

    def before_ffn(self, layer: int, hidden: torch.Tensor) -> None:
        """Send layer ``layer``'s hidden state ``[T, D]`` on its way while the device computes the FFN.

        ``observer(layer, hidden)``, where one is set, sees every hidden state first.
        """
        self._computed(f"attention {layer}")
        if not self.in_backward:
            if self.observer is not None:
                self.observer(layer, hidden)
            targets = self._targets(layer)
            if targets:
                self._send_queries(layer, hidden.detach())
            for target in targets:
                self._send_probes(target, hidden.detach())
            if self.schedule.overlapped:
                for target in targets:
                    self._route_and_fetch(target, layer)
        self._resume()

    def before_adapter(self, layer: int) -> None:
        """In sequence: fetch the layer's own rows if look-ahead could not, always at ``p = 0``, else for layer 0."""
        self._computed(f"ffn {layer}")
        if not (self.in_backward or self.schedule.overlapped) and layer in self._targets(layer):
            self._route_and_fetch(layer, layer)

    def after_adapter(self, layer: int) -> None:
        """Layer ``layer`` has used its rows. In sequence: fetch those of the layers that look ahead from here."""
        self._computed(f"adapter {layer}")
        if not self.in_backward:
            self._on_device.slot(layer).used = self.engine.mark()
            if not self.schedule.overlapped:
                for target in self._targets(layer):
                    if target != layer:
                        self._route_and_fetch(target, layer)
        self._resume()

    def rows(self, layer: int) -> torch.Tensor:
        """The layer's active rows ``[A, 2D]`` on the device, waiting for their copy."""
        slot, placement = self._on_device.slot(layer), self._selection(layer)
        if slot.layer != layer:
            raise RuntimeError(f"rows of layer {layer} are not on the device: its slot holds layer {slot.layer}")
        self._held.pop(max(layer - self.depth, 0), None)
        slot.filled.wait_on_device()
        self._resume()
        self._on_device.assemble(layer, placement)
        return slot.buffer[: placement.num_rows]

    def gate(self, layer: int, inputs: torch.Tensor, router_weight: torch.Tensor) -> torch.Tensor:
        """Scores ``[T, N]`` of the experts for ``inputs [T, D]``, zero where a token does not probe the expert."""
        scores = inputs @ router_weight.to(inputs.dtype).T
        return scores.mul_(self.probed(layer, scores))

    def probed(self, layer: int, like: torch.Tensor) -> torch.Tensor:
        """One where a token probes an expert, zero elsewhere, shaped and typed like ``like [T, N]``."""
        probes = self.layers[layer].probes
        assert probes is not None
        return torch.zeros_like(like).scatter_(1, probes.long(), 1.0)

    def row_experts(self, layer: int) -> torch.Tensor:
        """Expert of each active row, int32 ``[A]`` on the device; they came with the rows."""
        return self._on_device.experts[layer][: self._selection(layer).num_rows]

    # --- backward ----------------------------------------------------------------------------------------------

    def begin_backward(self) -> None:
        """From here a layer's forward is a recompute of activation checkpointing: its rows are known."""
        self._computed("head and loss")
        self.in_backward = True
        self._held.clear()
        self._resume()

    def before_backward(self, layer: int) -> None:
        """The adapter of layer ``layer`` goes backward next."""
        self._computed(f"backward {layer + 1}" if layer + 1 < len(self.layers) else "head and loss backward")

    def gradient_buffer(self, layer: int) -> torch.Tensor:
        """Where the layer's row gradients ``[A, 2D]`` go; waits until the buffer's last content has left."""
        slot = self._gradient_slot()
        slot.sent.wait_on_device()
        self._resume()
        return slot.buffer[: self._selection(layer).num_rows]

    def send_gradients(self, layer: int) -> None:
        """Send what :meth:`gradient_buffer` now holds to the host, less what is summed on the device."""
        placement, slot = self._selection(layer), self._gradient_slot()
        self.layers[layer].went_backward = True
        if not self._on_device.sums:
            self._send_gradient_rows(layer, placement.rows, 0, name=f"row gradients {layer}")
            return
        with torch.no_grad():
            self._on_device.add_gradients(layer, placement, slot.buffer[: placement.num_rows])
        if placement.num_overflow:
            self._send_gradient_rows(layer, placement.overflow, placement.num_admitted, name=f"row gradients {layer}")

    def after_backward(self, layer: int) -> None:
        """Layer ``layer`` needs its rows no more: its slot takes those of layer ``layer - p - 1``."""
        self._computed(f"adapter backward {layer}")
        self._on_device.slot(layer).used = self._on_device.used[layer] = self.engine.mark()
        self.layers[layer].probes = None
        target = layer - self.depth - 1
        if self.decision.rows_in_backward == "refetched" and target >= 0:
            self._fetch(target, again=True)
        if self.closes_window:
            self._send_sums(layer)
            if self.after_last_gradients is not None:
                self.after_last_gradients(layer)
        self._resume()

    def finish_backward(self) -> None:
        """The device is through with the micro-batch; gradients may still be on their way."""
        self._computed("backward 0")
        self.in_backward = False

    # --- the end of a window -----------------------------------------------------------------------------------

    def close_window(self) -> list[int]:
        """Send the gradient sums that the last backward did not; how many rows of each layer were kept.

        Inside the device's scope, before the optimizer.
        """
        for layer in range(len(self.layers)):
            self._send_sums(layer)
        self._sums_sent.clear()
        return [self._kept[layer] for layer in range(len(self.layers))]

    def forget_rows(self) -> None:
        """Rows on the host were written other than by :meth:`update`: those kept on the device are so no more.

        Their gradient sums go to the host, where the window goes on. Inside the device's scope.
        """
        self._settle_without_backward()
        self.close_window()
        self.schedule.drain()
        self._forget_kept()

    def drop_window(self) -> None:
        """Forget the window's gradients, on the host and on the device. What was updated before goes on."""
        if not self.window_open:
            return
        self.window_open = False
        self.schedule.drain()
        self.store.clear_gradients()
        self._sums_sent.clear()
        self._forget_kept()  # a row that is kept anew begins a new sum

    def squared_norm(self, layer: int) -> Job:
        """A job that sums the squares of the layer's gradients of the window, once they have all arrived."""
        return self._host_job(
            f"gradient norm {layer}", lambda: self.store.squared_norm_of(layer), after=(self._accumulated[layer],)
        )

    def update(
        self,
        layer: int,
        settings: AdamWSettings,
        *,
        learning_rate: float,
        gradient_scale: float = 1.0,
        after: tuple[Job, ...] = (),
        unless: Callable[[], bool] = lambda: False,
    ) -> Job:
        """A job that updates the layer's touched rows, after its gradients and the jobs ``after``; gives how many.

        The layer's next rows wait for it. Nothing is done if ``unless()`` is then true.
        """

        def work() -> int:
            if unless():
                return 0
            self._row_cache.clear(layer)
            return update_layer(self.store, layer, settings, learning_rate=learning_rate, gradient_scale=gradient_scale)

        jobs = (self._accumulated[layer], *after)
        job = self._updated[layer] = self._host_job(f"adamw {layer}", work, after=jobs, urgency=LATER)
        return job

    # --- host side ---------------------------------------------------------------------------------------------

    def host_buffer_bytes(self) -> dict[str, int]:
        """Bytes of the staging buffers by category of the host ledger; a pinned one as the pinned allocator rounds."""
        buffers = [("row_staging", staging.buffer) for staging in self._row_staging]
        buffers += [("gradient_landing", slot.landing.buffer) for slot in self._gradients]
        buffers += [(name, landing.buffer) for (name, _), landing in self._host_buffers.items()]
        totals = {"cache_index": size} if (size := self._row_cache.host_bytes()) else {}
        for name, buffer in buffers:
            size = buffer.numel() * buffer.element_size()
            totals[name] = totals.get(name, 0) + (pinned_bytes(size) if self.device.kind == "cuda" else size)
        return totals

    def look_ahead_recall(self, layer: int, hidden: torch.Tensor) -> float:
        """Share of the exact choice for ``hidden [T, D]`` that the rows fetched for ``layer`` contain."""
        state = self.layers[layer]
        found, looked_ahead = self._selection(layer), state.probes
        self._send_queries(layer, hidden.detach())
        self._send_probes(layer, hidden.detach())
        state.probes = looked_ahead
        exact: Selection = self._choice(layer, layer).result()
        self._held.pop(layer, None)
        with self.device.host():
            share = torch.isin(exact.rows, found.rows)
            return float(share.float().mean()) if exact.num_rows else 1.0

    def _route_and_fetch(self, target: int, layer: int) -> None:
        """Choose rows for ``target`` from the hidden state of ``layer``, and send them off."""
        choice, counters = self._choice(target, layer), self.counters

        def place() -> Placement:
            selection: Selection = choice.result()
            placement = self._row_cache.place(target, selection.rows)
            self._kept[target] = placement.first_position + placement.num_admitted
            counters.active_rows[target] = placement.num_rows
            counters.missing_rows[target] = placement.num_missing
            counters.overflow_rows[target] = placement.num_overflow
            counters.dropped_rows += selection.dropped_rows
            return placement

        self.layers[target].route = self._host_job(f"place {target}", place, after=(choice,))
        self._fetch(target, again=False)

    def _choice(self, target: int, layer: int) -> Job:
        """A job that lets the router choose ``target``'s rows from the queries of ``layer``."""
        queries, mask = self._host_buffers["query_landing", self._landing_of(layer)], self._token_mask
        probes = self._host_buffers.get(("probes_landing", self._landing_of(target)))

        def arrived(landing: Landing, copy: Copy) -> torch.Tensor:
            copy.wait_on_host()
            return landing.buffer if mask is None else landing.buffer[mask]

        copies = (queries.copy, None if probes is None else probes.copy)

        def work() -> Selection:
            chosen_from = arrived(queries, copies[0] or COPY_DONE)
            probed = None if probes is None or copies[1] is None else arrived(probes, copies[1])
            return self.router.select(target, self.store.layers[target].keys, chosen_from, probed)

        after = (*(copy.job for copy in copies if copy is not None), self._updated[target])
        job = self._host_job(f"route {target}", work, after=after)
        for landing in (queries, probes):
            if landing is not None:
                landing.readers.append(job)
        return job

    def _fetch(self, layer: int, *, again: bool) -> None:
        """Gather the layer's rows into staging and send them to its slot, once the slot's last use is over."""
        slot, staging = self._on_device.slot(layer), self._row_staging[self._landing_of(layer)]
        route = self.layers[layer].route
        assert route is not None
        before, suffix = staging.copy, " again" if again else ""

        def gather() -> torch.Tensor:
            placement: Placement = route.result()
            before.wait_on_host()
            rows = placement.overflow if again else placement.missing
            source = staging.buffer[: rows.shape[0]]
            self.store.gather(layer, rows, source)
            return source

        jobs = (route, before.job, self._updated[layer])
        gathered = self._host_job(f"gather {layer}{suffix}", gather, after=jobs)
        if not again:
            self._send_indices(layer, route)

        def views() -> tuple[torch.Tensor, torch.Tensor]:
            source: torch.Tensor = gathered.result()
            first = route.result().num_admitted if again else 0
            return source, slot.buffer[first : first + source.shape[0]]

        category = "rows_refetched" if again else "rows"
        name = f"rows {layer}{suffix}"
        staging.copy = slot.filled = self.engine.copy(
            "h2d", views, category=category, name=name, point=slot.used, after=(gathered,)
        )
        slot.layer, slot.filled_again, slot.assembled = layer, again, False

    def _send_indices(self, layer: int, route: Job) -> None:
        """Send what else the device must know of the layer's rows: their experts, and where those kept lie."""
        if self._on_device.experts:
            rows_per_expert = self.decision.adapter_width // self.decision.num_experts
            self._send_index(
                "row_experts",
                layer,
                route,
                lambda placement: placement.rows // rows_per_expert,
                self._on_device.experts,
            )
        if self._on_device.kept:
            self._send_index("row_positions", layer, route, lambda placement: placement.hits, self._on_device.hits)

    def _send_index(
        self,
        category: str,
        layer: int,
        route: Job,
        of_placement: Callable[[Placement], torch.Tensor],
        targets: list[torch.Tensor],
    ) -> None:
        """Send one int32 per row, through a host buffer, to the layer's own place on the device."""
        cap = self.decision.active_rows_cap
        landing = self._host_buffer(f"{category}_landing", self._landing_of(layer), (cap,), torch.int32)
        before, target = landing.copy, targets[layer]

        def write() -> torch.Tensor:
            before.wait_on_host()
            numbers = of_placement(route.result())
            return landing.buffer[: numbers.shape[0]].copy_(numbers)

        written = self._host_job(f"{category.replace('_', ' ')} {layer}", write, after=(route, before.job))
        landing.copy = self.engine.copy(
            "h2d",
            lambda: (written.result(), target[: written.result().shape[0]]),
            category=category,
            name=f"{category.replace('_', ' ')} {layer}",
            point=self._on_device.used[layer],
            after=(written,),
        )

    def _send_gradient_rows(
        self, layer: int, rows: torch.Tensor, first: int, *, name: str, category: str = "row_gradients"
    ) -> None:
        """Send rows of the present gradient slot, from ``first`` on, and add them to the window's sums on the host."""
        slot = self._gradient_slot()
        source, target = slot.buffer[first : first + rows.shape[0]], slot.landing.buffer[: rows.shape[0]]
        copy = slot.sent = self.engine.copy(
            "d2h",
            lambda: (source, target),
            category=category,
            name=name,
            point=self.engine.mark(),
            after=tuple(slot.landing.readers),
            per="step" if category == "row_gradients" else "optimizer_step",
        )

        def accumulate() -> None:
            copy.wait_on_host()
            self.store.accumulate(layer, rows, target)

        jobs = (copy.job, self._accumulated[layer], self._updated[layer])
        job = self._host_job(f"accumulate {layer}", accumulate, after=jobs, urgency=SOON)
        slot.landing.readers = [job]
        self._accumulated[layer] = job
        self._turn += 1

    def _send_sums(self, layer: int) -> None:
        """Send the layer's gradient sums, unless they were; each at most ``cap`` rows, in the adapter's dtype."""
        if not self._on_device.sums or layer in self._sums_sent:
            return
        self._sums_sent.add(layer)
        kept, sums = self._row_cache.kept_rows(layer), self._on_device.sums[layer]
        for first in range(0, kept.shape[0], self.decision.active_rows_cap):
            rows, slot = kept[first : first + self.decision.active_rows_cap], self._gradient_slot()
            slot.sent.wait_on_device()
            with torch.no_grad():
                slot.buffer[: rows.shape[0]].copy_(sums[first : first + rows.shape[0]])
            self._send_gradient_rows(layer, rows, 0, name=f"window gradients {layer}", category="window_gradients")

    # --- helpers -----------------------------------------------------------------------------------------------

    def _settle_without_backward(self) -> None:
        """Where a forward had no backward, the rows that it admitted have no gradients: their sums begin as zero."""
        for layer, state in enumerate(self.layers if self._on_device.sums else ()):
            if not state.went_backward and state.selection is not None:
                first, count = state.selection.first_position, state.selection.num_admitted
                with torch.no_grad():
                    self._on_device.sums[layer][first : first + count].zero_()
                state.went_backward = True

    def _forget_kept(self) -> None:
        with self.device.host():
            for layer in range(len(self.layers)):
                self._row_cache.clear(layer)
                self._kept[layer] = 0

    @property
    def _row_cache(self) -> RowCache:
        assert self.cache is not None
        return self.cache

    def _targets(self, layer: int) -> range:
        """Layers whose rows are chosen from this layer's hidden state."""
        if layer == 0:
            return range(self.depth + 1)
        return range(layer + self.depth, min(layer + self.depth + 1, len(self.layers)))

    def _landing_of(self, layer: int) -> int:
        """Which of the ``p + 1`` host buffers of a kind is the layer's."""
        return layer % (self.depth + 1)

    def _gradient_slot(self) -> GradientSlot:
        """The slot whose turn it is."""
        return self._gradients[self._turn % len(self._gradients)]

    def _selection(self, layer: int) -> Placement:
        selection = self.layers[layer].selection
        if selection is None:
            raise RuntimeError(f"no rows were chosen for layer {layer}: the model's forward has not begun")
        return selection

    def _new_counters(self) -> StepCounters:
        num_layers = self.store.num_layers
        return StepCounters([0] * num_layers, [0] * num_layers, [0] * num_layers)

    def _host_job(self, name: str, work: Callable[[], Any], *, after: tuple[Job | None, ...], urgency: int = 0) -> Job:
        """A job of the cpu lane: outside the emulated device's books, without gradients."""

        def in_lane() -> Any:
            with torch.no_grad():
                return work()

        def in_place() -> Any:
            with self.device.host():
                return in_lane()

        jobs = [job for job in after if job is not None]
        chosen = in_lane if self.schedule.overlapped else in_place
        return self.schedule.submit("cpu", name, chosen, after=jobs, urgency=urgency)

    def _host_buffer(self, name: str, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Landing:
        """A reused host buffer; made anew when the shape or type changes."""
        landing = self._host_buffers.get((name, slot))
        if landing is None or landing.buffer.shape != shape or landing.buffer.dtype != dtype:
            landing = self._host_buffers[name, slot] = Landing(self.engine.host_empty(*shape, dtype=dtype))
        return landing

    def _send_queries(self, layer: int, hidden: torch.Tensor) -> None:
        """Send a hidden state; overlapped, it stays on the device until rows chosen from it are there."""
        self._send("queries", "query_landing", hidden, slot=self._landing_of(layer), name=f"queries {layer}")
        if self.schedule.overlapped:
            self._held[layer] = hidden

    def _send_probes(self, layer: int, hidden: torch.Tensor) -> None:
        """Score the experts on the device, keep the best ``P`` per token there, and send them to the host."""
        if not self.router_weights:
            return
        inputs = hidden.to(self.adapter_dtype)
        with torch.no_grad():
            scores = inputs @ self.router_weights[layer].to(inputs.dtype).T
            probes = scores.topk(self.decision.num_probes, dim=1).indices.to(torch.int32)
        self.layers[layer].probes = probes
        self._computed(f"router {layer}")
        self._send("probes", "probes_landing", probes, slot=self._landing_of(layer), name=f"probes {layer}")

    def _send(self, category: str, landing_name: str, tensor: torch.Tensor, *, slot: int, name: str) -> None:
        """Start a device tensor's copy to its host buffer, once those who read its last content have."""
        landing = self._host_buffer(landing_name, slot, tuple(tensor.shape), tensor.dtype)
        after, landing.readers = tuple(landing.readers), []
        landing.copy = self.engine.copy(
            "d2h",
            lambda: (tensor, landing.buffer),
            category=category,
            name=name,
            point=self.engine.mark(),
            after=after,
        )

    def _host_rows(self) -> torch.Tensor:
        shape = (self.decision.active_rows_cap, 2 * self.store.hidden_size)
        return self.engine.host_empty(*shape, dtype=self.adapter_dtype)

    def _computed(self, name: str) -> None:
        """The emulated device, which computes in this thread, has done so until now."""
        if self.clock is not None:
            self.clock.computed(f"{name} again" if self.in_backward and "backward" not in name else name)

    def _resume(self) -> None:
        if self.clock is not None:
            self.clock.resume()


def _cache_of(decision: Decision, num_layers: int) -> RowCache:
    if not decision.cached_rows:
        return NoCache()
    return WindowCache(num_layers=num_layers, adapter_width=decision.adapter_width, cached_rows=decision.cached_rows)
