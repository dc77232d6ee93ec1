"""What ``estimate`` and ``compare`` print, at any width."""

from __future__ import annotations

import re

import pytest
from plan_samples import MIB, sample_plan

from meft.planner.base.units import format_bytes
from meft.planner.predict.comparison import MethodComparison, MethodRow
from meft.planner.predict.estimates import Estimate, estimate_meft, reserved_at_most
from meft.planner.render.methods import comparison_view, estimate_view
from meft.planner.render.tables import show


@pytest.fixture(scope="module")
def estimate() -> Estimate:
    plan = sample_plan()
    return estimate_meft(plan.request, plan.decision, plan.prediction)


def comparison(estimate: Estimate) -> MethodComparison:
    large = estimate.model_copy(
        update={
            "size": 1536,
            "peak_reserved_bytes": 20929 * MIB,
            "host_bytes": 24832 * MIB,
            "h2d_bytes_per_step": 500 * MIB,
            "d2h_bytes_per_step": 507 * MIB,
            "step_seconds": 0.4995,
        }
    )
    on = large.model_copy(update={"activation_checkpointing": True, "peak_reserved_bytes": 19000 * MIB, "fits": False})
    rows = [
        MethodRow(
            method=method,
            usual=large,
            usual_because="a recipe",
            usual_configurations=(large, on),
            largest=None,
            largest_because="no size fits the budget",
        )
        for method in ("parallel-adapter", "full")
    ]
    return MethodComparison(request=sample_plan().request, rows=tuple(rows), notes=("a note",))


def shown(capsys: pytest.CaptureFixture[str], view: object) -> str:
    show(view)  # type: ignore[arg-type]
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 200])
def test_a_comparison_keeps_size_memory_and_verdict_at_any_width(
    estimate: Estimate, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(capsys, comparison_view(comparison(estimate)))
    assert max(map(len, text.splitlines())) <= columns
    assert text.count("1,536") == 4
    assert "1,5\n" not in text
    assert text.count("20.44 GiB") == text.count("18.55 GiB") == 2
    if columns >= 60:
        assert len(re.findall(r"method .* fits$", text, re.MULTILINE)) == 2
        assert len(re.findall(r"1,536 .*20.44 GiB.* yes$", text, re.MULTILINE)) == 2
        assert len(re.findall(r"1,536 .*18.55 GiB.* no$", text, re.MULTILINE)) == 2
    assert ("1,007 MiB" in text) == (columns >= 100 or columns == 40)  # the first to go; stacked rows tell all
    assert ("too narrow for: traffic" in text) == (columns in (60, 80))


def test_a_comparison_shows_each_configuration_under_its_method(
    estimate: Estimate, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, comparison_view(comparison(estimate)))
    assert re.search(r"\n  full +1,536  off .* yes\n +1,536  on .* no\n", text)
    assert "At the usual size: alike at every budget" in text
    assert "At the largest size that fits 4.0 MiB on emulated" in text


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 200])
def test_an_estimate_cuts_nothing(
    estimate: Estimate, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(capsys, estimate_view(estimate, notes=["a note"]))
    assert max(map(len, text.splitlines())) <= columns
    whole = " ".join(text.split())
    for entry in estimate.entries:
        if entry.phase in ("resident", estimate.peak_phase):
            assert entry.category in text
            assert format_bytes(entry.num_bytes) in whole
    assert format_bytes(estimate.peak_allocated_bytes) in whole


def test_the_verdict_says_what_is_left_or_missing(estimate: Estimate, capsys: pytest.CaptureFixture[str]) -> None:
    needed, budget = reserved_at_most(estimate), estimate.allocator_budget_bytes
    text = shown(capsys, estimate_view(estimate, notes=[]))
    assert f"yes: {format_bytes(needed)}, {format_bytes(budget - needed)} below {format_bytes(budget)}" in text
    short = estimate.model_copy(
        update={"fits": False, "allocator_budget_bytes": needed - 1, "host_budget_bytes": estimate.host_bytes - 2}
    )
    text = " ".join(shown(capsys, estimate_view(short, notes=[])).split())
    assert f"no: {format_bytes(needed)}, 1 B above {format_bytes(needed - 1)} for the allocator; " in text
    assert f"{format_bytes(estimate.host_bytes)} of host memory, 2 B above" in text


def test_what_was_chosen_is_said(estimate: Estimate, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = estimate.model_copy(update={"chosen": ("checkpointing: on, chosen as compare does: without it 9 GiB",)})
    assert "Left open\n  checkpointing: on, chosen as compare does" in shown(capsys, estimate_view(chosen, notes=[]))
    assert "Left open" not in shown(capsys, estimate_view(estimate, notes=[]))
