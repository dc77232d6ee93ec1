"""A run's output folder: who writes there, what is there already, and whether what the run will write fits.

One run at a time: the lock is the operating system's, on a file that says who holds it, so a dead process holds none.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from meft.planner.base.errors import MachineError, MeftError, UsageError
from meft.planner.base.files import clear_leftovers, require_folder_or_nothing, writing
from meft.planner.base.units import format_bytes
from meft.planner.records.plan import Plan
from meft.planner.records.report import Report
from meft.runtime.session.checkpoint import adapter_bytes, checkpoint_bytes, list_checkpoints

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

ADAPTER, BEST_ADAPTER, REPORT = "adapter", "adapter-best", "report.json"
LOCK = ".meft-run.lock"
_FOLDERS = re.compile(r"checkpoint-\d{8}|adapter|adapter-best")
_WRITTEN = re.compile(rf"{_FOLDERS.pattern}|report\.json")
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Make ``folder`` if need be, and hold its lock; then clear what killed writes left there.

    A folder that was made, and that nothing was written to, goes again.

    Raises:
        MachineError: it cannot be made or written to, or another run holds it.
    """
    made = not folder.exists()
    with writing(folder):
        require_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    with writing(lock):
        descriptor = _acquire(lock, say)
    try:
        _clear(folder, say)
        yield
    finally:
        os.close(descriptor)
        with suppress(OSError):  # the disk refuses: what stays is no obstacle to anyone
            lock.unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def require_folder(folder: Path) -> None:
    """Raise :class:`OSError` if something other than a folder, or a link to one, is there."""
    if folder.is_symlink() and not folder.exists():
        raise OSError(errno.ENOENT, "a symbolic link that leads nowhere; remove it, or choose another --output-dir")
    if folder.exists() and not folder.is_dir():
        raise OSError(errno.ENOTDIR, "a file is in the place of the folder; choose another --output-dir")


def require_unused(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Nothing that a run has learnt is replaced unless that was asked for.

    Raises:
        UsageError: there are checkpoints or an adapter, and neither option was given, or both.
        MachineError: a link or a file is in the place of one.
    """
    if resume and overwrite:
        raise UsageError("--resume goes on with what is in the folder and --overwrite replaces it; give one of them")
    found = sorted(path for path in folder.iterdir() if _FOLDERS.fullmatch(path.name)) if folder.is_dir() else []
    for path in found:
        with writing(path):
            require_folder_or_nothing(path)
    if found and not (resume or overwrite):
        names = ", ".join(path.name for path in found)
        raise UsageError(
            f"--output-dir {folder}: holds {names} of an earlier run; go on with --resume, replace it with "
            f"--overwrite, or choose another folder"
        )


def reported(folder: Path, losses: Sequence[float]) -> bool:
    """Whether the folder's report is that of a run with these losses: not of an earlier one, nor of its first part."""
    try:
        return Report.load(folder / REPORT).training.loss_per_step == tuple(losses)
    except MeftError:  # none, or none that can be read: it will be written anew
        return False


def remove_replaced(folder: Path, say: Callable[[str], None]) -> None:
    """What ``--overwrite`` gives up, just before the first step: older checkpoints would be taken for this run's."""
    for path in (*list_checkpoints(folder), folder / BEST_ADAPTER):
        if path.exists():
            with writing(path):
                shutil.rmtree(path)
            say(f"removed {path} of an earlier run (--overwrite)")


def remove_superseded(checkpoint: Path) -> None:
    """Older checkpoints, which a run that was killed while it removed them left beside the one that was just loaded."""
    for path in list_checkpoints(checkpoint.parent):
        if path < checkpoint:
            with writing(path):
                shutil.rmtree(path)


@dataclass(frozen=True)
class Writes:
    """What a run will write: how many steps long its lists become, and whether there is more than one checkpoint."""

    steps: int
    several_checkpoints: bool
    resumed: bool
    keeps_best: bool


def needed_bytes(plan: Plan, writes: Writes) -> int:
    """Room for the run at its fullest, besides what is there: a checkpoint is whole before the older one goes."""
    checkpoint, adapter = checkpoint_bytes(plan, steps=writes.steps), adapter_bytes(plan)
    before = 0 if writes.resumed else checkpoint
    while_saving = before + checkpoint if writes.several_checkpoints else checkpoint
    best = 2 * adapter if writes.keeps_best else 0
    return max(while_saving, before + adapter) + best


def require_room(folder: Path, plan: Plan, writes: Writes, *, overwrite: bool) -> None:
    """Raise :class:`MachineError` unless the folder's disk has room for what the run will write."""
    needed, free = needed_bytes(plan, writes), shutil.disk_usage(folder).free
    if overwrite:
        free += sum(_size(path) for path in list_checkpoints(folder))
    if needed > free:
        checkpoint = format_bytes(checkpoint_bytes(plan, steps=writes.steps))
        raise MachineError(
            f"--output-dir {folder}: the run needs {format_bytes(needed)} there (a checkpoint is {checkpoint}, an "
            f"adapter {format_bytes(adapter_bytes(plan))}) and {format_bytes(free)} are free; make room, or choose a "
            f"folder on another disk"
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _clear(folder: Path, say: Callable[[str], None]) -> None:
    with writing(folder):
        removed = clear_leftovers(folder, _WRITTEN)
    if removed:
        say(f"cleared what a killed run left half written: {', '.join(path.name for path in removed)}")


def _acquire(lock: Path, say: Callable[[str], None]) -> int:
    """An open descriptor that holds the lock; the file may vanish between opening and locking, then once more."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(descriptor, lock, say)
            if lock.exists() and lock.stat().st_ino == os.fstat(descriptor).st_ino:
                _sign(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, lock: Path, say: Callable[[str], None]) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(descriptor)
        raise MachineError(
            f"--output-dir {lock.parent}: {holder} is writing there; wait for it or end it, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        say(f"note: {lock.parent} is on a file system without locks: see that no other run writes there")


def _sign(descriptor: int) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    said = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, said.encode())


def _holder(descriptor: int) -> str:
    """Who wrote into the lock file; it may not have come to that yet."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        said = json.loads(os.read(descriptor, 1000))
        return f"process {said['pid']} on {said['host']}, started {said['started']},"
    except (ValueError, KeyError, TypeError):
        return "another run"
