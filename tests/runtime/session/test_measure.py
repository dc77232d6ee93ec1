"""The shape of a family without a closed form, against the class itself on the meta device."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from meft.planner.models.configs import shape_from_config
from meft.runtime.session.measure import measured_shape

SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
CONFIGS = {
    "mixtral": GATED | EXPERTS,
    "olmoe": GATED | EXPERTS,
    "qwen2_moe": GATED | EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "deepseek_v3": GATED | EXPERTS | LATENT | {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1},
    "cohere": GATED,
    "gptj": {"vocab_size": 128, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
}


def on_meta(config: dict):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_counts_are_those_of_the_class(model_type) -> None:
    config = {"model_type": model_type, **CONFIGS[model_type]}
    shape, model = measured_shape(config, name="any"), on_meta(config)
    assert shape.num_parameters == model.num_parameters() == sum(each.numel() for each in model.parameters())
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (3, 32, 128)
    assert shape.measured.without_ffn is None
    layers = shape.num_layers * (shape.measured.attention_parameters + shape.measured.active_ffn_parameters)
    idle = shape.num_parameters - shape.measured.active_parameters
    assert layers == pytest.approx(shape.measured.block_parameters - idle, abs=2 * shape.num_layers)


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_meet() -> None:
    shape = measured_shape({"model_type": "mixtral", **CONFIGS["mixtral"]}, name="any")
    one_expert = 3 * 32 * 48
    assert shape.num_parameters - shape.measured.active_parameters == 3 * 2 * one_expert
    assert (shape.measured.experts, shape.measured.active_experts) == (4, 2)


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": True, "tie_word_embeddings": True}, {"head_dim": None, "num_key_value_heads": None}],
)
def test_qwen3_moe_by_closed_form_is_the_class_read(changes) -> None:
    config = {"model_type": "qwen3_moe", **GATED, **EXPERTS, "moe_intermediate_size": 16, **changes}
    config = {name: value for name, value in config.items() if value is not None} | {"max_position_embeddings": 64}
    closed, read = shape_from_config(config, name="any"), measured_shape(config, name="any")
    exact = ("parameters", "active_parameters", "block_parameters", "attention_parameters", "active_ffn_parameters")
    for field in (*exact, "experts", "active_experts", "linears", "class_name"):
        assert getattr(closed.measured, field) == getattr(read.measured, field), field


def test_the_published_qwen3_30b_counts() -> None:
    published = {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128}
    published |= {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    published |= {"vocab_size": 151_936, "max_position_embeddings": 40_960, "num_experts_per_tok": 8}
    shape = shape_from_config({"model_type": "qwen3_moe", **published}, name="qwen3-30b-a3b")
    assert shape.num_parameters == on_meta({"model_type": "qwen3_moe", **published}).num_parameters() == 30_532_122_624
    assert shape.measured.active_parameters == 3_353_032_704  # its name says A3B
