"""The host's part of every routing of :mod:`meft.planner.records.routing`: which router chooses a layer's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from meft.planner.records.plan import Decision
from meft.planner.records.routing import Routing
from meft.runtime.host.centroids import CentroidRouter
from meft.runtime.host.kernels import HostKernels
from meft.runtime.host.router import Router, Selection, TopKRouter
from meft.runtime.host.store import HostStore


@dataclass(frozen=True)
class SwitchRouter:
    """Rows by the ``inner`` router for the tokens that their expert takes: those dropped, whose probe is negative (see
    :mod:`meft.runtime.exchange.gating`), bring none."""

    inner: Router

    def select(self, layer: int, keys: torch.Tensor, queries: torch.Tensor, probes: torch.Tensor | None) -> Selection:
        """See :class:`~meft.runtime.host.router.Router`."""
        if probes is None:
            raise ValueError("a switch router needs the experts that the device chose")
        taken = probes[:, 0] >= 0
        return self.inner.select(layer, keys, queries[taken], probes[taken])


def top_k_of(decision: Decision, kernels: HostKernels | None) -> TopKRouter:
    """What takes the best rows in every routing, however their experts were found."""
    return TopKRouter(decision.top_k, decision.active_rows_cap, decision.num_experts, kernels)


def _centroids(decision: Decision, store: HostStore, kernels: HostKernels | None) -> Router:
    if store.means is None:
        raise ValueError("a centroid router needs a store that keeps the means of keys")
    return CentroidRouter(top_k_of(decision, kernels), store.means, decision.num_probes)


_ROUTERS: dict[Routing, Callable[[Decision, HostStore, HostKernels | None], Router]] = {
    "exact": lambda decision, _, kernels: top_k_of(decision, kernels),
    "key-experts": lambda decision, _, kernels: top_k_of(decision, kernels),
    "centroid": _centroids,
    "switch": lambda decision, _, kernels: SwitchRouter(top_k_of(decision, kernels)),
    "stable": lambda decision, _, kernels: top_k_of(decision, kernels),
}


def router_of(decision: Decision, store: HostStore, kernels: HostKernels | None = None) -> Router:
    """The router of a decision's routing; with ``kernels`` it chooses by compiled code."""
    return _ROUTERS[decision.routing](decision, store, kernels)
