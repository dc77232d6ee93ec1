"""AdamW on the touched rows: each row as torch would update it, had it only ever seen the steps that touched it."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meft.runtime.host import store as host_store
from meft.runtime.host.optimizer import AdamWSettings, clip_scale, scheduled_learning_rate, update_touched_rows
from meft.runtime.host.store import HostStore, LayerTables

WIDTH, HIDDEN = 6, 4
LEARNING_RATE = 0.05
EXACT = {"rtol": 0.0, "atol": 1e-12}


def make_store(*, num_layers: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> HostStore:
    store = HostStore(num_layers=num_layers, adapter_width=WIDTH, hidden_size=HIDDEN, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for tables in store.layers:
        tables.weights.normal_(generator=generator)
    return store


def gradients_of(step: int, rows: torch.Tensor) -> torch.Tensor:
    """Gradients ``[A, 2D]`` of a step; a row's do not depend on which other rows are touched."""
    everything = torch.randn(WIDTH, 2 * HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return everything[rows]


def table_names() -> list[str]:
    return [field.name for field in dataclasses.fields(LayerTables)]


def torch_adamw(weights: torch.Tensor, steps: list[torch.Tensor], settings: AdamWSettings) -> torch.Tensor:
    """Weights after torch's AdamW has taken one step per gradient."""
    parameter = torch.nn.Parameter(weights.clone())
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(
        [parameter], lr=LEARNING_RATE, betas=betas, eps=settings.eps, weight_decay=settings.weight_decay, foreach=False
    )
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def train(store: HostStore, touched: list[list[int]], settings: AdamWSettings) -> None:
    for step, rows in enumerate(touched):
        chosen = torch.tensor(rows, dtype=torch.int64)
        store.accumulate(0, chosen, gradients_of(step, chosen))
        assert update_touched_rows(store, settings, learning_rate=LEARNING_RATE) == len(rows)
        store.clear_gradients()


# --- which rows ------------------------------------------------------------------------------------------------------


@given(
    touched=st.lists(st.lists(st.integers(0, WIDTH - 1), unique=True), min_size=1, max_size=5),
    weight_decay=st.sampled_from([0.0, 0.3]),
)
def test_each_row_is_torchs_adamw_run_on_only_the_steps_that_touched_it(touched, weight_decay) -> None:
    settings = AdamWSettings(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=weight_decay)
    store = make_store()
    before = store.layers[0].weights.clone()
    train(store, touched, settings)
    for row in range(WIDTH):
        index = torch.tensor([row])
        own_steps = [gradients_of(step, index) for step, rows in enumerate(touched) if row in rows]
        expected = torch_adamw(before[index], own_steps, settings)
        torch.testing.assert_close(store.layers[0].weights[index], expected, **EXACT)
        assert store.layers[0].step_counts[row] == len(own_steps)


def test_untouched_rows_keep_every_bit() -> None:
    store = make_store(num_layers=2, dtype=torch.float32)
    settings = AdamWSettings(weight_decay=0.5)
    train(store, [[0, 1, 2, 3, 4, 5]], settings)  # moments and counts that a careless update would change
    before = copy.deepcopy(store.layers)
    train(store, [[1, 4]], settings)
    untouched = torch.tensor([0, 2, 3, 5])
    for name in table_names():
        first, second = (getattr(tables[0], name) for tables in (before, store.layers))
        assert torch.equal(first[untouched], second[untouched]), name
        assert torch.equal(getattr(before[1], name), getattr(store.layers[1], name)), name  # the other layer
    assert not torch.equal(before[0].weights[1], store.layers[0].weights[1])


def test_a_row_that_was_touched_by_a_zero_gradient_is_updated() -> None:
    # Touched is touched: its moments fade and its weight decays, as torch does for a gradient of zeros.
    store = make_store()
    settings = AdamWSettings(weight_decay=0.5)
    before = store.layers[0].weights[2].clone()
    store.accumulate(0, torch.tensor([2]), torch.zeros(1, 2 * HIDDEN, dtype=torch.float64))
    assert update_touched_rows(store, settings, learning_rate=0.1) == 1
    torch.testing.assert_close(store.layers[0].weights[2], before * (1 - 0.1 * 0.5), **EXACT)


def test_nothing_touched_updates_nothing() -> None:
    store = make_store()
    before = store.layers[0].weights.clone()
    assert update_touched_rows(store, AdamWSettings(), learning_rate=1.0) == 0
    assert torch.equal(store.layers[0].weights, before)


def test_the_first_update_by_hand() -> None:
    # With g = 3: m = 0.1 * 3 and v = 0.001 * 9, corrected 3 and 9, so the step is lr * 3 / (3 + eps) = lr.
    store = HostStore(num_layers=1, adapter_width=2, hidden_size=1, dtype=torch.float64)
    store.layers[0].weights.fill_(1.0)
    store.accumulate(0, torch.tensor([1]), torch.full((1, 2), 3.0, dtype=torch.float64))
    update_touched_rows(store, AdamWSettings(weight_decay=0.5), learning_rate=0.1)
    tables = store.layers[0]
    assert tables.weights[0].tolist() == [1.0, 1.0]
    assert tables.weights[1].tolist() == pytest.approx([1.0 - 0.1 * 0.5 - 0.1] * 2, abs=1e-8)  # decay, then the step
    assert tables.first_moment[1].tolist() == pytest.approx([0.3, 0.3])
    assert tables.second_moment[1].tolist() == pytest.approx([0.009, 0.009])
    assert tables.step_counts.tolist() == [0, 1]


# --- the window ------------------------------------------------------------------------------------------------------


def test_gradients_of_a_window_add_up_and_are_scaled() -> None:
    together, apart = make_store(), make_store()
    rows, fewer = torch.tensor([0, 2, 5]), torch.tensor([2, 3])
    total = torch.zeros(WIDTH, 2 * HIDDEN, dtype=torch.float64)
    for step, chosen in enumerate((rows, fewer)):
        apart.accumulate(0, chosen, gradients_of(step, chosen))
        total[chosen] += gradients_of(step, chosen)
    union = torch.tensor([0, 2, 3, 5])
    together.accumulate(0, union, 0.25 * total[union])
    assert apart.touched_rows(0).tolist() == union.tolist()
    assert update_touched_rows(apart, AdamWSettings(), learning_rate=0.1, gradient_scale=0.25) == 4
    update_touched_rows(together, AdamWSettings(), learning_rate=0.1)
    torch.testing.assert_close(apart.layers[0].weights, together.layers[0].weights, **EXACT)


def test_an_update_leaves_the_gradients_to_be_cleared() -> None:
    store = make_store()
    rows = torch.tensor([1, 3])
    store.accumulate(0, rows, gradients_of(0, rows))
    norm = store.squared_gradient_norm()
    assert norm == pytest.approx(float(gradients_of(0, rows).square().sum()))
    update_touched_rows(store, AdamWSettings(), learning_rate=0.1, gradient_scale=0.5)
    assert store.squared_gradient_norm() == norm
    store.clear_gradients()
    assert store.squared_gradient_norm() == 0.0
    assert store.touched_rows(0).numel() == 0
    assert store.layers[0].gradients.eq(0).all()


def test_chunks_do_not_change_a_bit(monkeypatch) -> None:
    stores = make_store(), make_store()
    train(stores[0], [[0, 1, 2, 3, 4, 5], [5, 1, 2]], AdamWSettings())
    monkeypatch.setattr(host_store, "CHUNK_BYTES", 2 * 2 * HIDDEN * 8)  # two rows of float64
    assert [len(rows) for rows in host_store.in_chunks(torch.arange(5), stores[1].layers[0].weights)] == [2, 2, 1]
    train(stores[1], [[0, 1, 2, 3, 4, 5], [5, 1, 2]], AdamWSettings())
    for name in table_names():
        assert torch.equal(getattr(stores[0].layers[0], name), getattr(stores[1].layers[0], name)), name


# --- clipping and schedule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("squared", "max_norm", "scale"),
    [
        (25.0, 1.0, 1.0 / 5.000001),  # torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm
        (25.0, 10.0, 1.0),
        (25.0, 5.0, 1.0),  # exactly at the limit
        (25.0, None, 1.0),
        (0.0, 1.0, 1.0),
    ],
)
def test_clipping_by_hand(squared: float, max_norm: float | None, scale: float) -> None:
    assert clip_scale(squared, max_norm) == (math.sqrt(squared), scale)


def test_clipping_is_torchs() -> None:
    gradient = gradients_of(0, torch.arange(WIDTH))
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([parameter], 0.7)
    ours, scale = clip_scale(float(gradient.square().sum()), 0.7)
    assert ours == pytest.approx(float(norm), rel=1e-12)
    torch.testing.assert_close(gradient * scale, parameter.grad, **EXACT)


def test_the_schedule_by_hand() -> None:
    # Ten steps, two of warm-up to 0.8, then eight down: 8/8, 7/8, ... 1/8 of it.
    rates = [scheduled_learning_rate(step, total_steps=10, peak=0.8, warmup_fraction=0.2) for step in range(10)]
    assert rates == pytest.approx([0.4, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("total", "warmup", "rates"),
    [
        (4, 0.0, [1.0, 0.75, 0.5, 0.25]),
        (4, 1.0, [0.25, 0.5, 0.75, 1.0]),
        (1, 0.0, [1.0]),
        (1, 0.02, [1.0]),  # 2 % of one step is no step
    ],
)
def test_schedules_at_the_edges(total: int, warmup: float, rates: list[float]) -> None:
    given_rates = [
        scheduled_learning_rate(s, total_steps=total, peak=1.0, warmup_fraction=warmup) for s in range(total)
    ]
    assert given_rates == pytest.approx(rates)


@given(total=st.integers(1, 500), warmup=st.floats(0, 1))
def test_every_step_learns_and_none_above_the_peak(total: int, warmup: float) -> None:
    rates = [scheduled_learning_rate(s, total_steps=total, peak=1.0, warmup_fraction=warmup) for s in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1.0
