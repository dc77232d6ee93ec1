"""The budget campaign in a reduced form: accepted plans of random small models run within what was predicted."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from places import ROOT

from meft.planner.records.plan import Plan

pytest.importorskip("torch")
pytest.importorskip("transformers")


CAMPAIGNS = ROOT / "campaigns"


@pytest.fixture(scope="module")
def budget() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(CAMPAIGNS))
        patch.delitem(sys.modules, "budget", raising=False)
        yield importlib.import_module("budget")


def test_accepted_plans_run(budget: ModuleType) -> None:
    record = budget.campaign(budget.Record("budget", 0, None), 3)
    assert record.failures == []
    assert record.counts["requests passed"] == record.counts["requests"] == 6
    assert record.counts["plans run and passed"] == record.counts["plans run"] >= 16
    assert record.counts["reserved as predicted"] > 0


def test_a_prediction_that_is_too_small_is_noticed(budget: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = budget.planned

    def too_little(request, chosen):
        plan = planned(request, chosen)
        if not isinstance(plan, Plan):
            return plan
        memory = plan.prediction.device_memory.model_copy(update={"allocator_budget_bytes": 1 << 20})
        return plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"device_memory": memory})})

    monkeypatch.setattr(budget, "planned", too_little)
    record = budget.campaign(budget.Record("budget", 0, None), 1)
    assert record.failures
    assert "out of memory" in str(record.failures[0]["why"])


def test_sessions_of_a_campaign_add_up(budget: ModuleType, tmp_path) -> None:
    """Three trials in two sessions, and one of another seed: the file has the sum, and a fourth begins at the next."""
    path = tmp_path / "result.json"

    def session(seed: int, count: int) -> list[int]:
        record, numbers = budget.Record("budget", seed, path), []
        for number in record.numbers(count):
            numbers.append(number)
            record.counts["tried"] += 1
            if number == 1:
                record.fail(number, "on purpose")
        return numbers

    assert (session(5, 2), session(5, 3), session(6, 1)) == ([0, 1], [2], [0])
    content = json.loads(path.read_text())
    assert content["trials"] == 4
    assert content["counts"] == {"failed": 1, "tried": 4}
    assert content["seeds"]["5"]["failures"] == [{"trial": 1, "why": "on purpose"}]
    assert content["commands"][0] == "python campaigns/budget.py --count 3 --seed 5"


def test_a_campaign_that_a_signal_stops_keeps_what_it_has(budget: ModuleType, tmp_path) -> None:
    record = budget.Record("budget", 0, tmp_path / "result.json")
    for number in record.numbers(10):
        record.counts["tried"] += 1
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    assert json.loads((tmp_path / "result.json").read_text())["trials"] == 4


def test_results_of_another_campaign_are_left_alone(budget: ModuleType, tmp_path) -> None:
    path = tmp_path / "result.json"
    budget.Record("kills", 0, path).save()
    with pytest.raises(SystemExit, match="holds results of kills"):
        budget.Record("budget", 0, path)
