"""What ``docs/security.md`` promises: that its tests are there, and what the whole source must keep to."""

from __future__ import annotations

import ast
import re
import stat
from pathlib import Path

import pytest
from places import ROOT

from meft.planner.base import files

READERS = {"from_pretrained", "from_config"}
LOADERS = {"AutoModelForCausalLM", "AutoTokenizer", "AutoConfig", "AutoModel", "AutoProcessor"}


def calls(tree: ast.AST) -> list[ast.Call]:
    """Calls of transformers' automatic classes that read a folder or build what a config asks for."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in READERS
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in LOADERS
    ]


def distrustful(call: ast.Call) -> bool:
    """``trust_remote_code=False`` by itself, or among options that are spread and hold it."""
    given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    spread = {keyword.value.id for keyword in call.keywords if not keyword.arg and isinstance(keyword.value, ast.Name)}
    said = given.get("trust_remote_code")
    return (isinstance(said, ast.Constant) and said.value is False) or bool(spread & {"SAFE", "safe"})


def test_every_call_that_reads_a_folder_refuses_its_code() -> None:
    found = [
        (path, call)
        for folder in ("planner", "runtime", "scripts", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for call in calls(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert len(found) >= 6
    assert [f"{path.relative_to(ROOT)}:{call.lineno}" for path, call in found if not distrustful(call)] == []


def test_the_options_that_are_spread_say_so() -> None:
    from meft.runtime.session.model_folder import SAFE

    assert SAFE == {"local_files_only": True, "trust_remote_code": False}
    assert not distrustful(calls(ast.parse("AutoTokenizer.from_pretrained(x, local_files_only=True)"))[0])
    assert not distrustful(calls(ast.parse("AutoTokenizer.from_pretrained(x, trust_remote_code=True)"))[0])


def test_every_test_that_the_document_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8")))
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 12
    assert {name for name in named if f"def {name}(" not in text} == set()


def test_what_is_being_written_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from meft.runtime.session import checkpoint

    seen = []

    def watched(path: Path) -> None:
        seen.append(stat.S_IMODE(path.stat().st_mode))

    monkeypatch.setattr(files.os, "fsync", lambda _: [watched(path) for path in tmp_path.glob(".plan.json.*")])
    files.write_atomic(tmp_path / "plan.json", "{}")
    checkpoint._in_place_of(tmp_path / "adapter", watched)
    assert seen
    assert not any(mode & 0o077 for mode in seen)
