"""A run of several ranks: how they begin and end, who writes, and what they have observed together.

Rank 0 has the output folder, the log and the display; the others are silent. Of several machines each reads its own
model, data and checkpoint, which must be the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import torch

from meft.planner.base.errors import UsageError
from meft.planner.records.plan import Lane, Plan
from meft.planner.records.report import ActiveRows, Observed, ObservedHostMemory
from meft.runtime.device.nvml import MemoryReading, PcieReading
from meft.runtime.ranks import ordered
from meft.runtime.ranks.machines import Per
from meft.runtime.ranks.peers import Peers, Place
from meft.runtime.ranks.sharded_base import require_planned_ranks
from meft.runtime.session.checkpoint import TRAINING_STATE, RunObserved, latest_checkpoint
from meft.runtime.session.session import Session
from meft.runtime.training import output
from meft.runtime.training.measured import Histograms, Measurements, Totals, Worked
from meft.runtime.training.options import Display, RunOptions
from meft.runtime.training.reporting import gathered, host_memory, observe, per_step, rows_seen, transfer_of, work_done
from meft.runtime.training.training import Trainer

K = TypeVar("K")


@contextmanager
def ranks(plan: Plan, *, steps: int | None) -> Iterator[Peers | None]:
    """The other ranks, where this process is one of several: met before, and left in good order after.

    Raises:
        UsageError: the plan, or so few steps, are not for so many ranks.
    """
    place = Place.here()
    if place is None:
        require_planned_ranks(plan, 1, machines=1)
        yield None
        return
    check(plan, place.per_machine, machines=place.machines, steps=steps)
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local)
    ordered.warm_up()
    peers = Peers.join(place)
    yield peers
    peers.leave()


def check(plan: Plan, gpus: int, *, machines: int = 1, steps: int | None) -> None:
    """Raise :class:`UsageError` for what ``gpus`` ranks on each of ``machines`` cannot do yet."""
    grad_accum, decision, size = plan.request.grad_accum, plan.decision, gpus * machines
    given = f"--gpus {gpus}" if machines == 1 else f"--nodes {machines} --gpus {gpus}"
    if grad_accum % size:
        fitting = [str(count) for count in range(1, grad_accum + 1) if grad_accum % count == 0]
        raise UsageError(
            f"{given}: the plan's {grad_accum} micro-batches of an optimizer step do not divide among {size} "
            f"ranks; give one of {', '.join(fitting)}, or plan again with another --grad-accum"
        )
    if decision.hot_rows:
        raise UsageError(
            f"{given}: the plan keeps {decision.hot_rows} hot rows on the device, each of which several devices "
            f"would have to agree on; run it on one, or plan again with --hot-rows 0"
        )
    if decision.token_chunks > 1:
        raise UsageError(
            f"{given}: the plan takes tokens in {decision.token_chunks} chunks, which several devices do not yet; run "
            f"it on one, or plan again without --token-chunks"
        )
    if decision.rows == "owned" and decision.num_experts % machines:
        raise UsageError(
            f"{given}: the plan's {decision.num_experts} experts, which machines own, do not divide among {machines}; "
            f"take another number of machines, or plan again with --nodes {machines}"
        )
    require_planned_ranks(plan, gpus, machines=machines)
    if steps is not None and steps < size:
        raise UsageError(f"--steps {steps}: less than the {size} ranks have micro-batches at once; give {size} or more")


def check_evaluation(plan: Plan, peers: Peers | None) -> None:
    """Raise :class:`UsageError` where rank 0, which evaluates, has not the rows or weights that it would take."""
    if plan.request.shard_base:
        raise UsageError(
            "--eval: rank 0 has its part of the sharded base alone; leave it out, and score the saved adapter with "
            "meft-run evaluate"
        )
    if plan.decision.rows == "owned" and peers is not None and peers.machines > 1:
        raise UsageError(
            f"--eval: machine 0 of {peers.machines} has its own rows alone; leave it out, and score the saved "
            f"adapter with meft-run evaluate"
        )


def require_same(peers: Peers | None, what: Mapping[str, str]) -> None:
    """Raise :class:`UsageError`, in every rank, unless all machines were given the same; ``what`` by option."""
    if peers is None or peers.machines == 1:
        return
    each = peers.of_all(dict(what))
    for option, value in each[0].items():
        others = [rank // peers.here for rank, given in enumerate(each) if given[option] != value]
        if others:
            raise UsageError(f"{option}: machine {others[0]} was given another than machine 0; give all the same")


def first_alone(peers: Peers | None) -> AbstractContextManager[None]:
    """See :meth:`Peers.first_alone`; nothing for one rank."""
    return nullcontext() if peers is None else peers.first_alone()


def shown(display: Display, peers: Peers | None) -> Display:
    """The display of rank 0, and one that shows nothing of the others."""
    if is_first(peers):
        return display
    return replace(display, say=lambda _: None, on_step=lambda _: None)


def is_first(peers: Peers | None) -> bool:
    """Whether this is the rank that writes and speaks."""
    return peers is None or peers.rank == 0


@contextmanager
def output_folder(options: RunOptions, peers: Peers | None, say: Callable[[str], None]) -> Iterator[Path | None]:
    """Hold the output folder; the checkpoint to go on from, if that was asked for. Rank 0 holds it for all."""
    if peers is not None and peers.rank:
        yield _there(peers.from_first(None), peers)
        return
    with output.locked(options.output_dir, say):
        output.require_unused(options.output_dir, resume=options.resume, overwrite=options.overwrite)
        checkpoint = latest_checkpoint(options.output_dir) if options.resume else None
        yield checkpoint if peers is None else _there(peers.from_first(checkpoint), peers)


def _there(checkpoint: Path | None, peers: Peers) -> Path | None:
    """The checkpoint, which every machine reads."""
    if checkpoint is None or peers.machines == 1:
        return checkpoint
    state = checkpoint / TRAINING_STATE
    each = peers.of_all(sha256(state.read_bytes()).hexdigest() if state.exists() else None)
    others = [rank // peers.here for rank, found in enumerate(each) if found is None or found != each[0]]
    if others:
        raise UsageError(
            f"--resume: machine {others[0]} has no such {checkpoint.resolve()} as machine 0 has; put --output-dir on "
            f"a disk that all share, or copy the checkpoint there"
        )
    return checkpoint


def observe_all(trainer: Trainer, *, memory: MemoryReading, pcie: PcieReading) -> RunObserved:
    """What all ranks have observed, together and each. Every rank calls it; the lanes are idle."""
    session, peers = trainer.session, trainer.session.peers
    if peers is None:
        return observe(trainer, memory=memory, pcie=pcie)
    own = observe(trainer, memory=memory, pcie=pcie).observed if trainer.measured.steps else None
    crossed = _crossed(session)
    counted_here = (dict(session.engine.counted_bytes), dict(gathered(session)))
    told = peers.of_all((own, trainer.measured, *counted_here, work_done(trainer), host_memory(session), crossed))
    each, measured, counted, cards, done, memories, network = map(list, zip(*told, strict=True))
    seen = [one for one in each if one is not None]
    together = _merged(measured)
    work = _summed(done)
    fullest = max((one.device_memory for one in seen), key=lambda used: used.peak_reserved_bytes)
    observed = seen[0].model_copy(
        update={
            "steps": together.steps,
            "device_memory": fullest,
            "host_memory": _host_memory(memories[: peers.here]),
            "transfer": transfer_of(
                _added(counted),
                network=_added([of_rank.counted for of_rank in network]),
                cards=_added(cards),
                steps=together.steps,
                windows=together.windows,
                pcie=pcie,
            ),
            "active_rows": _with_crossed(rows_seen(together, session.plan.decision), network),
            "dropped_rows": together.dropped_rows,
            "busy_seconds": per_step(work.lanes, work.steps),
            "host_task_seconds": per_step(work.host_tasks, work.steps),
            "waited_seconds": sum((one.waited_seconds or 0.0) * one.steps for one in seen) / together.steps,
        }
    )
    return RunObserved(
        observed=Observed.model_validate(observed.model_dump()),
        tokens=together.tokens,
        gpus=peers.here,
        nodes=peers.machines,
        ranks=tuple(seen),
    )


@dataclass(frozen=True)
class _Crossed:
    """What a rank has sent to other machines."""

    counted: Mapping[tuple[str, Per], int]
    rows: Mapping[str, list[int]]
    """By kind, then by layer."""


def _crossed(session: Session) -> _Crossed:
    """Of this rank; in steps and optimizer steps, not in what is told beside them."""
    peers = session.peers
    if peers is None or peers.network is None:
        return _Crossed({}, {})
    counted = dict(peers.network.counted_bytes)
    if peers.leaders is not None:
        counted["rounds", "step"] = peers.leaders.counted_bytes
    return _Crossed(counted, session.exchange.network_rows())


def _with_crossed(layers: tuple[ActiveRows, ...], network: Sequence[_Crossed]) -> tuple[ActiveRows, ...]:
    """Active rows with those of them that crossed, of all ranks."""
    totals = {
        name: [sum(each) for each in zip(*(one.rows[name] for one in network), strict=True)] for name in network[0].rows
    }
    return tuple(
        layer.model_copy(update={name: total[layer.layer] for name, total in totals.items()}) for layer in layers
    )


def _merged(each: list[Measurements]) -> Measurements:
    """Rows, steps and tokens of all ranks; windows and their time are the same in each."""
    together = Measurements(windows=each[0].windows, window_seconds=each[0].window_seconds)
    for one in each:
        together.steps += one.steps
        together.dropped_rows += one.dropped_rows
        together.tokens += one.tokens
        for name in ("missing_rows", "overflow_rows", "hot_rows", "kept_rows"):
            totals: Totals = getattr(together, name)
            if getattr(one, name).layers:
                totals.add(getattr(one, name).layers)
        together.active_rows = _joined(together.active_rows, one.active_rows)
    return together


def _joined(one: Histograms, other: Histograms) -> Histograms:
    if not one.layers or not other.layers:
        return one if one.layers else other
    return Histograms([a + b for a, b in zip(one.layers, other.layers, strict=True)])


def _summed(each: list[Worked]) -> Worked:
    lanes, tasks = defaultdict[Lane, float](float), defaultdict[str, float](float)
    for one in each:
        for lane, seconds in one.lanes.items():
            lanes[lane] += seconds
        for task, seconds in one.host_tasks.items():
            tasks[task] += seconds
    return Worked(sum(one.steps for one in each), dict(lanes), dict(tasks))


def _added(each: Sequence[Mapping[K, int]]) -> Counter[K]:
    total: Counter[K] = Counter()
    for one in each:
        total.update(one)
    return total


def _host_memory(each: list[ObservedHostMemory]) -> ObservedHostMemory:
    """Of a machine's ranks: tables once, of the first; staging of all. The processes' resident sizes have shared
    pages in common: not summed.
    """
    sizes: Counter[str] = Counter()
    for one in each:
        sizes.update({entry.category: entry.num_bytes for entry in one.entries})
    because = {entry.category: entry for one in each for entry in one.entries}
    entries = tuple(because[name].model_copy(update={"num_bytes": size}) for name, size in sizes.items())
    return ObservedHostMemory(entries=entries, total_bytes=sum(sizes.values()), process_rss_bytes=None)
