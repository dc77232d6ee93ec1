"""The folder that a run writes to: one run at a time, nothing replaced unasked, room for all of it, no leftovers."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from meft.planner.base.errors import MachineError
from meft.runtime.session.checkpoint import checkpoint_bytes, latest_checkpoint
from meft.runtime.training import output


@pytest.fixture(scope="module")
def done(small, tmp_path_factory) -> Path:
    """A finished run of four steps; copy it."""
    folder = tmp_path_factory.mktemp("done") / "out"
    assert small.run(folder, "--steps", 4)[0] == 0
    return folder


@pytest.fixture
def used(done, tmp_path) -> Path:
    return shutil.copytree(done, tmp_path / "out")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- nothing is replaced unasked -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--rehearse",)], ids=["training", "rehearsal"])
def test_a_used_folder_is_refused_and_left_as_it_is(small, used, options) -> None:
    before = content(used)
    code, said = small.run(used, "--steps", 2, *options)
    assert code == 2
    assert said == (
        f"--output-dir {used}: holds adapter, checkpoint-00000004 of an earlier run; go on with --resume, replace it "
        f"with --overwrite, or choose another folder"
    )
    assert content(used) == before


def test_overwrite_replaces_it_and_says_what_goes(small, used) -> None:
    code, said = small.run(used, "--steps", 2, "--overwrite")
    assert code == 0
    assert f"removed {used / 'checkpoint-00000004'} of an earlier run (--overwrite)" in said
    assert names(used) == {"adapter", "checkpoint-00000002", "report.json"}


def test_overwrite_removes_nothing_before_the_run_has_loaded(small, used, monkeypatch) -> None:
    before = content(used)

    def fails(*_args: object, **_options: object) -> None:
        raise MachineError("no such device")

    monkeypatch.setattr("meft.runtime.training.runner.model_loading.load_frozen_model", fails)
    assert small.run(used, "--steps", 2, "--overwrite") == (4, "no such device")
    assert content(used) == before


def test_resume_and_overwrite_contradict_each_other(small, used) -> None:
    code, said = small.run(used, "--resume", "--overwrite")
    assert (code, said.split(";")[-1]) == (2, " give one of them")


# --- what is in the way -----------------------------------------------------------------------------------------------


def test_a_file_in_the_place_of_the_folder(small, tmp_path) -> None:
    (tmp_path / "out").write_text("mine")
    code, said = small.run(tmp_path / "out", "--steps", 2)
    assert code == 4
    assert said == (
        f"{tmp_path / 'out'}: cannot be written (a file is in the place of the folder; choose another --output-dir)"
    )
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", ["adapter", "checkpoint-00000002"])
def test_a_link_in_the_place_of_an_adapter_or_checkpoint(small, tmp_path, name) -> None:
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    (folder / name).symlink_to(elsewhere)
    code, said = small.run(folder, "--steps", 2, "--overwrite")
    assert code == 4
    assert said.startswith(f"{folder / name}: cannot be written (a symbolic link is in the place of a folder")
    assert names(elsewhere) == {"mine"}


def test_a_link_to_the_folder_itself_is_fine(small, tmp_path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert small.run(tmp_path / "out", "--steps", 2)[0] == 0
    assert names(tmp_path / "disk") == {"adapter", "checkpoint-00000002", "report.json"}


def test_a_read_only_folder_is_one_line_before_the_first_step(small, tmp_path, monkeypatch) -> None:
    """As root, permissions stop nobody; the error is the one that a read-only file system gives."""

    def read_only(*_args: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(output.os, "open", read_only)
    code, said = small.run(tmp_path / "out", "--steps", 2)
    monkeypatch.undo()
    assert code == 4
    assert said == f"{tmp_path / 'out' / output.LOCK}: cannot be written (Read-only file system)"


@pytest.mark.parametrize(
    ("free_share", "code", "options"),
    [(0.9, 4, ()), (1.1, 0, ()), (1.1, 4, ("--save-every", 1)), (1.6, 0, ("--save-every", 1))],
)
def test_the_disk_must_have_room_before_the_first_step(small, tmp_path, monkeypatch, free_share, code, options) -> None:
    """One checkpoint and an adapter, a third of it, are needed; two checkpoints where a second one is written."""
    plan = small.plan
    once = output.Writes(steps=4, several_checkpoints=False, resumed=False, keeps_best=False)
    free = int(free_share * output.needed_bytes(plan, once))
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    given, said = small.run(tmp_path / "out", "--steps", 4, *options)
    assert given == code
    if code:
        assert f"--output-dir {tmp_path / 'out'}: the run needs " in said
        assert "are free; make room, or choose a folder on another disk" in said
        assert not (tmp_path / "out").exists()


def test_room_is_counted_from_checkpoints_and_adapters(small) -> None:
    plan = small.plan
    checkpoint, adapter = checkpoint_bytes(plan, steps=4), output.adapter_bytes(plan)

    def needed(**given: bool) -> int:
        plain = {"several_checkpoints": False, "resumed": False, "keeps_best": False}
        return output.needed_bytes(plan, output.Writes(steps=4, **(plain | given)))

    assert needed() == checkpoint + adapter
    assert needed(several_checkpoints=True) == 2 * checkpoint
    assert needed(several_checkpoints=True, resumed=True) == checkpoint
    assert needed(keeps_best=True) == checkpoint + 3 * adapter


# --- one run at a time ------------------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_told_who_holds_it(small, tmp_path) -> None:
    with output.locked(tmp_path, print):
        holder = json.loads((tmp_path / output.LOCK).read_text())
        code, said = small.run(tmp_path, "--steps", 2)
    assert code == 4
    assert holder["pid"] == os.getpid()
    assert said == (
        f"--output-dir {tmp_path}: process {holder['pid']} on {holder['host']}, started {holder['started']}, is "
        f"writing there; wait for it or end it, or choose another folder"
    )
    assert small.run(tmp_path, "--steps", 2)[0] == 0


def test_the_lock_of_a_dead_process_is_no_obstacle(small, tmp_path) -> None:
    dead = os.fork()
    if not dead:
        with output.locked(tmp_path, print):
            os._exit(0)  # as a kill: nothing is cleaned up
    os.waitpid(dead, 0)
    assert json.loads((tmp_path / output.LOCK).read_text())["pid"] == dead
    assert small.run(tmp_path, "--steps", 2)[0] == 0
    assert names(tmp_path) == {"adapter", "checkpoint-00000002", "report.json"}


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch) -> None:
    def no_locks(*_args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(output.fcntl, "flock", no_locks)
    lines: list[str] = []
    with output.locked(tmp_path, lines.append):
        pass
    assert lines == [f"note: {tmp_path} is on a file system without locks: see that no other run writes there"]


# --- leftovers --------------------------------------------------------------------------------------------------------


def test_leftovers_of_killed_saves_go_at_the_next_start(small, used) -> None:
    """Also those of older versions, whose names had other characters; other hidden files stay."""
    for name in (".checkpoint-00000006.0a1b2c3d", ".adapter.old.x_9zabcd", ".adapter.0a1b2c3d"):
        (used / name).mkdir()
        (used / name / "meft_adapter.safetensors").write_text("half")
    (used / ".report.json.0a1b2c3d").write_text("{")
    (used / ".git").mkdir()
    code, said = small.run(used, "--steps", 6, "--resume")
    assert code == 0
    assert "cleared what a killed run left half written: .adapter.0a1b2c3d, .adapter.old.x_9zabcd" in said
    assert names(used) == {"adapter", "checkpoint-00000006", "report.json", ".git"}


def test_older_checkpoints_go_once_the_newest_is_loaded(small, used) -> None:
    """A run killed while it removed them leaves them beside the newest; one that cannot be loaded loses nothing."""
    shutil.copytree(used / "checkpoint-00000004", used / "checkpoint-00000002")
    state = used / "checkpoint-00000004" / "training_state.json"
    whole = state.read_text()
    state.write_text("{")
    assert small.run(used, "--steps", 4, "--resume")[0] == 2
    assert (used / "checkpoint-00000002").exists()
    state.write_text(whole)
    assert "the run is complete" in small.run(used, "--steps", 4, "--resume")[1]
    assert names(used) == {"adapter", "checkpoint-00000004", "report.json"}


@pytest.mark.parametrize("nested", [False, True], ids=["this version", "an older one"])
def test_a_folder_that_was_moved_aside_for_one_that_never_came_goes_back(small, used, nested) -> None:
    checkpoint = latest_checkpoint(used)
    before = content(checkpoint)
    aside = used / f".{checkpoint.name}.old.0a1b2c3d"
    if nested:
        aside.mkdir()
    checkpoint.rename(aside / checkpoint.name if nested else aside)
    with output.locked(used, print):
        assert content(checkpoint) == before
        assert not aside.exists()
