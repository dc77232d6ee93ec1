"""What the driver says about this process and its PCIe link, through NVML (``nvidia-ml-py``, imported as ``pynvml``).

Nothing here raises for a machine without NVML: whatever cannot be read comes back as None with the reason in its
``source``, and a figure always names the source it came from.

Directions are the card's: it *receives* (rx) what the host sends, h2d, and *transmits* (tx) what the host gets, d2h.
Both count every process on the card and the packet headers, so they lie above the payload that a program copies.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

OWN_PROCESS = "NVML, this process"
DEVICE_GROWTH = "NVML, growth of the whole card's use since the reader was opened"
BYTE_COUNTERS = "NVML, PCIe byte counters"
SAMPLED_THROUGHPUT = "NVML, PCIe throughput sampled and integrated"

SAMPLE_SECONDS = 0.02
"""Pause between two readings of the link."""
KILOBYTE = 1000
"""NVML's manual gives the throughput in KB/s. Assumed to be 1000 bytes: were it 1024, figures would be 2.3 % low."""
COUNTER_WRAP_BYTES = 1 << 32
"""Drivers give the byte counters in 32 bits, and nvml.h says that they wrap."""
FASTEST_LINK_BYTES_PER_SECOND = 64_000_000_000
"""PCIe 5.0 x16, one way, from its data rate: no card wraps a 32-bit counter faster than in 67 ms."""

# Which member of the value union holds a number, by nvmlValueType_t of nvml.h.
_UNION_MEMBERS = {1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal"}


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """What names a card to both CUDA and NVML, whatever order and subset ``CUDA_VISIBLE_DEVICES`` shows."""

    uuid: str | None
    """Without its ``GPU-`` or ``MIG-``."""
    pci_bus_id: str | None
    """As ``00000000:65:00.0``."""


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Device memory held by this process, in bytes, or None with the reason in ``source``."""

    num_bytes: int | None
    source: str


@dataclass(frozen=True, slots=True)
class PcieReading:
    """Bytes over the link since ``start_pcie``, or None with the reason in ``source``."""

    rx_bytes: int | None
    tx_bytes: int | None
    source: str


class NvmlFailure(Exception):
    """NVML refused a question; the text is its reason."""


class LibraryTooOld(NvmlFailure):
    """The driver's library lacks the version of a function that nvidia-ml-py calls."""


class NvmlUnavailable:
    """Stands in for a reader where there is none: every reading is None, for the same reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def process_memory(self, *, at_least_bytes: int = 0) -> MemoryReading:
        """No reading."""
        del at_least_bytes
        return MemoryReading(None, self.reason)

    def start_pcie(self) -> None:
        """Nothing to start."""

    def pcie_bytes(self) -> PcieReading:
        """No reading."""
        return PcieReading(None, None, self.reason)

    def close(self) -> None:
        """Nothing to close."""


class PcieMeter(Protocol):
    """A running total of the bytes over the link, brought up to date by ``sample``."""

    rx_bytes: int
    tx_bytes: int

    @property
    def source(self) -> str:
        """Where the totals come from."""

    def sample(self) -> None:
        """Read once; raises :class:`NvmlFailure`."""


class ByteCounters:
    """Adds up the differences of the card's own byte counters; ``read`` gives (rx, tx) as they stand."""

    def __init__(self, read: Callable[[], tuple[int, int]], clock: Callable[[], float]) -> None:
        self.rx_bytes = self.tx_bytes = 0
        self._read = read
        self._clock = clock
        self._previous = read()
        self._time = clock()
        self._longest_seconds = 0.0

    @property
    def source(self) -> str:
        """Names the counters, and the rate above which a wrap between two readings would have gone unseen."""
        if self._longest_seconds * FASTEST_LINK_BYTES_PER_SECOND <= COUNTER_WRAP_BYTES:
            return BYTE_COUNTERS
        unseen = COUNTER_WRAP_BYTES / self._longest_seconds / 1e9
        pause = f"{self._longest_seconds:.2f} s passed between two readings"
        return f"{BYTE_COUNTERS} ({pause}: a wrap could have been missed above {unseen:.1f} GB/s)"

    def sample(self) -> None:
        """Add what passed since the last reading."""
        current, now = self._read(), self._clock()
        self.rx_bytes += _counted(self._previous[0], current[0])
        self.tx_bytes += _counted(self._previous[1], current[1])
        self._longest_seconds = max(self._longest_seconds, now - self._time)
        self._previous, self._time = current, now


class ThroughputIntegral:
    """Adds up sampled throughput times the time it stands for; ``read`` gives (rx, tx) in bytes per second.

    NVML looks at the link for 20 ms per direction and answers with the mean over that window, so a sample stands for
    the time since the one before it: exact for a steady link, an estimate for a bursty one.
    """

    source: str

    def __init__(self, read: Callable[[], tuple[int, int]], clock: Callable[[], float], because: str) -> None:
        self.rx_bytes = self.tx_bytes = 0
        self.source = f"{SAMPLED_THROUGHPUT} ({because})"
        self._read = read
        self._clock = clock
        read()  # fails here and now where the driver cannot tell
        self._time = clock()

    def sample(self) -> None:
        """Add the present throughput for the time since the last sample."""
        rx, tx = self._read()
        now = self._clock()
        self.rx_bytes += round(rx * (now - self._time))
        self.tx_bytes += round(tx * (now - self._time))
        self._time = now


class NvmlReader:
    """One card as NVML sees it. Make it with :meth:`open`, before the first CUDA call of the process."""

    def __init__(self, device: _Device, clock: Callable[[], float], pid: int) -> None:
        self._device = device
        self._clock = clock
        self._pid = pid
        self._meter: PcieMeter | None = None
        self._no_meter = "the PCIe reading was not started"
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._used_at_open, self._used_failure = _attempt(device.used_bytes)

    @classmethod
    def open(
        cls,
        cuda_index: int,
        *,
        nvml: Any = None,
        identity: DeviceIdentity | None = None,
        clock: Callable[[], float] = time.monotonic,
        pid: int | None = None,
    ) -> NvmlReader | NvmlUnavailable:
        """Find the card that CUDA calls ``cuda_index``; where that cannot be done, the stand-in that says why.

        Tests pass their own ``nvml`` (a module with pynvml's functions), ``identity`` (else torch is asked), ``clock``
        in seconds and ``pid``.
        """
        try:
            module = importlib.import_module("pynvml") if nvml is None else nvml
        except ImportError:
            return NvmlUnavailable("NVML not read: nvidia-ml-py is not installed")
        library = _Library(module)
        try:
            library.call("nvmlInit")
        except NvmlFailure as failure:
            return NvmlUnavailable(f"NVML not read: {failure}")
        try:
            handle = library.find(identity or cuda_identity(cuda_index))
        except NvmlFailure as failure:
            library.shut_down()
            return NvmlUnavailable(f"NVML not read: {failure}")
        return cls(_Device(library, handle), clock, os.getpid() if pid is None else pid)

    def process_memory(self, *, at_least_bytes: int = 0) -> MemoryReading:
        """Device memory of this process: by its own PID, else by what the whole card took since ``open``.

        The second serves in a container, where NVML lists the host's PIDs, and on Windows, where it knows no figure
        per process; it also counts what other processes did meanwhile, and misses what was taken before ``open``.
        ``at_least_bytes`` is what this process is known to hold, its allocator's reserved bytes say: a PID in NVML's
        list that holds less is another process's, which has the same number on the host.
        """
        try:
            own = self._device.process_bytes(self._pid)
        except NvmlFailure as failure:
            return self._device_growth(str(failure))
        if not own:
            return self._device_growth(f"PID {self._pid} is not in NVML's list")
        if None in own:
            return self._device_growth("the driver gives no figure per process")
        num_bytes = sum(each for each in own if each is not None)
        if num_bytes < at_least_bytes:
            return self._device_growth(f"NVML's PID {self._pid} holds less than this process has reserved")
        return MemoryReading(num_bytes, OWN_PROCESS)

    def _device_growth(self, because: str) -> MemoryReading:
        if self._used_at_open is None:
            return MemoryReading(None, f"NVML gave no memory use: {because}; at the start: {self._used_failure}")
        used, failure = _attempt(self._device.used_bytes)
        if used is None:
            reasons = dict.fromkeys((because, failure))
            return MemoryReading(None, f"NVML gave no memory use: {'; '.join(reasons)}")
        if used < self._used_at_open:
            return MemoryReading(None, f"NVML gave no memory use: {because}; another process released device memory")
        return MemoryReading(used - self._used_at_open, f"{DEVICE_GROWTH} ({because})")

    def start_pcie(self) -> None:
        """Count from here on, in a background thread: by the card's byte counters, else by its throughput."""
        self._halt()
        try:
            self._meter = self._choose_meter()
        except NvmlFailure as failure:
            self._meter, self._no_meter = None, f"NVML gave no PCIe figures: {failure}"
            return
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="meft-nvml", daemon=True)
        self._thread.start()

    def _choose_meter(self) -> PcieMeter:
        try:
            return ByteCounters(self._device.pcie_counters, self._clock)
        except NvmlFailure as failure:
            because = f"no byte counters: {failure}"
        try:
            return ThroughputIntegral(self._device.pcie_throughput, self._clock, because)
        except NvmlFailure as failure:
            raise NvmlFailure(f"{because}; no throughput: {failure}") from failure

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            if not self._sample():
                return

    def _sample(self) -> bool:
        """Bring the meter up to date; a failure ends it, because a total with a hole in it would mislead."""
        with self._lock:
            if self._meter is None:
                return False
            try:
                self._meter.sample()
            except NvmlFailure as failure:
                self._meter, self._no_meter = None, f"NVML stopped giving PCIe figures: {failure}"
            return self._meter is not None

    def pcie_bytes(self) -> PcieReading:
        """Bytes over the link since :meth:`start_pcie`, up to now."""
        self._sample()
        with self._lock:
            if self._meter is None:
                return PcieReading(None, None, self._no_meter)
            return PcieReading(self._meter.rx_bytes, self._meter.tx_bytes, self._meter.source)

    def close(self) -> None:
        """End the background thread and let go of NVML; closing again does nothing."""
        self._halt()
        self._meter, self._no_meter = None, "the NVML reader is closed"
        self._device.close()

    def _halt(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def cuda_identity(cuda_index: int) -> DeviceIdentity:
    """Ask torch what names the card that CUDA calls ``cuda_index``; raises :class:`NvmlFailure` where it sees none."""
    try:
        import torch

        properties = torch.cuda.get_device_properties(cuda_index)
    except (ImportError, AssertionError, RuntimeError) as error:
        raise NvmlFailure(f"torch sees no CUDA device {cuda_index}: {error}") from error
    uuid = getattr(properties, "uuid", None)
    parts = [getattr(properties, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    pci = [part for part in parts if part is not None]  # torch tells them from 2.8 on
    return DeviceIdentity(
        uuid=None if uuid is None else str(uuid),
        pci_bus_id="{:08X}:{:02X}:{:02X}.0".format(*pci) if len(pci) == len(parts) else None,
    )


class _Library:
    """The pynvml module with its several kinds of failure turned into one."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._mismatch: type[Exception] = getattr(module, "NVMLLibraryMismatchError", LibraryTooOld)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of NVML by name; raises :class:`NvmlFailure`."""
        function = getattr(self._module, name, None)
        if function is None:
            raise NvmlFailure(f"this nvidia-ml-py has no {name}")
        try:
            return function(*arguments)
        except self._mismatch as error:
            raise LibraryTooOld(str(error)) from error
        except self._module.NVMLError as error:
            raise NvmlFailure(str(error)) from error

    def constant(self, name: str) -> Any:
        """A constant of NVML by name; raises :class:`NvmlFailure`."""
        value = getattr(self._module, name, None)
        if value is None:
            raise NvmlFailure(f"this nvidia-ml-py has no {name}")
        return value

    def error_text(self, code: int) -> str:
        """What an NVML return code means."""
        return str(self._module.NVMLError(code))

    def find(self, identity: DeviceIdentity) -> Any:
        """The handle of a card: by UUID, else by PCI address, else the only card there is."""
        attempts = []
        if identity.uuid is not None:
            attempts += [("nvmlDeviceGetHandleByUUID", f"{prefix}{identity.uuid}") for prefix in ("GPU-", "MIG-")]
        if identity.pci_bus_id is not None:
            attempts += [("nvmlDeviceGetHandleByPciBusId", identity.pci_bus_id)]
        for function, name in attempts:
            with contextlib.suppress(NvmlFailure):
                return self.call(function, name)
        count = self.call("nvmlDeviceGetCount")
        if count != 1 or attempts:
            raise NvmlFailure(f"none of NVML's {count} cards is CUDA's ({identity})")
        return self.call("nvmlDeviceGetHandleByIndex", 0)

    def shut_down(self) -> None:
        """Let go of NVML; a card that is gone has nothing left to release."""
        with contextlib.suppress(NvmlFailure):
            self.call("nvmlShutdown")


class NvmlSession:
    """NVML for a few questions to one card: ``session(function, *arguments)``, open within its ``with``.

    Raises :class:`NvmlFailure` where NVML, the card or the answer is not there. Tests pass their own ``nvml``.
    """

    def __init__(self, identity: DeviceIdentity, *, nvml: Any = None) -> None:
        self._identity = identity
        self._nvml = nvml

    def __enter__(self) -> NvmlSession:
        try:
            self._library = _Library(importlib.import_module("pynvml") if self._nvml is None else self._nvml)
        except ImportError as error:
            raise NvmlFailure("nvidia-ml-py is not installed") from error
        self._library.call("nvmlInit")
        try:
            self._handle = self._library.find(self._identity)
        except NvmlFailure:
            self._library.shut_down()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._library.shut_down()

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Ask the card."""
        return self._library.call(name, self._handle, *arguments)


class _Device:
    """The questions put to one card. Every method raises :class:`NvmlFailure`."""

    def __init__(self, library: _Library, handle: Any) -> None:
        self._library: _Library | None = library
        self._handle = handle

    def _ask(self, name: str, *arguments: Any) -> Any:
        return self._opened().call(name, self._handle, *arguments)

    def _opened(self) -> _Library:
        if self._library is None:
            raise NvmlFailure("the NVML reader is closed")
        return self._library

    def process_bytes(self, pid: int) -> list[int | None]:
        """Bytes of each entry of a process (several on a card cut into instances), None where the driver hides it."""
        try:
            processes = self._ask("nvmlDeviceGetComputeRunningProcesses")
        except LibraryTooOld:  # a driver before R510 has the list in its second version only
            processes = self._ask("nvmlDeviceGetComputeRunningProcesses_v2")
        return [process.usedGpuMemory for process in processes if process.pid == pid]

    def used_bytes(self) -> int:
        """Bytes in use on the card by anyone."""
        return int(self._ask("nvmlDeviceGetMemoryInfo").used)

    def pcie_counters(self) -> tuple[int, int]:
        """The card's running byte counts, (rx, tx)."""
        library = self._opened()
        fields = [library.constant(f"NVML_FI_DEV_PCIE_COUNT_{way}_BYTES") for way in ("RX", "TX")]
        rx, tx = [_field_value(library, value) for value in self._ask("nvmlDeviceGetFieldValues", fields)]
        return rx, tx

    def pcie_throughput(self) -> tuple[int, int]:
        """Present throughput in bytes per second, (rx, tx); takes about 40 ms."""
        library = self._opened()
        ways = [library.constant(f"NVML_PCIE_UTIL_{way}_BYTES") for way in ("RX", "TX")]
        rx, tx = [KILOBYTE * self._ask("nvmlDeviceGetPcieThroughput", way) for way in ways]
        return rx, tx

    def close(self) -> None:
        """Let go of NVML, once."""
        if self._library is not None:
            self._library.shut_down()
            self._library = None


def _field_value(library: _Library, value: Any) -> int:
    """The number in a field value, which says for itself whether and in which type it is there."""
    if value.nvmlReturn != 0:
        raise NvmlFailure(library.error_text(value.nvmlReturn))
    member = _UNION_MEMBERS.get(value.valueType)
    if member is None:
        raise NvmlFailure(f"a PCIe byte counter has the unknown value type {value.valueType}")
    return int(getattr(value.value, member))


def _counted(previous: int, current: int) -> int:
    """Bytes between two readings of a counter that may have wrapped at 32 bits; raises :class:`NvmlFailure`."""
    if current >= previous:
        return current - previous
    if previous >= COUNTER_WRAP_BYTES:
        raise NvmlFailure("a PCIe byte counter was reset")
    return current + COUNTER_WRAP_BYTES - previous


def _attempt(question: Callable[[], int]) -> tuple[int | None, str]:
    """The answer, or None and the reason."""
    try:
        return question(), ""
    except NvmlFailure as failure:
        return None, str(failure)
