"""The adapter at inference: every row of a token's experts, computed on the host where the rows are.

Training serves all tokens of a micro-batch with the union of their rows, so a token's output depends a little on what
else is in the batch. Generation must not: an answer may not change with the questions that happen to share its batch,
nor with padding. Here each token meets all rows (with Key-Experts all rows of the experts it probes), which is what the
union grows into. Only hidden states and outputs travel, ``2 T D`` numbers per layer, and no row lies on the device.

Letters: ``T`` tokens, ``D`` hidden size, ``R`` adapter rows, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meft.planner.errors import UsageError
from meft.runtime.adapter import add_to, ffn_modules
from meft.runtime.session import Session


@dataclass(frozen=True)
class LayerRows:
    """A layer's adapter on the host: ``keys`` and ``values`` ``[R, D]``; for Key-Experts ``router`` ``[N, D]``."""

    keys: torch.Tensor
    values: torch.Tensor
    router: torch.Tensor | None = None
    num_probes: int = 1

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """Adapter output ``[T, D]`` for ``hidden [T, D]`` in the rows' dtype."""
        if self.router is None:
            return torch.relu(hidden @ self.keys.T) @ self.values
        scores = hidden @ self.router.T
        probes = scores.topk(self.num_probes, dim=1).indices
        rows_per_expert = self.keys.shape[0] // self.router.shape[0]
        result = torch.zeros_like(hidden)
        for expert in probes.unique().tolist():
            token, _ = (probes == expert).nonzero(as_tuple=True)
            rows = slice(expert * rows_per_expert, (expert + 1) * rows_per_expert)
            gated = torch.relu(hidden[token] @ self.keys[rows].T) * scores[token, expert].unsqueeze(1)
            result.index_add_(0, token, gated @ self.values[rows])
        return result


@contextmanager
def serving(session: Session) -> Iterator[None]:
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
            session.adapter.serving = _Served(session, _rows_of(session)).output
            yield
            session.drain()
    finally:
        session.adapter.serving = None
        model.train(was_training)
        engine.per = per


def _rows_of(session: Session) -> tuple[LayerRows, ...]:
    """The session's rows as they lie on the host, and its routers brought there."""
    routers: Sequence[torch.Tensor | None] = [None] * session.store.num_layers
    if session.router_weights:
        routers = [_brought(session, weight.detach(), category="routers") for weight in session.router_weights]
    probes = session.plan.decision.num_probes
    return tuple(
        LayerRows(tables.keys, tables.values, router, probes)
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


def attach_rows(model: nn.Module, layers: Sequence[LayerRows]) -> Callable[[], None]:
    """Hook rows beside every FFN of a model for inference; returns what takes them off again.

    The rows stay on the host; hidden states go there and outputs come back, whatever device the model is on.
    """
    blocks = ffn_modules(model)
    if len(blocks) != len(layers):
        raise UsageError(f"the model has {len(blocks)} FFN blocks, the adapter {len(layers)} layers")

    def hook_of(rows: LayerRows) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            del module
            hidden = args[0].flatten(0, -2)
            answer = rows.output(hidden.to("cpu", rows.keys.dtype))
            return add_to(output, answer.to(hidden.device, hidden.dtype))

        return hook

    handles = [block.register_forward_hook(hook_of(rows)) for block, rows in zip(blocks, layers, strict=True)]

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach
