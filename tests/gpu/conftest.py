"""Tests that need CUDA: everywhere else each is skipped with that reason."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    if not mine:
        return
    import torch

    if not torch.cuda.is_available():
        for item in mine:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch sees none"))


@pytest.fixture(autouse=True)
def own_memory() -> Iterator[None]:
    """Each test finds the allocator empty and unlimited: a device's budget is a setting of the process."""
    import torch

    yield
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch._C._cuda_clearCublasWorkspaces()  # a test's streams are gone, their workspaces of many MiB are not
    torch.cuda.empty_cache()
