"""Stable routing: equal to the readable one in both stages, its losses by hand, and what is frozen gets no gradient."""

from __future__ import annotations

import math

import pytest
import torch
from oracle_step import STABLE, TOKENS, assert_step_equals_the_oracle, dense_twin
from sparse_setup import decision, run_step, sparse_setup

from meft.planner.records.routing import StableOptions
from meft.runtime.exchange.gating import StableGating

UNWEIGHED = {"stable": STABLE["stable"] | {"balance_loss": 0.0}}


def setup_in(stage: int, **choice):
    setup = sparse_setup(decision(**(STABLE | {"top_k": 2} | choice)))
    setup.exchange.gating.frozen = stage == 2
    return setup


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("see", ["union", "own"])
@pytest.mark.parametrize("more", [{}, UNWEIGHED], ids=["balanced", "not balanced"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_equals_the_oracle(depth, see, more, stage) -> None:
    """Outputs, and gradients of input, rows and both routers, those of balance and of what the light one learns."""
    setup = setup_in(stage, prefetch_depth=depth, tokens_see=see, **more)
    assert_step_equals_the_oracle(setup)
    light = torch.stack([weight.grad[4:] for weight in setup.weights])
    assert bool(light.any()) == (stage == 1)


@pytest.mark.parametrize("stage", [1, 2])
def test_tokens_go_where_the_oracle_sends_them(stage) -> None:
    """No expert is ever full, and whom it asks depends on the stage."""
    setup, sent = setup_in(stage), []
    dense = dense_twin(setup)
    original = StableGating.scores

    def note(self, layer, inputs, weight, probes):
        sent.append((layer, inputs.detach().clone(), probes.long().clone()))
        return original(self, layer, inputs, weight, probes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableGating, "scores", note)
        run_step(setup, torch.randn(TOKENS, 8, dtype=torch.float64), torch.zeros(TOKENS, 8, dtype=torch.float64))
    assert len(sent) == 3
    others = 0
    for layer, inputs, probes in sent:
        dense.adapters[layer].frozen = stage == 2
        assert torch.equal(probes, dense.adapters[layer].dispatch(inputs))
        dense.adapters[layer].frozen = stage == 1
        others += int((probes != dense.adapters[layer].dispatch(inputs)).sum())
    assert others > 0


def test_the_losses_are_the_papers() -> None:
    """Two experts, four tokens, three of which go to the first: (3 - 2) / 2 and (1 - 2) / 2 weigh their gates."""
    gating = StableGating(StableOptions(balance_loss=0.5), 2)
    probes = torch.tensor([[0], [0], [0], [1]], dtype=torch.int32)
    gates = torch.tensor([0.9, 0.8, 0.6, 0.7])
    scores = torch.zeros(4, 4)
    scores[range(4), [0, 0, 0, 1]] = gates.logit()
    scores[:, 2] = math.log(3)  # the light router: three to one for the first expert
    balance = 0.5 / 4 * (0.5 * (0.9 + 0.8 + 0.6) - 0.5 * 0.7)
    learnt = -(3 * math.log(0.75) + math.log(0.25)) / 4
    assert float(gating.balance_loss(scores, probes)) == pytest.approx(balance + learnt)
    gating.frozen = True
    assert gating.balance_loss(scores, probes) is None


def test_the_light_router_learns_the_choice() -> None:
    """By plain gradient descent on its loss alone it comes to choose what the gate chooses."""
    gating = StableGating(StableOptions(balance_loss=0.0), 4)
    torch.manual_seed(0)
    inputs, weight = torch.randn(256, 8), 0.3 * torch.randn(8, 8)
    light = weight[4:]
    chosen = gating.probes(0, inputs, weight)
    nothing = torch.zeros(256, 4)

    def agreed() -> float:
        own = StableGating(gating.options, 4, frozen=True).probes(0, inputs, weight)
        return float((own == chosen).float().mean())

    before = agreed()
    for _ in range(300):
        scores = gating.scores(0, inputs, weight, chosen)
        grad = gating.backward(nothing, torch.ones(()), scores, chosen)
        light -= gating.weight_gradient(0, grad, inputs, weight)[4:]
    assert before < 0.6 < 0.95 < agreed()
