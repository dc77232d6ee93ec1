"""An adapter in its base's FFNs: the same outputs from an ordinary model; what does not fold is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sessions import EXPERTS, small_plan
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from meft.planner.base.errors import UsageError
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.folding import export_folded

IDS = torch.arange(4, 20).view(1, 16)


def gpt2_folder(folder: Path, tokenizer, activation: str) -> Path:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 1024}
    config = GPT2Config(activation_function=activation, bos_token_id=2, eos_token_id=3, **sizes)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(base, folder: Path, model_folder: Path, choice: dict[str, object]) -> torch.Tensor:
    """An adapter whose rows are not zero, saved; its logits at inference."""
    plan = small_plan(model_folder, choice=choice, grad_accum=1)
    model = AdapterModel.from_plan(base, plan, device="emulated")
    optimizer = model.optimizer(learning_rate=1e-1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_relu_ffn_takes_the_adapter_in(glass_tokenizer, tmp_path) -> None:
    folder = gpt2_folder(tmp_path / "base", glass_tokenizer, "relu")
    base = GPT2LMHeadModel.from_pretrained(folder)
    before = base(input_ids=IDS).logits
    expected = trained(base, tmp_path / "adapter", folder, {"top_k": 128})
    assert not torch.allclose(expected, before, atol=1e-2)
    assert export_folded(folder, tmp_path / "adapter", tmp_path / "folded") == 4 * 32 + 128
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", trust_remote_code=False).eval()
    assert loaded.config.n_inner == 256
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=IDS).logits, expected, atol=1e-5)
    with pytest.raises(UsageError, match="is there already"):
        export_folded(folder, tmp_path / "adapter", tmp_path / "folded")


@pytest.mark.parametrize(
    ("activation", "choice", "message"),
    [
        ("gelu_new", {}, "its FFN has gelu_new where the adapter has ReLU"),
        ("relu", EXPERTS, "routing key-experts: each token's router gates its rows"),
        (
            "relu",
            {"top_k": 2},
            r"in training \d+% of the 128 rows were active .* another function",
        ),
    ],
)
def test_what_does_not_fold_is_said(glass_tokenizer, tmp_path, activation, choice, message) -> None:
    folder = gpt2_folder(tmp_path / "base", glass_tokenizer, activation)
    trained(GPT2LMHeadModel.from_pretrained(folder), tmp_path / "adapter", folder, choice)
    with pytest.raises(UsageError, match=message):
        export_folded(folder, tmp_path / "adapter", tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_a_gated_ffn_keeps_its_adapter_beside_it(glass_folder, tmp_path) -> None:
    trained(LlamaForCausalLM.from_pretrained(glass_folder), tmp_path / "adapter", glass_folder, {})
    with pytest.raises(UsageError, match=r"its FFN is gated, .*AdapterModel\.from_pretrained loads it"):
        export_folded(glass_folder, tmp_path / "adapter", tmp_path / "folded")
