"""The way to the device: hidden states go to the host, which chooses rows, gathers them and sends them off.

Letters: ``T`` tokens, ``D`` hidden size, ``A`` active rows of a layer, ``N`` experts, ``P`` probes, ``p`` prefetch
depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from meft.planner.records.plan import Decision
from meft.runtime.device.engine import COPY_DONE, Copy, Part, TransferEngine
from meft.runtime.device.lanes import Job
from meft.runtime.device.timeline import LaneClock
from meft.runtime.exchange.device_rows import DeviceRows, Landing
from meft.runtime.exchange.gating import Gating
from meft.runtime.exchange.host_side import HostSide
from meft.runtime.exchange.row_cache import Placement, RowCache
from meft.runtime.exchange.state import ExchangeState
from meft.runtime.host.router import Router, Selection
from meft.runtime.host.store import HostStore


def as_chosen(selection: Selection) -> Selection:
    """It is what is wanted."""
    return selection


@dataclass
class _Index:
    """One int32 per row, on its way to the device's own place for it."""

    category: str
    of_placement: Callable[[Placement], torch.Tensor]
    landing: torch.Tensor
    target: torch.Tensor
    count: int = 0

    def write(self, placement: Placement) -> None:
        """Put the numbers into the buffer that they leave from."""
        numbers = self.of_placement(placement)
        self.count = numbers.shape[0]
        self.landing[: self.count].copy_(numbers)

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Source and target, once they are written."""
        return self.landing[: self.count], self.target[: self.count]


@dataclass
class RowFetcher:
    """Chooses rows for layers and brings them to their ring slots. ``staging`` are ``p + 1`` host buffers."""

    engine: TransferEngine
    store: HostStore
    router: Router
    decision: Decision
    adapter_dtype: torch.dtype
    router_weights: list[torch.nn.Parameter]
    gating: Gating | None
    """None where the device has no part in the routing."""
    cache: RowCache
    on_device: DeviceRows
    host: HostSide
    state: ExchangeState
    staging: list[Landing]
    clock: LaneClock | None
    token_mask: torch.Tensor | None = None
    """Host bool ``[T]`` that leaves padding out of the choice."""
    _gathered: Job | None = None
    """The last job that wrote into staging."""
    _held: dict[int, torch.Tensor] = field(default_factory=dict)
    """Hidden states by layer that stay on the device until rows chosen from them are there."""

    @property
    def depth(self) -> int:
        """``p``."""
        return len(self.staging) - 1

    def targets(self, layer: int) -> range:
        """Layers whose rows are chosen from this layer's hidden state."""
        if layer == 0:
            return range(self.depth + 1)
        return range(layer + self.depth, min(layer + self.depth + 1, len(self.state.layers)))

    def send_queries(self, layer: int, hidden: torch.Tensor) -> None:
        """Send a hidden state; overlapped, it stays on the device until rows chosen from it are there."""
        self._send("queries", "query_landing", hidden, slot=self._landing_of(layer), name=f"queries {layer}")
        if self.engine.schedule.overlapped:
            self._held[layer] = hidden

    def send_probes(self, layer: int, hidden: torch.Tensor) -> None:
        """Score the experts on the device, keep the best ``P`` per token there, and send them to the host."""
        if self.gating is None:
            return
        with torch.no_grad():
            probes = self.gating.probes(layer, hidden.to(self.adapter_dtype), self.router_weights[layer])
        self.state.layers[layer].probes = probes
        if self.clock is not None:
            self.clock.computed(f"router {layer}")
        self._send("probes", "probes_landing", probes, slot=self._landing_of(layer), name=f"probes {layer}")

    def release(self, layer: int) -> None:
        """The layer's rows are wanted now: the hidden state that they were chosen from may go once they are there."""
        self._held.pop(max(layer - self.depth, 0), None)

    def release_all(self) -> None:
        """Forward is over."""
        self._held.clear()

    def route_and_fetch(self, target: int, layer: int) -> None:
        """Choose rows for ``target`` from the hidden state of ``layer``, and send them off."""
        state, counters = self.state, self.state.counters

        def place(selection: Selection) -> Placement:
            placement = self.cache.place(target, selection.rows)
            state.kept[target] = placement.first_position + placement.num_admitted
            counters.active_rows[target] = placement.num_rows
            counters.missing_rows[target] = placement.num_missing
            counters.overflow_rows[target] = placement.num_overflow
            counters.hot_rows[target] = placement.num_hot
            counters.dropped_rows += selection.dropped_rows
            return placement

        state.layers[target].route = self._choice(target, layer, then=place)
        self.fetch(target, again=False)

    def exact_choice(self, layer: int, hidden: torch.Tensor) -> Selection:
        """What would be chosen for ``layer`` from its own ``hidden [T, D]``; the layer's own choice stays as it is."""
        state = self.state.layers[layer]
        looked_ahead = state.probes
        self.send_queries(layer, hidden.detach())
        self.send_probes(layer, hidden.detach())
        state.probes = looked_ahead
        exact: Selection = self._choice(layer, layer).result()
        self._held.pop(layer, None)
        return exact

    def fetch(self, layer: int, *, again: bool) -> None:
        """Gather the layer's rows into staging and send them to its slot, once the slot's last use is over.

        In forward as many parts as decided, one of which travels while the next is gathered.
        """
        route = self.state.layers[layer].route
        assert route is not None
        self._bring(layer, layer, route, again=again)

    def _bring(self, layer: int, unit: int, route: Job, *, again: bool) -> None:
        """The same for ``unit``, which says whose slot it is: the layer, or one of its chunks of tokens."""
        slot, staging = self.on_device.slot(unit), self.staging[self._landing_of(unit)]
        indices = [] if again else list(self._indices(unit))
        before, suffix = staging.copy, " again" if again else ""
        chunks = 1 if again else self.decision.gather_chunks

        def gather(chunk: int) -> slice:
            placement: Placement = route.result()
            before.wait_on_host()
            if chunk == 0:
                for index in indices:
                    index.write(placement)
            rows = placement.rows[placement.travelling(again=again)]
            part = _part(rows.shape[0], chunk, chunks)
            self._gather(layer, rows[part], staging.buffer[part])
            return part

        def views(gathered: Job) -> tuple[torch.Tensor, torch.Tensor]:
            part: slice = gathered.result()
            return staging.buffer[part], slot.buffer[route.result().travelling(again=again)][part]

        jobs = (self._reach(layer, route, again=again), before.job, self.state.updated[layer])
        category = "rows_refetched" if again else "rows"
        for chunk in range(chunks):
            gathered = self._gathered = self.host.job(f"gather {layer}{suffix}", partial(gather, chunk), after=jobs)
            first = [Part(index.category, index.views) for index in indices] if chunk == 0 else []
            slot.filled = self.engine.copies(
                "h2d",
                [*first, Part(category, partial(views, gathered))],
                name=f"rows {layer}{suffix}",
                points=(slot.used, self.on_device.used[unit]) if first else (slot.used,),
                after=(gathered,),
            )
        staging.copy = slot.filled  # the lane's last: with it all are over
        slot.layer, slot.filled_again, slot.assembled = unit, again, False

    def _reach(self, layer: int, route: Job, *, again: bool) -> Job:
        """What must be over before the layer's rows can be gathered: they are chosen."""
        del layer, again
        return route

    def _gather(self, layer: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        self.store.gather(layer, rows, out)

    def _choice(
        self,
        target: int,
        layer: int,
        tokens: slice = slice(None),
        *,
        then: Callable[[Selection], Any] = as_chosen,
    ) -> Job:
        """A job that lets the router choose ``target``'s rows from the queries of ``layer``, or of some ``tokens``; it
        gives what ``then`` makes of them."""
        queries, mask = self.host.existing("query_landing", self._landing_of(layer)), self.token_mask
        probes = self.host.existing("probes_landing", self._landing_of(target))
        assert queries is not None

        def arrived(landing: Landing, copy: Copy) -> torch.Tensor:
            copy.wait_on_host()
            return landing.buffer[tokens] if mask is None else landing.buffer[tokens][mask[tokens]]

        copies = (queries.copy, None if probes is None else probes.copy)

        def work() -> Any:
            chosen_from = arrived(queries, copies[0] or COPY_DONE)
            probed = None if probes is None or copies[1] is None else arrived(probes, copies[1])
            return then(self.router.select(target, self.store.layers[target].keys, chosen_from, probed))

        after = (*(copy.job for copy in copies if copy is not None), self.state.updated[target])
        job = self.host.job(f"route {target}", work, after=after)
        for landing in (queries, probes):
            if landing is not None:
                landing.readers.append(job)
        return job

    def _indices(self, unit: int) -> Iterator[_Index]:
        """What else the device must know of a unit's rows: their experts, and where those kept lie.

        It goes through buffers that are free whenever the staging of the rows is: it leaves with them.
        """
        if self.on_device.experts:
            rows_per_expert = self.decision.adapter_width // self.decision.num_experts
            experts = self.on_device.experts[unit]
            yield self._index("row_experts", unit, lambda placement: placement.rows // rows_per_expert, experts)
        if self.on_device.places:
            places = self.on_device.places[unit]
            yield self._index("row_positions", unit, lambda placement: placement.places, places)

    def _index(
        self, category: str, unit: int, of_placement: Callable[[Placement], torch.Tensor], target: torch.Tensor
    ) -> _Index:
        cap = self.decision.active_rows_cap
        landing = self.host.buffer(f"{category}_landing", self._landing_of(unit), (cap,), torch.int32)
        return _Index(category, of_placement, landing.buffer, target)

    def _send(self, category: str, landing_name: str, tensor: torch.Tensor, *, slot: int, name: str) -> None:
        """Start a device tensor's copy to its host buffer, once those who read its last content have."""
        landing = self.host.buffer(landing_name, slot, tuple(tensor.shape), tensor.dtype)
        after, landing.readers = tuple(landing.readers), []
        landing.copy = self.engine.copy(
            "d2h",
            lambda: (tensor, landing.buffer),
            category=category,
            name=name,
            point=self.engine.mark(),
            after=after,
        )

    def _landing_of(self, layer: int) -> int:
        """Which of the ``p + 1`` host buffers of a kind is the layer's."""
        return layer % (self.depth + 1)


def _part(count: int, place: int, parts: int) -> slice:
    """One of ``parts`` slices of ``count`` rows, as equal as may be."""
    return slice(count * place // parts, count * (place + 1) // parts)
