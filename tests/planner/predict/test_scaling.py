"""Several cards in one machine, several machines: what each has of host and link, what is shared, how a plan scales."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from plan_samples import sample_plan, sample_profiles, sample_request
from planner_records import decision_of, gpu_profile, host_profile, link_profile, request_of, tiny_shape
from processes import run
from pydantic import ValidationError

from meft.planner.base.errors import UsageError
from meft.planner.front.calls import compare, plan
from meft.planner.memory.host import host_memory
from meft.planner.predict.scaling import scaling
from meft.planner.records.plan import Plan
from meft.planner.render.plan import next_command
from meft.planner.timing.step import shared_rates, step_timing
from meft.planner.traffic.transfer import step_transfer

DECISION = decision_of(
    routing="key-experts", adapter_width=64, top_k=4, active_rows_cap=20, num_experts=16, num_probes=4
)


def tiny_request(gpus: int, **changes: object):
    """T = 2 * 5 = 10 tokens, L = 3, D = 8."""
    return request_of(**({"model": tiny_shape(), "batch_size": 2, "seq_len": 5, "gpus": gpus} | changes))


def test_host_memory_has_tables_once_and_buffers_of_each_by_hand():
    ledgers = [host_memory(request=tiny_request(gpus), decision=DECISION) for gpus in (1, 4)]
    one, four = ({entry.category: entry.num_bytes for entry in ledger.entries} for ledger in ledgers)
    for name in ("adapter_weights", "adapter_moments", "adapter_gradients", "step_counts", "touched_flags"):
        assert four[name] == one[name]
    for name in ("row_staging", "query_landing", "probes_landing", "row_experts_landing"):
        assert four[name] == 4 * one[name]
    # A landing: 20 rows * 16 * 2 = 640 bytes. Routers: L * N * D * 4 = 3 * 16 * 8 * 4 = 1536.
    assert (one["gradient_landing"], four["gradient_landing"]) == (640, 4 * 640)
    assert {name: four[name] for name in four.keys() - one.keys()} == {
        "gradient_rows": 4 * 20 * 8,
        "row_squares": 3 * 64 * 8,
        "router_landing": 4 * 1536,
        "router_sums": 1536,
    }


def test_routers_gradients_travel_where_there_are_several_ranks():
    one, two = (
        step_transfer(request=tiny_request(n), decision=DECISION, active_rows_per_layer=[10] * 3) for n in (1, 2)
    )
    assert two.d2h_bytes_per_step - one.d2h_bytes_per_step == 1536
    assert two.h2d_bytes_per_step == one.h2d_bytes_per_step
    assert (one.h2d_bytes_per_optimizer_step, two.h2d_bytes_per_optimizer_step) == (0, 1536)


def test_a_rank_has_its_share_of_the_host_and_of_a_link_that_cards_share():
    gpu, link, host = gpu_profile(), link_profile(), host_profile()
    shared = shared_rates(tiny_request(4, gpus_per_link=2), gpu, link, host)
    assert shared[0] is gpu
    assert shared[1].h2d_bytes_per_second.value == link.h2d_bytes_per_second.value / 2
    assert shared[2].gather_bytes_per_second.value == host.gather_bytes_per_second.value / 4
    assert shared[2].overhead_seconds_per_layer == host.overhead_seconds_per_layer
    assert shared_rates(tiny_request(1), gpu, link, host) == (gpu, link, host)


def test_an_owner_updates_its_share_so_that_the_window_takes_the_host_as_long_as_before():
    """AdamW: a quarter of the rows at a quarter of the rate, shared by a quarter as many micro-batches of a rank."""
    at = {
        n: step_timing(
            request=tiny_request(n, grad_accum=8),
            decision=DECISION,
            gpu=gpu_profile(),
            link=link_profile(),
            host=host_profile(),
            active_rows_per_layer=[0] * 3,
            window_active_rows_per_layer=[64] * 3,
        )
        for n in (1, 4)
    }
    adamw = 3 * 64 * 2 * 8 * 28 / host_profile().adamw_bytes_per_second.value
    others = [timing.busy_seconds["cpu"] - adamw * n / 8 for n, timing in at.items()]
    assert others[1] >= others[0] > 0
    assert at[4].tokens_per_second == pytest.approx(4 * 10 / at[4].step_seconds)


def test_cards_add_up_to_what_the_host_allows():
    found = scaling(sample_request(gpus=2, grad_accum=8), sample_plan().decision, sample_profiles())
    assert [each.gpus for each in found] == [1, 2, 4, 8]
    assert found[0].efficiency == 1.0
    assert all(a.efficiency >= b.efficiency for a, b in pairwise(found))
    assert all(a.host_bytes < b.host_bytes for a, b in pairwise(found))


def test_plans_of_one_card_say_nothing_of_it_and_others_round_trip():
    assert "gpus" not in json.loads(sample_plan().to_json())["request"]
    several = sample_plan(gpus=2, gpus_per_link=2)
    assert Plan.from_json(several.to_json(), source="plan").request.gpus == 2
    with pytest.raises(ValidationError, match="grad_accum 4 does not divide among gpus 3"):
        tiny_request(3, grad_accum=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 3}, "gpus 3: the 32 micro-batches"),
        ({"gpus": 2, "hot_rows": 8}, "hot_rows 8: several devices have none"),
        ({"nodes": 2, "gpus": 3, "interconnect": "1GB/s"}, "nodes 2 .*gpus 3: the 32 micro-batches"),
        ({"nodes": 2}, "nodes 2: what is between them"),
        ({"nodes": 2, "interconnect": "25"}, "interconnect: '25' is not a rate"),
        ({"interconnect": "25GbE"}, "interconnect 25GbE: between which machines"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        plan(gpu_mem="24GB", host_mem="64GB", **options)


def test_compare_is_about_one_card():
    with pytest.raises(UsageError, match="compare is about one card"):
        compare(gpu_mem="24GB", host_mem="64GB", gpus=2)
    with pytest.raises(UsageError, match="nodes 2: compare is about one card"):
        compare(gpu_mem="24GB", host_mem="64GB", nodes=2, interconnect="25GbE")


def test_a_faster_interconnect_lets_more_machines_do_more():
    """The same decision: over a network that nothing waits for, machines are as good as cards that share no host."""
    request, profiles, decision = sample_request(grad_accum=32), sample_profiles(), sample_plan().decision
    found = []
    for rate in (1e4, 1e9, 1e13):
        several = request.model_copy(update={"nodes": 4, "interconnect_bytes_per_second": rate})
        found.append(scaling(several, decision, profiles))
    assert [(each.nodes, each.gpus) for each in found[0]] == [(1, 1), (2, 1), (4, 1)]
    slow, middle, fast = ([each.efficiency for each in of_rate] for of_rate in found)
    assert slow[0] == middle[0] == fast[0] == 1
    assert slow[2] < middle[2] < fast[2] <= 1
    assert slow[2] < slow[1]
    assert found[0][2].busiest == "network"
    assert found[0][1].host_bytes > found[0][0].host_bytes


def test_a_plan_for_machines_is_searched_for_and_says_how_to_begin():
    """The search's seconds and the prediction's must agree, or it refuses."""
    made = plan(gpu="rtx-3090", model="llama-7b", host_mem="256GB", nodes=2, gpus=2, interconnect="25Gbit/s")
    assert made.request.interconnect_bytes_per_second == 25e9 / 8
    timing, transfer = made.prediction.timing, made.prediction.transfer
    assert timing.busy_seconds["network"] > 0
    assert timing.tokens_per_second == 4 * made.request.tokens_per_step / timing.step_seconds
    assert transfer.network_bytes_per_step > 0
    assert Plan.from_json(made.to_json(), source="plan") == made
    words = next_command(made, "plan.json")
    assert words[:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "2"]
    assert not any("node" in name or "network" in name for name in json.loads(sample_plan().to_json())["request"])


def test_the_screen_says_what_machines_exchange(tmp_path):
    several = ["--gpus", 2, "--nodes", 2, "--interconnect", "25Gbit/s", "--verbose", "-o", tmp_path / "plan.json"]
    done = run("meft-plan", "--gpu", "rtx-3090", "--model", "llama-7b", "--host-mem", "256GB", *several)
    assert re.search(r"^  2 x 2 .* GiB", done.stdout, re.MULTILINE)
    for text in ("between the machines ", "network ", "torchrun --nnodes 2 --nproc-per-node 2", "on each of 4 cards"):
        assert text in done.stdout
