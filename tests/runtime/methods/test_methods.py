"""Every method of peft that the one loop can run: trained as peft trains it, saved, loaded, resumed, generated with."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from places import ROOT
from sessions import random_examples
from sparse_setup import AMPLE_BYTES
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from meft.planner.base.errors import DeviceOutOfMemory, UsageError
from meft.planner.records.setup import PeftMethod, TrainingSetup, split_method
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.methods.generating import generator_of
from meft.runtime.methods.opening import load_model, model_shape, open_method
from meft.runtime.methods.peft_methods import REFUSED, checked, config_of, from_config_file, known_types, trained_of
from meft.runtime.methods.saving import holds_method, load_method, save_method
from meft.runtime.methods.training import MethodTrainer
from meft.runtime.training.training import TrainingOptions
from meft.runtime.use.generation import ModelGenerator

VIRTUAL = {"num_virtual_tokens": 4}
ARGUMENTS: dict[str, dict[str, object]] = {
    "adaption-prompt": {"adapter_len": 4, "adapter_layers": 2},
    "c3a": {"block_size": 32},
    "fourierft": {"n_frequency": 64},
    "miss": {"r": 8},
    "p-tuning": VIRTUAL | {"encoder_hidden_size": 32},
    "prefix-tuning": VIRTUAL,
    "prompt-tuning": VIRTUAL,
    "psoft": {"r": 8},
    "road": {"group_size": 32},
    "shira": {"r": 4},
    "trainable-tokens": {"token_indices": [5, 9, 12]},
    "vblora": {"vector_length": 32, "num_vectors": 32},
    "waveft": {"n_frequency": 64},
}
"""What a type cannot do without on a model of width 128."""
TYPES = [*(name for name in known_types() if PeftMethod(peft_type=name).enum_name not in REFUSED), "dora"]
"""Also the list of docs/methods.md."""
LEARNING_RATE, STEPS = 1e-2, 2


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """Two layers of width 64, grouped heads."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def peft_setup(folder, name: str, **changes: object) -> TrainingSetup:
    peft = checked(PeftMethod(peft_type=name, arguments=ARGUMENTS.get(name, {})))
    fields: dict[str, object] = {"method": "peft", "peft": peft}
    return small_setup(folder, **(fields | changes))


def small_setup(folder, **fields: object) -> TrainingSetup:
    usual = {"batch_size": 2, "seq_len": 12, "weights_dtype": "fp32", "outputs_kept": False, "emulated": True}
    return TrainingSetup.model_validate({"model": model_shape(folder)} | usual | fields)


def trainer_of(setup, folder, *, steps: int = STEPS, output=None, budget_bytes: int = AMPLE_BYTES) -> MethodTrainer:
    model = load_model(setup, folder, device_kind="emulated")
    session = open_method(setup, model, EmulatedDevice(budget_bytes), seed=0)
    examples = random_examples(6, length=setup.seq_len, vocab_size=setup.model.vocab_size)
    options = TrainingOptions(steps=steps, learning_rate=LEARNING_RATE, warmup_fraction=0.0)
    return MethodTrainer(session, examples, options, pad_id=0, meft_version="0.0.0", output=output, setup=setup)


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
    read = checked(from_config_file(tmp_path / "adapter_config.json"))
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
        from_config_file(path)


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
