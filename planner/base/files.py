"""Writing so that a crash leaves either the old file or folder or the new one, never half of one."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from meft.planner.base.errors import MachineError

_LEFTOVER = re.compile(r"\.(?P<name>.+?)(?P<old>\.old)?\.[a-z0-9_]{8}")
"""Names of what is being written, and of a folder that was moved aside for its successor."""


@contextmanager
def writing(path: Path, *, hint: str = "") -> Iterator[None]:
    """Whatever the disk refuses inside becomes one line that names ``path``: a :class:`MachineError`, exit code 4."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise MachineError(f"{path}: cannot be written ({reason})" + (f"; {hint}" if hint else "")) from error


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write ``data`` beside ``path``, fsync, rename over it, and fsync the folder. Creates missing parents.

    Permissions follow the umask. Raises :class:`OSError`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = data.encode() if isinstance(data, str) else data
    new = _beside(path)
    try:
        with new.open("xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder, then put it in the place of ``folder``; raises :class:`OSError`.

    A crash leaves the old folder or the new one; between two renames the old one is beside its place, from where
    :func:`clear_leftovers` takes it back. A link or a file in the place of the folder is refused.
    """
    require_folder_or_nothing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, retired = _beside(folder), _beside(folder, ".old")
    new.mkdir()
    try:
        write(new)
        fsync_folder(new)
        if folder.exists():
            folder.rename(retired)
        try:
            new.rename(folder)
        except OSError:
            if retired.exists():
                retired.rename(folder)
            raise
    except BaseException:
        _remove_folder(new, ignore_errors=True)
        raise
    fsync_folder(folder.parent)
    if retired.exists():
        _remove_folder(retired)


def require_folder_or_nothing(path: Path) -> None:
    """Raise :class:`OSError` if a link or a file is in the place of a folder."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a symbolic link is in the place of a folder; remove it, or choose another place")
    if path.exists() and not path.is_dir():
        raise OSError(errno.EEXIST, "a file is in the place of a folder; remove it, or choose another place")


def clear_leftovers(folder: Path, mine: re.Pattern[str]) -> list[Path]:
    """Remove what killed writes of names like ``mine`` left in ``folder``; returns what was removed.

    Nobody may be writing there. A folder that was moved aside, and whose successor never came, goes back.
    """
    removed = []
    for path in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or not mine.fullmatch(match["name"]):
            continue
        place = folder / match["name"]
        inside = path / match["name"]  # where older versions kept it
        kept = inside if inside.is_dir() else path
        if match["old"] and kept.is_dir() and any(kept.iterdir()) and not place.exists():
            kept.rename(place)
        if path.is_dir() and not path.is_symlink():
            _remove_folder(path)
        else:
            path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def fsync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_mode() -> int:
    """Permissions of a new file under the umask."""
    current = os.umask(0)
    os.umask(current)
    return 0o666 & ~current


def _beside(path: Path, suffix: str = "") -> Path:
    """A name that nobody has yet, in the folder of ``path``."""
    return path.with_name(f".{path.name}{suffix}.{os.urandom(4).hex()}")


def _remove_folder(folder: Path, *, ignore_errors: bool = False) -> None:
    import shutil  # slow to load, and planning removes none

    shutil.rmtree(folder, ignore_errors=ignore_errors)
