"""The row exchange: which rows are on the device when, and how they and their gradients travel.

One micro-batch goes through it like this (``p`` is the prefetch depth, ``L`` the number of layers):

- Forward. At layer ``j``'s FFN its hidden state goes to the host, which chooses rows for layer ``j + p`` (layer 0's
  hidden state serves layers ``0 .. p``), gathers them and sends them to the ring slot that layer ``j - 1`` has left.
- Backward. The rows are known. The ring still holds the last ``p + 1`` layers; when layer ``l`` is done, its slot takes
  the rows of layer ``l - p - 1``. With ``rows_in_backward = retained`` every layer has its own slot and nothing is
  fetched again.
- Row gradients go to the host as soon as a layer has them and are added to the window's sum there.

``p = 0`` is exact: a layer's rows come from its own hidden state.

Letters: ``T`` tokens, ``D`` hidden size, ``A`` active rows of a layer, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from meft.planner.allocator import pinned_bytes
from meft.planner.plan import Decision
from meft.runtime.device import Device
from meft.runtime.engine import COPY_DONE, Copy, TransferEngine
from meft.runtime.host_store import HostStore
from meft.runtime.router import Router, Selection

_LANDINGS = {"queries": "query_landing", "probes": "probes_landing"}
"""Where what the device sends arrives, by transfer category."""


@dataclass
class _Slot:
    """One ring slot: ``buffer [cap, 2D]`` on the device, who is in it, when it was filled and last used."""

    buffer: torch.Tensor
    layer: int | None = None
    filled: Copy = COPY_DONE
    used: Copy = COPY_DONE


@dataclass
class _Landing:
    """A host buffer that copies go through, and the copy that must be over before it is written or read again."""

    buffer: torch.Tensor
    copy: Copy = COPY_DONE


@dataclass
class _GradientSlot:
    """Row gradients ``[cap, 2D]`` on the device, their landing on the host, and which layer's are on the way."""

    buffer: torch.Tensor
    landing: _Landing
    layer: int | None = None


@dataclass
class LayerState:
    """What is known of one layer in this micro-batch."""

    selection: Selection | None = None
    probes: torch.Tensor | None = None
    """int32 ``[T, P]`` on the device: the experts that each token probes."""
    row_experts: torch.Tensor | None = None
    """int32 ``[A]`` on the device: the expert of each active row."""


@dataclass
class StepCounters:
    """What a micro-batch did, for the report."""

    active_rows: list[int]
    dropped_rows: int = 0
    host_seconds: float = 0.0


@dataclass
class RowExchange:
    """Moves rows to the device and their gradients back, obeying the plan's decision.

    ``router_weights`` are the Key-Experts routers, ``[N, D]`` per layer on the device; empty for exact routing.
    """

    device: Device
    engine: TransferEngine
    store: HostStore
    router: Router
    decision: Decision
    adapter_dtype: torch.dtype
    router_weights: list[torch.nn.Parameter]
    counters: StepCounters = field(init=False)

    def __post_init__(self) -> None:
        num_layers, depth = self.store.num_layers, min(self.decision.prefetch_depth, self.store.num_layers - 1)
        self.depth = depth
        self.in_backward = False
        retained = self.decision.rows_in_backward == "retained"
        self._ring = [_Slot(self._device_rows("row_staging")) for _ in range(num_layers if retained else depth + 1)]
        self._row_staging = [_Landing(self._host_rows()) for _ in range(depth + 1)]
        self._gradients = [
            _GradientSlot(self._device_rows("row_gradients"), _Landing(self._host_rows()))
            for _ in range(min(depth, 1) + 1)
        ]
        self._host_buffers: dict[tuple[str, int], _Landing] = {}
        self._token_mask: torch.Tensor | None = None
        self._next_token_mask: torch.Tensor | None = None
        self.observer: Callable[[int, torch.Tensor], None] | None = None
        self.layers = [LayerState() for _ in range(num_layers)]
        self.counters = StepCounters([0] * num_layers)

    # --- forward -----------------------------------------------------------------------------------------------

    def expect_tokens(self, token_mask: torch.Tensor) -> None:
        """For the next forward only: a host bool ``[T]`` that leaves padding out of the choice of rows."""
        self._next_token_mask = token_mask

    def begin_forward(self) -> None:
        """Open a micro-batch; the model's own forward calls this."""
        self.in_backward = False
        self._token_mask, self._next_token_mask = self._next_token_mask, None
        self.layers = [LayerState() for _ in self.layers]
        self.counters = StepCounters([0] * len(self.layers))
        for slot in self._ring:
            slot.layer = None

    def before_ffn(self, layer: int, hidden: torch.Tensor) -> None:
        """Send layer ``layer``'s hidden state ``[T, D]`` on its way while the device computes the FFN.

        ``observer(layer, hidden)``, where one is set, sees every hidden state first.
        """
        if self.in_backward:
            return
        if self.observer is not None:
            self.observer(layer, hidden)
        targets = self._targets(layer)
        if targets:
            self._send("queries", hidden.detach())
        for target in targets:
            self._send_probes(target, hidden.detach())

    def before_adapter(self, layer: int) -> None:
        """Fetch the layer's own rows if look-ahead could not: always at ``p = 0``, otherwise for layer 0."""
        if not self.in_backward and layer in self._targets(layer):
            self._route_and_fetch(layer)

    def after_adapter(self, layer: int) -> None:
        """Layer ``layer`` has used its rows: choose and fetch the rows of the layers that look ahead from here."""
        if self.in_backward:
            return
        self._slot(layer).used = self.engine.mark()
        for target in self._targets(layer):
            if target != layer:
                self._route_and_fetch(target)

    def rows(self, layer: int) -> torch.Tensor:
        """The layer's active rows ``[A, 2D]`` on the device, waiting for their copy."""
        slot, selection = self._slot(layer), self._selection(layer)
        if slot.layer != layer:
            raise RuntimeError(f"rows of layer {layer} are not on the device: its slot holds layer {slot.layer}")
        slot.filled.wait_on_device()
        return slot.buffer[: selection.num_rows]

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
        """Expert of each active row, int32 ``[A]`` on the device."""
        experts = self.layers[layer].row_experts
        assert experts is not None
        return experts

    # --- backward ----------------------------------------------------------------------------------------------

    def begin_backward(self) -> None:
        """From here a layer's forward is a recompute of activation checkpointing: its rows are known."""
        self.in_backward = True

    def gradient_buffer(self, layer: int) -> torch.Tensor:
        """Where the layer's row gradients ``[A, 2D]`` go; waits until the buffer's last content has landed."""
        slot = self._gradient_slot(layer)
        self._land_gradients(slot)
        return slot.buffer[: self._selection(layer).num_rows]

    def send_gradients(self, layer: int) -> None:
        """Send what :meth:`gradient_buffer` now holds to the host."""
        slot, num_rows = self._gradient_slot(layer), self._selection(layer).num_rows
        slot.landing.copy = self.engine.to_host(
            slot.buffer[:num_rows], slot.landing.buffer[:num_rows], category="row_gradients"
        )
        slot.layer = layer

    def after_backward(self, layer: int) -> None:
        """Layer ``layer`` needs its rows no more: its slot takes those of layer ``layer - p - 1``."""
        self._slot(layer).used = self.engine.mark()
        state = self.layers[layer]
        state.probes = state.row_experts = None
        target = layer - self.depth - 1
        if self.decision.rows_in_backward == "refetched" and target >= 0:
            self._fetch(target, category="rows_refetched")

    def finish_backward(self) -> None:
        """Land the gradients still on their way, the first to leave first."""
        for slot in sorted(self._gradients, key=lambda slot: -1 if slot.layer is None else -slot.layer):
            self._land_gradients(slot)
        self.in_backward = False

    # --- host side ---------------------------------------------------------------------------------------------

    def host_buffer_bytes(self) -> dict[str, int]:
        """Bytes of the staging buffers by category of the host ledger; a pinned one as the pinned allocator rounds."""
        buffers = [("row_staging", staging.buffer) for staging in self._row_staging]
        buffers += [("gradient_landing", slot.landing.buffer) for slot in self._gradients]
        buffers += [(name, landing.buffer) for (name, _), landing in self._host_buffers.items()]
        totals: dict[str, int] = {}
        for name, buffer in buffers:
            size = buffer.numel() * buffer.element_size()
            totals[name] = totals.get(name, 0) + (pinned_bytes(size) if self.device.kind == "cuda" else size)
        return totals

    def look_ahead_recall(self, layer: int, hidden: torch.Tensor) -> float:
        """Share of the exact choice for ``hidden [T, D]`` that the rows fetched for ``layer`` contain."""
        looked_ahead = self.layers[layer].probes
        self._send("queries", hidden.detach())
        self._send_probes(layer, hidden.detach())
        self.layers[layer].probes = looked_ahead
        exact = self._choose(layer)
        with self.device.host():
            found = torch.isin(exact.rows, self._selection(layer).rows)
            return float(found.float().mean()) if exact.num_rows else 1.0

    def _route_and_fetch(self, target: int) -> None:
        """Choose rows for ``target`` from the hidden state that was sent last, and send them off."""
        state = self.layers[target]
        state.selection = self._choose(target)
        self.counters.active_rows[target] = state.selection.num_rows
        self.counters.dropped_rows += state.selection.dropped_rows
        self._fetch(target, category="rows")
        if self.router_weights:
            state.row_experts = self._send_row_experts(state.selection)

    def _choose(self, layer: int) -> Selection:
        """Let the router choose, from the queries and probes sent last for this layer."""
        queries = self._arrived("query_landing", 0)
        probes = self._arrived("probes_landing", layer % (self.depth + 1)) if self.router_weights else None
        with self._host_work():
            return self.router.select(layer, self.store.layers[layer].keys, queries, probes)

    def _arrived(self, name: str, slot: int) -> torch.Tensor:
        """What a host buffer received, padding tokens left out."""
        landing = self._host_buffers[name, slot]
        landing.copy.wait_on_host()
        with self._host_work():
            return landing.buffer if self._token_mask is None else landing.buffer[self._token_mask]

    def _send_probes(self, layer: int, hidden: torch.Tensor) -> None:
        """Score the experts on the device, keep the best ``P`` per token there, and send them to the host."""
        if not self.router_weights:
            return
        inputs = hidden.to(self.adapter_dtype)
        with torch.no_grad():
            scores = inputs @ self.router_weights[layer].to(inputs.dtype).T
            probes = scores.topk(self.decision.num_probes, dim=1).indices.to(torch.int32)
        self.layers[layer].probes = probes
        self._send("probes", probes, slot=layer % (self.depth + 1))

    def _send_row_experts(self, selection: Selection) -> torch.Tensor:
        rows_per_expert = self.decision.adapter_width // self.decision.num_experts
        landing = self._host_buffer("row_experts_landing", 0, (self.decision.active_rows_cap,), torch.int32)
        source = landing.buffer[: selection.num_rows]
        with self._host_work():
            source.copy_(selection.rows // rows_per_expert)
        with self.device.category("row_experts"):
            experts = torch.empty(selection.num_rows, dtype=torch.int32, device=self.device.torch_device)
        landing.copy = self.engine.to_device(source, experts, category="row_experts")
        landing.copy.wait_on_device()
        return experts

    def _fetch(self, layer: int, *, category: str) -> None:
        """Gather the layer's rows into staging and send them to its slot, once the slot's last use is over."""
        slot, selection = self._slot(layer), self._selection(layer)
        staging = self._row_staging[layer % len(self._row_staging)]
        staging.copy.wait_on_host()
        source = staging.buffer[: selection.num_rows]
        with self._host_work():
            self.store.gather(layer, selection.rows, source)
        target = slot.buffer[: selection.num_rows]
        staging.copy = slot.filled = self.engine.to_device(source, target, category=category, after=slot.used)
        slot.layer = layer

    def _land_gradients(self, slot: _GradientSlot) -> None:
        if slot.layer is None:
            return
        slot.landing.copy.wait_on_host()
        selection = self._selection(slot.layer)
        with self._host_work():
            self.store.accumulate(slot.layer, selection.rows, slot.landing.buffer[: selection.num_rows])
        slot.layer = None

    # --- helpers -----------------------------------------------------------------------------------------------

    def _targets(self, layer: int) -> range:
        """Layers whose rows are chosen from this layer's hidden state."""
        if layer == 0:
            return range(self.depth + 1)
        return range(layer + self.depth, min(layer + self.depth + 1, len(self.layers)))

    def _slot(self, layer: int) -> _Slot:
        return self._ring[layer % len(self._ring)]

    def _gradient_slot(self, layer: int) -> _GradientSlot:
        return self._gradients[layer % len(self._gradients)]

    def _selection(self, layer: int) -> Selection:
        selection = self.layers[layer].selection
        if selection is None:
            raise RuntimeError(f"no rows were chosen for layer {layer}: the model's forward has not begun")
        return selection

    @contextmanager
    def _host_work(self) -> Iterator[None]:
        """Host code on the clock of the cpu lane."""
        started = time.perf_counter()
        with self.device.host(), torch.no_grad():
            yield
        self.counters.host_seconds += time.perf_counter() - started

    def _host_buffer(self, name: str, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> _Landing:
        """A reused host buffer, free to be written; made anew when the shape or type changes."""
        landing = self._host_buffers.get((name, slot))
        if landing is None or landing.buffer.shape != shape or landing.buffer.dtype != dtype:
            landing = self._host_buffers[name, slot] = _Landing(self.engine.host_empty(*shape, dtype=dtype))
        landing.copy.wait_on_host()
        return landing

    def _send(self, category: str, tensor: torch.Tensor, *, slot: int = 0) -> None:
        """Start a device tensor's copy to its host buffer."""
        name = _LANDINGS[category]
        landing = self._host_buffer(name, slot, tuple(tensor.shape), tensor.dtype)
        landing.copy = self.engine.to_host(tensor, landing.buffer, category=category)

    def _device_rows(self, category: str) -> torch.Tensor:
        shape = (self.decision.active_rows_cap, 2 * self.store.hidden_size)
        with self.device.scope(), self.device.category(category):
            return torch.empty(shape, dtype=self.adapter_dtype, device=self.device.torch_device)

    def _host_rows(self) -> torch.Tensor:
        shape = (self.decision.active_rows_cap, 2 * self.store.hidden_size)
        return self.engine.host_empty(*shape, dtype=self.adapter_dtype)
