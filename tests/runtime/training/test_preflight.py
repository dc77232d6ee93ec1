"""Preflight: every reason why a machine cannot run a plan, all of them at once, and what is only worth a note."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from make_plan import hand_plan
from plan_samples import SHAPE
from sessions import CENTROIDS, EXPERTS, small_plan
from sparse_setup import decision

import meft
from meft.planner.base.errors import EXIT_MACHINE, MachineError
from meft.planner.memory.host import host_memory
from meft.planner.models.stored import StoredWeights
from meft.planner.records.plan import HostBudget, HostPeak, Plan
from meft.runtime.host.optimizer import AdamWSettings
from meft.runtime.training import runner
from meft.runtime.training.preflight import PER_RANK, Machine, check
from meft.runtime.training.training import TrainingOptions

GIB = 1 << 30
LAPTOP = Machine(available_host_bytes=8 * GIB, cuda_total_bytes=None, supports_bf16=True, packages=frozenset())
WORKSTATION = Machine(
    available_host_bytes=64 * GIB,
    cuda_total_bytes=24 * GIB,
    supports_bf16=True,
    packages=frozenset({"bitsandbytes", "flash_attn"}),
)


def plan_of(*, host_bytes: int = GIB, peak_bytes: int = GIB, **request: Any) -> Plan:
    """A plan that needs so much memory."""
    plan = hand_plan(SHAPE, decision(), **request)
    prediction = plan.prediction
    host = prediction.host_memory.model_copy(update={"total_bytes": host_bytes})
    device = prediction.device_memory.model_copy(update={"peak_allocated_bytes": peak_bytes})
    changed = prediction.model_copy(update={"host_memory": host, "device_memory": device})
    return plan.model_copy(update={"prediction": changed})


def problems(plan: Plan, machine: Machine, *, device_kind: str, budget_bytes: int = 4 * GIB) -> list[str]:
    """What the error lists, one problem each."""
    with pytest.raises(MachineError, match=r"^this machine cannot run the plan: ") as caught:
        check(plan, machine, device_kind=device_kind, budget_bytes=budget_bytes)
    assert caught.value.exit_code == EXIT_MACHINE
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("this machine cannot run the plan: ").replace("; ", "\n").splitlines()


@pytest.mark.parametrize(
    ("machine", "device_kind"), [pytest.param(LAPTOP, "emulated"), pytest.param(WORKSTATION, "cuda")]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_plan_that_fits_gives_no_notes(machine, device_kind, dtype) -> None:
    plan = plan_of(weights_dtype=dtype, adapter_dtype=dtype)
    assert check(plan, machine, device_kind=device_kind, budget_bytes=4 * GIB) == []


# --- host memory -----------------------------------------------------------------------------------------------------


def test_the_adapters_home_must_fit_the_host() -> None:
    plan = plan_of(host_bytes=64 * GIB + 1)
    (what, try_this) = problems(plan, WORKSTATION, device_kind="cuda")
    assert what == "host memory: 64.00 GiB are needed for the adapter's home, 64.00 GiB are available"
    assert try_this == "close other programs or plan again with a smaller --host-mem"
    assert check(plan_of(host_bytes=64 * GIB), WORKSTATION, device_kind="cuda", budget_bytes=4 * GIB) == []


def test_the_emulated_device_lies_in_host_memory_too() -> None:
    plan = plan_of(host_bytes=6 * GIB, peak_bytes=2 * GIB)
    assert check(plan, LAPTOP, device_kind="emulated", budget_bytes=4 * GIB) == []
    tighter = replace(LAPTOP, available_host_bytes=8 * GIB - 1)
    (what, _) = problems(plan, tighter, device_kind="emulated")
    needed = "8.00 GiB are needed for the adapter's home and the emulated device"
    assert what == f"host memory: {needed}, 8.00 GiB are available"
    with_gpu = replace(WORKSTATION, available_host_bytes=6 * GIB)  # on a card the device's memory is its own
    assert check(plan, with_gpu, device_kind="cuda", budget_bytes=4 * GIB) == []


def test_a_plan_for_64_gb_runs_on_a_machine_of_64_gb() -> None:
    """Of 64 GiB the kernel shows 62.7, and a desktop leaves 60 of them: README's own plan needs no more."""
    planned = meft.plan(gpu="rtx-3090", model="llama-7b", host_mem="64GB")
    assert planned.request.host_mem_bytes == 64 * GIB
    desktop = replace(WORKSTATION, available_host_bytes=60 * GIB)
    budget = planned.prediction.device_memory.allocator_budget_bytes
    assert check(planned, desktop, device_kind="cuda", budget_bytes=budget) == []
    # It uses what it may: of a machine with less it says so.
    smaller = replace(WORKSTATION, available_host_bytes=57 * GIB)
    assert "the adapter's home" in problems(planned, smaller, device_kind="cuda", budget_bytes=budget)[0]


def test_what_a_checkpoint_copies_must_fit_too() -> None:
    planned = plan_of(host_bytes=2 * GIB)
    peak = HostPeak(phase="checkpoint", num_bytes=3 * GIB, because="by hand")
    machine = HostBudget(machine_bytes=8 * GIB, reserve_bytes=2 * GIB, budget_bytes=6 * GIB, peaks=(peak,))
    memory = planned.prediction.host_memory.model_copy(update={"machine": machine})
    planned = planned.model_copy(update={"prediction": planned.prediction.model_copy(update={"host_memory": memory})})
    tight = replace(WORKSTATION, available_host_bytes=3 * GIB - 1)
    assert problems(planned, tight, device_kind="cuda")[0].startswith("host memory: 3.00 GiB are needed")
    assert check(planned, WORKSTATION, device_kind="cuda", budget_bytes=4 * GIB) == []


def test_weights_that_are_converted_while_they_are_loaded_must_fit() -> None:
    small = replace(WORKSTATION, available_host_bytes=10 * GIB)
    ample = {"device_kind": "cuda", "budget_bytes": 4 * GIB}
    with pytest.raises(MachineError, match=r"12\.00 GiB are needed while the model is loaded, as its files are in"):
        check(plan_of(), small, converted_bytes=12 * GIB, **ample)
    with pytest.raises(MachineError, match=r"24\.00 GiB are needed while"):  # each rank loads its own
        check(plan_of(), replace(small, available_host_bytes=16 * GIB), ranks=2, converted_bytes=12 * GIB, **ample)
    assert check(plan_of(), small, converted_bytes=10 * GIB, **ample) == []


@pytest.mark.parametrize("routing", [EXPERTS, CENTROIDS])
def test_what_every_rank_has_of_its_own_is_what_a_plan_multiplies(routing) -> None:
    chosen = decision(**routing, adapter_width=64, cached_rows=16)
    sizes = []
    for gpus in (2, 4):
        request = hand_plan(SHAPE, chosen, gpus=gpus, grad_accum=4).request
        entries = host_memory(request=request, decision=chosen).entries
        sizes.append({entry.category: entry.num_bytes for entry in entries})
    two, four = sizes
    assert {name for name in two if four[name] == 2 * two[name]} == {name for name in two if name.endswith(PER_RANK)}


# --- the device ------------------------------------------------------------------------------------------------------


def test_cuda_needs_a_cuda_device() -> None:
    listed = problems(plan_of(), LAPTOP, device_kind="cuda")
    assert listed[0].startswith("--device cuda: torch sees no CUDA device here")
    assert listed[1] == "use --device emulated, or install a GPU"


def test_the_budget_must_not_exceed_the_card() -> None:
    (what, try_this) = problems(plan_of(), WORKSTATION, device_kind="cuda", budget_bytes=25 * GIB)
    assert what == "device memory: the plan's budget is 25.00 GiB, the GPU has 24.00 GiB"
    assert try_this == "plan again with a smaller --gpu-mem"
    assert check(plan_of(), WORKSTATION, device_kind="cuda", budget_bytes=24 * GIB) == []
    assert check(plan_of(), WORKSTATION, device_kind="emulated", budget_bytes=25 * GIB) == []


def test_a_card_that_others_use_is_told_apart_from_one_that_is_too_small() -> None:
    desktop = replace(WORKSTATION, cuda_free_bytes=22 * GIB)
    what, try_this = problems(plan_of(), desktop, device_kind="cuda", budget_bytes=23 * GIB)
    assert what == (
        "device memory: the card is shared: of 24.00 GiB, other programs and the CUDA context hold 2.00 GiB, and "
        "22.00 GiB are free for the plan's 23.00 GiB"
    )
    assert "nvidia-smi" in try_this
    too_small = problems(plan_of(), desktop, device_kind="cuda", budget_bytes=25 * GIB)
    assert "the GPU has 24.00 GiB" in too_small[0]
    assert check(plan_of(), desktop, device_kind="cuda", budget_bytes=22 * GIB) == []


def test_the_card_is_asked_for_what_is_free_and_for_bf16_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (14 * GIB, 16 * GIB))
    # Of a T4: torch counts emulation unless it is told not to.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    here = Machine.here()
    assert (here.cuda_free_bytes, here.cuda_total_bytes, here.supports_bf16) == (14 * GIB, 16 * GIB, False)


@pytest.mark.parametrize("dtypes", [("bf16", "fp32"), ("fp32", "bf16")])
def test_bf16_of_weights_or_adapter_needs_a_card_that_has_it(dtypes) -> None:
    old_card = replace(WORKSTATION, supports_bf16=False)
    plan = plan_of(weights_dtype=dtypes[0], adapter_dtype=dtypes[1])
    (what, try_this) = problems(plan, old_card, device_kind="cuda")
    assert (what, try_this) == (
        "bf16: this GPU has no units for it (torch emulates it, many times slower)",
        "plan again with fp32 weights and adapter",
    )
    assert check(plan, old_card, device_kind="emulated", budget_bytes=4 * GIB) == []
    single = plan_of(weights_dtype="fp32", adapter_dtype="fp32")
    assert check(single, old_card, device_kind="cuda", budget_bytes=4 * GIB) == []


def test_flash_attention_needs_its_package_and_cuda() -> None:
    plan, message = plan_of(attention="flash"), "attention flash: it needs a CUDA device and the package flash-attn"
    assert check(plan, WORKSTATION, device_kind="cuda", budget_bytes=4 * GIB) == []
    without = replace(WORKSTATION, packages=WORKSTATION.packages - {"flash_attn"})
    assert problems(plan, without, device_kind="cuda")[0] == message
    assert problems(plan, WORKSTATION, device_kind="emulated")[0] == message


@pytest.mark.parametrize("device_kind", ["cuda", "emulated"])
def test_nf4_needs_its_package_on_either_device(device_kind) -> None:
    plan = plan_of(weights_dtype="nf4")
    assert check(plan, WORKSTATION, device_kind=device_kind, budget_bytes=4 * GIB) == []
    without = replace(WORKSTATION, packages=WORKSTATION.packages - {"bitsandbytes"})
    assert problems(plan, without, device_kind=device_kind)[0] == "nf4 weights: they need the package bitsandbytes"


AWQ = StoredWeights(method="awq", bits=4, group_size=128, zero_points=True)


def test_weights_stored_quantized_need_their_library_and_cuda_before_anything_is_read() -> None:
    plan = plan_of()
    model = plan.request.model.model_copy(update={"stored": AWQ})
    plan = plan.model_copy(update={"request": plan.request.model_copy(update={"model": model})})
    with pytest.raises(
        MachineError, match=r"awq \(4 bits\): they need a CUDA device; .*gptqmodel and accelerate missing"
    ):
        check(plan, WORKSTATION, device_kind="emulated", budget_bytes=4 * GIB)
    there = replace(WORKSTATION, packages=WORKSTATION.packages | {"gptqmodel", "accelerate"})
    assert check(plan, there, device_kind="cuda", budget_bytes=4 * GIB) == []


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.parametrize("device_kind", ["cuda", "emulated"])
def test_weights_that_the_runtime_does_not_train_beside_are_refused(dtype, device_kind) -> None:
    what, _ = problems(plan_of(weights_dtype=dtype), WORKSTATION, device_kind=device_kind)
    assert what == f"{dtype} weights: the runtime trains beside fp32, bf16 or nf4"


# --- together --------------------------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once() -> None:
    poor = Machine(available_host_bytes=GIB, cuda_total_bytes=2 * GIB, supports_bf16=False, packages=frozenset())
    plan = plan_of(host_bytes=2 * GIB, weights_dtype="nf4", adapter_dtype="bf16", attention="flash")
    with pytest.raises(MachineError) as caught:
        check(plan, poor, device_kind="cuda", budget_bytes=4 * GIB)
    found = [str(caught.value).find(what) for what in ("host memory:", "device memory:", "bf16:", "nf4 ", "flash:")]
    assert found == sorted(found)
    assert found[0] > 0


def test_a_budget_below_the_predicted_peak_is_worth_a_note() -> None:
    # Not a refusal: the prediction may be wrong, and the device will say so itself.
    notes = check(plan_of(peak_bytes=3 * GIB), LAPTOP, device_kind="emulated", budget_bytes=3 * GIB - 1)
    assert len(notes) == 1
    assert "the budget of 3.00 GiB is below the predicted peak of 3.00 GiB" in notes[0]
    assert "expect a device out-of-memory error" in notes[0]
    assert check(plan_of(peak_bytes=3 * GIB), LAPTOP, device_kind="emulated", budget_bytes=3 * GIB) == []


def test_this_machine_is_looked_at() -> None:
    here = Machine.here()
    assert here.available_host_bytes > 0
    assert (here.cuda_total_bytes is None) == (not torch.cuda.is_available())
    assert here.packages <= {"bitsandbytes", "flash_attn", "gptqmodel", "optimum", "compressed_tensors", "accelerate"}


def test_nvml_is_opened_before_preflight_asks_the_gpu(monkeypatch, glass_folder, tmp_path) -> None:
    """On older cards the question for bf16 allocates, which the growth of the card would then miss."""
    order = []

    class Reader:
        def close(self) -> None:
            order.append("closed")

    def open_reader(kind: str) -> Reader:
        order.append(kind)
        return Reader()

    def refuse() -> Machine:
        order.append("preflight")
        raise MachineError("no")

    monkeypatch.setattr(runner, "_open_nvml", open_reader)
    monkeypatch.setattr(runner.preflight.Machine, "here", refuse)
    where = {"model": str(glass_folder), "data": (tmp_path,)}
    options = runner.RunOptions(TrainingOptions(steps=1), AdamWSettings(), **where, device="cuda")
    with pytest.raises(MachineError):
        runner.run_training(small_plan(glass_folder), options, runner.Display(print, print))
    assert order == ["cuda", "preflight", "closed"]
