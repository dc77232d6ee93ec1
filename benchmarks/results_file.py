"""Results of benchmarks: a line of JSON each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append(path: Path | None, row: dict[str, Any]) -> None:
    """Write one more line; nothing where there is no file."""
    if path is None:
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
