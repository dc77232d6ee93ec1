"""cuBLAS workspaces by architecture and torch version."""

from __future__ import annotations

import pytest

from meft.planner.allocator.cublas import Workspace, cublas_workspace
from meft.planner.base.errors import UsageError
from meft.planner.records.profile_catalogue import gpu_names, load_gpu


@pytest.mark.parametrize(
    ("architecture", "version", "num_bytes"),
    [
        ("Turing TU104", "2.0.1", 8_519_680),
        ("Ampere GA102", "2.13.0+cu130", 8_519_680),
        ("sm_80", "2.4.0", 8_519_680),
        ("8.9", "2.13.0", 8_519_680),
        ("Hopper GH100", "2.0.0", 33_554_432),
        ("9.0", "2.13.0", 33_554_432),
        ("sm_90a", "2.6", 33_554_432),
        ("Blackwell GB202", "2.11.0", 8_519_680),
        ("sm_120", "2.12.0", 33_554_432),
        ("10.0", "2.13.0", 33_554_432),
    ],
)
def test_workspace_by_architecture_and_version(architecture: str, version: str, num_bytes: int) -> None:
    assert cublas_workspace(architecture, version) == Workspace(num_bytes, per_operation=False)


def test_after_2_13_a_product_gives_its_workspace_back_unless_they_are_cached() -> None:
    assert cublas_workspace("ada", "2.14.0a0+git123") == Workspace(8_519_680, per_operation=True)
    assert cublas_workspace("hopper", "3.0") == Workspace(33_554_432, per_operation=True)
    assert not cublas_workspace("ada", "2.14.0", cached=True).per_operation


@pytest.mark.parametrize(
    ("architecture", "version", "message"),
    [
        ("Pascal GP104", "2.13", r"unknown GPU architecture 'Pascal GP104'.* Known: ada, ampere"),
        ("sm_61", "2.13", "unknown GPU architecture 'sm_61'"),
        ("", "2.13", "unknown GPU architecture ''"),
        ("hoper", "2.13", "did you mean hopper"),
        ("ada", "1.13.1", "torch version '1.13.1': give 2.0 or newer"),
        ("ada", "latest", "torch version 'latest'"),
    ],
)
def test_what_is_not_in_the_table_is_refused(architecture: str, version: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cublas_workspace(architecture, version)


@pytest.mark.parametrize("name", [name for name in gpu_names() if name != "emulated"])
def test_the_profiles_hold_what_torch_2_13_takes(name: str) -> None:
    card = load_gpu(name)
    assert card.workspace_bytes.value == cublas_workspace(card.architecture, "2.13.0").num_bytes
