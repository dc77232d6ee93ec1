"""``meft-plan replay``: a recorded stream of allocations through the caching allocator model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meft.planner.allocator.recording import Recording
from meft.planner.allocator.recording_files import load_recording
from meft.planner.allocator.replay import OutOfMemory, ReplayResult, replay
from meft.planner.allocator.settings import AllocatorSettings, parse_settings
from meft.planner.base.errors import DeviceOutOfMemory, UsageError
from meft.planner.base.units import format_bytes
from meft.planner.cli.options import PATH, SIZE

if TYPE_CHECKING:
    from meft.planner.render.tables import View


@click.command("replay", short_help="A recorded stream of allocations, through the allocator model.")
@click.argument("trace", type=PATH)
@click.option(
    "--init", type=PATH, metavar="FILE", help="Segments and live blocks at the first event, for a warm start."
)
@click.option("--capacity", type=SIZE, help="What if the device had this much for the allocator? [default: no limit]")
@click.option(
    "--expandable-segments/--no-expandable-segments",
    "expandable",
    default=None,
    help="What if the allocator had this setting? [default: as recorded]",
)
@click.option(
    "--alloc-conf", metavar="TEXT", help="What if PYTORCH_CUDA_ALLOC_CONF had been this? [default: as recorded]"
)
@click.option("--device", type=click.IntRange(min=0), help="Which device, where the recording has several.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def replay_command(
    *,
    trace: Path,
    init: Path | None,
    capacity: int | None,
    expandable: bool | None,
    alloc_conf: str | None,
    device: int | None,
    as_json: bool,
) -> None:
    """Replay TRACE and compare reserved memory with the recorded at every event.

    TRACE is a CSV table (action, addr, bytes, stream, total_reserved_after) or a snapshot of
    torch.cuda.memory._snapshot() with its history, pickled or as JSON; gzip is unpacked. A pickle is read as plain data
    and never run. Exit code 4 if memory runs out.
    """
    given = None if alloc_conf is None else parse_settings(alloc_conf, source="--alloc-conf")
    recording = load_recording(trace, init, device=device, settings=given)
    settings = _settings(recording, given, expandable)
    result = replay(recording, capacity_bytes=capacity, settings=settings)
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2))
    else:
        from meft.planner.render.tables import show

        show(_view(result, trace, capacity, warm=recording.start_is_given))
    if result.out_of_memory is not None:
        raise DeviceOutOfMemory(_line(recording, result.out_of_memory))


def _settings(
    recording: Recording, given: AllocatorSettings | None, expandable: bool | None
) -> AllocatorSettings | None:
    """The settings to replay under; None for those of the recording."""
    if expandable is None:
        return given
    try:
        return replace(given or recording.settings or AllocatorSettings(), expandable_segments=expandable)
    except ValueError as error:
        raise UsageError(f"--expandable-segments: {error}") from None


def _line(recording: Recording, ended: OutOfMemory) -> str:
    if ended.event == 0:
        return f"before event 1: {ended.message}; give a larger --capacity"
    place = recording.place(ended.event - 1)
    return f"event {ended.event} of {len(recording)} ({place}): {ended.message}; give a larger --capacity"


def _view(result: ReplayResult, trace: Path, capacity: int | None, *, warm: bool) -> View:
    """Simulated beside recorded."""

    from meft.planner.render.tables import grid, lines, stacked

    rows = [
        ("peak reserved", format_bytes(result.peak_reserved_bytes), format_bytes(result.recorded_peak_reserved_bytes)),
        ("final reserved", format_bytes(result.final_reserved_bytes), ""),
        ("peak allocated", format_bytes(result.peak_allocated_bytes), ""),
        ("flushes for want of memory", f"{result.retries:,}", ""),
    ]
    mode = "expandable segments" if result.expandable_segments else "default mode"
    limit = "no limit" if capacity is None else f"capacity {format_bytes(capacity)}"
    exact = f"reserved is as recorded at {result.exact_events:,} of {result.events:,} events"
    if result.first_inexact_event is not None:
        exact += f", first not at event {result.first_inexact_event:,}"
    texts = [f"Replay of {trace}: {mode}, {limit}", exact]
    if result.exact_events == 0 and not warm:
        texts.append("it may start warm: its start state goes with it as --init INIT.json")
    return stacked(lines(texts), grid(("", "simulated", "recorded"), rows, right=(1, 2)))
