"""A run's session, opened as its options say, and the trace that it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from meft.planner.base.files import writing
from meft.planner.records.plan import Plan
from meft.planner.timing.chrome import chrome_trace
from meft.runtime.data.loading import Dataset
from meft.runtime.device.device import Device
from meft.runtime.device.lanes import WORKERS, WORKERS_OF_RANKS, Overlapped, Schedule, Sequential
from meft.runtime.device.timeline import LaneClock
from meft.runtime.ranks.peers import Peers
from meft.runtime.session import model_loading
from meft.runtime.session.session import Session, open_session
from meft.runtime.training import packing

if TYPE_CHECKING:
    from meft.runtime.training.runner import RunOptions


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
    model = model_loading.load_frozen_model(plan, folder, device_kind=device.kind)
    apart = packing.documents_apart(plan, model, dataset, say)
    session = open_session(
        plan,
        model,
        device,
        seed=options.training.seed,
        settings=options.settings,
        schedule=_schedule(options, peers),
        link_gbps=options.link_gbps,
        clock=LaneClock(keep=options.trace is not None),
        key_init=options.key_init,
        peers=peers,
    )
    session.documents_apart = apart
    return session


def _schedule(options: RunOptions, peers: Peers | None) -> Schedule:
    if options.schedule == "sequential":
        return Sequential()
    return Overlapped(workers=WORKERS if peers is None else WORKERS_OF_RANKS)


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
