"""How host kernels are compiled: by numba, without the GIL, kept on disk in a folder of the user's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from meft.planner.base.cache import kernel_folder

_CONFIG: Any = numba.config
if not Path(os.environ.get("NUMBA_CACHE_DIR", "")).is_absolute():  # numba would take a relative one from where it runs
    _CONFIG.CACHE_DIR = str(kernel_folder())


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a kernel: compilation (seconds) happens once per machine and version."""
    return numba.njit(nogil=True, cache=True, error_model="numpy", **options)  # type: ignore[no-any-return]


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(_CONFIG.CACHE_DIR)
