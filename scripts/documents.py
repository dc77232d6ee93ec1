"""What the documents show, run: commands and Python of README.md, CONTRIBUTING.md and docs/, in order.

    python scripts/documents.py [DOCUMENT ...]     # write into the transcripts what the commands print now

A block says by its language what it is: ``sh`` are commands, ``console`` commands after ``$`` and what they print (a
line ``...`` stands for any lines), ``python`` one program from the first such block of a document to the last. Others
are only shown. All of a document runs in one empty folder, in which the documents' placeholders are real: ``DIR`` holds
a tiny model, ``FILE.jsonl`` some lines to train on. Notes before a block, which readers do not see:

- ``<!-- first: COMMAND -->`` runs before the block
- ``<!-- with: OPTIONS -->`` are added to the block's commands, to make them small
- ``<!-- not run: REASON -->``; its options are checked all the same
- ``<!-- output differs: REASON -->`` where a transcript cannot be repeated
- ``<!-- exit: CODE -->`` of the block's last command
- ``<!-- file: NAME -->`` puts the block's text there

``tests/repository/test_docs.py`` does the same and compares.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
MODULES = {
    "meft-plan": "meft.planner.cli.main",
    "meft-run": "meft.runtime.cli.run",
    "meft-profile": "meft.runtime.cli.profile",
}
"""The commands, and the modules with their ``main`` and click ``command``."""
DEFAULTS = {"meft-plan": "plan", "meft-run": "train"}
"""What they do when no command is named."""
WARM = ("meft-run", "meft-profile")
"""Commands that take seconds to import torch: their processes are forked from one that has."""
PRELOADED = [
    *(MODULES[program] for program in WARM),
    "meft.runtime.training.runner",
    "meft.runtime.host.kernels",
    "transformers.models.llama.modeling_llama",
]
ANY_LINES = "..."
_NOTES = ("first", "with", "not run", "output differs", "exit", "file")
_NOTE = re.compile(r"<!--\s*([a-z ]+):\s*(.*?)\s*-->", re.DOTALL)
_WORDS = ("alice", "rabbit", "queen", "hatter", "dormouse", "duchess")


@dataclass(frozen=True)
class Command:
    """One command of a block, and what is shown of its output (None in a block that shows none)."""

    words: tuple[str, ...]
    shown: str | None = None


@dataclass(frozen=True)
class Block:
    """One fenced block; ``first_line`` and ``end_line`` are those of its text in the document, from 0."""

    language: str
    text: str
    first_line: int
    end_line: int
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def note(self, name: str) -> str | None:
        """The last note of that name."""
        return self.notes[name][-1] if name in self.notes else None

    @property
    def commands(self) -> list[Command]:
        """Its commands, one for each line that does not end in a backslash."""
        if self.language == "sh":
            return [Command(words) for line in _joined(self.text) if (words := _split(line))]
        return list(_transcript(self.text)) if self.language == "console" else []


def documents() -> list[Path]:
    """Every document that readers are sent to."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a document. Raises :class:`ValueError` for a comment that is no note."""
    found: list[Block] = []
    notes: dict[str, list[str]] = {}
    for token in MarkdownIt().parse(text):
        if token.type == "html_block":
            for name, value in _NOTE.findall(token.content):
                if name not in _NOTES:
                    raise ValueError(f"<!-- {name}: ... -->: no such note; there are {', '.join(_NOTES)}")
                notes.setdefault(name, []).append(value)
        elif token.type == "fence" and token.map is not None:
            first, end = token.map
            found.append(Block(token.info.strip(), token.content, first + 1, end - 1, notes))
            notes = {}
    return found


def _joined(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def _split(line: str) -> tuple[str, ...]:
    return tuple(shlex.split(line, comments=True))


def _transcript(text: str) -> Iterator[Command]:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        taken = next(number for number, line in enumerate(lines, 1) if not line.endswith("\\"))
        (line,) = _joined("\n".join(lines[:taken]))
        yield Command(_split(line), "\n".join(lines[taken:]))


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A command that ran, and its output: standard output and error as a terminal shows them."""

    command: Command
    output: str


class Stage:
    """A folder in which one document's blocks run, one after the other."""

    def __init__(self, folder: Path, model: Path) -> None:
        """Put the placeholders into ``folder``; ``model`` is what ``DIR`` shall be."""
        self.folder = folder
        self._names: dict[str, Any] = {"__name__": "__main__"}
        (folder / "DIR").symlink_to(model, target_is_directory=True)
        lines = [{"prompt": f"The {one} said to", "completion": f" the {other}"} for one in _WORDS for other in _WORDS]
        (folder / "FILE.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def run(self, block: Block) -> list[Ran]:
        """Do what a block says; raises :class:`AssertionError` where a command ends otherwise than it should."""
        for line in block.notes.get("first", ()):
            self._command(_split(line), expect=0)
        if block.note("file"):
            (self.folder / str(block.note("file"))).write_text(block.text, encoding="utf-8")
        if block.note("not run"):
            return []
        if block.language == "python":
            self._python(block)
        more, ran = _split(block.note("with") or ""), []
        ours = [command for command in block.commands if command.words[0] in MODULES]
        for command in ours:
            expect = int(block.note("exit") or 0) if command is ours[-1] else 0
            ran.append(Ran(command, self._command((*command.words, *more), expect=expect)))
        return ran

    def _command(self, words: Sequence[str], *, expect: int) -> str:
        code, output = (_warm if words[0] in WARM else _cold)(words, self.folder)
        assert code == expect, f"{shlex.join(words)} ended with {code}, not {expect}:\n{output}"
        return output

    def _python(self, block: Block) -> None:
        """At its lines of the document, so that a traceback points there; our commands are on the path."""
        code = compile("\n" * block.first_line + block.text, "<python of the document>", "exec")
        path = os.environ.get("PATH", os.defpath)
        os.environ["PATH"] = os.pathsep.join((str(BIN), path))
        try:
            with contextlib.chdir(self.folder), contextlib.redirect_stdout(io.StringIO()):
                exec(code, self._names)
        finally:
            os.environ["PATH"] = path


def _cold(words: Sequence[str], folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [BIN / words[0], *words[1:]],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "COLUMNS"},
    )
    return done.returncode, done.stdout


def _warm(words: Sequence[str], folder: Path) -> tuple[int, str]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as output:
        process = context.Process(target=_forked, args=(tuple(words), str(folder), output.name))
        process.start()
        process.join()
        return process.exitcode or 0, output.read()


def _forked(words: tuple[str, ...], folder: str, output: str) -> None:
    """What the installed command does, in this process."""
    os.chdir(folder)
    os.environ.pop("COLUMNS", None)
    written = os.open(output, os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.argv = list(words)
    import_module(MODULES[words[0]]).main()


# --- comparing -------------------------------------------------------------------------------------------------------


def agrees(shown: str, printed: str) -> bool:
    """Whether a transcript shows what was printed, trailing spaces and a line ``...`` for any lines apart."""
    lines = (re.escape(line.rstrip()) + "\n" for line in shown.strip("\n").splitlines())
    pattern = "".join(r"(?:.*\n)*?" if line == re.escape(ANY_LINES) + "\n" else line for line in lines)
    text = "".join(line.rstrip() + "\n" for line in printed.strip("\n").splitlines())
    return re.fullmatch(pattern, text) is not None


def unknown_options(words: Sequence[str]) -> list[str]:
    """Options of one of our commands that it does not have."""
    command: click.Command = import_module(MODULES[words[0]]).command
    rest = list(words[1:])
    known = {"--help", "-h", "--version"}
    if isinstance(command, click.Group):
        context = click.Context(command)
        named = rest.pop(0) if rest and rest[0] in command.list_commands(context) else DEFAULTS.get(words[0], "")
        command = command.get_command(context, named) or command
    known |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in rest if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]


def all_options() -> set[str]:
    """Options of all our commands."""
    groups: list[click.Group] = [import_module(module).command for module in MODULES.values()]
    commands: list[click.Command] = [*groups]
    for group in groups:
        context = click.Context(group)
        named = (group.get_command(context, name) for name in group.list_commands(context))
        commands += [each for each in named if each is not None]
    found = {option for each in commands for parameter in each.params for option in parameter.opts}
    found |= {option for each in commands for parameter in each.params for option in parameter.secondary_opts}
    return found | {"--help"}


# --- writing anew ----------------------------------------------------------------------------------------------------


def refreshed(text: str, stage: Stage) -> str:
    """The document with what its commands print now. A block with ``...`` that no longer agrees is shown whole."""
    lines = text.splitlines(keepends=True)
    replaced: list[tuple[Block, str]] = []
    for block in blocks(text):
        ran = stage.run(block)
        compared = block.language == "console" and ran and not block.note("output differs")
        if compared and not all(agrees(each.command.shown or "", each.output) for each in ran):
            replaced.append((block, _written(block, ran)))
    for block, new in reversed(replaced):
        lines[block.first_line : block.end_line] = [new]
    return "".join(lines)


def _written(block: Block, ran: Sequence[Ran]) -> str:
    """The commands as they stand in the block, each with its output."""
    parts = re.split(r"^(?=\$ )", block.text, flags=re.MULTILINE)[1:]
    new = []
    for part, each in zip(parts, ran, strict=True):
        lines = part.splitlines()
        taken = next(number for number, line in enumerate(lines, 1) if not line.endswith("\\"))
        new.append("\n".join([*lines[:taken], each.output.strip("\n")]) + "\n")
    return "".join(new)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("paths", metavar="[DOCUMENT]...", nargs=-1, type=click.Path(exists=True, path_type=Path))
def main(paths: tuple[Path, ...]) -> None:
    """Run what documents show (all of them by default), and write what is printed now into their transcripts."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        runpy.run_path(str(ROOT / "tests" / "helpers" / "glass.py"))["save_glass"](model)
        for path in paths or documents():
            place = Path(folder) / path.stem
            place.mkdir()
            old = path.read_text(encoding="utf-8")
            new = refreshed(old, Stage(place, model))
            path.write_text(new, encoding="utf-8")
            click.echo(f"{path.name}: {'as it was' if new == old else 'transcripts written anew'}")


if __name__ == "__main__":
    main()
