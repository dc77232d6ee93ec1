"""The base of every record: frozen, closed, finite, versioned, digested, and exact through JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meft.planner.base.errors import UsageError
from meft.planner.base.files import write_atomic
from meft.planner.base.kinds import refuse_other_kind, refuse_other_path, refuse_pointer

SCHEMA_VERSION = 1

Basis = Literal["counted", "measured", "assumed"]
"""Where a number comes from: counted (exact arithmetic), measured (on something named), assumed (for a reason)."""

MAX_PROBLEMS = 20
"""So many of a record's problems are named, the rest counted."""
MAX_WHOLE = 1 << 60
"""No count is larger, and no size in bytes (an EiB): sums of a few of them are still 64-bit integers."""

Text = Annotated[str, Field(min_length=1)]
Bytes = Annotated[int, Field(ge=0, le=MAX_WHOLE, strict=True)]
Count = Annotated[int, Field(ge=1, le=MAX_WHOLE, strict=True)]
Index = Annotated[int, Field(ge=0, le=MAX_WHOLE, strict=True)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seconds = Annotated[float, Field(ge=0.0)]
Rate = Annotated[float, Field(gt=0.0)]


class Record(BaseModel):
    """An immutable value that refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )

    def canonical_json(self) -> str:
        """The one text of this record: sorted keys, no spaces, shortest exact floats."""
        return _canonical(self.model_dump(mode="json"))

    def content_digest(self) -> str:
        """SHA-256 of the canonical text of all fields that are not at their defaults, as 64 hex digits.

        So a field that a later version adds, with a default that means what was before, changes no older digest: files
        go on loading, and checkpoints go on belonging to their plans.
        """
        return hashlib.sha256(_canonical(self.model_dump(mode="json", exclude_defaults=True)).encode()).hexdigest()


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


class File(Record):
    """A record that is a file of its own: it carries ``schema_version`` and a digest of everything else."""

    kind: ClassVar[str] = "file"
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Indented JSON with the record's ``digest`` as its last key; :meth:`from_json` is the exact inverse."""
        content = self.model_dump(mode="json") | {"digest": self.content_digest()}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Self:
        """Parse and check ``text``; ``source`` names it in errors.

        Raises :class:`UsageError` for text that is not JSON, a file of another kind, a newer schema, an unknown or
        missing field, a value out of range, or a digest that does not match what the file says.
        """
        content = _parse_object(text, source=source, kind=cls.kind)
        refuse_other_kind(content, source=source, wanted=cls.kind)
        _check_version(content, source=source, kind=cls.kind)
        stated = content.pop("digest", None)
        record = validated(cls, content, source=f"{cls.kind} {source}")
        if stated != record.content_digest():
            raise UsageError(
                f"{cls.kind} {source}: its digest does not match its content, so it was edited or damaged; "
                f"make it again instead of changing it by hand"
            )
        return record

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a file written by :meth:`save`; see :meth:`from_json` for the errors."""
        try:
            return cls.from_json(read_text(path, kind=cls.kind), source=str(path))
        except UsageError:
            refuse_other_path(Path(path), wanted=cls.kind)
            raise

    def save(self, path: Path | str) -> None:
        """Write atomically: a crash leaves the old file or the new one."""
        write_atomic(Path(path), self.to_json())


R = TypeVar("R", bound=BaseModel)


def validated(record: type[R], content: object, *, source: str) -> R:
    """Validate ``content`` as ``record``; its problems in one :class:`UsageError` line that names ``source``."""
    try:
        return record.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{source}: {problems_of(error)}") from None


def problems_of(error: ValidationError) -> str:
    """The first problems, in one line: field, what is wrong, the value."""
    found = error.errors(include_url=False)
    problems = [_describe(problem) for problem in found[:MAX_PROBLEMS]]
    more = [f"and {len(found) - MAX_PROBLEMS} more"] if len(found) > MAX_PROBLEMS else []
    return "; ".join(problems + more)


def read_text(path: Path | str, *, kind: str) -> str:
    """Read a UTF-8 file, or raise a :class:`UsageError` that names it and its ``kind``."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{kind} {path}: no such file") from None
    except IsADirectoryError:
        raise UsageError(f"{kind} {path}: is a folder, not a file") from None
    except UnicodeDecodeError:
        raise UsageError(f"{kind} {path}: is not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"{kind} {path}: cannot be read ({error.strerror})") from None
    refuse_pointer(text[:64].encode(), path)
    return text


def parse_json(text: str, *, source: str) -> Any:
    """Parse strict JSON: NaN, Infinity and duplicate keys are refused by name."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"{source}: not valid JSON at {where} ({error.msg}); is it truncated?") from None
    except RecursionError:
        raise UsageError(f"{source}: nested too deeply to be read") from None
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None


def _parse_object(text: str, *, source: str, kind: str) -> dict[str, Any]:
    content = parse_json(text, source=f"{kind} {source}")
    if not isinstance(content, dict):
        raise UsageError(f"{kind} {source}: expected a JSON object, found {type(content).__name__}")
    return content


def _check_version(content: dict[str, Any], *, source: str, kind: str) -> None:
    version = content.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise UsageError(f"{kind} {source}: schema_version is missing or no integer; is this a {kind}?")
    if version > SCHEMA_VERSION:
        raise UsageError(
            f"{kind} {source}: schema_version {version} is newer than {SCHEMA_VERSION}, the newest this version of "
            f"meft reads; upgrade meft, or make the {kind} again with this version"
        )
    if version < 1:
        raise UsageError(f"{kind} {source}: schema_version {version} is below 1, the first")


def _describe(problem: Any) -> str:
    place = ".".join(shortened(str(part)) for part in problem["loc"]) or "(whole record)"
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown field"
    if problem["type"] == "missing":
        return f"{place}: missing"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')} (got {shortened(repr(problem['input']))})"


def shortened(text: str) -> str:
    """A value as errors show it: its beginning, if it is long."""
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a finite number, which every value must be")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} appears twice")
    return content
