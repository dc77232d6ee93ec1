"""Levers: each is the plan's own models asked again, and each option is one that meft-plan has."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from plan_samples import SHAPE, sample_plan, sample_profiles, sample_request

from meft.planner.cli.main import command
from meft.planner.models.catalogue import load_model
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import Decision, Request
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
from meft.planner.search.levers import Lever, levers, reserved_at_most

GIB = 1 << 30
DECISION = Decision(
    adapter_width=4096,
    top_k=64,
    prefetch_depth=0,
    active_rows_cap=2048,
    num_experts=64,
    num_probes=8,
    routing="key-experts",
    rows_in_backward="retained",
    activation_checkpointing=False,
    cached_rows=1024,
    gradients_on_device=True,
    bf16_copy=True,
)


@pytest.fixture(scope="module")
def profiles() -> ProfileSet:
    return ProfileSet(
        gpu=load_gpu("rtx-3090"),
        link=load_link("pcie-4.0-x16"),
        host=load_host("workstation-32core"),
        sparsity=load_sparsity("meft-paper"),
    )


@pytest.fixture(scope="module")
def request_() -> Request:
    shape, _, _ = load_model("llama-7b")
    return sample_request(
        model=shape,
        gpu="rtx-3090",
        host="workstation-32core",
        link="pcie-4.0-x16",
        gpu_mem_bytes=24 * GIB,
        host_mem_bytes=64 * GIB,
        batch_size=2,
        seq_len=256,
        grad_accum=32,
        weights_dtype="bf16",
        adapter_dtype="bf16",
    )


@pytest.fixture(scope="module")
def found(request_: Request, profiles: ProfileSet) -> dict[str, Lever]:
    prediction = predict(request_, DECISION, profiles)
    return {lever.option: lever for lever in levers(request_, DECISION, prediction, profiles)}


def test_the_commonest_questions_are_answered(found: dict[str, Lever]) -> None:
    assert set(found) == {
        "--activation-checkpointing",
        "--adapter-width 2048",
        "--weights-dtype nf4",
        "--batch-size 1",
        "--batch-size 4",
        "--rows-in-backward refetched",
        "--no-bf16-copy",
    }


def allocated_difference(request: Request, profiles: ProfileSet, **update: object) -> int:
    """By the ledger against the plan's own allocated peak, which is replayed."""
    changed = predict(request, DECISION.model_copy(update=update), profiles, replayed=False)
    return (
        changed.device_memory.peak_allocated_bytes
        - predict(request, DECISION, profiles).device_memory.peak_allocated_bytes
    )


def test_what_a_lever_saves_is_predicted(request_: Request, profiles: ProfileSet, found: dict[str, Lever]) -> None:
    before = predict(request_, DECISION, profiles)
    after = predict(request_, DECISION.model_copy(update={"activation_checkpointing": True}), profiles)
    lever = found["--activation-checkpointing"]
    assert lever.device_bytes == allocated_difference(request_, profiles, activation_checkpointing=True) < 0
    assert lever.device_bytes == pytest.approx(reserved_at_most(after) - reserved_at_most(before), rel=0.1)  # replayed
    assert lever.host_bytes == 0
    assert lever.tokens_per_second_ratio == after.timing.tokens_per_second / before.timing.tokens_per_second < 1
    lighter = predict(request_.model_copy(update={"weights_dtype": "nf4"}), DECISION, profiles)
    saved = found["--weights-dtype nf4"].device_bytes
    assert saved == pytest.approx(reserved_at_most(lighter) - reserved_at_most(before), rel=0.1)
    assert saved < -8 * GIB


def test_tables_of_half_the_rows_are_half(found: dict[str, Lever]) -> None:
    # weights, two moments, gradient sums and the bf16 copy of 2048 rows: 4.5 * 32 layers * 2048 * 2 * 4096 * 4 bytes,
    # and buffers and counts besides
    tables = round(4.5 * 32 * 2048 * 2 * 4096 * 4)
    assert -found["--adapter-width 2048"].host_bytes == pytest.approx(tables, rel=0.02)
    assert -found["--no-bf16-copy"].host_bytes == 32 * 4096 * 2 * 4096 * 2


def test_the_largest_saving_comes_first_and_what_does_not_fit_last(request_: Request, profiles: ProfileSet) -> None:
    tight = request_.model_copy(update={"gpu_mem_bytes": 17 * GIB})
    decision = DECISION.model_copy(update={"activation_checkpointing": True, "rows_in_backward": "refetched"})
    several = levers(tight, decision, predict(tight, decision, profiles), profiles)
    fitting = [lever.device_bytes for lever in several if lever.fits]
    faster = [size for size in fitting if size > 0]  # these train faster in memory that is left over
    assert faster == sorted(faster)
    assert fitting == [*faster, *sorted(size for size in fitting if size <= 0)]
    assert [lever.fits for lever in several] == sorted((lever.fits for lever in several), reverse=True)
    plain = next(lever for lever in several if lever.option == "--no-activation-checkpointing")
    assert plain.device_bytes > 0
    assert plain.tokens_per_second_ratio > 1


def test_one_sequence_is_halved_instead_of_the_batch(request_: Request, profiles: ProfileSet) -> None:
    one = request_.model_copy(update={"batch_size": 1})
    options = [lever.option for lever in levers(one, DECISION, predict(one, DECISION, profiles), profiles)]
    assert "--seq-len 128" in options
    assert all(int(option.split()[1]) > 1 for option in options if option.startswith("--batch-size")), (
        "only larger ones"
    )


def test_a_tiny_plan_on_the_emulated_device_has_levers_without_nf4() -> None:
    plan = sample_plan()
    several = levers(plan.request, plan.decision, plan.prediction, sample_profiles())
    assert not any("nf4" in lever.option for lever in several)
    assert SHAPE.num_layers == 3


def test_every_option_of_a_lever_is_one_of_the_command(found: dict[str, Lever]) -> None:
    text = CliRunner().invoke(command, ["plan", "--help"], terminal_width=300).output
    for option in found:
        assert option.split()[0] in text


def test_an_fp32_adapter_stays_one_beside_lighter_weights(request_: Request, profiles: ProfileSet) -> None:
    """With nf4 weights the default is a bf16 adapter."""
    fp32 = request_.model_copy(update={"weights_dtype": "fp32", "adapter_dtype": "fp32"})
    decision = DECISION.model_copy(update={"bf16_copy": False})
    several = levers(fp32, decision, predict(fp32, decision, profiles), profiles)
    assert "--weights-dtype nf4 --adapter-dtype fp32" in {lever.option for lever in several}
