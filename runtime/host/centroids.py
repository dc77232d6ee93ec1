"""The MEFT paper's way to find experts: a router whose rows are the means of the experts' keys.

It trains nothing and gates nothing and lies on the host. It is kept current: what was updated is marked stale, and a
stale layer's means are taken anew, of the keys as they are, when the layer is next routed: once an optimizer step, and
the same bits whether or not a run was interrupted. Experts are rows that lie together, as of Key-Experts.

Letters: ``T`` tokens, ``D`` hidden size, ``R`` adapter rows, ``N`` experts, ``P`` experts that a token probes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from meft.planner.base.errors import UsageError
from meft.runtime.host.router import Router, Selection


class KeyMeans:
    """Each layer's mean key of every expert, fp32 ``[N, D]`` (or as wide as the masters)."""

    def __init__(self, *, num_layers: int, num_experts: int, hidden_size: int, dtype: torch.dtype) -> None:
        self.tables = tuple(torch.zeros(num_experts, hidden_size, dtype=dtype) for _ in range(num_layers))
        self._stale = [True] * num_layers

    def keys_changed(self, layer: int) -> None:
        """The layer's keys are others than before."""
        self._stale[layer] = True

    def is_stale(self, layer: int) -> bool:
        """Whether the layer's keys are others than when their means were taken."""
        return self._stale[layer]

    def take(self, layer: int, keys: torch.Tensor, experts: slice = slice(None)) -> torch.Tensor:
        """Take the means of ``keys``, the layer's, or those of some ``experts``; the others' are current already, or
        come from elsewhere. Those taken, a view."""
        some = self.tables[layer][experts]
        torch.mean(keys.unflatten(0, (some.shape[0], -1)), dim=1, out=some)
        self._stale[layer] = False
        return some

    def of(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """The means of the layer's ``keys [R, D]``, as they are now."""
        if self._stale[layer]:
            self.take(layer, keys)
        return self.tables[layer]


@dataclass(frozen=True)
class CentroidRouter:
    """Each token's rows by the ``inner`` router, among the ``num_probes`` experts whose mean key it scores highest."""

    inner: Router
    means: KeyMeans = field(repr=False)
    num_probes: int

    def select(self, layer: int, keys: torch.Tensor, queries: torch.Tensor, probes: torch.Tensor | None) -> Selection:
        """See :class:`~meft.runtime.host.router.Router`; ``probes`` are this router's own."""
        if probes is not None:
            raise UsageError("a centroid router finds the experts itself: the plan's routing should be centroid")
        return self.inner.select(layer, keys, queries, self.probes(layer, keys, queries))

    def probes(self, layer: int, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """The experts that each token probes, int32 ``[T, P]``."""
        return nearest_experts(self.means.of(layer, keys), queries.to(keys.dtype), num_probes=self.num_probes)


def nearest_experts(means: torch.Tensor, queries: torch.Tensor, *, num_probes: int) -> torch.Tensor:
    """Of each of ``queries [T, D]`` the experts whose ``means [N, D]`` score highest, int32 ``[T, P]``."""
    return (queries @ means.T).topk(num_probes, dim=1).indices.to(torch.int32)
