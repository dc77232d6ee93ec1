"""A missing package is named with what installs it."""

from __future__ import annotations

import tomllib

import pytest
from places import ROOT

from meft.planner.base import packages
from meft.planner.base.errors import MachineError, UsageError
from meft.planner.base.packages import INSTALL, missing_package, package_folder, require_packages


@pytest.fixture(autouse=True)
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"peft", "gguf", "accelerate", "bitsandbytes", "flash_attn"}
    monkeypatch.setattr(packages, "is_installed", lambda name: name not in missing)


def test_an_import_that_failed() -> None:
    error = missing_package(ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners"))
    assert isinstance(error, MachineError)
    assert str(error) == "peft is not installed, and this needs it; install: pip install 'meft[run]'"
    assert error.exit_code == 4


def test_what_transformers_says_without_a_name_and_what_an_error_was_raised_from() -> None:
    text = "Using `bitsandbytes` 4-bit quantization requires accelerate: `pip install 'accelerate>=0.26.0'`"
    error = UsageError("--model here: transformers cannot load it")
    error.__cause__ = ImportError(text)
    found = missing_package(error)
    assert str(found) == (
        "bitsandbytes and accelerate are not installed, and this needs them; install: pip install bitsandbytes && "
        "pip install accelerate"
    )


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'torch.future'", name="torch.future"),  # torch is there, but too old
        ModuleNotFoundError("No module named 'nothing'", name="nothing"),
        ImportError("cannot import name 'x' from 'transformers'", name="transformers"),
        UsageError("peft is a word in this text"),
    ],
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert missing_package(error) is None


def test_asking_before() -> None:
    require_packages("torch", "numba")
    with pytest.raises(MachineError, match=r"^nf4 weights: bitsandbytes is missing; install: pip install bits"):
        require_packages("torch", "bitsandbytes", purpose="nf4 weights")
    with pytest.raises(MachineError, match="flash-attn is not installed, and this needs it"):
        require_packages("flash_attn")


def test_a_folder_of_data_without_an_import() -> None:
    assert (package_folder("numba") / "__init__.py").is_file()
    with pytest.raises(MachineError, match="gguf is not installed"):
        package_folder("gguf")


def test_every_package_of_the_extras_has_a_line() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    distributions = {text.split(">")[0].split("=")[0] for name in ("run", "demo", "tasks") for text in extras[name]}
    renamed = {"nvidia-ml-py": "pynvml", "meft[run]": "torch"}
    assert {renamed.get(name, name).replace("-", "_") for name in distributions} <= INSTALL.keys()
