"""The adapter at inference, computed on the host where the rows are.

Training serves all tokens of a micro-batch with the union of their rows, so a token's output depends a little on what
else is in the batch. Generation must not: an answer may not change with the questions that happen to share its batch,
nor with padding. Here a token meets what it met in training, in the mean over micro-batches: its own best ``K`` rows,
which it brings wherever it is, and every other row times the share of training's micro-batches that had the row active
(as dropout's weights are scaled by the share of steps that kept them). Where training let a token see its own rows
alone, it meets just those. All rows as they are would be another function
where a micro-batch activates few of many (measured in ``docs/learning.md``). Asked for, a token meets its best rows
alone, or only those that it scores high enough, which leaves more of what the model said before.
Only hidden states and outputs travel, ``2 T D`` numbers per layer; no row lies on
the device.

Letters: ``T`` tokens, ``D`` hidden size, ``R`` adapter rows, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypedDict

import torch
from torch import nn

from meft.planner.base.errors import UsageError
from meft.planner.records.plan import TokensSee
from meft.planner.records.routing import ROUTINGS, Routing
from meft.runtime.adapter.adapter import add_to, ffn_input
from meft.runtime.adapter.blocks import ffn_modules
from meft.runtime.adapter.products import plan_dtypes
from meft.runtime.host.centroids import nearest_experts
from meft.runtime.session.session import Session
from meft.runtime.session.stages import stage_of


@dataclass(frozen=True)
class Serving:
    """Which of its rows a token meets at inference."""

    rows_per_token: int | None = None
    """Its best so many; None: what it met in training, or where that is not known all (of its experts)."""
    min_score: float | None = None
    """None with a smaller ``h . key``; None: any that is above zero."""

    def __post_init__(self) -> None:
        if self.rows_per_token is not None and self.rows_per_token < 1:
            raise UsageError(f"rows_per_token {self.rows_per_token}: a token meets one row at least; None: as trained")
        if self.min_score is not None and not (math.isfinite(self.min_score) and self.min_score >= 0):
            raise UsageError(f"min_score {self.min_score:g}: a row counts only above 0; give 0 or more, or None")

    def warning(self, met_by_layer: Sequence[float]) -> str | None:
        """What to say where a token would meet more rows than in training (see :func:`rows_met`)."""
        if self.rows_per_token is None or not met_by_layer:
            return None
        met = sum(met_by_layer) / len(met_by_layer)
        if self.rows_per_token <= met:
            return None
        return (
            f"rows per token {self.rows_per_token:,}: in training a token met {met:,.0f} rows of a layer at most, and "
            f"with more it may not give the answers that it learnt; leave it out to serve what was trained"
        )

    def after(self, tokens_see: TokensSee, top_k: int) -> Serving:
        """The same for an adapter that was trained so: where tokens saw their own ``K`` rows alone, they do here."""
        return replace(self, rows_per_token=self.rows_per_token or top_k) if tokens_see == "own" else self


AS_TRAINED = Serving()


def rows_met(tokens_see: TokensSee, top_k: int, active_rows: Sequence[float]) -> Sequence[float]:
    """Rows that a token met in training, by layer, in the mean; empty where it is not known."""
    return (float(top_k),) if tokens_see == "own" else active_rows


def found_by(routing: Routing, num_experts: int, stage: int) -> FoundBy:
    """What :class:`LayerRows` has to know of a routing; ``stage`` is 0 where it has none."""
    means = num_experts if ROUTINGS[routing].means else 0
    return {"experts_by_means": means, "by_probability": routing == "switch", "stage": stage}


class FoundBy(TypedDict):
    """See :func:`found_by`."""

    experts_by_means: int
    by_probability: bool
    stage: int


@dataclass(frozen=True)
class LayerRows:
    """A layer's adapter on the host: ``keys`` and ``values`` ``[R, D]``; where a router was trained, ``router`` ``[N,
    D]``, or ``[2N, D]`` with a light router below."""

    keys: torch.Tensor
    values: torch.Tensor
    router: torch.Tensor | None = None
    num_probes: int = 1
    serving: Serving = AS_TRAINED
    top_k: int = 1
    """How many rows a token brought in training, those with the largest ``h . key``."""
    shares: torch.Tensor | None = None
    """fp32 ``[R]``: the share of training's micro-batches that had a row active; None where that is not known."""
    experts_by_means: int = 0
    """Centroids: ``N``, and the experts that a token probes are those whose mean key it scores highest."""
    by_probability: bool = False
    """Switch: the gate is the router's probability of the expert. No expert's tokens are limited at inference."""
    stage: int = 0
    """Stable: 1 or 2, by whose router the expert is chosen; its gate is the sigmoid of its score."""

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """Adapter output ``[T, D]`` for ``hidden [T, D]`` in the rows' dtype."""
        if self.router is None:
            return self._active(hidden @ self.keys.T, self.shares, self._probed(hidden)) @ self.values
        gates, probes = self._gates(hidden @ self.router.T)
        num_experts = self.router.shape[0] // (2 if self.stage else 1)
        keys, values = (part.unflatten(0, (num_experts, -1)) for part in (self.keys, self.values))
        visits = [(expert, *(probes == expert).nonzero(as_tuple=True)) for expert in probes.unique().tolist()]
        products = hidden.new_empty(*probes.shape, keys.shape[1])
        for expert, token, probe in visits:
            products[token, probe] = hidden[token] @ keys[expert].T
        shares = None if self.shares is None else self.shares.unflatten(0, (keys.shape[0], -1))[probes].flatten(1)
        gated = self._active(products.flatten(1), shares).view_as(products) * gates.unsqueeze(2)
        result = torch.zeros_like(hidden)
        for expert, token, probe in visits:
            result.index_add_(0, token, gated[token, probe] @ values[expert])
        return result

    def _gates(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each token's experts multiply their rows by, and which they are, ``[T, P]``, by the router's scores."""
        if self.stage:
            gate, light = scores.tensor_split(2, dim=1)
            probes = (gate if self.stage == 1 else light).argmax(dim=1, keepdim=True)
            return gate.gather(1, probes).sigmoid(), probes
        if self.by_probability:
            scores = scores.softmax(dim=1)
        best = scores.topk(self.num_probes, dim=1)
        return best.values, best.indices

    def _probed(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Centroids: bool ``[T, R]``, the rows of the experts that a token probes, of which it takes its own."""
        if not self.experts_by_means:
            return None
        size = self.keys.shape[0] // self.experts_by_means
        probes = nearest_experts(self._means, hidden, num_probes=self.num_probes)
        probed = torch.zeros(hidden.shape[0], self.experts_by_means, dtype=torch.bool)
        rows: torch.Tensor = probed.scatter_(1, probes.long(), True).repeat_interleave(size, dim=1)
        return rows

    @cached_property
    def _means(self) -> torch.Tensor:
        means: torch.Tensor = self.keys.unflatten(0, (self.experts_by_means, -1)).mean(dim=1)
        return means

    def _active(
        self, products: torch.Tensor, shares: torch.Tensor | None, probed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Activations from ``products [T, rows]`` of hidden states and keys: those that a token meets, and of others
        their ``shares``, ``[rows]`` or ``[T, rows]``, or nothing. ``probed`` are the rows that may be its own."""
        activations = torch.relu(products)
        if self.serving.min_score is not None:
            activations.masked_fill_(products < self.serving.min_score, 0.0)
        own = self.serving.rows_per_token or self.top_k
        if probed is not None:
            own = min(own, self.keys.shape[0] // self.experts_by_means * self.num_probes)
            products = products.masked_fill(~probed, -math.inf)
        if (self.serving.rows_per_token is None and shares is None) or own >= products.shape[1]:
            return activations
        others = products < products.topk(own, dim=1).values[:, -1:]  # of equal ones all are the token's own
        if self.serving.rows_per_token is not None or shares is None:
            return activations.masked_fill_(others, 0.0)
        return torch.where(others, activations * shares, activations)


@contextmanager
def serving(session: Session, how: Serving = AS_TRAINED) -> Iterator[None]:
    """Inference with a session's adapter: model in eval mode, transfers counted apart from the training steps'.

    Begins once the lanes have done what training left to them, updates of rows above all. An accumulation window that
    is open stays as it is: rows are read on the host, where the window does not change them.
    """
    model, engine = session.model, session.engine
    session.bring_home()
    was_training, per = model.training, engine.per
    engine.per = "probe"
    model.eval()
    try:
        with torch.no_grad(), session.clock.paused():
            session.adapter.serving = _Served(session, _rows_of(session, how)).output
            yield
            session.drain()
    finally:
        session.adapter.serving = None
        model.train(was_training)
        engine.per = per


def _rows_of(session: Session, how: Serving) -> tuple[LayerRows, ...]:
    """The session's rows as they lie on the host, and its routers brought there."""
    routers: Sequence[torch.Tensor | None] = [None] * session.store.num_layers
    if session.router_weights:
        routers = [_brought(session, weight.detach(), category="routers") for weight in session.router_weights]
    how = how.after(session.plan.decision.tokens_see, session.plan.decision.top_k)
    decision, shares = session.plan.decision, session.store.use.shares() or [None] * session.store.num_layers
    return tuple(
        LayerRows(
            tables.keys,
            tables.values,
            router,
            decision.num_probes,
            how,
            decision.top_k,
            share,
            **found_by(decision.routing, decision.num_experts, stage_of(session) or 0),
        )
        for tables, router, share in zip(session.store.layers, routers, shares, strict=True)
    )


def _brought(session: Session, tensor: torch.Tensor, *, category: str) -> torch.Tensor:
    host = session.engine.host_empty(*tensor.shape, dtype=tensor.dtype)
    session.engine.to_host(tensor, host, category=category).wait_on_host()
    return host


@dataclass(frozen=True)
class _Served:
    """Carries hidden states to the host and outputs back."""

    session: Session
    layers: tuple[LayerRows, ...]

    def output(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output on the device, in the dtype of ``hidden``."""
        session, rows = self.session, self.layers[layer]
        queries = _brought(session, hidden, category="queries")
        with session.device.host():
            answer = rows.output(queries.to(rows.keys.dtype)).to(hidden.dtype)
            source = session.engine.host_empty(*answer.shape, dtype=answer.dtype)
            source.copy_(answer)
        target = torch.empty_like(hidden)
        copy = session.engine.to_device(source, target, category="outputs")
        copy.wait_on_device()
        copy.wait_on_host()  # the host buffer goes when this returns
        return target


class Speaking:
    """Whether an adapter that shares its base with others is the one that is asked."""

    def __init__(self) -> None:
        self.now = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """It is, inside."""
        before, self.now = self.now, True
        try:
            yield
        finally:
            self.now = before


def attach_rows(model: nn.Module, layers: Sequence[LayerRows], speaking: Speaking | None = None) -> Callable[[], None]:
    """Hook rows beside every FFN of a model for inference; returns what takes them off again.

    The rows stay on the host; hidden states go there and outputs come back, whatever device the model is on. They
    are added where ``speaking`` says so, always where it is None.
    """
    blocks = ffn_modules(model)
    if len(blocks) != len(layers):
        raise UsageError(f"the model has {len(blocks)} FFN blocks, the adapter {len(layers)} layers")

    def hook_of(rows: LayerRows) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if speaking is not None and not speaking.now:
                return output
            hidden = ffn_input(module, args, kwargs).flatten(0, -2)
            with plan_dtypes(hidden.device):
                answer = rows.output(hidden.to("cpu", rows.keys.dtype))
            return add_to(output, answer.to(hidden.device, hidden.dtype))

        return hook

    handles = [
        block.register_forward_hook(hook_of(rows), with_kwargs=True) for block, rows in zip(blocks, layers, strict=True)
    ]

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach
