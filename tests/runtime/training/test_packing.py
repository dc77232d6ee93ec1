"""Short texts share sequences as far as the plan's budget has room for the mask between them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from sessions import open_small, small_plan

from meft.planner.base.errors import InfeasibleError
from meft.planner.memory.device import predict_device_memory
from meft.planner.predict.prediction import repriced
from meft.planner.records.plan import Plan
from meft.planner.records.profile_catalogue import load_gpu
from meft.runtime.data.examples import collate
from meft.runtime.data.loading import DataOptions, Dataset, load_dataset
from meft.runtime.training import packing

ROOM = 1 << 30


def priced_plan(folder: Path, **request: object) -> Plan:
    """With the device memory that the planner says."""
    plan = small_plan(folder, **{"seq_len": 64, **request})
    memory = predict_device_memory(request=plan.request, decision=plan.decision, gpu=load_gpu("emulated"))
    return plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"device_memory": memory})})


@pytest.fixture
def load(glass_tokenizer, tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": "Alice was tired " * count}) + "\n" for count in (1, 2, 3, 4)))

    def with_options(reading: DataOptions) -> Dataset:
        return load_dataset(path, glass_tokenizer, seq_len=64, options=reading)

    return with_options


def test_a_plan_that_did_not_price_it_is_priced_anew(glass_folder, load) -> None:
    plan, said = priced_plan(glass_folder, seq_len=512), []
    found = packing.load(load, DataOptions(), plan, budget_bytes=ROOM, say=said.append)
    assert packing.shares_sequences(found)
    assert [note.partition(": ")[0] for note in said] == ["note"]
    assert "a mask that this plan does not price" in said[0]
    assert "meft-plan --packed plans for it, --packing none does without" in said[0]


def test_a_plan_that_did_is_followed_without_a_word(glass_folder, load) -> None:
    said: list[str] = []
    plan = priced_plan(glass_folder, packed=True)
    assert packing.shares_sequences(packing.load(load, DataOptions(), plan, budget_bytes=1, say=said.append))
    assert said == []


def test_without_room_texts_stand_alone_unless_asked_for(glass_folder, load) -> None:
    plan, said = priced_plan(glass_folder), []
    attempt = partial(packing.load, load, plan=plan, budget_bytes=1 << 20, say=said.append)
    assert not packing.shares_sequences(attempt(DataOptions()))
    assert said[0].startswith("note: each text has a sequence of its own: a mask between packed texts makes it ")
    with pytest.raises(InfeasibleError, match=r"^--packing text: a mask .* of 1\.0 MiB; meft-plan --packed plans"):
        attempt(DataOptions(packing="text"))


@pytest.mark.parametrize(
    ("choice", "request_"),
    [
        ({}, {}),
        ({}, {"seq_len": 160, "batch_size": 1}),
        ({"activation_checkpointing": True}, {"seq_len": 160, "batch_size": 3}),
        ({}, {"attention": "eager"}),
    ],
)
def test_a_run_takes_what_the_plan_says_with_packed_texts(glass_folder, load, choice, request_) -> None:
    """Equal, where a run that did not price it takes 3 % more at 160 tokens."""
    plan = priced_plan(glass_folder, choice=choice, **request_)
    again = repriced(plan, load_gpu("emulated"), packed=True)
    example = load(DataOptions()).examples[0]
    assert len(example.starts) == 4
    session = open_small(glass_folder, plan)
    batch = collate([example] * plan.request.batch_size, seq_len=plan.request.seq_len, pad_id=0)
    for _ in range(2):
        session.step(batch, loss_scale=1.0)
    peaks = session.device.peaks()
    assert session.met_packed
    assert again.prediction.device_memory.peak_allocated_bytes == pytest.approx(peaks.allocated_bytes, rel=1e-3)
    assert again.prediction.device_memory.peak_reserved_bytes >= peaks.reserved_bytes
    assert repriced(again, load_gpu("emulated"), packed=False) == plan
    session.close()
