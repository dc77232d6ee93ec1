"""The simulated step and the trace of the real model, which know nothing of each other, agree on allocated peaks.

A sample of the grid of ``benchmarks/memory_grid.py``; the benchmark runs all of it.
"""

from __future__ import annotations

import pytest
from benchmark_modules import load_benchmark

pytest.importorskip("torch")
pytest.importorskip("peft")

memory_grid = load_benchmark("memory_grid")
GRID = list(memory_grid.grid())
SAMPLE = GRID[::19]
"""Nineteen and the twenty-four variants of a model have no factor in common: the sample meets many of both."""


def test_the_grid_is_as_large_as_promised() -> None:
    assert len(GRID) >= 200
    assert len({name for name, _, _ in GRID}) == len(GRID)
    assert len({setup.model.name for _, setup, _ in GRID}) == 16


@pytest.mark.parametrize(("name", "setup", "config"), SAMPLE, ids=[name for name, _, _ in SAMPLE])
def test_allocated_peaks_agree_within_one_percent(name, setup, config) -> None:
    result = memory_grid.compare(name, setup, config)
    assert abs(result.error_fraction) <= 0.01
