"""What a plan may use of the host's RAM, by hand, and what its run takes of it, phase by phase."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_records import (
    decision_of,
    gpu_profile,
    host_profile,
    link_profile,
    request_of,
    sparsity_profile,
    tiny_shape,
)

from meft.planner.memory.budget import host_budget_bytes, machine_bytes_for
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import HostMemory

GIB = 1 << 30


@pytest.mark.parametrize(
    ("ram", "budget"),
    # Half of little, all but 2 GiB of more, nine tenths of much.
    [(2 * GIB, GIB), (4 * GIB, 2 * GIB), (16 * GIB, 14 * GIB), (20 * GIB, 18 * GIB), (40 * GIB, 36 * GIB)],
)
def test_the_plans_share_by_hand(ram: int, budget: int) -> None:
    assert host_budget_bytes(request_of(host_mem_bytes=ram)) == budget
    assert machine_bytes_for(budget) == ram


@given(needed=st.integers(1, 1 << 45))
def test_ram_for_a_plan_leaves_it_as_much_and_hardly_more(needed: int) -> None:
    ram = machine_bytes_for(needed)
    assert needed <= host_budget_bytes(request_of(host_mem_bytes=ram)) <= needed + 1
    assert ram <= 2 or host_budget_bytes(request_of(host_mem_bytes=ram - 2)) < needed


def peaks(*, on_card: bool, **choice: object) -> dict[str, int]:
    """By phase, of a tiny plan: L = 3, D = 8."""
    gpu = gpu_profile(shares_host_cores=not on_card)
    profiles = ProfileSet(gpu=gpu, link=link_profile(), host=host_profile(), sparsity=sparsity_profile())
    request = request_of(model=tiny_shape(), batch_size=2, seq_len=5, **choice)
    decision = decision_of(
        routing="key-experts", adapter_width=64, top_k=4, active_rows_cap=20, num_experts=16, num_probes=4
    )
    memory = predict(request, decision, profiles, replayed=False).host_memory
    assert memory.machine is not None
    assert memory.machine.reserve_bytes + memory.machine.budget_bytes == memory.machine.machine_bytes
    found = {peak.phase: peak.num_bytes for peak in memory.machine.peaks}
    assert found["training"] == found["resume"] == found["evaluation"] == memory.total_bytes
    return found


def test_peaks_on_a_card() -> None:
    found = peaks(on_card=True)
    # A router and two moments of each layer come from the device: 3 * L * N * D * 4 = 3 * 3 * 16 * 8 * 4.
    assert found["checkpoint"] - found["training"] == 3 * 3 * 16 * 8 * 4
    # The model's files may be in another dtype: then all of it is in host memory once, bf16.
    assert found["loading"] == 2 * tiny_shape().num_parameters
    assert peaks(on_card=True, weights_dtype="nf4")["loading"] == 0


def test_on_the_emulated_device_the_model_and_its_routers_are_the_devices() -> None:
    found = peaks(on_card=False)
    assert "loading" not in found
    assert found["checkpoint"] == found["training"]


def test_a_plan_of_an_older_version_has_no_budget_and_still_loads() -> None:
    memory = HostMemory.model_validate({"entries": (), "total_bytes": 7})
    assert memory.machine is None
    assert HostMemory.model_validate(memory.model_dump(mode="json")) == memory
