"""Files in, rows out: JSON by lines or as one document, CSV and TSV, Parquet and Arrow, gzipped or not, folders of
them, and data sets that ``datasets`` saved.

What a file is, is told by its first bytes; its name only tells a table of text (CSV, TSV) from JSON. Text is UTF-8, or
UTF-16 and UTF-32 where a byte order mark says so. Tables are read by ``pyarrow`` and ``datasets`` (``meft[data]``).

Arrow gives every row the fields of all rows: a null inside a structure is taken for a field that is not there.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from meft.planner.base.errors import UsageError
from meft.planner.base.kinds import DATA, kind_of_path, other_kind, refuse_pointer
from meft.planner.base.packages import require_packages
from meft.runtime.data.records import json_type

WHAT_IS_READ = "JSON lines, a JSON list, CSV, TSV, Parquet, each also gzipped, a folder of them or a saved dataset"
_GZIP, _PARQUET, _ARROW_FILE, _ARROW_STREAM = b"\x1f\x8b", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_PACKED = {b"\x28\xb5\x2f\xfd": "zstd -d", b"BZh": "bunzip2", b"\xfd7zXZ\x00": "unxz", b"PK\x03\x04": "unzip"}
"""First bytes of other compressions, and what undoes them."""
_TEXT_MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ROOTS = ("data", "Data", "rows", "examples", "train")
"""Fields of a document that hold its entries."""
_DELIMITERS = (",", ";", "\t")
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_NO_DATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
_BROKEN_GZIP = (OSError, EOFError, zlib.error)
_SPLIT = re.compile(r"(?:^|[^a-z])(train|training|validation|valid|val|dev|eval|test|testing|heldout)(?:[^a-z]|$)")
_TRAINING = ("train", "training")


@dataclass(frozen=True, slots=True)
class Row:
    """One entry as it stands in the file, or what keeps it from being read."""

    where: str
    value: Any = None
    problem: str = ""


@dataclass(frozen=True)
class Source:
    """A file, or a saved data set: what it is, and its rows."""

    path: Path
    container: str
    rows: Callable[[], Iterator[Row]]


def sources(paths: Sequence[Path]) -> tuple[list[Source], list[str]]:
    """What there is to read, in order, and what of the folders given is left out.

    Raises:
        UsageError: nothing there, or nothing that can be read.
        MachineError: the package that reads it is missing.
    """
    found: list[Source] = []
    notes: list[str] = []
    for path in paths:
        if path.is_dir():
            inside, left_out = _folder(path)
            found += inside
            notes += left_out
        else:
            found.append(source(path))
    return found, notes


def source(path: Path) -> Source:
    """What one file is; see :func:`sources` for errors."""
    start = _first_bytes(path)
    refuse_pointer(start, path)
    zipped = start.startswith(_GZIP)
    if zipped:
        with _opened(path) as file:
            start = _read(file, path, 64)
        refuse_pointer(start, path)
    suffix = "".join(path.suffixes[-2:]).removesuffix(".gz").rpartition(".")[2].lower()
    container, rows = _reader(path, start, suffix)
    return Source(path, container + (", gzipped" if zipped else ""), rows)


def _reader(path: Path, start: bytes, suffix: str) -> tuple[str, Callable[[], Iterator[Row]]]:
    if start.startswith(_PARQUET):
        require_packages("pyarrow", purpose=f"{path} is Parquet")
        return "Parquet", lambda: _table_rows(path, _parquet)
    if start.startswith(_ARROW_FILE) or (start.startswith(_ARROW_STREAM) and suffix == "arrow"):
        require_packages("pyarrow", purpose=f"{path} is Arrow")
        return "Arrow", lambda: _table_rows(path, _arrow)
    for magic, command in _PACKED.items():
        if start.startswith(magic):
            raise UsageError(f"{path}: compressed; unpack it first: {command} {path.name}")
    kind = kind_of_path(path) if b"\0" in start[:16] or not _is_text(start) else None
    if kind is not None and kind != DATA and not start.startswith(tuple(mark for mark, _ in _TEXT_MARKS)):
        raise other_kind(path, found=kind, wanted=DATA)
    if suffix in ("csv", "tsv"):
        return suffix.upper(), lambda: _csv_rows(path, tabs=suffix == "tsv")
    return _json_reader(path)


def _is_text(start: bytes) -> bool:
    return start[:1] in (b"{", b"[", b" ", b"\n", b"\r", b"\t", b"") or start[:1].isalnum() or start[:1] in b"\"'\xef"


# --- bytes and text ------------------------------------------------------------------------------------------------


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; what is read: {WHAT_IS_READ}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); what is read: {WHAT_IS_READ}") from None


def _opened(path: Path) -> BinaryIO:
    """The file's bytes, unpacked."""
    return cast(BinaryIO, gzip.open(path, "rb") if _first_bytes(path).startswith(_GZIP) else path.open("rb"))


def _read(file: BinaryIO, path: Path, size: int = -1) -> bytes:
    try:
        return file.read(size)
    except _BROKEN_GZIP as error:
        raise _not_whole(path, error) from None


def _not_whole(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path}: is not a whole gzip file ({error})")


def _lines(path: Path) -> Iterator[tuple[int, str | None, str]]:
    """Number, text, and in place of the text what is wrong with it; line ends are kept."""
    with _opened(path) as file:
        mark = _read(file, path, 4)
        encoding = next((name for start, name in _TEXT_MARKS if mark.startswith(start)), "")
    with _opened(path) as file:
        if encoding:
            for number, line in enumerate(io.StringIO(_decoded(_read(file, path), encoding, path), newline=""), 1):
                yield number, line, ""
            return
        for number, raw in enumerate(_binary_lines(file, path), 1):
            raw_line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            try:
                yield number, raw_line.decode(), ""
            except UnicodeDecodeError as error:
                yield number, None, f"not UTF-8 (byte {error.start + 1} of the line)"


def _binary_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except _BROKEN_GZIP as error:
        raise _not_whole(path, error) from None


def _decoded(data: bytes, encoding: str, path: Path) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not {encoding.upper()}, as its byte order mark says ({error.reason})") from None


# --- JSON ----------------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """A JSON value; a :class:`ValueError` in one line where there is none, or where a key is there twice."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        raise ValueError(f"not JSON ({error.msg} at {where} {error.colno})") from None
    except RecursionError as error:
        raise ValueError(f"not JSON that can be read ({error})") from None
    except _DuplicateKey as error:
        raise ValueError(str(error)) from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"not JSON that can be read ({error})") from None


class _DuplicateKey(ValueError):
    pass


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _DuplicateKey(f"the key {twice!r} is there twice")
    return made


def _json_reader(path: Path) -> tuple[str, Callable[[], Iterator[Row]]]:
    if _is_one_document(path):
        return "a JSON document", lambda: _document_rows(path)
    return "JSON lines", lambda: _line_rows(path)


def _is_one_document(path: Path) -> bool:
    """Whether the file is one JSON value, told by its first lines: a list, or an object with a list of entries."""
    filled = (text for _, text, _ in _lines(path) if text is None or text.strip())
    first, second = next(filled, None), next(filled, None)
    if first is None:
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        named = ".json" in path.suffixes[-2:]
        return first.lstrip()[:1] == "[" or first.strip() == "{" or (named and first.lstrip()[:1] == "{")
    if second is not None:
        return False
    return isinstance(value, list) or (isinstance(value, dict) and _root(value) is not None)


def _root(value: dict[str, Any]) -> str | None:
    """The field of a document that holds its entries."""
    return next((name for name in _ROOTS if isinstance(value.get(name), list)), None)


def _line_rows(path: Path) -> Iterator[Row]:
    for number, text, problem in _lines(path):
        where = f"{path}:{number}"
        if text is None:
            yield Row(where, problem=problem)
        elif text.strip():
            try:
                yield Row(where, parse_json(text.strip("\r\n")))
            except ValueError as error:
                yield Row(where, problem=str(error))


def _document_rows(path: Path) -> Iterator[Row]:
    parts = []
    for number, text, problem in _lines(path):
        if text is None:
            raise UsageError(f"{path}:{number}: {problem}")
        parts.append(text)
    try:
        content = parse_json("".join(parts))
    except ValueError as error:
        at = re.search(r"at line (\d+), column", str(error))
        where = f"{path}:{at[1]}" if at else str(path)
        yield Row(where, problem=str(error))
        return
    if isinstance(content, list):
        yield from (Row(f"{path}, entry {index}", each) for index, each in enumerate(content, 1))
        return
    root = _root(content) if isinstance(content, dict) else None
    if root is None:
        yield Row(str(path), content, "" if isinstance(content, dict) else f"a JSON {json_type(content)}, not a list")
        return
    for index, each in enumerate(content[root]):
        yield from _branches(f"{path}, {root}[{index}]", each)


def _branches(where: str, value: Any) -> Iterator[Row]:
    """The entries of a document's element: itself, the row that it wraps, or those of SQuAD's paragraphs."""
    if not isinstance(value, dict):
        yield Row(where, value)
    elif isinstance(value.get("row"), dict):  # as the dataset viewer serves it
        yield Row(where, value["row"])
    elif isinstance(value.get("paragraphs"), list):
        for number, paragraph in enumerate(value["paragraphs"]):
            yield from _questions(f"{where}, paragraphs[{number}]", paragraph)
    else:
        yield Row(where, value)


def _questions(where: str, paragraph: Any) -> Iterator[Row]:
    listed = paragraph.get("qas") if isinstance(paragraph, dict) else None
    if not isinstance(listed, list):
        yield Row(where, problem="field 'qas' is missing, or no list")
        return
    for number, question in enumerate(listed):
        value = {"context": paragraph.get("context"), **question} if isinstance(question, dict) else question
        yield Row(f"{where}, qas[{number}]", value)


# --- tables --------------------------------------------------------------------------------------------------------


def _csv_rows(path: Path, *, tabs: bool) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    lines = _whole_lines(path)
    head = next(lines, "")
    delimiter = "\t" if tabs else max(_DELIMITERS, key=head.count)
    reader = csv.reader(_chained(head, lines), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"{path}:1: the column {twice!r} is there twice")
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                yield Row(where, problem=f"{len(cells)} cells under a header of {len(header)} ({', '.join(header)})")
            else:
                yield Row(where, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise UsageError(f"{path}:{reader.line_num}: not a table ({error}); is a quote left open?") from None


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _whole_lines(path: Path) -> Iterator[str]:
    for number, text, problem in _lines(path):
        if text is None:
            raise UsageError(f"{path}:{number}: {problem}")
        yield text


def _table_rows(path: Path, batches: Callable[[BinaryIO], Iterator[Any]]) -> Iterator[Row]:
    import pyarrow

    number = 0
    try:
        with _opened(path) as packed:
            file: BinaryIO = io.BytesIO(_read(packed, path)) if _first_bytes(path).startswith(_GZIP) else packed
            for batch in batches(file):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", without_nulls(value))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: damaged: not the table that its first bytes promise ({_brief(error)})") from None


def _parquet(file: BinaryIO) -> Iterator[Any]:
    from pyarrow import parquet

    return cast(Iterator[Any], parquet.ParquetFile(file).iter_batches())


def _arrow(file: BinaryIO) -> Iterator[Any]:
    from pyarrow import ipc

    if file.read(len(_ARROW_FILE)) == _ARROW_FILE:
        file.seek(0)
        opened = ipc.open_file(file)
        return (opened.get_batch(index) for index in range(opened.num_record_batches))
    file.seek(0)
    return iter(ipc.open_stream(file))


def _brief(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """A row without the nulls inside its structures; those of its own fields stay."""
    return {name: _stripped(each) for name, each in value.items()}


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stripped(each) for name, each in value.items() if each is not None}
    return [_stripped(each) for each in value] if isinstance(value, list) else value


# --- folders -------------------------------------------------------------------------------------------------------


def _folder(path: Path) -> tuple[list[Source], list[str]]:
    if (path / "dataset_dict.json").is_file() or {"dataset_info.json", "state.json"} <= {
        each.name for each in path.iterdir()
    }:
        return _saved(path)
    kind = kind_of_path(path)
    if kind not in (None, "folder"):
        raise other_kind(path, found=str(kind), wanted=DATA)
    inside = [each for each in sorted(path.rglob("*")) if _holds_data(each, path)]
    if not inside:
        raise UsageError(f"{path}: no data file in this folder; what is read: {', '.join(_SUFFIXES)}, also gzipped")
    chosen, left_out = _training_split(inside, path)
    folders = sorted({str(each.parent.relative_to(path)) for each in chosen})
    if len(folders) > 1:
        raise UsageError(f"{path}: data in several folders ({', '.join(folders)}), perhaps the same twice; name one")
    stems = [each.name.removesuffix(".gz").rpartition(".")[0] for each in chosen]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        names = ", ".join(each.name for each, stem in zip(chosen, stems, strict=True) if stem == twice)
        raise UsageError(f"{path}: {names}, perhaps the same data twice; name the file to read")
    notes = [f"{path}: {', '.join(left_out)} left out, not the training split"] if left_out else []
    return [source(each) for each in chosen], notes


def _holds_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    named = file.name.lower().removesuffix(".gz").endswith(_SUFFIXES) and file.name not in _NO_DATA
    return named and not hidden and file.is_file()


def _training_split(files: list[Path], folder: Path) -> tuple[list[Path], list[str]]:
    """The files of the training split, or those of none where nothing is called so; and the others' names."""
    names = {file: str(file.relative_to(folder)).lower() for file in files}
    splits = {file: found[1] if (found := _SPLIT.search(name)) else "" for file, name in names.items()}
    wanted = _TRAINING if any(split in _TRAINING for split in splits.values()) else ("",)
    chosen = [file for file in files if splits[file] in wanted]
    if not chosen:
        raise UsageError(f"{folder}: only held-out splits ({', '.join(names.values())}); name the file to train on")
    return chosen, [str(file.relative_to(folder)) for file in files if file not in chosen]


def _saved(path: Path) -> tuple[list[Source], list[str]]:
    """A data set that ``datasets`` saved to disk."""
    require_packages("datasets", purpose=f"{path} is a saved dataset")
    from datasets import DatasetDict, load_from_disk

    for file in sorted(path.rglob("*.arrow")):
        refuse_pointer(_first_bytes(file), file)
    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:  # whatever its files are instead
        raise UsageError(f"{path}: damaged: datasets cannot load it ({_brief(error)})") from None
    notes, name = [], str(path)
    if isinstance(loaded, DatasetDict):
        split = next((each for each in _TRAINING if each in loaded), next(iter(loaded)) if len(loaded) == 1 else None)
        if split is None:
            raise UsageError(f"{path}: splits {', '.join(loaded)} and none called train; give one's folder")
        others = [each for each in loaded if each != split]
        notes = [f"{path}: split {', '.join(others)} left out, not the training split"] if others else []
        loaded, name = loaded[split], f"{path}/{split}"

    def rows() -> Iterator[Row]:
        for number, value in enumerate(loaded, 1):
            yield Row(f"{name}, row {number}", without_nulls(value))

    return [Source(Path(name), "a saved dataset", rows)], notes
