"""A file in another's place is called by what it is, with what to give instead."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from plan_samples import sample_plan, sample_report

from meft.planner.base.errors import UsageError
from meft.planner.base.kinds import kind_of
from meft.planner.models.catalogue import load_model
from meft.planner.records.plan import Plan
from meft.planner.records.profile_catalogue import load_gpu, sections_in
from meft.planner.records.report import Report

PLAN = sample_plan()
REPORT = sample_report(PLAN)
MODEL = {"model_type": "llama", "tokenizer_class": "LlamaTokenizer", "hidden_size": 4}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    PLAN.save(tmp_path / "plan.json")
    REPORT.save(tmp_path / "report.json")
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "peft.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + b"\xff\xff\xff\xff"
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\xff")
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "plan.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("report.json", "is a report of a run, not a plan; give the plan.json that it was run with"),
        (
            "config.json",
            "is the config of a Hugging Face model, not a plan; plan for the model first: meft-plan --model",
        ),
        ("peft.json", "is the config of a PEFT adapter .*, not a plan; meft-plan --gpu-mem 24GB writes one"),
        ("data.jsonl", "is training data, JSON by lines, not a plan; give a plan.json first, and this with --data"),
        ("model.safetensors", "is a file of model weights, not a plan; plan for the model first"),
        ("model.gguf", "is a model in GGUF form, not a plan"),
        ("plan.png", "is a picture, not a plan"),
        ("out/adapter", "is the folder of a trained adapter, not a plan; give the plan.json; meft-run generate"),
        ("out", "is a folder, not a plan"),
    ],
)
def test_what_is_no_plan(name: str, message: str, files: Path) -> None:
    with pytest.raises(UsageError, match=f"^{files / name} {message}") as caught:
        Plan.load(files / name)
    assert "\n" not in str(caught.value)


def test_a_plan_is_no_report_profile_or_model(files: Path) -> None:
    name = "plan.json"
    with pytest.raises(UsageError, match=r"is a plan, not a report of a run; give the plan first, then the rep"):
        Report.load(files / name)
    for load in (load_gpu, sections_in):
        with pytest.raises(UsageError, match="is a plan, not a profile; meft-profile hardware -o FILE writes"):
            load(str(files / name))
    with pytest.raises(UsageError, match="is a plan, not the config of a model; give the model's folder"):
        load_model(str(files / name))


def test_profiles_and_models_of_other_forms(files: Path) -> None:
    with pytest.raises(UsageError, match=r"report.json is a report of a run, not a profile; meft-profile calibrate"):
        load_gpu(str(files / "report.json"))
    with pytest.raises(UsageError, match=r"model.safetensors is a file of model weights, not the config of a model"):
        load_model(str(files / "model.safetensors"))


def test_what_is_not_known_keeps_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(UsageError, match="schema_version is missing or no integer; is this a plan"):
        Plan.load(tmp_path / "a.json")
    (tmp_path / "half.json").write_text(PLAN.to_json()[:200])
    with pytest.raises(UsageError, match="is it truncated"):
        Plan.load(tmp_path / "half.json")
    with pytest.raises(UsageError, match="no such file"):
        Plan.load(tmp_path / "none.json")


def test_the_tokenizer_that_a_model_config_names_does_not_make_it_one() -> None:
    assert kind_of(MODEL) == "model config"
    assert kind_of({"tokenizer_class": "LlamaTokenizer"}) == "tokenizer"
