"""Bytes and memory of machines that own rows, by hand; what the runtime counts is held against these in
tests/runtime/ranks."""

from __future__ import annotations

import pytest
from planner_records import decision_of, request_of, tiny_shape
from pydantic import ValidationError

from meft.planner.memory.host import host_memory
from meft.planner.traffic.network import NetworkUse, expected_use, network_bytes

EXPERTS = {"adapter_width": 64, "top_k": 4, "active_rows_cap": 20, "num_experts": 16, "num_probes": 4}
OWNED = decision_of(routing="key-experts", rows="owned", prefetch_depth=1, rows_in_backward="refetched", **EXPERTS)
REPLICATED = OWNED.model_copy(update={"rows": "replicated"})


def tiny_request(**changes: object):
    """L = 3, D = 8, T = 10, bf16; two machines with two cards each, two rounds in a window."""
    several = {"gpus": 2, "nodes": 2, "interconnect_bytes_per_second": 1e9, "grad_accum": 8, "rows": "owned"}
    return request_of(**({"model": tiny_shape(), "batch_size": 2, "seq_len": 5} | several | changes))


def test_bytes_between_owners_by_hand():
    use = NetworkUse(rounds=2, windows=1, foreign_rows=10, summed_rows=0, steps=7, asked_rows=11, scored_pairs=13)
    found = network_bytes(tiny_request(), OWNED, use)
    # A count of each of 4 ranks to its mate, of 2 rounds, is 64 bytes. A token: 8 * 2 + 4 * 4 = 32 bytes; a pair: fp32
    # scores of 4 rows; a row: 8 + 16 * 2 = 40. Rows of 3 layers are asked for, and with p = 1 those of layer 0 again.
    assert found["queries", "step"] == 3 * (64 + 7 * 10 * 32)
    assert found["scores", "step"] == 13 * 16
    assert found["rows", "step"] == (3 + 1) * 64 + 11 * 40
    assert found["row_squares", "optimizer_step"] == 3 * 64 * 8
    assert found["router_means", "optimizer_step"] == 0
    replicated = network_bytes(tiny_request(), REPLICATED, use)
    assert "row_sums" not in {name for name, _ in found}
    same = {(name, "step") for name in ("row_gradients", "router_gradients", "rounds")}
    same |= {("router_sums", "optimizer_step")}
    assert {key: found[key] for key in same} == {key: replicated[key] for key in same}


def test_centroids_send_their_means_once_a_window():
    centroids = decision_of(routing="centroid", rows="owned", **EXPERTS)
    use = NetworkUse(rounds=2, windows=3, foreign_rows=0, summed_rows=0)
    # Each of 2 ranks on 2 machines sends 8 experts' means, 8 * 8 * 4 bytes, of 3 layers in 3 windows.
    assert network_bytes(tiny_request(), centroids, use)["router_means", "optimizer_step"] == 4 * 256 * 3 * 3


def test_what_is_expected_of_a_window():
    found = expected_use(tiny_request(), OWNED, gradient_rows=30, kept_rows=0, window_rows=99, fetched_rows=40)
    # Half of 8 micro-batches' rows, and of 8 * 3 * 10 * 4 pairs.
    assert found == NetworkUse(
        rounds=2, windows=1, foreign_rows=120, summed_rows=0, steps=8, asked_rows=160, scored_pairs=480
    )


def test_each_of_two_machines_has_half_the_tables():
    sizes = [
        {entry.category: entry.num_bytes for entry in host_memory(request=tiny_request(), decision=each).entries}
        for each in (REPLICATED, OWNED)
    ]
    for name in ("adapter_weights", "adapter_moments", "adapter_gradients", "step_counts", "touched_flags"):
        assert sizes[1][name] * 2 == sizes[0][name]
    assert sizes[1]["row_squares"] == sizes[0]["row_squares"]
    # Of each rank: squares for sums, 16 rows each way; hidden states and probes of 10 tokens each way; scores of 40
    # pairs to send and to receive; numbers and rows, 20 to ask for and 20 to answer.
    more = -2 * 16 * (72 - 8) + 2 * 10 * 32 + 2 * 40 * 16 + (20 + 20) * 40
    assert sizes[1]["network_buffers"] - sizes[0]["network_buffers"] == 2 * more


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"routing": "exact", "num_experts": 1, "num_probes": 1}, "routing exact scores all in one product"),
        ({"hot_rows": 8}, "hot_rows 8 beside rows owned by machines"),
        ({"gather_chunks": 2, "prefetch_depth": 0}, "gather_chunks 2 beside rows owned by machines"),
    ],
)
def test_what_does_not_go_with_owners_is_no_decision(choice, message):
    with pytest.raises(ValidationError, match=message):
        decision_of(**({"routing": "key-experts", "rows": "owned"} | EXPERTS | choice))


def test_one_machine_owns_nothing_apart():
    with pytest.raises(ValidationError, match="rows owned are divided among machines, and nodes is 1"):
        tiny_request(nodes=1, interconnect_bytes_per_second=None)
    alone = request_of(model=tiny_shape(), batch_size=2, seq_len=5)
    of_one = [host_memory(request=alone, decision=each) for each in (REPLICATED, OWNED)]
    assert of_one[0] == of_one[1]
