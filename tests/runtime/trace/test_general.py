"""Families without a closed form: planned by traces of their own code, and without torch from what was kept of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints

import pytest
from places import ROOT

from meft.planner.base import tracers
from meft.planner.base.errors import Infeasible, MachineError, UsageError
from meft.planner.front.asked import EstimateRequest
from meft.planner.front.compare import compare_methods
from meft.planner.front.estimate import estimate_of
from meft.planner.front.options import RequestOptions
from meft.planner.front.plan import find_plan
from meft.planner.front.request import planning
from meft.planner.predict.verification import traced_emulated, traced_plan
from meft.planner.simulation.stream import stream_peaks

SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None}
MIXTRAL = {"model_type": "mixtral", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
CHOSEN = {"seq_len": 32, "grad_accum": 1, "host_mem": 1 << 30, "max_slowdown": 1000.0, "min_trainable": 0.0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MEFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny-mixtral"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MIXTRAL))
    return path


def options_of(folder, **changes) -> RequestOptions:
    return RequestOptions(model=str(folder), **(CHOSEN | {"gpu": "emulated", "gpu_mem": 1 << 28} | changes))


def without_torch(monkeypatch) -> None:
    names = ("shape", "plan", "setup", "emulated")
    points = EntryPoints(EntryPoint(name, "a_module_that_is_not_there:x", tracers.GROUP) for name in names)
    monkeypatch.setattr(tracers, "entry_points", lambda group: points)


@pytest.mark.parametrize("gpu", [{}, {"gpu": "rtx-3090", "gpu_mem": 3 << 30}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_s_memory_is_the_trace_of_its_own_decision(folder, gpu, checkpointing) -> None:
    found = find_plan(options_of(folder, activation_checkpointing=checkpointing, **gpu))
    plan, memory = found.plan, found.plan.prediction.device_memory
    rows = (plan.decision.active_rows_cap,) * 2
    sparsity = plan.prediction.sparsity.model_copy(update={"active_rows_per_layer": rows})
    at_cap = plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"sparsity": sparsity})})
    if plan.request.gpu == "emulated":
        traced = stream_peaks(traced_emulated(at_cap, MIXTRAL))
    else:
        workspace = int(found.planning.profiles.gpu.workspace_bytes.value)
        traced = stream_peaks(traced_plan(at_cap, MIXTRAL, workspace_bytes=workspace))
    assert memory.peak_allocated_bytes == traced.allocated_bytes
    assert traced.reserved_bytes <= memory.peak_reserved_bytes <= memory.allocator_budget_bytes
    assert any("trace of the real code" in note for note in found.planning.notes)


def test_verify_traces_once_more_and_finds_the_same(folder) -> None:
    found = find_plan(options_of(folder, gpu="rtx-3090", gpu_mem=3 << 30), verify=True).plan
    assert found.verification.peak_allocated_bytes_at_cap == found.prediction.device_memory.peak_allocated_bytes


def test_what_does_not_fit_is_told_and_what_is_tight_fits_its_own_trace(folder) -> None:
    assert isinstance(find_plan(options_of(folder, gpu_mem=1 << 22)), Infeasible)
    tight = find_plan(options_of(folder, gpu_mem=27 << 20, adapter_width=512))
    assert tight.plan.prediction.device_memory.peak_reserved_bytes <= 27 << 20


def test_without_torch_the_kept_terms_answer_for_any_batch(folder, monkeypatch) -> None:
    with_torch = find_plan(options_of(folder, adapter_width=64, top_k=4, routing="exact")).plan
    longer = find_plan(options_of(folder, adapter_width=64, top_k=4, routing="exact", batch_size=5)).plan
    without_torch(monkeypatch)
    for batch_size, expected in ((2, with_torch), (5, longer)):
        options = options_of(folder, adapter_width=64, top_k=4, routing="exact", batch_size=batch_size)
        found = find_plan(options)
        predicted = found.plan.prediction.device_memory.peak_allocated_bytes
        assert predicted == pytest.approx(expected.prediction.device_memory.peak_allocated_bytes, rel=0.03)
        assert any("kept in the cache" in note for note in found.planning.notes)
    with pytest.raises(MachineError, match=r"code is traced once for each workload; .*pip install 'meft\[run\]'"):
        find_plan(options_of(folder, seq_len=64))


def test_dense_methods_are_estimated_by_their_traces(folder) -> None:
    asked = {"model": str(folder), "gpu": "rtx-3090", "seq_len": 32, "rank": 4}
    estimate, _ = estimate_of(EstimateRequest(method="lora", target_modules="q_proj,v_proj", **asked))
    assert estimate.trainable_parameters == 2 * 4 * (64 + 64 + 64 + 32)
    meft, _ = estimate_of(
        EstimateRequest(method="meft", model=str(folder), gpu="rtx-3090", seq_len=32, adapter_width=64)
    )
    assert meft.fits
    with pytest.raises(UsageError, match="mixtral has no closed form to simulate"):
        compare_methods(planning(options_of(folder)))


def test_a_class_without_an_ffn_module_is_estimated_and_not_planned(folder) -> None:
    config = {"model_type": "biogpt", "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="its blocks have no FFN module of their own"):
        find_plan(options_of(folder))
    asked = {"model": str(folder), "gpu": "rtx-3090", "seq_len": 32}
    assert estimate_of(EstimateRequest(method="lora", target_modules="q_proj", **asked))[0].fits


def families():
    spec = importlib.util.spec_from_file_location("families", ROOT / "scripts" / "families.py")
    module = sys.modules["families"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gptj", "llama4_text", "bloom"])
def test_the_script_of_families_says_that_these_work(model_type, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MEFT_CACHE", str(tmp_path))
    script = families()
    found = script.examine(model_type)
    whole = script.Found(model_type, plan=True, trace=True, run=True, attach=True, detach=True, counts_equal=True)
    kept = {"parameters": found.parameters, "answered": found.answered, "peak_ratio": found.peak_ratio}
    assert found == replace(whole, **kept)
    assert abs(found.peak_ratio - 1) <= script.WITHIN
    assert f"| `{model_type}` | {found.answered} | yes | yes | yes | yes | yes |" in script.table([found])


def test_the_script_of_families_says_why_not(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MEFT_CACHE", str(tmp_path))
    assert "no FFN module of their own" in families().examine("bert").why
