"""``meft-plan replay`` as it is typed."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from recordings import FLUSHED, MIB, WARM, WARM_START, RecordingAllocator, trace_files

import meft.planner.allocator.recording_files as recording_files
from meft.planner.base.errors import EXIT_DONE, EXIT_MACHINE, EXIT_USAGE
from meft.planner.cli.main import command

KEYS = {
    "events",
    "exact_events",
    "peak_reserved_bytes",
    "final_reserved_bytes",
    "recorded_peak_reserved_bytes",
    "retries",
}


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("flushed.csv").write_text(FLUSHED)
    Path("warm.csv").write_text(WARM)
    Path("init.json").write_text(WARM_START)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["replay", *arguments])


def replayed(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == EXIT_DONE, result.output
    assert result.stderr == ""
    content: dict[str, Any] = json.loads(result.stdout)
    assert set(content) >= KEYS
    return content


def refused(*arguments: str) -> str:
    """The one line on standard error."""
    result = run(*arguments)
    assert result.exit_code == EXIT_USAGE, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("meft-plan: ")
    return line.removeprefix("meft-plan: ")


def snapshot() -> dict[str, Any]:
    allocator = RecordingAllocator()
    allocator.free(allocator.malloc(30 * MIB))
    since = len(allocator.history)
    allocator.malloc(10 * MIB)
    return allocator.snapshot(since)


# --- what it prints -----------------------------------------------------------------------------------------------


def test_a_real_recording_is_exact_at_every_event() -> None:
    trace, init = trace_files("cs336_medium_train_ctx512")
    content = replayed(str(trace), "--init", str(init))
    assert content["events"] == content["exact_events"] == 14962
    assert content["peak_reserved_bytes"] == content["recorded_peak_reserved_bytes"] == 12_660_506_624
    assert content["retries"] == 0


def test_json_has_every_figure() -> None:
    assert replayed("flushed.csv") == {
        "events": 10,
        "exact_events": 10,
        "first_inexact_event": None,
        "peak_reserved_bytes": 50 * MIB,
        "final_reserved_bytes": 20 * MIB,
        "recorded_peak_reserved_bytes": 50 * MIB,
        "peak_allocated_bytes": 50 * MIB,
        "final_allocated_bytes": 2 * MIB,
        "retries": 0,
        "expandable_segments": False,
        "out_of_memory": None,
    }


def test_the_table_puts_simulated_beside_recorded() -> None:
    result = run("flushed.csv")
    assert result.exit_code == EXIT_DONE
    assert result.stdout.splitlines() == [
        "Replay of flushed.csv: default mode, no limit",
        "reserved is as recorded at 10 of 10 events",
        "                            simulated  recorded",
        "peak reserved                50.0 MiB  50.0 MiB",
        "final reserved               20.0 MiB",
        "peak allocated               50.0 MiB",
        "flushes for want of memory          0",
    ]
    assert "first not at event 1" in run("flushed.csv", "--expandable-segments").stdout


def test_a_warm_start_and_compressed_files() -> None:
    for name in ("warm.csv", "init.json"):
        Path(f"{name}.gz").write_bytes(gzip.compress(Path(name).read_bytes()))
    expected = replayed("warm.csv", "--init", "init.json")
    assert expected["exact_events"] == 2
    assert replayed("warm.csv.gz", "--init", "init.json.gz") == expected


def test_settings_can_be_tried() -> None:
    assert replayed("flushed.csv", "--expandable-segments")["peak_reserved_bytes"] == 60 * MIB
    assert replayed("flushed.csv", "--alloc-conf", "expandable_segments:True")["expandable_segments"]
    both = ("--alloc-conf", "expandable_segments:True,roundup_power2_divisions:2", "--no-expandable-segments")
    assert not replayed("flushed.csv", *both)["expandable_segments"]
    # 30 MiB round up to 32, 20 MiB to 24; then 2 of the 20 MiB segment.
    assert replayed("flushed.csv", *both)["peak_reserved_bytes"] == 56 * MIB


def test_a_smaller_device_counts_retries_and_exits_with_4_where_it_does_not_do() -> None:
    assert replayed("flushed.csv", "--capacity", "50MiB")["retries"] == 0
    result = run("flushed.csv", "--capacity", "45MiB", "--json")
    assert result.exit_code == EXIT_MACHINE
    content = json.loads(result.stdout)
    assert (content["retries"], content["out_of_memory"]["event"]) == (1, 4)
    assert result.stderr == (
        "meft-plan: event 4 of 10 (flushed.csv: line 5): device out of memory: 20.0 MiB requested (a new segment of "
        "20.0 MiB), 30.0 MiB allocated, 30.0 MiB reserved, capacity 45.0 MiB, 5.0 MiB short; give a larger --capacity\n"
    )
    result = run("warm.csv", "--init", "init.json", "--capacity", "10MiB")
    assert result.exit_code == EXIT_MACHINE
    assert "capacity 10.0 MiB" in result.stdout
    assert result.stderr.startswith(
        "meft-plan: before event 1: device out of memory: the recording starts with 20.0 MiB"
    )


@pytest.mark.parametrize("name", ["s.pickle", "s.pkl.gz", "snapshot", "s.json", "s.json.gz"])
def test_snapshots_of_torch_pickled_or_as_json(name: str) -> None:
    content = snapshot()
    data = json.dumps(content).encode() if "json" in name else pickle.dumps(content)
    Path(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    result = replayed(name)
    assert (result["events"], result["exact_events"], result["peak_reserved_bytes"]) == (1, 1, 30 * MIB)


# --- what it refuses ----------------------------------------------------------------------------------------------


def test_a_pickle_that_would_run_something_is_refused_and_does_not() -> None:
    class Bad:
        def __reduce__(self) -> Any:
            return os.system, ("touch made",)

    Path("bad.pickle").write_bytes(pickle.dumps({"segments": [], "device_traces": [[Bad()]]}))
    assert refused("bad.pickle") == (
        "bad.pickle: a pickle is read as plain data only, and never run: it asks for 'system' of module 'posix'"
    )
    assert not Path("made").exists()


def test_files_that_are_not_there_or_not_whole_are_named() -> None:
    assert refused("none.csv") == "none.csv: no such file"
    Path("folder").mkdir()
    assert refused("folder") == "folder: is a folder, not a file"
    packed = gzip.compress(FLUSHED.encode())
    Path("cut.csv.gz").write_bytes(packed[: len(packed) // 2])
    assert refused("cut.csv.gz").startswith("cut.csv.gz: not a whole gzip file (")
    assert refused("cut.csv.gz").endswith("; is it truncated or damaged?")
    Path("bad.csv.gz").write_bytes(packed[:20] + b"\xff" * 40)
    assert refused("bad.csv.gz").startswith("bad.csv.gz: not a whole gzip file (")
    Path("binary.csv").write_bytes(b"time,\xff\xfe")
    assert refused("binary.csv") == "binary.csv: is not UTF-8 text (byte 5); expected CSV, JSON or a pickle"
    Path("cut.json").write_text(WARM_START[:-20])
    assert refused("warm.csv", "--init", "cut.json").startswith("cut.json: not valid JSON at line 1, column ")
    Path("cut.pickle").write_bytes(pickle.dumps(snapshot())[:-9])
    assert refused("cut.pickle").startswith("cut.pickle: not a whole pickle (")
    Path("empty.csv").write_bytes(b"")
    assert refused("empty.csv").startswith("empty.csv: empty; expected a header")


def test_a_file_that_unpacks_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_files, "MAX_FILE_BYTES", 1000)
    Path("bomb.csv.gz").write_bytes(gzip.compress(b"0" * 10**6))
    assert refused("bomb.csv.gz") == "bomb.csv.gz: holds more than 1000 B, the most that is read; record less"
    Path("large.csv").write_bytes(b"0" * 1001)
    assert refused("large.csv").startswith("large.csv: holds more than 1000 B")


def test_wrong_values_are_one_line_with_the_place() -> None:
    Path("trace.csv").write_text(FLUSHED.replace(f",{2 * MIB},", ",-2,", 1))
    assert refused("trace.csv") == (
        "trace.csv: line 11: bytes is '-2'; expected a whole number from 0 to 1125899906842624"
    )
    assert refused("warm.csv").startswith("warm.csv: line 3: free of address ")
    assert refused("warm.csv").endswith("so give its start state with --init INIT.json")
    Path("init.json").write_text(WARM_START.replace('"large"', '"medium"'))
    assert refused("warm.csv", "--init", "init.json") == (
        "init.json: segments[0].pool is 'medium'; expected small or large"
    )


def test_options_that_do_not_go_together_or_are_wrong() -> None:
    Path("s.json").write_text(json.dumps(snapshot()))
    assert refused("s.json", "--init", "init.json") == (
        "--init init.json: it goes with a table of events; s.json is a snapshot, which has its start state"
    )
    assert refused("flushed.csv", "--capacity", "0").startswith("--capacity: '0' is not above zero")
    assert refused("flushed.csv", "--alloc-conf", "garbage_collection_threshold:0.9").startswith(
        "--alloc-conf: garbage_collection_threshold:0.9 is not modelled"
    )
    assert refused("flushed.csv", "--alloc-conf", "max_split_size_mb:64", "--expandable-segments").startswith(
        "--expandable-segments: max_split_size_mb does not go with expandable_segments"
    )
    assert "no event of device 3" in refused("flushed.csv", "--device", "3")
    assert refused() == "Missing argument 'TRACE'; meft-plan replay --help lists what there is"
