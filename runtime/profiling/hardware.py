"""Measure this machine: host, device and link, as profiles that planning reads, each number with its spread.

Without a GPU the device is the emulated one. Whatever makes the numbers worse than the machine is told as a warning.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from meft.planner.base.units import format_bytes
from meft.planner.base.version import VERSION
from meft.planner.records.profile_file import Machine, Measurement, ProfileFile
from meft.planner.records.profiles import GpuProfile, HostProfile, LinkProfile, Sourced, SourcedRange
from meft.runtime.device import card as cards
from meft.runtime.device.nvml import NvmlReader, NvmlUnavailable, cuda_identity
from meft.runtime.host.kernels import HostKernels, warm_up
from meft.runtime.profiling import beside, device_rates, host_rates, launching
from meft.runtime.profiling.device_rates import LinkMeasured

Tell = Callable[[str, int, int], None]
"""Progress: what is measured now, which stage it is, of how many."""
NOTICED_SPREAD = cards.WIDE_SPREAD_FRACTION


@dataclass
class Measured:
    """What was measured so far, by name; a name has several measurements where dtype or size differ."""

    where: str
    measurements: list[Measurement] = field(default_factory=list)

    def add(self, found: Iterable[Measurement]) -> None:
        """Take measurements over."""
        self.measurements.extend(found)

    def named(self, name: str, *words: str) -> Measurement:
        """The last of a name whose detail has every one of ``words``."""
        return [each for each in self.measurements if each.name == name and all(w in each.detail for w in words)][-1]

    def all_named(self, name: str) -> Iterator[Measurement]:
        """Those of a name."""
        return (each for each in self.measurements if each.name == name)

    def fastest(self, name: str) -> Measurement:
        """The highest median of a name."""
        return max(self.all_named(name), key=lambda each: each.median)

    def sourced(self, found: Measurement) -> Sourced:
        """A measurement as a profile's number."""
        spread = f"quartiles {found.low_quartile:.3g} to {found.high_quartile:.3g} {found.unit}"
        source = f"{found.name}, {found.detail}; median of {found.repetitions}, {spread}; {self.where}"
        return Sourced(value=found.median, basis="measured", source=source)

    def share(self, found: Measurement, peak: Sourced) -> Sourced:
        """A rate over a peak, at most 1."""
        source = f"{self.sourced(found).source}; over {peak.value:.3g}"
        return Sourced(value=min(1.0, found.median / peak.value), basis="measured", source=source)

    def unsteady(self) -> Iterator[str]:
        """Names one warning for all numbers whose quartiles lie far apart."""
        wide = {each.name for each in self.measurements if each.spread_fraction > NOTICED_SPREAD}
        if wide:
            yield f"quartiles more than {NOTICED_SPREAD:.0%} apart: {', '.join(sorted(wide))}; measure again when idle"


def measure_hardware(tell: Tell, *, meft_version: str, busy_seconds: float = 0.5) -> ProfileFile:
    """Measure everything there is to measure here; takes less than a minute."""
    busy_fraction = psutil.cpu_percent(interval=busy_seconds) / 100
    cuda = torch.cuda.is_available()
    nvml = NvmlReader.open(torch.cuda.current_device()) if cuda else NvmlUnavailable("no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    machine = describe_machine()
    measured = Measured(where=f"{machine.name}, {machine.date}, torch {torch.__version__}")
    kernels = HostKernels()
    stages: list[tuple[str, Callable[[], Iterable[Measurement]]]] = [
        ("host kernels (compiled once)", _compiled),
        ("host copies", host_rates.copies),
        ("host products", host_rates.products),
        ("rows on the host", lambda: host_rates.row_work(kernels)),
        ("routing on the host", lambda: host_rates.routing(kernels)),
        ("device memory", lambda: device_rates.memory(device)),
        ("device products", lambda: device_rates.products(device)),
        ("a step's kernels", lambda: device_rates.step_products(device)),
        ("kernel launches", lambda: device_rates.launches(device) if cuda else device_rates.booked_launches()),
        ("launching a step", lambda: launching.launch_times(device)),
        ("the host beside Python", beside.rates_beside_python),
    ]
    context = _context(nvml) if cuda else None
    for number, (name, stage) in enumerate(stages):
        tell(name, number, len(stages) + 1)
        measured.add(stage())
    warnings = [*cards.host_warnings(busy_fraction), *(_gpu_warnings(device) if cuda else ())]
    tell("link", len(stages), len(stages) + 1)
    linked = device_rates.link(device)
    measured.add(linked.measurements)
    tell("done", len(stages) + 1, len(stages) + 1)
    gpu = _cuda_profile(device, measured, nvml, context) if cuda else _emulated_profile(measured)
    nvml.close()
    kernels.close()
    return ProfileFile(
        meft_version=meft_version,
        machine=machine,
        measurements=tuple(measured.measurements),
        warnings=(*warnings, *measured.unsteady()),
        host=host_profile(measured, dtype="bf16" if cuda else "fp32"),
        gpu=gpu,
        link=link_profile(measured, linked, name=_link_name(device) if cuda else "memcpy within the host"),
    )


def _compiled() -> tuple[Measurement, ...]:
    """No measurement: what must be done before the first."""
    warm_up(lambda _: None)
    return ()


def describe_machine(today: datetime.date | None = None) -> Machine:
    """Processor, cores, NUMA nodes, memory, GPU, and the libraries' versions."""
    cores = f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores, {torch.get_num_threads()} threads"
    numa = f"{cards.num_numa_nodes()} NUMA node{'s' * (cards.num_numa_nodes() > 1)}"
    ram = f"{format_bytes(psutil.virtual_memory().total)} of RAM"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return Machine(
        name=f"{_processor()}, {cores}, {numa}, {ram}{gpu}",
        date=(today or datetime.datetime.now(tz=datetime.UTC).date()).isoformat(),
        versions={"torch": version("torch"), "python": platform.python_version(), "meft": VERSION},
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- profiles ------------------------------------------------------------------------------------------------------


def host_profile(measured: Measured, *, dtype: str) -> HostProfile:
    """The host's rates; rows in ``dtype``, the adapter's usual one on this machine."""
    sourced = measured.sourced
    return HostProfile(
        key="this-host",
        name=measured.where,
        num_cores=psutil.cpu_count() or 1,
        gather_bytes_per_second=sourced(measured.named("host gather", dtype)),
        scatter_bytes_per_second=sourced(measured.named("host scatter", dtype)),
        adamw_bytes_per_second=sourced(measured.named("host AdamW")),
        gemm_flops_per_second=sourced(measured.named("host product", "fp32")),
        select_scores_per_second=sourced(measured.named("host top-K")),
        overhead_seconds_per_layer=sourced(measured.named("host overhead per layer")),
        overhead_seconds_per_expert=sourced(measured.named("host overhead per expert")),
        **{
            f"launch_{task.replace(' ', '_')}_seconds": sourced(measured.named(f"launch {task}"))
            for task in launching.TASKS
        },
        busy_rates_fraction=sourced(measured.named(beside.BUSY)),
        bound_rates_fraction=next(map(sourced, measured.all_named(beside.BOUND)), None),
    )


def link_profile(measured: Measured, linked: LinkMeasured, *, name: str) -> LinkProfile:
    """The link's rates; without CUDA a copy is a copy, in either direction and never both at once."""
    fast = "pinned" if "h2d pinned" in linked.lines else "pageable"
    rates = {way: measured.sourced(measured.named(f"{way} {fast} fitted rate")) for way in ("h2d", "d2h")}
    pageable = {way: measured.sourced(measured.named(f"{way} pageable fitted rate")) for way in ("h2d", "d2h")}
    duplex = {way: measured.sourced(measured.named(f"{way} duplex")) if linked.duplex else rates[way] for way in rates}
    return LinkProfile(
        key="this-link",
        name=name,
        h2d_bytes_per_second=rates["h2d"],
        d2h_bytes_per_second=rates["d2h"],
        duplex_h2d_bytes_per_second=duplex["h2d"],
        duplex_d2h_bytes_per_second=duplex["d2h"],
        pageable_h2d_bytes_per_second=pageable["h2d"],
        pageable_d2h_bytes_per_second=pageable["d2h"],
        latency_seconds=measured.sourced(measured.named(f"h2d {fast} fitted latency")),
    )


def _device_numbers(measured: Measured) -> dict[str, Sourced]:
    """The rates that every device has; a step's share of the peak is its products' over the best product."""
    bandwidth = measured.sourced(measured.named("device memory"))
    step = measured.named("step products")
    name = "bf16" if "bfloat16" in step.detail else "fp32"
    peak = measured.sourced(measured.fastest(f"device product {name}"))
    return {
        "memory_bytes_per_second": bandwidth,
        "fp32_flops_per_second": measured.sourced(measured.fastest("device product fp32")),
        "matmul_efficiency": measured.share(step, peak),
        "memory_efficiency": measured.share(measured.named("step memory"), bandwidth),
        "kernel_launch_seconds": measured.sourced(measured.named("kernel launch")),
    }


def _emulated_profile(measured: Measured) -> GpuProfile:
    nothing = "none: the emulated device has no CUDA context and no cuBLAS"
    return GpuProfile(
        key="emulated",
        name="emulated device on the host's cores",
        architecture="none: the host computes",
        memory_total_bytes=None,
        bf16_flops_per_second=None,
        context=SourcedRange(low_bytes=0, high_bytes=0, basis="counted", source=nothing),
        workspace_bytes=Sourced(value=0.0, basis="counted", source=nothing),
        link="this-link",
        shares_host_cores=True,
        **_device_numbers(measured),
    )


def _cuda_profile(
    device: torch.device, measured: Measured, nvml: NvmlReader | NvmlUnavailable, context: tuple[int, str] | None
) -> GpuProfile:
    properties = torch.cuda.get_device_properties(device)
    card = cards.read_card(cuda_identity(device.index))
    total, who = card.total_bytes, "NVML's total"
    if total is None:
        total, who = properties.total_memory, "CUDA's total, a little below NVML's"
    halves = {
        f"{name}_flops_per_second": measured.sourced(measured.fastest(f"device product {name}"))
        for name in ("bf16", "fp16")
        if name in device_rates.dtypes_of(device)
    }
    return GpuProfile(
        key="this-gpu",
        name=properties.name,
        architecture=f"compute capability {properties.major}.{properties.minor}",
        memory_total_bytes=Sourced(value=float(total), basis="measured", source=f"{who}; {measured.where}"),
        context=_context_range(measured, context, _context(nvml)),
        workspace_bytes=_workspace(device, measured),
        link="this-link",
        **({"bf16_flops_per_second": None} | halves),
        **_device_numbers(measured),
    )


# --- the parts that need a GPU -------------------------------------------------------------------------------------


def _context(nvml: NvmlReader | NvmlUnavailable) -> tuple[int, str] | None:
    """Bytes beside the allocator's: NVML's figure for this process less what the allocator reserves."""
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    reading = nvml.process_memory(at_least_bytes=reserved)
    if reading.num_bytes is None:
        return None
    return max(0, reading.num_bytes - reserved), reading.source


def _context_range(measured: Measured, first: tuple[int, str] | None, last: tuple[int, str] | None) -> SourcedRange:
    """From a bare context to one that has loaded the modules of these measurements."""
    if first is None or last is None:
        source = "NVML gives no figure here: 274 MiB to 1.7 GiB are published for CUDA contexts with modules"
        return SourcedRange(low_bytes=274 << 20, high_bytes=1740 << 20, basis="assumed", source=source)
    low, high = sorted((first[0], last[0]))
    source = f"NVML less reserved, before and after measuring ({last[1]}); {measured.where}"
    return SourcedRange(low_bytes=low, high_bytes=high, basis="measured", source=source)


def _workspace(device: torch.device, measured: Measured) -> Sourced:
    """What cuBLAS takes from the allocator: allocated bytes that a product on a new stream adds and keeps."""
    square = torch.ones(1024, 1024, device=device)
    out = torch.empty_like(square)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        before = torch.cuda.memory_allocated(device)
        torch.mm(square, square, out=out)
        torch.cuda.synchronize(device)
        kept = torch.cuda.memory_allocated(device) - before
    source = f"allocated bytes that a first product on a stream keeps; {measured.where}"
    return Sourced(value=float(kept), basis="measured", source=source)


def _link_name(device: torch.device) -> str:
    pcie = cards.read_card(cuda_identity(device.index)).pcie
    return (
        "host-device link" if pcie is None else f"{pcie.name} (at most PCIe {pcie.max_generation}.0 x{pcie.max_width})"
    )


def _gpu_warnings(device: torch.device) -> Iterator[str]:
    """Looked up while the card is at work: an idle one lowers its clocks and its link."""
    left = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        left @ left
    identity = cuda_identity(device.index)
    card = cards.read_card(identity)
    torch.cuda.synchronize(device)
    yield from cards.card_warnings(card, used_by_us_bytes=torch.cuda.memory_reserved(device))
    yield from cards.numa_warnings(identity.pci_bus_id)
