"""Every method of peft that the one loop can run: trained as peft trains it, saved, loaded, resumed, generated with."""

from __future__ import annotations

import json

import pytest
import torch
from method_runs import LEARNING_RATE, STEPS, TYPES, VIRTUAL, peft_setup, small_setup, trainer_of
from peft import PeftModel, get_peft_model
from places import ROOT
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from meft.planner.base.errors import DeviceOutOfMemory, UsageError
from meft.planner.records.peft_methods import PeftMethod, from_config_file, split_method
from meft.runtime.methods.generating import UnpaddedGenerator, generator_of
from meft.runtime.methods.opening import load_model
from meft.runtime.methods.peft_methods import REFUSED, checked, config_of, trained_of
from meft.runtime.methods.saving import holds_method, load_method, save_method
from meft.runtime.training.training import TrainingOptions
from meft.runtime.use.generation import ModelGenerator


@pytest.mark.parametrize("name", TYPES)
def test_a_method_of_peft_from_training_to_generation(tiny_folder, tmp_path, name) -> None:
    """Trained in two halves, the second resumed: the same bits as in one go; its folder is peft's own."""
    setup = peft_setup(tiny_folder, name)
    trainer = trainer_of(setup, tiny_folder)
    frozen = [each for each in trainer.session.model.parameters() if not each.requires_grad]
    before = [each.clone() for each in frozen]
    trainer.run()
    assert all(map(torch.equal, frozen, before))
    assert trainer.session.device.peaks().allocated_bytes > 0

    half = trainer_of(setup, tiny_folder, output=tmp_path)
    half.options = TrainingOptions(steps=STEPS, learning_rate=LEARNING_RATE, warmup_fraction=0.0)
    half.on_step = lambda progress: setattr(half, "stop_requested", progress.step == STEPS // 2)
    half.run()
    resumed = trainer_of(setup, tiny_folder, output=tmp_path)
    resumed.resume(tmp_path / f"checkpoint-{STEPS // 2:08d}")
    resumed.run()
    assert resumed.history.losses == trainer.history.losses
    assert all(map(torch.equal, resumed.session.trained, trainer.session.trained))

    folder = tmp_path / "adapter"
    save_method(trainer.session, setup, folder, meft_version="0.0.0")
    assert holds_method(folder)
    loaded = load_method(load_model(setup, tiny_folder, device_kind="emulated"), folder)
    assert isinstance(loaded, PeftModel)
    ids = torch.tensor([[0, 0, 7, 9], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    how = {"max_new_tokens": 3, "pad_id": 0}
    said = [generator_of(model).generate(ids, mask, **how) for model in (loaded, trainer.session.model)]
    assert torch.equal(*said)
    alone = generator_of(loaded).generate(ids[:1, 2:], mask[:1, 2:], **how)
    assert torch.equal(alone[0, : alone.shape[1]], said[0][0, : alone.shape[1]])


def test_qlora_from_training_to_generation(tiny_folder, tmp_path) -> None:
    """bitsandbytes' own 4-bit weights, which stay as they are: scored amid training too."""
    pytest.importorskip("bitsandbytes")
    fields = {"method": "qlora", "rank": 4, "target_modules": ("all-linear",), "weights_dtype": "nf4"}
    setup = small_setup(tiny_folder, double_quant=True, **fields)
    trainer = trainer_of(setup, tiny_folder, steps=4)
    packed = trainer.session.model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert (packed.dtype, packed.numel()) == (torch.uint8, 64 * 128 // 2)
    before = packed.clone()
    trainer.run()
    half = trainer_of(setup, tiny_folder, steps=4, output=tmp_path)
    half.on_step = lambda progress: setattr(half, "stop_requested", progress.step == 2)
    half.run()
    ids, mask, how = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64), {"max_new_tokens": 3, "pad_id": 0}
    generator_of(half.session.model).generate(ids, mask, **how)
    half.options = half.options.__class__(steps=4, learning_rate=LEARNING_RATE, warmup_fraction=0.0)
    half.stop_requested, half.on_step = False, lambda _: None
    half.run()
    resumed = trainer_of(setup, tiny_folder, steps=4, output=tmp_path / "none")
    resumed.resume(tmp_path / "checkpoint-00000004")
    for each in (half, resumed):
        assert each.history.losses == trainer.history.losses
        assert all(map(torch.equal, each.session.trained, trainer.session.trained))
    assert torch.equal(packed, before)
    save_method(trainer.session, setup, tmp_path / "adapter", meft_version="0.0.0")
    loaded = load_method(load_model(setup, tiny_folder, device_kind="emulated"), tmp_path / "adapter")
    said = [generator_of(model).generate(ids, mask, **how) for model in (loaded, trainer.session.model)]
    assert torch.equal(*said)


@pytest.mark.parametrize("name", ["prompt-tuning", "prefix-tuning", "ia3", "dora", "shira", "p-tuning"])
def test_it_is_pefts_own_plain_training_loop(tiny_folder, name) -> None:
    setup = peft_setup(tiny_folder, name)
    trainer = trainer_of(setup, tiny_folder)
    trainer.run()
    model = LlamaForCausalLM.from_pretrained(tiny_folder).requires_grad_(False)
    torch.manual_seed(0)
    model = get_peft_model(model, config_of(setup.peft)).train()
    optimizer = torch.optim.AdamW(trained_of(model), lr=LEARNING_RATE, weight_decay=0.0, foreach=False)
    losses = []
    for step in range(STEPS):
        batch = trainer.batch(step)
        loss = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained_of(model), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = trainer.history.learning_rates[step]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert trainer.history.losses == pytest.approx(losses, rel=1e-6)
    for mine, theirs in zip(trainer.session.trained, trained_of(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A tiny model whose layers have biases."""
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)).save_pretrained(folder)
    return folder


def test_bitfit_trains_every_bias_and_nothing_else(gpt2_folder, tmp_path) -> None:
    setup = small_setup(gpt2_folder, method="bitfit")
    trainer = trainer_of(setup, gpt2_folder, steps=6)
    trainer.run()
    per_layer = (3 * 32 + 32) + (4 * 32 + 32) + 2 * 32  # attention, FFN, two norms
    assert trainer.session.trainable_parameters == 2 * per_layer + 32
    assert trainer.history.losses[-1] < trainer.history.losses[0]
    save_method(trainer.session, setup, tmp_path / "adapter", meft_version="0.0.0")
    loaded = load_method(load_model(setup, gpt2_folder, device_kind="emulated"), tmp_path / "adapter")
    ids = torch.tensor([[7, 9]])
    assert torch.equal(loaded(ids).logits, trainer.session.model.eval()(ids).logits)


def test_bitfit_is_refused_where_there_is_no_bias(tiny_folder) -> None:
    with pytest.raises(UsageError, match="this model has no biases"):
        trainer_of(small_setup(tiny_folder, method="bitfit"), tiny_folder)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_the_loop_cannot_run_is_refused_with_its_reason(name) -> None:
    method = PeftMethod(peft_type=name.lower().replace("_", "-"))
    with pytest.raises(UsageError, match=REFUSED[name][:40]):
        checked(method)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (PeftMethod(peft_type="prompt-tunning"), "did you mean prompt-tuning"),
        (PeftMethod(peft_type="ia3", arguments={"target_module": ["k_proj"]}), "did you mean target_modules"),
    ],
)
def test_unknown_types_and_arguments_are_named(method, says) -> None:
    with pytest.raises(UsageError, match=says):
        checked(method)


def test_what_peft_refuses_is_one_line(tiny_folder) -> None:
    setup = small_setup(tiny_folder, method="peft", peft=PeftMethod(peft_type="c3a"))
    with pytest.raises(UsageError, match=r"peft:c3a: peft refuses it .*block size.*--peft-arg") as caught:
        trainer_of(setup, tiny_folder)
    assert "\n" not in str(caught.value)


def test_a_config_file_is_the_method(tiny_folder, tmp_path) -> None:
    written = config_of(PeftMethod(peft_type="prefix-tuning", arguments=VIRTUAL))
    written.save_pretrained(tmp_path)
    read = checked(from_config_file(str(tmp_path / "adapter_config.json")))
    assert (read.peft_type, read.arguments["num_virtual_tokens"]) == ("prefix-tuning", 4)
    assert trainer_of(small_setup(tiny_folder, method="peft", peft=read), tiny_folder).session.trainable_parameters


@pytest.mark.parametrize(
    ("content", "says"),
    [({"r": 8}, "has no peft_type"), ({"peft_type": "LORA", "task_type": "SEQ_CLS"}, "only CAUSAL_LM is trained")],
)
def test_another_json_is_no_config(tmp_path, content, says) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=says):
        from_config_file(str(path))


def test_a_prefix_does_not_go_with_checkpointing(tiny_folder) -> None:
    with pytest.raises(UsageError, match="does not see; leave it out"):
        trainer_of(peft_setup(tiny_folder, "prefix-tuning", activation_checkpointing=True), tiny_folder)


def test_a_checkpoint_of_another_size_is_refused(tiny_folder, tmp_path) -> None:
    trainer_of(peft_setup(tiny_folder, "prompt-tuning"), tiny_folder, output=tmp_path).run()
    other = PeftMethod(peft_type="prompt-tuning", arguments={"num_virtual_tokens": 5})
    changed = trainer_of(small_setup(tiny_folder, method="peft", peft=other), tiny_folder)
    with pytest.raises(UsageError, match="made by another method or size"):
        changed.resume(tmp_path / f"checkpoint-{STEPS:08d}")


def test_the_budget_is_kept(tiny_folder) -> None:
    with pytest.raises(DeviceOutOfMemory):
        trainer_of(peft_setup(tiny_folder, "lora"), tiny_folder, budget_bytes=1 << 20).run()


class Echo:
    """Says a prompt's last token, plus one for each new token; takes no padding."""

    def generate(self, ids, mask, *, max_new_tokens, pad_id):
        assert mask.all()
        return ids[:, -1:] + torch.arange(1, max_new_tokens + 1)


def test_prompts_of_one_length_are_asked_together_and_without_padding() -> None:
    ids, mask = torch.tensor([[0, 0, 5], [1, 2, 3], [0, 0, 7]]), torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 1]])
    said = UnpaddedGenerator(Echo()).generate(ids, mask, max_new_tokens=2, pad_id=0)
    assert said.tolist() == [[6, 7], [4, 5], [8, 9]]


@pytest.mark.parametrize(("name", "unpadded"), [("prompt-tuning", True), ("prefix-tuning", True), ("ia3", False)])
def test_a_trained_prompt_is_asked_without_padding(tiny_folder, name, unpadded) -> None:
    model = trainer_of(peft_setup(tiny_folder, name), tiny_folder).session.model
    assert isinstance(generator_of(model), UnpaddedGenerator) is unpadded


def test_a_plain_model_is_asked_as_it_is(tiny_folder) -> None:
    assert isinstance(generator_of(LlamaForCausalLM.from_pretrained(tiny_folder)), ModelGenerator)


def test_a_method_is_split_once() -> None:
    assert split_method("peft:Prompt_Tuning") == ("peft", "prompt-tuning")
    with pytest.raises(UsageError, match="which of its methods"):
        split_method("peft")


def test_the_document_names_every_type_and_every_reason() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [name for name in TYPES if f"`{name}`" not in text] == []
    assert [name for name, reason in REFUSED.items() if f"| {reason} |" not in text] == []
