"""What README, CONTRIBUTING and docs/ show: blocks run, transcripts are what is printed, options and links exist."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from places import ROOT

MOST_README_LINES = 130
MOST_FIRST_SCREEN_LINES = 25
SHOWN_ONLY = {"json", "text", "mermaid"}
NOT_OURS = ("make", "torchrun", "pip", "python", ".venv/bin/python", "pre-commit")


def _documents() -> ModuleType:
    """The script, as a module that a forked process finds by its name too."""
    if "documents" not in sys.modules:
        sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module("documents")


documents = _documents()
DOCUMENTS: list[Path] = documents.documents()
DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def inline(document: Path) -> list[Token]:
    """The parts of the document's running text and tables: text, code, links, pictures."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text_of(document))
    return [child for token in tokens for child in token.children or ()]


# --- what is shown, run ----------------------------------------------------------------------------------------------


@DOCUMENT
def test_commands_and_python_run_and_print_what_is_shown(document, glass_folder, tmp_path) -> None:
    stage = documents.Stage(tmp_path, glass_folder)
    for block in documents.blocks(text_of(document)):
        for ran in stage.run(block):
            compared = ran.command.shown is not None and not block.note("output differs")
            if compared and not documents.agrees(ran.command.shown, ran.output):
                place = f"{document.name}, line {block.first_line}: {shlex.join(ran.command.words)}"
                pytest.fail(f"{place} prints this (python scripts/documents.py writes it anew):\n{ran.output}")


@DOCUMENT
def test_every_block_says_what_it_is(document) -> None:
    """So that no block of commands is left out because it is called something else."""
    for block in documents.blocks(text_of(document)):
        assert block.language in SHOWN_ONLY | {"sh", "console", "python"}, block.text
    indented = [token for token in MarkdownIt().parse(text_of(document)) if token.type == "code_block"]
    assert [token.content for token in indented if re.search(r"^\s*(\$|meft-|make|pip) ", token.content)] == []


@DOCUMENT
def test_every_option_of_our_commands_exists(document) -> None:
    for block in documents.blocks(text_of(document)):
        for command in block.commands:
            program = command.words[0]
            assert program in (*documents.MODULES, *NOT_OURS), command.words
            if program in documents.MODULES:
                assert documents.unknown_options(command.words) == [], command.words


@DOCUMENT
def test_every_option_in_the_text_exists(document) -> None:
    """Within a span of code: of the command that the span names, else of any."""
    for span in (child.content for child in inline(document) if child.type == "code_inline"):
        program, *words = span.split()
        if program in documents.MODULES:
            assert documents.unknown_options([program, *words]) == [], span
        elif program not in NOT_OURS:
            assert set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span)) <= documents.all_options(), span


@DOCUMENT
def test_what_is_not_run_exists(document) -> None:
    """Targets of make, extras of pip, files that Python or pytest is given."""
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE))
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for block in documents.blocks(text_of(document)):
        for command in block.commands:
            program, *words = command.words
            if program == "make":
                assert {word for word in words if re.fullmatch("[a-z-]+", word)} <= targets
            if program == "pip":
                assert set(re.findall(r"\[(\w+)\]", " ".join(words))) <= set(extras)
            named = [word for each in words for word in re.sub("^[A-Z_]+=", "", each).split()]
            paths = [word for word in named if re.match(r"(tests|scripts|benchmarks)/", word)]
            assert [path for path in paths if not (ROOT / path).exists()] == []


# --- links -----------------------------------------------------------------------------------------------------------


def links(document: Path) -> list[str]:
    found = [child.attrs.get("href") or child.attrs.get("src") for child in inline(document)]
    return [str(link) for link in found if link]


def anchors(document: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", text_of(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@DOCUMENT
def test_every_link_leads_somewhere(document) -> None:
    for link in links(document):
        if re.match("https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@DOCUMENT
def test_a_function_that_a_link_names_is_in_its_file(document) -> None:
    for name, path in re.findall(r"\[`([A-Za-z_][\w.]*)`\]\(([^)]+\.py)\)", text_of(document)):
        last = name.removesuffix(".py").rpartition(".")[2]
        code = text_of((document.parent / path).resolve())
        defined = re.search(rf"^ *(def {last}\(|class {last}\b|{last}\b.* = )", code, flags=re.MULTILINE)
        assert defined or last in Path(path).with_suffix("").parts, f"{name} in {path}"


def test_what_contributors_are_told_to_touch_is_there() -> None:
    """Names beside a file in the tables of CONTRIBUTING.md are in a file that the row links."""
    rows = [line for line in text_of(ROOT / "CONTRIBUTING.md").splitlines() if line.startswith("| ")]
    seen = []
    for row in rows:
        files = [ROOT / path for path in re.findall(r"\]\(([\w/]+\.py)\)", row)]
        for name in re.findall(r"(?<!\[)`([A-Za-z]\w*_\w*|_\w+|[A-Z]{3,})`(?!\])", row):
            assert any(re.search(rf"\b{name}\b", text_of(file)) for file in files), f"{name}: {row}"
            seen.append(name)
    assert {"_READERS", "USUAL_SIZES", "_BECAUSE"} <= set(seen)


def test_readme_leads_to_every_document_and_notebook() -> None:
    there = {link.partition("#")[0] for link in links(ROOT / "README.md")}
    wanted = [path for path in (*DOCUMENTS, *(ROOT / "notebooks").glob("*.ipynb")) if path.name != "README.md"]
    assert {path.relative_to(ROOT).as_posix() for path in wanted} - there == set()


# --- README ----------------------------------------------------------------------------------------------------------


def test_readme_is_short_and_shows_one_plan() -> None:
    readme = text_of(ROOT / "README.md")
    assert len(readme.splitlines()) <= MOST_README_LINES
    (transcript,) = [block for block in documents.blocks(readme) if block.language == "console"]
    assert len(transcript.commands[0].shown.splitlines()) in range(10, MOST_FIRST_SCREEN_LINES + 2)  # and "wrote ..."
    limits = readme.partition("## Limits\n")[2].partition("\n## ")[0]
    assert len(re.findall("^- ", limits, flags=re.MULTILINE)) == 5


# --- architecture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["planner", "runtime"])
def test_the_picture_of_the_rooms_is_in_their_order(package) -> None:
    rooms = runpy.run_path(str(ROOT / "tests" / "repository" / "test_rooms.py"))["ROOMS"][package]
    text = text_of(ROOT / "docs" / "architecture.md")
    section = text.partition(f"## The rooms of {package}/\n")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| \[`(\w+)`\]", section, flags=re.MULTILINE)) == rooms
    drawn = text.partition(f'subgraph {package}["')[2].partition("direction LR\n")[2].partition("\n    end")[0]
    steps = [re.sub(r"\w+\[(\w+)\]", r"\1", step) for step in re.split(r"\s*-->\s*|\s+", drawn) if step]
    assert tuple(dict.fromkeys(steps)) == rooms


# --- pre-commit ------------------------------------------------------------------------------------------------------


def test_the_hooks_check_what_ci_checks() -> None:
    hooks = yaml.safe_load(text_of(ROOT / ".pre-commit-config.yaml"))["repos"][0]["hooks"]
    entries = " ; ".join(hook["entry"] for hook in hooks)
    assert re.findall("^make .*$", text_of(ROOT / ".ci" / "run"), flags=re.MULTILINE) == ["make test", "make lint"]
    assert "make test" in entries
    recipe = text_of(ROOT / "Makefile").partition("\nlint:")[2].partition("\n\n")[0]
    checks = re.findall(r"\$\(RUN\) -m (.+)$", recipe, flags=re.MULTILINE)
    assert len(checks) == 4
    for check in checks:
        assert re.sub(r" (--check )?\.$", "", check) in entries


# --- the script ------------------------------------------------------------------------------------------------------


def test_a_transcript_agrees_line_by_line() -> None:
    agrees = documents.agrees
    assert agrees("one\ntwo", "one  \ntwo\n")
    assert not agrees("one\ntwo", "one\n2\n")
    assert not agrees("one", "one\ntwo\n")
    assert agrees("one\n...\nthree", "one\ntwo\n2\nthree\n")
    assert agrees("one\n...", "one\n")
    assert not agrees("one\n...\nfour", "one\ntwo\n")


def test_commands_are_read_with_their_output_and_continuations() -> None:
    (block,) = documents.blocks("<!-- exit: 3 -->\n```console\n$ meft-plan --a \\\n    b\nout\n$ meft-run x\n```\n")
    assert block.note("exit") == "3"
    assert [(each.words, each.shown) for each in block.commands] == [
        (("meft-plan", "--a", "b"), "out"),
        (("meft-run", "x"), ""),
    ]
    (plain,) = documents.blocks("```sh\nmeft-plan --a \\\n    b   # why\n# nothing\n```\n")
    assert [each.words for each in plain.commands] == [("meft-plan", "--a", "b")]


def test_a_misspelt_note_is_refused() -> None:
    with pytest.raises(ValueError, match="no such note"):
        documents.blocks("<!-- notrun: reason -->\n```sh\nmake x\n```\n")


def test_a_stale_transcript_is_written_anew_and_the_rest_stays(glass_folder, tmp_path) -> None:
    text = "A\n\n```console\n$ meft-plan --version\nmeft-plan, version 0\n```\n\nB\n```sh\nmeft-plan --version\n```\n"
    new = documents.refreshed(text, documents.Stage(tmp_path, glass_folder))
    printed = re.search(r"\$ meft-plan --version\n(.+)\n```", new)[1]
    assert re.fullmatch(r"meft-plan, version \d.*", printed)
    assert new.replace(printed, "meft-plan, version 0") == text


def test_a_command_that_ends_otherwise_is_found(glass_folder, tmp_path) -> None:
    stage = documents.Stage(tmp_path, glass_folder)
    (block,) = documents.blocks("```sh\nmeft-plan --gpu-mem 1KB\n```\n")
    with pytest.raises(AssertionError, match=r"ended with [23], not 0"):
        stage.run(block)
    assert documents.unknown_options(("meft-run", "plan.json", "--lr", "1", "--steps", "2")) == ["--lr"]
    assert documents.unknown_options(("meft-plan", "audit", "a", "b", "--tolerance=0.1", "-v")) == []
