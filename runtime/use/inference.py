"""The adapter at inference, computed on the host where the rows are.

Training serves all tokens of a micro-batch with the union of their rows, so a token's output depends a little on what
else is in the batch. Generation must not: an answer may not change with the questions that happen to share its batch,
nor with padding. Here each token meets all rows (with Key-Experts all rows of the experts it probes), which is what the
union grows into; or of those its own best ones alone, which leaves more of what the model said before
(``docs/learning.md``). Only hidden states and outputs travel, ``2 T D`` numbers per layer; no row lies on
the device.

Letters: ``T`` tokens, ``D`` hidden size, ``R`` adapter rows, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meft.planner.base.errors import UsageError
from meft.runtime.adapter.adapter import add_to, ffn_input, plan_dtypes
from meft.runtime.adapter.blocks import ffn_modules
from meft.runtime.session.session import Session


@dataclass(frozen=True)
class LayerRows:
    """A layer's adapter on the host: ``keys`` and ``values`` ``[R, D]``; for Key-Experts ``router`` ``[N, D]``."""

    keys: torch.Tensor
    values: torch.Tensor
    router: torch.Tensor | None = None
    num_probes: int = 1
    rows_per_token: int | None = None
    """How many rows a token meets, those with the largest ``h . key``; None: all (of its experts)."""

    def __post_init__(self) -> None:
        if self.rows_per_token is not None and self.rows_per_token < 1:
            raise UsageError(f"rows_per_token {self.rows_per_token}: a token meets one row at least; None is all")

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """Adapter output ``[T, D]`` for ``hidden [T, D]`` in the rows' dtype."""
        if self.router is None:
            return torch.relu(self._met(hidden @ self.keys.T)) @ self.values
        scores = hidden @ self.router.T
        gates, probes = scores.topk(self.num_probes, dim=1)
        keys, values = (part.unflatten(0, (self.router.shape[0], -1)) for part in (self.keys, self.values))
        visits = [(expert, *(probes == expert).nonzero(as_tuple=True)) for expert in probes.unique().tolist()]
        products = hidden.new_empty(*probes.shape, keys.shape[1])
        for expert, token, probe in visits:
            products[token, probe] = hidden[token] @ keys[expert].T
        gated = torch.relu(self._met(products.flatten(1)).view_as(products)) * gates.unsqueeze(2)
        result = torch.zeros_like(hidden)
        for expert, token, probe in visits:
            result.index_add_(0, token, gated[token, probe] @ values[expert])
        return result

    def _met(self, products: torch.Tensor) -> torch.Tensor:
        """``products [T, rows]`` of hidden states and keys, zero but for the best :attr:`rows_per_token` (and ties)."""
        if self.rows_per_token is None or self.rows_per_token >= products.shape[1]:
            return products
        least = products.topk(self.rows_per_token, dim=1).values[:, -1:]
        return products.masked_fill(products < least, 0.0)


@contextmanager
def serving(session: Session, rows_per_token: int | None = None) -> Iterator[None]:
    """Inference with a session's adapter: model in eval mode, transfers counted apart from the training steps'.

    Each token meets its best ``rows_per_token`` rows, or all.

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
            session.adapter.serving = _Served(session, _rows_of(session, rows_per_token)).output
            yield
            session.drain()
    finally:
        session.adapter.serving = None
        model.train(was_training)
        engine.per = per


def _rows_of(session: Session, rows_per_token: int | None) -> tuple[LayerRows, ...]:
    """The session's rows as they lie on the host, and its routers brought there."""
    routers: Sequence[torch.Tensor | None] = [None] * session.store.num_layers
    if session.router_weights:
        routers = [_brought(session, weight.detach(), category="routers") for weight in session.router_weights]
    probes = session.plan.decision.num_probes
    return tuple(
        LayerRows(tables.keys, tables.values, router, probes, rows_per_token)
        for tables, router in zip(session.store.layers, routers, strict=True)
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
