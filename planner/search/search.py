"""The search: every decision of a request weighed, the best that fits found, and its prediction made exactly.

A decision is feasible if what its step reserves, replayed through the caching allocator, fits the allocator's budget
(every step asks for the same sizes, those of active rows *at the cap*, which no batch exceeds); if tables and buffers
fit the host; and if a step takes no more than ``max_slowdown`` times the baseline's. For the objective ``speed`` the
trainable share has a least value too.

``capacity`` looks for the widest adapter, then the largest K, then the least time per row that is chosen as exact
routing would (step time over the recall of looking ahead: fetching sooner must save more than it misses). ``traffic``
looks for the same width and K, then the fewest bytes over the link per row so chosen, then that time; ``speed`` for the
shortest step. Ties go on through the rest, so the order is total: the same request and profiles give the same plan.

Where the request leaves it open whether the host keeps a bf16 copy of the rows, each decision has one if it fits the
host and makes the step faster by :data:`~meft.planner.search.grid_timing.COPY_PAYS`. That is no further
candidate: the one without it is slower for all objectives, and only host memory tells them apart.

The decisions are weighed all at once, as a grid of arrays, by what they allocate;
:mod:`meft.planner.search.weighing` is the way to read, :mod:`meft.planner.search.sifting` the quick one that comes to
the same. The preferred ones are replayed until one fits (:mod:`meft.planner.search.fitting`). The winner is predicted
again by the functions of a single decision, and that is what the plan reports. Device memory that it leaves over goes
to hot rows, where the sparsity profile knows how much they carry and a step is the shorter for them. A winner without
look-ahead gathers its rows in parts where its step is the shorter for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from meft.planner.base.errors import Infeasible, UsageError
from meft.planner.memory.budget import host_budget_bytes
from meft.planner.memory.device import counted_bytes
from meft.planner.memory.replayed import replayed_peaks
from meft.planner.predict.prediction import ProfileSet, inputs_used, predict, timing_of
from meft.planner.records.plan import Decision, Plan, Prediction, Request, SearchSummary
from meft.planner.search.fitting import Fitting, best_fitting
from meft.planner.search.sifted_choice import best, front
from meft.planner.search.sifting import Index, Sifted
from meft.planner.search.space import why_not_owned, why_not_sharded

if TYPE_CHECKING:
    from meft.planner.search.weighing import Weighed

WITHOUT_MLP_MODULE = ("opt",)
"""Model types whose FFN is linear layers among the block's others."""
HOT_PARTS = 16
"""Hot rows are tried as so many parts of the width."""
GATHER_CHUNKS = (2, 4, 8)
CHUNKS_PAY = 0.01
"""Least share of the step's time that gathering in parts must save: rates are not known as well as that."""
AS_CAPABLE = 0.95
"""Share of the most trainable parameters that counts as the same: buffers of a larger micro-batch cost a few rows."""
SAME_SECONDS = 1e-9
"""Relative difference that summing in another order may make."""


def make_plan(request: Request, profiles: ProfileSet, *, meft_version: str) -> Plan | Infeasible:
    """The best plan for ``request``, or why there is none.

    Pure and deterministic. Raises :class:`UsageError` for a request that contradicts itself or that the runtime would
    refuse, and for a sparsity profile of another number of layers.
    """
    check_request(request)
    if (request.token_chunks or 1) > 1:
        return _with_chunks(request, profiles, meft_version=meft_version)
    sifted = Sifted(request, profiles)
    fitting = _fitting(sifted)
    if fitting.found is not None:
        return _Winner.of(*fitting.found).plan(meft_version)
    chunked = _chunked_unasked(request, profiles, meft_version=meft_version)
    return chunked or _infeasible(request, profiles, short_bytes=fitting.short_bytes)


def _with_chunks(request: Request, profiles: ProfileSet, *, meft_version: str) -> Plan | Infeasible:
    """The best plan with the token chunks that were asked for."""
    from meft.planner.search.chunked import fitting_chunked  # a plan does without these

    fitting = fitting_chunked(request, profiles)
    if fitting.found is None:
        return _infeasible(request, profiles, short_bytes=fitting.short_bytes)
    return _chunked_plan(request, profiles, *fitting.found, meft_version=meft_version)


def _chunked_unasked(request: Request, profiles: ProfileSet, *, meft_version: str) -> Plan | None:
    """The best plan with token chunks; None where none may be tried or none fits."""
    from meft.planner.search.chunked import fitting_chunked, may_chunk

    found = fitting_chunked(request, profiles).found if may_chunk(request) else None
    return None if found is None else _chunked_plan(request, profiles, *found, meft_version=meft_version)


def _chunked_plan(
    request: Request, profiles: ProfileSet, weighed: Weighed, winner: Index, *, meft_version: str
) -> Plan:
    decision = weighed.decision(winner)
    prediction = predict(request, decision, profiles)
    counted = counted_bytes(request=request, decision=decision, gpu=profiles.gpu)
    _check_pairs(
        {
            "peak allocated at the cap": (weighed.at(weighed.allocated_bytes, winner), counted),
            "host memory": (weighed.at(weighed.host_bytes, winner), prediction.host_memory.total_bytes),
            "step seconds": (weighed.at(weighed.step_seconds, winner), prediction.timing.step_seconds),
        }
    )
    return _plan(
        request,
        profiles,
        decision,
        prediction,
        lambda unused_bytes: SearchSummary(
            candidates=weighed.space.num_candidates,
            feasible=int(weighed.feasible.sum()),
            pareto=tuple(
                weighed.point(index, request, unused_bytes=unused_bytes) for index in weighed.front(winner, request)
            ),
        ),
        meft_version=meft_version,
    )


def _plan(
    request: Request,
    profiles: ProfileSet,
    decision: Decision,
    prediction: Prediction,
    summary: Callable[[int], SearchSummary],
    *,
    meft_version: str,
) -> Plan:
    """The plan, with the trade-offs that nothing beats and where its numbers come from; ``summary`` is given what the
    allocator is taken to hold beyond what is allocated."""
    memory = prediction.device_memory
    return Plan(
        meft_version=meft_version,
        request=request,
        decision=decision,
        prediction=prediction,
        inputs=inputs_used(request, decision, profiles),
        search=summary(max(memory.peak_reserved_bytes - memory.peak_allocated_bytes, 0)),
    )


def make_plan_of_splits(
    splits: tuple[Request, ...], profiles: ProfileSet, *, meft_version: str
) -> tuple[Plan, tuple[Request, ...]] | Infeasible:
    """The best plan of requests that split the same sequences of an optimizer step into micro-batches, the smallest
    first; and the splits that fit.

    Of those that train as much as any, up to :data:`AS_CAPABLE`, the one whose token takes least: time, or for the
    objective ``traffic`` bytes over the link. ``speed`` asks for time alone. Where none fits, why the first does not.
    """
    if (splits[0].token_chunks or 1) > 1:
        raise UsageError(
            f"batch_size auto beside token_chunks {splits[0].token_chunks}: the planner splits one of the two; give a "
            f"--batch-size"
        )
    winners = list(_winners(splits, profiles))
    if not winners:
        chunked = _chunked_unasked(splits[0], profiles, meft_version=meft_version)
        if chunked is not None:
            return chunked, splits[:1]
        return _infeasible(splits[0], profiles, short_bytes=_fitting(Sifted(splits[0], profiles)).short_bytes)
    best = min(as_capable(winners), key=lambda winner: cost_of_a_token(winner.request, winner.prediction))
    return best.plan(meft_version), tuple(winner.request for winner in winners)


@dataclass(frozen=True)
class _Winner:
    """The best decision of one request, and what is predicted of it."""

    sifted: Sifted
    place: Index
    decision: Decision
    prediction: Prediction

    @classmethod
    def of(cls, sifted: Sifted, place: Index) -> _Winner:
        """What the search found, predicted by the functions of a single decision."""
        request, profiles = sifted.request, sifted.profiles
        decision = sifted.decision(place)
        prediction = predict(request, decision, profiles)
        _check_consistent(sifted, place, prediction)
        decision, prediction = with_hot_rows(request, profiles, decision, prediction)
        return cls(sifted, place, *with_gather_chunks(request, profiles, decision, prediction))

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.sifted.request

    def plan(self, meft_version: str) -> Plan:
        """Of what was found."""
        sifted = self.sifted
        return _plan(
            self.request,
            sifted.profiles,
            self.decision,
            self.prediction,
            lambda unused_bytes: SearchSummary(
                candidates=sifted.space.num_candidates,
                feasible=sifted.num_feasible,
                pareto=tuple(sifted.point(index, unused_bytes=unused_bytes) for index in front(sifted, self.place)),
            ),
            meft_version=meft_version,
        )


def _winners(splits: Sequence[Request], profiles: ProfileSet) -> Iterator[_Winner]:
    """Of each split that fits; none is looked at once memory holds no decision at all: more tokens take more."""
    for request in splits:
        check_request(request)
        sifted = Sifted(request, profiles)
        if not sifted.fits_at_all.any():
            return
        found = _fitting(sifted).found
        if found is not None:
            yield _Winner.of(*found)


class _Predicted(Protocol):
    @property
    def request(self) -> Request: ...
    @property
    def prediction(self) -> Prediction: ...


Each = TypeVar("Each", bound=_Predicted)


def as_capable(each: Sequence[Each]) -> list[Each]:
    """Those that train as many parameters as any of them, up to :data:`AS_CAPABLE`; for ``speed`` all."""
    if each[0].request.objective == "speed":
        return list(each)
    most = max(one.prediction.trainable_parameters for one in each)
    return [one for one in each if one.prediction.trainable_parameters >= AS_CAPABLE * most]


def cost_of_a_token(request: Request, prediction: Prediction) -> float:
    """Seconds, or for ``traffic`` bytes, of a token that meets the rows that exact routing would choose for it."""
    if request.objective == "traffic":
        cost = prediction.transfer.window_bytes(request.rounds) / (request.rounds * request.tokens_per_step)
    else:
        cost = 1 / prediction.timing.tokens_per_second
    return cost if request.objective == "speed" else cost / prediction.sparsity.prefetch_recall


def _fitting(sifted: Sifted) -> Fitting[tuple[Sifted, Index]]:
    """The best decision that the device holds, as a place in a grid."""
    request, profiles = sifted.request, sifted.profiles
    context = profiles.gpu.context.high_bytes

    def best_within(budget_bytes: int) -> tuple[Sifted, Index] | None:
        allowed = sifted.allocating_at_most(budget_bytes - context)
        return (allowed, best(allowed)) if allowed.num_feasible else None

    def short_bytes(found: tuple[Sifted, Index]) -> int:
        peaks = replayed_peaks(request, found[0].decision(found[1]), profiles.gpu)
        return max(peaks.reserved_bytes + context - request.gpu_mem_bytes, 0)

    return best_fitting(request.gpu_mem_bytes, best_within=best_within, short_bytes=short_bytes)


def check_request(request: Request) -> None:
    """Refuse what contradicts itself and what the runtime does not train; raises :class:`UsageError`."""
    if (request.token_chunks or 1) > 1:
        from meft.planner.search.chunked import check_chunks

        check_chunks(request)
    if request.rows == "owned" and (refused := why_not_owned(request)):
        raise UsageError(refused)
    if request.shard_base and (refused := why_not_sharded(request)):
        raise UsageError(refused)
    shape, width, top_k = request.model, request.adapter_width, request.top_k
    as_stored = request.weights_dtype == "int8" and shape.stored is not None
    if request.weights_dtype in ("fp16", "int8") and not as_stored:
        raise UsageError(
            f"weights_dtype {request.weights_dtype}: the runtime trains beside fp32, bf16 or nf4 weights; give one of "
            f"them"
        )
    if shape.model_type in WITHOUT_MLP_MODULE:
        raise UsageError(
            f"model {shape.name}: its blocks have no FFN module of their own, which the runtime's adapter sits beside; "
            f"plan for another model (meft-plan estimate prices this one)"
        )
    if shape.measured is not None and shape.measured.without_ffn is not None:
        raise UsageError(f"model {shape.name}: {shape.measured.without_ffn} (meft-plan estimate prices this one)")
    if request.bf16_copy and request.adapter_dtype != "bf16":
        raise UsageError(
            f"bf16_copy: the adapter's rows travel in {request.adapter_dtype}, as they are kept; leave it out, or give "
            f"adapter_dtype bf16"
        )
    if width is not None and top_k is not None and top_k > width:
        raise UsageError(
            f"top_k {top_k} is above adapter_width {width}: a token cannot choose more rows than there are"
        )
    if width is not None and request.hot_rows is not None and request.hot_rows > width:
        raise UsageError(f"hot_rows {request.hot_rows} is above adapter_width {width}: give at most that")
    if request.prefetch_depth is not None and request.prefetch_depth >= shape.num_layers:
        raise UsageError(
            f"prefetch_depth {request.prefetch_depth}: {shape.name} has {shape.num_layers} layers; give at most "
            f"{shape.num_layers - 1}"
        )


def with_hot_rows(
    request: Request, profiles: ProfileSet, decision: Decision, prediction: Prediction
) -> tuple[Decision, Prediction]:
    """The decision with as many hot rows as make its step shortest (for ``traffic``: as move the fewest bytes), of
    sixteenths of the width, and its prediction.

    As it is where the request says how many, for several ranks, which have none, or where the profile does not know
    how popular rows are. Rows that are hot need not be cached: the two together are no more than the width.
    """
    if request.hot_rows is not None or request.ranks > 1 or not profiles.sparsity.popularity:
        return decision, prediction
    for tried in _cheapest_first(request, profiles, decision, _cost(request, prediction)):
        predicted = predict(request, tried, profiles)
        if _fits(request, profiles, predicted):
            return tried, predicted
    return decision, prediction


def _cheapest_first(request: Request, profiles: ProfileSet, decision: Decision, cost: float) -> Iterator[Decision]:
    """The decision with hot rows, where that costs less and what it allocates fits."""
    found: list[tuple[float, int, Decision]] = []
    width = decision.adapter_width
    for part in range(1, HOT_PARTS + 1):
        hot_rows = width * part // HOT_PARTS
        cached_rows = min(decision.cached_rows, width - hot_rows)
        update = {
            "hot_rows": hot_rows,
            "cached_rows": cached_rows,
            "gradients_on_device": decision.gradients_on_device and cached_rows > 0,
        }
        tried = decision.model_copy(update=update)
        predicted = predict(request, tried, profiles, replayed=False)
        if not _fits(request, profiles, predicted):
            break
        if _cost(request, predicted) < cost:
            found.append((_cost(request, predicted), part, tried))
    return (tried for _, _, tried in sorted(found, key=lambda each: each[:2]))


def _cost(request: Request, prediction: Prediction) -> float:
    """What hot rows are to lessen."""
    if request.objective == "traffic":
        return prediction.transfer.window_bytes(request.rounds)
    return prediction.timing.step_seconds


def with_gather_chunks(
    request: Request, profiles: ProfileSet, decision: Decision, prediction: Prediction
) -> tuple[Decision, Prediction]:
    """The decision with its rows gathered and sent in as many parts as make its step shortest, if that pays.

    Only time changes: the parts are of the same buffers. With look-ahead rows are there before they are wanted, chunks
    of tokens pipeline by themselves, and rows that machines own come all at once.
    """
    if decision.prefetch_depth or decision.token_chunks > 1 or decision.rows == "owned":
        return decision, prediction
    tried = [decision.model_copy(update={"gather_chunks": chunks}) for chunks in GATHER_CHUNKS]
    timings = [timing_of(request, each, profiles, prediction.sparsity) for each in tried]
    timing, chosen = min(zip(timings, tried, strict=True), key=lambda each: each[0].step_seconds)
    if timing.step_seconds > (1 - CHUNKS_PAY) * prediction.timing.step_seconds:
        return decision, prediction
    return chosen, prediction.model_copy(update={"timing": timing})


def _fits(request: Request, profiles: ProfileSet, prediction: Prediction) -> bool:
    """Whether device memory at the cap, host memory and the slowdown are within the limits."""
    reserved = prediction.device_memory.peak_reserved_bytes_at_cap or 0
    on_device = reserved + profiles.gpu.context.high_bytes <= request.gpu_mem_bytes
    on_host = prediction.host_memory.total_bytes <= host_budget_bytes(request)
    return on_device and on_host and prediction.timing.slowdown <= request.max_slowdown


def _infeasible(request: Request, profiles: ProfileSet, *, short_bytes: int | None) -> Infeasible:
    """Why nothing fits: nothing is allowed to be as it allocates too much (or is too slow, ...), or ``short_bytes`` are
    missing for what the allocator reserves."""
    from meft.planner.search.infeasible import explain, explain_reserved  # a plan does without these
    from meft.planner.search.weighing import weigh

    def best_of(changed: Request) -> Decision | None:
        if (changed.token_chunks or 1) > 1:
            from meft.planner.search.chunked import fitting_chunked

            chunked = fitting_chunked(changed, profiles).found
            return None if chunked is None else chunked[0].decision(chunked[1])
        found = _fitting(Sifted(changed, profiles)).found
        return None if found is None else found[0].decision(found[1])

    if short_bytes is not None:
        return explain_reserved(request, request.gpu_mem_bytes + short_bytes, gpu=profiles.gpu, best=best_of)
    weighed = weigh(request, profiles, simulate_all=True)
    return explain(request, weighed.limits, weighed.space.is_new, gpu=profiles.gpu, best=best_of)


def _check_consistent(sifted: Sifted, winner: Index, prediction: Prediction) -> None:
    """The search's arrays and the prediction of the winner are the same terms; a difference is a bug."""
    decision = sifted.decision(winner)
    pairs: dict[str, tuple[float, float | None]] = {
        "peak allocated at the cap": (
            sifted.device.at(winner),
            counted_bytes(request=sifted.request, decision=decision, gpu=sifted.profiles.gpu),
        ),
        "host memory": (sifted.host_bytes_at(winner), prediction.host_memory.total_bytes),
        "trainable parameters": (sifted.trainable_at(winner), prediction.trainable_parameters),
        "step seconds": (sifted.seconds_at(winner), prediction.timing.step_seconds),
    }
    moved = sifted.window_bytes_at(winner)
    if moved is not None:
        pairs["bytes per window"] = (moved, prediction.transfer.window_bytes(sifted.request.rounds))
    _check_pairs(pairs)


def _check_pairs(pairs: Mapping[str, tuple[float, float | None]]) -> None:
    for name, (searched, predicted) in pairs.items():
        if predicted is None or not math.isclose(searched, predicted, rel_tol=SAME_SECONDS):
            raise RuntimeError(f"the search found {name} {searched} where the prediction says {predicted}")
