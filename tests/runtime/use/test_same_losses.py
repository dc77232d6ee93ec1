"""The ways people train give the losses of ``meft-run``: ``transformers.Trainer`` and TRL's ``SFTTrainer``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sessions import open_small, small_plan
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from meft.runtime.data.examples import Example, batch_indices
from meft.runtime.session.checkpoint import adapter_tensors
from meft.runtime.training import training
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.hf_trainer import trainer_arguments

STEPS, BATCH, RATE = 4, 2, 1e-2  # four steps: the schedule's fractions are exact in binary
TOLERANCE = 2e-6


def examples() -> list[Example]:
    """Without padding: with it, a Trainer's attention mask chooses another kernel."""
    generator = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(4, 1024, (32,), generator=generator).tolist()) for _ in range(8)]
    return [Example(each, each) for each in ids]


def in_order() -> list[dict[str, list[int]]]:
    """The examples as ``meft-run`` meets them, one batch after the other."""
    chosen = [i for step in range(STEPS) for i in batch_indices(step, num_examples=8, batch_size=BATCH, seed=0)]
    return [{"input_ids": list(examples()[i].input_ids), "labels": list(examples()[i].labels)} for i in chosen]


@pytest.fixture(scope="module")
def by_meft_run(glass_folder) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and adapter of the runtime's own loop."""
    session = open_small(glass_folder, small_plan(glass_folder, grad_accum=1))
    options = training.TrainingOptions(steps=STEPS, learning_rate=RATE, max_norm=0.5)
    trainer = training.Trainer(session, examples(), options, pad_id=0, meft_version="0")
    trainer.run()
    session.drain()
    return trainer.history.losses, {name: each.clone() for name, each in adapter_tensors(session).items()}


def adapter_model(glass_folder, **plan: Any) -> AdapterModel:
    base = LlamaForCausalLM.from_pretrained(glass_folder, attn_implementation="sdpa")
    return AdapterModel.from_plan(base, small_plan(glass_folder, grad_accum=1, **plan), device="emulated")


def options(folder, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    } | changes


class Listening(TrainerCallback):
    """Keeps each step's loss as it is logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **more) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def test_the_trainers_losses_are_those_of_meft_run(glass_folder, tmp_path, by_meft_run) -> None:
    """To rounding: the Trainer divides a sum over tokens by their number, where torch's mean is one kernel."""
    model, listening = adapter_model(glass_folder), Listening()
    args = TrainingArguments(**options(tmp_path))
    trainer = Trainer(
        model=model, args=args, train_dataset=in_order(), data_collator=collate, **trainer_arguments(model, args)
    )
    trainer.add_callback(listening)
    trainer.train()
    losses, tensors = by_meft_run
    assert listening.losses == pytest.approx(losses, rel=TOLERANCE)
    for name, tensor in adapter_tensors(model.session).items():
        assert torch.allclose(tensor, tensors[name], rtol=1e-3, atol=1e-4), name


def test_a_loss_that_is_torchs_own_mean_is_bit_for_bit(glass_folder, tmp_path, by_meft_run) -> None:
    model, losses = adapter_model(glass_folder), []
    args = TrainingArguments(**options(tmp_path))

    def mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = model.base.loss_function(outputs.logits, labels, vocab_size=1024)
        losses.append(loss.item())
        return loss

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=in_order(),
        data_collator=collate,
        compute_loss_func=mean,
        **trainer_arguments(model, args),
    )
    trainer.train()
    assert losses == by_meft_run[0]
    for name, tensor in adapter_tensors(model.session).items():
        assert torch.equal(tensor, by_meft_run[1][name]), name


def test_the_sft_trainers_losses_are_those_of_meft_run(glass_folder, tmp_path, by_meft_run) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    from transformers import PreTrainedTokenizerFast

    model, listening = adapter_model(glass_folder), Listening()
    args = trl.SFTConfig(**options(tmp_path), max_length=32, bf16=False, gradient_checkpointing=False)
    trainer = trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in in_order()]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(glass_folder),
        **trainer_arguments(model, args),
    )
    trainer.add_callback(listening)
    trainer.train()
    assert listening.losses == pytest.approx(by_meft_run[0], rel=TOLERANCE)
