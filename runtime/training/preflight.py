"""Preflight: can this machine run the plan? All that stands in the way, told at once, before anything is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from meft.planner.base.errors import MachineError
from meft.planner.base.packages import INSTALL
from meft.planner.base.units import format_bytes
from meft.planner.memory.machine import available_memory_bytes
from meft.planner.models.stored import StoredWeights
from meft.planner.records.plan import Plan
from meft.runtime.session.model_loading import STORED_PACKAGES

PER_RANK = ("_staging", "_landing", "cache_index", "gradient_rows", "network_buffers", "router_means")
"""How the names of those host entries end that every rank has of its own."""
DIVIDED = {
    "adapter_weights",
    "adapter_moments",
    "adapter_gradients",
    "adapter_bf16_copy",
    "step_counts",
    "touched_flags",
}
"""Host entries of which each machine has its part where machines own rows."""
EMULATED = "emulated"
"""Key of the emulated device's profile."""


def for_emulated_device(plan: Plan) -> bool:
    """Whether a plan is for the emulated device and not for a card, by name or by the profile that was read."""
    profiles = (used.name for used in plan.inputs.profiles if used.kind == "gpu")
    return EMULATED in (plan.request.gpu, *profiles)


@dataclass(frozen=True)
class Machine:
    """What the checks look at; tests make their own."""

    available_host_bytes: int
    cuda_total_bytes: int | None
    """Memory of the CUDA device, None where there is none."""
    supports_bf16: bool
    packages: frozenset[str]
    cuda_free_bytes: int | None = None
    """Of it, what no program holds now; None where nobody asked."""

    @classmethod
    def here(cls) -> Machine:
        """This machine."""
        cuda = torch.cuda.is_available()
        free, total = torch.cuda.mem_get_info() if cuda else (None, None)
        optional = {"bitsandbytes", "flash_attn"}.union(*STORED_PACKAGES.values())
        return cls(
            available_host_bytes=available_memory_bytes(),
            cuda_total_bytes=total,
            cuda_free_bytes=free,
            supports_bf16=torch.cuda.is_bf16_supported(including_emulation=False) if cuda else True,
            packages=frozenset(name for name in optional if importlib.util.find_spec(name) is not None),
        )


def check(
    plan: Plan,
    machine: Machine,
    *,
    device_kind: str,
    budget_bytes: int,
    ranks: int = 1,
    machines: int = 1,
    converted_bytes: int = 0,
) -> list[str]:
    """Return the notes a user should see; raise :class:`MachineError` naming every problem if there is one.

    ``machines`` train, each with ``ranks``. ``converted_bytes`` are those of the model's weights that are in host
    memory while it is loaded.
    """
    problems = [
        *_host_problems(plan, machine, device_kind, ranks, machines),
        *_loading_problems(machine, device_kind, ranks * converted_bytes),
        *_device_problems(plan, machine, device_kind, budget_bytes),
    ]
    if problems:
        raise MachineError("this machine cannot run the plan: " + "; ".join(problems))
    return _notes(plan, budget_bytes)


def _host_problems(plan: Plan, machine: Machine, device_kind: str, ranks: int, machines: int) -> list[str]:
    needed = _host_bytes(plan, ranks) + _more_owned_bytes(plan, machines)
    what = "the adapter's home"
    if device_kind == "emulated":
        needed += ranks * plan.prediction.device_memory.peak_allocated_bytes
        what += " and the emulated device" if ranks == 1 else f" and {ranks} emulated devices"
    if needed <= machine.available_host_bytes:
        return []
    return [
        f"host memory: {format_bytes(needed)} are needed for {what}, {format_bytes(machine.available_host_bytes)} are "
        f"available; close other programs or plan again with a smaller --host-mem"
    ]


def _loading_problems(machine: Machine, device_kind: str, needed: int) -> list[str]:
    """On the emulated device the model stays in host memory, and is counted there."""
    if device_kind == "emulated" or needed <= machine.available_host_bytes:
        return []
    return [
        f"host memory: {format_bytes(needed)} are needed while the model is loaded, as its files are in another dtype "
        f"than the plan's, {format_bytes(machine.available_host_bytes)} are available; close other programs, or save "
        f"the model in the plan's dtype"
    ]


def _host_bytes(plan: Plan, ranks: int) -> int:
    """What the plan says for as many ranks as it is for; of others each has as much staging, and the tables are one.

    With what a checkpoint needs besides.
    """
    planned, memory = plan.request.gpus, plan.prediction.host_memory
    staging = sum(entry.num_bytes for entry in memory.entries if entry.category.endswith(PER_RANK))
    all_along = memory.total_bytes - staging + staging // planned * ranks
    peaks = {} if memory.machine is None else {peak.phase: peak.num_bytes for peak in memory.machine.peaks}
    return all_along + max(0, peaks.get("checkpoint", 0) - memory.total_bytes)


def _more_owned_bytes(plan: Plan, machines: int) -> int:
    """Of tables that machines divide, what fewer of them have more than each was planned to have."""
    if plan.decision.rows == "replicated":
        return 0
    tables = sum(entry.num_bytes for entry in plan.prediction.host_memory.entries if entry.category in DIVIDED)
    return tables * plan.request.nodes // machines - tables


def _device_problems(plan: Plan, machine: Machine, device_kind: str, budget_bytes: int) -> list[str]:
    request, problems = plan.request, []
    if device_kind == "cuda":
        if machine.cuda_total_bytes is None:
            problems.append("--device cuda: torch sees no CUDA device here; use --device emulated, or install a GPU")
        elif budget_bytes > machine.cuda_total_bytes:
            problems.append(
                f"device memory: the plan's budget is {format_bytes(budget_bytes)}, the GPU has "
                f"{format_bytes(machine.cuda_total_bytes)}; plan again with a smaller --gpu-mem"
            )
        elif machine.cuda_free_bytes is not None and budget_bytes > machine.cuda_free_bytes:
            problems.append(_shared_card(machine.cuda_total_bytes, machine.cuda_free_bytes, budget_bytes))
        if "bf16" in (request.weights_dtype, request.adapter_dtype) and not machine.supports_bf16:
            problems.append(
                "bf16: this GPU has no units for it (torch emulates it, many times slower); plan again with fp32 "
                "weights and adapter"
            )
    stored = request.model.stored
    if stored is not None:
        problems += _stored_problems(stored, machine, device_kind)
    elif request.weights_dtype == "nf4" and "bitsandbytes" not in machine.packages:
        problems.append("nf4 weights: they need the package bitsandbytes; install: pip install bitsandbytes")
    if request.weights_dtype in ("int8", "fp16") and stored is None:
        problems.append(f"{request.weights_dtype} weights: the runtime trains beside fp32, bf16 or nf4; plan again")
    if request.attention == "flash" and (device_kind != "cuda" or "flash_attn" not in machine.packages):
        problems.append(
            "attention flash: it needs a CUDA device and the package flash-attn; plan with --attention sdpa"
        )
    return problems


def _stored_problems(stored: StoredWeights, machine: Machine, device_kind: str) -> list[str]:
    """bitsandbytes' 4 bits run on the CPU too; all others have kernels for CUDA alone."""
    missing = [name for name in STORED_PACKAGES[stored.method] if name not in machine.packages]
    problems = []
    if device_kind != "cuda" and stored.method != "bitsandbytes-4bit":
        problems.append(f"weights stored as {stored.title}: they need a CUDA device")
    if missing:
        commands = " && ".join(INSTALL[name] for name in missing)
        problems.append(f"weights stored as {stored.title}: {' and '.join(missing)} missing; install: {commands}")
    return problems


def _shared_card(total_bytes: int, free_bytes: int, budget_bytes: int) -> str:
    """The card would hold the budget were it ours alone."""
    return (
        f"device memory: the card is shared: of {format_bytes(total_bytes)}, other programs and the CUDA context hold "
        f"{format_bytes(total_bytes - free_bytes)}, and {format_bytes(free_bytes)} are free for the plan's "
        f"{format_bytes(budget_bytes)}; close what else uses the GPU (nvidia-smi lists it), or plan again with a "
        f"smaller --gpu-mem"
    )


def _notes(plan: Plan, budget_bytes: int) -> list[str]:
    peak = plan.prediction.device_memory.peak_allocated_bytes
    if peak <= budget_bytes:
        return []
    return [
        f"the budget of {format_bytes(budget_bytes)} is below the predicted peak of {format_bytes(peak)}: "
        f"expect a device out-of-memory error"
    ]
