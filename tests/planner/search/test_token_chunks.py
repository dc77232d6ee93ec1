"""Token chunks are planned where they are asked for or nothing fits without; what they do not go with is said."""

from __future__ import annotations

import pytest
from plan_samples import sample_profiles, sample_request

from meft.planner.base.errors import Infeasible, UsageError
from meft.planner.predict.prediction import predict
from meft.planner.records.plan import Plan
from meft.planner.search import chunked, search
from meft.planner.search.fitting import Fitting
from meft.planner.search.search import check_request, make_plan
from meft.planner.traffic.chunks import ChunkRows, summed

LONG: dict[str, object] = {"batch_size": 1, "seq_len": 64, "adapter_width": 64, "top_k": 4, "max_slowdown": 1e3}


def planned(**changes: object) -> Plan:
    found = make_plan(sample_request(**LONG | changes), sample_profiles(), meft_version="test")
    assert isinstance(found, Plan), found
    return found


def test_chunks_that_are_asked_for_bound_the_rows_on_the_device() -> None:
    whole, chunked = planned(), planned(token_chunks=4)
    assert (whole.decision.token_chunks, chunked.decision.token_chunks) == (1, 4)
    sparsity = chunked.prediction.sparsity
    assert max(sparsity.active_rows_per_layer) <= 4 * chunked.decision.active_rows_cap
    assert sum(sparsity.missing_rows_per_layer) < sum(sparsity.active_rows_per_layer)  # neighbours share some
    assert sparsity.prefetch_recall == 1.0
    again = predict(chunked.request, chunked.decision, sample_profiles(), sparsity.active_rows_per_layer)
    assert again.transfer == chunked.prediction.transfer


@pytest.mark.parametrize(
    ("depth", "again"),
    # four chunks in each of two layers, A = 10, M = 4: the last two of all eight are in the ring (three with p = 2)
    [(0, [10 + 3 * 6, 2 * 6]), (1, [10 + 3 * 6, 2 * 6]), (2, [10 + 3 * 6, 2 * 6])],
)
def test_sums_over_chunks_by_hand(depth, again) -> None:
    import numpy as np

    rows = ChunkRows(np.array([10, 10]), np.array([4, 4]))
    active, missing, refetched = summed(rows, token_chunks=4, prefetch_depth=depth)
    assert active.tolist() == [40, 40]
    assert missing.tolist() == [10 + 3 * 6] * 2
    assert refetched.tolist() == again  # with two layers p is at most 1


REFUSED = [
    ({"token_chunks": 3}, "token_chunks 3: the 64 tokens of a micro-batch .* do not divide into as many; give 2, say"),
    ({"token_chunks": 4, "hot_rows": 8}, "hot_rows 8 beside token_chunks 4: give one of them"),
    ({"token_chunks": 4, "rows_in_backward": "retained"}, "rows_in_backward retained beside token_chunks 4"),
    ({"token_chunks": 4, "gpus": 2, "grad_accum": 4}, "token_chunks 4: several devices do not take them yet"),
]


@pytest.mark.parametrize(("asked", "said"), REFUSED)
def test_what_they_do_not_go_with_is_said(asked, said) -> None:
    with pytest.raises(UsageError, match=said):
        check_request(sample_request(**LONG | asked))


def test_where_nothing_fits_without_they_are_tried(monkeypatch) -> None:
    """The request says nothing of chunks; ``--token-chunks 1`` forbids them."""
    monkeypatch.setattr(chunked, "LEAST_CHUNK_TOKENS", 8)
    monkeypatch.setattr(search, "_fitting", lambda *_: Fitting())
    nothing = Infeasible("device memory", needed=2, limit=1, message="nothing fits")
    monkeypatch.setattr(search, "_infeasible", lambda *_, **__: nothing)
    found = planned()
    assert found.request.token_chunks is None
    assert found.decision.token_chunks in (2, 4, 8)
    best = [planned(token_chunks=chunks) for chunks in (2, 4, 8)]
    assert found.decision == min(best, key=lambda plan: plan.prediction.timing.step_seconds).decision
    forbidden = make_plan(sample_request(**LONG, token_chunks=1), sample_profiles(), meft_version="test")
    assert forbidden is nothing
