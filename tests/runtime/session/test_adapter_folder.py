"""Adapter folders: not PEFT's, with the umask's permissions and a card; older ones load; disks that refuse."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
from peft import PeftConfig
from sessions import EXPERTS, open_small, small_plan, small_trainer

from meft.planner.base.errors import MachineError, UsageError
from meft.runtime.session.checkpoint import (
    adapter_bytes,
    checkpoint_bytes,
    latest_checkpoint,
    list_checkpoints,
    load_adapter,
    save_adapter,
)
from meft.runtime.use.adapter_model import AdapterModel

NEW_NAMES = {"meft_adapter.safetensors", "meft_config.json", "README.md"}


@pytest.fixture
def session(glass_folder):
    return open_small(glass_folder, small_plan(glass_folder))


@pytest.fixture
def adapter(session, tmp_path) -> Path:
    save_adapter(session, tmp_path / "adapter", meft_version="0.0.0")
    return tmp_path / "adapter"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_peft_finds_nothing_of_its_own(adapter) -> None:
    assert names(adapter) == NEW_NAMES
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftConfig.from_pretrained(str(adapter))


@pytest.mark.parametrize(("umask", "files", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_permissions_follow_the_umask(session, tmp_path, umask, files, folder) -> None:
    before = os.umask(umask)
    try:
        save_adapter(session, tmp_path / "adapter", meft_version="0.0.0")
    finally:
        os.umask(before)
    assert mode(tmp_path / "adapter") == folder
    assert {path.name: mode(path) for path in (tmp_path / "adapter").iterdir()} == dict.fromkeys(NEW_NAMES, files)


def test_the_card_says_how_to_load_it_and_that_works(adapter, glass_folder) -> None:
    card = (adapter / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: meft\nbase_model: "glass"\n')
    line = next(line for line in card.splitlines() if "from_pretrained" in line).strip()
    said = line.replace("FOLDER-OF-THE-BASE-MODEL", str(glass_folder)).replace("THIS-FOLDER", str(adapter))
    names_in_card: dict[str, object] = {}
    exec(f"import meft\n{said}", names_in_card)
    assert isinstance(names_in_card["model"], AdapterModel)
    assert "\n    import meft\n" in card
    assert f"{4 * 128 * 2 * 128:,} parameters" in card


def test_folders_of_older_versions_load(session, adapter, glass_folder) -> None:
    (adapter / "meft_adapter.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "meft_config.json").rename(adapter / "adapter_config.json")
    (adapter / "README.md").unlink()
    load_adapter(session, adapter)
    assert AdapterModel.from_pretrained(glass_folder, adapter) is not None


def test_what_is_no_adapter_is_said(session, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"holds no adapter \(no meft_config\.json\)"):
        load_adapter(session, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises(UsageError, match=r"an adapter of PEFT \(LORA\)"):
        load_adapter(session, tmp_path)


def test_saving_beside_other_files_leaves_them(session, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("my own words")
    save_adapter(session, tmp_path, meft_version="0.0.0")
    save_adapter(session, tmp_path, meft_version="0.0.0")
    assert names(tmp_path) == NEW_NAMES | {"notes.txt"}
    assert (tmp_path / "README.md").read_text() == "my own words"
    load_adapter(session, tmp_path)


@pytest.mark.parametrize("choice", [{}, EXPERTS, {"hot_rows": 16}], ids=["exact", "experts", "hot"])
def test_sizes_from_the_plan_are_those_on_disk(glass_folder, tmp_path, choice) -> None:
    """Never less, and no more than some text more."""
    plan = small_plan(glass_folder, choice=choice)
    session = open_small(glass_folder, plan)
    small_trainer(session, steps=3, output=tmp_path).run()
    save_adapter(session, tmp_path / "adapter", meft_version="0.0.0")
    for expected, folder in (
        (adapter_bytes(plan), tmp_path / "adapter"),
        (checkpoint_bytes(plan, steps=3), latest_checkpoint(tmp_path)),
    ):
        assert size(folder) <= expected <= size(folder) + 96 * 1024


@pytest.mark.parametrize("what", ["link", "file"])
def test_a_link_or_a_file_in_the_place_of_an_adapter_is_one_line(session, tmp_path, what) -> None:
    place, elsewhere = tmp_path / "adapter", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    if what == "link":
        place.symlink_to(elsewhere)
    else:
        place.write_text("mine")
    with pytest.raises(MachineError, match=f"{place}: cannot be written .*in the place of a folder"):
        save_adapter(session, place, meft_version="0.0.0")
    assert names(elsewhere) == {"mine"}
    assert place.is_symlink() or place.read_text() == "mine"


def failing(number: int, after: int):
    """An os.fsync that fails from the so-manieth call on."""
    calls, real = [0], os.fsync

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    return fsync


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("after", range(4))
def test_a_disk_that_refuses_leaves_the_adapter_that_was_there(session, adapter, monkeypatch, number, after) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(number, after))
        with pytest.raises(MachineError, match=f"{adapter}: cannot be written \\({os.strerror(number)}\\)") as caught:
            save_adapter(session, adapter, meft_version="0.0.1")
    assert caught.value.exit_code == 4
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert names(adapter.parent) == {"adapter"}


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_and_says_so(glass_folder, tmp_path, monkeypatch) -> None:
    """safetensors has an exception of its own for it."""
    from safetensors import SafetensorError

    plan = small_plan(glass_folder)
    trainer = small_trainer(open_small(glass_folder, plan), steps=4, output=tmp_path, save_every=1)

    def full(*_args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def on_step(progress) -> None:
        if progress.step == 3:
            monkeypatch.setattr("meft.runtime.session.tensor_files.save_file", full)

    trainer.on_step = on_step
    last = tmp_path / "checkpoint-00000002"
    said = (
        f"{tmp_path / 'checkpoint-00000003'}: cannot be written .No space left on device.; the last checkpoint, {last}"
    )
    with pytest.raises(MachineError, match=said):
        trainer.run()
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [last]
    assert names(tmp_path) == {last.name}
    small_trainer(open_small(glass_folder, plan), steps=4, output=tmp_path).resume(last)


def test_a_copied_checkpoint_is_an_adapter(session, glass_folder, tmp_path) -> None:
    small_trainer(session, steps=1, output=tmp_path).run()
    shutil.copytree(latest_checkpoint(tmp_path), tmp_path / "copy")
    load_adapter(session, tmp_path / "copy")
