"""What a decision's own step reserves: simulated event by event and replayed through the caching allocator.

The closed form of :mod:`meft.planner.memory.device` counts what is allocated; what the allocator holds for that depends
on the order in which blocks come and go. The runtime asks for the same sizes in every step, whatever rows are active,
so that its windows can be replayed until they change nothing any more: what is reserved by then is never exceeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from meft.planner.allocator.blocks import LARGE_SEGMENT_BYTES, SMALL_SEGMENT_BYTES
from meft.planner.allocator.caching import CachingAllocator, FreeLayout
from meft.planner.base.schema import Basis
from meft.planner.memory.traced import ledger_of_decision
from meft.planner.records.plan import Decision, Request
from meft.planner.records.profiles import GpuProfile
from meft.planner.terms.ledger import peak_bytes

if TYPE_CHECKING:
    from meft.planner.simulation.stream import StreamEvent
    from meft.planner.sparse.step import SparseStream

KNOWN_TENSOR_BY_TENSOR = ("llama", "qwen2", "qwen3", "mistral")
"""Model types whose simulated step is the emulated device's event by event (``tests/runtime/trace/test_sparse.py``);
Mistral with sdpa, whose eager mask is made in other steps."""
MARGIN_BYTES = LARGE_SEGMENT_BYTES + SMALL_SEGMENT_BYTES
"""What is added for other model types, where a tensor may live somewhat longer than in the simulated step: a segment of
either pool. Assumed; ``campaigns/budget.py`` says how it held."""
MOST_WINDOWS = 32
"""No stream has been seen that took more than a few until it left the allocator as it found it."""


@dataclass(frozen=True)
class ReplayedPeaks:
    """Peaks over all windows, in whole blocks and segments."""

    allocated_bytes: int
    reserved_bytes: int
    basis: Basis = "counted"


def replayed_peaks(request: Request, decision: Decision, gpu: GpuProfile) -> ReplayedPeaks:
    """Peaks of a run of ``decision`` on a card, from loading the model on; with a margin, and so assumed, where the
    simulated step does not know every tensor."""
    if request.model.measured is not None:
        return _as_traced(request, decision)
    peaks = _replayed(request, decision, gpu)
    model_type = request.model.model_type
    if request.shard_base and not gpu.shares_host_cores:  # no card has run it yet
        return ReplayedPeaks(peaks.allocated_bytes, peaks.reserved_bytes + MARGIN_BYTES, "assumed")
    if model_type in KNOWN_TENSOR_BY_TENSOR and (model_type, request.attention) != ("mistral", "eager"):
        return peaks
    return ReplayedPeaks(peaks.allocated_bytes, peaks.reserved_bytes + MARGIN_BYTES, "assumed")


def emulated_reserved_bytes(request: Request, decision: Decision) -> int:
    """What the same step reserves on the emulated device, whichever card it is for: it has no cuBLAS workspaces, and
    what else finds room beside them lies elsewhere there."""
    return _peaks(_without_what_is_no_matter(request), _that_matters(decision), 0, True).reserved_bytes


def _as_traced(request: Request, decision: Decision) -> ReplayedPeaks:
    """By the traced terms, with what the traced run reserved above them, and the margin."""
    terms = request.model.traced
    found = None if terms is None else terms.checkpointed if decision.activation_checkpointing else terms.plain
    counted = int(peak_bytes(ledger_of_decision(request, decision)))
    beyond = 0 if found is None else found.beyond_allocated
    return ReplayedPeaks(counted, counted + beyond + MARGIN_BYTES, "assumed")


def _replayed(request: Request, decision: Decision, gpu: GpuProfile) -> ReplayedPeaks:
    return _peaks(
        _without_what_is_no_matter(request),
        _that_matters(decision),
        int(gpu.workspace_bytes.value),
        gpu.shares_host_cores,
    )


def _that_matters(decision: Decision) -> Decision:
    """The decision with choices that move no device memory made equal."""
    return decision.model_copy(update={"top_k": 1, "bf16_copy": False, "hot_after_steps": 1, "gather_chunks": 1})


def _without_what_is_no_matter(request: Request) -> Request:
    """The request with fields that move no device memory made equal, so that it is replayed once for all of them."""
    from meft.planner.sparse.step import MICRO_BATCHES_THAT_DIFFER  # slow to load, and only a replay needs it

    asked: dict[str, Any] = {name: getattr(request, name) for name in _THAT_MATTER}
    asked["grad_accum"], asked["gpus"] = min(request.grad_accum, MICRO_BATCHES_THAT_DIFFER), request.base_shards
    nothing: dict[str, Any] = dict.fromkeys(("gpu", "host", "link", "sparsity"), "any")
    return Request.model_construct(**asked, **nothing, gpu_mem_bytes=1, host_mem_bytes=1, host_mem_basis="given")


_THAT_MATTER = (
    *("model", "batch_size", "seq_len", "weights_dtype", "double_quant", "adapter_dtype", "attention"),
    *("packed", "shard_base"),
)


@lru_cache(maxsize=512)
def _peaks(request: Request, decision: Decision, workspace_bytes: int, emulated: bool) -> ReplayedPeaks:
    from meft.planner.sparse.step import simulate_sparse

    stream = simulate_sparse(request, decision, workspace_bytes=workspace_bytes, emulated=emulated)
    return peaks_of(stream)


def peaks_of(stream: SparseStream) -> ReplayedPeaks:
    """Replay what is made once, and every kind of window until it changes nothing any more.

    The first kind's window has been in ``once``. What is live is the same after each window, so is what comes if free
    blocks are. From its middle on a window goes as the last one did if all blocks are where they were then: it need
    not be replayed to its end.
    """
    allocator = CachingAllocator(None)
    handles: dict[int, int] = {}
    at_middle, at_end = _played_once(stream, allocator, handles)
    for number, window in enumerate(stream.windows):
        half, is_last = len(window) // 2, number == len(stream.windows) - 1
        if number:
            at_middle = at_end = None
        for _ in range(MOST_WINDOWS):
            _play(window[:half], allocator, handles)
            middle = allocator.free_layout(), handles.copy()
            if middle == at_middle and is_last:
                break
            _play(window[half:], allocator, handles)
            before, at_middle, at_end = at_end, middle, allocator.free_layout()
            if before == at_end:
                break
    return ReplayedPeaks(allocator.peak_allocated_bytes, allocator.peak_reserved_bytes)


def _played_once(
    stream: SparseStream, allocator: CachingAllocator, handles: dict[int, int]
) -> tuple[tuple[FreeLayout, dict[int, int]] | None, FreeLayout | None]:
    """Replay what is made once; where blocks were in the middle of its window, and which were free at its end."""
    window = stream.windows[0]
    middle = stream.once.index(window[len(window) // 2]) if window else 0
    _play(stream.once[:middle], allocator, handles)
    at_middle = allocator.free_layout(), handles.copy()
    _play(stream.once[middle:], allocator, handles)
    return at_middle, allocator.free_layout()


def _play(events: Sequence[StreamEvent], allocator: CachingAllocator, handles: dict[int, int]) -> None:
    malloc, free, take = allocator.malloc, allocator.free, handles.pop
    for tensor, num_bytes, *_ in events:
        if num_bytes > 0:
            handles[tensor] = malloc(num_bytes)
        else:
            free(take(tensor))
