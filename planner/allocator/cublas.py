"""cuBLAS workspaces: what each handle takes through the caching allocator, by architecture and torch version.

torch gives every handle a workspace of its own for each stream, at the first product, and keeps it: one in forward's
thread and one in autograd's. After 2.13 each product takes its workspace and gives it back, unless
``TORCH_CUBLAS_WORKSPACE_CACHE=1`` is set. ``CUBLAS_WORKSPACE_CONFIG``, where a user sets it, overrides the sizes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from meft.planner.base.errors import UsageError, unknown_name
from meft.planner.base.units import KIB

USUAL_BYTES = 2 * 4096 * KIB + 8 * 16 * KIB
"""8,519,680: ``:4096:2:16:8``, two chunks of 4096 KiB and eight of 16."""
LARGE_BYTES = 8 * 4096 * KIB
"""32 MiB, which NVIDIA recommends from Hopper on."""

FIRST_VERSION = (2, 0)
LAST_KEPT_VERSION = (2, 13)
LARGE_SINCE: dict[str, tuple[int, int] | None] = {
    "volta": None,
    "turing": None,
    "ampere": None,
    "ada": None,
    "hopper": FIRST_VERSION,
    "blackwell": (2, 12),
}
"""The torch version from which a generation's workspace is the large one. Blackwell: pytorch pull request 175344 of
February 2026, which came after 2.11's branch was cut (assumed from the dates)."""
_GENERATIONS = {70: "volta", 75: "turing", 80: "ampere", 86: "ampere", 87: "ampere", 89: "ada", 90: "hopper"}
_GENERATIONS |= {100: "blackwell", 103: "blackwell", 120: "blackwell", 121: "blackwell"}


@dataclass(frozen=True, slots=True)
class Workspace:
    """``num_bytes`` per handle and stream; ``per_operation`` if a product gives it back when it is done."""

    num_bytes: int
    per_operation: bool


def cublas_workspace(architecture: str, torch_version: str, *, cached: bool = False) -> Workspace:
    """The workspace of an architecture ("Hopper GH100", "hopper", "sm_90", "9.0") in a torch version ("2.13.0+cu130").

    ``cached``: ``TORCH_CUBLAS_WORKSPACE_CACHE=1`` is set. Raises :class:`UsageError` for an architecture that is not in
    the table, and for what is no version or one below 2.0, whose sizes differ.

    >>> cublas_workspace("Ada AD102", "2.13.0"), cublas_workspace("sm_90", "2.14.1").per_operation
    (Workspace(num_bytes=8519680, per_operation=False), True)
    """
    version = _version(torch_version)
    since = LARGE_SINCE[_generation(architecture)]
    num_bytes = LARGE_BYTES if since is not None and version >= since else USUAL_BYTES
    return Workspace(num_bytes, per_operation=version > LAST_KEPT_VERSION and not cached)


def _generation(architecture: str) -> str:
    capability = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)[a-f]?", architecture.strip().lower())
    words = architecture.lower().split() or [""]
    name = _GENERATIONS.get(int(capability[1] + capability[2]), "") if capability else words[0]
    if name not in LARGE_SINCE:
        raise unknown_name("GPU architecture", architecture, LARGE_SINCE)
    return name


def _version(text: str) -> tuple[int, int]:
    match = re.match(r"(\d{1,4})\.(\d{1,4})(?!\d)", text)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < FIRST_VERSION:
        raise UsageError(f"torch version {text!r}: give 2.0 or newer, such as 2.13.0")
    return version
