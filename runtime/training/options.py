"""A run as asked for, where it tells how it goes, and the session that it opens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from meft.planner.base.errors import UsageError
from meft.planner.base.files import writing
from meft.planner.records.plan import Plan
from meft.planner.timing.chrome import chrome_trace
from meft.runtime.adapter.initialise import KeyInit
from meft.runtime.data.loading import DataOptions, Dataset
from meft.runtime.device import card
from meft.runtime.device.device import Device
from meft.runtime.device.lanes import (
    WORKERS,
    WORKERS_OF_MACHINES,
    WORKERS_OF_RANKS,
    Overlapped,
    Schedule,
    Sequential,
    Worker,
)
from meft.runtime.device.timeline import LaneClock
from meft.runtime.host.cores import CoreShares, bind_thread, shares_of, usable_cores
from meft.runtime.host.optimizer import AdamWSettings
from meft.runtime.ranks.peers import Peers
from meft.runtime.session import model_loading
from meft.runtime.session.session import Session, open_session
from meft.runtime.training import packing
from meft.runtime.training.interrupts import Interrupts
from meft.runtime.training.training import Progress, TrainingOptions
from meft.runtime.use.evaluation import EvaluationOptions

DeviceKind = Literal["cuda", "emulated"]
"""The name of the profile that a plan for the emulated device rests on."""
DEFAULT_STEPS = 100


@dataclass(frozen=True)
class Length:
    """How long a run is: so many micro-batches, or so many times through the data; neither: as before, or 100."""

    steps: int | None = None
    epochs: float | None = None

    def total_steps(self, *, num_examples: int, batch_size: int, before: int | None) -> int:
        """Micro-batches in all; ``before`` is what a run that goes on was to have."""
        if self.epochs is not None:
            return max(1, math.ceil(self.epochs * num_examples / batch_size))
        return self.steps or before or DEFAULT_STEPS


@dataclass(frozen=True)
class RunOptions:
    """A run as asked for on the command line."""

    training: TrainingOptions
    settings: AdamWSettings
    model: str | None = None
    data: tuple[Path, ...] = ()
    reading: DataOptions = field(default_factory=DataOptions)
    """How the data is read."""
    show: int = 0
    """Examples that are shown before training."""
    replay: Path | None = None
    """Ordinary text to train on beside the data, as ``replay_share`` of the examples."""
    replay_share: float | None = None
    output_dir: Path = Path("output")
    device: Literal["auto", "cuda", "emulated"] = "auto"
    gpu_mem_bytes: int | None = None
    """Another device budget than the plan's."""
    resume: bool = False
    overwrite: bool = False
    """Replace what an earlier run left in ``output_dir``."""
    length: Length | None = None
    """None: ``training.steps``."""
    adapter: Path | None = None
    """A trained adapter to start from."""
    log: Path | None = None
    tensorboard: Path | None = None
    schedule: Literal["overlapped", "sequential"] = "overlapped"
    link_gbps: float | None = None
    trace: Path | None = None
    """Where the Chrome trace of the last step goes."""
    evaluation: EvaluationOptions | None = None
    key_init: KeyInit = "random"
    bind_cores: bool | None = None
    """Host kernels on cores of their own, apart from Python and copies; None: as planned, where the machine lets it."""


@dataclass(frozen=True)
class Display:
    """Where a run tells how it goes."""

    say: Callable[[str], None]
    on_step: Callable[[Progress], None]
    interrupts: Interrupts = field(default_factory=Interrupts)


def open_run(
    plan: Plan,
    options: RunOptions,
    folder: Path,
    device: Device,
    dataset: Dataset,
    say: Callable[[str], None],
    peers: Peers | None,
) -> Session:
    """The session of a run, on a fresh device."""
    torch.manual_seed(options.training.seed)
    cores = _cores(plan, options, device, peers, say)
    model = model_loading.load_frozen_model(plan, folder, device_kind=device.kind)
    apart = packing.documents_apart(plan, model, dataset, say)
    session = open_session(
        plan,
        model,
        device,
        seed=options.training.seed,
        settings=options.settings,
        schedule=_schedule(options, peers, cores),
        link_gbps=options.link_gbps,
        clock=LaneClock(keep=options.trace is not None),
        key_init=options.key_init,
        peers=peers,
        cores=cores,
    )
    session.documents_apart = apart
    return session


def _cores(
    plan: Plan, options: RunOptions, device: Device, peers: Peers | None, say: Callable[[str], None]
) -> CoreShares | None:
    """Whose cores are whose; None: the system's affair. Raises :class:`UsageError` where that is asked for and cannot
    be; where the plan alone has it, the run goes on without."""
    if options.bind_cores is not None:
        return _bound(device, peers, say) if options.bind_cores else None
    if not plan.decision.bind_cores:
        return None
    try:
        return _bound(device, peers, say)
    except UsageError as error:
        say(f"the plan binds the host's kernels to cores of their own, which is not done: {error}")
        return None


def _bound(device: Device, peers: Peers | None, say: Callable[[str], None]) -> CoreShares:
    """Divide the cores near the device, and bind this thread: to Python's where it only tells a GPU what to do."""
    rank, num_ranks = (0, 1) if peers is None else (peers.local, peers.here)
    near = card.near_cores(device.torch_device.index) if device.kind == "cuda" else frozenset()
    shares = shares_of(usable_cores(), near=near, rank=rank, num_ranks=num_ranks)
    bind_thread(shares.lanes if device.kind == "cuda" else shares.kernels)
    say(f"bound: {shares}")
    return shares


def _schedule(options: RunOptions, peers: Peers | None, cores: CoreShares | None) -> Schedule:
    if options.schedule == "sequential":
        return Sequential()
    workers = WORKERS
    if peers is not None:
        workers = WORKERS_OF_RANKS if peers.machines == 1 else WORKERS_OF_MACHINES
    return Overlapped(workers=workers, bind=None if cores is None else partial(_bind_lane, cores))


def _bind_lane(cores: CoreShares, lane: Worker) -> None:
    bind_thread(cores.kernels if lane == "cpu" else cores.lanes)


def write_trace(session: Session, path: Path) -> None:
    """The tasks of the last step; on CUDA without the copies, whose streams keep no log."""
    session.drain()
    session.clock.settle()
    events = session.clock.events()
    if session.device.kind == "cuda":
        events = [event for event in events if event.lane in ("cpu", "gpu")]
    text = json.dumps(chrome_trace(events), separators=(",", ":"))
    with writing(path, hint="the adapter and the last checkpoint are whole"):
        path.write_text(text, encoding="utf-8")
