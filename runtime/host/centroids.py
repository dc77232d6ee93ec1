"""The MEFT paper's way to find experts: a router whose rows are the means of the experts' keys.

It trains nothing and gates nothing, lies on the host, and is current by construction: the means are taken anew of the
keys as they are, ``R D`` additions where the exact choice takes ``T R D`` products. Experts are rows that lie together,
as of Key-Experts.

Letters: ``T`` tokens, ``D`` hidden size, ``R`` adapter rows, ``N`` experts, ``P`` experts that a token probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meft.planner.base.errors import UsageError
from meft.runtime.host.kernels import HostKernels
from meft.runtime.host.router import Selection, TopKRouter


@dataclass(frozen=True)
class CentroidRouter:
    """In the place of exact routing: each token's ``top_k`` rows among the ``num_probes`` of ``num_experts`` experts
    whose mean key it scores highest."""

    top_k: int
    active_rows_cap: int
    num_experts: int
    num_probes: int
    kernels: HostKernels | None = None

    def __post_init__(self) -> None:
        """Refuse what leaves a token nothing to choose from."""
        if not 1 <= self.num_probes <= self.num_experts:
            raise UsageError(f"num_probes {self.num_probes}: is not between 1 and num_experts, {self.num_experts}")

    def select(self, layer: int, keys: torch.Tensor, queries: torch.Tensor, probes: torch.Tensor | None) -> Selection:
        """See :class:`~meft.runtime.host.router.Router`; ``probes`` are this router's own.

        Raises:
            UsageError: the experts are not of equal size, or too small for ``top_k`` rows.
        """
        if probes is not None:
            raise UsageError("a centroid router takes the place of exact routing: the plan has routers of its own")
        if queries.shape[0] == 0:
            return Selection(torch.empty(0, dtype=torch.int64))
        found = self.probes(keys, queries)
        inner = TopKRouter(self.top_k, self.active_rows_cap, self.num_experts, self.kernels)
        return inner.select(layer, keys, queries, found)

    def probes(self, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """The experts that each token probes, int32 ``[T, P]``."""
        rows, size = keys.shape[0], keys.shape[0] // self.num_experts
        if rows % self.num_experts or size * self.num_probes < self.top_k:
            raise UsageError(
                f"num_experts {self.num_experts}: {rows} rows do not make as many of equal size with {self.top_k} rows "
                f"in {self.num_probes} of them; give fewer experts or more probes"
            )
        means = keys.view(self.num_experts, size, -1).mean(dim=1)
        scores = queries.to(keys.dtype) @ means.T
        return scores.topk(self.num_probes, dim=1).indices.to(torch.int32)
