"""Routing on the host: which rows a micro-batch activates.

Each token takes the ``K`` rows with the largest ``h . key``; the union over tokens is fetched. *Exact* routing scores
all ``R`` rows. *Key-Experts* scores only the rows of the ``P`` experts that the device's router chose for the token
(its probes); expert ``n`` owns rows ``n*R/N .. (n+1)*R/N - 1``.

When the union exceeds ``active_rows_cap``, the rows with the highest summed positive activation stay (ties: the lower
row), and the rest are counted as dropped.

Letters: ``T`` tokens, ``D`` hidden size, ``R`` rows, ``K`` rows per token, ``A`` active rows, ``N`` experts, ``P``
probes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from meft.runtime.host.kernels import HostKernels


@dataclass(frozen=True)
class Selection:
    """The rows of one layer in one micro-batch: ``rows`` int64 ``[A]`` ascending, and how many the cap cost."""

    rows: torch.Tensor
    dropped_rows: int = 0

    @property
    def num_rows(self) -> int:
        """``A``."""
        return self.rows.shape[0]


class Router(Protocol):
    """Chooses a layer's rows."""

    def select(self, layer: int, keys: torch.Tensor, queries: torch.Tensor, probes: torch.Tensor | None) -> Selection:
        """Choose rows of ``keys [R, D]`` for ``queries [T, D]``, each token within its ``probes [T, P]`` if given."""
        ...


@dataclass(frozen=True)
class TopKRouter:
    """The router of both routings: exact without probes, Key-Experts with them.

    With ``kernels`` all but the product with every key is compiled.
    """

    top_k: int
    active_rows_cap: int
    num_experts: int
    kernels: HostKernels | None = None

    def select(self, layer: int, keys: torch.Tensor, queries: torch.Tensor, probes: torch.Tensor | None) -> Selection:
        """See :class:`Router`."""
        del layer
        if queries.shape[0] == 0:
            return Selection(torch.empty(0, dtype=torch.int64))
        queries = queries.to(keys.dtype)
        if probes is None:
            probes, scores = torch.zeros(queries.shape[0], 1, dtype=torch.int64), queries @ keys.T
        else:
            scores = self.scores(keys, queries, probes, num_experts=self.num_experts)
        return self.best_of(scores, probes, num_rows=keys.shape[0])

    def scores(
        self, keys: torch.Tensor, queries: torch.Tensor, probes: torch.Tensor, *, num_experts: int
    ) -> torch.Tensor:
        """Of ``queries [T, D]`` with the rows of their ``probes [T, P]``, ``[T, P * R/N]``; one dtype throughout.

        An expert's scores depend on its own rows and tokens alone, bit for bit.
        """
        if self.kernels is not None:
            return self.kernels.probed_scores(keys, queries, probes, num_experts=num_experts)
        rows_per_expert = keys.shape[0] // num_experts
        scores = queries.new_empty(*probes.shape, rows_per_expert)
        for expert in probes.unique().tolist():
            token, probe = (probes == expert).nonzero(as_tuple=True)
            first = expert * rows_per_expert
            scores[token, probe] = queries[token] @ keys[first : first + rows_per_expert].T
        return scores.flatten(1)

    def best_of(self, scores: torch.Tensor, probes: torch.Tensor, *, num_rows: int) -> Selection:
        """The union of each token's ``K`` best by what :meth:`scores` gave, cut to the cap; ``num_rows`` is ``R``."""
        rows_per_expert = scores.shape[1] // probes.shape[1]
        if self.kernels is not None:
            best, rows = self.kernels.top_rows(scores, probes, rows_per_expert=rows_per_expert, top_k=self.top_k)
            union, activation = self.kernels.union(best, rows, num_rows=num_rows)
            return cut_to_cap(union, activation, cap=self.active_rows_cap)
        best, place = scores.topk(self.top_k, dim=1)
        expert_of_place = probes.long().gather(1, place // rows_per_expert)
        rows = expert_of_place * rows_per_expert + place % rows_per_expert
        return capped_union(rows, best, num_rows=num_rows, cap=self.active_rows_cap)


@dataclass(frozen=True)
class PlannedRouter:
    """The router of a rehearsal: as many rows as the plan predicts, whatever the queries."""

    active_rows_per_layer: tuple[int, ...]

    def select(self, layer: int, keys: torch.Tensor, queries: torch.Tensor, probes: torch.Tensor | None) -> Selection:
        """See :class:`Router`."""
        del keys, queries, probes
        return Selection(torch.arange(self.active_rows_per_layer[layer]))


def capped_union(rows: torch.Tensor, scores: torch.Tensor, *, num_rows: int, cap: int) -> Selection:
    """Union of ``rows [T, K]``, cut to ``cap`` by the highest sum of ``max(scores, 0)`` over the tokens."""
    activation = torch.zeros(num_rows, dtype=scores.dtype)
    activation.index_add_(0, rows.flatten(), scores.flatten().clamp(min=0))
    chosen = torch.zeros(num_rows, dtype=torch.bool)
    chosen[rows.flatten()] = True
    union = chosen.nonzero().flatten()
    return cut_to_cap(union, activation[union], cap=cap)


def cut_to_cap(union: torch.Tensor, activation: torch.Tensor, *, cap: int) -> Selection:
    """The ``cap`` rows of ``union`` with the highest ``activation`` (one number per row; ties: the lower row)."""
    if union.shape[0] <= cap:
        return Selection(union)
    order = activation.argsort(descending=True, stable=True)
    return Selection(union[order[:cap]].sort().values, dropped_rows=union.shape[0] - cap)
