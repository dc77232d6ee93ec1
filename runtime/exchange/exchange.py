"""The row exchange: which rows are on the device when, and how they and their gradients travel.

One micro-batch goes through it like this (``p`` is the prefetch depth, ``L`` the number of layers):

- Forward. At layer ``j``'s FFN its hidden state goes to the host, which chooses rows for layer ``j + p`` (layer 0's
  hidden state serves layers ``0 .. p``), gathers them and sends them to the ring slot that layer ``j - 1`` has left.
- Backward. The rows are known. The ring still holds the last ``p + 1`` layers; when layer ``l`` is done, its slot takes
  the rows of layer ``l - p - 1``. With ``rows_in_backward = retained`` every layer has its own slot and nothing is
  fetched again.
- Row gradients go to the host as soon as a layer has them and are added to the window's sum there.

With ``cached_rows`` rows that the window has brought stay on the device (:mod:`meft.runtime.exchange.row_cache`), and
with ``gradients_on_device`` their gradients are summed there and leave once, when the window's last micro-batch is
through.

Everything but the device's own computation is a job of a lane (:mod:`meft.runtime.device.lanes`). Overlapped, rows are
routed while the device computes the FFN; in sequence, after it.

Here is the order of it all, as the adapter's hooks call it. The way to the device is
:mod:`meft.runtime.exchange.fetching`, the way back and the window's end :mod:`meft.runtime.exchange.gradient_window`;
what they share is :mod:`meft.runtime.exchange.state`.

``p = 0`` is exact: a layer's rows come from its own hidden state.

Letters: ``T`` tokens, ``D`` hidden size, ``A`` active rows of a layer, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from meft.planner.records.plan import Decision
from meft.runtime.device.device import Device
from meft.runtime.device.engine import TransferEngine
from meft.runtime.device.lanes import Job
from meft.runtime.device.timeline import LaneClock
from meft.runtime.exchange.device_rows import DeviceRows, GradientSlot, Landing
from meft.runtime.exchange.fetching import RowFetcher
from meft.runtime.exchange.gating import gating_of
from meft.runtime.exchange.gradient_window import GradientWindow
from meft.runtime.exchange.host_side import HostSide
from meft.runtime.exchange.hot_rows import HotSet
from meft.runtime.exchange.machines_window import MachinesRouterSums, MachinesWindow
from meft.runtime.exchange.router_sums import RouterSums
from meft.runtime.exchange.row_cache import BesideHotRows, NoCache, RowCache, WindowCache
from meft.runtime.exchange.shared_window import SharedLandings, SharedWindow
from meft.runtime.exchange.state import ExchangeState, LayerState, StepCounters
from meft.runtime.host.optimizer import AdamWSettings
from meft.runtime.host.router import Router
from meft.runtime.host.store import HostStore
from meft.runtime.ranks.peers import Peers


@dataclass
class RowExchange:
    """Moves rows to the device and their gradients back, obeying the plan's decision.

    ``router_weights`` are the Key-Experts routers, ``[N, D]`` per layer on the device; empty for exact routing.
    ``cache`` replaces the decision's own (a rehearsal passes one that needs no data). ``peers`` are the ranks that
    share the store, if there are several: then windows are theirs together.
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
    peers: Peers | None = None
    seed: int = 0
    """Of what a routing draws at random."""

    def __post_init__(self) -> None:
        decision, num_layers = self.decision, self.store.num_layers
        self.schedule = self.engine.schedule
        self.depth = min(decision.prefetch_depth, num_layers - 1)
        self.in_backward = False
        self.closes_window = False
        self.after_last_gradients: Callable[[int], None] | None = None
        """Called for each layer of a window's last backward, once the layer's gradients are on their way."""
        self.observer: Callable[[int, torch.Tensor], None] | None = None
        if self.cache is None:
            self.cache = _cache_of(decision, self.store)
        self._state = ExchangeState.of(num_layers)
        self._host = HostSide(self.device, self.engine)
        self._on_device = DeviceRows.make(
            self.device,
            decision,
            num_layers=num_layers,
            hidden_size=self.store.hidden_size,
            dtype=self.adapter_dtype,
            sums_dtype=self.store.dtype,
        )
        self.gating = gating_of(decision, seed=self.seed, micro_batch=self._number)
        self._micro_batch: int | None = None
        self._balance: torch.Tensor | None = None
        self._fetcher = self._make_fetcher(self.cache)
        self._window = self._make_window(self.cache)
        self._router_sums: RouterSums | None = None
        if self.peers is not None and self.router_weights:
            self._router_sums = self._make_router_sums(self.peers)
        self.hot = self._make_hot() if decision.hot_rows else None
        self._next_token_mask: torch.Tensor | None = None
        self._next_micro_batch: int | None = None

    def _make_fetcher(self, cache: RowCache) -> RowFetcher:
        return RowFetcher(**self._fetcher_parts(cache))

    def _fetcher_parts(self, cache: RowCache) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "store": self.store,
            "router": self.router,
            "decision": self.decision,
            "adapter_dtype": self.adapter_dtype,
            "router_weights": self.router_weights,
            "gating": self.gating,
            "cache": cache,
            "on_device": self._on_device,
            "host": self._host,
            "state": self._state,
            "staging": [Landing(self._host_rows()) for _ in range(self.depth + 1)],
            "clock": self.clock,
        }

    def _make_window(self, cache: RowCache) -> GradientWindow:
        count, peers = min(self.depth, 1) + 1, self.peers
        if peers is None:
            landings = [self._host_rows() for _ in range(count)]
        else:
            shape = (self.decision.active_rows_cap, 2 * self.store.hidden_size)
            shared = SharedLandings.make(peers, self.engine, slots=count, shape=shape, dtype=self.adapter_dtype)
            landings = shared.gradients[peers.local]
        parts: dict[str, Any] = {
            "device": self.device,
            "engine": self.engine,
            "store": self.store,
            "decision": self.decision,
            "cache": cache,
            "on_device": self._on_device,
            "host": self._host,
            "state": self._state,
            "slots": [GradientSlot(self._on_device.new_rows("row_gradients"), Landing(each)) for each in landings],
        }
        if peers is None:
            return GradientWindow(**parts)
        if peers.network is None:
            return SharedWindow(**parts, peers=peers, landings=shared)
        return self._window_class()(**parts, peers=peers, landings=shared, network=peers.network)

    def _window_class(self) -> type[MachinesWindow]:
        """Of several machines."""
        return MachinesWindow

    def _make_router_sums(self, peers: Peers) -> RouterSums:
        parts = (peers, self.engine, self._host, self.router_weights)
        return RouterSums(*parts) if peers.network is None else MachinesRouterSums(peers.network, *parts)

    def _make_hot(self) -> HotSet:
        return HotSet(
            device=self.device,
            engine=self.engine,
            store=self.store,
            decision=self.decision,
            tables=self._on_device.hot,
            window=self._window,
            landing=self._fetcher.staging[0],
            clock=self.clock,
        )

    @property
    def layers(self) -> list[LayerState]:
        """What is known of the micro-batch's layers."""
        return self._state.layers

    @property
    def counters(self) -> StepCounters:
        """What the micro-batch did."""
        return self._state.counters

    @property
    def window_open(self) -> bool:
        """Micro-batches have run whose gradients no optimizer step has used."""
        return self._window.is_open

    @window_open.setter
    def window_open(self, is_open: bool) -> None:
        self._window.is_open = is_open

    # --- forward -----------------------------------------------------------------------------------------------

    def expect_tokens(self, token_mask: torch.Tensor, *, micro_batch: int | None = None) -> None:
        """For the next forward only: a host bool ``[T]`` that leaves padding out of the choice of rows.

        ``micro_batch`` is its number in the run, by default of those that went backward before.
        """
        self._next_token_mask, self._next_micro_batch = token_mask, micro_batch

    def _number(self) -> int:
        """The present micro-batch's in the run."""
        if self._micro_batch is None:
            with self.device.host():
                self._micro_batch = int(self.store.use.micro_batches)
        return self._micro_batch

    def begin_forward(self) -> None:
        """Open a micro-batch; the model's own forward calls this."""
        self.in_backward = False
        self._fetcher.token_mask, self._next_token_mask = self._next_token_mask, None
        self._micro_batch, self._next_micro_batch = self._next_micro_batch, None
        self._balance = None
        self._window.settle_without_backward()
        if self.hot is not None:
            self.hot.place()
        self.window_open = True
        self._state.begin_micro_batch()
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
            targets = self._fetcher.targets(layer)
            if targets:
                self._fetcher.send_queries(layer, hidden.detach())
            for target in targets:
                self._fetcher.send_probes(target, hidden.detach())
            if self.schedule.overlapped:
                for target in targets:
                    self._fetcher.route_and_fetch(target, layer)
        self._resume()

    def before_adapter(self, layer: int) -> None:
        """In sequence: fetch the layer's own rows if look-ahead could not, always at ``p = 0``, else for layer 0."""
        self._computed(f"ffn {layer}")
        if not (self.in_backward or self.schedule.overlapped) and layer in self._fetcher.targets(layer):
            self._fetcher.route_and_fetch(layer, layer)

    def after_adapter(self, layer: int) -> None:
        """Layer ``layer`` has used its rows. In sequence: fetch those of the layers that look ahead from here."""
        self._computed(f"adapter {layer}")
        if not self.in_backward:
            self._on_device.slot(layer).used = self.engine.mark()
            if not self.schedule.overlapped:
                for target in self._fetcher.targets(layer):
                    if target != layer:
                        self._fetcher.route_and_fetch(target, layer)
        self._resume()

    def rows(self, layer: int) -> torch.Tensor:
        """The layer's active rows ``[A, 2D]`` on the device, waiting for their copy.

        In all that is computed from them ``A`` counts the rows of zeros that make whole 64s of them.
        """
        slot, placement = self._on_device.slot(layer), self._state.placement(layer)
        if slot.layer != layer:
            raise RuntimeError(f"rows of layer {layer} are not on the device: its slot holds layer {slot.layer}")
        self._fetcher.release(layer)
        slot.filled.wait_on_device()
        self._resume()
        self._on_device.assemble(layer, placement)
        return slot.buffer[: self._on_device.aligned(placement.num_rows)]

    def probes(self, layer: int) -> torch.Tensor:
        """The experts that the layer's tokens probe, int32 ``[T, P]`` on the device."""
        probes = self.layers[layer].probes
        assert probes is not None
        return probes

    def note_balance(self, loss: torch.Tensor) -> None:
        """A layer's part of the loss that keeps experts equally busy."""
        if not self.in_backward:
            self._balance = loss if self._balance is None else self._balance + loss

    def take_balance(self) -> torch.Tensor | None:
        """All layers' part of it, of the forward that was, once; None where the routing has none."""
        balance, self._balance = self._balance, None
        return balance

    def row_experts(self, layer: int) -> torch.Tensor:
        """Expert of each active row, int32 ``[A]`` on the device; they came with the rows."""
        return self._on_device.experts[layer][: self._on_device.aligned(self._state.placement(layer).num_rows)]

    def for_rows(self, shape: tuple[int, ...], *, axis: int, dtype: torch.dtype) -> torch.Tensor:
        """A new tensor on the device whose ``axis`` are active rows: not filled, and in memory for the cap."""
        others = math.prod(size for place, size in enumerate(shape) if place != axis)
        memory = torch.empty(others * self.decision.active_rows_cap, dtype=dtype, device=self.device.torch_device)
        return memory[: math.prod(shape)].view(shape)

    # --- backward ----------------------------------------------------------------------------------------------

    def begin_backward(self) -> None:
        """From here a layer's forward is a recompute of activation checkpointing: its rows are known."""
        self._computed("head and loss")
        if self._router_sums is not None:
            self._router_sums.begin()
        self.in_backward = True
        self._fetcher.release_all()
        self._resume()

    def before_backward(self, layer: int) -> None:
        """The adapter of layer ``layer`` goes backward next."""
        self._computed(f"backward {layer + 1}" if layer + 1 < len(self.layers) else "head and loss backward")

    def gradient_buffer(self, layer: int) -> torch.Tensor:
        """Where the layer's row gradients ``[A, 2D]`` go; waits until the buffer's last content has left."""
        buffer = self._window.buffer(layer)
        self._resume()
        return buffer

    def send_gradients(self, layer: int) -> None:
        """Send what :meth:`gradient_buffer` now holds to the host, less what is summed on the device."""
        with self.device.host():
            self.store.use.note(layer, self._state.placement(layer).rows)
        self._window.send(layer)

    def after_backward(self, layer: int) -> None:
        """Layer ``layer`` needs its rows no more: its slot takes those of layer ``layer - p - 1``."""
        self._computed(f"adapter backward {layer}")
        self._on_device.slot(layer).used = self._on_device.used[layer] = self.engine.mark()
        self.layers[layer].probes = None
        target = layer - self.depth - 1
        if self.decision.rows_in_backward == "refetched" and target >= 0:
            self._fetcher.fetch(target, again=True)
        if self.closes_window:
            self._window.send_sums(layer)
            if self.after_last_gradients is not None:
                self.after_last_gradients(layer)
        self._resume()

    def finish_backward(self) -> None:
        """The device is through with the micro-batch; gradients may still be on their way."""
        self._computed("backward 0")
        self.in_backward = False
        with self.device.host():
            self.store.use.micro_batches += 1
        if self.hot is not None:
            self.hot.note_step()
        if self._router_sums is not None:
            self._router_sums.send(took_part=True)

    def sit_out(self, before: Callable[[int], None] | None = None) -> None:
        """Ranks: this one has no micro-batch while others have the window's last; it adds theirs to its own rows.

        ``before`` is what else they need of it first, layer by layer in the order of their backward.
        """
        for layer in reversed(range(len(self.layers))):
            if before is not None:
                before(layer)
            self._sit_out_layer(layer)
            if self.closes_window:
                self._window.send_sums(layer)
        if self._router_sums is not None:
            self._router_sums.send(took_part=False)

    def _sit_out_layer(self, layer: int) -> None:
        for _ in range(self.decision.token_chunks):
            self._window.send_nothing(layer)

    # --- the end of a window -----------------------------------------------------------------------------------

    def close_window(self) -> list[int]:
        """Send the gradient sums that the last backward did not; how many rows of each layer were kept.

        Inside the device's scope, before the optimizer. The routers' gradients are then those of all ranks.
        """
        if self._router_sums is not None:
            self._router_sums.collect()
        return self._window.close()

    def forget_rows(self) -> None:
        """Rows on the host were written other than by :meth:`update`: those kept on the device are so no more.

        Their gradient sums go to the host, where the window goes on. Inside the device's scope.
        """
        self._window.forget_rows()

    def drop_window(self) -> None:
        """Forget the window's gradients, on the host and on the device. What was updated before goes on."""
        self._window.drop()
        if self.hot is not None:
            self.hot.drop_gradients()

    def squared_norm(self, layer: int) -> Job:
        """A job that sums the squares of the layer's gradients of the window, once they have all arrived."""
        return self._window.squared_norm(layer)

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
        return self._window.update(
            layer, settings, learning_rate=learning_rate, gradient_scale=gradient_scale, after=after, unless=unless
        )

    # --- what is asked beside the steps --------------------------------------------------------------------------

    def host_buffer_bytes(self) -> dict[str, int]:
        """Bytes of the staging buffers by category of the host ledger."""
        buffers = [("row_staging", staging.buffer) for staging in self._fetcher.staging]
        landings = [("gradient_landing", slot.landing.buffer) for slot in self._window.slots]
        buffers += self._host.named_buffers()
        assert self.cache is not None
        totals = {"cache_index": size} if (size := self.cache.host_bytes()) else {}
        if self.store.means is not None:  # each rank has its own
            totals["router_means"] = sum(table.numel() * table.element_size() for table in self.store.means.tables)
        if isinstance(self._window, SharedWindow):
            shared = [*landings, *self._window.own_buffers()]
            shared += self._router_sums.named_buffers() if self._router_sums is not None else ()
            _add_sizes(totals, shared)
        else:
            buffers += landings
        _add_sizes(totals, buffers)
        return totals

    def shared_table_bytes(self) -> dict[str, int]:
        """Bytes of what ranks share beside the store, by category; none for one rank."""
        tables = self._window.named_tables() if isinstance(self._window, SharedWindow) else iter(())
        sizes: dict[str, int] = {}
        _add_sizes(sizes, tables)
        if self._router_sums is not None:
            _add_sizes(sizes, self._router_sums.named_tables())
        return sizes

    def network_rows(self) -> dict[str, list[int]]:
        """Rows that crossed the network so far, by kind and layer; none on one machine."""
        window = self._window
        if not isinstance(window, MachinesWindow):
            return {}
        return window.crossed()

    def look_ahead_recall(self, layer: int, hidden: torch.Tensor) -> float:
        """Share of the exact choice for ``hidden [T, D]`` that the rows fetched for ``layer`` contain."""
        found, exact = self._state.placement(layer), self._fetcher.exact_choice(layer, hidden)
        with self.device.host():
            share = torch.isin(exact.rows, found.rows)
            return float(share.float().mean()) if exact.num_rows else 1.0

    # --- helpers -----------------------------------------------------------------------------------------------

    def _host_rows(self) -> torch.Tensor:
        shape = (self.decision.active_rows_cap, 2 * self.store.hidden_size)
        return self.engine.host_buffer(*shape, dtype=self.adapter_dtype)

    def _computed(self, name: str) -> None:
        """The emulated device, which computes in this thread, has done so until now."""
        if self.clock is not None:
            self.clock.computed(f"{name} again" if self.in_backward and "backward" not in name else name)

    def _resume(self) -> None:
        if self.clock is not None:
            self.clock.resume()


def _add_sizes(totals: dict[str, int], buffers: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Add buffers' sizes to their categories."""
    for name, buffer in buffers:
        totals[name] = totals.get(name, 0) + buffer.numel() * buffer.element_size()


def _cache_of(decision: Decision, store: HostStore) -> RowCache:
    cache: RowCache = NoCache()
    if decision.cached_rows:
        cache = WindowCache(
            num_layers=store.num_layers, adapter_width=decision.adapter_width, cached_rows=decision.cached_rows
        )
    return BesideHotRows(cache, [index.places for index in store.hot]) if decision.hot_rows else cache
