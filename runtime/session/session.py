"""One plan on one device: the model, the adapter beside it, and what they do, a step and an optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from meft.planner.base.errors import MeftError
from meft.planner.records.plan import Decision, Plan
from meft.runtime.adapter.adapter import AttachedAdapter, attach
from meft.runtime.adapter.blocks import decoder_blocks
from meft.runtime.adapter.initialise import KeyInit, keys_from_ffn
from meft.runtime.chunks.placement import ChunkPlacer
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import Device
from meft.runtime.device.engine import Copy, TransferEngine
from meft.runtime.device.lanes import Job, Schedule, Sequential
from meft.runtime.device.timeline import LaneClock
from meft.runtime.exchange.exchange import RowExchange
from meft.runtime.exchange.row_cache import RowCache
from meft.runtime.exchange.state import StepCounters
from meft.runtime.host import huge_pages
from meft.runtime.host.cores import CoreShares
from meft.runtime.host.kernels import HostKernels
from meft.runtime.host.optimizer import AdamWSettings, clip_scale
from meft.runtime.host.router import Router
from meft.runtime.host.routers import router_of
from meft.runtime.host.store import HostStore
from meft.runtime.owners.exchange import Queries, exchange_of
from meft.runtime.owners.tables import OwnedTables, rows_of
from meft.runtime.ranks.peers import Peers
from meft.runtime.ranks.sharded_base import ShardedBase, placed, require_whole, together
from meft.runtime.session.documents import DOCUMENT_START, positions_from, unpacked_sequences
from meft.runtime.session.model_loading import COMPUTE_DTYPES, QUANTIZED_DTYPE
from meft.runtime.session.rotary import settle_rotary_frequencies

T = TypeVar("T")
ADAPTER_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Session:
    """Everything that a run of a plan holds. ``router_weights`` is empty for exact routing."""

    plan: Plan
    device: Device
    engine: TransferEngine
    store: HostStore
    exchange: RowExchange
    model: nn.Module
    adapter: AttachedAdapter
    router_weights: list[nn.Parameter]
    settings: AdamWSettings
    router_optimizer: torch.optim.AdamW | None
    clock: LaneClock
    key_init: KeyInit = "random"
    documents_apart: bool = True
    """Whether packed documents get positions of their own; False where the model can make nothing of them."""
    met_packed: bool = False
    """Whether a batch has come with several documents in a sequence, kept apart."""
    peers: Peers | None = None
    """The ranks that share the store, where there are several."""
    tables: OwnedTables | None = None
    """Of rows that machines own, where there are several."""
    base: ShardedBase | None = None
    """The model, where it is sharded over the ranks."""
    _early: list[tuple[Job, Job]] = field(default_factory=list)
    """Norm and update of each layer, where updates began in backward."""

    def step(
        self, batch: Batch, *, loss_scale: float, window_end: WindowEnd | None = None, micro_batch: int | None = None
    ) -> StepResult:
        """One micro-batch forward and backward; gradients are scaled by ``loss_scale``. ``micro_batch`` is its number
        in the run, of all ranks' together; by default of this session's own.

        ``window_end`` says that this is the window's last and what :meth:`optimizer_step` will be told: gradients
        summed on the device leave as soon as a layer has them all, and without clipping, which has to know every
        gradient first, rows are updated while the rest of backward goes on.
        """
        started = time.perf_counter()
        self.exchange.expect_tokens(batch.attention_mask.flatten().bool(), micro_batch=micro_batch)
        self.exchange.closes_window = window_end is not None
        with self.device.scope(), together(self.base):
            _, loss, sent = self.forward_backward(batch, loss_scale=loss_scale, window_end=window_end)
            sent.wait_on_host()
            with self.device.host():
                value = float(loss.item())
        return StepResult(value, time.perf_counter() - started, self.exchange.counters)

    def sit_out(self, *, window_end: WindowEnd | None) -> None:
        """Ranks: the others have a micro-batch and this one has none; what they will add up needs it all the same."""
        self.exchange.closes_window = window_end is not None
        with self.device.scope(), together(self.base):
            self.exchange.sit_out(None if self.base is None else self.base.take_part())
        self.exchange.closes_window = False

    def forward_backward(
        self, batch: Batch, *, loss_scale: float, window_end: WindowEnd | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Copy]:
        """The step itself, inside the device's scope; the loss on the device, and on its way to the host.

        What the routing adds to it (see :mod:`meft.runtime.exchange.gating`) is trained and not told.
        """
        loss = self.loss(batch)
        value, sent = self.engine.send_scalar(loss, category="loss")
        if window_end is not None and window_end.max_norm is None and self.peers is None:
            self._update_early(value, sent, window_end.learning_rate)
        self.exchange.begin_backward()
        balance = self.exchange.take_balance()
        total = loss if balance is None else loss + balance
        del balance
        (total * loss_scale).backward()
        self.exchange.finish_backward()
        self.exchange.closes_window, self.exchange.after_last_gradients = False, None
        return loss, value, sent

    def loss(self, batch: Batch) -> torch.Tensor:
        """The model's loss on a batch, inside the device's scope.

        No attention mask travels: padding is on the right, so causal attention keeps it from every real token, and
        the labels keep it from the loss. Where documents are packed, the label of a document's first token, which
        nothing before it predicts, says so: from it the device makes position ids that begin anew, by which attention
        keeps to one document (see :mod:`meft.runtime.session.documents`), and no more bytes cross the link.
        """
        input_ids = self.to_device(batch.input_ids)
        if batch.starts is None or not self.documents_apart:
            labels = self.to_device(batch.labels)
            with unpacked_sequences():
                loss: torch.Tensor = self.model(input_ids=input_ids, labels=labels, use_cache=False).loss
            return loss
        self.met_packed = True
        with self.device.host():
            told = batch.labels.masked_fill(batch.starts, DOCUMENT_START)
        labels = self.to_device(told)
        positions = positions_from(labels)
        packed: torch.Tensor = self.model(
            input_ids=input_ids, labels=labels, position_ids=positions, use_cache=False
        ).loss
        return packed

    def optimizer_step(self, *, learning_rate: float, max_norm: float | None) -> OptimizerResult:
        """Clip by the global norm over rows and routers, update both, and open a new window.

        Overlapped, rows may still be updated when this returns; the next step, and :meth:`drain`, wait for them.
        """
        started = time.perf_counter()
        self.engine.per = "optimizer_step"
        with self.device.scope():
            kept = self.exchange.close_window()
        layers = range(self.store.num_layers)
        early, self._early = self._early, []
        norms = [norm for norm, _ in early] or [self.exchange.squared_norm(layer) for layer in layers]
        squared = math.fsum(norm.result() for norm in norms) + self._squared_norm_on_device()
        norm, scale = clip_scale(squared, max_norm)
        updates = [update for _, update in early] or [
            self.exchange.update(layer, self.settings, learning_rate=learning_rate, gradient_scale=scale)
            for layer in layers
        ]
        if self.router_optimizer is not None:
            self._update_routers(self.router_optimizer, learning_rate, scale)
        hot = self._update_hot_rows(learning_rate, scale)
        self.engine.per = "step"
        self.exchange.window_open = False
        return OptimizerResult(norm, updates, kept, time.perf_counter() - started, updated_hot_rows=hot)

    def row_gradient_norm(self) -> float:
        """Norm of the gradients of rows that no optimizer step has used; the window goes on.

        Gradients summed on the device go to the host for it.
        """
        with self.device.scope():
            self.exchange.forget_rows()
        squared = math.fsum(self.exchange.squared_norm(layer).result() for layer in range(self.store.num_layers))
        return math.sqrt(squared + self._squared_norm_on_device(routers=False))

    def drain(self) -> None:
        """Wait until no lane has anything left to do."""
        self.engine.schedule.drain()

    def meet(self) -> None:
        """Wait until no lane of any rank has anything left to do; then rank 0 knows how often each row was active."""
        self.drain()
        if self.peers is not None:
            for counts in (*self.store.use.counts, self.store.use.micro_batches):
                self.peers.sum_at_first(counts)

    def wait_for_peers(self) -> None:
        """Wait until every rank has come here."""
        if self.peers is not None:
            self.peers.barrier()

    def require_replicas(self) -> None:
        """Raise :class:`MeftError` unless all machines have the same rows; lanes are idle, and every rank calls it.

        Each updates its own, from the same sums: other processors, or another build of a library, may round otherwise.
        """
        if self.peers is None or self.peers.machines == 1 or self.plan.decision.rows == "owned":
            return
        own = self.store.checksum() if self.peers.local == 0 else None
        sums = self.peers.of_all(own)[:: self.peers.here]
        for machine, found in enumerate(sums):
            if found != sums[0]:
                raise MeftError(
                    f"machine {machine} no longer has the rows of machine 0, though both had the same gradients: "
                    f"give all the same processors and packages; the last checkpoint is of before"
                )

    def at_first(self, work: Callable[[], T]) -> T | None:
        """Do at rank 0 what takes all machines' rows, which are given there meanwhile; None elsewhere. Lanes are idle,
        and every rank calls it."""
        if self.peers is None:
            return work()
        if self.tables is not None:
            self.drain()
            return self.tables.at_first(work, machine=self.peers.machine)
        return work() if self.peers.rank == 0 else None

    def bring_home(self) -> None:
        """Make the host's tables current, also those of rows that live on the device; lanes are idle then."""
        self.drain()
        if self.exchange.hot is not None:
            self.exchange.hot.bring_home()

    def rows_were_written(self) -> None:
        """Rows on the host were written other than by the optimizer: nothing made of them before is good any more.

        They were current there before: see :meth:`bring_home`. Gradients of an open window stay, as torch's do when
        weights are loaded.
        """
        with self.device.scope():
            self.exchange.forget_rows()
        if self.peers is None or self.peers.local == 0:  # who wrote them
            self.store.refresh_copies()
        self.optimizer_state_was_written()

    def optimizer_state_was_written(self) -> None:
        """Moments and counts on the host were written other than by the optimizer, or which rows are hot."""
        if self.exchange.hot is not None:
            self.exchange.hot.host_was_written()

    def forget_gradients(self) -> None:
        """Forget the gradients that no optimizer step has used, of rows and routers."""
        self._early = []
        self.exchange.drop_window()
        for weight in self.router_weights:
            if weight.grad is not None:
                weight.grad.zero_()

    def close(self) -> None:
        """End the lanes and the kernels' threads, whatever they are doing."""
        self.engine.schedule.close()
        if self.store.kernels is not None:
            self.store.kernels.close()

    def _update_early(self, loss: torch.Tensor, sent: Copy, learning_rate: float) -> None:
        """Update each layer once its last gradients are there, unless the loss was not finite."""
        early: list[tuple[Job, Job]] = []

        def not_finite() -> bool:
            sent.wait_on_host()
            return not math.isfinite(loss.item())

        def after_last_gradients(layer: int) -> None:
            norm = self.exchange.squared_norm(layer)
            jobs = (norm,) if sent.job is None else (norm, sent.job)
            update = self.exchange.update(
                layer, self.settings, learning_rate=learning_rate, after=jobs, unless=not_finite
            )
            early.insert(0, (norm, update))  # backward begins with the last layer

        self._early = early
        self.exchange.after_last_gradients = after_last_gradients

    def _squared_norm_on_device(self, *, routers: bool = True) -> float:
        """Of the gradients that are there alone: the routers' and the hot rows'."""
        squared, hot = 0.0, self.exchange.hot
        with self.device.scope(), torch.no_grad():
            if self.router_weights and routers:
                squared += self.engine.read_scalar(self.squared_router_norm(), category="router_norm")
            if hot is not None and hot.rows:
                squared += self.engine.read_scalar(hot.squared_norm(), category="hot_norm")
        return squared

    def _update_hot_rows(self, learning_rate: float, scale: float) -> bool:
        """Update them, or choose them if it is time; whether there were any."""
        hot = self.exchange.hot
        if hot is None:
            return False
        with self.device.scope(), torch.no_grad():
            updated = hot.update(self.settings, learning_rate=learning_rate, gradient_scale=scale)
        hot.choose_if_due()
        return updated

    def squared_router_norm(self) -> torch.Tensor:
        """Sum of squares of the routers' gradients, on the device."""
        squares = [weight.grad.square().sum() for weight in self.router_weights if weight.grad is not None]
        return torch.stack(squares).sum()

    def _update_routers(self, optimizer: torch.optim.AdamW, learning_rate: float, scale: float) -> None:
        with self.device.scope(), self.device.category("router_states"), torch.no_grad():
            for weight in self.router_weights:
                if weight.grad is not None:
                    weight.grad.mul_(scale)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """A host tensor's copy on the device, inside the device's scope, counted as an input."""
        with self.device.host():
            source = host.pin_memory() if self.device.kind == "cuda" else host
        with self.device.category("inputs"):
            target = torch.empty(host.shape, dtype=host.dtype, device=self.device.torch_device)
        self.engine.to_device(source, target, category="inputs").wait_on_device()
        return target


@dataclass(frozen=True)
class WindowEnd:
    """What the optimizer step after a window's last micro-batch will be told."""

    learning_rate: float
    max_norm: float | None


@dataclass(frozen=True)
class StepResult:
    """What one micro-batch gave."""

    loss: float
    seconds: float
    counters: StepCounters


@dataclass(frozen=True)
class OptimizerResult:
    """What one optimizer step did: the global gradient norm before clipping, and how many rows it updates.

    ``seconds`` are those until it returned.
    """

    gradient_norm: float
    updates: list[Job]
    kept_rows: list[int]
    """Rows of each layer that were on the device at the window's end."""
    seconds: float
    updated_hot_rows: bool = False
    """Whether there were hot rows, which the device updates."""


def open_session(
    plan: Plan,
    model: nn.Module,
    device: Device,
    *,
    seed: int,
    settings: AdamWSettings | None = None,
    around: Callable[[Router], Router] | None = None,
    cache: RowCache | None = None,
    placer: ChunkPlacer | None = None,
    compiled: bool = True,
    schedule: Schedule | None = None,
    link_gbps: float | None = None,
    clock: LaneClock | None = None,
    key_init: KeyInit = "random",
    peers: Peers | None = None,
    cores: CoreShares | None = None,
) -> Session:
    """Put ``model`` on the device with a fresh adapter beside it, as the plan decides.

    ``around`` takes the plan's router and gives what chooses rows in its place; ``cache`` and ``placer`` replace the
    plan's own (a rehearsal passes some that need no data). ``compiled=False`` does the host's work with the readable
    code. ``schedule`` says who does what when, by default one thing after the other; the session's
    :meth:`~Session.close` closes it. ``clock`` is told of every task. ``key_init`` says where keys begin: see
    :mod:`meft.runtime.adapter.initialise`. ``peers`` share the store, all of which open their session at once.
    ``cores`` binds the kernels' threads.
    """
    decision, shape = plan.decision, plan.request.model
    settings = settings or AdamWSettings()
    model, base = _on_device(plan, model, device, key_init, peers)
    clock = clock or LaneClock()
    engine = _new_engine(device, schedule or Sequential(), clock, link_gbps)
    kernels = HostKernels(cores=None if cores is None else cores.kernels) if compiled else None
    store = _new_store(plan, kernels, peers)
    if peers is None or peers.local == 0:
        _fill(store, model, seed, key_init)
    weights = _graph_weights(decision, shape.num_layers, shape.hidden_size, device, seed)
    routers = weights if decision.needs.gated else []
    router = router_of(decision, store, kernels)
    exchange = exchange_of(
        decision,
        device=device,
        engine=engine,
        store=store,
        router=router if around is None else around(router),
        adapter_dtype=ADAPTER_DTYPES[plan.request.adapter_dtype],
        router_weights=routers,
        cache=cache,
        placer=placer,
        clock=clock,
        peers=peers,
        queries=Queries(plan.request.tokens_per_step, COMPUTE_DTYPES.get(plan.request.weights_dtype, QUANTIZED_DTYPE)),
        seed=seed,
    )
    optimizer = _router_optimizer(routers, settings, device) if routers else None
    adapter = attach(model, exchange, weights)
    parts = (plan, device, engine, store, exchange, model, adapter, routers, settings, optimizer, clock, key_init)
    session = Session(*parts, peers=peers, tables=OwnedTables.of(decision, store, peers), base=base)
    session.wait_for_peers()  # the rows are there
    return session


def _on_device(
    plan: Plan, model: nn.Module, device: Device, key_init: KeyInit, peers: Peers | None
) -> tuple[nn.Module, ShardedBase | None]:
    """The model, ready to train beside; of a base that is sharded this rank's part of it."""
    settle_rotary_frequencies(model)
    if key_init == "ffn":
        require_whole(plan)
    model, base = placed(plan, model, decoder_blocks(model), device, peers)
    model.train()
    if plan.decision.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return model, base


def _new_engine(device: Device, schedule: Schedule, clock: LaneClock, link_gbps: float | None) -> TransferEngine:
    """What copies and runs jobs, each of which the clock is told of."""
    schedule.on_job = clock
    clock.follow(device.streams)
    return TransferEngine(device, schedule, link_gbps=link_gbps)


def _fill(store: HostStore, model: nn.Module, seed: int, key_init: KeyInit) -> None:
    """The rows' first values."""
    store.initialise(seed=seed)
    if key_init == "ffn":
        keys_from_ffn(store, model, seed=seed)


def _new_store(plan: Plan, kernels: HostKernels | None, peers: Peers | None) -> HostStore:
    """The rows' home, empty; in memory that all ranks share where there are several."""
    decision, shape = plan.decision, plan.request.model
    held, own = rows_of(decision, peers)
    return HostStore(
        num_layers=shape.num_layers,
        adapter_width=decision.adapter_width,
        hidden_size=shape.hidden_size,
        kernels=kernels,
        bf16_copy=decision.bf16_copy and plan.request.adapter_dtype == "bf16",
        has_hot_rows=decision.hot_rows > 0,
        means_of_experts=decision.num_experts if decision.needs.means else None,
        zeros=huge_pages.zeros if peers is None else peers.zeros,
        own_rows=own,
        held=held,
    )


def _graph_weights(
    decision: Decision, num_layers: int, hidden_size: int, device: Device, seed: int
) -> list[nn.Parameter]:
    """Per layer the router ``[N, D]`` (stable: ``[2N, D]``), uniform in +-1/sqrt(D); for exact routing a scalar that
    starts the graph."""
    generator = torch.Generator().manual_seed(seed + 1)
    rows = decision.needs.router_rows(decision.num_experts)
    shape = (rows, hidden_size) if rows else ()
    bound = hidden_size**-0.5
    weights = []
    for _ in range(num_layers):
        host = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        with device.scope(), device.category("router_weights"):
            weight = torch.empty(shape, device=device.torch_device)
            with device.host():
                weight.copy_(host)
        weights.append(nn.Parameter(weight))
    return weights


def _router_optimizer(weights: list[nn.Parameter], settings: AdamWSettings, device: Device) -> torch.optim.AdamW:
    """Torch's own AdamW, one parameter at a time: no foreach temporaries on the device.

    Gradients and moments are made here, so that device memory is the same in the first step as in every later one.
    """
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(
        weights, betas=betas, eps=settings.eps, weight_decay=settings.weight_decay, foreach=False
    )
    with device.scope(), device.category("router_states"):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
            moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            optimizer.state[weight] = {"step": torch.tensor(0.0), **moments}
    return optimizer
