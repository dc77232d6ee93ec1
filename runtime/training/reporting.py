"""From a run's measurements to ``report.json``: observed figures, and each beside its prediction."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

import psutil

from meft.planner.records.plan import Decision, Direction, MemoryEntry, Plan, TransferEntry, Way
from meft.planner.records.report import (
    ActiveRows,
    Comparison,
    DeviceUsed,
    Observed,
    ObservedDeviceMemory,
    ObservedHostMemory,
    ObservedTransfer,
    Report,
    Training,
)
from meft.runtime.device.device import MemoryPeaks
from meft.runtime.device.engine import Per
from meft.runtime.device.nvml import MemoryReading, PcieReading
from meft.runtime.ranks.machines import Per as NetworkPer
from meft.runtime.session.checkpoint import RunObserved
from meft.runtime.session.expert_load import expert_load
from meft.runtime.session.session import Session
from meft.runtime.training.measured import Measurements, Totals, Worked
from meft.runtime.training.packing import as_run
from meft.runtime.training.training import Trainer, worked

T = TypeVar("T", bound=str)
_WHY = {
    "queries": "hidden states to the host, for routing",
    "probes": "each token's experts to the host",
    "rows": "active rows to the device, forward",
    "rows_refetched": "active rows to the device again, backward",
    "row_experts": "the expert of each active row",
    "row_gradients": "gradients of the active rows to the host",
    "row_positions": "where the active rows that were kept on the device lie",
    "window_gradients": "gradients summed on the device over the window, to the host",
    "hot_keys": "keys of the hot rows to the host, which chooses by them",
    "hot_norm": "squared norm of the hot rows' gradients, for clipping",
    "hot_placed": "hot rows with their optimizer state to the device, for good",
    "hot_returned": "hot rows with their optimizer state to the host, to be saved or read there",
    "inputs": "token ids and labels",
    "loss": "the loss, for the report",
    "router_gradients": "several ranks: the routers' gradients to the host, and their sums to every device",
    "router_norm": "squared norm of the routers' gradients, for clipping",
    "weights": "sharded base: the layers' weights, gathered from the other cards",
}
_WHY_NETWORK = {
    "row_gradients": "gradients of rows that another machine adds up",
    "row_sums": "sums of the window's touched rows, to every machine",
    "router_gradients": "the routers' gradients, to the machine that adds them up",
    "router_sums": "sums of the routers' gradients, to every machine",
    "rounds": "losses, and whether a rank was asked to stop",
    "queries": "hidden states and probed experts, to the rows' owners",
    "scores": "scores of the probed experts' rows, from their owners",
    "rows": "numbers of active rows to their owners, and the rows from them",
    "row_squares": "each row's gradient's sum of squares, to every machine",
    "router_means": "means of a machine's experts' keys, to the others",
}


def observe(trainer: Trainer, *, memory: MemoryReading, pcie: PcieReading) -> RunObserved:
    """What this process measured so far (at least one step); the lanes are idle."""
    session, measured, done = trainer.session, trainer.measured, work_done(trainer)
    observed = Observed(
        steps=measured.steps,
        device_memory=device_memory(measured.peaks.larger(session.device.peaks()), memory),
        host_memory=host_memory(session),
        transfer=transfer(session, steps=measured.steps, windows=measured.windows, pcie=pcie),
        active_rows=rows_seen(measured, session.plan.decision),
        hot_windows=measured.hot_windows,
        packed=session.met_packed,
        dropped_rows=measured.dropped_rows,
        prefetch_recall=None,
        step_seconds=_step_seconds(trainer),
        busy_seconds=per_step(done.lanes, done.steps),
        host_task_seconds=per_step(done.host_tasks, done.steps),
        waited_seconds=None if session.peers is None else session.peers.waited_seconds / measured.steps,
    )
    return RunObserved(observed=observed, tokens=measured.tokens)


def build_report(trainer: Trainer, seen: RunObserved, *, recall: float | None, meft_version: str) -> Report:
    """Report of a training run, from its history and what the process that did its last step observed."""
    session, history = trainer.session, trainer.history
    training = Training(
        steps=len(history.losses),
        optimizer_steps=len(history.learning_rates),
        tokens=seen.tokens,
        sequence_tokens=trainer.sequence_tokens,
        loss_per_step=tuple(history.losses),
        learning_rate_per_optimizer_step=tuple(history.learning_rates),
        gradient_norm_per_optimizer_step=tuple(history.gradient_norms),
        seed=trainer.options.seed,
        key_init=session.key_init,
        known_token_weight=trainer.options.known_token_weight,
    )
    observed = seen.observed.model_copy(update={"prefetch_recall": recall})
    report = assemble(session, observed, training, meft_version=meft_version, rehearsal=False)
    return report.model_copy(
        update={"expert_load": expert_load(session), "gpus": seen.gpus, "nodes": seen.nodes, "ranks": seen.ranks}
    )


def assemble(session: Session, observed: Observed, training: Training, *, meft_version: str, rehearsal: bool) -> Report:
    """Put a report together and compare it with the session's plan."""
    device = session.device
    return Report(
        meft_version=meft_version,
        plan_digest=session.plan.content_digest(),
        rehearsal=rehearsal,
        device=DeviceUsed(kind=device.kind, name=device.name, budget_bytes=device.budget_bytes),
        observed=observed,
        comparison=compare(as_run(session.plan, packed=observed.packed, emulated=device.kind == "emulated"), observed),
        training=training,
        versions={name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        layers=session.store.num_layers,
    )


def compare(plan: Plan, observed: Observed) -> tuple[Comparison, ...]:
    """Predicted, observed and their ratio for every quantity that was observed."""
    prediction = plan.prediction
    rows = prediction.sparsity.active_rows_per_layer
    seen = [layer.mean for layer in observed.active_rows]
    memory, transferred = observed.device_memory, observed.transfer
    process = prediction.device_memory.process_bytes
    pairs: list[tuple[str, float, float | None]] = [
        ("device_allocated_bytes", prediction.device_memory.peak_allocated_bytes, memory.peak_allocated_bytes),
        ("device_reserved_bytes", prediction.device_memory.peak_reserved_bytes, memory.peak_reserved_bytes),
        ("device_process_bytes", (process.low_bytes + process.high_bytes) / 2, memory.process_bytes),
        ("host_adapter_bytes", prediction.host_memory.total_bytes, observed.host_memory.total_bytes),
        ("h2d_bytes_per_step", prediction.transfer.h2d_bytes_per_step, transferred.h2d_bytes_per_step),
        ("d2h_bytes_per_step", prediction.transfer.d2h_bytes_per_step, transferred.d2h_bytes_per_step),
        ("active_rows_per_layer", statistics.fmean(rows), statistics.fmean(seen)),
        ("step_seconds", prediction.timing.step_seconds, observed.step_seconds),
    ]
    return tuple(
        Comparison(quantity=name, predicted=predicted, observed=seen_, ratio=predicted / seen_ if seen_ else None)
        for name, predicted, seen_ in pairs
        if seen_ is not None
    )


def host_memory(session: Session) -> ObservedHostMemory:
    """Bytes of the tables and staging buffers, as allocated; tables that ranks share are the first one's."""
    sizes = session.exchange.host_buffer_bytes()
    if session.peers is None or session.peers.local == 0:
        sizes = session.store.bytes_by_category() | sizes | session.exchange.shared_table_bytes()
    entries = tuple(
        MemoryEntry(
            place="host", phase="resident", category=name, num_bytes=size, basis="counted", because="as allocated"
        )
        for name, size in sizes.items()
    )
    rss = psutil.Process().memory_info().rss
    return ObservedHostMemory(entries=entries, total_bytes=sum(sizes.values()), process_rss_bytes=rss)


def transfer(session: Session, *, steps: int, windows: int, pcie: PcieReading) -> ObservedTransfer:
    """What the engine counted: means per step and per optimizer step, totals over the steps, and over the run."""
    session.drain()
    return transfer_of(session.engine.counted_bytes, cards=gathered(session), steps=steps, windows=windows, pcie=pcie)


def gathered(session: Session) -> Mapping[tuple[str, Per], int]:
    """Weights that came from other ranks, by category and by what they belong to."""
    return {} if session.base is None else session.base.counted_bytes


def transfer_of(
    counted: Mapping[tuple[Direction, str, Per], int],
    *,
    network: Mapping[tuple[str, NetworkPer], int] | None = None,
    cards: Mapping[tuple[str, Per], int] | None = None,
    steps: int,
    windows: int,
    pcie: PcieReading,
) -> ObservedTransfer:
    """The same, of counted bytes; ``network`` are those between machines, ``cards`` those between a machine's cards."""
    divisors: dict[Per, int] = {"step": max(1, steps), "optimizer_step": max(1, windows), "run": 1}
    crossed = {("network", name, per): size for (name, per), size in (network or {}).items()}
    came = {("cards", name, per): size for (name, per), size in (cards or {}).items()}
    all_counted: dict[tuple[Any, str, Any], int] = {**counted, **crossed, **came}
    entries = tuple(
        TransferEntry(
            direction=way,
            category=category,
            per=per,
            num_bytes=round(size / divisors[per]),
            because=(_WHY_NETWORK if way == "network" else _WHY)[category],
        )
        for (way, category, per), size in sorted(all_counted.items())
        if per != "probe"
    )

    def total(way: Way, per: Per) -> int:
        return sum(size for (direction, _, kind), size in all_counted.items() if (direction, kind) == (way, per))

    return ObservedTransfer(
        entries=entries,
        h2d_bytes_per_step=round(total("h2d", "step") / divisors["step"]),
        d2h_bytes_per_step=round(total("d2h", "step") / divisors["step"]),
        h2d_bytes_per_optimizer_step=round(total("h2d", "optimizer_step") / divisors["optimizer_step"]),
        d2h_bytes_per_optimizer_step=round(total("d2h", "optimizer_step") / divisors["optimizer_step"]),
        h2d_bytes_total=total("h2d", "step"),
        d2h_bytes_total=total("d2h", "step"),
        nvml_rx_bytes=pcie.rx_bytes,
        nvml_tx_bytes=pcie.tx_bytes,
        nvml_source=pcie.source,
        network_bytes_per_step=round(total("network", "step") / divisors["step"]),
        network_bytes_per_optimizer_step=round(total("network", "optimizer_step") / divisors["optimizer_step"]),
        network_bytes_total=total("network", "step"),
        cards_bytes_per_step=round(total("cards", "step") / divisors["step"]),
        cards_bytes_total=total("cards", "step"),
    )


def active_rows(layers: Sequence[Mapping[int, int]]) -> tuple[ActiveRows, ...]:
    """Per layer over the steps, from how often each number of rows came."""
    return tuple(_active_rows(layer, seen) for layer, seen in enumerate(layers))


def _active_rows(layer: int, seen: Mapping[int, int]) -> ActiveRows:
    steps, total = sum(seen.values()), sum(count * often for count, often in seen.items())
    middle = [_in_order(seen, place) for place in ((steps - 1) // 2, steps // 2)]
    return ActiveRows(
        layer=layer,
        mean=total / steps,
        median=sum(middle) / 2,
        p99=float(_in_order(seen, math.ceil(0.99 * steps) - 1)),  # the smallest that 99 % of the batches do not exceed
        max=max(seen),
        total=total,
    )


def _in_order(seen: Mapping[int, int], place: int) -> int:
    """What stands at a place (from 0) of all numbers in ascending order."""
    for count in sorted(seen):
        place -= seen[count]
        if place < 0:
            return count
    raise IndexError(place)


def rows_seen(measured: Measurements, decision: Decision) -> tuple[ActiveRows, ...]:
    """Active rows by layer, with what travelled where some did not (they were cached, or came in chunks), what was
    kept, and how many were hot."""
    layers = active_rows(measured.active_rows.layers)
    kinds: dict[str, Totals] = {}
    if decision.cached_rows or decision.token_chunks > 1:
        kinds |= {"missing_total": measured.missing_rows, "overflow_total": measured.overflow_rows}
    if decision.cached_rows:
        kinds |= {"kept_total": measured.kept_rows}
    if decision.hot_rows:
        kinds |= {"hot_total": measured.hot_rows}
    return tuple(
        layer.model_copy(update={name: total.layers[layer.layer] for name, total in kinds.items()}) for layer in layers
    )


def device_entries(by_category: dict[str, int]) -> tuple[MemoryEntry, ...]:
    """What was live at the allocated peak, largest first."""
    return tuple(
        MemoryEntry(
            place="device",
            phase="resident",
            category=name,
            num_bytes=size,
            basis="counted",
            because="live at the allocated peak",
        )
        for name, size in sorted(by_category.items(), key=lambda item: -item[1])
    )


def device_memory(peaks: MemoryPeaks, memory: MemoryReading) -> ObservedDeviceMemory:
    """The allocator's peaks and NVML's figure."""
    return ObservedDeviceMemory(
        peak_allocated_bytes=peaks.allocated_bytes,
        peak_reserved_bytes=peaks.reserved_bytes,
        process_bytes=memory.num_bytes,
        process_bytes_source=memory.source,
        entries=device_entries(peaks.by_category),
    )


def _step_seconds(trainer: Trainer) -> float:
    """Per step, optimizer step included: the median over windows, without the first if there are others."""
    windows = trainer.measured.window_seconds
    return statistics.median(windows[1:] or windows)


def work_done(trainer: Trainer) -> Worked:
    """What the lanes did, without the first window if there are others: it warms things up."""
    everything = worked(trainer.session, trainer.measured.steps)
    return everything.since(trainer.measured.warm_up or Worked())


def per_step(seconds: dict[T, float], steps: int) -> dict[T, float]:
    """The mean of each over the steps."""
    return {name: each / max(1, steps) for name, each in seconds.items()}
