"""Routing on the host against what its definition says, written in plain Python."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meft.runtime.host.router import PlannedRouter, Selection, TopKRouter, capped_union


@dataclass(frozen=True)
class Case:
    """Keys, queries and a choice of probes; random numbers, so that no two scores are equal."""

    keys: torch.Tensor
    queries: torch.Tensor
    probes: torch.Tensor
    top_k: int
    num_experts: int
    cap: int


@st.composite
def cases(draw: st.DrawFn, *, least_tokens: int = 1) -> Case:
    num_experts, rows_per_expert = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    num_probes = draw(st.integers(1, num_experts))
    num_rows, num_tokens = num_experts * rows_per_expert, draw(st.integers(least_tokens, 6))
    top_k = draw(st.integers(1, num_probes * rows_per_expert))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    probes = [torch.randperm(num_experts, generator=generator)[:num_probes] for _ in range(num_tokens)]
    return Case(
        keys=torch.randn(num_rows, 3, dtype=torch.float64, generator=generator),
        queries=torch.randn(num_tokens, 3, dtype=torch.float64, generator=generator),
        probes=torch.stack(probes).to(torch.int32) if probes else torch.empty(0, num_probes, dtype=torch.int32),
        top_k=top_k,
        num_experts=num_experts,
        cap=draw(st.integers(top_k, num_rows)),
    )


def by_definition(case: Case, *, with_probes: bool) -> tuple[list[int], int]:
    """Rows and how many were dropped: each token's best, their union, the most activated of it."""
    rows_per_expert = len(case.keys) // case.num_experts
    activation: dict[int, float] = {}
    for token, query in enumerate(case.queries.tolist()):
        allowed = range(len(case.keys))
        if with_probes:
            allowed = [row for row in allowed if row // rows_per_expert in case.probes[token].tolist()]
        keys = case.keys.tolist()
        scores = {row: sum(a * b for a, b in zip(query, keys[row], strict=True)) for row in allowed}
        for row in sorted(allowed, key=lambda row: -scores[row])[: case.top_k]:
            activation[row] = activation.get(row, 0.0) + max(scores[row], 0.0)
    kept = sorted(sorted(activation), key=lambda row: -activation[row])[: case.cap]  # ties: the lower row first
    return sorted(kept), len(activation) - len(kept)


def select(case: Case, *, with_probes: bool) -> Selection:
    router = TopKRouter(case.top_k, case.cap, case.num_experts)
    return router.select(0, case.keys, case.queries, case.probes if with_probes else None)


@pytest.mark.parametrize("with_probes", [False, True])
@given(case=cases())
def test_rows_are_those_of_the_definition(case: Case, with_probes: bool) -> None:
    selection = select(case, with_probes=with_probes)
    rows, dropped = by_definition(case, with_probes=with_probes)
    assert (selection.rows.tolist(), selection.dropped_rows) == (rows, dropped)
    assert selection.rows.dtype == torch.int64
    assert selection.num_rows == len(rows) <= case.cap


@given(case=cases())
def test_probing_every_expert_is_exact_routing(case: Case) -> None:
    everything = torch.arange(case.num_experts, dtype=torch.int32).repeat(len(case.queries), 1)
    router = TopKRouter(case.top_k, case.cap, case.num_experts)
    probed = router.select(0, case.keys, case.queries, everything)
    assert torch.equal(probed.rows, select(case, with_probes=False).rows)


@given(case=cases())
def test_the_order_of_a_tokens_probes_does_not_matter(case: Case) -> None:
    router = TopKRouter(case.top_k, case.cap, case.num_experts)
    turned = router.select(0, case.keys, case.queries, case.probes.flip(1))
    assert torch.equal(turned.rows, select(case, with_probes=True).rows)


@pytest.mark.parametrize("with_probes", [False, True])
@given(case=cases(least_tokens=0))
def test_no_tokens_take_no_rows(case: Case, with_probes: bool) -> None:
    nobody = torch.ones(len(case.queries), dtype=torch.bool).logical_not()  # as when every token is padding
    router = TopKRouter(case.top_k, case.cap, case.num_experts)
    selection = router.select(0, case.keys, case.queries[nobody], case.probes[nobody] if with_probes else None)
    assert (selection.rows.tolist(), selection.rows.dtype, selection.dropped_rows) == ([], torch.int64, 0)


def test_by_hand() -> None:
    # Scores of the tokens (1, 0) and (0, 1) are the keys' columns: the first takes rows 2 and 0, the second 1 and 3.
    keys = torch.tensor([[3.0, -9.0], [-8.0, 5.0], [4.0, -7.0], [2.0, 1.0]])
    queries = torch.eye(2)
    assert TopKRouter(2, 4, 1).select(0, keys, queries, None).rows.tolist() == [0, 1, 2, 3]
    # Summed activations: row 0: 3, row 1: 5, row 2: 4, row 3: 1; three may stay.
    capped = TopKRouter(2, 3, 1).select(0, keys, queries, None)
    assert (capped.rows.tolist(), capped.dropped_rows) == ([0, 1, 2], 1)
    # Experts of two rows, one probe each: the first token sees rows 2 and 3 only, the second rows 0 and 1.
    probes = torch.tensor([[1], [0]], dtype=torch.int32)
    assert TopKRouter(1, 4, 2).select(0, keys, queries, probes).rows.tolist() == [1, 2]


def test_queries_in_the_devices_dtype_are_scored_in_that_of_the_keys() -> None:
    # In bf16 1.001 would round to 1, and row 0, the lower one, could win the tie; row 1 scores higher in fp32.
    keys = torch.tensor([[1.0], [1.001]])
    selection = TopKRouter(1, 2, 1).select(0, keys, torch.ones(1, 1, dtype=torch.bfloat16), None)
    assert selection.rows.tolist() == [1]


# --- the cap ---------------------------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.lists(st.integers(0, 7), min_size=2, max_size=2, unique=True), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
    cap=st.integers(1, 8),
)
def test_the_cap_keeps_the_most_activated_and_of_equals_the_lower(rows: list[list[int]], seed: int, cap: int) -> None:
    # Scores are small whole numbers, negative ones too: sums are exact and ties are common.
    scores = torch.randint(-2, 3, (len(rows), 2), generator=torch.Generator().manual_seed(seed)).double()
    activation: dict[int, float] = {}
    for token, token_scores in zip(rows, scores.tolist(), strict=True):
        for row, score in zip(token, token_scores, strict=True):
            activation[row] = activation.get(row, 0.0) + max(score, 0.0)
    kept = sorted(sorted(activation), key=lambda row: -activation[row])[:cap]
    selection = capped_union(torch.tensor(rows), scores, num_rows=8, cap=cap)
    assert selection.rows.tolist() == sorted(kept)
    assert selection.dropped_rows == len(activation) - len(kept)


def test_of_many_equal_rows_the_lowest_stay() -> None:
    # An unstable sort keeps the order of few equal elements by chance, of thousands not.
    selection = capped_union(torch.arange(5000).flip(0)[None], torch.ones(1, 5000), num_rows=5000, cap=100)
    assert selection.rows.tolist() == list(range(100))


def test_negative_scores_do_not_weigh_against_a_row() -> None:
    # Row 0: 2 + max(-9, 0) = 2; row 1: 1 + 0.5 = 1.5. Summed as they are, row 0 would have -7 and lose.
    rows, scores = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[2.0, 1.0], [-9.0, 0.5]])
    selection = capped_union(rows, scores, num_rows=2, cap=1)
    assert (selection.rows.tolist(), selection.dropped_rows) == ([0], 1)


def test_under_the_cap_even_a_row_without_activation_stays() -> None:
    selection = capped_union(torch.tensor([[3, 1]]), torch.tensor([[-1.0, -2.0]]), num_rows=4, cap=2)
    assert (selection.rows.tolist(), selection.dropped_rows) == ([1, 3], 0)


def test_a_rehearsal_takes_as_many_rows_as_planned() -> None:
    router = PlannedRouter((3, 0))
    nothing = torch.empty(0, 2)
    assert router.select(0, nothing, nothing, None).rows.tolist() == [0, 1, 2]
    assert router.select(1, nothing, nothing, None).num_rows == 0
