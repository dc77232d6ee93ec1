"""Rows that live on the device: chosen by counting, updated as on the host, current on the host when it is read."""

from __future__ import annotations

import json

import pytest
import torch
from hot_tower import EXACT, HOT, STATE, optimizer_step, train_tower
from late_lanes import CACHED, LATE, Delays, assert_bit_equal, open_with
from plan_samples import sample_profiles
from planner_records import gpu_profile
from sessions import AMPLE_BYTES, EXPERTS, open_small, random_examples, rows_by_step, small_plan, small_trainer
from sparse_setup import decision, sparse_setup

from meft.planner.base.errors import UsageError
from meft.planner.check.audit import audit
from meft.planner.memory.device import counted_bytes, predict_device_memory
from meft.planner.memory.host import host_memory as planned_host_memory
from meft.planner.predict.prediction import predict
from meft.planner.simulation.stream import stream_peaks
from meft.planner.traffic.hot_rows import HOT_CHUNK_ROWS
from meft.planner.traffic.transfer import expected_step_bytes, hot_keys_of, step_transfer
from meft.runtime.data.examples import collate
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.device.lanes import Overlapped, Sequential
from meft.runtime.device.nvml import MemoryReading, PcieReading
from meft.runtime.exchange.hot_tables import HotTables
from meft.runtime.fake.books import CudaBooks
from meft.runtime.host.optimizer import AdamWSettings, update_layer
from meft.runtime.host.store import HostStore, LayerTables
from meft.runtime.trace.run import trace_plan
from meft.runtime.training.rehearse import rehearse
from meft.runtime.training.reporting import build_report, host_memory, observe
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.saved import load_base

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
    rows = rows_by_step(trainer)
    trainer.run()
    hot = [sum(step) for step in rows["hot_rows"]]
    assert hot[:6] == [0] * 6  # four micro-batches are complete within the second window
    assert min(hot[6:]) > 0
    assert trainer.measured.hot_windows == 1
    for layer, index in enumerate(session.store.hot):
        assert index.activations.sum() == sum(step[layer] for step in rows["active_rows"][:6])
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
        delays.slow_down(session)
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
    assert sum(sequential.measured.hot_rows.layers) > 0
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


# --- counted, and as the planner says --------------------------------------------------------------------------------

PLANNED = [
    pytest.param({"prefetch_depth": 1, "rows_in_backward": "refetched"}, "fp32", id="refetched"),
    pytest.param({"prefetch_depth": 1, "rows_in_backward": "retained", **EXPERTS, **CACHED}, "bf16", id="all at once"),
    pytest.param({"rows_in_backward": "refetched", "cached_rows": 50}, "bf16", id="gradients sent"),
]


@pytest.mark.parametrize(("choice", "dtype"), PLANNED)
def test_counted_bytes_and_host_memory_are_the_predicted_ones(glass_folder, tmp_path, choice, dtype) -> None:
    choice = {"hot_rows": 30, "hot_after_steps": 3, "active_rows_cap": 100, **choice}
    plan = small_plan(glass_folder, choice=choice, grad_accum=3, seq_len=16, adapter_dtype=dtype)
    session = open_small(glass_folder, plan)
    trainer = small_trainer(session, steps=9, output=tmp_path)
    rows = rows_by_step(trainer)
    trainer.run()
    engine = session.engine
    names = ("active_rows_per_layer", "missing_rows_per_layer", "overflow_rows_per_layer", "hot_rows_per_layer")
    expected = [
        expected_step_bytes(request=plan.request, decision=plan.decision, **dict(zip(names, each, strict=True)))
        for each in zip(*(rows[name.removesuffix("_per_layer")] for name in names), strict=True)
    ]
    assert engine.bytes_in("h2d", "step") == sum(h2d for h2d, _ in expected)
    assert engine.bytes_in("d2h", "step") == sum(d2h for _, d2h in expected)
    shape = plan.request.model
    hot_numbers = shape.num_layers * 30 * 2 * shape.hidden_size
    counted = {name: size for (_, name, _), size in engine.counted_bytes.items() if name.startswith("hot_")}
    whole = 3 * 4 * hot_numbers + shape.num_layers * 30 * 4  # weights, two moments; int32 counts
    assert counted == {
        "hot_keys": 2 * hot_keys_of(request=plan.request, decision=plan.decision),
        "hot_norm": 2 * 8,
        "hot_placed": whole,
        "hot_returned": whole,  # once, for the checkpoint and the adapter beside it
    }
    assert counted["hot_keys"] == 2 * hot_numbers // 2 * 4
    planned = planned_host_memory(request=plan.request, decision=plan.decision)
    assert {entry.category: entry.num_bytes for entry in host_memory(session).entries} == {
        entry.category: entry.num_bytes for entry in planned.entries
    }


def test_the_report_says_it_and_the_audit_holds(glass_folder) -> None:
    choice = {"hot_rows": 30, "hot_after_steps": 3, "active_rows_cap": 100, "cached_rows": 40, "prefetch_depth": 1}
    hand_made = small_plan(glass_folder, choice=choice | EXPERTS, grad_accum=3, seq_len=16)
    prediction = predict(hand_made.request, hand_made.decision, sample_profiles())
    plan = hand_made.model_copy(update={"prediction": prediction})
    trainer = small_trainer(open_small(glass_folder, plan), steps=9)
    trainer.run()
    seen = observe(trainer, memory=MemoryReading(None, "none"), pcie=PcieReading(None, None, "none"))
    report = build_report(trainer, seen, recall=1.0, meft_version="0")
    assert report.observed.hot_windows == 2
    assert all(layer.hot_total > 0 for layer in report.observed.active_rows)
    assert {entry.category for entry in report.observed.transfer.entries if entry.per == "run"} == {"hot_placed"}
    checks = audit(plan, report, gpu=sample_profiles().gpu).transfer
    assert {"hot_keys", "hot_norm", "row_positions"} <= {check.category for check in checks}
    assert [check for check in checks if not check.equal] == []


def in_steady_state(plan, folder):
    """A session whose hot rows are chosen and there, its peak in a step, and what an optimizer step adds."""
    session = open_small(folder, plan)
    batch = collate(random_examples(2, length=64), seq_len=64, pad_id=0)
    allocator, peaks = session.device.books.allocator, []
    for _ in range(2):
        session.device.reset_peaks()
        session.step(batch, loss_scale=1.0)
        in_step = allocator.peak_requested_bytes
        session.device.reset_peaks()
        held = allocator.peak_requested_bytes
        session.optimizer_step(learning_rate=1e-3, max_norm=None)
        peaks = [in_step, allocator.peak_requested_bytes - held]
    return session, peaks


@pytest.mark.parametrize("choice", [{"prefetch_depth": 1}, {**EXPERTS, **CACHED}], ids=["exact", "experts, cached"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_device_memory_is_the_predicted_one(glass_folder, choice, dtype) -> None:
    choice = {"hot_rows": 60, "hot_after_steps": 1, **choice}
    plan = small_plan(glass_folder, choice=choice, batch_size=2, seq_len=64, adapter_dtype=dtype)
    session, (in_step, in_optimizer) = in_steady_state(plan, glass_folder)
    assert sum(session.exchange.counters.hot_rows) > 0
    predicted = predict_device_memory(
        request=plan.request,
        decision=plan.decision,
        gpu=gpu_profile(),
    )
    counted = counted_bytes(request=plan.request, decision=plan.decision, gpu=gpu_profile())
    assert counted == pytest.approx(in_step, rel=0.015)  # both without what whole blocks hold
    (temporary,) = (entry.num_bytes for entry in predicted.entries if entry.category == "optimizer_temporary")
    assert temporary == pytest.approx(in_optimizer, rel=0.05)  # and a few numbers per row


@pytest.mark.parametrize("cache", [{}, CACHED], ids=["no cache", "cached"])
def test_rehearsal_and_trace_have_the_bytes_of_a_real_step(glass_folder, cache, monkeypatch) -> None:
    """On the emulated device autograd adds gradients out of place, because its books are a dispatch mode."""
    monkeypatch.setattr(CudaBooks, "_is_unshared", lambda self, gradient: False)
    choice = {"hot_rows": 30, "hot_after_steps": 1, "prefetch_depth": 1, "rows_in_backward": "refetched", **cache}
    plan = small_plan(glass_folder, choice=choice, batch_size=2, seq_len=64, attention="eager")
    session, (in_step, _) = in_steady_state(plan, glass_folder)
    before = session.engine.counted_bytes.copy()
    session.step(collate(random_examples(2, length=64), seq_len=64, pad_id=0), loss_scale=1.0)
    counters = session.exchange.counters
    session.optimizer_step(learning_rate=1e-3, max_norm=None)
    kept = [layer - other for layer, other in zip(counters.missing_rows, counters.overflow_rows, strict=True)]
    update = {
        "active_rows_per_layer": tuple(counters.active_rows),
        "hot_rows_per_layer": tuple(counters.hot_rows),
        "missing_rows_per_layer": tuple(counters.missing_rows),
        "overflow_rows_per_layer": tuple(counters.overflow_rows),
        "kept_rows_per_layer": tuple(kept),
    }
    sparsity = plan.prediction.sparsity.model_copy(update=update)
    transfer = step_transfer(request=plan.request, decision=plan.decision, **update)
    prediction = plan.prediction.model_copy(update={"sparsity": sparsity, "transfer": transfer})
    planned = plan.model_copy(update={"prediction": prediction})
    config = json.loads((glass_folder / "config.json").read_text())
    report = rehearse(planned, config, budget_bytes=AMPLE_BYTES, meft_version="0")
    rehearsed = {(entry.direction, entry.category, entry.per): entry for entry in report.observed.transfer.entries}
    seen = session.engine.counted_bytes - before
    travelled = {key: size for key, size in seen.items() if size}
    assert {key: entry.num_bytes for key, entry in rehearsed.items()} == travelled
    assert report.observed.device_memory.peak_allocated_bytes == pytest.approx(in_step, rel=0.01)
    checks = audit(planned, report, gpu=sample_profiles().gpu).transfer
    assert [check for check in checks if not check.equal] == []
    traced = stream_peaks(trace_plan(planned, config, workspace_bytes=0))
    assert traced.requested_bytes == pytest.approx(in_step, rel=1e-3)


# --- a script's own loop ---------------------------------------------------------------------------------------------


def own_model(glass_folder, folder_of_plan) -> AdapterModel:
    choice = {"hot_rows": 30, "hot_after_steps": 1, "prefetch_depth": 1}
    plan = small_plan(glass_folder, choice=choice, seq_len=16)
    path = folder_of_plan / "plan.json"
    plan.save(path)
    return AdapterModel.from_plan(load_base(glass_folder), path, device="emulated", schedule="sequential")


def test_generation_and_saving_amid_training_see_the_rows_as_they_are(glass_folder, tmp_path) -> None:
    model = own_model(glass_folder, tmp_path)
    optimizer = model.optimizer(learning_rate=1e-2)
    ids = torch.arange(4, 20).view(1, 16)
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        during = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    hot = model.session.exchange.hot
    tables = model.session.store.layers[0]
    assert torch.equal(tables.weights[hot.rows[0]], hot.tables[0].weights)
    saved = AdapterModel.from_pretrained(load_base(glass_folder), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(saved(input_ids=ids).logits, during, rtol=1e-4, atol=1e-5)
    model.detach()


def test_optimizer_state_is_not_replaced_under_gradients_of_hot_rows(glass_folder, tmp_path) -> None:
    model = own_model(glass_folder, tmp_path)
    optimizer = model.optimizer(learning_rate=1e-2)
    ids = torch.arange(4, 20).view(1, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    state = optimizer.state_dict()
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(UsageError, match=r"gradients of its hot rows; call the optimizer's step\(\) or zero_grad\(\)"):
        optimizer.load_state_dict(state)
    optimizer.zero_grad()
    assert not any(tables.gradients.any() for tables in model.session.exchange.hot.tables)
    optimizer.load_state_dict(state)
    model.detach()
