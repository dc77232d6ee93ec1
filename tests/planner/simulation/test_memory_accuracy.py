"""The simulated step against every measured row of the reference table, as ``benchmarks/memory_accuracy.py`` has it."""

from __future__ import annotations

import csv
import statistics
from collections import Counter

import pytest
from benchmark_modules import load_benchmark

memory_accuracy = load_benchmark("memory_accuracy")


@pytest.fixture(scope="module")
def rows():
    if not memory_accuracy.ROWS.is_file():
        pytest.skip("needs the measured rows in ../shared/reference")
    with memory_accuracy.ROWS.open(encoding="utf-8") as file:
        return memory_accuracy.compare(csv.DictReader(file))


def test_every_row_is_predicted_or_says_why_not(rows) -> None:
    with memory_accuracy.ROWS.open(encoding="utf-8") as file:
        assert Counter(row.row_id for row in rows) == Counter(row["row_id"] for row in csv.DictReader(file))
    assert all((row.predicted_bytes is None) == bool(row.why_not) for row in rows)
    assert sum(row.predicted_bytes is None for row in rows) == 14


def test_accuracy_is_what_the_page_says(rows) -> None:
    summary = memory_accuracy.summary(rows)
    assert summary["max_memory_allocated"]["median"] <= 0.001
    assert summary["max_memory_allocated"]["worst"] <= 0.001
    assert summary["max_memory_reserved"]["median"] <= 0.01
    assert summary["memory_allocated"]["worst"] <= 0.005


def test_rows_judge_what_was_found_elsewhere(rows) -> None:
    """A row in view names a mechanism of its own source; the rest judge, and none of them is more than 3 % under."""
    judged = memory_accuracy.judged_rows(rows)
    in_view = [row for row in rows if row.found_here]
    assert len(judged) + len(in_view) == sum(row.predicted_bytes is not None for row in rows)
    assert {row.source for row in judged} >= {"canifinetune", "gelassal-meft-gpt2", "peft-metamathqa"}
    for row in in_view:
        assert all(row.source.startswith(memory_accuracy.MECHANISMS[name][0]) for name in row.found_here)
    assert statistics.median(abs(row.error_fraction) for row in judged) <= 0.005
    assert max(abs(row.error_fraction) for row in judged) <= 0.03


def test_the_page_lists_every_row(rows) -> None:
    page = memory_accuracy.as_markdown(rows)
    assert all(f"| {row.row_id} |" in page for row in rows)
    assert page.count("not covered:") == 14
