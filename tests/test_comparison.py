"""Methods side by side: sizes, what fits, and what a configuration needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import sample_plan, sample_profiles, sample_request

from meft.planner.cli_methods import compare_methods, parse_targets
from meft.planner.cli_options import RequestOptions
from meft.planner.cli_request import planning
from meft.planner.comparison import (
    DENSE_NAMES,
    USUAL_SIZES,
    DenseChoice,
    Estimate,
    MethodRow,
    compare_dense,
    dense_method,
    estimate_dense,
    estimate_meft,
    trainable_parameters,
)
from meft.planner.dense_timing import dense_step_seconds
from meft.planner.errors import UsageError
from meft.planner.models import load_model
from meft.planner.plan import Request
from meft.planner.profiles import load_gpu, load_link
from meft.planner.timing import gpu_rates, step_timing

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


def estimated(request: Request, choice: DenseChoice) -> Estimate:
    return estimate_dense(choice, request=request, gpu=load_gpu("rtx-3090"), link=load_link("pcie-4.0-x16"))


LORA = DenseChoice(method="lora", size=8, targets=("q", "v"))


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "expected"), [(4, 2_097_152), (8, 4_194_304), (32, 16_777_216), (64, 33_554_432)])
def test_lora_parameters_are_those_the_paper_plots(llama: Request, rank: int, expected: int) -> None:
    # Figure 1 of arXiv 2406.04984, data in the authors' examples/draw_lines.py: LoRA on q and v of LLaMA-7B,
    # r * (4096 + 4096) * 2 targets * 32 layers.
    choice = replace(LORA, size=rank)
    assert trainable_parameters(llama.model, dense_method(choice, shape=llama.model, size=rank)) == expected


def test_parallel_adapter_parameters_are_those_the_paper_plots(llama: Request) -> None:
    # The same figure: width 1536 has 402,653,184 parameters, 2 * 1536 * 4096 * 32.
    estimate = estimated(llama, DenseChoice(method="parallel-adapter", size=1536))
    assert estimate.trainable_parameters == 402_653_184
    assert estimate.trainable_fraction == 402_653_184 / 6_738_415_616


def test_full_trains_everything(llama: Request) -> None:
    estimate = estimated(llama, DenseChoice(method="full", size=None))
    assert estimate.trainable_parameters == 6_738_415_616
    assert (estimate.size, estimate.size_name, estimate.adapter_dtype) == (None, None, None)
    # bf16 weights and two bf16 moments are there for good: 6 bytes per parameter, and little else.
    assert estimate.resident_bytes == pytest.approx(6 * 6_738_415_616, rel=0.001)
    assert not estimate.fits


def test_a_model_without_a_gate_adapts_what_it_has() -> None:
    shape, _, _ = load_model("gpt2")
    choice = replace(LORA, targets=("up", "gate", "down"))
    # D = 768, I = 3072, 12 layers: 8 * (768 + 3072) * 2 * 12
    assert trainable_parameters(shape, dense_method(choice, shape=shape, size=8)) == 8 * (768 + 3072) * 2 * 12


# --- estimates ------------------------------------------------------------------------------------------------------


def test_an_estimate_adds_up(llama: Request) -> None:
    estimate = estimated(llama, LORA)
    in_peak = sum(entry.num_bytes for entry in estimate.entries if entry.phase in ("resident", estimate.peak_phase))
    assert estimate.peak_allocated_bytes == in_peak
    assert estimate.resident_bytes == sum(entry.num_bytes for entry in estimate.entries if entry.phase == "resident")
    assert estimate.peak_reserved_bytes > estimate.peak_allocated_bytes
    assert estimate.process_bytes.low_bytes > estimate.peak_reserved_bytes
    assert all(entry.because and entry.basis for entry in estimate.entries)
    assert estimate.leaves_out


def test_options_move_what_they_should(llama: Request) -> None:
    plain = estimated(llama, LORA)
    quantized = estimated(llama, replace(LORA, weights_dtype="nf4"))
    double = estimated(llama, replace(LORA, weights_dtype="nf4", double_quant=True))
    assert double.resident_bytes < quantized.resident_bytes < plain.resident_bytes
    checkpointed = estimated(llama, replace(LORA, activation_checkpointing=True))
    assert checkpointed.peak_allocated_bytes < plain.peak_allocated_bytes
    assert checkpointed.step_seconds > plain.step_seconds
    dropped = estimated(llama, replace(LORA, outputs_kept=False))
    # bf16 logits of 2 x 256 tokens over a vocabulary of 32,000
    assert plain.peak_allocated_bytes - dropped.peak_allocated_bytes == 2 * 512 * 32_000
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


MISTRAL = {
    "batch_size": 4,
    "seq_len": 4096,
    "grad_accum": 1,
    "attention": "flash",
    "activation_checkpointing": True,
}


@pytest.mark.parametrize(
    ("method", "weights_dtype", "double_quant", "measured_bytes"),
    [
        # Peaks that torch counted on an A100 while training Mistral-7B, r = 16 on q, k, v, o, 4 x 4096 packed tokens,
        # checkpointing, FlashAttention-2, stock loss: benchmark tables of fms-acceleration, runs 01290 and 01392
        # ("none" and "accelerated-peft-bnb", whose nf4 model keeps its embeddings and head in 16 bits).
        ("lora", "bf16", False, 26_704_571_904),
        ("qlora", "nf4", True, 16_373_838_336),
    ],
)
def test_peaks_of_measured_runs(
    llama: Request, method: str, weights_dtype: str, double_quant: bool, measured_bytes: int
) -> None:
    shape, _, _ = load_model("mistral-7b")
    request = llama.model_copy(update={"model": shape, **MISTRAL})
    choice = DenseChoice(
        method=method,  # type: ignore[arg-type]
        size=16,
        targets=("q", "k", "v", "o"),
        weights_dtype=weights_dtype,  # type: ignore[arg-type]
        double_quant=double_quant,
        activation_checkpointing=True,
    )
    assert estimated(request, choice).peak_allocated_bytes == pytest.approx(measured_bytes, rel=0.03)


# --- time -----------------------------------------------------------------------------------------------------------


def dense_seconds(request: Request, choice: DenseChoice) -> float:
    method = dense_method(choice, shape=request.model, size=choice.size or 0)
    return dense_step_seconds(
        request=request,
        gpu=load_gpu("rtx-3090"),
        link=load_link("pcie-4.0-x16"),
        method=method,
        activation_checkpointing=False,
    )


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
    choice = DenseChoice(method="parallel-adapter", size=1024, adapter_dtype="bf16")
    parameters = 2 * 1024 * 4096 * 32
    adamw = 7 * 2 * parameters / gpu_rates(load_gpu("rtx-3090"), llama).bytes_per_second / llama.grad_accum
    copies = dense_seconds(llama, choice) - adamw - timing.baseline_step_seconds
    assert 0 < copies < 1e-3


def test_time_grows_with_size_and_training_everything_costs_more(llama: Request) -> None:
    narrow, wide = (dense_seconds(llama, DenseChoice(method="parallel-adapter", size=size)) for size in (64, 4096))
    assert narrow < wide
    low, high = (dense_seconds(llama, replace(LORA, size=rank)) for rank in (8, 512))
    assert low < high
    assert dense_seconds(llama, DenseChoice(method="full", size=None)) > low


# --- the largest that fits ------------------------------------------------------------------------------------------


def compared(request: Request, method: str) -> MethodRow:
    return compare_dense(  # type: ignore[arg-type]
        method,  # type: ignore[arg-type]
        request=request,
        gpu=load_gpu("rtx-3090"),
        link=load_link("pcie-4.0-x16"),
        weights_dtype="bf16",
    )


@pytest.mark.parametrize(("method", "step"), [("lora", 1), ("qlora", 1), ("parallel-adapter", 64)])
def test_the_largest_fits_and_one_more_does_not(llama: Request, method: str, step: int) -> None:
    largest = compared(llama, method).largest
    assert largest is not None
    assert largest.size is not None
    assert largest.fits
    for checkpointing in (False, True):
        more = DenseChoice(
            method=method,  # type: ignore[arg-type]
            size=largest.size + step,
            targets=USUAL_SIZES[method].targets,  # type: ignore[index]
            weights_dtype=largest.weights_dtype,
            double_quant=largest.double_quant,
            activation_checkpointing=checkpointing,
        )
        assert not estimated(llama, more).fits


def test_nothing_fits_a_tiny_card(llama: Request) -> None:
    for method in DENSE_NAMES:
        row = compared(llama.model_copy(update={"gpu_mem_bytes": 2 * GIB}), method)
        assert row.largest is None
        assert row.usual is not None
        assert not row.usual.fits
        assert row.largest_because == "no size fits the budget"


@given(st.integers(14, 30), st.integers(0, 8))
def test_more_memory_never_makes_the_largest_smaller(budget_gib: int, more_gib: int) -> None:
    shape, _, _ = load_model("qwen2.5-0.5b")
    request = sample_request(model=shape, batch_size=2, seq_len=64)
    sizes = []
    for eighths in (budget_gib, budget_gib + more_gib):
        largest = compared(request.model_copy(update={"gpu_mem_bytes": eighths * GIB // 8}), "lora").largest
        sizes.append(0 if largest is None else largest.size or 0)
    assert sizes[0] <= sizes[1]


def test_checkpointing_is_used_where_left_open_and_only_then(llama: Request) -> None:
    row = compared(llama, "parallel-adapter")
    assert row.usual is not None
    assert row.usual.activation_checkpointing  # width 1536 fits in 24 GB only with it
    never = compared(llama.model_copy(update={"activation_checkpointing": False}), "parallel-adapter")
    assert never.usual is not None
    assert not never.usual.activation_checkpointing


# --- the command's parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj,v_proj", ("q", "v")),
        ("v q, q", ("q", "v")),
        ("attention", ("q", "k", "v", "o")),
        ("all-linear", ("q", "k", "v", "o", "gate", "up", "down")),
    ],
)
def test_targets(text: str, expected: tuple[str, ...]) -> None:
    assert parse_targets(text) == expected


def test_bad_targets_are_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown linear layer in --target-modules 'downn'; did you mean down"):
        parse_targets("q,downn")
    with pytest.raises(UsageError, match="it names no layer"):
        parse_targets(" , ")


def test_every_method_has_its_row() -> None:
    options = {"model": "smollm2-135m", "gpu": "emulated", "gpu_mem": GIB, "host_mem": 4 * GIB, "batch_size": 1}
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
