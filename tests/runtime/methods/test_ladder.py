"""Ladder side tuning: the plainly written one, a backbone without a graph, what the books show, and its whole life."""

from __future__ import annotations

import json

import pytest
import torch
from method_runs import LEARNING_RATE, small_setup, trainer_of
from torch import nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from meft.planner.base.errors import UsageError
from meft.planner.models.configs import shape_from_config
from meft.planner.records.ladder import kept_layers, ladder_sizes, side_shape
from meft.planner.simulation.run import simulate
from meft.planner.simulation.stream import stream_peaks
from meft.runtime.methods.generating import generator_of
from meft.runtime.methods.ladder import LadderModel
from meft.runtime.methods.opening import check_method, load_model, model_shape
from meft.runtime.methods.saving import load_method, save_method
from meft.runtime.trace.run import trace_training
from meft.runtime.training.training import TrainingOptions


def ladder_setup(folder, **fields: object):
    return small_setup(folder, method="lst", **({"reduction": 4} | fields))


def plain_logits(model: LadderModel, ids: torch.Tensor) -> torch.Tensor:
    """LST as the paper's equations have it: first the whole backbone, then the side network, step by step."""
    base, ladder = model.base, model.ladder
    with torch.no_grad():
        known = base.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    seen: list[torch.Tensor] = []  # the last of transformers' is normed
    hook = base.model.layers[-1].register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad():
        base.model(ids, use_cache=False)
    hook.remove()
    hidden = [*known[:-1], seen[0]]
    rotary = base.model.rotary_emb(hidden[0], position_ids=torch.arange(ids.shape[1])[None])
    state = hidden[0] @ ladder.enter.weight.T
    for place, layer in enumerate(model.layers):
        gate = 1 / (1 + torch.exp(-ladder.gates[place] / 0.1))
        state = gate * state + (1 - gate) * (hidden[layer + 1] @ ladder.down[place].weight.T)
        block = ladder.blocks[place]
        normed = block.input_layernorm(state)
        state = state + block.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
        state = state + block.mlp(block.post_attention_layernorm(state))
    return base.lm_head(base.model.norm(hidden[-1] + state @ ladder.up.weight.T))


@pytest.mark.parametrize("dropped", [0, 1])
def test_it_is_the_plainly_written_one(tiny_folder, dropped) -> None:
    trainer = trainer_of(ladder_setup(tiny_folder, dropped_layers=dropped), tiny_folder, steps=6)
    trainer.run()
    model, ids = trainer.session.model, torch.randint(4, 96, (2, 10), generator=torch.Generator().manual_seed(1))
    assert len(model.ladder.blocks) == 2 - dropped
    torch.testing.assert_close(model(ids).logits, plain_logits(model, ids), rtol=1e-4, atol=1e-5)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    found = [each.grad.clone() for each in trainer.session.trained]
    model.zero_grad()
    logits = plain_logits(model, ids)
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for mine, parameter in zip(found, trainer.session.trained, strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-6)


def test_it_begins_as_the_model_is_and_learns(tiny_folder) -> None:
    trainer = trainer_of(ladder_setup(tiny_folder), tiny_folder, steps=12)
    model, ids = trainer.session.model, torch.tensor([[5, 6, 7]])
    plain = LlamaForCausalLM.from_pretrained(tiny_folder)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    frozen = [each.clone() for each in model.base.parameters()]
    trainer.run()
    assert trainer.history.losses[-1] < 0.98 * trainer.history.losses[0]
    assert all(map(torch.equal, model.base.parameters(), frozen))
    assert all(gate.abs() > 0 for gate in model.ladder.gates)


def test_nothing_of_the_backbone_is_kept_for_backward(tiny_folder) -> None:
    """Its blocks give tensors without a graph; of each only the output stays, until its projection's backward."""
    trainer = trainer_of(ladder_setup(tiny_folder), tiny_folder, steps=1)
    outputs: list[torch.Tensor] = []
    for block in trainer.session.model.base.model.layers:
        block.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        trainer.session.model(trainer.batch(0).input_ids)
    assert not any(each.requires_grad for each in outputs)
    wide = [shape for shape in kept if shape[-1:] == (128,) and len(shape) == 3]  # the backbone's inner size
    assert wide == []


def test_the_books_show_it(glass_folder) -> None:
    """At the same tokens the ladder takes less than LoRA of any rank, whose graph goes through the backbone."""
    peaks = {}
    for setup in (
        ladder_setup(glass_folder, reduction=8, seq_len=64),
        small_setup(glass_folder, method="lora", rank=1, target_modules=("all-linear",), seq_len=64),
    ):
        trainer = trainer_of(setup, glass_folder, steps=2)
        trainer.run()
        peaks[setup.method] = trainer.measured.peaks.allocated_bytes
    assert peaks["lst"] < 0.7 * peaks["lora"]


@pytest.mark.parametrize(
    "fields",
    [{}, {"reduction": 2, "dropped_layers": 1}, {"weights_dtype": "bf16"}, {"batch_size": 4, "seq_len": 48}],
    ids=["plain", "dropped", "bf16", "more-tokens"],
)
def test_its_closed_form_is_the_trace_and_the_run(tiny_folder, fields) -> None:
    setup = ladder_setup(tiny_folder, **({"seq_len": 32} | fields))
    trainer = trainer_of(setup, tiny_folder, steps=2)
    trainer.run()
    observed, config = trainer.measured.peaks.allocated_bytes, json.loads((tiny_folder / "config.json").read_text())
    assert stream_peaks(trace_training(setup, config)).allocated_bytes == observed
    assert stream_peaks(simulate(setup)).allocated_bytes == pytest.approx(observed, rel=0.01)
    counted = sum(ladder_sizes(setup.model, setup.reduction, setup.dropped_layers))
    assert trainer.session.trainable_parameters == counted


def test_it_is_the_trace_on_a_card_too(tiny_folder) -> None:
    setup = ladder_setup(tiny_folder, seq_len=32, emulated=False, outputs_kept=True)
    config = json.loads((tiny_folder / "config.json").read_text())
    traced = stream_peaks(trace_training(setup, config, workspace_bytes=1 << 20))
    predicted = stream_peaks(simulate(setup, workspace_bytes=1 << 20))
    assert predicted.allocated_bytes == pytest.approx(traced.allocated_bytes, rel=0.01)


def test_saved_loaded_resumed_and_asked(tiny_folder, tmp_path) -> None:
    setup = ladder_setup(tiny_folder)
    whole, half = trainer_of(setup, tiny_folder, steps=4), trainer_of(setup, tiny_folder, steps=4, output=tmp_path)
    whole.run()
    half.on_step = lambda progress: setattr(half, "stop_requested", progress.step == 2)
    half.run()
    resumed = trainer_of(setup, tiny_folder, steps=4, output=tmp_path)
    resumed.options = TrainingOptions(steps=4, learning_rate=LEARNING_RATE, warmup_fraction=0.0)
    resumed.resume(tmp_path / "checkpoint-00000002")
    resumed.run()
    assert resumed.history.losses == whole.history.losses
    assert all(map(torch.equal, resumed.session.trained, whole.session.trained))
    save_method(whole.session, setup, tmp_path / "adapter", meft_version="0.0.0")
    loaded = load_method(load_model(setup, tiny_folder, device_kind="emulated"), tmp_path / "adapter")
    ids, mask = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    how = {"max_new_tokens": 3, "pad_id": 0}
    said = [generator_of(model).generate(ids, mask, **how) for model in (loaded, whole.session.model)]
    assert torch.equal(*said)
    following = loaded(torch.tensor([[5, 6]])).logits[0, -1].argmax()
    assert said[0][0, 0] == following


def test_the_side_network_has_the_heads_that_fit() -> None:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3).to_dict()
    side = side_shape(shape_from_config(config, name="like SmolLM2"), 3)
    assert (side.width, side.inner, side.num_heads, side.num_kv_heads, side.head_dim) == (192, 512, 3, 1, 64)
    assert kept_layers(30, 15) == tuple(range(1, 30, 2))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"reduction": 1}, "is not between 2 and the hidden size"),
        ({"dropped_layers": 2}, "leave at least one"),
        ({"weights_dtype": "nf4"}, "pruned from weights that are not quantized"),
        ({"activation_checkpointing": True}, "keeps nothing of the model's layers"),
    ],
)
def test_what_cannot_be_is_refused(tiny_folder, fields, says) -> None:
    with pytest.raises(UsageError, match=says):
        check_method(ladder_setup(tiny_folder, **fields))


def test_another_family_is_refused(tmp_path) -> None:
    GPT2Config(n_embd=32, n_layer=2, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="for Llama and its descendants"):
        side_shape(model_shape(tmp_path), 4)
