"""Remove what the demo keeps in the user's cache folder: the converted model and the compiled kernels.

Runs without an environment, as ``make distclean`` removes that first. What else is in the folder stays.
"""

from __future__ import annotations

import contextlib
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLACES: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "planner" / "base" / "cache.py"))


def main() -> None:
    """Clear the cache folder, and the temporary one that stands in for it."""
    for folder in (PLACES["cache_folder"](), PLACES["temporary_cache_folder"]()):
        found = list(_made(folder))
        num_bytes = sum(map(_size, found))
        for path in found:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if found:
            print(f"removed from {folder}: {', '.join(path.name for path in found)} ({num_bytes / 2**20:,.0f} MiB)")
        with contextlib.suppress(OSError):  # not there, or something of the user's own is left in it
            folder.rmdir()


def _made(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name in (PLACES["KERNELS"], PLACES["SMOLLM2"]) or path.name.startswith(f".{PLACES['SMOLLM2']}."):
            yield path


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())


if __name__ == "__main__":
    main()
