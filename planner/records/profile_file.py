"""The file that ``meft-profile`` writes: measured profiles in one place, with the measurements that they rest on.

A file has the sections that its command could measure: ``hardware`` host, GPU and link, ``sparsity`` the sparsity,
``calibrate`` all of them. It stands wherever a profile is accepted (``--host``, ``--gpu``, ``--link``, ``--sparsity``);
each takes its own section.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from meft.planner.base.errors import UsageError
from meft.planner.base.schema import Count, File, Record, Text
from meft.planner.records.profiles import GpuProfile, HostProfile, LinkProfile, Section, SparsityProfile

SECTIONS: tuple[Section, ...] = ("host", "gpu", "link", "sparsity")


class Machine(Record):
    """Where and when something was measured."""

    name: Text
    """Processor, cores and memory; with a GPU, its name."""
    date: Text
    """As ``2026-01-31``."""
    versions: dict[str, str]
    """Of the libraries that did the work."""


class Measurement(Record):
    """One number with its spread: quartiles over the repetitions."""

    name: Text
    unit: Text
    detail: str
    """What it was measured with: dtype, shape, size."""
    median: float
    low_quartile: float
    high_quartile: float
    repetitions: Count

    @property
    def spread_fraction(self) -> float:
        """Distance of the quartiles over the median."""
        return (self.high_quartile - self.low_quartile) / abs(self.median) if self.median else 0.0


class ProfileFile(File):
    """``meft-profile ... -o FILE``."""

    kind: ClassVar[str] = "profile file"

    contains: Literal["measured profiles"] = "measured profiles"
    """What tells this file from a profile of one record."""
    meft_version: str
    machine: Machine
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...]
    """What made the measurements less certain: a busy machine, a slow slot, throttling."""
    host: HostProfile | None = None
    gpu: GpuProfile | None = None
    link: LinkProfile | None = None
    sparsity: SparsityProfile | None = None

    def sections(self) -> tuple[Section, ...]:
        """The profiles that are there."""
        return tuple(name for name in SECTIONS if getattr(self, name) is not None)


def is_profile_file(content: object) -> bool:
    """Whether parsed JSON is meant as a :class:`ProfileFile`."""
    return isinstance(content, dict) and "contains" in content


def section_of(text: str, section: Section, *, source: str) -> Any:
    """One profile of a :class:`ProfileFile`'s text; raises :class:`UsageError` where it has none of that kind."""
    file = ProfileFile.from_json(text, source=source)
    found = getattr(file, section)
    if found is None:
        raise UsageError(
            f"{source}: it holds {_listed(file)} and no {section}; give a file that does, or the name of a built-in one"
        )
    return found


def _listed(file: ProfileFile) -> str:
    return ", ".join(file.sections()) or "no profile"
