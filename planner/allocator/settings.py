"""Settings of the caching allocator that change its arithmetic, as ``PYTORCH_CUDA_ALLOC_CONF`` names them.

Only those whose rules are modelled exactly can be given; any other is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from meft.planner.base.errors import UsageError, unknown_name
from meft.planner.base.units import MIB

LEAST_SPLIT_MB = 20
NO_SPLIT_LIMIT = 1 << 62

_NOT_MODELLED = {
    "backend": "only the native allocator is modelled",
    "garbage_collection_threshold": "it goes by the age of cached blocks",
    "large_segment_size_mb": "it came late and its rules are not settled",
    "per_process_memory_fraction": "give the memory itself as --capacity",
    "graph_capture_record_stream_reuse": "private pools of CUDA graphs are not modelled",
}
_ONLY_TIME = ("release_lock_on_cudamalloc", "pinned_use_background_threads", "pinned_num_register_threads")
_MODELLED = ("expandable_segments", "max_split_size_mb", "max_non_split_rounding_mb", "roundup_power2_divisions")


@dataclass(frozen=True, slots=True)
class AllocatorSettings:
    """How the allocator departs from its default mode.

    ``max_split_bytes``: blocks from this size on are neither split nor given to smaller requests; a request from this
    size on takes no block that is ``max_non_split_rounding_bytes`` or more too large. ``roundup_power2_divisions``:
    requests above 512 bytes times this round up to one of so many equal steps between powers of two.
    """

    expandable_segments: bool = False
    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int = LEAST_SPLIT_MB * MIB
    roundup_power2_divisions: int = 1

    def __post_init__(self) -> None:
        divisions = self.roundup_power2_divisions
        if divisions < 1 or divisions & (divisions - 1):
            raise ValueError(f"roundup_power2_divisions is {divisions}; it must be a power of two")
        for name in ("max_split_bytes", "max_non_split_rounding_bytes"):
            value = getattr(self, name)
            if value is not None and value < LEAST_SPLIT_MB * MIB:
                raise ValueError(f"{name} is {value}; it must be at least {LEAST_SPLIT_MB} MiB")
        if self.expandable_segments and self.max_split_bytes is not None:
            raise ValueError("max_split_size_mb does not go with expandable_segments: torch fails when memory is short")


def parse_settings(text: str, *, source: str = "PYTORCH_CUDA_ALLOC_CONF") -> AllocatorSettings:
    """Read such as ``expandable_segments:True`` or ``max_split_size_mb:128,roundup_power2_divisions:8``.

    Raises :class:`UsageError` that names ``source``, the setting, its value and what is possible.
    """
    given: dict[str, bool | int] = {}
    for name, value in _pairs(text, source=source):
        if name in _NOT_MODELLED and (name, value) != ("backend", "native"):
            raise UsageError(f"{source}: {name}:{value} is not modelled, {_NOT_MODELLED[name]}; leave it out")
        if name == "expandable_segments":
            given[name] = _flag(name, value, source=source)
        elif name.endswith("_mb") and name in _MODELLED:
            given[name.removesuffix("_mb").removesuffix("_size") + "_bytes"] = MIB * _number(name, value, source=source)
        elif name == "roundup_power2_divisions":
            given[name] = _number(name, value, source=source)
        elif name not in _ONLY_TIME and name != "backend":
            raise unknown_name(f"setting in {source}", name, [*_MODELLED, *_ONLY_TIME, *_NOT_MODELLED])
    try:
        return AllocatorSettings(**given)  # type: ignore[arg-type] # each by its name
    except ValueError as error:
        raise UsageError(f"{source} {text!r}: {error}") from None


def _pairs(text: str, *, source: str) -> list[tuple[str, str]]:
    """Settings and values. A list in brackets is refused: torch's versions do not read it alike."""
    if "[" in text:
        raise UsageError(
            f"{source}: {text!r} has a list in brackets, which is not modelled; give one number for all sizes"
        )
    pairs = []
    for part in text.replace(" ", "").split(","):
        name, colon, value = part.partition(":")
        if part and not (name and colon and value):
            raise UsageError(f"{source}: {part!r} is not a setting; give such as expandable_segments:True")
        if part:
            pairs.append((name, value))
    return pairs


def _flag(name: str, value: str, *, source: str) -> bool:
    if value not in ("True", "False"):
        raise UsageError(f"{source}: {name}:{value} is neither True nor False; give one of them")
    return value == "True"


def _number(name: str, value: str, *, source: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise UsageError(f"{source}: {name}:{value} is not a whole number; give such as {name}:128")
    return int(value)
