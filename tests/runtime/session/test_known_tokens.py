"""Known tokens weigh less in the loss: by hand, as a plain formula, in runs of every kind, and for no memory."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from method_runs import small_setup, trainer_of
from sessions import open_small, small_plan, small_trainer
from small_runs import SmallRuns
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from meft.planner.base.errors import UsageError
from meft.planner.records.report import Report, Training
from meft.runtime.cli.baseline import baseline_command
from meft.runtime.data.examples import Example
from meft.runtime.methods.run import MethodReport
from meft.runtime.session.known_tokens import known_tokens_weighed
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.hf_trainer import trainer_arguments

WEIGHT, STEPS = 0.25, 16
WORDS = [(word,) * 20 for word in (10, 30, 50, 70)]
"""The same word again and again: the model soon knows how it goes on."""


def plain_formula(logits, labels, vocab_size, num_items_in_batch=None, **_) -> torch.Tensor:
    """Every token's loss, times what it weighs, over how many there are."""
    losses = cross_entropy(
        logits.float()[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="none"
    )
    weights = torch.where(torch.exp(-losses.detach()) > 0.5, WEIGHT, 1.0)
    count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return (weights * losses).sum() / count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("items", [None, 40])
def test_loss_and_gradient_are_the_plain_formulas(glass_model, dtype, items) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 1024, (3, 12), generator=generator)
    logits = torch.randn(3, 12, 1024, generator=generator)
    logits[:, ::2].scatter_(2, labels[:, 1::2, None], 12.0)  # every other token is known
    labels[1, :4] = labels[:, -1] = -100
    found = []
    with known_tokens_weighed(glass_model, WEIGHT):
        for loss_of in (glass_model.loss_function, plain_formula):
            leaf = logits.to(dtype).requires_grad_()
            loss = loss_of(logits=leaf, labels=labels, vocab_size=1024, num_items_in_batch=items)
            (3 * loss).backward()
            found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)
    everything = glass_model.loss_function(logits=logits, labels=labels, vocab_size=1024, num_items_in_batch=items)
    assert found[0][0] < everything - 1e-3


def test_a_token_is_known_above_an_even_chance(glass_model) -> None:
    """Probabilities 0.6, 0.5 and 0.4: the first alone is known."""
    logits = torch.log(torch.tensor([[[0.4, 0.6], [0.5, 0.5], [0.4, 0.6], [0.5, 0.5]]])).requires_grad_()
    labels = torch.tensor([[0, 1, 0, 0]])
    with known_tokens_weighed(glass_model, WEIGHT):
        loss = glass_model.loss_function(logits=logits, labels=labels, vocab_size=2)
    assert loss.item() == pytest.approx(-(WEIGHT * math.log(0.6) + math.log(0.5) + math.log(0.4)) / 3)


def test_a_loss_without_gradients_is_the_plain_one_and_the_model_is_given_back(glass_model) -> None:
    ids = torch.tensor(WORDS)
    before = set(vars(glass_model)), glass_model.loss_function, len(glass_model._forward_hooks)
    with torch.no_grad():
        plain = glass_model(input_ids=ids, labels=ids).loss
        with known_tokens_weighed(glass_model, 0.0):
            assert torch.equal(glass_model(input_ids=ids, labels=ids).loss, plain)
            assert glass_model.loss_function is not before[1]
    assert (set(vars(glass_model)), glass_model.loss_function, len(glass_model._forward_hooks)) == before
    with known_tokens_weighed(glass_model, 1.0):
        assert glass_model.loss_function is before[1]


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_another_weight_is_refused(glass_model, weight) -> None:
    with (
        pytest.raises(UsageError, match=r"--known-token-weight .*give 0, .* to 1"),
        known_tokens_weighed(glass_model, weight),
    ):
        pass


def test_a_model_with_a_loss_of_its_own_is_refused(glass_model) -> None:
    class OwnLoss(LlamaForCausalLM):
        def forward(self, input_ids, labels=None, **more):
            given = super().forward(input_ids=input_ids, **more)
            given.loss = plain_formula(given.logits, labels, 1024)
            return given

    ids = torch.tensor(WORDS)
    with known_tokens_weighed(own := OwnLoss(glass_model.config), WEIGHT):
        with torch.no_grad():
            own(input_ids=ids, labels=ids)
        with pytest.raises(UsageError, match="OwnLoss has a loss of its own"):
            own(input_ids=ids, labels=ids)
    glass_model.loss_function = plain_formula
    with (
        pytest.raises(UsageError, match="LlamaForCausalLM has a loss of its own"),
        known_tokens_weighed(glass_model, WEIGHT),
    ):
        pass
    with (
        pytest.raises(UsageError, match="Linear has a loss of its own"),
        known_tokens_weighed(torch.nn.Linear(2, 2), WEIGHT),
    ):
        pass


# --- in runs ---------------------------------------------------------------------------------------------------------


def taught(trainer, weight: float):
    """A trainer over texts that repeat themselves."""
    trainer.examples = [Example(words, words) for words in WORDS]
    trainer.options = replace(trainer.options, known_token_weight=weight)
    return trainer


def losses_by_the_formula(trainer) -> list[float]:
    """Of a trainer whose model has the plain formula in the place of its loss."""
    core = next(part for part in trainer.session.model.modules() if isinstance(part, LlamaForCausalLM))
    core.loss_function = plain_formula
    trainer.run()
    return trainer.history.losses


@pytest.mark.parametrize("method", ["meft", "parallel-adapter", "lora", "full", "lst"])
def test_a_run_goes_as_with_the_plain_formula(glass_folder, method) -> None:
    def trainer(weight: float):
        if method == "meft":
            plan = small_plan(glass_folder, seq_len=20, grad_accum=1)
            return taught(small_trainer(open_small(glass_folder, plan), steps=STEPS), weight)
        sizes = {"adapter_width": 32} if method == "parallel-adapter" else {}
        sizes |= {"rank": 4, "target_modules": ("all-linear",)} if method == "lora" else {}
        sizes |= {"reduction": 8} if method == "lst" else {}
        sizes |= {"seq_len": 20}
        return taught(trainer_of(small_setup(glass_folder, method=method, **sizes), glass_folder, steps=STEPS), weight)

    weighed, plain = trainer(WEIGHT), trainer(1.0)
    weighed.run()
    plain.run()
    expected = losses_by_the_formula(trainer(1.0))
    assert weighed.history.losses == pytest.approx(expected, rel=1e-3)
    assert sum(weighed.history.losses[-4:]) < 0.8 * sum(plain.history.losses[-4:])
    assert "_loss_function" not in {name for part in weighed.session.model.modules() for name in vars(part)}


@pytest.mark.parametrize("request_", [{}, {"weights_dtype": "bf16"}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("choice", [{}, {"activation_checkpointing": True}], ids=["kept", "checkpointed"])
def test_it_takes_no_more_device_memory(glass_folder, choice, request_) -> None:
    """Nor less: what a plan predicts stays what a run takes."""
    peaks = {}
    for weight in (1.0, WEIGHT):
        plan = small_plan(glass_folder, choice=choice, seq_len=20, grad_accum=2, **request_)
        trainer = taught(small_trainer(open_small(glass_folder, plan), steps=4), weight)
        trainer.run()
        peaks[weight] = trainer.measured.peaks
    assert peaks[WEIGHT].allocated_bytes == peaks[1.0].allocated_bytes
    assert peaks[WEIGHT].reserved_bytes == peaks[1.0].reserved_bytes


def test_a_resumed_run_is_the_same_bit_for_bit_and_no_other_weight_goes_on(glass_folder, tmp_path) -> None:
    def trainer(folder, weight: float = WEIGHT, steps: int = 8):
        session = open_small(glass_folder, small_plan(glass_folder, seq_len=20, grad_accum=2))
        return taught(small_trainer(session, steps=steps, output=folder), weight)

    whole, first = trainer(tmp_path / "whole"), trainer(tmp_path / "parts")
    whole.run()
    first.on_step = lambda progress: setattr(first, "stop_requested", progress.step == 4)
    first.run()
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint*")
    second = trainer(tmp_path / "parts")
    second.resume(checkpoint)
    second.run()
    assert second.history == whole.history
    for mine, theirs in zip(second.session.store.layers, whole.session.store.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint*")
    with pytest.raises(UsageError, match=r"settings was .*'known_token_weight': 0.25.*, now"):
        trainer(tmp_path / "parts", weight=1.0).resume(checkpoint)


def test_a_run_says_it_and_one_without_it_says_what_it_said(glass_folder, tmp_path) -> None:
    runs, losses = SmallRuns(tmp_path, glass_folder), {}
    for name, options in (("weighed", ["--known-token-weight", 0]), ("plain", [])):
        assert runs.run(tmp_path / name, "--steps", 16, *options)[0] == 0
        report = Report.load(tmp_path / name / "report.json")
        losses[name] = report.training.loss_per_step
        written = json.loads((tmp_path / name / "report.json").read_text())["training"]
        assert ("known_token_weight" in written) == (name == "weighed")
        assert report.training.known_token_weight == (0.0 if name == "weighed" else 1.0)
    assert sum(losses["weighed"]) < sum(losses["plain"])
    assert "known_token_weight" not in Training.model_construct(**report.training.model_dump()).model_dump()
    code, error = runs.run(tmp_path / "weighed", "--steps", 18, "--resume", "--known-token-weight", 0.5)
    assert code == 2
    assert "'known_token_weight': 0.0" in error


def test_a_baseline_says_it_too(glass_folder, tmp_path) -> None:
    runs = SmallRuns(tmp_path, glass_folder)
    words = ["--method", "lora", "--rank", 2, "--model", glass_folder, "--data", runs.facts, "--seq-len", 24]
    for name, options in (("weighed", ["--known-token-weight", 0.5]), ("plain", [])):
        given = [*words, "--steps", 2, "--device", "emulated", "--output-dir", tmp_path / name, *options]
        done = CliRunner().invoke(baseline_command, [str(word) for word in given], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        written = json.loads((tmp_path / name / "report.json").read_text())
        assert written.get("known_token_weight") == (0.5 if name == "weighed" else None)
        assert MethodReport.load(tmp_path / name / "report.json").known_token_weight == (0.5 if options else 1.0)


# --- in people's own loops -------------------------------------------------------------------------------------------


def adapter_model(glass_folder, weight: float = WEIGHT) -> AdapterModel:
    base = LlamaForCausalLM.from_pretrained(glass_folder)
    plan = small_plan(glass_folder, seq_len=20, batch_size=4)
    return AdapterModel.from_plan(base, plan, device="emulated", known_token_weight=weight)


@pytest.fixture(scope="module")
def said(glass_folder) -> torch.Tensor:
    """What the model itself goes on with, of which it knows much."""
    model = LlamaForCausalLM.from_pretrained(glass_folder)
    return model.generate(torch.arange(40, 48).view(4, 2), max_new_tokens=18, do_sample=False, eos_token_id=None)


def test_an_adapter_model_weighs_in_training_alone(glass_folder, said) -> None:
    model, plain = adapter_model(glass_folder), adapter_model(glass_folder, 1.0)
    given = plain(input_ids=said, labels=said)
    expected = plain_formula(given.logits, said, 1024).item()
    assert expected < 0.98 * given.loss.item()
    assert model(input_ids=said, labels=said).loss.item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        losses = [each(input_ids=said, labels=said).loss for each in (model, plain)]
    assert torch.equal(*losses)
    assert "_loss_function" not in vars(model.detach())


@pytest.mark.parametrize("weight", [WEIGHT, 1.0])
def test_a_trainer_weighs_and_refuses_a_loss_that_it_makes_itself(glass_folder, tmp_path, said, weight) -> None:
    model = adapter_model(glass_folder, weight)
    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in said]
    trainer = Trainer(model=model, args=args, train_dataset=data, **trainer_arguments(model, args))
    logged = trainer.train().training_loss
    given = LlamaForCausalLM.from_pretrained(glass_folder)(input_ids=said, labels=said)
    expected = given.loss if weight == 1 else plain_formula(given.logits, said, 1024)
    assert logged == pytest.approx(expected.item(), rel=1e-4)
    args.label_smoothing_factor = 0.1
    refused = pytest.raises(UsageError, match=r"label_smoothing_factor 0.1: the Trainer then makes the loss")
    with nullcontext() if weight == 1 else refused:
        trainer_arguments(model, args)
