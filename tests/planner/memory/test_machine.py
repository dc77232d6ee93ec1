"""This machine's RAM and what its control groups leave of it: v1 and v2, its own group and those above."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from meft.planner.memory.machine import GroupMemory, available_memory_bytes, limiting_groups, machine_memory_bytes

WHOLE = psutil.virtual_memory().total


def write(folder: Path, **files: str) -> None:
    """Files of a group, ``_`` in their names standing for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text + "\n")


def groups(root: Path, own: Path) -> list[GroupMemory]:
    return list(limiting_groups(root=root, own=own))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The file that says which groups a process is in; not there yet."""
    return tmp_path / "cgroup"


def test_without_control_groups_it_is_the_machines(tmp_path: Path, own: Path) -> None:
    assert machine_memory_bytes(root=tmp_path, own=own) == WHOLE
    assert 0 < available_memory_bytes(root=tmp_path, own=own) <= WHOLE


def test_a_containers_share_counts(tmp_path: Path, own: Path) -> None:
    write(tmp_path, memory_max="3000000", memory_current="2000000", memory_stat="anon 7")
    assert machine_memory_bytes(root=tmp_path, own=own) == 3_000_000
    assert available_memory_bytes(root=tmp_path, own=own) == 1_000_000
    write(tmp_path, memory_stat="anon 7\ninactive_file 500000")  # page cache, given back when asked for
    assert available_memory_bytes(root=tmp_path, own=own) == 1_500_000
    write(tmp_path, memory_max="max")
    assert machine_memory_bytes(root=tmp_path, own=own) == WHOLE
    write(tmp_path, memory_max=str(2 * WHOLE))  # more than there is
    assert machine_memory_bytes(root=tmp_path, own=own) == WHOLE


def test_the_first_version_counts_too(tmp_path: Path, own: Path) -> None:
    memory = tmp_path / "memory"
    usage = {"memory_usage_in_bytes": "2500000", "memory_stat": "inactive_file 9\ntotal_inactive_file 500000"}
    write(memory, memory_limit_in_bytes="3000000", **usage)
    assert groups(tmp_path, own) == [GroupMemory(3_000_000, 2_000_000)]
    assert available_memory_bytes(root=tmp_path, own=own) == 1_000_000
    write(memory, memory_limit_in_bytes=str((1 << 63) - 4096))  # how that version says that there is none
    assert machine_memory_bytes(root=tmp_path, own=own) == WHOLE


@pytest.mark.parametrize("version", [1, 2])
def test_every_group_above_the_process_binds_it(tmp_path: Path, own: Path, version: int) -> None:
    own.write_text("0::/user/job\n" if version == 2 else "12:cpu,cpuacct:/x\n7:memory:/user/job\n")
    root = tmp_path if version == 2 else tmp_path / "memory"
    limit, used = ("memory_max", "memory_current")
    if version == 1:
        limit, used = ("memory_limit_in_bytes", "memory_usage_in_bytes")
    write(root / "user" / "job", **{limit: "9000000", used: "1000000", "memory_stat": ""})
    write(root / "user", **{limit: "5000000", used: "2000000", "memory_stat": ""})
    write(root / "x", **{limit: "1", used: "1", "memory_stat": ""})  # another controller's group
    assert groups(tmp_path, own) == [GroupMemory(9_000_000, 1_000_000), GroupMemory(5_000_000, 2_000_000)]
    assert machine_memory_bytes(root=tmp_path, own=own) == 5_000_000
    assert available_memory_bytes(root=tmp_path, own=own) == 3_000_000


def test_a_group_that_uses_more_than_its_new_limit_leaves_nothing(tmp_path: Path, own: Path) -> None:
    write(tmp_path, memory_max="3000000", memory_current="4000000", memory_stat="")
    assert available_memory_bytes(root=tmp_path, own=own) == 0


def test_what_cannot_be_read_is_left_out(tmp_path: Path, own: Path) -> None:
    write(tmp_path, memory_max="3000000", memory_current="a word", memory_stat="")
    own.write_text("not a line of three parts\n")
    assert groups(tmp_path, own) == []
