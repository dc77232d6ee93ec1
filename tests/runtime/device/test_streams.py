"""A device with streams: what its events are recorded in and wait for, and how its work is timed and forgotten."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from checked_runs import checked_trainer, save_tiny_llama
from happens_before import CheckedDevice
from sessions import EXPERTS, open_small, random_examples, small_plan

from meft.planner.base.errors import DeviceOutOfMemory
from meft.runtime.data.examples import collate
from meft.runtime.device.engine import TransferEngine
from meft.runtime.device.streams import CudaStreams
from meft.runtime.device.timeline import LaneClock
from meft.runtime.session import checkpoint, model_loading
from meft.runtime.training.training import worked
from meft.runtime.use import adapter_model

SECOND = torch.device("cuda", 1)


class FakeEvent:
    """Notes which stream it was recorded in."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded: list[str] = []

    def record(self, stream: str) -> None:
        self.recorded.append(stream)


def test_events_mean_the_current_stream_of_their_own_device(monkeypatch) -> None:
    # A base model on cuda:1 in a program whose current device is 0: torch's own default would mark the wrong stream.
    waited = []
    current = SimpleNamespace(wait_event=waited.append)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: {SECOND: current}[device])
    event = CudaStreams(SECOND).new_event()
    event.record()
    event.wait()
    assert event._event.recorded == [current]
    assert waited == [event._event]


def test_a_base_on_the_second_gpu_stays_there(glass_folder, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(adapter_model, "CudaDevice", lambda *given: made.append(given))
    parameters = [SimpleNamespace(device=SECOND), SimpleNamespace(device=SECOND)]
    plan = small_plan(glass_folder)
    budget = plan.prediction.device_memory.allocator_budget_bytes
    adapter_model._device("cuda", plan, SimpleNamespace(parameters=lambda: parameters))
    adapter_model._device("cuda", plan, torch.nn.Linear(1, 1))
    assert made == [(budget, 1), (budget, None)]


def test_the_events_that_time_a_copy_are_gone_when_it_is_over() -> None:
    device = CheckedDevice()
    engine = TransferEngine(device)
    host, there = torch.zeros(4), torch.zeros(4)
    for _ in range(100):
        engine.to_device(host, there, category="rows")
    assert len(engine._timed["h2d"]) <= 1
    assert engine.busy_seconds()["h2d"] == pytest.approx(0.1)  # a millisecond each, says the checked device
    assert not engine._timed["h2d"]


def test_what_a_device_with_streams_computes_is_timed_by_events(tmp_path) -> None:
    choice = {"prefetch_depth": 1, "rows_in_backward": "refetched", **EXPERTS}
    trainer = checked_trainer(save_tiny_llama(tmp_path), choice, overlapped=False, max_norm=1.0, beside="evaluation")
    clock = trainer.session.clock
    done = worked(trainer.session, trainer.measured.steps)
    tasks = round(done.lanes["gpu"] * 1000)
    assert tasks % trainer.measured.steps == 0  # each step has the same tasks, evaluations none
    assert tasks >= trainer.measured.steps * 3 * 4
    assert not clock._marked


def test_tasks_of_the_gpu_have_their_place_in_the_trace() -> None:
    clock = LaneClock(keep=True)
    clock.follow(CheckedDevice().streams)
    clock.computed("attention 0")
    clock.restart()
    clock.computed("ffn 0")
    clock.settle()
    (task,) = clock.events()
    assert (task.lane, task.name, task.end_seconds - task.start_seconds) == ("gpu", "ffn 0", pytest.approx(1e-3))


def test_a_checkpoint_has_the_gpus_random_generator_too(glass_folder, monkeypatch) -> None:
    session = open_small(glass_folder, small_plan(glass_folder))
    state, restored = torch.arange(16, dtype=torch.uint8), []
    assert set(checkpoint._random_states(session)) == {"rng_state"}
    monkeypatch.setattr(session.device, "kind", "cuda")
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *given: restored.append(given))
    states = checkpoint._random_states(session)
    assert states["cuda_rng_state"] is state
    checkpoint._restore_random_states(session, states, glass_folder)
    assert restored == [(state, session.device.torch_device)]
    checkpoint._restore_random_states(session, {"rng_state": states["rng_state"]}, glass_folder)
    assert len(restored) == 1


def test_out_of_memory_while_nf4_weights_load_is_one_line(glass_folder, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation")

    monkeypatch.setattr(model_loading, "load_causal_lm", refuse)
    with pytest.raises(DeviceOutOfMemory, match=r"budget of 4\.00 GiB: CUDA out of memory.*--gpu-mem") as caught:
        model_loading.load_frozen_model(small_plan(glass_folder), glass_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_an_fp32_adapter_with_experts_goes_backward_under_autocast(glass_folder, inside) -> None:
    session = open_small(glass_folder, small_plan(glass_folder, choice=EXPERTS))
    for tables in session.store.layers:
        tables.weights.normal_(std=0.3)
    batch = collate(random_examples(2, length=32), seq_len=32, pad_id=0)
    with session.device.scope():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = session.loss(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16) if inside else nullcontext():
            session.exchange.begin_backward()
            loss.backward()
            session.exchange.finish_backward()
    assert all(weight.grad.dtype == torch.float32 and weight.grad.any() for weight in session.router_weights)
    assert all(tables.gradients.any() for tables in session.store.layers)
