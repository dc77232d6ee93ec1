"""``import meft``: what it loads, what it shows, and that it is there however the project is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

import meft

PACKAGES = ("meft", "planner", "runtime", "profiles")
HEAVY = {"torch", "transformers", "numba", "scipy", "matplotlib"}


def python(*arguments: str, folder: Path, path: str | None = None) -> str:
    """What Python prints, started in ``folder``, with ``path`` as PYTHONPATH (as it is unless given)."""
    environment = os.environ if path is None else os.environ | {"PYTHONPATH": path}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(code: str, folder: Path) -> set[str]:
    printed = python(
        "-c", f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})", folder=folder
    )
    return set(printed.split())


# --- lazily ---------------------------------------------------------------------------------------------------------


def test_importing_it_loads_nothing_else(tmp_path: Path) -> None:
    new = loaded_after("import meft", tmp_path) - loaded_after("import os, typing, __future__", tmp_path)
    assert new <= {"meft"} | set(sys.stdlib_module_names)
    assert not new & {"torch", "numpy", "pydantic", "click"}


def test_a_plan_loads_no_torch_and_no_command_line(tmp_path: Path) -> None:
    loaded = loaded_after('import meft\nmeft.plan(gpu_mem="24GB", host_mem="64GB")._repr_html_()', tmp_path)
    assert "pydantic" in loaded
    assert not loaded & (HEAVY | {"click", "rich"})


def test_what_it_offers_is_listed_and_there(tmp_path: Path) -> None:
    assert set(meft.__all__) <= set(dir(meft))
    assert set(meft._HOME) | {"__version__"} == set(meft.__all__)
    for name in meft._HOME:
        assert getattr(meft, name).__name__ == name
    assert meft.__version__ == python("-c", "import meft; print(meft.__version__)", folder=tmp_path).strip()
    with pytest.raises(AttributeError, match="module 'meft' has no attribute 'plam'; it has AdapterModel"):
        meft.plam  # type: ignore[attr-defined]  # noqa: B018


def test_what_trains_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    code = (
        "import meft\nmeft.plan\n"
        "try:\n    meft.AdapterModel\nexcept ModuleNotFoundError as error:\n    print(error, error.name, sep='|')"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    said = python("-c", code, folder=tmp_path, path=path)
    assert said.strip() == "meft.AdapterModel needs torch, which is not installed: pip install 'meft[run]'|torch"


# --- installed ------------------------------------------------------------------------------------------------------

WHERE = (
    "import meft, meft.planner as planner, meft.runtime as runtime, meft.profiles as profiles\n"
    "print(*(module.__file__ for module in (meft, planner, runtime, profiles)))"
)
PLANS = 'import meft; print(meft.plan(gpu_mem="24GB", host_mem="64GB").decision.top_k)'


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is installed, copied to a folder of its own: building writes beside it."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def installed(checkout: Path, target: Path, *how: str) -> Path:
    """The folder with the project installed from ``checkout`` alone, by this interpreter's own setuptools."""
    pytest.importorskip("setuptools")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, *how]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(checkout, tmp_path_factory.mktemp("wheel"), ".")


@pytest.fixture(scope="module")
def editable(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(checkout, tmp_path_factory.mktemp("editable"), "-e", ".")


def test_a_wheel_holds_the_door_beside_its_packages(wheel: Path) -> None:
    assert {path.name for path in (wheel / "meft").iterdir()} - {"__pycache__"} == {
        *("__init__.py", "run.py", "py.typed", "planner", "runtime", "profiles")
    }


def origins(code: str, *, below: Path, **how: Any) -> list[str]:
    """Which files ``WHERE`` prints after ``code``, named from a folder that must hold them."""
    printed = python(*how.pop("options", ()), "-c", code + WHERE, **how)
    return [Path(path).relative_to(below).as_posix() for path in printed.split()]


def test_a_wheel_plans_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"folder": tmp_path, "path": str(wheel)}
    names = ["meft/__init__.py", *(f"meft/{name}/__init__.py" for name in PACKAGES[1:])]
    assert origins("", below=wheel, **how) == names
    assert python("-c", PLANS, **how).strip() == "64"
    assert "--gpu-mem" in python("-m", "meft.planner.cli", "--help", **how)
    for program in ("meft-plan", "meft-run", "meft-profile"):
        assert "--help" in python(str(wheel / "bin" / program), "--help", **how)
    python(str(wheel / "bin" / "meft-plan"), "--gpu-mem", "24GB", "--host-mem", "64GB", **how)
    assert (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("in_checkout", [False, True])
def test_an_editable_installation_plans_from_anywhere_and_from_its_checkout(
    editable: Path, checkout: Path, tmp_path: Path, in_checkout: bool
) -> None:
    """The finder is this installation's; of the site-packages of this interpreter, which may have one for another
    checkout, only the libraries are there."""
    libraries = [path for path in sys.path if Path(path).name == "site-packages"]
    how: dict[str, Any] = {"folder": checkout if in_checkout else tmp_path, "path": ""}
    code = f"import site, sys; site.addsitedir({str(editable)!r}); sys.path += {libraries!r}\n"
    names = [f"{package}/__init__.py" for package in PACKAGES]
    assert origins(code, below=checkout, options=["-S"], **how) == names
    assert python("-S", "-c", code + PLANS, **how).strip() == "64"


def test_a_checkout_is_used_whole_where_something_else_is_installed(wheel: Path, checkout: Path) -> None:
    """Started at the top of a checkout, Python takes ``meft`` from there: its packages must come from there too."""
    how: dict[str, Any] = {"folder": checkout, "path": str(wheel)}
    assert origins("", below=checkout, **how) == [f"{package}/__init__.py" for package in PACKAGES]
    assert "--gpu-mem" in python("-m", "meft.planner.cli", "--help", **how)
