"""Callbacks, packing, bf16 with checkpointing, a launcher, and the KV cache, with an adapter on the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import small_plan
from transformers import EarlyStoppingCallback, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.hf_trainer import trainer_arguments

IDS = torch.arange(4, 36).view(1, 32)
DATA = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8


def adapter_model(folder: Path, *, choice: dict[str, object] | None = None, **request: Any) -> AdapterModel:
    dtype = torch.bfloat16 if request.get("weights_dtype") == "bf16" else torch.float32
    base = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return AdapterModel.from_plan(base, small_plan(folder, choice=choice, grad_accum=1, **request), device="emulated")


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2}
    usual |= {"learning_rate": 1e-2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1}
    return usual | changes


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_early_stopping_and_tensorboard(glass_folder, tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = adapter_model(glass_folder)
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    args = TrainingArguments(**options(tmp_path / "out", max_steps=9, report_to=["tensorboard"], **changes))
    trainer = Trainer(model=model, args=args, train_dataset=DATA, eval_dataset=DATA, **trainer_arguments(model, args))
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9))
    trainer.train()
    assert trainer.state.global_step == 2  # the second evaluation is not better by so much
    assert list((tmp_path / "board").rglob("events*"))


def test_sft_with_packing_bf16_checkpointing_and_resume(glass_folder, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"input_ids": IDS[0, : 9 + n].tolist()} for n in range(20)])

    def trainer_of(folder: Path, seed: int = 0) -> Any:
        model = adapter_model(glass_folder, choice={"activation_checkpointing": True}, weights_dtype="bf16")
        more = {"bf16": True, "activation_checkpointing": True, "packing": True, "packing_strategy": "wrapped"}
        args = trl.SFTConfig(**options(folder, save_steps=2, **more), max_length=32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(glass_folder)
        arguments = trainer_arguments(model, args)
        return trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, **arguments)

    straight = trainer_of(tmp_path / "a")
    straight.train()
    assert losses_of(straight)[-1] < losses_of(straight)[0]
    resumed = trainer_of(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses_of(resumed)[-2:] == losses_of(straight)[-2:]


def test_generation_with_the_cache_says_what_it_says_without(glass_folder, tmp_path) -> None:
    model = adapter_model(glass_folder)
    optimizer = model.optimizer(learning_rate=1e-1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()
    say = {"input_ids": IDS[:, :8], "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**say, use_cache=True), model.generate(**say, use_cache=False))


SCRIPT = """
import sys, torch, meft
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
base, plan, out = sys.argv[1:]
model = meft.AdapterModel.from_plan(LlamaForCausalLM.from_pretrained(base), plan, device="emulated")
args = TrainingArguments(output_dir=out, max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[])
ids = torch.arange(4, 36)
data = [{"input_ids": ids, "labels": ids}] * 4
Trainer(model=model, args=args, train_dataset=data, **meft.trainer_arguments(model, args)).train()
model.save_pretrained(out + "/adapter")
"""


def test_accelerate_launches_one_process(glass_folder, tmp_path) -> None:
    small_plan(glass_folder, grad_accum=1).save(tmp_path / "plan.json")
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", tmp_path / "script.py"]
    arguments = [sys.executable, *launch, glass_folder, tmp_path / "plan.json", tmp_path / "out"]
    done = subprocess.run([str(each) for each in arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: meft\n")
