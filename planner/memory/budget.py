"""What of a machine's RAM a plan may use, and what its run takes of it at most, phase by phase.

Letters: ``L`` layers, ``D`` hidden size, ``N`` experts.
"""

from __future__ import annotations

from meft.planner.base.quantities import COMPUTE_DTYPE_BYTES
from meft.planner.base.units import GIB
from meft.planner.records.plan import Decision, HostBudget, HostPeak, Request
from meft.planner.terms.adapter import router_weights_bytes
from meft.planner.terms.weights import linear_weights_bytes

RESERVE_BYTES = 2 * GIB
RESERVE_PART = 10
"""One part in so many of a machine's RAM, at least :data:`RESERVE_BYTES` and never more than half, is left to all else:
what firmware and kernel keep for themselves (a machine of 64 GiB shows about 62.5), the system and other programs,
Python with torch (0.4 GiB on a CPU), data, and copies that a checkpoint makes. Assumed."""
_ROUTER_COPIES = 3
"""A router and its two moments, which a checkpoint brings from the device all at once."""


def reserve_bytes(machine_bytes: int) -> int:
    """Of a machine's RAM, what the plan leaves to all else."""
    return min(max(RESERVE_BYTES, machine_bytes // RESERVE_PART), machine_bytes // 2)


def host_budget_bytes(request: Request) -> int:
    """What the plan may use of the machine's RAM: without the reserve."""
    return request.host_mem_bytes - reserve_bytes(request.host_mem_bytes)


def machine_bytes_for(budget_bytes: int) -> int:
    """RAM that leaves a plan so much, and hardly more: the inverse of what :func:`host_budget_bytes` does."""
    without_part = -(-budget_bytes * RESERVE_PART // (RESERVE_PART - 1))
    return min(max(budget_bytes + RESERVE_BYTES, without_part), 2 * budget_bytes)


def host_budget(request: Request, decision: Decision, *, total_bytes: int, on_card: bool) -> HostBudget:
    """The budget, and the peaks of a run whose tables and buffers take ``total_bytes``.

    On the emulated device (not ``on_card``) the model and the routers are the device's memory, wherever they lie.
    """
    peaks = [HostPeak(phase="training", num_bytes=total_bytes, because="tables and buffers, all the time")]
    if on_card:
        peaks.insert(0, _loading(request))
    peaks.append(_checkpoint(request, decision, total_bytes, on_card=on_card))
    served = "tokens meet the rows where they lie"
    return HostBudget(
        machine_bytes=request.host_mem_bytes,
        reserve_bytes=reserve_bytes(request.host_mem_bytes),
        budget_bytes=host_budget_bytes(request),
        peaks=(
            *peaks,
            HostPeak(phase="resume", num_bytes=total_bytes, because="files are mapped, and copied into the tables"),
            HostPeak(phase="evaluation", num_bytes=total_bytes, because=f"{served}; caches are the device's"),
        ),
    )


def _loading(request: Request) -> HostPeak:
    """Files are mapped, not read; a tensor of another dtype than the plan's is converted, and that is memory of ours
    until the model is on the device. Weights that are quantized on loading go there one by one."""
    if request.shard_base and request.weights_dtype == "nf4":
        of_one = linear_weights_bytes(request.model, dtype="nf4", double_quant=request.double_quant)
        because = "before the tables are made: each rank quantizes all of the base, of which it keeps its part"
        return HostPeak(phase="loading", num_bytes=request.gpus * of_one, because=because)
    dtype_bytes = 0 if request.weights_dtype == "nf4" else COMPUTE_DTYPE_BYTES.get(request.weights_dtype, 0)
    num_bytes = 0 if request.model.stored is not None else request.model.num_parameters * dtype_bytes
    because = f"before the tables are made: the model, if its files are not in {request.weights_dtype} and mapped"
    if not num_bytes:
        because = "before the tables are made: files are mapped, and quantized weights go to the device one by one"
    return HostPeak(phase="loading", num_bytes=num_bytes, because=because)


def _checkpoint(request: Request, decision: Decision, total_bytes: int, *, on_card: bool) -> HostPeak:
    shape = request.model
    copies = (
        on_card
        * _ROUTER_COPIES
        * router_weights_bytes(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_experts=decision.needs.router_rows(decision.num_experts),
            key_experts=decision.needs.gated,
        )
    )
    because = "written from the tables as they lie" + ("; routers and their moments are brought here" if copies else "")
    return HostPeak(phase="checkpoint", num_bytes=total_bytes + int(copies), because=because)
