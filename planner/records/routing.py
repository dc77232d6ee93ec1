"""Ways to find a token's rows, and what each of them needs: the one table that plans, ledgers and the runtime read.

- *exact*: every row is scored for every token.
- *key-experts* (score-gated, as the authors' code): a router ``[N, D]`` on the device scores the experts; a token looks
  through the rows of its best ``P``, each multiplied by its expert's score, which trains the router.
- *centroid* (the MEFT paper's Algorithm 1): the router's rows are the means of the experts' keys. They lie on the host,
  are current as rows are updated, gate nothing and train nothing: the device holds none of it.
- *switch* (Fedus, Zoph and Shazeer, 2021): a token goes to the one expert to which the router gives the highest
  probability, which multiplies its rows. An expert takes only so many tokens; to others the adapter adds nothing.
- *stable* (StableMoE, Dai et al., ACL 2022): a token goes to one expert, whose rows the sigmoid of a learnt score
  multiplies. In a first stage that score chooses it too, a loss keeps experts equally busy, and a second, light router
  learns the choice from the hidden state; from then on the light router is frozen and chooses alone.

Letters: ``N`` experts, ``P`` probes, ``D`` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from meft.planner.base.schema import Record

Routing = Literal["exact", "key-experts", "centroid", "switch", "stable"]


@dataclass(frozen=True, kw_only=True)
class RoutingNeeds:
    """What a routing takes beside the rows themselves."""

    title: str
    in_experts: bool = True
    """Rows lie in ``N`` experts, and a token looks through those of ``P``."""
    gated: bool = True
    """A router ``[N, D]`` on the device, with its gradient and moments, multiplies the rows; its probes travel."""
    means: bool = False
    """The host keeps the mean of each expert's keys."""
    one_expert: bool = False
    """``P`` is 1, and the router computes in fp32."""
    routers: int = 1
    """Of those with a router: how many ``[N, D]`` a layer has, one below the other."""

    def router_rows(self, num_experts: int) -> int:
        """Of a layer's router on the device, ``[rows, D]``; 0 where it has none."""
        return self.routers * num_experts if self.gated else 0


ROUTINGS: dict[Routing, RoutingNeeds] = {
    "exact": RoutingNeeds(title="exact choice", in_experts=False, gated=False),
    "key-experts": RoutingNeeds(title="Key-Experts"),
    "centroid": RoutingNeeds(title="centroids", gated=False, means=True),
    "switch": RoutingNeeds(title="switch", one_expert=True),
    "stable": RoutingNeeds(title="two stages", one_expert=True, routers=2),
}


MAX_CAPACITY_FACTOR = 1024.0
MAX_BALANCE_LOSS = 100.0
CapacityFactor = Annotated[float, Field(gt=0.0, le=MAX_CAPACITY_FACTOR)]
Jitter = Annotated[float, Field(ge=0.0, lt=1.0)]
BalanceLoss = Annotated[float, Field(ge=0.0, le=MAX_BALANCE_LOSS)]
FirstStage = Annotated[float, Field(gt=0.0, le=1.0)]


class SwitchOptions(Record):
    """What a switch router has of its own; the usual values are the paper's (its sections 2.2 and 2.4)."""

    capacity_factor: CapacityFactor = 1.25
    """An expert takes ``ceil(capacity_factor * T / N)`` tokens of a micro-batch, the first ones."""
    jitter: Jitter = 0.01
    """What the router reads in training is multiplied by random numbers within ``1 +- jitter``."""
    balance_loss: BalanceLoss = 0.01
    """Weight ``alpha`` of the loss ``alpha * N * sum f_i P_i`` of each layer."""


class StableOptions(Record):
    """What stable routing has of its own; the usual values are assumed: the paper's as we remember them."""

    first_stage: FirstStage = 0.1
    """Share of a run's steps after which the light router is frozen and chooses, at the end of a window; 1: never."""
    balance_loss: BalanceLoss = 0.3
    """Weight ``alpha`` of the loss ``alpha / T * sum_i (T_i - T/N) / (T/N) * (sum of the gates of i's T_i tokens)`` of
    each layer in the first stage."""


def require_fitting(routing: Routing | None, *, always: bool, **options: Record | None) -> None:
    """Raise :class:`ValueError` where there are ``options`` of another routing, each under its routing's name; or, with
    ``always``, where a routing's own are missing."""
    for name, of_routing in options.items():
        if of_routing is None and not (always and routing == name):
            continue
        if routing != name:
            raise ValueError(f"{name} options are of routing {name} alone; routing is {routing}")
        if of_routing is None:
            raise ValueError(f"{name} options are of routing {name}, which has them always")
