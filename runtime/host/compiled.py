"""How host kernels are compiled: by numba, without the GIL, kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_CONFIG: Any = numba.config
if not os.environ.get("NUMBA_CACHE_DIR"):
    _CONFIG.CACHE_DIR = str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "meft" / "numba")


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a kernel: compilation (seconds) happens once per machine and version."""
    return numba.njit(nogil=True, cache=True, error_model="numpy", **options)  # type: ignore[no-any-return]


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(_CONFIG.CACHE_DIR)
