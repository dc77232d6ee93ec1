"""Hot rows in the planner: what they hold, move and cost, and when the search takes them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from planner_records import decision_of, gpu_profile, request_of, sparsity_profile, tiny_shape
from pydantic import ValidationError

from meft.planner.base.errors import UsageError
from meft.planner.memory.device import predict_device_memory
from meft.planner.memory.host import host_memory
from meft.planner.models.catalogue import load_model
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Decision, Plan
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
from meft.planner.render.plan import plan_view
from meft.planner.search.search import make_plan
from meft.planner.traffic.hot_rows import hot_active_rows, hot_share
from meft.planner.traffic.sparsity import WindowRows, window_rows
from meft.planner.traffic.transfer import expected_step_bytes, step_transfer

POPULAR = ({"rows": 0.1, "traffic": 0.4}, {"rows": 0.25, "traffic": 0.7})


def popular(name: str = "meft-paper"):
    profile = load_sparsity(name)
    return type(profile).model_validate(profile.model_dump() | {"popularity": POPULAR})


def tiny_request():
    """Three layers of width 8, two sequences of four tokens."""
    return request_of(model=tiny_shape(), batch_size=2, seq_len=4)


def tiny_decision(**changes: Any) -> Decision:
    return decision_of(**({"adapter_width": 64, "top_k": 4, "active_rows_cap": 40} | changes))


# --- terms by hand ---------------------------------------------------------------------------------------------------


def test_shares_are_straight_between_the_points_of_a_profile() -> None:
    profile = popular()
    assert hot_share(profile, hot_rows=10, adapter_width=100) == pytest.approx(0.4)
    assert hot_share(profile, hot_rows=5, adapter_width=100) == pytest.approx(0.2)
    assert hot_share(profile, hot_rows=100, adapter_width=100) == pytest.approx(1.0)
    assert hot_share(load_sparsity("meft-paper"), hot_rows=5, adapter_width=100) == pytest.approx(0.05)
    assert hot_active_rows(np.array([30, 50]), hot_rows=10, share=0.4).tolist() == [10, 10]  # never more than there are


@pytest.mark.parametrize(
    ("points", "match"),
    [
        ([{"rows": 0.2, "traffic": 0.5}, {"rows": 0.1, "traffic": 0.6}], "rows must ascend"),
        ([{"rows": 0.1, "traffic": 0.5}, {"rows": 0.2, "traffic": 0.4}], "traffic must not fall"),
        ([{"rows": 0.5, "traffic": 0.4}], "carry less than that"),
    ],
)
def test_a_popularity_that_cannot_be_is_refused(points, match) -> None:
    profile = load_sparsity("meft-paper")
    with pytest.raises(ValidationError, match=match):
        type(profile).model_validate(profile.model_dump() | {"popularity": points})


@pytest.mark.parametrize(("adapter_dtype", "tables"), [("bf16", 4), ("fp32", 3)])
def test_what_they_hold_by_hand(adapter_dtype, tables) -> None:
    # L = 3, D = 8, H = 10: a row is 16 numbers. Masters where rows are bf16, two moments, sums; two int32 counts.
    request = tiny_request().model_copy(update={"adapter_dtype": adapter_dtype})
    decision = tiny_decision(hot_rows=10)
    num_layers, row, e = request.model.num_layers, 2 * request.model.hidden_size, 2 if adapter_dtype == "bf16" else 4
    memory = predict_device_memory(request=request, decision=decision, gpu=gpu_profile())
    sizes = {
        entry.category: entry.num_bytes for entry in memory.entries if entry.phase in ("resident", "optimizer_step")
    }
    assert sizes["hot_rows"] == num_layers * 10 * row * e
    assert sizes["hot_states"] == num_layers * 10 * (tables * row * 4 + 8)
    assert sizes["row_indices"] == num_layers * 40 * 4
    assert sizes.get("gradient_sums", 0) == (256 * row * 4 if e == 2 else 0)  # where bf16 gradients are cast
    assert sizes["optimizer_temporary"] == 4 * 10 * row * 4
    host = {entry.category: entry.num_bytes for entry in host_memory(request=request, decision=decision).entries}
    assert host["hot_index"] == num_layers * 64 * 8
    assert host["row_positions_landing"] == 40 * 4


def test_what_moves_by_hand() -> None:
    request = tiny_request()
    num_layers, hidden_size = request.model.num_layers, request.model.hidden_size
    decision = tiny_decision(hot_rows=10)
    active, hot = [20] * num_layers, [6] * num_layers
    transfer = step_transfer(request=request, decision=decision, active_rows_per_layer=active, hot_rows_per_layer=hot)
    moved = {(entry.category, entry.per): entry.num_bytes for entry in transfer.entries}
    row = 2 * hidden_size * (2 if request.adapter_dtype == "bf16" else 4)
    assert moved["rows", "step"] == moved["row_gradients", "step"] == num_layers * 14 * row
    assert moved["row_positions", "step"] == num_layers * 6 * 4
    assert moved["hot_keys", "optimizer_step"] == num_layers * 10 * hidden_size * 4
    assert moved["hot_norm", "optimizer_step"] == 8
    assert transfer.d2h_bytes_per_optimizer_step == moved["hot_keys", "optimizer_step"] + 8
    none = expected_step_bytes(request=request, decision=tiny_decision(), active_rows_per_layer=active)
    assert none[0] - transfer.h2d_bytes_per_step == num_layers * 6 * (row - 4)


def test_hot_rows_are_neither_missing_nor_kept_in_a_window() -> None:
    chosen = tiny_decision(top_k=4, adapter_width=100, active_rows_cap=100, cached_rows=100)

    def window_with(hot_rows: int) -> WindowRows:
        candidates = replace(Candidates.of(chosen), hot_rows=hot_rows)
        return window_rows(sparsity_profile(), 1, tokens=64, grad_accum=8, candidates=candidates)

    plain, hot = window_with(0), window_with(50)
    assert hot.kept[0] == pytest.approx(plain.kept[0] / 2, abs=1)  # nothing says that they are popular
    assert hot.missing[0] == pytest.approx(plain.missing[0] / 2, abs=1)
    every = window_with(100)
    assert (every.missing[0], every.kept[0], every.overflow[0]) == (0, 0, 0)


def test_a_row_is_not_both_hot_and_cached() -> None:
    with pytest.raises(ValidationError, match="hot_rows 40 and cached_rows 30 are more than adapter_width 64"):
        tiny_decision(hot_rows=40, cached_rows=30)


# --- time and search -------------------------------------------------------------------------------------------------


def profiles(**changes: Any) -> ProfileSet:
    parts = {
        "gpu": load_gpu("rtx-3090"),
        "link": load_link("pcie-4.0-x16"),
        "host": load_host("desktop-ddr4"),
        "sparsity": popular(),
    }
    return ProfileSet(**(parts | changes))


def llama(**changes: Any):
    """Llama 3.2 1B with 2,048 rows per layer."""
    asked = {"gpu_mem_bytes": 24 << 30, "host_mem_bytes": 256 << 30, "adapter_width": 2048, "top_k": 64}
    return request_of(**({"model": load_model("llama-3.2-1b")[0]} | asked | changes))


def planned(asked, known: ProfileSet) -> Plan:
    plan = make_plan(asked, known, meft_version="0")
    assert isinstance(plan, Plan)
    return plan


def test_they_take_work_off_the_host_and_the_link() -> None:
    plan = planned(llama(hot_rows=0), profiles())
    decision = plan.decision.model_copy(update={"cached_rows": 0, "gradients_on_device": False})
    hot = decision.model_copy(update={"hot_rows": 512})
    before, after = (predict(plan.request, chosen, profiles()) for chosen in (decision, hot))
    for lane in ("cpu", "h2d", "d2h"):
        assert after.timing.busy_seconds[lane] < 0.9 * before.timing.busy_seconds[lane]
    assert after.timing.busy_seconds["gpu"] > before.timing.busy_seconds["gpu"]
    assert after.timing.step_seconds < before.timing.step_seconds
    assert after.timing.baseline_step_seconds == before.timing.baseline_step_seconds
    assert after.device_memory.peak_allocated_bytes > before.device_memory.peak_allocated_bytes


def test_the_search_takes_them_where_a_step_is_the_shorter_for_them() -> None:
    without = planned(llama(hot_rows=0), profiles())
    chosen = planned(llama(), profiles())
    assert chosen.decision.hot_rows > 0
    assert chosen.prediction.timing.step_seconds < without.prediction.timing.step_seconds
    memory = chosen.prediction.device_memory
    assert memory.peak_reserved_bytes_at_cap <= memory.allocator_budget_bytes
    assert chosen.decision.hot_rows + chosen.decision.cached_rows <= chosen.decision.adapter_width


def test_without_memory_to_spare_there_are_none() -> None:
    plenty = planned(llama(), profiles()).prediction.device_memory
    least = planned(llama(hot_rows=0), profiles()).prediction.device_memory
    assert plenty.peak_reserved_bytes_at_cap > least.peak_reserved_bytes_at_cap
    context = plenty.context_bytes.high_bytes
    tight = planned(llama(gpu_mem_bytes=least.peak_reserved_bytes_at_cap + context), profiles())
    assert tight.prediction.device_memory.peak_reserved_bytes_at_cap <= least.peak_reserved_bytes_at_cap
    assert tight.decision.hot_rows < planned(llama(), profiles()).decision.hot_rows


def test_a_profile_that_does_not_know_is_not_guessed_at() -> None:
    unknown = profiles(sparsity=load_sparsity("meft-paper"))
    plan = planned(llama(), unknown)
    assert plan.decision.hot_rows == 0
    assert "hot rows" not in rendered(plan)
    assert "does not say how popular rows are" in " ".join(rendered(plan, verbose=True).split())
    asked = planned(llama(hot_rows=256), unknown)
    share = sum(asked.prediction.sparsity.hot_rows_per_layer) / sum(asked.prediction.sparsity.active_rows_per_layer)
    assert share == pytest.approx(256 / 2048, abs=0.01)
    about = " ".join(rendered(asked).split())
    assert re.search(r"hot rows 256 the most used live on the GPU: at least \d+\.\d % of a batch's \(as asked\)", about)


def rendered(plan: Plan, *, verbose: bool = False) -> str:
    return "\n".join(line.text for line in plan_view(plan, path="plan.json", notes=[], verbose=verbose).lines(200))


def test_as_many_as_asked_in_every_candidate() -> None:
    plan = planned(llama(hot_rows=300, adapter_width=None), profiles())
    assert plan.decision.hot_rows == 300
    assert plan.decision.adapter_width >= 300
    assert {point.decision.hot_rows for point in plan.search.pareto} == {300}


def test_more_hot_rows_than_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="hot_rows 4096 is above adapter_width 2048"):
        make_plan(llama(hot_rows=4096), profiles(), meft_version="0")
