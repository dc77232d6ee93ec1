"""Blocks and their FFNs are found by structure in whatever model; what has none is refused with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from meft.planner.base.errors import UsageError
from meft.runtime.adapter.adapter import add_to, ffn_input
from meft.runtime.adapter.blocks import decoder, decoder_blocks, ffn_modules

WIDTHS = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
GATED = {**WIDTHS, "num_hidden_layers": 2, "intermediate_size": 48, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FFN_NAMES = {
    "llama4_text": ("feed_forward", {"intermediate_size_mlp": 48, **EXPERTS}),
    "mixtral": ("mlp", EXPERTS),
    "qwen3_moe": ("mlp", EXPERTS),
    "recurrent_gemma": ("mlp_block", {"num_hidden_layers": 3}),
    "modernbert-decoder": ("mlp", {}),
    "granitemoe": ("block_sparse_moe", EXPERTS),
    "jamba": ("feed_forward", {"mamba_d_state": 4, "mamba_dt_rank": 4, **EXPERTS}),
}


def built(model_type: str, **changes: object) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(GATED | changes)))


@pytest.mark.parametrize("model_type", FFN_NAMES)
def test_the_ffn_is_found_whatever_its_name(model_type) -> None:
    name, changes = FFN_NAMES[model_type]
    model = built(model_type, **changes)
    assert ffn_modules(model) == [block.get_submodule(name) for block in model.model.layers]


def test_a_wrapper_s_text_decoder_is_meant_and_not_its_deeper_vision_tower() -> None:
    vision = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = AutoConfig.for_model("gemma3", text_config=GATED, vision_config=vision | {"image_size": 28})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert decoder_blocks(model) is model.model.language_model.layers
    assert decoder(model) is model.model.language_model
    assert len(ffn_modules(model)) == 2


def test_lists_of_experts_within_a_block_are_no_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            self.moe = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(16))})

    model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(2))})
    assert ffn_modules(model) == [block.moe for block in model["layers"]]


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        (
            "opt",
            {"ffn_dim": 48, "word_embed_proj_dim": 32},
            r"its blocks have no FFN module .*self_attn.* fc1, fc2",
        ),
        ("xlm", {"emb_dim": 32, "n_heads": 4, "n_layers": 2}, "no FFN module of their own"),
    ],
)
def test_blocks_without_an_ffn_module_are_refused_with_the_reason(model_type, changes, reason) -> None:
    with pytest.raises(UsageError, match=reason):
        ffn_modules(built(model_type, **changes))


def test_of_a_tuple_the_first_is_the_output() -> None:
    output, logits = torch.ones(2, 3, 4), torch.zeros(6, 2)
    added, kept = add_to((output, logits), torch.full((6, 4), 2.0))
    assert torch.equal(added, torch.full((2, 3, 4), 3.0))
    assert kept is logits
    with pytest.raises(UsageError, match="returns a dict"):
        add_to({"out": output}, torch.zeros(6, 4))


def test_the_input_is_the_first_tensor_by_position_or_by_name() -> None:
    hidden = torch.ones(1)
    assert ffn_input(nn.Identity(), (hidden,), {}) is hidden
    assert ffn_input(nn.Identity(), (), {"hidden_states": hidden}) is hidden
    with pytest.raises(UsageError, match="Identity was called without a tensor"):
        ffn_input(nn.Identity(), (), {})
