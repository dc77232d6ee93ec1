"""Where things are kept that can be made again: converted models, compiled kernels. Private to the user.

``$MEFT_CACHE``, else ``$XDG_CACHE_HOME/meft``, else ``~/.cache/meft``; where that cannot be written, a folder of the
user's own among temporary files. Compiled kernels are machine code that is loaded from there, so that a folder into
which others may write is not used. Standard library only: ``make distclean`` runs this file without an environment.
"""

from __future__ import annotations

import os
import stat
import sys
from functools import cache
from pathlib import Path

KERNELS = "numba"
"""Compiled host kernels, in the cache folder."""
SMOLLM2 = "smollm2-135m-instruct-fp32"
"""The converted embedded model, in the cache folder."""
PRIVATE = 0o700


def cache_folder() -> Path:
    """The folder that is meant, whether or not it is there or can be written.

    The XDG specification tells to ignore a relative path; an unset or empty variable is one here.
    """
    if chosen := os.environ.get("MEFT_CACHE"):
        return Path(chosen).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else _home() / ".cache") / "meft"


def writable_cache_folder() -> Path:
    """:func:`cache_folder`, made and private; or a temporary folder, with one line that says so on standard error."""
    return _writable(cache_folder(), temporary_cache_folder())


def temporary_cache_folder() -> Path:
    """What stands in for a cache folder that cannot be written; the same one in every process of the user."""
    import tempfile  # slow to load, and seldom needed

    return Path(tempfile.gettempdir()) / f"meft-cache-{_user()}"


def kernel_folder() -> Path:
    """Where compiled kernels are kept: a folder that only the user can write."""
    folder = writable_cache_folder() / KERNELS
    if _made_private(folder):
        return folder
    return _writable(folder, temporary_cache_folder() / KERNELS)


@cache  # the line is said once in a process
def _writable(folder: Path, instead: Path) -> Path:
    if _made_private(folder):
        return folder
    if not _made_private(instead):
        # somebody else's, or of an older user of that number
        import tempfile

        instead = Path(tempfile.mkdtemp(prefix="meft-cache-"))
    print(
        f"meft: {folder} cannot be written, or others can write it; keeping what is cached in {instead} "
        f"(MEFT_CACHE names another folder)",
        file=sys.stderr,
    )
    return instead


def _made_private(folder: Path) -> bool:
    """Make the folder if need be; whether it is the user's own, writable, and closed to writing by others."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=PRIVATE, exist_ok=True)
        found = folder.stat()
        if _is_another_user(found.st_uid):
            return False
        if stat.S_IMODE(found.st_mode) & ~PRIVATE:
            if os.environ.get("MEFT_CACHE") and folder == cache_folder():  # a folder of the user's own choice
                return not found.st_mode & 0o022 and os.access(folder, os.W_OK | os.X_OK)
            folder.chmod(PRIVATE)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _is_another_user(owner: int) -> bool:
    return hasattr(os, "getuid") and owner != os.getuid()


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")


def _home() -> Path:
    """The home folder; among temporary files where there is none."""
    try:
        return Path.home()
    except RuntimeError:
        return temporary_cache_folder()
