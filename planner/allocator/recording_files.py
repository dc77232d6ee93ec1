"""Files that hold a recording: a CSV table with its start state beside it, or a snapshot of torch's, pickled or JSON.

What a file is shows in its content. Any of them may be compressed with gzip.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

from meft.planner.allocator.caching import Segment
from meft.planner.allocator.history import recording_of
from meft.planner.allocator.recording import Recording, read_events, read_segments
from meft.planner.allocator.settings import AllocatorSettings
from meft.planner.allocator.snapshot import unpickle_plain
from meft.planner.base.errors import UsageError
from meft.planner.base.schema import parse_json
from meft.planner.base.units import MIB, format_bytes

MAX_FILE_BYTES = 512 * MIB
"""Uncompressed: a few million events. More would not fit in the memory of a usual machine once it is read."""
_GZIP, _PICKLE = b"\x1f\x8b", b"\x80"
_PICKLE_SUFFIXES = (".pickle", ".pkl")


def load_recording(
    path: Path, init: Path | None = None, *, device: int | None = None, settings: AllocatorSettings | None = None
) -> Recording:
    """Read a recording with its start state; ``device`` picks one of several, ``settings`` replace a snapshot's own.

    Raises :class:`UsageError`: one line naming the file, the place in it, the value and what is expected.
    """
    data = read_bounded(path)
    is_pickle = data.startswith(_PICKLE) or any(suffix in _PICKLE_SUFFIXES for suffix in path.suffixes)
    if not is_pickle and data.lstrip()[:1] not in (b"{", b"["):
        recording = read_events(_text(data, path), source=str(path), device=device)
        return recording if init is None else recording.starting_with(load_segments(init))
    if init is not None:
        raise UsageError(
            f"--init {init}: it goes with a table of events; {path} is a snapshot, which has its start state"
        )
    source = str(path)
    content = (
        unpickle_plain(io.BytesIO(data), source=source) if is_pickle else parse_json(_text(data, path), source=source)
    )
    return recording_of(content, source=source, device=device, settings=settings)


def load_segments(path: Path) -> tuple[Segment, ...]:
    """Read the start state of a recording."""
    return read_segments(parse_json(_text(read_bounded(path), path), source=str(path)), source=str(path))


def read_bounded(path: Path) -> bytes:
    """A file's content, unpacked where it is compressed; raises :class:`UsageError` for one that is too large."""
    try:
        with path.open("rb") as file:
            packed = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder, not a file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    data = _unpacked(packed, path) if packed.startswith(_GZIP) else packed
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path}: holds more than {format_bytes(MAX_FILE_BYTES)}, the most that is read; record less")
    return data


def _unpacked(packed: bytes, path: Path) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            return file.read(MAX_FILE_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{path}: not a whole gzip file ({error}); is it truncated or damaged?") from None


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text (byte {error.start}); expected CSV, JSON or a pickle") from None
