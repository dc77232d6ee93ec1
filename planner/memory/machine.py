"""This machine's RAM, and what its control group leaves of it: in a container that is less than the machine has.

A group of cgroup v2 has ``memory.max``, ``memory.current`` and ``memory.stat``; one of v1 ``memory.limit_in_bytes``,
``memory.usage_in_bytes`` and ``memory.stat``. A limit binds all groups below it, so every group from the process's own
up to the root is asked. Page cache that nothing uses counts as free: the kernel gives it back
(https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
"""Says which groups this process is in, a line ``id:controllers:path`` for each hierarchy."""


@dataclass(frozen=True)
class GroupMemory:
    """What a control group may have, and what it has without page cache that could go."""

    limit_bytes: int
    used_bytes: int

    @property
    def available_bytes(self) -> int:
        """What is left."""
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True)
class _Files:
    """Names of a version's files, and of the line of ``memory.stat`` that counts unused page cache."""

    limit: str
    usage: str
    unused_cache: str
    stat: str = "memory.stat"


_V2 = _Files("memory.max", "memory.current", "inactive_file")
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def machine_memory_bytes(*, root: Path = ROOT, own: Path = OWN) -> int:
    """RAM of this machine, or of the container's share of it."""
    import psutil  # a plan that is told the RAM does without

    limits = (group.limit_bytes for group in limiting_groups(root=root, own=own))
    return min((int(psutil.virtual_memory().total), *limits))


def available_memory_bytes(*, root: Path = ROOT, own: Path = OWN) -> int:
    """RAM that this process can still have: the machine's, or what its control groups leave."""
    import psutil

    left = (group.available_bytes for group in limiting_groups(root=root, own=own))
    return min((int(psutil.virtual_memory().available), *left))


def limiting_groups(*, root: Path = ROOT, own: Path = OWN) -> Iterator[GroupMemory]:
    """The control groups of this process that have a limit, its own first; of those that can be read."""
    for folder, files in _folders(root, own):
        try:
            limit = (folder / files.limit).read_text().strip()
            if limit.isdecimal():  # v2 says "max" where there is none
                yield GroupMemory(int(limit), _used_bytes(folder, files))
        except (OSError, ValueError):
            continue


def _used_bytes(folder: Path, files: _Files) -> int:
    used = int((folder / files.usage).read_text())
    unused = re.search(rf"^{files.unused_cache} (\d+)$", (folder / files.stat).read_text(), re.MULTILINE)
    return max(0, used - (int(unused[1]) if unused else 0))


def _folders(root: Path, own: Path) -> Iterator[tuple[Path, _Files]]:
    """Each group's folder, from the process's own up; in a container the root may be all that can be seen."""
    for controllers, path in _memberships(own):
        v2 = controllers == ""
        if v2 or "memory" in controllers.split(","):
            start = PurePosixPath(path.lstrip("/"))
            for group in (start, *start.parents)[:-1]:  # the last is the root itself
                yield (root if v2 else root / "memory") / group, _V2 if v2 else _V1
    yield root, _V2
    yield root / "memory", _V1


def _memberships(own: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "none", "")
        yield controllers, path
