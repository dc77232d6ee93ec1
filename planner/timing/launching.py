"""What the thread that launches needs for each of the device's tasks: Python, the operators' dispatch, autograd.

A device does nothing before it is told to. Where a task is shorter than telling it, the thread sets the pace, however
fast the card: so it is an agent of the step's program (:mod:`meft.planner.timing.program`) wherever the host's profile
knows how long it takes. A profile that nobody measured it for leaves it out, and so does the emulated device, whose
operators' own costs are in its rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from meft.planner.base.quantities import COMPUTE_DTYPE_BYTES
from meft.planner.records.plan import Request
from meft.planner.records.profiles import GpuProfile, HostProfile
from meft.planner.timing.layer_kernels import LAYERS, LayerKernels, layer_kernels

MEASURED_LAYER = LAYERS["llama", 4, "fused"]
"""The layer that a profile's seconds are of; those of another are by its launches."""


@dataclass(frozen=True)
class LaunchSeconds:
    """Of one layer's tasks."""

    attention: float
    router: float
    ffn: float
    """With the jobs that bring the rows."""
    adapter: float
    adapter_backward: float
    """With the jobs that take the gradients."""
    backward: float

    @classmethod
    def of(cls, host: HostProfile, kernels: LayerKernels) -> Self | None:
        """Of a layer of these kernels; None where the profile does not know."""
        numbers = [getattr(host, f"launch_{name}_seconds") for name in cls.__dataclass_fields__]
        if any(number is None for number in numbers):
            return None
        made = cls(*(number.value for number in numbers))
        return cls(
            attention=made.attention * kernels.attention.launches / MEASURED_LAYER.attention.launches,
            router=made.router,
            ffn=made.ffn * kernels.ffn.launches / MEASURED_LAYER.ffn.launches,
            adapter=made.adapter,
            adapter_backward=made.adapter_backward,
            backward=made.backward * kernels.backward.launches / MEASURED_LAYER.backward.launches,
        )

    def seconds_of(self, task: str) -> float:
        """Of a task of the gpu lane, by its name: ``adapter backward 3``."""
        seconds: float = getattr(self, "_".join(word for word in task.split()[:2] if word.isalpha()), 0.0)
        return seconds

    def of_layers(self, num_layers: int) -> float:
        """Of all layers' tasks, forward and backward; below layer 0 nothing needs a gradient."""
        forward = self.attention + self.router + self.ffn + self.adapter
        return num_layers * (forward + self.adapter_backward) + (num_layers - 1) * self.backward


@dataclass(frozen=True)
class KernelLaunchSeconds:
    """Of one kernel of a layer from which no rows travel: those of attention forward, of the whole layer backward."""

    forward: float
    backward: float

    @classmethod
    def of(cls, host: HostProfile, gpu: GpuProfile) -> Self | None:
        """None where nobody measured it."""
        attention, backward = host.launch_attention_seconds, host.launch_backward_seconds
        if attention is None or backward is None or gpu.shares_host_cores:
            return None
        return cls(
            forward=attention.value / MEASURED_LAYER.attention.launches,
            backward=backward.value / MEASURED_LAYER.backward.launches,
        )


def launch_seconds(request: Request, gpu: GpuProfile, host: HostProfile) -> LaunchSeconds | None:
    """Of a request's layers; None where nobody measured it."""
    if gpu.shares_host_cores:
        return None
    element_bytes = COMPUTE_DTYPE_BYTES[request.weights_dtype]
    return LaunchSeconds.of(
        host, layer_kernels(request.model, element_bytes=element_bytes, attention=request.attention)
    )
