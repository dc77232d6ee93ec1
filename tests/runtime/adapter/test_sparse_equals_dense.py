"""The sparse runtime equals the dense oracle: outputs, input gradients, row gradients, updated rows."""

from __future__ import annotations

import pytest
import torch
from oracle_step import (
    CHOICES,
    EXACT,
    DenseTower,
    assert_same_gradients,
    assert_step_equals_the_oracle,
    dense_step,
    dense_twin,
)
from sparse_setup import decision, run_step, sparse_setup

from meft.runtime.host.optimizer import AdamWSettings, update_touched_rows


@pytest.mark.parametrize("choice", CHOICES)
def test_all_rows_equal_the_oracle(choice) -> None:
    setup = sparse_setup(decision(**choice))
    assert_step_equals_the_oracle(setup)
    assert all(state.selection.num_rows == 12 for state in setup.exchange.layers)


@pytest.mark.parametrize("choice", CHOICES)
def test_updates_equal_torch_adamw_over_several_steps(choice) -> None:
    setup = sparse_setup(decision(**choice))
    dense = dense_twin(setup)
    settings = AdamWSettings(weight_decay=0.1)
    options = {"lr": 0.05, "weight_decay": 0.1, "foreach": False}
    reference = torch.optim.AdamW(dense.adapters.parameters(), **options)
    gated = bool(setup.exchange.router_weights)
    router = torch.optim.AdamW(setup.weights, **options) if gated else None
    for step in range(4):
        torch.manual_seed(100 + step)
        hidden, grad = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
        run_step(setup, hidden, grad)
        dense_step(dense, hidden, grad)
        assert update_touched_rows(setup.store, settings, learning_rate=0.05) == 3 * 12
        setup.store.clear_gradients()
        if router is not None:
            router.step()
            router.zero_grad()
        reference.step()
        reference.zero_grad()
    for tables, adapter in zip(setup.store.layers, dense.adapters, strict=True):
        torch.testing.assert_close(tables.keys, adapter.keys.detach(), **EXACT)
        torch.testing.assert_close(tables.values, adapter.values.detach(), **EXACT)
        assert tables.step_counts.eq(4).all()


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("routing", [{}, {"routing": "key-experts", "num_experts": 4, "num_probes": 2}])
@pytest.mark.parametrize("cap", [12, 4])
def test_fewer_rows_equal_the_oracle_on_the_selected_rows(depth, routing, cap) -> None:
    setup = sparse_setup(decision(prefetch_depth=depth, top_k=3, active_rows_cap=cap, **routing))
    assert_step_equals_the_oracle(setup)
    assert all(state.selection.num_rows <= cap for state in setup.exchange.layers)
    assert (setup.exchange.counters.dropped_rows > 0) == (cap == 4)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("routing", [{}, {"routing": "key-experts", "num_experts": 4, "num_probes": 2}])
@pytest.mark.parametrize("cap", [12, 4])
def test_tokens_that_see_their_own_rows_equal_the_oracle(depth, routing, cap) -> None:
    own = {"prefetch_depth": depth, "top_k": 3, "active_rows_cap": cap, "tokens_see": "own", **routing}
    setup = sparse_setup(decision(**own))
    assert_step_equals_the_oracle(setup)
    assert any(state.selection.num_rows > 3 for state in setup.exchange.layers)
    assert (setup.exchange.counters.dropped_rows > 0) == (cap == 4)
    if cap == 12:  # and the union is another function
        hidden, grad = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
        outputs = [run_step(sparse_setup(decision(**own | see)), hidden, grad)[0] for see in ({}, UNION)]
        assert not torch.allclose(*outputs)


@pytest.mark.parametrize("routing", [{}, {"routing": "key-experts", "num_experts": 4, "num_probes": 2}])
def test_a_token_with_own_rows_does_not_depend_on_its_company(routing) -> None:
    """Where every row is chosen from the layer's own hidden state, and the cap drops none."""
    chosen = decision(top_k=3, tokens_see="own", **routing)
    hidden, grad = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    together = run_step(sparse_setup(chosen), hidden, grad)[0]
    ones = zip(hidden.split(1), grad.split(1), strict=True)
    alone = torch.cat([run_step(sparse_setup(chosen), *one)[0] for one in ones])
    torch.testing.assert_close(alone, together, **EXACT)


UNION = {"tokens_see": "union"}
CACHES = [
    {"cached_rows": 12, "gradients_on_device": True},
    {"cached_rows": 5, "gradients_on_device": True},
    {"cached_rows": 5},
]


@pytest.mark.parametrize("cache", CACHES, ids=["all kept", "five kept", "five kept, gradients sent"])
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("rows", ["retained", "refetched"])
@pytest.mark.parametrize("routing", [{}, {"routing": "key-experts", "num_experts": 4, "num_probes": 2}])
@pytest.mark.parametrize("see", ["union", "own"])
def test_rows_cached_through_windows_equal_the_oracle(cache, depth, rows, routing, see) -> None:
    """Three windows of three micro-batches: what a window has brought is not fetched again, and is never stale."""
    setup = sparse_setup(
        decision(prefetch_depth=depth, rows_in_backward=rows, top_k=3, tokens_see=see, **cache, **routing)
    )
    dense, missing, active = dense_twin(setup), 0, 0
    settings = AdamWSettings()
    for step in range(9):
        torch.manual_seed(step)
        hidden = torch.randn(5, 8, dtype=torch.float64)
        grad = torch.randn(5, 8, dtype=torch.float64)
        noted = _noting_probes(setup)
        output, _ = run_step(setup, hidden, grad)
        dense.rows = [state.selection.rows for state in setup.exchange.layers]
        if setup.exchange.router_weights:
            dense.probes = [noted[layer].long() for layer in range(setup.store.num_layers)]
        expected, _ = dense_step(dense, hidden, grad)
        torch.testing.assert_close(output, expected, **EXACT)
        missing += sum(setup.exchange.counters.missing_rows)
        active += sum(setup.exchange.counters.active_rows)
        if step % 3 == 2:
            with setup.device.scope():
                setup.exchange.close_window()
            assert_same_gradients(setup, dense)
            touched = [tables.touched.clone() for tables in setup.store.layers]
            for layer in range(setup.store.num_layers):
                setup.exchange.update(layer, settings, learning_rate=0.05)
            _update_oracle(setup, dense, touched)
    assert missing < active


def _noting_probes(setup) -> dict[int, torch.Tensor]:
    noted: dict[int, torch.Tensor] = {}
    original = type(setup.exchange).after_backward

    def note(layer: int) -> None:
        noted[layer] = setup.exchange.layers[layer].probes
        original(setup.exchange, layer)

    setup.exchange.after_backward = note
    return noted


def _update_oracle(setup, dense: DenseTower, touched: list[torch.Tensor]) -> None:
    """Give the oracle the rows that the runtime has now, after checking those that no gradient touched."""
    for tables, adapter, rows in zip(setup.store.layers, dense.adapters, touched, strict=True):
        assert torch.equal(tables.keys[~rows], adapter.keys.detach()[~rows])
        assert not torch.equal(tables.keys[rows], adapter.keys.detach()[rows])
        with torch.no_grad():
            adapter.keys.copy_(tables.keys)
            adapter.values.copy_(tables.values)
    dense.zero_grad()
    for weight in setup.weights:
        weight.grad = None


def test_exact_routing_takes_each_tokens_best_rows() -> None:
    setup = sparse_setup(decision(top_k=2), num_layers=1)
    hidden, grad = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    at_ffn = hidden + torch.tanh(setup.model.layers[0].mix(hidden))
    run_step(setup, hidden, grad)
    scores = (at_ffn @ setup.store.layers[0].keys.T).detach()
    best = {row for token in scores for row in token.argsort(descending=True)[:2].tolist()}
    assert set(setup.exchange.layers[0].selection.rows.tolist()) == best


def test_a_step_leaves_nothing_on_the_device_but_what_was_there() -> None:
    setup = sparse_setup(decision(prefetch_depth=1, rows_in_backward="refetched"))
    before = setup.device.books.allocator.allocated_bytes
    hidden, grad = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    run_step(setup, hidden, grad)
    del hidden, grad
    assert setup.device.books.allocator.allocated_bytes == before
