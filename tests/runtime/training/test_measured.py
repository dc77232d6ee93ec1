"""What a process keeps of its steps says as much as the list of them."""

from __future__ import annotations

import math
import statistics

from hypothesis import given
from hypothesis import strategies as st

from meft.runtime.training.measured import Histograms, Totals
from meft.runtime.training.reporting import active_rows

STEPS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5)), min_size=1, max_size=250)


@given(STEPS)
def test_histograms_give_the_figures_of_the_whole_list(steps) -> None:
    seen, totals = Histograms(), Totals()
    for counts in steps:
        seen.add(counts)
        totals.add(counts)
    for layer, counts in zip(active_rows(seen.layers), zip(*steps, strict=True), strict=True):
        assert layer.mean == statistics.fmean(counts)
        assert layer.median == statistics.median(counts)
        assert layer.p99 == sorted(counts)[math.ceil(0.99 * len(counts)) - 1]
        assert (layer.max, layer.total) == (max(counts), sum(counts))
        assert totals.layers[layer.layer] == sum(counts)
