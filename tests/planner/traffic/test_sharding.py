"""A sharded base: what a card has, what it gathers, and how many bytes that is."""

from __future__ import annotations

import pytest
from planner_records import decision_of, request_of, tiny_shape

from meft.planner.traffic.sharding import (
    gathered_bytes_of,
    gathered_layer_bytes,
    layer_shard_bytes,
    matrices_bytes,
    received_bytes,
)


def test_the_bytes_of_a_small_case_by_hand() -> None:
    """Two layers of D = 4, I = 7, one head of 4, bf16, on N = 2 cards.

    A layer's matrices are query, key, value and output [4, 4], gate and up [7, 4], down [4, 7]. A card has half of
    their rows, of 7 rows 4, one of them padding on the second card:

    - query, key, value, output: 4 x (2 rows x 4 numbers x 2 bytes) = 64 bytes
    - gate, up: 2 x (4 x 4 x 2) = 64
    - down: 2 x 7 x 2 = 28

    together 156. A gathered layer is W = 2 x 156 = 312 bytes, 16 more than the 296 of the matrices, and gathering it
    brings the other card's 156. In a micro-batch both layers are gathered for forward, with checkpointing both again
    for backward, without it the second alone: 4 x 156 = 624, or 3 x 156 = 468 bytes to each card, and as many from it.
    """
    shape = tiny_shape(num_layers=2, hidden_size=4, intermediate_size=7, num_heads=1, num_kv_heads=1, head_dim=4)
    assert layer_shard_bytes(shape, dtype="bf16", shards=2) == 156
    assert gathered_layer_bytes(shape, dtype="bf16", shards=2) == 312
    assert matrices_bytes(shape, dtype="bf16") == 2 * 296
    given = {"dtype": "bf16", "shards": 2}
    assert received_bytes(shape, activation_checkpointing=True, **given) == 624
    assert received_bytes(shape, activation_checkpointing=False, **given) == 468
    request = request_of(model=shape, gpus=2, shard_base=True)
    assert gathered_bytes_of(request, decision_of(activation_checkpointing=True)) == 624
    assert gathered_bytes_of(request_of(model=shape, gpus=2), decision_of(activation_checkpointing=True)) == 0


def test_packed_weights_are_a_column_of_bytes() -> None:
    """Of 16 numbers 8 bytes, of 28 numbers 14: 3 cards have 3 and 5 of them."""
    shape = tiny_shape(num_layers=1, hidden_size=4, intermediate_size=7, num_heads=1, num_kv_heads=1, head_dim=4)
    assert layer_shard_bytes(shape, dtype="nf4", shards=3) == 4 * 3 + 3 * 5
    assert gathered_layer_bytes(shape, dtype="nf4", shards=3) == 3 * 27
    assert matrices_bytes(shape, dtype="nf4") == 4 * 8 + 3 * 14


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "nf4"])
def test_parts_are_the_whole_but_for_padding(dtype) -> None:
    shape = tiny_shape()
    whole, layers = matrices_bytes(shape, dtype=dtype), shape.num_layers
    for shards in (2, 3, 4, 8):
        parts = layers * gathered_layer_bytes(shape, dtype=dtype, shards=shards)
        assert whole <= parts <= 2 * whole
    assert gathered_layer_bytes(shape, dtype=dtype, shards=1) == 0
