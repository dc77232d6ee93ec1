"""Plans whose base is sharded over the cards of a machine."""

from __future__ import annotations

import pytest

from meft import plan
from meft.planner.base.errors import InfeasibleError, UsageError
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import Plan, Request
from meft.planner.search.search import check_request
from meft.planner.traffic.sharding import layer_shard_bytes

CARDS = {"gpu": "rtx-3090", "model": "llama-2-70b", "host_mem": "512GB", "batch_size": 1, "seq_len": 1024}


@pytest.fixture(scope="module")
def nf4() -> Plan:
    """The search's seconds and bytes, and the prediction's, must agree, or it refuses."""
    return plan(gpus=4, shard_base=True, weights_dtype="nf4", adapter_width=4096, top_k=64, **CARDS)


def test_a_70b_model_in_nf4_fits_four_cards_of_24_gb(nf4):
    memory, shape = nf4.prediction.device_memory, nf4.request.model
    assert memory.peak_reserved_bytes + memory.context_bytes.high_bytes <= nf4.request.gpu_mem_bytes
    part = layer_shard_bytes(shape, dtype="nf4", shards=4)
    by_category = {(entry.phase, entry.category): entry.num_bytes for entry in memory.entries}
    assert by_category["forward", "gathered_weights"] == by_category["backward", "gathered_weights"] == 2 * 4 * part
    assert by_category["resident", "linear_weights"] < shape.num_parameters // 4
    assert memory.reserved_basis == "assumed"  # no card has run it
    moved = nf4.prediction.transfer
    assert nf4.decision.activation_checkpointing
    assert moved.cards_bytes_per_step == 2 * 80 * 3 * part
    assert [entry.category for entry in moved.entries if entry.direction == "cards"] == ["weights"]
    assert nf4.prediction.host_memory.machine.peaks[0].num_bytes > 4 * (shape.num_parameters // 2) * 0.95
    assert Plan.from_json(nf4.to_json(), source="plan") == nf4


def test_gathering_takes_time_where_nothing_hides_it(nf4):
    """The more the fewer the tokens; a link of no latency and endless rates leaves the copies on the card."""
    profiles = ProfileSet.of(nf4.request)
    seconds = {}
    for seq_len in (64, 1024):
        for shard_base in (False, True):
            request = nf4.request.model_copy(update={"seq_len": seq_len, "shard_base": shard_base})
            seconds[seq_len, shard_base] = predict(request, nf4.decision, profiles, replayed=False).timing
    busy = [seconds[1024, sharded].busy_seconds["h2d"] for sharded in (False, True)]
    one_way = nf4.prediction.transfer.cards_bytes_per_step / profiles.link.duplex_h2d_bytes_per_second.value
    latencies = 2 * 80 * 3 * profiles.link.latency_seconds.value
    assert busy[1] - busy[0] == pytest.approx(one_way + latencies)
    ratios = {tokens: seconds[tokens, True].step_seconds / seconds[tokens, False].step_seconds for tokens in (64, 1024)}
    assert ratios[64] > ratios[1024] >= 1


def test_a_plan_that_says_nothing_of_it_is_as_before():
    made = plan(gpu="rtx-3090", model="llama-7b", host_mem="64GB", gpus=4)
    assert "shard_base" not in made.to_json()
    assert "cards_bytes" not in made.to_json()


def test_it_is_proposed_where_no_card_holds_the_base():
    with pytest.raises(InfeasibleError, match="shard_base=True"):
        plan(gpus=4, weights_dtype="nf4", adapter_width=4096, top_k=64, **CARDS)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gpus": 1}, "shard_base: over which cards\\? It goes with gpus"),
        ({"gpus": 4, "nodes": 2, "interconnect": "25Gbit/s"}, "nodes 2 beside shard_base: .* of one machine"),
        ({"gpus": 4, "nodes": 2, "interconnect": "25Gbit/s", "rows": "owned"}, "nodes 2 beside shard_base"),
        ({"gpus": 4, "token_chunks": 4}, "token_chunks 4: several devices do not take them"),
        ({"gpus": 4, "hot_rows": 64}, "hot_rows 64: several devices have none"),
        ({"gpus": 4, "weights_dtype": "int8"}, "int8"),
    ],
)
def test_what_cannot_be_sharded_is_refused(asked, message):
    with pytest.raises(UsageError, match=message):
        plan(**({"gpu": "rtx-3090", "model": "llama-7b", "host_mem": "256GB", "shard_base": True} | asked))


def test_weights_that_a_folder_stores_quantized_are_refused(nf4):
    stored = {"method": "bitsandbytes-4bit", "bits": 4}
    shape = nf4.request.model.model_validate(nf4.request.model.model_dump() | {"stored": stored})
    with pytest.raises(UsageError, match="beside shard_base: only weights quantized while they are loaded"):
        check_request(nf4.request.model_copy(update={"model": shape}))


def test_a_request_for_one_card_contradicts_itself(nf4):
    with pytest.raises(ValueError, match="shard_base divides the frozen base among a machine's cards, and gpus is 1"):
        Request.model_validate(nf4.request.model_dump() | {"gpus": 1})
