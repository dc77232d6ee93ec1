"""What ranks are made of: parts of row lists, shared memory, counts, and who is who."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meft.planner.base.errors import UsageError
from meft.runtime.exchange.shared_window import parts_within
from meft.runtime.ranks.memory import SharedMemory
from meft.runtime.ranks.ordered import Counts
from meft.runtime.ranks.peers import Place

RUNS = st.lists(st.sets(st.integers(0, 30)).map(sorted), max_size=4)


@given(runs=RUNS, limits=st.lists(st.integers(0, 31), min_size=1, max_size=4))
def test_parts_are_the_rows_of_a_range_each_once_and_in_order(runs, limits):
    rows = torch.tensor([row for run in runs for row in run], dtype=torch.int64)
    edges = [0, *sorted(limits), 31]
    for start, stop in pairwise(edges):
        found = [row for part in parts_within(rows, range(start, stop)) for row in rows[part].tolist()]
        assert found == [row for row in rows.tolist() if start <= row < stop]


def test_another_mapping_of_shared_memory_sees_what_the_first_wrote():
    first = SharedMemory.create()
    second = SharedMemory.open(os.getpid(), first.descriptor)
    for shape, dtype in (((3,), torch.bool), ((5, 7), torch.float32), ((1 << 20,), torch.float64)):
        one, other = first.zeros(shape, dtype), second.zeros(shape, dtype)
        assert not other.any()
        one.fill_(1)
        assert other.all()
    assert first.num_bytes == 3 + 5 * 7 * 4 + (8 << 20)
    first.close()
    second.close()


def test_all_have_come_to_a_count_when_the_last_has():
    table = torch.zeros(2, 8, dtype=torch.int64)
    one, other = (Counts(table, rank=rank) for rank in range(2))
    one.publish(3, 1)
    assert (one.of(0, 1), other.of(0, 1), other.of(0)) == (3, 3, 0)
    assert not one.reached(3, 1)
    other.publish(4, 1)
    assert one.reached(3, 1)
    assert not one.reached(4, 1)


def test_a_process_is_a_rank_where_the_launcher_says_so(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Place.here() is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Place.here() == Place(1, 4, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Place.here() == Place(1, 4, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="--nproc-per-node 3: there are 4 ranks in all"):
        Place.here()
