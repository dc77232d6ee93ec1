"""What a method takes on the emulated device, before it runs: by its closed form, and by the trace of its own code."""

from __future__ import annotations

import json

import pytest
from method_runs import peft_setup, small_setup, trainer_of

from meft.planner.base.errors import UsageError
from meft.planner.front.asked import EstimateRequest
from meft.planner.front.estimate import estimate_of
from meft.planner.models.linears import resolve_targets
from meft.planner.records.peft_methods import PeftMethod
from meft.planner.simulation.peft import has_closed_form, trained_sizes
from meft.planner.simulation.run import simulate
from meft.planner.simulation.stream import live_by_category, stream_peaks
from meft.runtime.methods.opening import model_shape
from meft.runtime.trace.run import trace_training
from meft.runtime.trace.verify import verify_setup

CLOSED = ("prompt-tuning", "prefix-tuning", "ia3")


def config_of_folder(folder) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def observed_bytes(setup, folder) -> int:
    trainer = trainer_of(setup, folder, steps=2)
    trainer.run()
    return trainer.measured.peaks.allocated_bytes


def lora_setup(folder, method: str = "lora", **fields: object):
    targets = resolve_targets(model_shape(folder), ["all-linear"])
    return small_setup(folder, method=method, rank=8, target_modules=targets, seq_len=32, **fields)


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize(
    "changes",
    [{}, {"weights_dtype": "bf16"}, {"activation_checkpointing": True}, {"batch_size": 1, "grad_accum": 2}],
    ids=["plain", "bf16", "checkpointing", "one-sequence"],
)
def test_a_closed_form_is_the_trace_and_the_run(tiny_folder, name, changes) -> None:
    if name == "prefix-tuning" and "activation_checkpointing" in changes:
        pytest.skip("a prefix is a cache, which a recomputed layer does not see")
    setup = peft_setup(tiny_folder, name, seq_len=32, **changes)
    assert has_closed_form(setup)
    predicted = stream_peaks(simulate(setup)).allocated_bytes
    traced = stream_peaks(trace_training(setup, config_of_folder(tiny_folder)))
    assert predicted == pytest.approx(traced.allocated_bytes, rel=0.01)
    assert observed_bytes(setup, tiny_folder) == pytest.approx(predicted, rel=0.03)


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_is_the_trace_on_a_card_too(tiny_folder, name, dtype) -> None:
    setup = peft_setup(tiny_folder, name, seq_len=32, emulated=False, outputs_kept=True, weights_dtype=dtype)
    traced = trace_training(setup, config_of_folder(tiny_folder), workspace_bytes=1 << 20)
    predicted = simulate(setup, workspace_bytes=1 << 20)
    assert stream_peaks(predicted).allocated_bytes == pytest.approx(stream_peaks(traced).allocated_bytes, rel=0.01)


@pytest.mark.parametrize("name", ["dora", "vera", "oft", "p-tuning", "trainable-tokens"])
def test_the_trace_of_any_other_is_the_run(tiny_folder, name) -> None:
    """To the byte: the same session under fake tensors."""
    setup = peft_setup(tiny_folder, name, seq_len=32)
    assert not has_closed_form(setup)
    stream = trace_training(setup, config_of_folder(tiny_folder))
    assert stream_peaks(stream).allocated_bytes == observed_bytes(setup, tiny_folder)
    trained = trainer_of(setup, tiny_folder, steps=1).session.trainable_parameters
    assert live_by_category(stream, stream.moments["backward_1"])["gradients"] == 4 * trained


def test_qlora_beside_bitsandbytes_own_weights_is_predicted(tiny_folder) -> None:
    """The library's CPU backend computes; its packed weights, scales and tables are in the books."""
    pytest.importorskip("bitsandbytes")
    setup = lora_setup(tiny_folder, "qlora", weights_dtype="nf4", double_quant=True)
    observed = observed_bytes(setup, tiny_folder)
    traced = stream_peaks(trace_training(setup, config_of_folder(tiny_folder)))
    assert traced.allocated_bytes == observed
    assert stream_peaks(simulate(setup)).allocated_bytes == pytest.approx(observed, rel=0.03)


@pytest.mark.parametrize("method", ["lora", "full", "parallel-adapter"])
def test_the_other_baselines_are_predicted_on_the_emulated_device(tiny_folder, method) -> None:
    setup = lora_setup(tiny_folder) if method == "lora" else small_setup(tiny_folder, method=method, seq_len=32)
    if method == "parallel-adapter":
        setup = setup.model_copy(update={"adapter_width": 64})
    assert stream_peaks(simulate(setup)).allocated_bytes == pytest.approx(observed_bytes(setup, tiny_folder), rel=0.03)


@pytest.mark.parametrize("name", CLOSED)
def test_the_closed_form_counts_what_is_trained(tiny_folder, name) -> None:
    setup = peft_setup(tiny_folder, name)
    assert sum(trained_sizes(setup)) == trainer_of(setup, tiny_folder).session.trainable_parameters


def test_another_setting_has_no_closed_form(tiny_folder) -> None:
    asked = PeftMethod(peft_type="prefix-tuning", arguments={"num_virtual_tokens": 4, "prefix_projection": True})
    setup = small_setup(tiny_folder, method="peft", peft=asked)
    assert not has_closed_form(setup)
    with pytest.raises(ValueError, match="its code is traced"):
        simulate(setup)


@pytest.mark.parametrize("name", ["ia3", "hra"])
def test_an_estimate_on_the_emulated_device_is_what_the_command_takes(tiny_folder, name) -> None:
    asked = {"model": str(tiny_folder), "gpu": "emulated", "gpu_mem": "64MiB", "batch_size": 2, "seq_len": 32}
    estimate, _ = estimate_of(EstimateRequest(method=f"peft:{name}", activation_checkpointing=False, **asked))
    setup = peft_setup(tiny_folder, name, seq_len=32)
    assert estimate.method == f"peft:{name}"
    assert estimate.trainable_parameters == trainer_of(setup, tiny_folder).session.trainable_parameters
    assert observed_bytes(setup, tiny_folder) == pytest.approx(estimate.peak_allocated_bytes, rel=0.03)


def test_what_looks_at_numbers_cannot_be_traced(tiny_folder) -> None:
    setup = peft_setup(tiny_folder, "shira")
    with pytest.raises(UsageError, match="looks at numbers"):
        verify_setup(setup, config_of_folder(tiny_folder))
