"""Measuring a GPU: NVML against the allocator and the link, the hardware profile; each needs CUDA, some NVML too."""

from __future__ import annotations

import time

import pytest
import torch

from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link
from meft.planner.records.profile_file import ProfileFile
from meft.runtime.device.card import read_card
from meft.runtime.device.nvml import OWN_PROCESS, NvmlReader, NvmlUnavailable, cuda_identity
from meft.runtime.profiling import measure
from meft.runtime.profiling.device_rates import link
from meft.runtime.profiling.hardware import measure_hardware
from meft.runtime.profiling.measure import sample

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def reader():
    opened = NvmlReader.open(torch.cuda.current_device())
    if isinstance(opened, NvmlUnavailable):
        pytest.skip(f"needs NVML: {opened.reason}")
    yield opened
    opened.close()


def test_nvml_follows_the_allocator(reader) -> None:
    """What a process holds grows by what its allocator reserves, to the driver's granularity, and by nothing else."""
    torch.zeros(1, device="cuda")
    before, reserved_before = reader.process_memory(), torch.cuda.memory_reserved()
    held = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    after, reserved = reader.process_memory(at_least_bytes=torch.cuda.memory_reserved()), torch.cuda.memory_reserved()
    if before.num_bytes is None or after.source != before.source:
        pytest.skip(f"needs a figure for this process: {after.source}")
    if after.source != OWN_PROCESS:
        pytest.skip(f"needs this process's own figure, others may use the card: {after.source}")
    grown = after.num_bytes - before.num_bytes
    assert abs(grown - (reserved - reserved_before)) <= 4 * MIB
    assert held.numel() <= grown


def test_pcie_counters_see_what_is_copied(reader) -> None:
    host = torch.zeros(256 * MIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    torch.cuda.synchronize()
    reader.start_pcie()
    for _ in range(8):
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        time.sleep(0.05)
    reading = reader.pcie_bytes()
    if reading.rx_bytes is None or "sampled" in reading.source:
        pytest.skip(f"needs PCIe byte counters: {reading.source}")
    assert reading.rx_bytes >= 8 * host.numel()
    assert reading.rx_bytes < 1.5 * 8 * host.numel() + 64 * MIB


def test_the_card_is_cudas(reader) -> None:
    card = read_card(cuda_identity(torch.cuda.current_device()))
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    assert card.name
    assert total <= card.total_bytes < 1.2 * total
    if card.pcie is not None:
        assert 1 <= card.pcie.generation <= card.pcie.max_generation
        assert 1 <= card.pcie.width <= card.pcie.max_width


def test_the_link_both_ways(monkeypatch) -> None:
    monkeypatch.setattr(sample, "__kwdefaults__", sample.__kwdefaults__ | {"seconds": 0.05})
    measured = link(torch.device("cuda", torch.cuda.current_device()))
    assert set(measured.lines) == {f"{way} {kind}" for way in ("h2d", "d2h") for kind in ("pinned", "pageable")}
    for way, taken in measured.duplex.items():
        alone = measured.lines[f"{way} pinned"].bytes_per_second
        assert measured.duplex_bytes / taken.median < 1.1 * alone  # sharing the link makes neither way faster


def test_the_hardware_file_of_a_gpu(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(measure, "LEAST_REPETITIONS", 2)
    monkeypatch.setattr(sample, "__kwdefaults__", sample.__kwdefaults__ | {"seconds": 0.02})
    path = tmp_path / "hardware.json"
    measure_hardware(lambda *stage: None, meft_version="0").save(path)
    file = ProfileFile.load(path)
    assert file.sections() == ("host", "gpu", "link")
    assert (load_gpu(str(path)), load_host(str(path)), load_link(str(path))) == (file.gpu, file.host, file.link)
    assert not file.gpu.shares_host_cores
    assert file.gpu.total_bytes >= torch.cuda.get_device_properties(0).total_memory
    assert 0 <= file.gpu.context.low_bytes <= file.gpu.context.high_bytes < 4 * GIB
    assert file.link.h2d_bytes_per_second.value > 1e9
