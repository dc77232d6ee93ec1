"""Rows that live on the device: chosen by counting, updated as on the host, current on the host when it is read."""

from __future__ import annotations

import math

import pytest
import torch
from sessions import AMPLE_BYTES, EXPERTS, open_small, small_plan, small_trainer
from sparse_setup import decision, run_step, sparse_setup
from test_overlap import LATE, Delays, assert_bit_equal, open_with

from meft.runtime.device import EmulatedDevice
from meft.runtime.host_store import HostStore, LayerTables
from meft.runtime.hot_tables import HOT_CHUNK_ROWS, HotTables
from meft.runtime.lanes import Overlapped, Sequential
from meft.runtime.optimizer import AdamWSettings, clip_scale, update_layer

EXACT = {"rtol": 1e-9, "atol": 1e-11}
"""In fp64. Not bit-equal to rows on the host: hot rows stand last in a layer's matrix of active rows, and so sums over
its rows are made in another order."""
STATE = ("weights", "first_moment", "second_moment", "step_counts")
HOT = {"hot_rows": 4, "hot_after_steps": 3}


# --- choosing --------------------------------------------------------------------------------------------------------


def test_the_rows_most_often_active_are_chosen_and_of_equal_ones_the_first() -> None:
    (index,) = HostStore(num_layers=1, adapter_width=6, hidden_size=2, has_hot_rows=True).hot
    index.activations.copy_(torch.tensor([1, 3, 2, 0, 2, 2]))
    index.choose(3)
    assert index.rows.tolist() == [1, 2, 4]
    assert index.places.tolist() == [-1, 0, 1, -1, 2, -1]


def test_they_are_chosen_at_the_end_of_the_window_that_completes_the_count(glass_folder) -> None:
    plan = small_plan(glass_folder, choice={"hot_rows": 20, "hot_after_steps": 4}, grad_accum=3)
    session = open_small(glass_folder, plan)
    trainer = small_trainer(session, steps=9)
    trainer.run()
    hot = [sum(step) for step in trainer.measured.hot_rows]
    assert hot[:6] == [0] * 6  # four micro-batches are complete within the second window
    assert min(hot[6:]) > 0
    assert trainer.measured.hot_windows == 1
    for layer, index in enumerate(session.store.hot):
        assert index.activations.sum() == sum(step[layer] for step in trainer.measured.active_rows[:6])
        others = index.activations[index.places < 0]
        assert index.activations[index.rows].min() >= others.max()


def test_forwards_without_backward_are_not_counted() -> None:
    setup = sparse_setup(decision(top_k=3, **HOT))
    with setup.device.scope():
        setup.model(setup.put(torch.randn(5, 8, dtype=torch.float64)))
    assert not any(index.activations.any() for index in setup.store.hot)
    assert setup.exchange.hot.counted_steps == 0


# --- updating --------------------------------------------------------------------------------------------------------


def test_the_devices_update_is_the_readable_host_update_bit_for_bit() -> None:
    torch.manual_seed(0)
    count, settings = HOT_CHUNK_ROWS + 44, AdamWSettings(weight_decay=0.1)
    store = HostStore(num_layers=1, adapter_width=count, hidden_size=8)
    on_host: LayerTables = store.layers[0]
    on_host.weights.normal_()
    device = EmulatedDevice(AMPLE_BYTES)
    with device.scope():
        hot = HotTables.empty(device, count=count, row_numbers=16, dtype=torch.bfloat16, master_dtype=torch.float32)
        with device.host():
            hot.weights.copy_(on_host.weights)
    for scale in (1.0, 0.3, 1.0):
        rows = torch.randperm(count)[: count // 2].sort().values
        gradients = torch.randn(len(rows), 16)
        store.accumulate(0, rows, gradients)
        hot.gradients[rows] += gradients
        hot.touched[rows] += 1
        assert float(hot.squared_norm()) == pytest.approx(store.squared_norm_of(0), rel=1e-12)
        hot.update(settings, learning_rate=0.01, gradient_scale=scale)
        update_layer(store, 0, settings, learning_rate=0.01, gradient_scale=scale)
        for name in STATE:
            assert torch.equal(getattr(hot, name), getattr(on_host, name)), name
        assert torch.equal(hot.rows, on_host.weights.bfloat16())
    assert not hot.gradients.any()
    assert not hot.touched.any()
    assert set(on_host.step_counts.tolist()) > {1, 2}  # rows differ in how often they were updated


def optimizer_step(setup, settings: AdamWSettings, *, max_norm: float) -> float:
    """What a session does at a window's end; the norm before clipping."""
    exchange, hot, layers = setup.exchange, setup.exchange.hot, range(setup.store.num_layers)
    with setup.device.scope(), torch.no_grad():
        exchange.close_window()
        squared = math.fsum(exchange.squared_norm(layer).result() for layer in layers)
        if hot is not None and hot.rows:
            squared += float(hot.squared_norm())
        norm, scale = clip_scale(squared, max_norm)
        for layer in layers:
            exchange.update(layer, settings, learning_rate=0.05, gradient_scale=scale)
        if hot is not None:
            hot.update(settings, learning_rate=0.05, gradient_scale=scale)
            hot.choose_if_due()
    return norm


def train_tower(chosen, *, windows: int = 4, max_norm: float = 5.0):
    """Windows of three micro-batches; the setup, and each window's rows and norm."""
    setup = sparse_setup(chosen)
    settings, history = AdamWSettings(weight_decay=0.1), []
    for window in range(windows):
        active = []
        for step in range(3):
            torch.manual_seed(10 * window + step)
            hidden, grad = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
            run_step(setup, hidden, grad)
            active.append([state.selection.rows.sort().values.tolist() for state in setup.exchange.layers])
        history.append((active, optimizer_step(setup, settings, max_norm=max_norm)))
    if setup.exchange.hot is not None:
        setup.exchange.hot.bring_home()
    return setup, history


WITH_CACHE = ({}, {"cached_rows": 5, "gradients_on_device": True}, {"cached_rows": 3})


@pytest.mark.parametrize("cache", WITH_CACHE, ids=["no cache", "gradients summed", "gradients sent"])
@pytest.mark.parametrize("rows", ["retained", "refetched"])
@pytest.mark.parametrize("routing", [{}, {"routing": "key-experts", "num_experts": 4, "num_probes": 2}])
@pytest.mark.parametrize("hot_rows", [4, 7])
def test_training_is_what_it_is_with_every_row_on_the_host(cache, rows, routing, hot_rows) -> None:
    """Also which rows are chosen: the host knows the keys of the hot rows. The norm that clips includes them."""
    base = decision(top_k=3, prefetch_depth=1, rows_in_backward=rows, **routing, **cache)
    plain, history = train_tower(base)
    hot, hot_history = train_tower(base.model_copy(update=HOT | {"hot_rows": hot_rows}))
    assert [active for active, _ in hot_history] == [active for active, _ in history]
    torch.testing.assert_close([norm for _, norm in hot_history], [norm for _, norm in history], **EXACT)
    assert min(norm for _, norm in history) > 5.0  # every window is clipped
    for mine, theirs in zip(hot.store.layers, plain.store.layers, strict=True):
        for name in STATE:
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), **EXACT)
    assert all(int((index.places >= 0).sum()) == hot_rows for index in hot.store.hot)


def test_a_window_in_which_a_hot_row_is_idle_leaves_it_as_it_is() -> None:
    chosen = decision(top_k=3, **HOT | {"hot_rows": 12})
    setup, _ = train_tower(chosen, windows=3)
    counts = [tables.step_counts.clone() for tables in setup.store.layers]
    assert any(len(set(count.tolist())) > 1 for count in counts)
    before = [tables.weights.clone() for tables in setup.store.layers]
    optimizer_step(setup, AdamWSettings(weight_decay=0.1), max_norm=1.0)  # of no micro-batch at all
    setup.exchange.hot.bring_home()
    for tables, weights, count in zip(setup.store.layers, before, counts, strict=True):
        assert torch.equal(tables.weights, weights)
        assert torch.equal(tables.step_counts, count)


# --- schedules, checkpoints, evaluation ------------------------------------------------------------------------------

CHOICES = [
    (
        {"prefetch_depth": 1, "rows_in_backward": "refetched", "cached_rows": 40, "gradients_on_device": True},
        "all",
        1.0,
    ),
    ({"prefetch_depth": 1, "rows_in_backward": "retained", "bf16_copy": True, **EXPERTS}, "d2h", None),
]


def trained(plan, folder, schedule, *, steps: int, delays: Delays | None = None, **options):
    session = open_with(plan, folder, schedule)
    if delays is not None:
        delays.slow_down(session.model)
    try:
        trainer = small_trainer(session, steps=steps, **options)
        trainer.run()
        session.bring_home()
    finally:
        session.close()
    return trainer


@pytest.mark.parametrize(("choice", "late", "max_norm"), CHOICES)
def test_overlapped_it_is_the_sequential_run_bit_for_bit(glass_folder, choice, late, max_norm) -> None:
    choice = {"hot_rows": 30, "hot_after_steps": 4, **choice}
    dtype = "bf16" if "bf16_copy" in choice else "fp32"
    plan = small_plan(glass_folder, choice=choice, grad_accum=2, seq_len=8, batch_size=1, adapter_dtype=dtype)
    delays = Delays(LATE[late], seed=7)
    overlapped = trained(plan, glass_folder, Overlapped(delay=delays), steps=16, delays=delays, max_norm=max_norm)
    sequential = trained(plan, glass_folder, Sequential(), steps=16, max_norm=max_norm)
    assert_bit_equal(overlapped, sequential)
    assert overlapped.measured.hot_rows == sequential.measured.hot_rows
    assert sum(map(sum, sequential.measured.hot_rows)) > 0
    assert sequential.measured.hot_windows == 6


@pytest.mark.parametrize("slow", ["hot keys", "count", "adamw"])
def test_whoever_needs_a_slow_task_waits_for_it(glass_folder, slow) -> None:
    choice = {"prefetch_depth": 1, "rows_in_backward": "refetched", "hot_rows": 30, "hot_after_steps": 2}
    plan = small_plan(glass_folder, choice=choice, grad_accum=2, seq_len=8, batch_size=1)
    overlapped = trained(plan, glass_folder, Overlapped(delay=Delays((), 0, slow)), steps=6)
    assert_bit_equal(overlapped, trained(plan, glass_folder, Sequential(), steps=6))


@pytest.mark.parametrize("stop", [2, 6], ids=["while rows are counted", "when they are on the device"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resumed_training_is_training_straight_through(glass_folder, tmp_path, stop, dtype) -> None:
    choice = {"hot_rows": 30, "hot_after_steps": 4, "cached_rows": 20, "gradients_on_device": True}
    plan = small_plan(glass_folder, choice=choice, grad_accum=2, seq_len=8, batch_size=1, adapter_dtype=dtype)
    straight = trained(plan, glass_folder, Sequential(), steps=10)
    first = small_trainer(open_small(glass_folder, plan), steps=10, output=tmp_path)
    first.on_step = lambda progress: setattr(first, "stop_requested", progress.step == stop)
    first.run()
    assert len(first.history.losses) == stop
    second = small_trainer(open_small(glass_folder, plan, seed=5), steps=10, output=tmp_path)
    second.resume(next(tmp_path.glob("checkpoint-*")))
    second.run()
    second.session.bring_home()
    assert second.history == straight.history
    for mine, theirs in zip(second.session.store.layers, straight.session.store.layers, strict=True):
        for name in STATE:
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    for mine, theirs in zip(second.session.store.hot, straight.session.store.hot, strict=True):
        assert torch.equal(mine.places, theirs.places)


def test_the_bf16_copy_and_the_checkpoint_have_what_the_device_made_of_the_rows(glass_folder) -> None:
    choice = {"hot_rows": 30, "hot_after_steps": 2, "bf16_copy": True}
    plan = small_plan(glass_folder, choice=choice, grad_accum=2, seq_len=8, batch_size=1, adapter_dtype="bf16")
    session = open_small(glass_folder, plan)
    small_trainer(session, steps=6).run()
    hot = session.exchange.hot
    stale = session.store.layers[0].values[hot.rows[0]].clone()
    session.bring_home()
    tables = session.store.layers[0]
    assert not torch.equal(tables.values[hot.rows[0]], stale)
    assert torch.equal(tables.weights[hot.rows[0]], hot.tables[0].weights)
    assert torch.equal(tables.first_moment[hot.rows[0]], hot.tables[0].first_moment)
    assert torch.equal(session.store.copies[0], tables.weights.bfloat16())
