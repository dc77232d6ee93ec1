"""The adapter in chunks of tokens against the oracle, and against the whole adapter where both are one function."""

from __future__ import annotations

import pytest
import torch
from oracle_step import EXACT, assert_step_equals_the_oracle
from sparse_setup import decision, run_step, sparse_setup

ROUTINGS = {"exact": {}, "experts": {"routing": "key-experts", "num_experts": 4, "num_probes": 2}}
FEW: dict[str, object] = {"top_k": 2, "rows_in_backward": "refetched"}


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
@pytest.mark.parametrize("see", ["union", "own"])
@pytest.mark.parametrize(("depth", "chunks"), [(0, 2), (0, 5), (1, 3), (1, 7), (2, 4)])
def test_each_chunk_uses_the_rows_of_its_own_tokens(routing, see, depth, chunks) -> None:
    """Seven tokens: chunks that do not divide them, and some of a single token, or of none."""
    chosen = decision(**FEW, **routing, tokens_see=see, prefetch_depth=depth, token_chunks=chunks)
    assert_step_equals_the_oracle(sparse_setup(chosen), num_tokens=7)


def step_of(chosen) -> tuple[torch.Tensor, ...]:
    setup = sparse_setup(chosen)
    torch.manual_seed(1)
    hidden = torch.randn(6, 8, dtype=torch.float64).requires_grad_()
    output, of_input = run_step(setup, hidden, torch.randn(6, 8, dtype=torch.float64))
    assert of_input is not None
    return (output, of_input, *(tables.gradients for tables in setup.store.layers))


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_where_tokens_see_their_own_rows_chunks_change_nothing(routing) -> None:
    """Chunks are chosen exactly at every depth, as a whole micro-batch is without look-ahead."""
    own = FEW | routing | {"tokens_see": "own"}
    whole, chunked = step_of(decision(**own)), step_of(decision(**own, token_chunks=3, prefetch_depth=1))
    for mine, theirs in zip(chunked, whole, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_where_they_see_the_union_it_is_the_chunks() -> None:
    whole, chunked = step_of(decision(**FEW)), step_of(decision(**FEW, token_chunks=3))
    assert not torch.allclose(whole[0], chunked[0], rtol=1e-3, atol=1e-3)


def test_a_rows_neighbours_say_where_it_comes_from() -> None:
    """By hand: three chunks of two tokens, rows in common stay and the others travel."""
    setup = sparse_setup(decision(**FEW, token_chunks=3), num_layers=1)
    torch.manual_seed(1)
    run_step(setup, torch.randn(6, 8, dtype=torch.float64).requires_grad_(), torch.randn(6, 8, dtype=torch.float64))
    first, second, third = (set(rows.tolist()) for rows in setup.exchange.unit_rows())
    counters = setup.exchange.counters
    assert counters.active_rows == [len(first) + len(second) + len(third)]
    assert counters.missing_rows == [len(first) + len(second - first) + len(third - second)]
    assert counters.overflow_rows == [len(first - second)]  # the last two are still in the ring
    crossed = {name: size for (_, name, _), size in setup.engine.counted_bytes.items()}
    row_bytes = 2 * 8 * 8
    assert crossed["rows"] == counters.missing_rows[0] * row_bytes
    assert crossed["rows_refetched"] == counters.overflow_rows[0] * row_bytes
    assert crossed["row_gradients"] == counters.active_rows[0] * row_bytes
    assert crossed["row_positions"] == 4 * (counters.active_rows[0] - counters.missing_rows[0])
