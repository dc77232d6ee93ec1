"""The decisions that a search weighs, as a grid of arrays.

The grid's axes are, in this order, *cache* (how many rows stay on the device through a window, and whether their
gradients are summed there), prefetch depth, activation checkpointing, rows retained or refetched, active-rows
cap, and *routing*: a list of every adapter width with each top-K, each number of experts and of probes. What depends on
a few of the choices is computed along their axes alone and meets the rest by broadcasting.

What the request fixes restricts the grid to it, whether or not it lies on the steps tried otherwise. Budgets and limits
do not shape the grid: a larger budget weighs the same decisions. The objective ``traffic`` has finer steps of caches.

Whether the host keeps a bf16 copy of the rows is no axis: wherever it is open, a copy that pays is taken.

Letters: ``T`` tokens, ``L`` layers, ``D`` hidden size, ``R`` adapter rows per layer, ``K`` rows per token, ``A`` active
rows, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.errors import UsageError
from meft.planner.base.quantities import Ints, chunk_tokens
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Decision, Request, RowsInBackward, RowsPolicy, TokensSee
from meft.planner.records.profiles import SparsityProfile
from meft.planner.records.routing import ROUTINGS, Routing, StableOptions, SwitchOptions
from meft.planner.traffic.sparsity import (
    active_rows_per_layer,
    at_seq_len,
    distinct_layers,
    highest_active_rows,
    prefetch_recall,
    spread_at,
)

WIDTHS_PER_HIDDEN_SIZE = 4
"""Widths go up to ``4D``, twice the paper's widest (8464 for D = 4096); wider adapters can be asked for by width."""
WIDTH_STEP = 128
"""Between widths; finer for small models, coarser where there would be 256 widths or more."""
TOP_KS = (16, 32, 48, 64, 96, 128, 192, 256)
"""The paper's Figure 6 at width 4096: exact match 0.387 at K = 4, 0.391 to 0.425 from 16 up; fewer are for who asks."""
EXPERTS_PER_ROOT = (0.5, 1.0, 2.0, 4.0)
"""``N / sqrt(R)``: scoring ``N`` experts and then ``P * R/N`` rows costs least at ``sqrt(P)``, and routers take less
memory the fewer experts there are. 4 is what most of the paper's configurations have."""
PROBES = (4, 8, 16)
"""Most of the paper's configurations have 8."""
PROBED_ROWS_PER_TOP_K = 2
"""Were there only ``K`` rows in the probed experts, the router alone would choose and the keys' scores nothing."""
CAP_MULTIPLES = (1.0, 1.25, 1.5)
"""Caps over the most rows that a batch is expected to activate; the whole width, where nothing drops, comes too."""

ROWS_IN_BACKWARD: tuple[RowsInBackward, ...] = ("refetched", "retained")

CACHES: tuple[tuple[float, bool], ...] = ((0.0, False), (1.0, False), (0.25, True), (0.5, True), (1.0, True))
"""Rows cached, over the most that a window is expected to activate in a layer; and whether their gradients are summed
on the device, which takes three times the memory and saves as much traffic again."""
TRAFFIC_CACHES: tuple[tuple[float, bool], ...] = (
    *CACHES[:2],
    *((eighths / 8, True) for eighths in range(1, 9)),
)
"""For the objective ``traffic``: each row kept is one that stays off the link, so memory is used to the last eighth."""

CHECKPOINTING_AXIS = 2
CAP_AXIS = 4
NUM_AXES = 6


@dataclass(frozen=True, eq=False, repr=False)
class Space:
    """The grid. Arrays are ``[routings]`` unless stated; ``caps`` is ``[caps, routings]``."""

    bf16_copies: tuple[bool, ...]
    """What may be decided of the bf16 copy, without one first."""
    cached_rows: NDArray[np.int64]
    """``[caches, routings]``."""
    gradients_on_device: tuple[bool, ...]
    """``[caches]``."""
    prefetch_depths: tuple[int, ...]
    prefetch_recall: NDArray[np.float64]
    """Share of the exact choice that look-ahead finds, ``[depths]``."""
    activation_checkpointing: tuple[bool, ...]
    rows_in_backward: tuple[RowsInBackward, ...]
    caps: NDArray[np.int64]
    is_new: NDArray[np.bool_]
    """``[caches, 1, 1, 1, caps, routings]``: false where a cap or a number of cached rows repeats a smaller one, and so
    is no candidate."""
    adapter_width: NDArray[np.int64]
    top_k: NDArray[np.int64]
    num_experts: NDArray[np.int64]
    num_probes: NDArray[np.int64]
    in_experts: NDArray[np.bool_]
    active_rows: NDArray[np.int64]
    """Expected in a micro-batch, ``[L, routings]``; no cap is below it, nor below ``window_active_rows`` over the
    window's micro-batches, so no cap changes either."""
    window_active_rows: NDArray[np.int64]
    hot_rows: int = 0
    """As asked; where nobody asks, the search looks for them once it has a winner."""
    tokens_see: TokensSee = "union"
    token_chunks: int = 1
    """As asked; where it is more than one, ``active_rows`` are sums over chunks, and caps are a chunk's."""
    by_experts: Routing = "key-experts"
    """What routing in experts is: as asked, and then all are so; else Key-Experts."""
    switch: SwitchOptions | None = None
    rows: RowsPolicy = "replicated"
    stable: StableOptions | None = None
    bind_cores: bool = False

    @property
    def key_experts(self) -> NDArray[np.bool_]:
        """Where a router on the device gates the rows."""
        return self.in_experts & ROUTINGS[self.by_experts].gated

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the grid's axes."""
        choices = (self.gradients_on_device, self.prefetch_depths, self.activation_checkpointing, self.rows_in_backward)
        return (*(len(choice) for choice in choices), *self.caps.shape)

    @property
    def num_candidates(self) -> int:
        """Different decisions in the grid."""
        return int(np.prod(self.shape[1:CAP_AXIS])) * int(self.is_new.sum())

    @property
    def candidates(self) -> Candidates:
        """All of the grid, every choice along its own axis, ready to broadcast; without a bf16 copy."""
        return Candidates(
            adapter_width=self.adapter_width,
            top_k=self.top_k,
            prefetch_depth=np.array(self.prefetch_depths).reshape(-1, 1, 1, 1, 1),
            active_rows_cap=self.caps,
            num_experts=self.num_experts,
            num_probes=self.num_probes,
            key_experts=self.key_experts,
            retained=np.array([choice == "retained" for choice in self.rows_in_backward]).reshape(-1, 1, 1),
            activation_checkpointing=np.array(self.activation_checkpointing).reshape(-1, 1, 1, 1),
            cached_rows=self.cached_rows[:, None, None, None, None, :],
            gradients_on_device=np.array(self.gradients_on_device).reshape(-1, 1, 1, 1, 1, 1),
            hot_rows=self.hot_rows,
            own_rows=self.tokens_see == "own",
            token_chunks=self.token_chunks,
            means=ROUTINGS[self.by_experts].means,
            switch=ROUTINGS[self.by_experts].one_expert,
            owned=self.rows == "owned",
            routers=ROUTINGS[self.by_experts].routers,
            bound=self.bind_cores,
        )

    def candidates_at(self, cache: int, backward: int = 0) -> Candidates:
        """Those at a place of the cache axis, and at one of the axis of rows in backward."""
        return replace(
            self.candidates,
            cached_rows=self.cached_rows[cache],
            gradients_on_device=self.gradients_on_device[cache],
            retained=self.rows_in_backward[backward] == "retained",
        )

    @property
    def recall_axis(self) -> NDArray[np.float64]:
        """Recall of looking ahead, along the axis of prefetch depths."""
        return self.prefetch_recall.reshape(-1, 1, 1, 1, 1)

    def decision(self, index: tuple[int, ...], *, bf16_copy: bool | None = None) -> Decision:
        """The decision at a grid index; the copy as given, or the first of :attr:`bf16_copies`."""
        cache, depth, checkpointing, backward, cap, routing = index
        return Decision(
            adapter_width=int(self.adapter_width[routing]),
            top_k=int(self.top_k[routing]),
            prefetch_depth=self.prefetch_depths[depth],
            active_rows_cap=int(self.caps[cap, routing]),
            num_experts=int(self.num_experts[routing]),
            num_probes=int(self.num_probes[routing]),
            routing=self.by_experts if self.in_experts[routing] else "exact",
            rows_in_backward=self.rows_in_backward[backward],
            activation_checkpointing=self.activation_checkpointing[checkpointing],
            cached_rows=int(self.cached_rows[cache, routing]),
            hot_rows=self.hot_rows,
            tokens_see=self.tokens_see,
            token_chunks=self.token_chunks,
            switch=self.switch,
            stable=self.stable,
            gradients_on_device=self.gradients_on_device[cache],
            bf16_copy=self.bf16_copies[0] if bf16_copy is None else bf16_copy,
            rows=self.rows,
            bind_cores=self.bind_cores,
        )


def why_not_owned(request: Request) -> str | None:
    """Why machines cannot each own their rows, whatever their number: rows are found expert by expert, where they lie,
    and brought for a micro-batch at once; None if they can."""
    if request.routing is not None and not ROUTINGS[request.routing].in_experts:
        *others, last = [name for name, needs in ROUTINGS.items() if needs.in_experts]
        return (
            f"routing {request.routing} beside rows owned: it scores every row in one product, and no machine has them "
            f"all; give {', '.join(others)} or {last}"
        )
    for name, most in {"token_chunks": 1, "hot_rows": 0}.items():
        if (getattr(request, name) or 0) > most:
            return f"{name} {getattr(request, name)} beside rows owned: give one of them"
    return None


def why_not_sharded(request: Request) -> str | None:
    """Why the base cannot be sharded over a machine's cards, whatever their number; None if it can."""
    shape, alone = request.model, "beside shard_base"
    if request.nodes > 1:
        return f"nodes {request.nodes} {alone}: the base is sharded over the cards of one machine; give 1"
    if shape.stored is not None:
        how = f"stored as {shape.stored.title}"
        return f"model {shape.name}, {how}, {alone}: only weights quantized while they are loaded are; give 16-bit ones"
    if shape.measured is not None:
        return (
            f"model {shape.name} {alone}: its memory is known from traces of whole layers; it goes with the families "
            f"that have a closed form"
        )
    return None


def enumerate_space(request: Request, sparsity: SparsityProfile, *, bind_cores: bool = False) -> Space:
    """Every decision to weigh for ``request``; ``bind_cores`` is the same for all."""
    routings = _routings(request)
    width, top_k = routings.adapter_width, routings.top_k
    num_layers, tokens = request.model.num_layers, request.tokens_per_step
    sparsity = at_seq_len(sparsity, request.seq_len)
    experts, by_experts = routings.in_experts, _by_experts(request)
    union = partial(active_rows_per_layer, sparsity, num_layers, top_k=top_k, adapter_width=width, key_experts=experts)
    chunks = request.token_chunks or 1
    step, window = union(tokens=chunk_tokens(tokens, chunks)), union(tokens=tokens * request.grad_accum)
    caps = active_rows_caps(
        request, sparsity, adapter_width=width, active_rows=step, window_active_rows=window, parts=chunks
    )
    checkpointing = request.activation_checkpointing
    depths = prefetch_depths(request, sparsity)
    caches = TRAFFIC_CACHES if request.objective == "traffic" else CACHES
    # in a window of one micro-batch nothing comes twice, and chunks keep nothing from one micro-batch to the next
    caches = caches if request.rounds > 1 and chunks == 1 else CACHES[:1]
    most_cached = width - (request.hot_rows or 0)
    cached = np.minimum(
        cached_rows(sparsity, adapter_width=width, window_active_rows=window, caches=caches), most_cached
    )
    on_device = tuple(on_device for _, on_device in caches)
    return Space(
        bf16_copies=bf16_copies(request),
        cached_rows=cached,
        gradients_on_device=on_device,
        prefetch_depths=depths,
        prefetch_recall=np.ones(len(depths))
        if chunks > 1
        else np.asarray(prefetch_recall(sparsity, prefetch_depth=np.array(depths))),
        activation_checkpointing=(False, True) if checkpointing is None else (checkpointing,),
        rows_in_backward=_rows_in_backward(request),
        caps=caps,
        is_new=_is_new_cache(cached, on_device)[:, None, None, None, None, :] & _is_new(caps.T).T,
        adapter_width=width,
        top_k=top_k,
        num_experts=routings.num_experts,
        num_probes=routings.num_probes,
        in_experts=experts,
        active_rows=np.broadcast_to(chunks * distinct_layers(step), step.shape),  # layers alike stay one
        window_active_rows=window,
        hot_rows=request.hot_rows or 0,
        tokens_see=request.tokens_see,
        token_chunks=chunks,
        by_experts=by_experts,
        switch=(request.switch or SwitchOptions()) if by_experts == "switch" else None,
        rows=request.rows,
        stable=(request.stable or StableOptions()) if by_experts == "stable" else None,
        bind_cores=bind_cores,
    )


def _rows_in_backward(request: Request) -> tuple[RowsInBackward, ...]:
    if request.rows_in_backward is not None:
        return (request.rows_in_backward,)
    return ROWS_IN_BACKWARD if (request.token_chunks or 1) == 1 else ("refetched",)


def _by_experts(request: Request) -> Routing:
    asked = request.routing
    return asked if asked is not None and ROUTINGS[asked].in_experts else "key-experts"


def prefetch_depths(request: Request, sparsity: SparsityProfile) -> tuple[int, ...]:
    """As deep as the profile knows the recall of looking ahead, and below the number of layers; with token chunks one
    ahead, for which the slot is there in any case."""
    if request.prefetch_depth is not None:
        return (request.prefetch_depth,)
    if (request.token_chunks or 1) > 1:
        return (min(1, request.model.num_layers - 1),)
    return tuple(range(min(len(sparsity.prefetch_recall_by_depth), request.model.num_layers)))


def bf16_copies(request: Request) -> tuple[bool, ...]:
    """A copy means something only to a bf16 adapter: fp32 rows leave as they are kept."""
    if request.adapter_dtype != "bf16":
        return (False,)
    return (False, True) if request.bf16_copy is None else (request.bf16_copy,)


def cached_rows(
    sparsity: SparsityProfile,
    *,
    adapter_width: NDArray[np.int64],
    window_active_rows: NDArray[np.int64],
    caches: tuple[tuple[float, bool], ...],
) -> NDArray[np.int64]:
    """Rows cached per layer ``[caches, routings]``: shares of the busiest layer's window, with the profile's spread."""
    most = highest_active_rows(
        active_rows=window_active_rows.max(axis=0),
        spread_fraction=sparsity.spread_fraction,
        adapter_width=adapter_width,
    )
    rows: NDArray[np.int64] = np.stack([np.ceil(share * most).astype(np.int64) for share, _ in caches])
    return rows


def active_rows_caps(
    request: Request,
    sparsity: SparsityProfile,
    *,
    adapter_width: NDArray[np.int64],
    active_rows: NDArray[np.int64],
    window_active_rows: NDArray[np.int64],
    parts: int = 1,
) -> NDArray[np.int64]:
    """Caps ``[caps, routings]``, ascending: multiples of the most rows that a batch is expected to activate, and ``R``.

    That most is the busiest layer's, with the profile's spread at the request's quantile of batches. Active rows are
    ``[L, routings]``; of a chunk where a micro-batch has several ``parts``.
    """
    busiest = active_rows.max(axis=0)
    highest = highest_active_rows(
        active_rows=busiest,
        spread_fraction=spread_at(sparsity.spread_fraction, quantile=request.active_rows_quantile),
        adapter_width=adapter_width,
    )
    per_step_of_window = -(-window_active_rows.max(axis=0) // (request.grad_accum * parts))
    least = np.maximum(highest, per_step_of_window)
    multiples = [np.ceil(multiple * least).astype(np.int64) for multiple in CAP_MULTIPLES]
    caps: NDArray[np.int64] = np.minimum(np.stack([*multiples, adapter_width]), adapter_width)
    return caps


# --- widths, K, experts, probes --------------------------------------------------------------------------------------


def adapter_widths(request: Request) -> tuple[int, ...]:
    """Widths to weigh: multiples of a power of two up to ``4D``, none with more weights than the model."""
    if request.adapter_width is not None:
        return (request.adapter_width,)
    hidden_size, least = request.model.hidden_size, max(request.top_k or 1, request.hot_rows or 0)
    power = 1 << (hidden_size.bit_length() - 1)
    step = min(max(WIDTH_STEP, power // 32), max(power // 8, 1))
    widest = min(WIDTHS_PER_HIDDEN_SIZE * hidden_size, widest_adapter(request))
    widths = tuple(width for width in range(step, widest + 1, step) if width >= least)
    return widths or (-(-least // step) * step,)


def widest_adapter(request: Request) -> int:
    """The largest ``R`` whose ``2*R*D*L`` weights are no more than the frozen model's."""
    shape = request.model
    return shape.num_parameters // (2 * shape.hidden_size * shape.num_layers)


def expert_counts(adapter_width: int, *, machines: int = 1) -> tuple[int, ...]:
    """Divisors of ``R`` nearest in ratio to multiples of its square root, ascending; 1 only for ``R = 1``. None that
    does not divide among ``machines``, if there are others."""
    small = [count for count in range(1, math.isqrt(adapter_width) + 1) if adapter_width % count == 0]
    divisors = sorted({*small, *(adapter_width // count for count in small)})[1:] or [1]
    divisors = [count for count in divisors if count % machines == 0] or divisors
    return tuple(_nearest(divisors, square=factor * factor * adapter_width) for factor in EXPERTS_PER_ROOT)


def large_experts(adapter_width: int, top_k: int) -> tuple[int, ...]:
    """The same where a token's rows are of one expert: none so many that an expert has fewer than ``2K`` rows."""
    most = max(adapter_width // min(PROBED_ROWS_PER_TOP_K * top_k, adapter_width), 1)
    largest = next(count for count in range(most, 0, -1) if adapter_width % count == 0)
    return tuple(min(count, largest) for count in expert_counts(adapter_width))


def _nearest(ascending: list[int], *, square: float) -> int:
    """The number nearest in ratio to the root of ``square``; of two as near, whose product it is, the smaller."""
    place = bisect.bisect_right(ascending, square, key=lambda number: number * number)
    lower, upper = ascending[max(place - 1, 0)], ascending[min(place, len(ascending) - 1)]
    return upper if lower * upper < square else lower


def probe_counts(*, adapter_width: Ints, num_experts: Ints, top_k: Ints) -> NDArray[np.int64]:
    """Probes per token, ascending along a last axis: those usual, raised until the probed experts hold ``2K`` rows (or
    all ``R``)."""
    wanted_rows = np.minimum(PROBED_ROWS_PER_TOP_K * top_k, adapter_width)
    least = -(-wanted_rows * num_experts // adapter_width)
    return np.stack([np.minimum(np.maximum(probes, least), num_experts) for probes in PROBES], axis=-1)


@dataclass(frozen=True, eq=False, repr=False)
class _Routings:
    """Adapter widths with top-K, experts and probes, as lists of equal length; see :class:`Space`."""

    adapter_width: NDArray[np.int64]
    top_k: NDArray[np.int64]
    num_experts: NDArray[np.int64]
    num_probes: NDArray[np.int64]
    in_experts: NDArray[np.bool_]


def _routings(request: Request) -> _Routings:
    """Every width with every K, routed exactly and by each number of experts and probes that the request allows.

    The grids are ``[widths, K]`` and ``[widths, K, experts, probes]``.
    """
    widths = np.array(adapter_widths(request))
    top_k = np.minimum(TOP_KS if request.top_k is None else (request.top_k,), widths[:, None])
    new_top_k = _is_new(top_k)
    one_expert, owners = ROUTINGS[_by_experts(request)].one_expert, request.nodes if request.rows == "owned" else 1
    if one_expert:
        experts = np.array(
            [[large_experts(int(width), int(k)) for k in of] for width, of in zip(widths, top_k, strict=True)]
        )
        probes = np.ones((*experts.shape, 1), np.int64)
    else:
        experts = np.array([expert_counts(int(width), machines=owners) for width in widths])[:, None, :]
        probes = probe_counts(adapter_width=widths[:, None, None], num_experts=experts, top_k=top_k[:, :, None])
    in_experts = new_top_k[:, :, None, None] & _is_new(experts)[..., None] & _is_new(probes)
    in_experts &= (experts % owners == 0)[..., None]
    none = np.empty(0, np.int64)
    exactly = np.flatnonzero(new_top_k) if request.routing in (None, "exact") and request.rows != "owned" else none
    by_experts = np.flatnonzero(in_experts) if request.routing != "exact" else none
    if not len(exactly) + len(by_experts):
        raise UsageError(
            f"rows owned: no number of experts of adapter_width {', '.join(map(str, widths))} divides among {owners} "
            f"machines; give another width, a multiple of {owners} times 32, say"
        )

    def listed(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers given per width and K, or per width, K, experts and probes, in the order of the lists."""
        of_exact = np.broadcast_to(numbers, top_k.shape) if numbers.ndim == 2 else np.ones_like(top_k)
        numbers = np.broadcast_to(numbers.reshape(*numbers.shape, *(1,) * (4 - numbers.ndim)), probes.shape)
        return np.concatenate([of_exact.ravel()[exactly], numbers.ravel()[by_experts]])

    return _Routings(
        adapter_width=listed(widths[:, None]),
        top_k=listed(top_k),
        num_experts=listed(experts),
        num_probes=listed(probes),
        in_experts=np.repeat([False, True], [len(exactly), len(by_experts)]),
    )


def _is_new_cache(cached: NDArray[np.int64], on_device: tuple[bool, ...]) -> NDArray[np.bool_]:
    """``[caches, routings]``: false where an earlier cache of the same kind has as many rows."""
    new = np.ones(cached.shape, np.bool_)
    for later, rows in enumerate(cached):
        for earlier in range(later):
            if on_device[earlier] == on_device[later]:
                new[later] &= rows != cached[earlier]
    return new


def _is_new(ascending: NDArray[np.int64]) -> NDArray[np.bool_]:
    """False where a number repeats the one before it on the last axis."""
    return np.diff(ascending, axis=-1, prepend=0) > 0
