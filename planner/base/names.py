"""Names as people spell them, and the files of :mod:`meft.profiles` that they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import meft.profiles
from meft.planner.base.errors import unknown_name

PROFILES = Path(meft.profiles.__path__[0])
"""The folder of the built-in profiles; :mod:`importlib.resources` is slow to load."""


def find_name(kind: str, given: str, aliases_by_key: Mapping[str, Iterable[str]]) -> str:
    """The key that ``given`` means: spelling of case, spaces, dashes and vendor does not matter.

    Raises :class:`UsageError` listing near names and all keys.
    """
    by_spelling = {
        spelling: key
        for key, aliases in aliases_by_key.items()
        for name in (key, *aliases)
        for spelling in _spellings(name)
    }
    for spelling in _spellings(given):
        if spelling in by_spelling:
            return by_spelling[spelling]
    raise unknown_name(kind, given, aliases_by_key)


def looks_like_path(reference: str) -> bool:
    """True for what is meant as a file: a ``.json`` name, something with a folder in front, or an existing file."""
    return reference.endswith(".json") or reference.startswith(("/", "./", "../", "~")) or Path(reference).is_file()


def profile_text(relative_path: str) -> str:
    """The text of a file of :mod:`meft.profiles`."""
    return (PROFILES / relative_path).read_text(encoding="utf-8")


_VENDOR_WORDS = frozenset({"nvidia", "geforce", "tesla", "quadro", "generation"})
_SERIES_WORDS = frozenset({"rtx", "gtx"})


def _spellings(name: str) -> tuple[str, ...]:
    """Ways to compare a name, strictest first: its words and numbers, then without vendor, then without series.

    >>> _spellings("NVIDIA GeForce RTX3090")
    ('nvidia-geforce-rtx-3090', 'rtx-3090', '3090')
    """
    words = re.findall(r"[a-z]+|[0-9]+", name.lower())
    without_vendor = [word for word in words if word not in _VENDOR_WORDS]
    number = [word for word in without_vendor if word not in _SERIES_WORDS]
    return tuple(dict.fromkeys("-".join(choice) for choice in (words, without_vendor, number) if choice))
