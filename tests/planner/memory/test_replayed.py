"""A run's windows replayed until they change nothing: as often as it takes, and no further than it takes."""

from __future__ import annotations

from typing import Any

import pytest
from planner_records import decision_of, request_of

from meft.planner.allocator.caching import CachingAllocator
from meft.planner.memory import replayed
from meft.planner.memory.replayed import peaks_of
from meft.planner.sparse.step import SparseStream, simulate_sparse

CACHED = {"cached_rows": 512, "gradients_on_device": True}


def stream_of(workload: dict[str, Any], decision: dict[str, Any]) -> SparseStream:
    """The stream of two micro-batches a window."""
    request = request_of(grad_accum=2, **workload)
    return simulate_sparse(request, decision_of(**decision), workspace_bytes=8 << 20, emulated=False)


def whole_peaks(stream: SparseStream, times: int) -> tuple[int, int]:
    """Every window replayed to its end, several times."""
    allocator, handles = CachingAllocator(None), {}
    replayed._play(stream.once, allocator, handles)
    for window in stream.windows:
        for _ in range(times):
            replayed._play(window, allocator, handles)
    return allocator.peak_allocated_bytes, allocator.peak_reserved_bytes


@pytest.mark.parametrize("workload", [{}, {"batch_size": 3}, {"weights_dtype": "nf4"}, {"adapter_dtype": "fp32"}])
@pytest.mark.parametrize("decision", [{}, CACHED, {"hot_rows": 256}, {"activation_checkpointing": True}])
def test_peaks_are_those_of_windows_replayed_to_their_end(workload, decision) -> None:
    stream = stream_of(workload, decision)
    peaks = peaks_of(stream)
    assert (peaks.allocated_bytes, peaks.reserved_bytes) == whole_peaks(stream, 6)


def test_a_window_that_goes_as_the_last_one_did_ends_in_its_middle(monkeypatch) -> None:
    stream, played = stream_of({}, {}), []
    real = replayed._play
    monkeypatch.setattr(replayed, "_play", lambda events, *given: played.append(len(events)) or real(events, *given))
    peaks_of(stream)
    assert sum(played) == len(stream.once) + len(stream.windows[0]) // 2
