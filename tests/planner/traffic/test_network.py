"""Bytes between machines, by hand; what the runtime counts is held against these in tests/runtime/ranks."""

from __future__ import annotations

from planner_records import decision_of, request_of, tiny_shape

from meft.planner.memory.host import host_memory
from meft.planner.traffic.network import NetworkUse, expected_use, network_bytes
from meft.planner.traffic.transfer import step_transfer

DECISION = decision_of(
    routing="key-experts", adapter_width=64, top_k=4, active_rows_cap=20, num_experts=16, num_probes=4
)


def tiny_request(**changes: object):
    """L = 3, D = 8, bf16; two machines with two cards each, two rounds in a window."""
    several = {"gpus": 2, "nodes": 2, "interconnect_bytes_per_second": 1e9, "grad_accum": 8}
    return request_of(**({"model": tiny_shape(), "batch_size": 2, "seq_len": 5} | several | changes))


def test_bytes_between_machines_by_hand():
    use = NetworkUse(rounds=2, windows=1, foreign_rows=10, summed_rows=5)
    # Counts before a message: 4 ranks send 1 other machine 2 int64 each, 64 bytes. A row: 8 + 16 * 2 = 40 bytes, its
    # sum 8 + 16 * 4 = 72. Routers: 3 * 16 * 8 * 4 = 1536 bytes, of each of 2 ranks on a machine to 1 other.
    assert network_bytes(tiny_request(), DECISION, use) == {
        ("row_gradients", "step"): 3 * 2 * 64 + 10 * 40,
        ("row_sums", "optimizer_step"): 4 * 3 * 8 + 5 * 72,
        ("router_gradients", "step"): 2 * (64 + 2 * 1536),
        ("router_sums", "optimizer_step"): 1536,
        ("rounds", "step"): 2 * (2 * 1 * 2 * 16),
    }
    assert network_bytes(tiny_request(nodes=1, interconnect_bytes_per_second=None), DECISION, use) == {}
    exact = network_bytes(tiny_request(), decision_of(adapter_width=64, top_k=4, active_rows_cap=20), use)
    assert exact["router_gradients", "step"] == exact["router_sums", "optimizer_step"] == 0


def test_sums_made_on_the_device_are_messages_of_their_own():
    summed = DECISION.model_copy(update={"cached_rows": 30, "gradients_on_device": True})
    use = NetworkUse(rounds=2, windows=1, foreign_rows=0, summed_rows=0)
    # 30 rows leave in two messages of at most 20, in each of 3 layers.
    assert network_bytes(tiny_request(), summed, use)["row_gradients", "step"] == 3 * (2 + 2) * 64
    found = expected_use(tiny_request(), summed, gradient_rows=6, kept_rows=90, window_rows=100)
    # Of 8 micro-batches' rows and 4 ranks' sums half are another machine's.
    assert found == NetworkUse(rounds=2, windows=1, foreign_rows=(8 * 6 + 4 * 90) // 2, summed_rows=100)


def test_a_plan_says_a_micro_batchs_share_and_what_a_window_costs():
    transfer = step_transfer(
        request=tiny_request(), decision=DECISION, active_rows_per_layer=[10] * 3, window_rows_per_layer=[20] * 3
    )
    rows = 3 * 2 * 64 + 8 * 30 // 2 * 40  # half of 8 micro-batches' 30 rows
    steps = {"row_gradients": rows // 8, "router_gradients": (2 * (64 + 3072)) // 8, "rounds": 128 // 8}
    once = {"row_sums": 96 + 60 * 72, "router_sums": 1536}
    entries = [entry for entry in transfer.entries if entry.direction == "network"]
    assert {entry.category: entry.num_bytes for entry in entries if entry.per == "step"} == steps
    assert {entry.category: entry.num_bytes for entry in entries if entry.per == "optimizer_step"} == once
    assert transfer.network_bytes_per_step == sum(steps.values())
    assert transfer.network_bytes_per_optimizer_step == sum(once.values())


def test_buffers_to_other_machines_by_hand():
    sizes = [
        {entry.category: entry.num_bytes for entry in host_memory(request=each, decision=DECISION).entries}
        for each in (tiny_request(), tiny_request(nodes=1, interconnect_bytes_per_second=None))
    ]
    # A part: 64 rows / 4 ranks = 16. To send and to receive, of each rank: two ranks' messages of 16 rows, 16 rows with
    # their sums, and of 1536 / 4 = 384 routers' numbers a quarter, two ranks' gradients and one sum.
    of_each = 2 * (2 * 16 * 40 + 16 * 72 + 3 * 96 * 4)
    assert sizes[0].pop("network_buffers") == 2 * of_each
    assert sizes[0] == sizes[1]
