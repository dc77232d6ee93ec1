"""The budget campaign in a reduced form: accepted plans of random small models run within what was predicted."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
from places import ROOT

from meft.planner.records.plan import Plan

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def budget() -> ModuleType:
    spec = importlib.util.spec_from_file_location("campaign_budget", ROOT / "campaigns" / "budget.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_accepted_plans_run(budget: ModuleType) -> None:
    tally = budget.campaign(6, seed=0)
    assert tally.failures == []
    assert tally.counts["passed"] == tally.counts["tried"] == 6
    assert tally.counts["reserved as predicted"] > 0


def test_a_prediction_that_is_too_small_is_noticed(budget: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = budget.planned

    def too_little(request, chosen):
        plan = planned(request, chosen)
        if not isinstance(plan, Plan):
            return plan
        memory = plan.prediction.device_memory.model_copy(update={"allocator_budget_bytes": 1 << 20})
        return plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"device_memory": memory})})

    monkeypatch.setattr(budget, "planned", too_little)
    tally = budget.campaign(1, seed=0)
    assert tally.failures
    assert "out of memory" in str(tally.failures[0]["why"])
