"""Bytes over the link: the published volume, every category by hand, and the ring played through."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_records import decision_of, request_of, side_by_side, tiny_shape

from meft.planner.records.candidates import Candidates
from meft.planner.traffic.transfer import (
    StepRows,
    expected_step_bytes,
    refetched_rows,
    step_bytes,
    step_bytes_by_category,
    step_transfer,
)


def tiny_request(**changes: Any):
    """T = 2 * 5 = 10 tokens, L = 3, D = 8."""
    return request_of(**({"model": tiny_shape(), "batch_size": 2, "seq_len": 5} | changes))


def tiny_decision(**changes: Any):
    values = {"adapter_width": 64, "top_k": 4, "active_rows_cap": 40}
    if changes.get("routing") == "key-experts":
        values |= {"num_experts": 8, "num_probes": 2}
    return decision_of(**(values | changes))


def by_category(transfer) -> dict[str, int]:
    return {entry.category: entry.num_bytes for entry in transfer.entries}


def test_the_papers_volume_and_ratio():
    # MEFT (arXiv 2406.04984) section 3.3: R = 6144, K = 64, 2 x 256 tokens, L = 32, D = 4096, A = 1592 move 0.56 M
    # elements, M = 2*R*D*L = 1,610,612,736; moving all rows both ways moves 2 M, which is 2 / 0.56 = 3.57 as much.
    # Rows, row gradients and hidden states, all in one dtype (bf16 here, so elements are bytes / 2):
    # 32 * (2 * 1592 * 8192 + 512 * 4096) = 901,775,360 = 0.5599 M.
    transfer = step_transfer(request=request_of(), decision=decision_of(), active_rows_per_layer=[1592] * 32)
    moved = by_category(transfer)
    elements = (moved["rows"] + moved["row_gradients"] + moved["queries"]) // 2
    assert elements == 901_775_360
    adapter = 2 * 6144 * 4096 * 32
    assert elements / adapter == pytest.approx(0.56, rel=0.02)
    assert 2 * adapter / elements == pytest.approx(3.57, rel=0.02)
    assert transfer.whole_adapter_offload_ratio == pytest.approx(3.57, rel=0.02)


def test_every_category_of_key_experts_refetched_by_hand():
    # T = 10, L = 3, D = 8, p = 1, bf16 rows (e = 2), bf16 weights (q = 2), A = 20, 30, 40, P = 2.
    request = tiny_request()
    decision = tiny_decision(routing="key-experts", prefetch_depth=1, rows_in_backward="refetched")
    transfer = step_transfer(request=request, decision=decision, active_rows_per_layer=[20, 30, 40])
    assert by_category(transfer) == {
        "inputs": 2 * 8 * 10,
        "rows": 90 * 16 * 2,
        "row_experts": 90 * 4,
        "rows_refetched": 20 * 16 * 2,  # layers below L-1-p = 1
        "queries": 2 * 10 * 8 * 2,  # layers 0 and 1; the last is served by look-ahead
        "probes": 3 * 10 * 2 * 4,
        "row_gradients": 90 * 16 * 2,
        "loss": 4,
        "router_norm": 4,
    }
    assert transfer.h2d_bytes_per_step == 160 + 2880 + 360 + 640
    assert transfer.d2h_bytes_per_step == 320 + 240 + 2880 + 4
    assert (transfer.h2d_bytes_per_optimizer_step, transfer.d2h_bytes_per_optimizer_step) == (0, 4)
    # Both ways, 3 layers, 64 rows of 16 numbers of 2 bytes: 12288.
    assert transfer.whole_adapter_offload_ratio == pytest.approx(
        2 * 3 * 64 * 16 * 2 / (4040 + 3444 + 4 / request.grad_accum)
    )


def test_exact_and_retained_carry_neither_probes_nor_rows_again():
    transfer = step_transfer(request=tiny_request(), decision=tiny_decision(), active_rows_per_layer=[20, 30, 40])
    assert set(by_category(transfer)) == {"inputs", "rows", "queries", "row_gradients", "loss"}
    assert by_category(transfer)["queries"] == 3 * 10 * 8 * 2
    assert transfer.d2h_bytes_per_optimizer_step == 0


@pytest.mark.parametrize(
    ("weights_dtype", "adapter_dtype", "queries", "rows"),
    [("fp32", "fp32", 960, 5760), ("fp32", "bf16", 960, 2880), ("nf4", "fp32", 480, 5760), ("fp16", "bf16", 480, 2880)],
)
def test_hidden_states_travel_in_the_compute_dtype_and_rows_in_the_adapters(
    weights_dtype: str, adapter_dtype: str, queries: int, rows: int
):
    request = tiny_request(weights_dtype=weights_dtype, adapter_dtype=adapter_dtype)
    moved = by_category(step_transfer(request=request, decision=tiny_decision(), active_rows_per_layer=[20, 30, 40]))
    assert (moved["queries"], moved["rows"], moved["row_gradients"]) == (queries, rows, rows)


def refetches_of_a_ring(active_rows: list[int], depth: int) -> int:
    """Rows fetched in backward, found by playing the ring: ``depth + 1`` slots, each keeps its last layer."""
    num_layers = len(active_rows)
    slots: dict[int, int] = {}
    for layer in range(num_layers):
        slots[layer % (depth + 1)] = layer
    fetched = 0
    for layer in reversed(range(num_layers)):
        if slots[layer % (depth + 1)] != layer:
            slots[layer % (depth + 1)] = layer
            fetched += active_rows[layer]
    return fetched


@given(rows=st.lists(st.integers(0, 100), min_size=1, max_size=8), depth=st.integers(0, 10))
def test_what_is_refetched_is_what_the_ring_has_lost(rows: list[int], depth: int):
    counted = refetched_rows(active_rows=np.array(rows), prefetch_depth=depth, refetched=True)
    assert counted == refetches_of_a_ring(rows, depth)
    assert refetched_rows(active_rows=np.array(rows), prefetch_depth=depth, refetched=False) == 0


def test_prefetch_deeper_than_the_model_still_sends_the_first_hidden_state():
    moved = by_category(
        step_transfer(request=tiny_request(), decision=tiny_decision(prefetch_depth=5), active_rows_per_layer=[4] * 3)
    )
    assert moved["queries"] == 10 * 8 * 2


def test_checkpointing_moves_nothing_more():
    rows = [20, 30, 40]
    for place in ("retained", "refetched"):
        plain, checkpointed = (
            expected_step_bytes(
                request=tiny_request(),
                decision=tiny_decision(rows_in_backward=place, activation_checkpointing=checkpointing),
                active_rows_per_layer=rows,
            )
            for checkpointing in (False, True)
        )
        assert plain == checkpointed


@given(
    rows=st.lists(st.tuples(*[st.integers(4, 64)] * 3), min_size=1, max_size=6),
    data=st.data(),
)
def test_the_search_and_the_ledger_agree_to_the_byte(rows: list[tuple[int, int, int]], data: st.DataObject):
    request = tiny_request()
    decisions = [
        tiny_decision(
            active_rows_cap=64,
            prefetch_depth=data.draw(st.integers(0, 3)),
            routing=data.draw(st.sampled_from(["exact", "key-experts"])),
            rows_in_backward=data.draw(st.sampled_from(["retained", "refetched"])),
        )
        for _ in rows
    ]
    h2d, d2h = step_bytes(
        step_bytes_by_category(
            request=request,
            candidates=side_by_side([Candidates.of(decision) for decision in decisions]),
            rows=StepRows(active=np.array(rows).T),
        )
    )
    for candidate, (decision, active) in enumerate(zip(decisions, rows, strict=True)):
        expected = expected_step_bytes(request=request, decision=decision, active_rows_per_layer=active)
        assert (h2d[candidate], d2h[candidate]) == expected
        ledger = step_transfer(request=request, decision=decision, active_rows_per_layer=active)
        assert (ledger.h2d_bytes_per_step, ledger.d2h_bytes_per_step) == expected
        per_step = [entry for entry in ledger.entries if entry.per == "step"]
        assert sum(entry.num_bytes for entry in per_step) == sum(expected)


def test_active_rows_of_another_model_are_refused():
    with pytest.raises(ValueError, match="given for 2 layers, the model has 3"):
        expected_step_bytes(request=tiny_request(), decision=tiny_decision(), active_rows_per_layer=[4, 4])
