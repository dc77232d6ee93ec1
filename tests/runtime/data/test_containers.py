"""Files of every container and encoding become rows; what is no data is called what it is."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from meft.planner.base.errors import MachineError, UsageError
from meft.runtime.data import containers
from meft.runtime.data.containers import sources

ROWS = [{"text": "é"}, {"text": "ü"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def values(path: Path) -> list[Any]:
    found, _ = sources([path])
    return [row.value if not row.problem else row.problem for each in found for row in each.rows()]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", LINES.replace("\n", "\r\n").encode("utf-8-sig")),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl", LINES.encode("utf-32")),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.json", json.dumps({"rows": [{"row_idx": 0, "row": row} for row in ROWS]}, indent=1)),
        ("a.csv", "text\né\nü\n"),
        ("a.csv", 'text\r\n"é"\r\n\r\nü'),
        ("a.tsv", b"\xef\xbb\xbftext\n" + "é\nü\n".encode()),
        ("a.csv.gz", gzip.compress("text\né\nü\n".encode(), mtime=0)),
        ("a.csv", "text\né\nü\n".encode("utf-16")),
    ],
)
def test_text_of_every_kind(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert values(write(tmp_path / name, content)) == ROWS


def test_cells_with_quotes_and_the_delimiter_of_the_header(tmp_path: Path) -> None:
    quoted = 'a,b\n"say ""x""\nnow","1, 2"\n'
    assert values(write(tmp_path / "q.csv", quoted)) == [{"a": 'say "x"\nnow', "b": "1, 2"}]
    assert values(write(tmp_path / "s.csv", "a;b\n1,5;2\n")) == [{"a": "1,5", "b": "2"}]
    assert values(write(tmp_path / "t.tsv", 'a\tb\nsay "x"\t"1\t2"\n')) == [{"a": 'say "x"', "b": "1\t2"}]
    assert values(write(tmp_path / "r.csv", "a,b\n1,2,3\n")) == ["3 cells under a header of 2 (a, b)"]


def test_squad_as_published(tmp_path: Path) -> None:
    tree = {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]}]}
    assert values(write(tmp_path / "s.json", json.dumps(tree))) == [{"context": "c", "question": "q", "answers": []}]


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    twice = '{"text": "a", "text": "b"}\n{"messages": [{"role": "user", "role": "tool"}]}\n'
    assert values(write(tmp_path / "a.jsonl", twice)) == [
        "the key 'text' is there twice",
        "the key 'role' is there twice",
    ]
    with pytest.raises(UsageError, match="the column 'a' is there twice"):
        values(write(tmp_path / "a.csv", "a,a\n1,2\n"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, not the file"),
        ("a.parquet", gzip.compress(b"version https://git-lfs.github.com/spec/v1\n", mtime=0), "a Git LFS pointer"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd1234", r"compressed; unpack it first: zstd -d a\.jsonl"),
        ("a.jsonl", b"\x89PNG\r\n\x1a\n", "is a picture, not training data"),
        ("a.jsonl", gzip.compress(LINES.encode() * 99, mtime=0)[:-9], "is not a whole gzip file"),
        ("a.jsonl", "[{}]".encode("utf-16") + b"\x00", "not UTF-16, as its byte order mark says"),
        ("a.csv", 'a,b\n"x,1\n', "not a table .* is a quote left open"),
        ("a.csv", b"a,b\n\xff,1\n", "a.csv:2: not UTF-8"),
    ],
)
def test_what_is_no_data_is_called_what_it_is(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        values(write(tmp_path / name, content))


def test_a_folder_gives_its_training_split(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl.gz", "validation.jsonl"):
        content = json.dumps({"text": name[:7]}).encode()
        write(tmp_path / "d" / name, gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    write(tmp_path / "d" / "README.md", "# no data")
    write(tmp_path / "d" / "dataset_infos.json", "{}")
    assert values(tmp_path / "d") == [{"text": "train-0"}, {"text": "train-1"}]
    _, notes = sources([tmp_path / "d"])
    assert notes == [f"{tmp_path / 'd'}: validation.jsonl left out, not the training split"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.jsonl", "a.csv"), "perhaps the same data twice"),
        (("main/train.jsonl", "socratic/train.jsonl"), r"in several folders \(main, socratic\)"),
        (("test.jsonl",), "only held-out splits"),
        (("notes.txt",), "no data file in this folder"),
        (("config.json", "a.jsonl"), "is the folder of a model, not training data"),
    ],
)
def test_a_folder_that_leaves_open_what_to_read_is_refused(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    for name in names:
        write(tmp_path / "d" / name, '{"text": "a"}\n')
    with pytest.raises(UsageError, match=message):
        sources([tmp_path / "d"])


# --- tables ----------------------------------------------------------------------------------------------------------

CALLS = [{"messages": [{"role": "user", "tool": None}, {"role": "tool", "tool": {"a": 1, "b": None}}], "tools": None}]


def test_parquet_by_its_first_bytes(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(CALLS), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.parquet").read_bytes())
    (tmp_path / "c.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    for name in ("a.parquet", "b.jsonl", "c.parquet.gz"):
        assert values(tmp_path / name) == [
            {"messages": [{"role": "user"}, {"role": "tool", "tool": {"a": 1}}], "tools": None}
        ]


def test_parquet_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = write(tmp_path / "parquet.jsonl", b"PAR1" + b"\xff" * 32 + b"PAR1")
    with pytest.raises(UsageError, match="damaged: not the table that its first bytes promise"):
        values(path)


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def require(*names: str, purpose: str) -> None:
        raise MachineError(f"{purpose}: {names[0]} is missing")

    monkeypatch.setattr(containers, "require_packages", require)
    with pytest.raises(MachineError, match="is Parquet: pyarrow is missing"):
        sources([write(tmp_path / "a.parquet", b"PAR1....PAR1")])
    write(tmp_path / "d" / "dataset_info.json", "{}")
    write(tmp_path / "d" / "state.json", "{}")
    with pytest.raises(MachineError, match="is a saved dataset: datasets is missing"):
        sources([tmp_path / "d"])


def test_data_sets_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(a=made, b=made).save_to_disk(tmp_path / "neither")
    assert values(tmp_path / "one") == values(tmp_path / "both") == values(tmp_path / "both" / "train") == ROWS
    assert sources([tmp_path / "both"])[1] == [f"{tmp_path / 'both'}: split test left out, not the training split"]
    with pytest.raises(UsageError, match="splits a, b and none called train"):
        sources([tmp_path / "neither"])
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"torn")
    with pytest.raises(UsageError, match="damaged: datasets cannot load it"):
        sources([tmp_path / "one"])
