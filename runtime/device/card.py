"""The card beside its measurements: who it is, how it is plugged in, what slows it down; through NVML and sysfs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft.planner.base.units import format_bytes
from meft.runtime.device.nvml import DeviceIdentity, NvmlFailure, NvmlSession, cuda_identity

SLOWDOWN_REASONS = {
    0x04: "its power limit",
    0x08: "a hardware slowdown",
    0x20: "its temperature (software)",
    0x40: "its temperature (hardware)",
    0x80: "the power supply's brake",
}
"""Bits of nvmlClocksEventReasons that lower the clocks, by nvml.h; being idle and application clocks are no trouble."""
BUSY_HOST_FRACTION = 0.2
"""Of the cores in use by others before anything is measured: above it figures come out low."""
WIDE_SPREAD_FRACTION = 0.15
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_NUMA_NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True)
class PcieLink:
    """Generation and width of the card's link, as it is now and at most."""

    generation: int
    max_generation: int
    width: int
    max_width: int

    @property
    def name(self) -> str:
        """As links are called: PCIe 4.0 x16."""
        return f"PCIe {self.generation}.0 x{self.width}"


@dataclass(frozen=True)
class Card:
    """What NVML says of a card; None where it does not tell."""

    name: str | None
    total_bytes: int | None
    used_bytes: int | None
    pcie: PcieLink | None
    slowdowns: tuple[str, ...]


def read_card(identity: DeviceIdentity, *, nvml: Any = None) -> Card:
    """Ask NVML; everything is None where it cannot be read. Ask while the card works: an idle link is slowed down."""
    try:
        with NvmlSession(identity, nvml=nvml) as ask:
            memory = _told(ask, "nvmlDeviceGetMemoryInfo")
            return Card(
                name=_told(ask, "nvmlDeviceGetName"),
                total_bytes=None if memory is None else int(memory.total),
                used_bytes=None if memory is None else int(memory.used),
                pcie=_pcie(ask),
                slowdowns=_slowdowns(ask),
            )
    except NvmlFailure:
        return Card(None, None, None, None, ())


def _told(ask: NvmlSession, name: str) -> Any:
    try:
        return ask(name)
    except NvmlFailure:
        return None


def _pcie(ask: NvmlSession) -> PcieLink | None:
    names = ("CurrPcieLinkGeneration", "MaxPcieLinkGeneration", "CurrPcieLinkWidth", "MaxPcieLinkWidth")
    answers = [_told(ask, f"nvmlDeviceGet{name}") for name in names]
    return None if None in answers else PcieLink(*map(int, answers))


def _slowdowns(ask: NvmlSession) -> tuple[str, ...]:
    mask = _told(ask, "nvmlDeviceGetCurrentClocksEventReasons") or 0
    return tuple(reason for bit, reason in SLOWDOWN_REASONS.items() if mask & bit)


# --- warnings ------------------------------------------------------------------------------------------------------


def card_warnings(card: Card, *, used_by_us_bytes: int) -> Iterator[str]:
    """What about the card makes its measurements worse than they could be."""
    if card.slowdowns:
        yield f"the GPU was slowed down by {', '.join(card.slowdowns)}: a longer run will be no faster"
    others = (card.used_bytes or 0) - used_by_us_bytes
    if others > 1 << 30:
        yield f"other programs hold {format_bytes(others)} of the GPU's memory, and may use the GPU"
    if card.pcie is not None:
        yield from slot_warnings(card.pcie)


def slot_warnings(link: PcieLink) -> Iterator[str]:
    """A slot that gives the card less than it can."""
    if link.width < link.max_width:
        yield (
            f"the GPU has {link.width} of the {link.max_width} PCIe lanes it could use: a slower slot, a riser, or a "
            f"slot that shares its lanes"
        )
    if link.generation < link.max_generation:
        yield (
            f"the GPU's link runs as PCIe {link.generation}.0 and could run as {link.max_generation}.0: the slot, "
            f"the firmware's setting, or power saving"
        )


def host_warnings(busy_fraction: float) -> Iterator[str]:
    """Other programs at work; ``busy_fraction`` is their share of all cores."""
    if busy_fraction > BUSY_HOST_FRACTION:
        yield (
            f"other programs kept {busy_fraction:.0%} of the cores busy before measuring: rates come out low, measure "
            f"again when the machine is idle"
        )


def numa_warnings(
    pci_bus_id: str | None,
    *,
    allowed_cores: frozenset[int] | None = None,
    pci_devices: Path = _PCI_DEVICES,
    nodes: Path = _NUMA_NODES,
) -> Iterator[str]:
    """The process runs on cores far from the card's slot; silent where the system does not tell."""
    node = numa_node(pci_bus_id, pci_devices=pci_devices)
    near = node_cores(node, nodes=nodes)
    allowed = frozenset(os.sched_getaffinity(0)) if allowed_cores is None else allowed_cores
    if near and not allowed & near:
        yield (
            f"this process runs on cores away from the GPU's NUMA node {node}: copies cross the sockets; start it with "
            f"numactl --cpunodebind={node} --membind={node}"
        )
    elif near and allowed - near:
        yield (
            f"this process may run on cores away from the GPU's NUMA node {node}: rates vary with where it runs; "
            f"numactl --cpunodebind={node} --membind={node} keeps it near"
        )


def near_cores(cuda_index: int | None) -> frozenset[int]:
    """Cores of a CUDA device's NUMA node; none where there is one node or the system does not tell."""
    try:
        identity = cuda_identity(cuda_index or 0)
    except NvmlFailure:
        return frozenset()
    return node_cores(numa_node(identity.pci_bus_id))


def numa_node(pci_bus_id: str | None, *, pci_devices: Path = _PCI_DEVICES) -> int | None:
    """The NUMA node of a PCI device such as ``00000000:65:00.0``, None where there is one node or nobody knows."""
    if pci_bus_id is None:
        return None
    try:
        node = int((pci_devices / pci_bus_id.lower()[-12:] / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return None if node < 0 else node


def node_cores(node: int | None, *, nodes: Path = _NUMA_NODES) -> frozenset[int]:
    """Cores of a NUMA node; none where the system does not tell."""
    if node is None:
        return frozenset()
    try:
        return parse_cores((nodes / f"node{node}" / "cpulist").read_text())
    except OSError:
        return frozenset()


def num_numa_nodes(nodes: Path = _NUMA_NODES) -> int:
    """NUMA nodes of this machine, 1 where the system does not tell."""
    return len([path for path in nodes.glob("node*") if re.fullmatch(r"node\d+", path.name)]) or 1


def parse_cores(text: str) -> frozenset[int]:
    """Cores of a list such as ``0-3,8,10-11``."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)
