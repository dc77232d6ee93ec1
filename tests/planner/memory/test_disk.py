"""Disk by hand: L = 3 layers, R = 16 rows, D = 8, N = 4 experts. A real checkpoint: tests/runtime/session."""

from __future__ import annotations

import numpy as np
from plan_samples import DECISION, sample_request

from meft.planner.memory.disk import RNG_STATE_BYTES, adapter_file_bytes, disk, optimizer_file_bytes

ROWS = 3 * 16 * 2 * 8 * 4
ROUTERS = 3 * 4 * 8 * 4
USE = 3 * 16 * 4 + 8
"""In how many micro-batches each row was active, and of how many."""


def test_an_adapter_is_its_rows_and_routers() -> None:
    assert disk(sample_request(), DECISION).adapter_bytes == ROWS + ROUTERS + USE


def test_a_checkpoint_adds_moments_counts_and_the_random_state() -> None:
    found = disk(sample_request(), DECISION)
    counts = 3 * 16 * 4 + 3 * 4
    assert found.checkpoint_bytes == 3 * (ROWS + ROUTERS) + USE + counts + RNG_STATE_BYTES
    assert found.most_bytes == 2 * found.checkpoint_bytes


def test_exact_routing_has_no_routers_and_hot_rows_have_an_index() -> None:
    exact = DECISION.model_copy(update={"routing": "exact", "num_experts": 1, "num_probes": 1, "hot_rows": 4})
    found = disk(sample_request(), exact)
    assert found.adapter_bytes == ROWS + USE
    assert found.checkpoint_bytes == 3 * ROWS + USE + 3 * 16 * 4 + 3 * 16 * 2 * 4 + 8 + RNG_STATE_BYTES


def test_the_terms_take_arrays_alike() -> None:
    widths = np.array([16, 32])
    sizes = {"num_layers": 3, "hidden_size": 8, "num_experts": 4, "key_experts": True}
    for term in (adapter_file_bytes, optimizer_file_bytes):
        several = term(adapter_width=widths, **sizes)
        assert several.tolist() == [term(adapter_width=int(width), **sizes) for width in widths]
