"""Host tables on huge pages: zeros, private, resident, told to the kernel; ordinary memory where that cannot be."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from meft.runtime.host import huge_pages
from meft.runtime.host.huge_pages import HUGE_PAGE_BYTES
from meft.runtime.host.store import HostStore

SMAPS = Path("/proc/self/smaps")
LARGE = (3, HUGE_PAGE_BYTES // 4)
"""6 MiB of fp32."""


def region_of(table: torch.Tensor) -> dict[str, str]:
    """What the kernel says about the mapping that holds a table."""
    regions = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text(), flags=re.MULTILINE)
    for region in regions[1:]:
        head, *lines = region.splitlines()
        first, last = (int(edge, 16) for edge in head.split()[0].split("-"))
        if first <= table.data_ptr() < last:
            return {"mode": head.split()[1], **dict(line.split(":", 1) for line in lines)}
    raise AssertionError("no mapping holds the table")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), LARGE])
def test_a_table_is_zeros_of_the_shape_and_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    table = huge_pages.zeros(shape, dtype)
    assert (table.shape, table.dtype, int(table.count_nonzero())) == (shape, dtype, 0)
    table[-1].fill_(2.0)
    assert float(table.double().sum()) == 2.0 * shape[1]


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc/self/smaps")
def test_a_large_table_asks_for_huge_pages_and_is_resident_private_memory() -> None:
    table = huge_pages.zeros(LARGE, torch.float32)
    region = region_of(table)
    assert region["mode"] == "rw-p"
    assert "hg" in region["VmFlags"].split()  # MADV_HUGEPAGE
    assert int(region["Rss"].split()[0]) << 10 >= table.nbytes


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc/self/smaps")
def test_the_adapters_tables_and_its_copy_lie_so() -> None:
    store = HostStore(num_layers=1, adapter_width=2048, hidden_size=1024, bf16_copy=True)
    tables = store.layers[0]
    for table in (tables.weights, tables.first_moment, tables.second_moment, tables.gradients, *store.copies):
        assert "hg" in region_of(table)["VmFlags"].split()


def test_where_there_are_no_huge_pages_a_table_is_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert int(huge_pages.zeros(LARGE, torch.float32).count_nonzero()) == 0


def test_a_kernel_that_refuses_the_advice_gives_ordinary_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, option: int, *area: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert int(huge_pages.zeros(LARGE, torch.float32).count_nonzero()) == 0


def test_a_rehearsals_tables_are_fake() -> None:
    with FakeTensorMode():
        assert isinstance(huge_pages.zeros(LARGE, torch.float32), FakeTensor)
