"""What goes wrong in a child process: death or an error at one call among those that change a disk.

The calls are replaced in the child alone, after the fork: the project's code has no hook for it. ``save_file`` stands
for the writes of safetensors, which Python does not see: the file is left half written.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from meft.runtime.session import tensor_files

CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
FAILING = ("fsync", "rename", "replace", "mkdir", "save_file")
"""Those that a full disk or a broken one makes fail; what removes is left to work."""
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)


@dataclass(frozen=True)
class Fault:
    """At the ``place``-th call (from 0): death before it or after it, or an error there, or there and ever after."""

    place: int
    what: Literal["before", "after", "error", "errors"]
    number: int = 0


class Hooks:
    """Counts the calls in ``watched``, tells each to ``on_call``, and lets the fault happen."""

    def __init__(self, watched: tuple[str, ...], fault: Fault | None, on_call: Callable[[str], None]) -> None:
        self.watched, self.fault, self.on_call = watched, fault, on_call
        self.seen = 0

    def install(self) -> None:
        """In this process, which is a child."""
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        vars(tensor_files)["save_file"] = self._wrapped("save_file", vars(tensor_files)["save_file"])

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        if name not in self.watched:
            return real

        def call(*args: Any, **options: Any) -> Any:
            if name == "mkdir" and Path(args[0]).exists():
                return real(*args, **options)  # changes nothing
            place, self.seen = self.seen, self.seen + 1
            self.on_call(name)
            fault = self.fault
            if fault is None or place < fault.place or (place > fault.place and fault.what != "errors"):
                return real(*args, **options)
            if fault.what in ("error", "errors"):
                raise OSError(fault.number, os.strerror(fault.number))
            if fault.what == "after":
                real(*args, **options)
            elif name == "save_file":
                real(*args, **options)
                half(Path(args[1]))
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("a process survived SIGKILL")

        return call


def half(path: Path) -> None:
    """Leave half of a file."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
