"""When no decision satisfies every limit: which one binds, by how much, and the nearest change with which one does.

The *nearest* decision is the one that exceeds the fewest limits, and among those the least, as a sum of shares of each
limit. What binds is the limit that it exceeds most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.errors import Binding, Infeasible
from meft.planner.base.quantities import Floats
from meft.planner.base.units import GIB, MIB, format_bytes, format_size_argument
from meft.planner.memory.budget import machine_bytes_for
from meft.planner.records.plan import Decision, Request
from meft.planner.records.profiles import GpuProfile
from meft.planner.search.space import why_not_owned, why_not_sharded

SHORTEST_SEQUENCE = 16
MORE_STEPS = 4
"""How many steps of a device budget are tried beyond what is allocated."""
FAR = 0.25
"""Share of a device budget: from 12 to 16 GB is another card."""
OPTIONS = {
    "gpu_mem_bytes": "--gpu-mem",
    "host_mem_bytes": "--host-mem",
    "max_slowdown": "--max-slowdown",
    "min_trainable_fraction": "--min-trainable",
    "batch_size": "--batch-size",
    "activation_checkpointing": "--activation-checkpointing",
    "seq_len": "--seq-len",
    "weights_dtype": "--weights-dtype",
    "adapter_dtype": "--adapter-dtype",
    "hot_rows": "--hot-rows",
    "rows_in_backward": "--rows-in-backward",
    "prefetch_depth": "--prefetch-depth",
    "routing": "--routing",
    "bf16_copy": "--bf16-copy",
    "top_k": "--top-k",
    "adapter_width": "--adapter-width",
    "rows": "--rows",
    "shard_base": "--shard-base",
}
"""Options of ``meft-plan`` by the request's field."""
_FLAGS = ("activation_checkpointing", "bf16_copy", "shard_base")
_FREED = (
    "hot_rows",
    "bf16_copy",
    "activation_checkpointing",
    "rows_in_backward",
    "prefetch_depth",
    "routing",
    "top_k",
    "adapter_width",
)
"""Choices that the request may have fixed, from the one that costs a user least to give up."""


@dataclass(frozen=True)
class Limit:
    """What a request allows, and what every decision needs: ``needed`` broadcasts to the grid of the search."""

    binding: Binding
    field: str
    """The request's field that sets it."""
    needed: NDArray[np.int64] | NDArray[np.float64]
    allowed: float
    at_least: bool = False

    def holds(self) -> NDArray[np.bool_]:
        """Where a decision keeps it."""
        return self.needed >= self.allowed if self.at_least else self.needed <= self.allowed

    def excess(self) -> Floats:
        """How far beyond the limit, as a share of it; 0 where it holds."""
        with np.errstate(divide="ignore"):
            ratio = self.allowed / self.needed if self.at_least else self.needed / self.allowed
        return np.where(self.holds(), 0.0, ratio - 1.0)


def explain(
    request: Request,
    limits: Sequence[Limit],
    is_new: NDArray[np.bool_],
    *,
    gpu: GpuProfile,
    best: Callable[[Request], Decision | None],
) -> Infeasible:
    """The verdict for limits that no decision keeps together.

    ``is_new`` marks the grid's candidates; ``best`` searches again for a changed request.
    """
    shape = np.broadcast_shapes(is_new.shape, *(limit.needed.shape for limit in limits))
    excesses = [np.broadcast_to(limit.excess(), shape) for limit in limits]
    exceeded_limits = np.where(is_new, sum((excess > 0).astype(np.int64) for excess in excesses), len(limits) + 1)
    fewest = exceeded_limits == exceeded_limits.min()
    nearest = np.unravel_index(int(np.where(fewest, sum(excesses), math.inf).argmin()), shape)
    exceeded = [
        (limit, float(excess[nearest]), _at(limit, nearest, shape))
        for limit, excess in zip(limits, excesses, strict=True)
        if excess[nearest] > 0
    ]
    exceeded.sort(key=lambda entry: -entry[1])
    binding, _, needed = exceeded[0]
    return Infeasible(
        binding=binding.binding,
        needed=needed,
        limit=binding.allowed,
        message="; and ".join(_message(limit, needed) for limit, _, needed in exceeded),
        suggestion=_nearest_change(request, {limit.field: needed for limit, _, needed in exceeded}, gpu, best),
    )


def explain_reserved(
    request: Request, needed_bytes: int, *, gpu: GpuProfile, best: Callable[[Request], Decision | None]
) -> Infeasible:
    """The verdict where decisions allocate what the device has, but the nearest's allocator must hold more."""
    limit = Limit("device memory", "gpu_mem_bytes", np.asarray(needed_bytes), request.gpu_mem_bytes)
    return Infeasible(
        binding=limit.binding,
        needed=needed_bytes,
        limit=limit.allowed,
        message=_message(limit, needed_bytes),
        suggestion=_nearest_change(request, {limit.field: needed_bytes}, gpu, best),
    )


def _at(limit: Limit, index: tuple[Any, ...], shape: tuple[int, ...]) -> float:
    value: float = np.broadcast_to(limit.needed, shape)[index].item()
    return value


def _message(limit: Limit, needed: float) -> str:
    option, allowed = OPTIONS[limit.field], limit.allowed
    if limit.binding == "slowdown":
        return f"slowdown: the nearest takes {needed:.3f} times its baseline, the limit is {allowed:.3f} ({option})"
    if limit.binding == "trainable share":
        return f"trainable share: the nearest trains {needed:.2%} of the model, the least is {allowed:.2%} ({option})"
    sizes = f"{format_bytes(needed)}, {format_bytes(needed - allowed)} more than {format_bytes(allowed)}"
    of_it = " less what all else needs" if limit.field == "host_mem_bytes" else ""
    return f"{limit.binding}: the nearest needs {sizes} ({option}{of_it})"


# --- the nearest change ----------------------------------------------------------------------------------------------


def _nearest_change(
    request: Request, needs: dict[str, float], gpu: GpuProfile, best: Callable[[Request], Decision | None]
) -> dict[str, str]:
    """The first change of :func:`_changes` with which a plan exists, as options."""
    for changed in _changes(request, needs, gpu):
        decision = best(changed)
        if decision is not None:
            return _options(request, changed, decision)
    return {}


def _changes(request: Request, needs: dict[str, float], gpu: GpuProfile) -> Iterator[Request]:
    """Changed requests, the nearest first: each machine with its part of the rows, each card with its part of the base,
    the budgets raised by what is missing, a smaller batch, checkpointing, fewer tokens, fixed choices left open,
    smaller weights, and several of these together.

    Budgets come last where the host's is this machine's own, or the device's would grow by more than :data:`FAR`: that
    is another card.
    """
    raised = _raised(request, needs, gpu)
    more = [] if raised is None else _somewhat_more(raised, request, gpu)
    far = raised is not None and raised.gpu_mem_bytes > (1 + FAR) * request.gpu_mem_bytes
    if "host_mem_bytes" in needs and request.nodes > 1 and request.rows == "replicated" and not why_not_owned(request):
        yield request.model_copy(update={"rows": "owned"})
    if "gpu_mem_bytes" in needs and request.gpus > 1 and not request.shard_base and not why_not_sharded(request):
        yield request.model_copy(update={"shard_base": True})
    last = far or (request.host_mem_basis == "this machine" and "host_mem_bytes" in needs)
    if raised and not last:
        yield from (raised, *more)
    for batch_size in _halvings(request.batch_size, 1):
        yield request.model_copy(update={"batch_size": batch_size})
    if request.activation_checkpointing is False:
        yield request.model_copy(update={"activation_checkpointing": None})
    for seq_len in _halvings(request.seq_len, SHORTEST_SEQUENCE):
        yield request.model_copy(update={"seq_len": seq_len})
    for name in _FREED:
        # options that go with no other routing
        said_more = name == "routing" and (request.switch is not None or request.stable is not None)
        if getattr(request, name) is not None and not said_more:
            yield request.model_copy(update={name: None})
    yield from _combined(request, gpu)
    if raised and last:
        yield from (raised, *more)


def _combined(request: Request, gpu: GpuProfile) -> Iterator[Request]:
    """Smaller weights, then one sequence at a time with checkpointing, whole or down to a quarter, then both."""
    lighter = [request.model_copy(update=update) for update in _lighter_weights(request, gpu)]
    yield from lighter
    for start in (request, *lighter):
        one = start.model_copy(update={"batch_size": 1, "activation_checkpointing": None})
        shorter = _halvings(request.seq_len, max(request.seq_len // 4, SHORTEST_SEQUENCE))
        for seq_len in (request.seq_len, *shorter):
            yield one.model_copy(update={"seq_len": seq_len})


def _raised(request: Request, needs: dict[str, float], gpu: GpuProfile) -> Request | None:
    """The request with every exceeded budget raised, a card's up to what it has; None where there is no more."""
    update: dict[str, float] = {name: _rounded(name, needed) for name, needed in needs.items()}
    if "gpu_mem_bytes" in update:
        wanted, total = update["gpu_mem_bytes"], gpu.memory_total_bytes
        if total is not None:
            update["gpu_mem_bytes"] = min(wanted, int(total.value))
        elif request.host_mem_basis == "this machine":
            # The emulated device lives in the same memory: what it gets is the host's no more.
            left = request.host_mem_bytes - (wanted - request.gpu_mem_bytes)
            if left <= 0 or "host_mem_bytes" in needs:
                return None
            update["host_mem_bytes"] = left
    return request.model_copy(update=update)


def _somewhat_more(raised: Request, request: Request, gpu: GpuProfile) -> Iterator[Request]:
    """With some steps more for the device than what is allocated needs: what the allocator reserves for it."""
    for _ in range(MORE_STEPS if raised.gpu_mem_bytes > request.gpu_mem_bytes else 0):
        more = _raised(request, {"gpu_mem_bytes": raised.gpu_mem_bytes + 1}, gpu)
        if more is None or more.gpu_mem_bytes <= raised.gpu_mem_bytes:
            return
        raised = raised.model_copy(update={"gpu_mem_bytes": more.gpu_mem_bytes, "host_mem_bytes": more.host_mem_bytes})
        yield raised


def _rounded(name: str, needed: float) -> float:
    """A budget that one would type, no less generous than what is needed; of the host it is the machine's RAM."""
    if name == "host_mem_bytes":
        needed = machine_bytes_for(int(needed))
    if name == "max_slowdown":
        return math.ceil(needed * 100) / 100
    if name == "min_trainable_fraction":
        return math.floor(needed * 1000) / 1000
    step = GIB if needed >= 8 * GIB else GIB // 4 if needed >= GIB else 16 * MIB
    return -(-int(needed) // step) * step


def _halvings(number: int, least: int) -> Iterator[int]:
    while number // 2 >= least:
        number //= 2
        yield number


def _lighter_weights(request: Request, gpu: GpuProfile) -> Iterator[dict[str, Any]]:
    """Frozen weights in fewer bits; 4-bit weights need a CUDA device."""
    if request.weights_dtype == "fp32":
        yield {"weights_dtype": "bf16"}
    as_it_is = request.model.stored is not None or request.model.measured is not None  # stored so, or traced so
    if request.weights_dtype != "nf4" and not as_it_is and not gpu.shares_host_cores:
        yield {"weights_dtype": "nf4"}


def _options(request: Request, changed: Request, decision: Decision) -> dict[str, str]:
    """The options that turn one request into the other; a choice left open is given as the search made it."""
    options: dict[str, str] = {}
    for name, option in OPTIONS.items():
        before, after = getattr(request, name), getattr(changed, name)
        if before == after or (
            name == "host_mem_bytes" and request.host_mem_basis == "this machine" and after < before
        ):
            continue
        value = getattr(decision, name) if after is None else after
        if name in _FLAGS:
            options[option if value else f"--no-{option[2:]}"] = ""
        elif name.endswith("_bytes"):
            options[option] = format_size_argument(int(value))
        else:
            options[option] = str(value)
    if "--weights-dtype" in options:
        options["--adapter-dtype"] = request.adapter_dtype  # whose default depends on the weights
    return options
