"""A base that is sharded over ranks: what is learnt is what ranks with all of it learn, bit for bit; device memory and
bytes between the ranks are what is predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run
from rank_checks import Runs, learnt, require_counted, require_equal, write_facts
from sessions import EXPERTS

from meft.planner.base.errors import UsageError
from meft.planner.memory.replayed import replayed_peaks
from meft.planner.records.profile_catalogue import load_gpu
from meft.planner.records.report import Report
from meft.planner.traffic.sharding import gathered_bytes_of
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import open_session
from meft.runtime.training.together import check, check_evaluation

ODD_STEPS = 9
"""Of windows of four: in the last round one of two ranks has no micro-batch, and gathers all the same."""
CASES: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "plain": ({**EXPERTS, "top_k": 16}, {}, "sequential"),
    "checkpointed": (
        {**EXPERTS, "top_k": 16, "prefetch_depth": 1, "activation_checkpointing": True},
        {"weights_dtype": "bf16"},
        "overlapped",
    ),
}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_facts(tmp_path_factory.mktemp("data") / "facts.jsonl")


@pytest.mark.parametrize("name", CASES)
def test_ranks_with_their_parts_learn_what_ranks_with_all_do(tmp_path, glass_folder, facts, name):
    choice, asked, schedule = CASES[name]
    runs = {}
    for kind, more in {"whole": {}, "sharded": {"gpus": 2, "shard_base": True}}.items():
        (tmp_path / kind).mkdir()
        runs[kind] = Runs(tmp_path / kind, glass_folder, facts, choice, ("--schedule", schedule), **asked, **more)
    outputs = {kind: each.ranks(2, "out", steps=ODD_STEPS) for kind, each in runs.items()}
    require_equal(learnt(outputs["whole"]), learnt(outputs["sharded"]))
    plan, report = runs["sharded"].plan, Report.load(outputs["sharded"] / "report.json")
    require_counted(plan, report)
    rounds, ranks = -(-ODD_STEPS // 2), 2
    assert report.observed.transfer.cards_bytes_total == rounds * ranks * gathered_bytes_of(plan.request, plan.decision)
    peaks = replayed_peaks(plan.request, plan.decision, load_gpu("emulated"))
    seen = [rank.device_memory for rank in report.ranks]
    assert [each.peak_allocated_bytes for each in seen] == [peaks.allocated_bytes] * ranks
    assert [each.peak_reserved_bytes for each in seen] == [peaks.reserved_bytes] * ranks


def test_a_quantized_base_that_is_sharded_learns_what_one_rank_does(tmp_path, glass_folder, facts):
    """Begun anew rather than forked: threads of bitsandbytes' kernels do not outlive a fork."""
    pytest.importorskip("bitsandbytes")
    asked, outputs = {"weights_dtype": "nf4", "adapter_dtype": "bf16"}, {}
    for kind, ranks, more in (("whole", 1, {}), ("sharded", 2, {"gpus": 2, "shard_base": True})):
        (tmp_path / kind).mkdir()
        runs = Runs(tmp_path / kind, glass_folder, facts, {"top_k": 16}, **asked, **more)
        run("meft-run", *runs.words("out", "--steps", 5, "--gpus", ranks))
        outputs[kind] = tmp_path / kind / "out"
    require_equal(learnt(outputs["whole"]), learnt(outputs["sharded"]))
    report = Report.load(outputs["sharded"] / "report.json")
    require_counted(runs.plan, report)
    peaks = replayed_peaks(runs.plan.request, runs.plan.decision, load_gpu("emulated"))
    assert [rank.device_memory.peak_allocated_bytes for rank in report.ranks] == [peaks.allocated_bytes] * 2


def test_what_a_sharded_base_cannot_do_is_refused(tmp_path, glass_folder, facts):
    runs = Runs(tmp_path, glass_folder, facts, {"top_k": 16}, gpus=2, shard_base=True)
    for ranks, machines in ((1, 1), (4, 1), (2, 2)):
        with pytest.raises(UsageError, match="the plan shards the base over 2 cards of one machine, and there are"):
            check(runs.plan, ranks, machines=machines, steps=None)
    with pytest.raises(UsageError, match="--eval: rank 0 has its part of the sharded base alone"):
        check_evaluation(runs.plan, None)
    model = load_frozen_model(runs.plan, glass_folder)
    with pytest.raises(UsageError, match="--key-init ffn: each rank has its part"):
        open_session(runs.plan, model, EmulatedDevice(1 << 30), seed=0, key_init="ffn")
    with pytest.raises(UsageError, match="--gpus 1: the plan shards the base over 2 cards"):
        open_session(runs.plan, model, EmulatedDevice(1 << 30), seed=0)
