"""The NVML reader, against a small stand-in for pynvml; no test here needs a GPU or a driver."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meft.runtime.device import nvml as module
from meft.runtime.device.nvml import DeviceIdentity, NvmlReader, NvmlUnavailable, cuda_identity

PID = 4321
CARD = DeviceIdentity(uuid="1111-2222", pci_bus_id="00000000:65:00.0")
MESSAGES = {1: "Uninitialized", 3: "Not Supported", 6: "Not Found", 9: "Driver Not Loaded", 15: "GPU is lost"}


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        self.value = value

    def __str__(self) -> str:
        return MESSAGES[self.value]


class NVMLLibraryMismatchError(Exception):
    pass


class FakeNvml:
    """One card of pynvml's face. ``broken`` names functions that fail, with the code or error to fail with."""

    NVMLError = NVMLError
    NVMLLibraryMismatchError = NVMLLibraryMismatchError
    NVML_FI_DEV_PCIE_COUNT_TX_BYTES = 197
    NVML_FI_DEV_PCIE_COUNT_RX_BYTES = 198
    NVML_PCIE_UTIL_TX_BYTES = 0
    NVML_PCIE_UTIL_RX_BYTES = 1

    def __init__(self) -> None:
        self.broken: dict[str, int | Exception] = {}
        self.names = {"GPU-1111-2222": "card"}
        self.card_count = 1
        self.processes: list[tuple[int, int | None]] = []
        self.used = 0
        self.counters = {197: 0, 198: 0}
        self.counter_type = (1, "uiVal")  # unsigned int, what drivers give
        self.counter_code = 0
        self.throughput = {0: 0, 1: 0}
        self.open_count = 0
        self.on_sample = lambda: None

    def _answer(self, function: str) -> None:
        error = self.broken.get(function)
        if isinstance(error, int):
            raise NVMLError(error)
        if error is not None:
            raise error

    def nvmlInit(self) -> None:  # noqa: N802
        self._answer("nvmlInit")
        self.open_count += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._answer("nvmlShutdown")
        self.open_count -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.card_count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        assert index == 0
        return "card"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return self._by_name(uuid)

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:  # noqa: N802
        return self._by_name(bus_id)

    def _by_name(self, name: str) -> str:
        if name not in self.names:
            raise NVMLError(6)
        return self.names[name]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        assert handle == "card"
        self._answer("nvmlDeviceGetComputeRunningProcesses")
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]

    nvmlDeviceGetComputeRunningProcesses_v2 = nvmlDeviceGetComputeRunningProcesses  # noqa: N815

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        assert handle == "card"
        self._answer("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(used=self.used)

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[SimpleNamespace]:  # noqa: N802
        self.on_sample()
        self._answer("nvmlDeviceGetFieldValues")
        kind, member = self.counter_type
        return [
            SimpleNamespace(
                nvmlReturn=self.counter_code, valueType=kind, value=SimpleNamespace(**{member: self.counters[field]})
            )
            for field in fields
        ]

    def nvmlDeviceGetPcieThroughput(self, handle: str, way: int) -> int:  # noqa: N802
        self._answer("nvmlDeviceGetPcieThroughput")
        return self.throughput[way]


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def fake() -> FakeNvml:
    return FakeNvml()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def no_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave sampling to the test: the background thread sleeps through it."""
    monkeypatch.setattr(module, "SAMPLE_SECONDS", 3600.0)


@pytest.fixture
def reader(fake: FakeNvml, clock: Clock, no_background: None) -> Iterator[NvmlReader]:
    opened = NvmlReader.open(0, nvml=fake, identity=CARD, clock=clock, pid=PID)
    assert isinstance(opened, NvmlReader)
    yield opened
    opened.close()


# --- finding the card ---------------------------------------------------------------------------------------------


def unavailable(fake: Any, identity: DeviceIdentity | None = CARD) -> str:
    """The one reason that every reading of a failed open gives."""
    opened = NvmlReader.open(0, nvml=fake, identity=identity, pid=PID)
    assert isinstance(opened, NvmlUnavailable)
    opened.start_pcie()
    memory, pcie = opened.process_memory(), opened.pcie_bytes()
    opened.close()
    assert (memory.num_bytes, pcie.rx_bytes, pcie.tx_bytes) == (None, None, None)
    assert memory.source == pcie.source == opened.reason
    return opened.reason


@pytest.mark.parametrize("name", ["GPU-1111-2222", "MIG-1111-2222", "00000000:65:00.0"])
def test_the_card_is_found_by_uuid_or_pci_address(fake: FakeNvml, name: str) -> None:
    fake.names, fake.card_count = {name: "card", "GPU-other": "wrong"}, 8
    opened = NvmlReader.open(0, nvml=fake, identity=CARD, pid=PID)
    assert isinstance(opened, NvmlReader)
    assert opened.process_memory().num_bytes == 0  # asked of "card": the stand-in asserts it
    opened.close()
    assert fake.open_count == 0


def test_a_card_that_nothing_names_is_taken_only_if_it_is_alone(fake: FakeNvml) -> None:
    nameless = DeviceIdentity(None, None)
    opened = NvmlReader.open(0, nvml=fake, identity=nameless, pid=PID)
    assert isinstance(opened, NvmlReader)
    opened.close()
    fake.card_count = 2
    assert "none of NVML's 2 cards" in unavailable(fake, nameless)
    assert fake.open_count == 0


def test_another_card_is_not_taken_for_cudas(fake: FakeNvml) -> None:
    fake.names = {"GPU-other": "card"}
    assert "none of NVML's 1 cards is CUDA's" in unavailable(fake)


def test_no_driver_gives_the_drivers_reason(fake: FakeNvml) -> None:
    fake.broken["nvmlInit"] = 9
    assert unavailable(fake) == "NVML not read: Driver Not Loaded"


def test_no_package_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert unavailable(None) == "NVML not read: nvidia-ml-py is not installed"


def test_torch_without_cuda_gives_a_reason(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    assert unavailable(fake, None) == (
        "NVML not read: torch sees no CUDA device 0: Torch not compiled with CUDA enabled"
    )
    assert fake.open_count == 0


def test_torchs_properties_name_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = SimpleNamespace(uuid="1111-2222", pci_domain_id=0, pci_bus_id=0x65, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", [SimpleNamespace(uuid="3333"), newer].__getitem__)
    assert cuda_identity(1) == CARD
    assert cuda_identity(0) == DeviceIdentity("3333", None)  # torch before 2.8 does not tell the PCI address


# --- memory -------------------------------------------------------------------------------------------------------


def test_memory_of_the_own_process(fake: FakeNvml, reader: NvmlReader) -> None:
    fake.processes = [(1, 10**9), (PID, 700), (PID, 30)]  # two entries: two instances of a divided card
    assert reader.process_memory() == module.MemoryReading(730, module.OWN_PROCESS)


@pytest.mark.parametrize(
    ("processes", "error", "because"),
    [
        ([(1, 5)], None, "PID 4321 is not in NVML's list"),  # a container: the list has the host's PIDs
        ([(PID, None)], None, "the driver gives no figure per process"),  # Windows (WDDM)
        ([], 3, "Not Supported"),
        ([], NVMLLibraryMismatchError("versions differ"), "versions differ"),
    ],
)
def test_else_the_growth_of_the_whole_card(
    fake: FakeNvml, clock: Clock, processes: list[tuple[int, int | None]], error: int | Exception | None, because: str
) -> None:
    fake.used = 1000
    opened = NvmlReader.open(0, nvml=fake, identity=CARD, pid=PID)
    fake.processes, fake.used = processes, 5000
    if error is not None:
        fake.broken["nvmlDeviceGetComputeRunningProcesses"] = error
    assert opened.process_memory() == module.MemoryReading(4000, f"{module.DEVICE_GROWTH} ({because})")
    opened.close()


def test_growth_below_zero_is_no_figure(fake: FakeNvml) -> None:
    fake.used = 1000
    opened = NvmlReader.open(0, nvml=fake, identity=CARD, pid=PID)
    fake.used = 999
    reading = opened.process_memory()
    assert reading.num_bytes is None
    assert "another process released device memory" in reading.source
    opened.close()


def test_memory_that_the_driver_never_tells(fake: FakeNvml) -> None:
    fake.broken["nvmlDeviceGetMemoryInfo"] = 3
    opened = NvmlReader.open(0, nvml=fake, identity=CARD, pid=PID)
    fake.broken.clear()
    reading = opened.process_memory()
    assert reading.num_bytes is None
    assert reading.source.endswith("PID 4321 is not in NVML's list; at the start: Not Supported")
    opened.close()


# --- PCIe ---------------------------------------------------------------------------------------------------------


def test_pcie_bytes_by_counters(fake: FakeNvml, reader: NvmlReader) -> None:
    fake.counters = {197: 50, 198: 1_000_000}  # tx, rx as they stand before the run
    reader.start_pcie()
    assert reader.pcie_bytes() == module.PcieReading(0, 0, module.BYTE_COUNTERS)
    fake.counters = {197: 57, 198: 4_000_000}
    assert reader.pcie_bytes() == module.PcieReading(3_000_000, 7, module.BYTE_COUNTERS)
    reader.start_pcie()  # starts from 0 again
    assert reader.pcie_bytes().rx_bytes == 0


def test_counters_of_32_bits_wrap(fake: FakeNvml, reader: NvmlReader) -> None:
    fake.counters = {197: 0, 198: 2**32 - 100}
    reader.start_pcie()
    for _ in range(3):  # three times 125 bytes: the first ends 25 behind the wrap
        fake.counters[198] = (fake.counters[198] + 125) % 2**32
        reader.pcie_bytes()
    assert reader.pcie_bytes().rx_bytes == 375


@pytest.mark.parametrize("kind", [(2, "ulVal"), (3, "ullVal")])
def test_counters_of_64_bits(fake: FakeNvml, reader: NvmlReader, kind: tuple[int, str]) -> None:
    fake.counter_type, fake.counters = kind, {197: 0, 198: 2**33}
    reader.start_pcie()
    fake.counters[198] = 2**35
    assert reader.pcie_bytes().rx_bytes == 2**35 - 2**33
    fake.counters[198] = 0  # too large before to be a wrap
    reading = reader.pcie_bytes()
    assert reading == module.PcieReading(None, None, "NVML stopped giving PCIe figures: a PCIe byte counter was reset")


def test_a_long_pause_that_may_hide_a_wrap_is_told(fake: FakeNvml, clock: Clock, reader: NvmlReader) -> None:
    reader.start_pcie()
    clock.seconds += 0.067  # 0.067 s x 64 GB/s = 4.288e9, below 2**32 = 4.295e9
    assert reader.pcie_bytes().source == module.BYTE_COUNTERS
    clock.seconds += 0.5  # 2**32 / 0.5 s = 8.6 GB/s
    assert reader.pcie_bytes().source.endswith(
        "(0.50 s passed between two readings: a wrap could have been missed above 8.6 GB/s)"
    )


@pytest.mark.parametrize(
    ("breakage", "because"),
    [
        ({"counter_code": 3}, "Not Supported"),
        ({"broken": {"nvmlDeviceGetFieldValues": 3}}, "Not Supported"),
        ({"counter_type": (0, "dVal")}, "a PCIe byte counter has the unknown value type 0"),
        ({"NVML_FI_DEV_PCIE_COUNT_RX_BYTES": None}, "this nvidia-ml-py has no NVML_FI_DEV_PCIE_COUNT_RX_BYTES"),
        ({"nvmlDeviceGetFieldValues": None}, "this nvidia-ml-py has no nvmlDeviceGetFieldValues"),
    ],
)
def test_without_counters_the_throughput_is_integrated(
    fake: FakeNvml, clock: Clock, reader: NvmlReader, breakage: dict[str, Any], because: str
) -> None:
    for name, value in breakage.items():
        setattr(fake, name, value)
    fake.throughput = {0: 999, 1: 999}  # before the run: counts for nothing
    reader.start_pcie()
    # 2 s at 1000 KB/s received and 30 sent, then 0.5 s at 8000 and 0: 2,000,000 + 4,000,000 and 60,000 bytes.
    clock.seconds += 2
    fake.throughput = {0: 30, 1: 1000}
    reader.pcie_bytes()
    clock.seconds += 0.5
    fake.throughput = {0: 0, 1: 8000}
    source = f"{module.SAMPLED_THROUGHPUT} (no byte counters: {because})"
    assert reader.pcie_bytes() == module.PcieReading(6_000_000, 60_000, source)


def test_neither_counters_nor_throughput(fake: FakeNvml, reader: NvmlReader) -> None:
    fake.broken = {"nvmlDeviceGetFieldValues": 3, "nvmlDeviceGetPcieThroughput": 3}
    reader.start_pcie()
    source = "NVML gave no PCIe figures: no byte counters: Not Supported; no throughput: Not Supported"
    assert reader.pcie_bytes() == module.PcieReading(None, None, source)


def test_a_reading_that_was_not_started_is_no_figure(reader: NvmlReader) -> None:
    assert reader.pcie_bytes() == module.PcieReading(None, None, "the PCIe reading was not started")


def test_a_card_that_vanishes_mid_run_leaves_no_figures(fake: FakeNvml, reader: NvmlReader) -> None:
    reader.start_pcie()
    fake.counters[198] = 500
    assert reader.pcie_bytes().rx_bytes == 500
    for function in ("FieldValues", "PcieThroughput", "MemoryInfo", "ComputeRunningProcesses"):
        fake.broken[f"nvmlDeviceGet{function}"] = 15
    fake.broken["nvmlShutdown"] = 1
    reading = reader.pcie_bytes()
    assert reading == module.PcieReading(None, None, "NVML stopped giving PCIe figures: GPU is lost")
    fake.broken.pop("nvmlDeviceGetFieldValues")
    assert reader.pcie_bytes() == reading  # a total with a hole in it stays no figure
    assert reader.process_memory().num_bytes is None
    reader.close()


def test_the_background_thread_samples_and_ends(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_SECONDS", 0.001)
    sampled = threading.Event()
    readings = 0

    def step() -> None:  # 1 GiB between any two readings: 9 of them wrap a 32-bit counter twice
        nonlocal readings
        fake.counters[198] = (readings * 2**30) % 2**32
        readings += 1
        if readings == 10:
            sampled.set()

    fake.on_sample = step
    opened = NvmlReader.open(0, nvml=fake, identity=CARD, pid=PID)
    opened.start_pcie()
    assert sampled.wait(timeout=30)
    reading = opened.pcie_bytes()
    assert reading.rx_bytes is not None
    assert reading.rx_bytes >= 9 * 2**30
    assert reading.rx_bytes % 2**30 == 0
    opened.close()
    opened.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "meft-nvml"]
    assert fake.open_count == 0
    assert opened.pcie_bytes().source == "the NVML reader is closed"
    assert opened.process_memory().num_bytes is None
