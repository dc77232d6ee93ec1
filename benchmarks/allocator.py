"""How fast recorded streams are replayed through the caching allocator model: events a second, each a median.

    python benchmarks/allocator.py [TRACE.csv.gz ...] [--repeats 9] [--json]

Without arguments every recording in ../shared/traces is replayed, with its start state beside it. Reading the files is
timed apart; a replay is the whole of :func:`meft.planner.allocator.replay.replay`, the start state included. Seconds
are the process's own CPU time, which on an idle machine is the time that passes (one thread, no waiting) and on a busy
one is not stretched by the others. How fast a core is at the time still varies: the last column divides by the turns of
an empty Python loop, so that runs can be compared.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click

from meft.planner.allocator.recording import Recording
from meft.planner.allocator.recording_files import load_recording
from meft.planner.allocator.replay import replay

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
LOOP_TURNS = 200_000


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("traces", nargs=-1, type=click.Path(path_type=Path))
@click.option("--repeats", type=click.IntRange(min=1), default=9, help="Replays of each recording.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(traces: tuple[Path, ...], repeats: int, as_json: bool) -> None:
    """Replay recordings and print events per CPU second."""
    paths = traces or tuple(sorted(TRACES.glob("*.csv.gz")))
    if not paths:
        raise click.UsageError(f"no recordings in {TRACES.name}; name some, such as TRACE.csv.gz")
    rows = [measured(path, repeats) for path in paths]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(
        f"{'recording':<28} {'events':>7} {'exact':>7} {'events/s':>10} {'read/s':>10} {'per 1000 loop turns':>20}"
    )
    for row in rows:
        click.echo(
            f"{row['recording']:<28} {row['events']:>7} {row['exact_events']:>7} {row['events_per_second']:>10,.0f} "
            f"{row['read_events_per_second']:>10,.0f} {row['events_per_1000_loop_turns']:>20.1f}"
        )


def measured(path: Path, repeats: int) -> dict[str, str | int | float]:
    """One recording: medians over ``repeats`` replays."""
    init = path.with_name(path.name.replace(".csv", ".init.json"))
    recording = load_recording(path, init if init.is_file() else None)
    result = replay(recording)
    pairs = [(rate_of_loop(), rate(replay, recording)) for _ in range(repeats)]
    reading = [rate(load_recording, path, number=len(recording)) for _ in range(min(repeats, 3))]
    return {
        "recording": path.name.partition(".")[0],
        "events": result.events,
        "exact_events": result.exact_events,
        "events_per_second": statistics.median(events for _, events in pairs),
        "read_events_per_second": statistics.median(reading),
        "loop_turns_per_second": statistics.median(turns for turns, _ in pairs),
        "events_per_1000_loop_turns": 1000 * statistics.median(events / turns for turns, events in pairs),
    }


def rate(work: Callable[..., object], given: Recording | Path, *, number: int | None = None) -> float:
    """Events per CPU second of one run of ``work``."""
    start = time.process_time()
    work(given)
    elapsed = time.process_time() - start
    return (len(given) if isinstance(given, Recording) else number or 0) / elapsed


def rate_of_loop() -> float:
    """Turns per CPU second of a loop that adds."""
    start, total = time.process_time(), 0
    for number in range(LOOP_TURNS):
        total += number
    return LOOP_TURNS / (time.process_time() - start)


if __name__ == "__main__":
    main()
