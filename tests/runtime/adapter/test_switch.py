"""The switch router: equal to the readable one, full experts drop tokens, balance is trained, jitter is repeatable."""

from __future__ import annotations

import pytest
import torch
from oracle_step import EXACT, SWITCH, TOKENS, assert_step_equals_the_oracle, dense_twin, give_noise
from sparse_setup import decision, run_step, sparse_setup

from meft.planner.records.routing import SwitchOptions
from meft.runtime.exchange.gating import SwitchGating, capacity, shares_of_experts
from meft.runtime.host.router import TopKRouter
from meft.runtime.host.routers import SwitchRouter

NO_JITTER = {"switch": SWITCH["switch"] | {"jitter": 0.0}}
NO_LOSS = {"switch": SWITCH["switch"] | {"balance_loss": 0.0}}
WAYS = {"as a whole": {}, "no jitter": NO_JITTER, "no balance loss": NO_LOSS}


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("see", ["union", "own"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_equals_the_oracle(depth, see, way) -> None:
    """Outputs, and gradients of input, rows and routers, those of the balance loss among them."""
    choice = SWITCH | WAYS[way] | {"prefetch_depth": depth, "tokens_see": see, "top_k": 2}
    setup = sparse_setup(decision(**choice))
    assert_step_equals_the_oracle(setup)
    assert 0 < min(state.selection.num_rows for state in setup.exchange.layers) <= 4 * 2


def test_tokens_go_where_the_oracle_sends_them() -> None:
    """Without look-ahead it finds experts and full ones by itself, token by token."""
    setup = sparse_setup(decision(**SWITCH, top_k=2))
    dense, sent = dense_twin(setup), []
    original = setup.exchange.gating.__class__.scores

    def note(self, layer, inputs, weight, probes):
        sent.append((layer, inputs.detach().clone(), probes.long().clone()))
        return original(self, layer, inputs, weight, probes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SwitchGating, "scores", note)
        run_step(setup, torch.randn(TOKENS, 8, dtype=torch.float64), torch.zeros(TOKENS, 8, dtype=torch.float64))
    give_noise(setup, dense)
    assert len(sent) == 3
    for layer, inputs, probes in sent:
        assert torch.equal(probes, dense.adapters[layer].dispatch(inputs))
    assert any((probes < 0).any() for *_, probes in sent)


def gating(*, seed: int = 0, micro_batch: int = 0, **options: float) -> SwitchGating:
    return SwitchGating(SwitchOptions(**({"jitter": 0.0} | options)), seed, lambda: micro_batch)


def test_an_expert_takes_the_first_tokens_that_choose_it() -> None:
    """Tokens 0, 1, 3 and 4 score expert 1 highest; ceil(1.0 * 5 / 2) = 3 have room."""
    inputs = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0], [1.0, 1.5], [0.0, 4.0]])
    probes = gating(capacity_factor=1.0).probes(0, inputs, torch.eye(2))
    assert probes.flatten().tolist() == [1, 1, 0, 1, ~1]
    assert probes.dtype is torch.int32
    assert capacity(SwitchOptions(), 512, 128) == 5


def test_the_balance_loss_is_the_papers() -> None:
    """Two experts, four tokens: f = (3/4, 1/4), P the mean probability; alpha * N * sum f_i P_i; even: alpha."""
    probes = torch.tensor([[0], [0], [~0], [1]], dtype=torch.int32)
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    assert shares_of_experts(probes, scores).tolist() == [0.75, 0.25]
    loss = gating(balance_loss=0.5).balance_loss(scores, probes)
    assert float(loss) == pytest.approx(0.5 * 2 * (0.75 * 0.65 + 0.25 * 0.35))
    even = torch.tensor([[0], [1]], dtype=torch.int32)
    assert float(gating(balance_loss=0.5).balance_loss(torch.full((2, 2), 0.5), even)) == pytest.approx(0.5)
    assert gating(balance_loss=0.0).balance_loss(scores, probes) is None


def test_a_dropped_token_is_answered_by_the_ffn_alone() -> None:
    """One expert with room for one token: of all others the output is as without an adapter."""
    one = {"routing": "switch", "num_experts": 1, "switch": {"capacity_factor": 0.2, "jitter": 0.0}}
    setup = sparse_setup(decision(**one, top_k=12), num_layers=1)
    hidden = torch.randn(TOKENS, 8, dtype=torch.float64)
    output, _ = run_step(setup, hidden, torch.zeros_like(hidden))
    setup.adapter.detach()
    alone = setup.model(hidden).detach()
    torch.testing.assert_close(output[1:], alone[1:], **EXACT)
    assert not torch.allclose(output[0], alone[0])


def test_jitter_follows_from_seed_micro_batch_and_layer() -> None:
    like = torch.empty(64, 8)

    def drawn(layer: int = 0, **of: int) -> torch.Tensor:
        noise = gating(jitter=0.1, **of)._noise(layer, like, torch.float32)
        assert noise is not None
        return noise

    assert torch.equal(drawn(), drawn())
    assert 0.9 <= float(drawn().min()) < 0.92 < 1.08 < float(drawn().max()) <= 1.1
    others = [drawn(layer=1), drawn(micro_batch=1), drawn(seed=1)]
    assert not any(torch.equal(drawn(), other) for other in others)
    assert gating()._noise(0, like, torch.float32) is None


def test_a_dropped_token_brings_no_rows() -> None:
    """Tokens 0 and 2 choose expert 0 of rows 0 and 1; token 2 is dropped, and the row that only it wants stays home."""
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    router = SwitchRouter(TopKRouter(1, 4, 2))
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    probes = torch.tensor([[0], [1], [~0]], dtype=torch.int32)
    assert router.select(0, keys, queries, probes).rows.tolist() == [0, 3]
    assert router.select(0, keys, queries, probes.clamp(min=0)).rows.tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="needs the experts that the device chose"):
        router.select(0, keys, queries, None)
