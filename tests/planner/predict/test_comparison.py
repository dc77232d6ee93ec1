"""Methods side by side: sizes, what fits, and what a configuration needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_samples import sample_plan, sample_profiles, sample_request, shallow_model
from planner_records import launching

from meft.planner.base.errors import UsageError
from meft.planner.front.compare import compare_methods
from meft.planner.front.options import RequestOptions
from meft.planner.front.request import planning
from meft.planner.models.catalogue import load_model
from meft.planner.models.linears import resolve_targets
from meft.planner.predict.comparison import DENSE_NAMES, MethodRow, candidate_sizes, compare_dense, sized, usual_setup
from meft.planner.predict.estimates import Estimate, estimate_dense, estimate_meft, trainable_parameters
from meft.planner.records.plan import Request
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link
from meft.planner.records.profiles import Sourced
from meft.planner.records.setup import TrainingSetup
from meft.planner.timing.dense import dense_step_seconds
from meft.planner.timing.gpu import ADAPTER_BACKWARD_LAUNCHES, ADAPTER_FORWARD_LAUNCHES, gpu_rates
from meft.planner.timing.step import step_timing

GIB = 1 << 30


@pytest.fixture(scope="module")
def llama() -> Request:
    """LLaMA-7B with the paper's workload on a 24 GB card."""
    shape, _, _ = load_model("llama-7b")
    return Request(
        model=shape,
        gpu="rtx-3090",
        host="workstation-32core",
        link="pcie-4.0-x16",
        sparsity="meft-paper",
        gpu_mem_bytes=24 * GIB,
        host_mem_bytes=64 * GIB,
        host_mem_basis="given",
    )


@pytest.fixture(scope="module")
def shallow(llama: Request) -> Request:
    """Three of its layers on a card that holds as little more: a tenth of the events."""
    shape = llama.model.model_copy(update={"num_layers": 3})
    return llama.model_copy(update={"model": shape, "gpu_mem_bytes": 5 * GIB})


def setup_of(request: Request, method: str, **changes) -> TrainingSetup:
    usual = usual_setup(method, request=request, weights_dtype="bf16")  # type: ignore[arg-type]
    return usual.model_copy(update=changes)


def lora(request: Request, **changes) -> TrainingSetup:
    return setup_of(request, "lora", **({"rank": 8, "target_modules": ("q_proj", "v_proj")} | changes))


def estimated(request: Request, setup: TrainingSetup) -> Estimate:
    return estimate_dense(setup, request=request, **machine())


def machine(**host_numbers: Sourced) -> dict[str, Any]:
    host = load_host("workstation-32core").model_copy(update=host_numbers)
    return {"gpu": load_gpu("rtx-3090"), "link": load_link("pcie-4.0-x16"), "host": host}


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "expected"), [(4, 2_097_152), (8, 4_194_304), (32, 16_777_216), (64, 33_554_432)])
def test_lora_parameters_are_those_the_paper_plots(llama: Request, rank: int, expected: int) -> None:
    # Figure 1 of arXiv 2406.04984, data in the authors' examples/draw_lines.py: LoRA on q and v of LLaMA-7B,
    # r * (4096 + 4096) * 2 targets * 32 layers.
    assert trainable_parameters(lora(llama, rank=rank)) == expected


def test_parallel_adapter_parameters_are_those_the_paper_plots(llama: Request) -> None:
    # The same figure: width 1536 has 402,653,184 parameters, 2 * 1536 * 4096 * 32.
    estimate = estimated(llama, setup_of(llama, "parallel-adapter"))
    assert estimate.trainable_parameters == 402_653_184
    assert estimate.trainable_fraction == 402_653_184 / 6_738_415_616


def test_full_trains_everything(llama: Request) -> None:
    estimate = estimated(llama, setup_of(llama, "full"))
    assert estimate.trainable_parameters == 6_738_415_616
    assert (estimate.size, estimate.size_name, estimate.adapter_dtype) == (None, None, None)
    # bf16 weights and two bf16 moments are there for good: 6 bytes per parameter, and little else.
    assert estimate.resident_bytes == pytest.approx(6 * 6_738_415_616, rel=0.001)
    assert not estimate.fits


def test_a_model_without_a_gate_adapts_what_it_has(llama: Request) -> None:
    shape, _, _ = load_model("gpt2")
    setup = lora(llama, model=shape, target_modules=resolve_targets(shape, ["ffn"]))
    # D = 768, I = 3072, 12 layers; c_proj is the name of attention's output too: 768 + 768
    assert trainable_parameters(setup) == 8 * ((768 + 3072) * 2 + 1536) * 12


# --- estimates ------------------------------------------------------------------------------------------------------


def test_an_estimate_adds_up(llama: Request) -> None:
    estimate = estimated(llama, lora(llama))
    in_peak = sum(entry.num_bytes for entry in estimate.entries if entry.phase in ("resident", estimate.peak_phase))
    assert estimate.peak_allocated_bytes == in_peak
    assert estimate.resident_bytes == sum(entry.num_bytes for entry in estimate.entries if entry.phase == "resident")
    assert estimate.peak_reserved_bytes > estimate.peak_allocated_bytes
    assert estimate.process_bytes.low_bytes > estimate.peak_reserved_bytes
    assert all(entry.because and entry.basis for entry in estimate.entries)
    assert estimate.leaves_out


def test_options_move_what_they_should(llama: Request) -> None:
    plain = estimated(llama, lora(llama))
    quantized = estimated(llama, lora(llama, weights_dtype="nf4"))
    double = estimated(llama, lora(llama, weights_dtype="nf4", double_quant=True))
    assert double.resident_bytes < quantized.resident_bytes < plain.resident_bytes
    checkpointed = estimated(llama, lora(llama, activation_checkpointing=True))
    assert checkpointed.peak_allocated_bytes < plain.peak_allocated_bytes
    assert checkpointed.step_seconds > plain.step_seconds
    dropped = estimated(llama, lora(llama, outputs_kept=False))
    # at least the bf16 logits of 2 x 256 tokens over a vocabulary of 32,000
    assert plain.peak_allocated_bytes - dropped.peak_allocated_bytes >= 2 * 512 * 32_000
    assert any("holding on to" in text for text in dropped.leaves_out)
    assert not any("holding on to" in text for text in plain.leaves_out)


def test_a_plan_is_priced_like_any_method() -> None:
    plan = sample_plan()
    estimate = estimate_meft(plan.request, plan.decision, plan.prediction)
    assert estimate.peak_allocated_bytes == plan.prediction.device_memory.peak_allocated_bytes
    assert estimate.h2d_bytes_per_step == plan.prediction.transfer.h2d_bytes_per_step
    assert estimate.decision == plan.decision
    assert estimate.fits
    small_host = plan.request.model_copy(update={"host_mem_bytes": estimate.host_bytes - 1})
    assert not estimate_meft(small_host, plan.decision, plan.prediction).fits


# --- time -----------------------------------------------------------------------------------------------------------


def dense_seconds(request: Request, setup: TrainingSetup, **host_numbers: Sourced) -> float:
    return dense_step_seconds(setup=setup, request=request, **machine(**host_numbers))


def test_a_step_takes_at_least_what_launching_its_kernels_does(llama: Request) -> None:
    """A bf16 layer of LLaMA has 32 kernels in attention, 6 in the FFN and 60 backward; LoRA adds 5 and 7 to each of two
    linear layers. A profile's seconds are of 28 kernels of attention (here 1) and 56 backward (here 6)."""
    forward, backward = 32 * (32 + 6 + 2 * 5), 32 * (60 + 2 * 7)
    outer = 18 + 14 + 19
    setup = lora(llama)
    assert dense_seconds(llama, setup, **launching(1.0)) == pytest.approx((forward + outer) / 28 + backward * 6 / 56)
    again = dense_seconds(llama, setup.model_copy(update={"activation_checkpointing": True}), **launching(1.0))
    assert again == pytest.approx((2 * forward + outer) / 28 + backward * 6 / 56)
    # The dense adapter's graph starts at layer 0; all weights' gradients are a kernel for each linear layer.
    adapter = dense_seconds(llama, setup_of(llama, "parallel-adapter", adapter_width=64), **launching(1.0))
    kernels = ADAPTER_FORWARD_LAUNCHES, ADAPTER_BACKWARD_LAUNCHES
    assert adapter == pytest.approx((32 * (38 + kernels[0]) + outer) / 28 + (31 * 60 + 32 * kernels[1]) * 6 / 56)
    full = dense_seconds(llama, setup_of(llama, "full"), **launching(1.0))
    assert full == pytest.approx((32 * 38 + outer) / 28 + 32 * (60 + 7) * 6 / 56)


def test_a_device_that_has_enough_to_do_does_not_wait_for_launching(llama: Request) -> None:
    assert dense_seconds(llama, lora(llama), **launching(1e-6)) == dense_seconds(llama, lora(llama))


def test_a_dense_adapter_takes_the_time_of_the_plans_baseline(llama: Request) -> None:
    # The baseline of a plan is the same adapter all on the GPU. With K = R and exact routing they differ by the copies
    # of inputs and loss, and by AdamW, which the baseline has on the host.
    profiles = sample_profiles()
    plan = sample_plan()
    decision = plan.decision.model_copy(
        update={
            "adapter_width": 1024,
            "top_k": 1024,
            "active_rows_cap": 1024,
            "num_experts": 1,
            "num_probes": 1,
            "routing": "exact",
        }
    )
    layers = llama.model.num_layers
    timing = step_timing(
        request=llama,
        decision=decision,
        gpu=load_gpu("rtx-3090"),
        link=load_link("pcie-4.0-x16"),
        host=profiles.host,
        active_rows_per_layer=[1024] * layers,
        window_active_rows_per_layer=[1024] * layers,
    )
    setup = setup_of(llama, "parallel-adapter", adapter_width=1024, adapter_dtype="bf16")
    parameters = 2 * 1024 * 4096 * 32
    adamw = 7 * 2 * parameters / gpu_rates(load_gpu("rtx-3090"), llama).bytes_per_second / llama.grad_accum
    copies = dense_seconds(llama, setup) - adamw - timing.baseline_step_seconds
    assert 0 < copies < 1e-3


def test_time_grows_with_size_and_training_everything_costs_more(llama: Request) -> None:
    widths = [dense_seconds(llama, setup_of(llama, "parallel-adapter", adapter_width=size)) for size in (64, 4096)]
    assert widths[0] < widths[1]
    low, high = (dense_seconds(llama, lora(llama, rank=rank)) for rank in (8, 512))
    assert low < high
    assert dense_seconds(llama, setup_of(llama, "full")) > low


# --- the largest that fits ------------------------------------------------------------------------------------------


def compared(request: Request, method: str) -> MethodRow:
    return compare_dense(  # type: ignore[arg-type]
        method,  # type: ignore[arg-type]
        request=request,
        **machine(),
        weights_dtype="bf16",
    )


@pytest.mark.parametrize(("method", "step"), [("lora", 1), ("qlora", 1), ("parallel-adapter", 64)])
def test_the_largest_fits_and_one_more_does_not(shallow: Request, method: str, step: int) -> None:
    largest = compared(shallow, method).largest
    assert largest is not None
    assert largest.size is not None
    assert largest.fits
    for checkpointing in (False, True):
        setup = setup_of(shallow, method, activation_checkpointing=checkpointing)
        assert largest.size + step in candidate_sizes(setup)
        assert not estimated(shallow, sized(setup, largest.size + step)).fits


def test_nothing_fits_a_tiny_card(llama: Request) -> None:
    for method in DENSE_NAMES:
        row = compared(llama.model_copy(update={"gpu_mem_bytes": 2 * GIB}), method)
        assert row.largest is None
        assert row.usual is not None
        assert not row.usual.fits
        assert row.largest_because == "no size fits the budget"


@settings(max_examples=5)
@given(st.integers(14, 30), st.integers(0, 8))
def test_more_memory_never_makes_the_largest_smaller(budget_gib: int, more_gib: int) -> None:
    shape = load_model("qwen2.5-0.5b")[0].model_copy(update={"num_layers": 4})
    request = sample_request(model=shape, batch_size=2, seq_len=64, activation_checkpointing=False)
    found = []
    for eighths in (budget_gib, budget_gib + more_gib):
        largest = compared(request.model_copy(update={"gpu_mem_bytes": eighths * GIB // 8}), "lora").largest
        found.append(0 if largest is None else largest.size or 0)
    assert found[0] <= found[1]


def test_the_paper_needs_48_gb_for_a_ten_percent_adapter_that_meft_fits_in_24(llama: Request) -> None:
    # arXiv 2406.04984: a parallel adapter of about 10 % of LLaMA-7B is trained on 48 GB, MEFT with as many in 24 GB.
    # Width 2560 is 671 M trainable parameters, 9.96 % of the model.
    dense = setup_of(llama, "parallel-adapter", adapter_width=2560)
    estimates = [estimated(llama, dense.model_copy(update={"activation_checkpointing": on})) for on in (False, True)]
    assert estimates[0].trainable_fraction == pytest.approx(0.1, abs=0.005)
    for estimate in estimates:
        assert estimate.process_bytes.low_bytes > 24 * GIB
        assert estimate.process_bytes.high_bytes < 48 * GIB
    meft = sample_plan()  # its adapter is wider than that
    assert meft.prediction.trainable_fraction > 0.1
    assert meft.prediction.device_memory.process_bytes.high_bytes <= 24 * GIB


def test_checkpointing_is_used_where_left_open_and_only_then(llama: Request) -> None:
    row = compared(llama, "parallel-adapter")
    assert row.usual is not None
    assert row.usual.activation_checkpointing  # width 1536 fits in 24 GB only with it
    never = compared(llama.model_copy(update={"activation_checkpointing": False}), "parallel-adapter")
    assert never.usual is not None
    assert not never.usual.activation_checkpointing


# --- the command's parts --------------------------------------------------------------------------------------------


def test_bad_targets_are_refused(llama: Request) -> None:
    with pytest.raises(UsageError, match=r"unknown linear layer in --target-modules 'downn'; did you mean"):
        resolve_targets(llama.model, ["q", "downn"])
    with pytest.raises(UsageError, match="has no such linear layer; it has q_proj"):
        resolve_targets(llama.model, ["c_attn"])


def test_every_method_has_its_row(tmp_path: Path) -> None:
    options = {
        "model": str(shallow_model(tmp_path)),
        "gpu": "emulated",
        "gpu_mem": GIB,
        "host_mem": 4 * GIB,
        "batch_size": 1,
    }
    nothing = dict.fromkeys(("host", "link", "sparsity", "weights_dtype", "double_quant", "adapter_dtype"))
    fields = options | nothing | {"seq_len": 64, "grad_accum": 2, "attention": "sdpa", "activation_checkpointing": None}
    comparison = compare_methods(planning(RequestOptions.taken_from(fields)))
    assert [row.method for row in comparison.rows] == ["meft", "parallel-adapter", "lora", "full"]
    assert any("qlora" in note for note in comparison.notes)  # left out, and said
    meft = comparison.rows[0]
    assert meft.usual is not None
    assert meft.usual.size == 6144
    assert meft.usual.decision is not None
    assert meft.usual.decision.top_k == 64
    assert meft.largest is not None
    assert meft.largest.fits
