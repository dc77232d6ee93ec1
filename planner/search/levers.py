"""What one change alone would save of a plan: each is predicted by the models of the plan itself, all else as it is.

A change of width, batch or sequence length brings another number of active rows, and the cap keeps its share above
them. Planning anew with such an option would go further: the planner spends what is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from meft.planner.base.schema import Record
from meft.planner.memory.budget import host_budget_bytes
from meft.planner.memory.device import counted_bytes
from meft.planner.memory.replayed import replayed_peaks
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import Decision, Prediction, Request
from meft.planner.traffic.sparsity import expected_active_rows

SHORTEST_SEQUENCE = 32
LARGEST_BATCH = 64
"""Sequences: no larger batch is proposed."""
LARGER_PAYS = 0.02
"""A larger batch is proposed where it trains faster by this share."""


class Lever(Record):
    """One change, and what comes of it: differences to the plan, negative for what is saved."""

    change: str
    option: str
    """What to give ``meft-plan`` for it."""
    device_bytes: int
    """Of what is reserved with all layers' active rows at the cap."""
    host_bytes: int
    tokens_per_second_ratio: float
    trainable_fraction: float
    """Not a difference: the share of the model that is trained then."""
    fits: bool

    @property
    def saves(self) -> bool:
        """Whether it is worth telling: memory saved, or time."""
        return min(self.device_bytes, self.host_bytes) < 0 or self.tokens_per_second_ratio > 1.0


def levers(request: Request, decision: Decision, prediction: Prediction, profiles: ProfileSet) -> tuple[Lever, ...]:
    """Every change that saves something: first what trains faster in device memory that is left over, then the one that
    saves most of it; those that do not fit last."""
    found = [
        _lever(change, option, _predicted(changed, tried, profiles, prediction), prediction, changed)
        for change, option, changed, tried in _changes(request, decision, profiles)
    ]
    saving = [lever for lever in found if lever.saves]
    return tuple(sorted(saving, key=_worth_telling))


def _worth_telling(lever: Lever) -> tuple[bool, bool, int, int]:
    return not lever.fits, lever.device_bytes <= 0, lever.device_bytes, lever.host_bytes


def reserved_at_most(prediction: Prediction) -> int:
    """Reserved with every layer's active rows at the cap, which is what the search keeps within the budget."""
    memory = prediction.device_memory
    return memory.peak_reserved_bytes_at_cap or memory.peak_reserved_bytes


def _predicted(request: Request, decision: Decision, profiles: ProfileSet, before: Prediction) -> Prediction:
    """What is predicted with a change. One that takes more of the device is replayed, as whether it fits may depend on
    it; of the others the allocator is taken to hold as much beyond what is allocated as it does for the plan."""
    counted = predict(request, decision, profiles, replayed=False)
    own = before.device_memory
    unused_bytes = own.peak_reserved_bytes - own.peak_allocated_bytes
    reserved = counted.device_memory.peak_reserved_bytes + unused_bytes
    if reserved > own.peak_reserved_bytes:
        return predict(request, decision, profiles)
    memory = counted.device_memory.model_copy(
        update={"peak_reserved_bytes": reserved, "peak_reserved_bytes_at_cap": reserved}
    )
    return counted.model_copy(update={"device_memory": memory})


def _lever(change: str, option: str, after: Prediction, before: Prediction, request: Request) -> Lever:
    reserved = reserved_at_most(after)
    on_host = after.host_memory.total_bytes
    return Lever(
        change=change,
        option=option,
        device_bytes=reserved - reserved_at_most(before),
        host_bytes=on_host - before.host_memory.total_bytes,
        tokens_per_second_ratio=after.timing.tokens_per_second / before.timing.tokens_per_second,
        trainable_fraction=after.trainable_fraction,
        fits=reserved <= after.device_memory.allocator_budget_bytes and on_host <= host_budget_bytes(request),
    )


def _changes(
    request: Request, decision: Decision, profiles: ProfileSet
) -> Iterator[tuple[str, str, Request, Decision]]:
    """What is changed, its option, and the request and decision with it."""
    if decision.activation_checkpointing:
        plain = _decided(decision, activation_checkpointing=False)
        yield "no checkpointing", "--no-activation-checkpointing", request, plain
    else:
        checkpointed = _decided(decision, activation_checkpointing=True)
        yield "checkpointing", "--activation-checkpointing", request, checkpointed
    width = _half_width(decision)
    if width is not None:
        narrow = _decided(decision, **_of_width(decision, width))
        yield f"width {width:,}", f"--adapter-width {width}", request, _recapped(request, request, narrow, profiles)
    as_it_is = request.model.stored is not None or request.model.measured is not None  # stored so, or traced so
    if request.weights_dtype != "nf4" and not as_it_is and not profiles.gpu.shares_host_cores:
        lighter = request.model_copy(update={"weights_dtype": "nf4"})
        kept = "" if request.adapter_dtype == "bf16" else f" --adapter-dtype {request.adapter_dtype}"
        yield "4-bit weights", f"--weights-dtype nf4{kept}", lighter, decision
    yield from _smaller_batches(request, decision, profiles)
    yield from _larger_batch(request, decision, profiles)
    if decision.rows_in_backward == "retained":
        refetched = _decided(decision, rows_in_backward="refetched")
        yield "fetch rows twice", "--rows-in-backward refetched", request, refetched
    if request.nodes > 1 and request.rows == "replicated" and _owns(request, decision):
        owned = request.model_copy(update={"rows": "owned"})
        yield "rows owned", "--rows owned", owned, _decided(decision, rows="owned", gather_chunks=1)
    if decision.bf16_copy:
        yield "no bf16 copy", "--no-bf16-copy", request, _decided(decision, bf16_copy=False)


def _owns(request: Request, decision: Decision) -> bool:
    """Whether each machine can have its part of the rows, whole experts of them."""
    return decision.needs.in_experts and not decision.num_experts % request.nodes and not decision.hot_rows


def _smaller_batches(
    request: Request, decision: Decision, profiles: ProfileSet
) -> Iterator[tuple[str, str, Request, Decision]]:
    """Half the sequences at a time, or half of the one."""
    name, title = ("batch_size", "batch") if request.batch_size > 1 else ("seq_len", "sequence")
    half = getattr(request, name) // 2
    if name == "seq_len" and half < SHORTEST_SEQUENCE:
        return
    changed = request.model_copy(update={name: half})
    option = f"--{name.replace('_', '-')} {half}"
    yield f"{title} {half:,}", option, changed, _recapped(request, changed, decision, profiles)


def _larger_batch(
    request: Request, decision: Decision, profiles: ProfileSet
) -> Iterator[tuple[str, str, Request, Decision]]:
    """Of the sequences doubled, and doubled again, what trains fastest in device memory that is left over, where that
    is faster by :data:`LARGER_PAYS`: a step was too short then to hide what the host does. None where the planner chose
    the batch size."""
    if request.batch_size_basis == "planned":
        return
    found: list[tuple[float, Request, Decision]] = []
    most_bytes = request.gpu_mem_bytes - profiles.gpu.context.high_bytes
    for size in _doublings(request.batch_size):
        changed = request.model_copy(update={"batch_size": size})
        tried = _recapped(request, changed, decision, profiles)
        if counted_bytes(request=changed, decision=tried, gpu=profiles.gpu) > most_bytes:
            break
        found.append((_tokens_per_second(changed, tried, profiles), changed, tried))
    enough = (1 + LARGER_PAYS) * _tokens_per_second(request, decision, profiles) if found else 0.0
    for speed, changed, tried in sorted(found, key=lambda each: -each[0]):
        if speed < enough:
            return
        if replayed_peaks(changed, tried, profiles.gpu).reserved_bytes <= most_bytes:
            yield f"batch {changed.batch_size:,}", f"--batch-size {changed.batch_size}", changed, tried
            return


def _doublings(batch_size: int) -> Iterator[int]:
    while batch_size * 2 <= LARGEST_BATCH:
        batch_size *= 2
        yield batch_size


def _tokens_per_second(request: Request, decision: Decision, profiles: ProfileSet) -> float:
    return predict(request, decision, profiles, replayed=False).timing.tokens_per_second


def _decided(decision: Decision, **update: Any) -> Decision:
    return Decision.model_validate(decision.model_dump() | update)


def _half_width(decision: Decision) -> int | None:
    """Half the rows, of as many experts; None where they would be fewer than a token chooses from."""
    rows = decision.adapter_width // decision.num_experts // 2
    width = rows * decision.num_experts
    enough = width >= decision.top_k and decision.num_probes * rows >= decision.top_k
    return width if enough else None


def _of_width(decision: Decision, width: int) -> dict[str, Any]:
    """What goes with a smaller width: caches and hot rows take the same share of it."""
    share = width / decision.adapter_width
    cached = int(decision.cached_rows * share)
    return {
        "adapter_width": width,
        "active_rows_cap": min(decision.active_rows_cap, width),
        "cached_rows": cached,
        "hot_rows": int(decision.hot_rows * share),
        "gradients_on_device": decision.gradients_on_device and cached > 0,
    }


def _recapped(before: Request, after: Request, decision: Decision, profiles: ProfileSet) -> Decision:
    """The decision with a cap as far above the rows that are expected after the change as it was before."""
    rows_before, rows_after = (
        int(expected_active_rows(profiles.sparsity, request=request, decision=decision).max())
        for request in (before, after)
    )
    cap = -(-decision.active_rows_cap * rows_after // rows_before)
    return _decided(decision, active_rows_cap=min(max(cap, decision.top_k), decision.adapter_width))
