"""Weights that a folder stores quantized: read from its config, counted tensor by tensor."""

from __future__ import annotations

import pytest

from meft.planner.base.errors import UsageError
from meft.planner.models.linears import linear_layers
from meft.planner.models.shapes import shape_of
from meft.planner.models.stored import stored_weights
from meft.planner.terms.weights import linear_weights_bytes

LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
LLAMA |= {"num_attention_heads": 4, "max_position_embeddings": 64}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 64]}
PACKED = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
COMPRESSED = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def stored(quantization):
    return stored_weights(LLAMA | {"quantization_config": quantization}, name="tiny")


@pytest.mark.parametrize(
    ("quantization", "tensors"),
    [
        # one layer of 64 inputs and 128 outputs: 8,192 weights
        (AWQ, (4096, 2 * 128 * 2, 2 * 128 // 2)),  # packed; 2 groups of fp16 scales; 2 groups of 4-bit zero points
        (GPTQ, (4096, 2 * 128 * 2, 2 * 128 // 2, 64 * 4)),  # and each input's group
        (GPTQ | {"group_size": -1}, (4096, 128 * 2, 128 // 2, 64 * 4)),
        (FP8, (8192, 8 * 1 * 4)),  # 128/16 x 64/64 blocks of fp32 scales
        ({"quant_method": "fp8"}, (8192, 4)),
        ({"quant_method": "fbgemm_fp8"}, (8192, 128 * 4)),
        (COMPRESSED | {"config_groups": {"group_0": {"weights": PACKED}}}, (4096, 2 * 128 * 2, 16)),
        (
            COMPRESSED | {"config_groups": {"a": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}}},
            (8192, 2),
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, (8192, 128 * 4)),
        ({"load_in_8bit": True}, (8192, 128 * 4)),
    ],
)
def test_one_layer_by_hand(quantization, tensors) -> None:
    assert stored(quantization).tensor_bytes(inputs=64, outputs=128) == tensors


def test_a_model_s_linear_layers_are_the_sum_and_what_is_left_out_stays_in_16_bits() -> None:
    shape = shape_of(LLAMA | {"quantization_config": AWQ}, name="tiny")
    layers = linear_layers(shape)
    one = sum(sum(shape.stored.tensor_bytes(inputs=layer.inputs, outputs=layer.outputs)) for layer in layers)
    assert linear_weights_bytes(shape, dtype="bf16", double_quant=False) == 2 * one
    left_out = AWQ | {"modules_to_not_convert": ["down_proj", "model.layers.1.mlp.up_proj"]}
    fewer = shape_of(LLAMA | {"quantization_config": left_out}, name="tiny")
    as_stored = sum(stored(AWQ).tensor_bytes(inputs=128, outputs=64))
    up = sum(stored(AWQ).tensor_bytes(inputs=64, outputs=128))
    plain = 64 * 128 * 2
    expected = 2 * one + 2 * (plain - as_stored) + plain - up
    assert linear_weights_bytes(fewer, dtype="bf16", double_quant=False) == expected
    assert shape.num_parameters == fewer.num_parameters == shape_of(LLAMA, name="tiny").num_parameters


def test_bitsandbytes_four_bits_are_the_planner_s_nf4() -> None:
    plain = shape_of(LLAMA, name="tiny")
    for double_quant in (False, True):
        quantization = NF4 | {"bnb_4bit_use_double_quant": double_quant}
        shape = shape_of(LLAMA | {"quantization_config": quantization}, name="tiny")
        assert shape.stored.double_quant is double_quant
        sizes = [linear_weights_bytes(each, dtype="nf4", double_quant=double_quant) for each in (shape, plain)]
        assert abs(sizes[0] - sizes[1]) <= 4 * 14  # one layer's second scales are rounded up, not all layers' at once


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "hqq"}, "stored by quantization_config 'hqq', whose bytes are not known here; known: bits"),
        ({"quant_method": "mxfp4"}, "'mxfp4', whose bytes are not known"),
        (GPTQ | {"bits": "four"}, "quantization_config of gptq cannot be read"),
        (
            COMPRESSED | {"config_groups": {"a": {"weights": {"num_bits": 2, "type": "int"}}}},
            "int of 2 bits; known are",
        ),
        (COMPRESSED, "compressed-tensors cannot be read"),
        ([4], "quantization_config is not an object"),
    ],
)
def test_what_is_not_known_is_refused(quantization, reason) -> None:
    with pytest.raises(UsageError, match=reason):
        stored(quantization)


@pytest.mark.parametrize(
    ("entry", "path", "skipped"),
    [
        ("lm_head", "model.layers.0.mlp.up_proj", False),
        ("mlp", "model.layers.0.mlp.up_proj", True),
        ("layers.1", "model.layers.10.mlp.up_proj", False),
        ("model.layers.1.self_attn", "model.layers.1.self_attn.q_proj", True),
        (r"re:.*self_attn\.q_proj", "model.layers.1.self_attn.q_proj", True),
        ("re:(", "model.layers.1.self_attn.q_proj", False),
    ],
)
def test_what_is_left_out_is_named_whole_in_part_or_by_a_pattern(entry, path, skipped) -> None:
    assert stored(AWQ | {"modules_to_not_convert": [entry]}).skips(path) is skipped
