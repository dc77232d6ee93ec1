"""Where models and kernels are kept: private to the user, never in the current folder, temporary if need be."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from places import ROOT

from meft.planner.base import cache
from meft.planner.base.cache import cache_folder, kernel_folder, temporary_cache_folder, writable_cache_folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a folder for temporary files of the test's own."""
    for name in ("MEFT_CACHE", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    cache._writable.cache_clear()
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MEFT_CACHE": "~/models", "XDG_CACHE_HOME": "/xdg"}, "/home/me/models"),
        ({"MEFT_CACHE": "/models"}, "/models"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/meft"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/meft"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/meft"),
        ({}, "/home/me/.cache/meft"),
    ],
)
def test_cache_folder(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEFT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_the_cache_is_made_private_and_stays_so(home: Path) -> None:
    folder = kernel_folder()
    assert folder == home / ".cache" / "meft" / "numba"
    assert [oct(each.stat().st_mode)[-3:] for each in (folder.parent, folder)] == ["700", "700"]
    folder.chmod(0o777)  # as an older version, or a careless hand, left it
    folder.parent.chmod(0o755)
    assert kernel_folder() == folder
    cache._writable.cache_clear()
    assert kernel_folder() == folder
    assert [oct(each.stat().st_mode)[-3:] for each in (folder.parent, folder)] == ["700", "700"]


def test_a_home_that_cannot_be_written_falls_back_with_one_line(home: Path, capsys: pytest.CaptureFixture) -> None:
    (home / ".cache").write_text("a file where the folder should be: nobody can make one, root neither")
    assert writable_cache_folder() == temporary_cache_folder()
    assert writable_cache_folder().stat().st_mode & 0o777 == 0o700
    assert kernel_folder() == temporary_cache_folder() / "numba"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{home}/.cache/meft cannot be written" in said
    assert str(temporary_cache_folder()) in said


def test_the_fallback_is_not_somebody_elses_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".cache").write_text("")
    temporary_cache_folder().mkdir()
    monkeypatch.setattr(cache, "_is_another_user", lambda owner: True)
    chosen = writable_cache_folder()
    assert chosen != temporary_cache_folder()
    assert chosen.stat().st_mode & 0o777 == 0o700


def test_a_chosen_folder_keeps_its_mode_but_others_may_not_write_it(tmp_path: Path, monkeypatch) -> None:
    chosen = tmp_path / "chosen"
    chosen.mkdir(mode=0o755)
    monkeypatch.setenv("MEFT_CACHE", str(chosen))
    assert kernel_folder() == chosen / "numba"
    assert chosen.stat().st_mode & 0o777 == 0o755
    chosen.chmod(0o777)
    cache._writable.cache_clear()
    assert kernel_folder() == temporary_cache_folder() / "numba"


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "NUMBA_CACHE_DIR"])
@pytest.mark.parametrize("value", ["", ".", "here"])
def test_kernels_are_never_loaded_from_the_current_folder(name: str, value: str, home: Path, tmp_path: Path) -> None:
    pytest.importorskip("numba")
    code = "from meft.runtime.host.compiled import cache_folder; print(cache_folder())"
    environment = {**os.environ, name: value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(home / ".cache" / "meft" / "numba"), done.stderr


def test_distclean_removes_what_was_made_and_nothing_else(home: Path) -> None:
    folder = kernel_folder().parent
    for name in ("numba/index", f"{cache.SMOLLM2}/model.safetensors", f".{cache.SMOLLM2}.partial-1/x", "mine/notes"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x" * 2**20)
    (folder / f".{cache.SMOLLM2}.lock").write_text("")
    command = [sys.executable, "-I", "-S", ROOT / "scripts" / "remove_cache.py"]  # without any installed package
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"removed from {folder}" in done.stdout
    assert "3 MiB" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["mine"]
    (folder / "mine" / "notes").unlink()
    (folder / "mine").rmdir()
    subprocess.run(command, capture_output=True, text=True, check=True)
    assert not folder.exists()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""
