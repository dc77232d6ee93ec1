"""Pinned buffers that are registered as they are, against a driver that only remembers."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from meft.runtime.device.device import EmulatedDevice
from meft.runtime.device.engine import TransferEngine
from meft.runtime.device.pinned import registered_empty


class Driver:
    """``cudaHostRegister`` and its inverse, and the wait before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, error: int = 0) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.error = error
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "check_error", self._check)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.calls.append(("wait",)))

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 - as CUDA calls it
        assert flags == 0
        self.calls.append(("register", address, size))
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - as CUDA calls it
        self.calls.append(("unregister", address))
        return 0

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise RuntimeError(f"CUDA error {code}")


def test_a_buffer_is_registered_until_the_last_view_of_it_is_gone(monkeypatch) -> None:
    driver = Driver(monkeypatch)
    buffer = registered_empty((3, 1000), torch.bfloat16)
    address = buffer.data_ptr()
    assert (buffer.shape, buffer.dtype, address % mmap.PAGESIZE) == ((3, 1000), torch.bfloat16, 0)
    assert driver.calls == [("register", address, 6000)]  # not 8192
    view = buffer[1:]
    del buffer
    gc.collect()
    assert len(driver.calls) == 1
    view.fill_(2)
    del view
    gc.collect()
    assert driver.calls[1:] == [("wait",), ("unregister", address)]


def test_no_two_buffers_share_a_page(monkeypatch) -> None:
    driver = Driver(monkeypatch)
    buffers = [registered_empty((5,), torch.int32) for _ in range(8)]
    pages = {call[1] // mmap.PAGESIZE for call in driver.calls}
    assert len(pages) == len(buffers)


def test_nothing_is_registered_where_there_is_nothing(monkeypatch) -> None:
    driver = Driver(monkeypatch)
    assert registered_empty((0, 4), torch.float32).shape == (0, 4)
    assert driver.calls == []


def test_memory_that_cuda_refuses_is_not_unregistered(monkeypatch) -> None:
    driver = Driver(monkeypatch, error=2)
    with pytest.raises(RuntimeError, match="CUDA error 2"):
        registered_empty((4,), torch.float32)
    gc.collect()
    assert [name for name, *_ in driver.calls] == ["register"]


def test_the_engines_lasting_buffers_are_registered_on_a_card_alone(monkeypatch) -> None:
    driver = Driver(monkeypatch)
    device = EmulatedDevice(1 << 20)
    engine = TransferEngine(device)
    assert engine.host_buffer(3, 5, dtype=torch.float32).shape == (3, 5)
    assert driver.calls == []
    monkeypatch.setattr(device, "kind", "cuda")
    buffer = engine.host_buffer(3, 5, dtype=torch.float32)
    assert driver.calls == [("register", buffer.data_ptr(), 60)]
