"""What gets installed: the pins, when they apply, and that pyproject.toml and constraints.txt agree."""

from __future__ import annotations

import re
import runpy
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from places import ROOT

PINNED = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "constraints_for.py"))


@pytest.fixture(scope="module")
def constraints(script: dict[str, Any]) -> Callable[..., list[str]]:
    found: Callable[..., list[str]] = script["constraints"]
    return found


LINES = ["# why", "", "Torch==2.13.0", "typing_extensions==4.16.0", "numpy==2.4.6 "]


def test_a_new_environment_gets_every_pin(constraints: Callable[..., list[str]]) -> None:
    assert constraints(LINES, {}) == ["Torch==2.13.0", "typing_extensions==4.16.0", "numpy==2.4.6"]


def test_an_environment_with_a_cuda_torch_keeps_it_and_what_else_it_has(
    constraints: Callable[..., list[str]],
) -> None:
    installed = {"torch": "2.6.0+cu124", "typing-extensions": "4.12.2"}
    assert constraints(LINES, installed) == ["numpy==2.4.6", "torch==2.6.0+cu124"]


def test_an_environment_without_torch_gets_the_tested_one(constraints: Callable[..., list[str]]) -> None:
    assert constraints(LINES, {"numpy": "1.26.4"}) == ["Torch==2.13.0", "typing_extensions==4.16.0"]


def test_the_oldest_torch_is_read_from_the_project_file_and_compared_by_number(script: dict[str, Any]) -> None:
    assert script["oldest_torch"]((ROOT / "pyproject.toml").read_text()) == "2.4"
    release = script["release"]
    assert release("2.3.1+cu118") < release("2.4") <= release("2.4.0") < release("2.10.0+cpu")


def test_installed_names_are_normalized(script: dict[str, Any]) -> None:
    installed = script["installed_versions"]()
    assert "typing-extensions" in installed
    assert "torch" in installed


def test_every_declared_dependency_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(text) for group in groups for text in group if not text.startswith("meft")]
    pins = {Requirement(line).name.lower(): Version(line.split("==")[1]) for line in PINNED}
    assert len(requirements) > 20
    outside = [one for one in requirements if pins.get(one.name.lower(), Version("0")) not in one.specifier]
    assert outside == []


def test_pins_are_exact_and_of_no_particular_build() -> None:
    """A local version such as +cpu would exclude every other build of torch."""
    assert [line for line in PINNED if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []
    assert "torch==2.13.0" in PINNED
