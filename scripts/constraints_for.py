"""Print the version constraints with which to install MEFT into the environment that runs this script.

The environment that the Makefile made gets every pinned version of constraints.txt. In an environment that was there
before, with packages of somebody's choice, only what is missing is pinned, and torch is held exactly as it is, so that
pip never replaces a CUDA build: it only checks that the version is in the range that pyproject.toml declares.

Uses the standard library alone, because it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

MARKER_FILE = ".meft-environment"
"""In the root of an environment that the Makefile made."""


def main() -> None:
    """Print the constraints, one a line."""
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    ours = (Path(sys.prefix) / MARKER_FILE).exists()
    print("\n".join(constraints(lines, {} if ours else installed_versions())))


def constraints(lines: Iterable[str], installed: Mapping[str, str]) -> list[str]:
    """Return the pins (``name==version``) of packages that are not installed, and torch as it is installed.

    Args:
        lines: the lines of a constraints file; comments and blank lines are left out.
        installed: version of each installed package by normalized name; empty for an environment to be pinned whole.
    """
    pins = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    kept = [pin for pin in pins if normalized(pin.split("==")[0]) not in installed]
    held = [f"torch=={installed['torch']}"] if "torch" in installed else []
    return kept + held


def installed_versions() -> dict[str, str]:
    """Return the version of every package of this environment by normalized name."""
    return {normalized(found.name): found.version for found in metadata.distributions()}


def normalized(name: str) -> str:
    """Return a package name as indexes compare it: lower case, one hyphen for each run of separators."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


if __name__ == "__main__":
    main()
