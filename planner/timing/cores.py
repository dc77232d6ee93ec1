"""What the host's kernels lose to Python beside them, and what binding both to cores of their own gives back.

A host's rates are measured alone. While the thread that launches works (:mod:`meft.planner.timing.launching`), kernels
and it share cores, caches and the interpreter's lock. ``meft-profile hardware`` measures what is left of the rates
then, with threads wherever the system puts them and bound apart; ZenFlow reports 2.59 times the speed from binding.
"""

from __future__ import annotations

from meft.planner.records.profiles import GpuProfile, HostProfile, sourced_numbers
from meft.planner.timing.launching import LaunchSeconds

BINDING_PAYS = 1.02
"""Kernels that are bound must be so many times as fast, for a machine's cores to be divided."""


def binding_pays(gpu: GpuProfile, host: HostProfile) -> bool:
    """Whether the kernels' threads are better off on cores of their own; the emulated device computes on them too."""
    busy, bound = host.busy_rates_fraction, host.bound_rates_fraction
    if gpu.shares_host_cores or busy is None or bound is None:
        return False
    return bound.value >= BINDING_PAYS * busy.value


def python_share(launch: LaunchSeconds, layer_seconds: float) -> float:
    """Share of a step in which the thread that launches works: of the device's seconds for a layer, at most 1."""
    return min(1.0, launch.of_layers(1) / layer_seconds) if layer_seconds else 1.0


def beside_python(host: HostProfile, share: float, *, bound: bool) -> HostProfile:
    """The host with the rates that its kernels have in a step, of which Python works a ``share``: work that takes one
    second alone takes ``1 - share + share / fraction``."""
    fraction = host.bound_rates_fraction if bound else host.busy_rates_fraction
    if fraction is None:
        return host
    times = 1 - share + share / fraction.value
    slower = {
        name: number.model_copy(update={"value": number.value / times})
        for name, number in sourced_numbers(host)
        if name.endswith("_per_second")
    }
    return host.model_copy(update=slower)
