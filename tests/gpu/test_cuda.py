"""The CUDA device: pinned copies on their own streams, sparse = dense, the budget, NVML against the allocator."""

from __future__ import annotations

import pytest
import torch
from sessions import EXPERTS, open_small, random_examples, small_plan

from meft.planner.errors import DeviceOutOfMemory
from meft.runtime.data import collate
from meft.runtime.device import CudaDevice
from meft.runtime.engine import TransferEngine
from meft.runtime.model_loading import load_frozen_model
from meft.runtime.nvml import NvmlReader
from meft.runtime.session import open_session

GIB = 1 << 30


def test_copies_are_pinned_on_their_own_streams_and_arrive_intact() -> None:
    engine = TransferEngine(CudaDevice(GIB))
    host = engine.host_empty(512, 256, dtype=torch.float32).normal_()
    assert host.is_pinned()
    device = torch.empty(512, 256, device="cuda")
    sent = engine.to_device(host, device, category="rows")
    assert sent.done is not None
    sent.wait_on_device()
    doubled = device * 2
    back = engine.host_empty(512, 256, dtype=torch.float32)
    engine.to_host(doubled, back, category="row_gradients").wait_on_host()
    assert torch.equal(back, host * 2)
    assert engine.bytes_in("h2d", "step") == engine.bytes_in("d2h", "step") == 512 * 256 * 4
    assert all(seconds > 0 for seconds in engine.busy_seconds().values())


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
    for here, there in zip(cuda.store.layers, emulated.store.layers, strict=True):
        torch.testing.assert_close(here.gradients, there.gradients, rtol=1e-3, atol=1e-5)


def test_the_budget_is_enforced(glass_folder) -> None:
    plan = small_plan(glass_folder)
    model, device = load_frozen_model(plan, glass_folder), CudaDevice(1 << 20)  # the weights alone take 3.4 MB
    with pytest.raises(DeviceOutOfMemory, match="budget"):
        open_session(plan, model, device, seed=0)


def test_nvml_sees_at_least_what_the_allocator_reserves() -> None:
    reader = NvmlReader.open(0)
    held = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    reading = reader.process_memory()
    reader.close()
    if reading.num_bytes is None:
        pytest.skip(f"needs NVML: {reading.source}")
    assert reading.num_bytes >= torch.cuda.memory_reserved() >= held.numel()
