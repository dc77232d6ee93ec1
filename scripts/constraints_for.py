"""Print the version constraints with which to install MEFT into the environment that runs this script.

The environment that the Makefile made gets every pinned version of constraints.txt. In an environment that was there
before, with packages of somebody's choice, only what is missing is pinned, and torch is held exactly as it is, so that
pip never replaces a CUDA build: it only checks that the version is in the range that pyproject.toml declares.

Uses the standard library alone, because it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

MARKER_FILE = ".meft-environment"
"""In the root of an environment that the Makefile made."""


ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Print the constraints, one a line."""
    ours = (Path(sys.prefix) / MARKER_FILE).exists()
    installed = {} if ours else installed_versions()
    oldest = oldest_torch((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if "torch" in installed and release(installed["torch"]) < release(oldest):
        sys.exit(
            f"Error: {sys.prefix} has torch {installed['torch']} and MEFT needs {oldest} or newer; "
            "it is not replaced for you: upgrade it, or give another VENV="
        )
    print("\n".join(constraints((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(), installed)))


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


def oldest_torch(pyproject: str) -> str:
    """Return the lower bound that a project file declares for torch, ``2.4`` for ``torch>=2.4``."""
    requirements: list[str] = tomllib.loads(pyproject)["project"]["optional-dependencies"]["run"]
    return next(text.removeprefix("torch>=") for text in requirements if text.startswith("torch>="))


def release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``(2, 6)`` for ``2.6.0+cu124``."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def normalized(name: str) -> str:
    """Return a package name as indexes compare it: lower case, one hyphen for each run of separators."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


if __name__ == "__main__":
    main()
