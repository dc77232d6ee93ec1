"""CPU offload as people know it, for ``benchmarks/step.py``: torch's FSDP2, and why others cannot run here.

FSDP2 (``fully_shard`` with ``CPUOffloadPolicy``) with one rank over gloo: each adapter's parameters live on the host
in fp32 with gradients and optimizer state, are gathered whole before the adapter's forward and again before its
backward, and gradients are added up on the host. On a build for CPUs the device is the host: gathering, reducing and
adding are real, no link is crossed, and none is counted or throttled.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

if TYPE_CHECKING:
    from meft.runtime.data.examples import Batch


class Sharded:
    """FSDP2 over ``adapters``, modules beside a frozen ``model``'s FFNs, and AdamW on what it keeps on the host."""

    def __init__(
        self, model: torch.nn.Module, adapters: list[torch.nn.Module], batches: list[Batch], *, learning_rate: float
    ) -> None:
        self.model, self.batches, self.adapters = model, batches, adapters
        self.owns_group = not dist.is_initialized()
        if self.owns_group:
            dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        mesh = init_device_mesh("cpu", (1,))
        for adapter in adapters:
            fully_shard(adapter, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
        parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, foreach=False)

    def window(self) -> None:
        """One accumulation window with its optimizer step."""
        for batch in self.batches:
            loss = self.model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
            (loss / len(self.batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def busy_seconds(self) -> dict[str, float]:
        """Nothing is told of lanes."""
        return {}

    def moved_bytes(self) -> int:
        """No link is crossed."""
        return 0

    def close(self) -> None:
        """Leave the group of one."""
        if self.owns_group:
            dist.destroy_process_group()


def unable() -> dict[str, str]:
    """What cannot be measured here, each with the reason: found by trying, where it can be tried."""
    reasons = {
        "torchao, CPUOffloadOptimizer": _why_not_torchao(),
        "DeepSpeed, ZeRO-Offload": _why_not_deepspeed(),
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _why_not_torchao() -> str:
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed (0.18.0 accepts CUDA and XPU alone)"
    from torchao.optim import CPUOffloadOptimizer

    try:
        CPUOffloadOptimizer([torch.nn.Parameter(torch.zeros(64, 128))], torch.optim.AdamW)
    except (AssertionError, RuntimeError) as error:
        return f"it refuses this build of torch: {error}"
    return "it runs on this build, for which there is no row yet"


def _why_not_deepspeed() -> str:
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed: no part of this project's environment"
    return "it is installed, for which there is no row yet"
