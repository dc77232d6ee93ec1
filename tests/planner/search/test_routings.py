"""Routings that are asked for: what each takes, by the plan, by hand, and by ``estimate``; what is refused."""

from __future__ import annotations

import json

import pytest

from meft.planner.base.errors import UsageError
from meft.planner.front.calls import estimate, plan
from meft.planner.records.plan import Decision, Plan
from meft.planner.records.routing import StableOptions, SwitchOptions

ASKED = {"gpu": "rtx-3090", "model": "llama-3.2-1b", "host_mem": "32GB", "top_k": 32, "adapter_width": 2048}
BY_EXPERTS = ("key-experts", "centroid", "switch", "stable")


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {routing: plan(**ASKED, routing=routing) for routing in BY_EXPERTS}


def _categories(found: Plan) -> tuple[set[str], set[str], set[str]]:
    predicted = found.prediction
    device, host, link = predicted.device_memory.entries, predicted.host_memory.entries, predicted.transfer.entries
    return {each.category for each in device}, {each.category for each in host}, {each.category for each in link}


def test_centroids_have_a_router_on_the_host_alone(plans) -> None:
    found, shape = plans["centroid"], plans["centroid"].request.model
    device, _, link = _categories(found)
    assert not {"router_weights", "router_gradients", "router_moments", "routing"} & device
    assert not {"probes", "row_experts", "router_norm"} & link
    means = next(each for each in found.prediction.host_memory.entries if each.category == "router_means")
    assert means.num_bytes == shape.num_layers * found.decision.num_experts * shape.hidden_size * 4
    assert found.prediction.trainable_parameters == shape.num_layers * shape.hidden_size * 2 * 2048
    assert found.decision.num_experts > 1


def test_a_switch_has_one_on_the_device_and_sends_one_expert_a_token(plans) -> None:
    found = plans["switch"]
    device, host, link = _categories(found)
    assert {"router_weights", "router_gradients", "router_moments", "routing"} <= device
    assert {"probes", "row_experts", "router_norm"} <= link
    assert "router_means" not in host
    probes = next(each for each in found.prediction.transfer.entries if each.category == "probes")
    assert probes.num_bytes == found.request.model.num_layers * found.request.tokens_per_step * 4
    assert found.decision.switch == SwitchOptions()


def test_stable_has_two_on_the_device_and_what_they_take_is_the_first_stages(plans) -> None:
    found = plans["stable"]
    device, host, link = _categories(found)
    assert {"router_weights", "router_gradients", "router_moments", "routing"} <= device
    assert {"probes", "row_experts", "router_norm"} <= link
    assert "router_means" not in host
    shape, decision = found.request.model, found.decision
    one = shape.num_layers * decision.num_experts * shape.hidden_size
    sizes = {each.category: each.num_bytes for each in found.prediction.device_memory.entries}
    assert sizes["router_weights"] == sizes["router_gradients"] == 2 * one * 4
    assert sizes["router_moments"] == 4 * one * 4
    assert found.prediction.trainable_parameters == shape.num_layers * shape.hidden_size * 2 * 2048 + 2 * one
    assert decision.stable == StableOptions()
    assert found.prediction.timing.busy_seconds["gpu"] > plans["switch"].prediction.timing.busy_seconds["gpu"] * 0.9


def test_files_say_it_where_it_is_said_alone(plans) -> None:
    for routing, found in plans.items():
        content = json.loads(found.to_json())
        for name in ("switch", "stable"):
            assert (name in content["decision"]) == (routing == name)
            assert name not in content["request"]
        assert Plan.from_json(found.to_json(), source="test") == found
    asked = plan(**ASKED, routing="switch", capacity_factor=2.0)
    assert json.loads(asked.to_json())["request"]["switch"]["capacity_factor"] == 2.0
    assert asked.decision.switch == SwitchOptions(capacity_factor=2.0)


def test_estimate_knows_them() -> None:
    sizes = {name: value for name, value in ASKED.items() if name != "host_mem"}
    found = {routing: estimate("meft", **sizes, routing=routing) for routing in BY_EXPERTS}
    assert all(each.decision is not None and each.decision.routing == routing for routing, each in found.items())
    assert found["centroid"].resident_bytes < found["key-experts"].resident_bytes
    assert found["stable"].resident_bytes > found["switch"].resident_bytes
    own = estimate("meft", **sizes, routing="switch", balance_loss=0.5)
    assert own.decision is not None
    assert own.decision.switch == SwitchOptions(balance_loss=0.5)


def test_what_does_not_go_together_is_refused(plans) -> None:
    with pytest.raises(UsageError, match="router_jitter: is of routing switch alone"):
        plan(**ASKED, routing="exact", router_jitter=0.1)
    with pytest.raises(UsageError, match="balance_loss: is of routing switch and stable; add routing switch or"):
        plan(**ASKED, balance_loss=0.1)
    with pytest.raises(UsageError, match="first_stage: is of routing stable alone; add routing stable"):
        plan(**ASKED, routing="switch", first_stage=0.1)
    with pytest.raises(UsageError, match="capacity_factor"):
        plan(**ASKED, routing="switch", capacity_factor=0.0)
    for routing, changes, says in (
        ("switch", {"num_probes": 2}, "sends a token to one expert: num_probes must be 1"),
        ("switch", {"switch": None}, "switch options are of routing switch"),
        ("key-experts", {"switch": SwitchOptions()}, "switch options are of routing switch"),
        ("stable", {"stable": None}, "stable options are of routing stable, which has them always"),
        ("switch", {"stable": StableOptions()}, "stable options are of routing stable alone; routing is switch"),
        ("stable", {"num_probes": 2}, "sends a token to one expert: num_probes must be 1"),
        ("centroid", {"routing": "exact"}, "scores every row"),
    ):
        with pytest.raises(ValueError, match=says):
            Decision.model_validate(plans[routing].decision.model_dump() | changes)
