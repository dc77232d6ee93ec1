"""Batches of varying lengths: the shapes that data loaders make, and what a run on them amounts to."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from meft.planner.models.catalogue import load_model
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.run import simulate
from meft.planner.simulation.stream import stream_peaks
from meft.planner.terms.lengths import BatchShape, batch_shapes, distributed_lengths

SETUP = TrainingSetup(
    model=load_model("smollm2-135m")[0],
    method="lora",
    rank=8,
    target_modules=("q_proj", "v_proj"),
    weights_dtype="bf16",
    batch_size=2,
    seq_len=256,
)


def test_lengths_have_the_mean_and_the_deviation() -> None:
    lengths = distributed_lengths(300, 120, most=1 << 20, count=20_000)
    assert np.mean(lengths) == pytest.approx(300, rel=0.01)
    assert np.std(lengths) == pytest.approx(120, rel=0.03)
    assert max(distributed_lengths(300, 120, most=350, count=1000)) == 350
    assert set(distributed_lengths(300, 0, most=1000, count=10)) == {300}


def shapes(lengths: list[int], batching: str, count: int, **options: int) -> list[BatchShape]:
    given = {"batch_size": 2, "most": 100} | options
    shuffled = np.random.default_rng(given.pop("seed", 0)).permutation
    return list(islice(batch_shapes(lengths, batching=batching, shuffled=shuffled, **given), count))  # type: ignore[arg-type]


def test_a_padded_batch_is_as_long_as_its_longest_sequence() -> None:
    """Of 10, 20 and 300, cut to 100, two make a batch and one is left over: any two but (10, 20) are 100 long."""
    found = shapes([10, 20, 300], "padded", 30)
    assert {(each.batch_size, each.seq_len) for each in found} == {(2, 20), (2, 100)}
    assert all(each.padded for each in found)
    assert shapes([50, 50], "padded", 1) == [BatchShape(2, 50, padded=False)]


def test_packed_rows_are_full_and_padding_free_ones_have_every_token() -> None:
    """Eight sequences of 50 tokens are four rows of 100, so two batches; of any two the tokens are 100."""
    assert shapes([50] * 8, "packed", 3) == [BatchShape(2, 100)] * 3
    assert shapes([50] * 8, "padding-free", 3) == [BatchShape(1, 100)] * 3


def test_sorted_is_the_order_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """``get_length_grouped_indices``, given the same permutation."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = [int(each) for each in np.random.default_rng(3).integers(1, 90, 64)]
    order = np.random.default_rng(7).permutation(64)
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.tensor(order))
    indices = get_length_grouped_indices(lengths, 2)
    expected = [max(lengths[index] for index in indices[start : start + 2]) for start in range(0, 64, 2)]
    assert [each.seq_len for each in shapes(lengths, "sorted", 32, seed=7)] == expected


def test_batches_of_one_shape_are_the_run_that_there_was() -> None:
    one = BatchShape(SETUP.batch_size, SETUP.seq_len)
    assert simulate(SETUP, shapes=[one, one]).events == simulate(SETUP).events
    accumulated = SETUP.model_copy(update={"grad_accum": 2})
    moments = simulate(accumulated, shapes=[one] * 4).moments
    assert "optimizer_step_2" in moments
    assert "optimizer_step_3" not in moments


def test_varying_lengths_reserve_more_than_the_longest_alone_and_allocate_no_more() -> None:
    lengths = distributed_lengths(150, 60, most=256, count=500)
    varying = [*shapes(list(lengths), "padded", 15, most=256), BatchShape(2, 256, padded=True)]
    padded = SETUP.model_copy(update={"padded": True})
    found, fixed = stream_peaks(simulate(padded, shapes=varying)), stream_peaks(simulate(padded))
    assert found.allocated_bytes == pytest.approx(fixed.allocated_bytes, rel=0.01)
    assert found.reserved_bytes > fixed.reserved_bytes
