"""``--probe`` on a stand-in for a card: the emulated device, whose books are as a card's allocator would have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import meft
from meft.planner.base.errors import MachineError, UsageError
from meft.planner.front import probed as front
from meft.planner.models.shapes import shape_of
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.run import simulate
from meft.planner.simulation.stream import stream_peaks
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.device.nvml import MemoryReading, NvmlUnavailable
from meft.runtime.trace.probe import probe_setup

CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1024,
    architectures=["LlamaForCausalLM"],
).to_dict()
SETUP = TrainingSetup(
    model=shape_of(CONFIG, name="tiny"),
    method="full",
    weights_dtype="fp32",
    batch_size=2,
    seq_len=64,
    attention="eager",
)
MIB = 1 << 20


class Driver(NvmlUnavailable):
    """Says that the process holds 300 MiB beside what the allocator reserved."""

    def process_memory(self, *, at_least_bytes: int = 0) -> MemoryReading:
        return MemoryReading(at_least_bytes + 300 * MIB, "here")


def test_two_steps_take_what_was_simulated() -> None:
    """Numbers and all, in the emulated device's books; its operators are the CPU's, so they differ a little."""
    found = probe_setup(SETUP, CONFIG, budget_bytes=0, device=EmulatedDevice(1 << 30), nvml=Driver("a stand-in"))
    simulated = stream_peaks(simulate(SETUP, workspace_bytes=0))
    assert found["allocated"] == pytest.approx(simulated.allocated_bytes, rel=0.05)
    assert found["reserved"] is not None
    assert found["reserved"] >= simulated.allocated_bytes
    assert found["context"] == 300 * MIB


def test_a_card_that_is_too_small_says_so() -> None:
    found = probe_setup(SETUP, CONFIG, budget_bytes=0, device=EmulatedDevice(4 * MIB))
    assert found == {"allocated": None, "reserved": None, "context": None}


@pytest.mark.parametrize(
    "changes",
    [{"weights_dtype": "nf4", "method": "qlora"}, {"loss": "fused-ce"}, {"optimizer": "adamw-8bit"}],
)
def test_what_is_only_stood_for_is_not_measured(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is not run, only stood for"):
        probe_setup(SETUP.model_copy(update=changes), CONFIG, budget_bytes=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_is_refused() -> None:
    with pytest.raises(MachineError, match="torch sees no CUDA device here"):
        meft.estimate("full", probe=True, model="smollm2-135m", gpu="rtx-3090", seq_len=16)


def test_the_rest_is_corrected_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 100 MiB more reserved than estimated and 300 MiB beside it, the process holds 400 MiB above the estimate;
    and so a card that has 399 MiB above it is too small."""
    options: dict[str, Any] = {"model": "smollm2-135m", "seq_len": 64, "activation_checkpointing": False}
    plain = meft.estimate("full", gpu="rtx-3090", **options)
    measured = {
        "allocated": plain.peak_allocated_bytes,
        "reserved": plain.peak_reserved_bytes + 100 * MIB,
        "context": 300 * MIB,
    }
    monkeypatch.setattr(front, "tracer", lambda *_, **__: lambda *_, **__: measured)
    found = meft.estimate("full", probe=True, gpu="rtx-3090", **options)
    process = plain.peak_reserved_bytes + 400 * MIB
    assert (found.process_bytes.low_bytes, found.process_bytes.high_bytes) == (process, process)
    assert found.verdict == "fits"
    assert found.probed is not None
    assert found.probed.context_bytes == 300 * MIB
    smaller = meft.estimate("full", probe=True, gpu="rtx-3090", gpu_mem=process - MIB, **options)
    assert smaller.verdict != "fits"
    monkeypatch.setattr(front, "tracer", lambda *_, **__: lambda *_, **__: dict.fromkeys(measured))
    assert meft.estimate("full", probe=True, gpu="rtx-3090", **options).verdict == "does-not-fit"
    with pytest.raises(UsageError, match="measured by meft-profile gpu-check"):
        meft.estimate("meft", probe=True, model="smollm2-135m", gpu="rtx-3090")
