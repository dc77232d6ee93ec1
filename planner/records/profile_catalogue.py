"""Profiles by reference: a built-in name, a file of one record, or a file of ``meft-profile``.

The built-in ones are the JSON files of :mod:`meft.profiles`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from meft.planner.base.errors import UsageError
from meft.planner.base.kinds import PROFILE, refuse_other_kind, refuse_other_path
from meft.planner.base.names import find_name, looks_like_path, profile_text
from meft.planner.base.schema import Record, parse_json, read_text, validated
from meft.planner.records.profiles import Defaults, GpuProfile, HostProfile, LinkProfile, Section, SparsityProfile

P = TypeVar("P", bound=Record)


def load_gpu(name_or_path: str) -> GpuProfile:
    """The GPU of that name ("rtx-3090", "NVIDIA GeForce RTX 3090", "3090") or of that profile file.

    Raises :class:`UsageError`: a misspelt name with the near ones, a bad file with what is wrong in it.
    """
    return _load(GpuProfile, "GPU", "gpus.json", name_or_path)


def load_link(name_or_path: str) -> LinkProfile:
    """The link class of that name ("pcie-4.0-x16") or of that profile file; errors as :func:`load_gpu`."""
    return _load(LinkProfile, "link", "links.json", name_or_path)


def load_host(name_or_path: str) -> HostProfile:
    """The host class of that name or of that profile file; errors as :func:`load_gpu`."""
    return _load(HostProfile, "host", "hosts.json", name_or_path)


def load_sparsity(name_or_path: str) -> SparsityProfile:
    """The sparsity profile of that name or file; errors as :func:`load_gpu`."""
    return _load(SparsityProfile, "sparsity profile", "sparsity.json", name_or_path)


def gpu_names() -> tuple[str, ...]:
    """Keys of the built-in GPUs, sorted."""
    return tuple(sorted(_entries("gpus.json")))


def link_names() -> tuple[str, ...]:
    """Keys of the built-in link classes, sorted."""
    return tuple(sorted(_entries("links.json")))


def host_names() -> tuple[str, ...]:
    """Keys of the built-in host classes, sorted."""
    return tuple(sorted(_entries("hosts.json")))


def sparsity_names() -> tuple[str, ...]:
    """Keys of the built-in sparsity profiles, sorted."""
    return tuple(sorted(_entries("sparsity.json")))


@cache
def load_defaults() -> Defaults:
    """Which profiles serve a request that names none."""
    return validated(Defaults, _entries("defaults.json"), source="built-in defaults.json")


def _load(record: type[P], kind: str, collection: str, name_or_path: str) -> P:
    if looks_like_path(name_or_path):
        return _from_file(record, kind, Path(name_or_path).expanduser())
    entries = _entries(collection)
    key = find_name(kind, name_or_path, {key: entry.get("aliases", ()) for key, entry in entries.items()})
    return validated(record, {"key": key} | entries[key], source=f"built-in {kind} {key}")


def _from_file(record: type[P], kind: str, path: Path) -> P:
    """A profile of one record, or its section of a file that ``meft-profile`` wrote."""
    from meft.planner.records.profile_file import is_profile_file, section_of  # built-in profiles do without

    source = f"{kind} file {path}"
    text, content = _read(path, kind=f"{kind} file")
    if not is_profile_file(content):
        return validated(record, content, source=source)
    sections: dict[type[Record], Section] = {
        GpuProfile: "gpu",
        LinkProfile: "link",
        HostProfile: "host",
        SparsityProfile: "sparsity",
    }
    found: P = section_of(text, sections[record], source=str(path))
    return found


def sections_in(reference: str) -> tuple[Section, ...]:
    """Which profiles the file at a path holds besides its own; none for a profile of one record.

    Raises :class:`UsageError` for a file that cannot be read.
    """
    from meft.planner.records.profile_file import ProfileFile, is_profile_file  # built-in profiles do without

    path = Path(reference).expanduser()
    text, content = _read(path, kind="profile file")
    return ProfileFile.from_json(text, source=str(path)).sections() if is_profile_file(content) else ()


def _read(path: Path, *, kind: str) -> tuple[str, Any]:
    """A profile's text and what it says; a plan, a report or anything else that is known is called by its name."""
    try:
        text = read_text(path, kind=kind)
        content = parse_json(text, source=f"{kind} {path}")
    except UsageError:
        refuse_other_path(path, wanted=PROFILE)
        raise
    if isinstance(content, dict):
        refuse_other_kind(content, source=path, wanted=PROFILE)
    return text, content


@cache
def _entries(collection: str) -> dict[str, Any]:
    """A built-in collection: records by key. Only the one that is asked for is validated, to start fast."""
    entries: dict[str, Any] = json.loads(profile_text(collection))
    return entries
