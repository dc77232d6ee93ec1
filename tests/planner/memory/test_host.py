"""Host memory: every entry by hand, and the search's total equal to the ledger's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from planner_records import decision_of, request_of, side_by_side, tiny_shape

from meft.planner.memory.host import host_memory, host_total_bytes
from meft.planner.records.candidates import Candidates


def tiny_request():
    """T = 2 * 5 = 10 tokens, L = 3, D = 8."""
    return request_of(model=tiny_shape(), batch_size=2, seq_len=5)


def by_category(ledger) -> dict[str, int]:
    return {entry.category: entry.num_bytes for entry in ledger.entries}


def test_every_entry_by_hand():
    # One table: L * R * 2D * 4 = 3 * 64 * 16 * 4 = 12288 bytes. A row buffer: 20 rows * 16 * 2 = 640; hidden states:
    # 10 * 8 * 2 = 160, which at p = 2 only layer 0 sends; probes: 10 * 8 * 4 = 320. p = 2: three row stagings, probe
    # landings and experts of rows, two gradient landings.
    decision = decision_of(
        routing="key-experts", adapter_width=64, top_k=4, active_rows_cap=20, prefetch_depth=2, num_experts=16
    )
    ledger = host_memory(request=tiny_request(), decision=decision)
    assert by_category(ledger) == {
        "adapter_weights": 12288,
        "adapter_moments": 24576,
        "adapter_gradients": 12288,
        "step_counts": 3 * 64 * 4,
        "touched_flags": 3 * 64,
        "row_staging": 3 * 640,
        "gradient_landing": 2 * 640,
        "query_landing": 160,
        "probes_landing": 3 * 320,
        "row_experts_landing": 3 * 20 * 4,
    }
    assert ledger.total_bytes == sum(by_category(ledger).values())
    assert {(entry.place, entry.phase, entry.basis) for entry in ledger.entries} == {("host", "resident", "counted")}


def test_cached_rows_and_a_bf16_copy_by_hand():
    # R = 64, C = 10, L = 3: an int32 per row, an int64 per cached row; int32 [cap] at p = 0; 2 bytes a number
    decision = decision_of(
        adapter_width=64, top_k=4, active_rows_cap=20, cached_rows=10, gradients_on_device=True, bf16_copy=True
    )
    sizes = by_category(host_memory(request=tiny_request(), decision=decision))
    assert sizes["cache_index"] == 3 * (64 * 4 + 10 * 8)
    assert sizes["row_positions_landing"] == 20 * 4
    assert sizes["adapter_bf16_copy"] == 12288 // 2
    fp32 = host_memory(request=tiny_request().model_copy(update={"adapter_dtype": "fp32"}), decision=decision)
    assert "adapter_bf16_copy" not in by_category(fp32)


def test_look_ahead_deeper_than_the_model_needs_no_more_buffers():
    # L = 3: three slots at most.
    def total(depth: int) -> int:
        decision = decision_of(adapter_width=64, top_k=4, active_rows_cap=20, prefetch_depth=depth)
        return host_memory(request=tiny_request(), decision=decision).total_bytes

    assert total(1) < total(2) == total(3) == total(9)


def test_the_default_adapter_of_llama_7b():
    # 32 * 6144 * 8192 * 4 = 6,442,450,944 bytes per table, four tables: 24 GiB exactly.
    ledger = host_memory(request=request_of(), decision=decision_of())
    tables = [size for name, size in by_category(ledger).items() if name.startswith("adapter_")]
    assert sum(tables) == 24 * 2**30


@given(
    candidates=st.lists(
        st.tuples(st.sampled_from([64, 128, 256]), st.integers(4, 64), st.integers(0, 5), st.booleans()),
        min_size=1,
        max_size=6,
    ),
)
def test_the_search_and_the_ledger_agree_to_the_byte(candidates: list[tuple[int, int, int, bool]]):
    decisions = [
        decision_of(
            routing="key-experts" if key_experts else "exact",
            adapter_width=width,
            top_k=4,
            active_rows_cap=cap,
            prefetch_depth=depth,
        )
        for width, cap, depth, key_experts in candidates
    ]
    together = side_by_side([Candidates.of(decision) for decision in decisions])
    totals = host_total_bytes(request=tiny_request(), candidates=together)
    for candidate, decision in enumerate(decisions):
        ledger = host_memory(request=tiny_request(), decision=decision)
        assert totals[candidate] == ledger.total_bytes
