"""Plans for machines that own rows: what is searched for, and where it is proposed."""

from __future__ import annotations

import pytest

from meft import plan
from meft.planner.base.errors import InfeasibleError, UsageError
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.predict.scaling import scaling
from meft.planner.records.plan import Plan
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
from meft.planner.search.levers import levers

MACHINES = {"gpu": "rtx-3090", "model": "llama-7b", "nodes": 2, "interconnect": "100Gbit/s"}


@pytest.fixture(scope="module")
def owned() -> Plan:
    """The search's seconds and the prediction's must agree, or it refuses."""
    return plan(host_mem="64GB", rows="owned", **MACHINES)


def test_rows_owned_are_searched_for(owned):
    decision, request = owned.decision, owned.request
    assert (decision.rows, request.rows) == ("owned", "owned")
    assert decision.routing == "key-experts"
    assert decision.num_experts % 2 == 0
    tables = {entry.category: entry.num_bytes for entry in owned.prediction.host_memory.entries}
    assert tables["adapter_weights"] * 2 == 32 * decision.adapter_width * 2 * 4096 * 4
    assert Plan.from_json(owned.to_json(), source="plan") == owned
    crossed = {entry.category for entry in owned.prediction.transfer.entries if entry.direction == "network"}
    assert crossed == {
        "row_gradients",
        "router_gradients",
        "router_sums",
        "rounds",
        "queries",
        "scores",
        "rows",
        "row_squares",
    }


def test_a_plan_that_says_nothing_of_it_is_as_before():
    made = plan(host_mem="256GB", **MACHINES)
    assert '"rows": "' not in made.to_json()


def test_the_host_waits_for_owners(owned):
    profiles = profiles_of(owned)
    seconds = []
    for rate in (1e8, 1e9, 1e13):
        request = owned.request.model_copy(update={"interconnect_bytes_per_second": rate})
        seconds.append(predict(request, owned.decision, profiles, replayed=False).timing.busy_seconds["cpu"])
    assert seconds[0] > seconds[1] > seconds[2]


def test_scaling_leaves_out_what_experts_do_not_divide_among(owned):
    four = owned.request.model_copy(update={"nodes": 4})
    few = owned.decision.model_copy(update={"num_experts": 2, "num_probes": 2})
    found = [{each.nodes for each in scaling(four, each, profiles_of(owned))} for each in (owned.decision, few)]
    assert found == [{1, 2, 4}, {1, 2}]


def test_replicated_rows_that_do_not_fit_could_be_owned():
    with pytest.raises(InfeasibleError, match=r"host memory: .*rows='owned'"):
        plan(host_mem="64GB", adapter_width=16384, **MACHINES)


def test_a_plan_says_what_owning_rows_would_save(owned):
    replicated = owned.decision.model_copy(update={"rows": "replicated"})
    request, profiles = owned.request.model_copy(update={"rows": "replicated"}), profiles_of(owned)
    found = levers(request, replicated, predict(request, replicated, profiles), profiles)
    (lever,) = (each for each in found if each.option == "--rows owned")
    assert lever.host_bytes < -(20 << 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 1, "interconnect": None}, "rows owned: by which machines"),
        ({"routing": "exact"}, "routing exact beside rows owned"),
        ({"token_chunks": 2}, "token_chunks 2: several devices do not take them"),
        ({"adapter_width": 1023}, "no number of experts of adapter_width 1023 divides among 2 machines"),
    ],
)
def test_what_machines_cannot_own_is_refused(options, message):
    given = {name: value for name, value in (MACHINES | options).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        plan(host_mem="64GB", rows="owned", **given)


def profiles_of(made: Plan) -> ProfileSet:
    request = made.request
    return ProfileSet(
        load_gpu(request.gpu), load_link(request.link), load_host(request.host), load_sparsity(request.sparsity)
    )
