"""The CUDA device: pinned copies on their own streams, sparse = dense, the budget, NVML against the allocator."""

from __future__ import annotations

import pytest
import torch
from hot_tower import EXACT, HOT, STATE, train_tower
from oracle_step import CHOICES, STABLE, SWITCH, assert_step_equals_the_oracle
from sessions import EXPERTS, open_small, random_examples, small_plan
from sparse_setup import decision, sparse_setup

from meft.planner.base.errors import DeviceOutOfMemory
from meft.planner.traffic.transfer import expected_step_bytes
from meft.runtime.data.examples import collate
from meft.runtime.device.device import CudaDevice
from meft.runtime.device.engine import COPY_DONE, TransferEngine
from meft.runtime.device.nvml import OWN_PROCESS, NvmlReader
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import open_session

MIB, GIB = 1 << 20, 1 << 30
LONG_CYCLES = 1_000_000_000
"""Keeps a stream busy for about half a second at 2 GHz, which is thousands of times what a small copy takes."""


@pytest.fixture
def engine() -> TransferEngine:
    return TransferEngine(CudaDevice(GIB))


# --- transfers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_copies_are_pinned_and_arrive_intact(engine, dtype) -> None:
    there, back = (engine.host_empty(512, 256, dtype=dtype) for _ in range(2))
    assert there.is_pinned()
    assert back.is_pinned()
    there.copy_(torch.randint(-100, 100, (512, 256)))
    device = torch.empty(512, 256, dtype=dtype, device="cuda")
    engine.to_device(there, device, category="rows").wait_on_device()
    doubled = device * 2
    engine.to_host(doubled, back, category="row_gradients").wait_on_host()
    assert torch.equal(back, there * 2)
    assert engine.bytes_in("h2d", "step") == engine.bytes_in("d2h", "step") == 512 * 256 * dtype.itemsize
    assert all(seconds > 0 for seconds in engine.busy_seconds().values())


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_a_copy_that_waits_for_nothing_overtakes_the_compute_stream(engine, direction) -> None:
    host, device = engine.host_empty(64, dtype=torch.float32), torch.ones(64, device="cuda")
    ready = engine.mark()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)
    busy = torch.cuda.Event()
    busy.record()
    if direction == "h2d":
        copy = engine.to_device(host.fill_(2), device, category="rows", after=ready)
    else:
        copy = engine.copy("d2h", lambda: (device, host), category="row_gradients", point=COPY_DONE)
    copy.wait_on_host()
    assert not busy.query()  # on the compute stream the copy would have come after
    busy.synchronize()
    assert torch.equal(device.cpu(), host)


def test_a_copy_to_the_host_waits_for_the_work_that_makes_its_source(engine) -> None:
    host, device = engine.host_empty(64, dtype=torch.float32).fill_(0), torch.zeros(64, device="cuda")
    torch.cuda._sleep(LONG_CYCLES)
    device.fill_(7)
    engine.to_host(device, host, category="row_gradients").wait_on_host()
    assert host.eq(7).all()


def test_the_device_waits_for_the_rows_it_uses(engine) -> None:
    host, device = engine.host_empty(64, dtype=torch.float32).fill_(7), torch.zeros(64, device="cuda")
    with torch.cuda.stream(engine._streams["h2d"]):
        torch.cuda._sleep(LONG_CYCLES)
    engine.to_device(host, device, category="rows").wait_on_device()
    used = device * 2
    assert used.cpu().eq(14).all()


def test_memory_of_a_tensor_is_not_reused_before_the_copy_that_the_device_waits_for(engine) -> None:
    host, device = engine.host_empty(MIB, dtype=torch.float32), torch.ones(MIB, device="cuda")
    with torch.cuda.stream(engine._streams["d2h"]):
        torch.cuda._sleep(LONG_CYCLES)
    copy = engine.to_host(device, host, category="row_gradients")
    copy.wait_on_device()
    del device
    overwriting = torch.zeros(MIB, device="cuda")  # of the same size: the freed block, were it free
    copy.wait_on_host()
    assert host.eq(1).all()
    assert overwriting.eq(0).all()


# --- the sparse adapter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES)
def test_all_rows_equal_the_oracle(choice) -> None:
    assert_step_equals_the_oracle(sparse_setup(decision(**choice), device=CudaDevice(GIB)))


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("routing", [{}, {"routing": "key-experts", "num_experts": 4, "num_probes": 2}])
def test_fewer_rows_equal_the_oracle_on_the_selected_rows(depth, routing) -> None:
    chosen = decision(prefetch_depth=depth, top_k=3, active_rows_cap=4, rows_in_backward="refetched", **routing)
    setup = sparse_setup(chosen, device=CudaDevice(GIB))
    assert_step_equals_the_oracle(setup)
    assert setup.exchange.counters.dropped_rows > 0


@pytest.mark.parametrize("depth", [0, 1])
def test_a_switch_router_equals_the_oracle(depth) -> None:
    chosen = decision(prefetch_depth=depth, top_k=3, rows_in_backward="refetched", **SWITCH)
    assert_step_equals_the_oracle(sparse_setup(chosen, device=CudaDevice(GIB)))


@pytest.mark.parametrize("stage", [1, 2])
def test_stable_routing_equals_the_oracle(stage) -> None:
    chosen = decision(prefetch_depth=1, top_k=2, rows_in_backward="refetched", **STABLE)
    setup = sparse_setup(chosen, device=CudaDevice(GIB))
    setup.exchange.gating.frozen = stage == 2
    assert_step_equals_the_oracle(setup)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("routing", [{}, EXPERTS])
def test_a_step_on_cuda_equals_one_on_the_emulated_device(glass_folder, depth, routing) -> None:
    choice = {"prefetch_depth": depth, "rows_in_backward": "refetched", "top_k": 128, **routing}
    if routing:
        choice |= {"num_probes": 16}  # every row in play, so that rounding cannot change the choice
    plan = small_plan(glass_folder, choice=choice)
    batch = collate(random_examples(2, length=32), seq_len=32, pad_id=0)
    emulated = open_small(glass_folder, plan)
    cuda = open_session(plan, load_frozen_model(plan, glass_folder), CudaDevice(4 * GIB), seed=0)
    mine, theirs = cuda.step(batch, loss_scale=1.0), emulated.step(batch, loss_scale=1.0)
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
    assert cuda.engine.counted_bytes == emulated.engine.counted_bytes
    rows = mine.counters.active_rows
    expected = expected_step_bytes(request=plan.request, decision=plan.decision, active_rows_per_layer=rows)
    assert (cuda.engine.bytes_in("h2d", "step"), cuda.engine.bytes_in("d2h", "step")) == expected
    for here, there in zip(cuda.store.layers, emulated.store.layers, strict=True):
        torch.testing.assert_close(here.gradients, there.gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cache", [{}, {"cached_rows": 5, "gradients_on_device": True}])
def test_hot_rows_are_trained_as_on_the_emulated_device(cache) -> None:
    chosen = decision(top_k=3, prefetch_depth=1, rows_in_backward="refetched", **HOT, **cache)
    (here, seen), (there, expected) = train_tower(chosen, device=CudaDevice(GIB)), train_tower(chosen)
    assert [rows for rows, _ in seen] == [rows for rows, _ in expected]
    assert here.engine.counted_bytes == there.engine.counted_bytes
    for mine, theirs in zip(here.store.layers, there.store.layers, strict=True):
        for name in STATE:
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), **EXACT)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_budget_is_enforced_while_the_model_moves(glass_folder) -> None:
    plan = small_plan(glass_folder)
    model, device = load_frozen_model(plan, glass_folder), CudaDevice(1 << 20)  # the weights alone take 3.4 MB
    with pytest.raises(DeviceOutOfMemory, match="budget"):
        open_session(plan, model, device, seed=0)


def test_the_budget_is_enforced_by_the_allocator_and_leaves_the_device_usable() -> None:
    device = CudaDevice(64 * MIB)
    device.reset_peaks()
    with device.scope():
        held = torch.ones(32 * MIB, dtype=torch.uint8, device=device.torch_device)
    with pytest.raises(DeviceOutOfMemory, match=r"out of its budget of 64\.0 MiB.*--gpu-mem") as caught, device.scope():
        torch.empty(40 * MIB, dtype=torch.uint8, device=device.torch_device)
    assert "\n" not in str(caught.value)
    with device.scope():
        half = held[: 16 * MIB].clone()
    assert half.eq(1).all()
    peaks = device.peaks()
    assert 48 * MIB <= peaks.allocated_bytes <= peaks.reserved_bytes <= 64 * MIB


def test_nvml_sees_at_least_what_the_allocator_reserves() -> None:
    reserved_before = torch.cuda.memory_reserved()
    reader = NvmlReader.open(torch.cuda.current_device())
    held = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    reading = reader.process_memory()
    reader.close()
    if reading.num_bytes is None:
        pytest.skip(f"needs NVML: {reading.source}")
    # By PID it is all that the process holds, the context too; otherwise what the card took since the reader's start.
    least = torch.cuda.memory_reserved() - (0 if reading.source == OWN_PROCESS else reserved_before)
    assert reading.num_bytes >= least >= held.numel()
