"""``transformers.Trainer`` with an adapter on the host: learns, clips once, checkpoints small, resumes bit for bit."""

from __future__ import annotations

import pytest
import torch
from accelerate.optimizer import move_to_device
from safetensors.torch import load_file
from sessions import EXPERTS, STABLE, open_small, random_examples, small_plan, small_trainer
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from meft.planner.base.errors import UsageError
from meft.runtime.data.examples import collate
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.hf_trainer import trainer_arguments
from meft.runtime.use.row_optimizer import RowOptimizer

CHOICES = [{}, {"prefetch_depth": 1, **EXPERTS}]
STAGES = [STABLE | {"stable": {"first_stage": share}} for share in (0.5, 0.25)]
"""Routing is learnt at the checkpoint in the middle, and at the one step before."""


def data() -> list[dict[str, torch.Tensor]]:
    batch = collate(random_examples(8, length=24), seq_len=24, pad_id=0)
    parts = zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True)
    return [{"input_ids": ids, "attention_mask": mask, "labels": labels} for ids, mask, labels in parts]


def arguments(folder, **changes: object) -> TrainingArguments:
    options: dict[str, object] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_grad_norm": 0.5,
    }
    return TrainingArguments(**(options | changes))


def trainer_for(folder, glass_folder, choice: dict[str, object], *, seed: int = 0, **changes: object):
    base = LlamaForCausalLM.from_pretrained(glass_folder)
    plan = small_plan(glass_folder, choice=choice, grad_accum=2)
    model = AdapterModel.from_plan(base, plan, device="emulated", seed=seed)
    args = arguments(folder, **changes)
    return model, Trainer(model=model, args=args, train_dataset=data(), **trainer_arguments(model, args))


@pytest.mark.parametrize("choice", [*CHOICES, *STAGES])
def test_resuming_equals_training_straight_through(glass_folder, tmp_path, choice) -> None:
    straight, trainer = trainer_for(tmp_path, glass_folder, choice)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.args.max_grad_norm == 0.5  # as it was given
    checkpoint = tmp_path / "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")
    assert set(saved) == set(straight.state_dict())  # the adapter alone, no frozen base
    for name in saved:
        saved[name].zero_()  # not a view of anything that trains
    resumed, again = trainer_for(tmp_path / "again", glass_folder, choice, seed=9)
    again.train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_checkpoint_holds_an_adapter_folder(glass_folder, tmp_path) -> None:
    model, trainer = trainer_for(tmp_path, glass_folder, CHOICES[1], max_steps=2)
    trainer.train()
    loaded = AdapterModel.from_pretrained(glass_folder, tmp_path / "checkpoint-2" / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_rows_and_routers_are_clipped_together_and_once(glass_folder, tmp_path) -> None:
    """What the routers' gradients are after clipping tells the factor: it must be that of the common norm."""
    model, trainer = trainer_for(tmp_path, glass_folder, CHOICES[1], max_steps=2, max_grad_norm=1e-3)
    seen: list[tuple[float, float]] = []
    session, update = model.session, model.session._update_routers

    def watched(optimizer, learning_rate, scale) -> None:
        norm = float(session.squared_router_norm()) ** 0.5
        seen.append((norm, scale))
        update(optimizer, learning_rate, scale)

    session._update_routers = watched
    trainer.train()
    _, (router_norm, scale) = seen  # values start as zero, so at first the routers have no gradient
    optimizer = trainer.optimizer.optimizer
    assert router_norm > 1e-3  # the Trainer did not clip them before
    assert scale == pytest.approx(1e-3 / optimizer.last_gradient_norm, rel=1e-2)
    assert optimizer.last_gradient_norm > router_norm


def test_the_trainer_evaluates_with_the_adapter(glass_folder, tmp_path) -> None:
    _, trainer = trainer_for(tmp_path, glass_folder, {}, max_steps=4, save_steps=10)
    before = trainer.evaluate(data())["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data())["eval_loss"] < before


@pytest.mark.parametrize("choice", CHOICES)
def test_a_trainer_without_the_adapters_optimizer_is_refused_at_its_first_step(glass_folder, tmp_path, choice) -> None:
    base = LlamaForCausalLM.from_pretrained(glass_folder)
    model = AdapterModel.from_plan(base, small_plan(glass_folder, choice=choice), device="emulated")
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=data())
    with pytest.raises(UsageError, match=r"AdamW would train nothing .* \*\*trainer_arguments\(model, args\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_sft_trainer_without_the_adapters_optimizer_is_refused_at_its_first_step(glass_folder, tmp_path) -> None:
    """TRL's trainer is a Trainer; where it is not installed this says nothing."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    base = LlamaForCausalLM.from_pretrained(glass_folder)
    model = AdapterModel.from_plan(base, small_plan(glass_folder, choice={}), device="emulated")
    table = datasets.table.InMemoryTable.from_pydict({"input_ids": [each["input_ids"].tolist() for each in data()]})
    rows = datasets.Dataset(table, fingerprint="examples")
    options = {
        "max_length": 24,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    args = trl.SFTConfig(**arguments(tmp_path).to_dict() | options)
    tokenizer = AutoTokenizer.from_pretrained(glass_folder)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(UsageError, match=r"AdamW would train nothing .* \*\*trainer_arguments\(model, args\)"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("choice", [*CHOICES, {"prefetch_depth": 1, "cached_rows": 40, "gradients_on_device": True}])
def test_the_logged_gradient_norm_is_that_of_rows_and_routers(glass_folder, tmp_path, choice) -> None:
    _, trainer = trainer_for(tmp_path / "a", glass_folder, choice)
    norms: list[float] = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, *, optimizer, **more) -> None:
            norms.append(optimizer.optimizer.last_gradient_norm)

    trainer.add_callback(Watch())
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 4
    assert min(norms) > 0
    assert logged == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_model_that_the_trainer_saved_is_read(glass_folder, tmp_path, choice) -> None:
    model, trainer = trainer_for(tmp_path, glass_folder, choice, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AdapterModel.from_pretrained(glass_folder, tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7, 8]])
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
        assert not torch.equal(loaded(input_ids=ids).logits, loaded.detach()(input_ids=ids).logits)


def test_bf16_goes_with_a_plan_for_a_base_in_bf16(glass_folder, tmp_path) -> None:
    losses = []
    for bf16 in (False, True):
        base = LlamaForCausalLM.from_pretrained(glass_folder, dtype=torch.bfloat16)
        plan = small_plan(glass_folder, choice=CHOICES[1], grad_accum=2, weights_dtype="bf16")
        model = AdapterModel.from_plan(base, plan, device="emulated")
        args = arguments(tmp_path / str(bf16), bf16=bf16)
        trainer = Trainer(model=model, args=args, train_dataset=data(), **trainer_arguments(model, args))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bf16": True}, "bf16: the plan's memory is for computing in fp32; plan with --weights-dtype bf16"),
        ({"per_device_train_batch_size": 4}, "the plan's memory is for batches of 2"),
        ({"activation_checkpointing": True}, "the plan decided against it"),
        ({"weight_decay": 0.1}, "weight_decay 0.1: the model was opened with 0.0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(glass_folder, glass_model, tmp_path, changes, message) -> None:
    model = AdapterModel.from_plan(glass_model, small_plan(glass_folder), device="emulated")
    with pytest.raises(UsageError, match=message):
        trainer_arguments(model, arguments(tmp_path, **changes))


def test_a_second_trainers_optimizer_state_stays_on_the_host(glass_folder, tmp_path) -> None:
    # What accelerate does when a Trainer is made: of LLaMA-7B it would move 31 GiB of moments to the GPU.
    session = open_small(glass_folder, small_plan(glass_folder))
    small_trainer(session, steps=1).run()
    optimizer = RowOptimizer(session, lambda: None, learning_rate=1e-3, max_norm=None)
    moved = move_to_device(optimizer.state_dict(), torch.device("meta"))["state"]
    assert {tensor.device.type for tensor in moved.values()} == {"cpu"}
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)["state"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in moved.items())
    assert len(loaded) == len(moved) > 0
