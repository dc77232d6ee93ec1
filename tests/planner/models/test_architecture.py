"""Parameter counts, against arithmetic by hand, published totals, and the real architectures of transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft.planner.base.errors import UsageError
from meft.planner.models.architecture import ModelShape
from meft.planner.models.catalogue import load_model, model_names
from meft.planner.models.configs import SUPPORTED_MODEL_TYPES, shape_from_config

# Published totals, to the last digit: the numbers of parameters that the hub shows beside the weights.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
    "gpt2-medium": 354_823_168,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.3-70b": 70_553_706_496,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo": 12_247_782_400,
    "phi-4": 14_659_507_200,
    "smollm3-3b": 3_075_098_624,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
}

LLAMA = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 10, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
GATED = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {key: value for key, value in GATED.items() if key != "intermediate_size"} | {"ffn_dim": 40}

# Switches and defaults that the built-in models do not exercise; each is built for real by transformers.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama, only sizes": GATED | {"model_type": "llama"},
    "llama, biases": GATED | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, tied, own head size": GATED | {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 10},
    "mistral, heads do not divide D": GATED
    | {"model_type": "mistral", "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8},
    "mistral, kv heads absent": GATED | {"model_type": "mistral", "hidden_size": 32, "num_attention_heads": 16},
    "qwen2, kv heads null": GATED | {"model_type": "qwen2", "num_key_value_heads": None},
    "qwen3, head size absent": GATED | {"model_type": "qwen3", "num_key_value_heads": 2},
    "qwen3, biases": GATED | {"model_type": "qwen3", "num_key_value_heads": 2, "attention_bias": True},
    "gemma, kv heads absent": GATED | {"model_type": "gemma", "num_attention_heads": 16},
    "gemma, biases, untied": GATED
    | {"model_type": "gemma", "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": False},
    "gemma2, only sizes": GATED | {"model_type": "gemma2"},
    "phi, only sizes": GATED | {"model_type": "phi"},
    "phi, normed q and k, fewer kv heads": GATED
    | {"model_type": "phi", "qk_layernorm": True, "num_key_value_heads": 2},
    "phi3, fewer kv heads": GATED | {"model_type": "phi3", "num_key_value_heads": 2},
    "phi3, tied": GATED | {"model_type": "phi3", "tie_word_embeddings": True},
    "gpt2, only sizes": GPT2 | {"bos_token_id": 1, "eos_token_id": 1},
    "gpt2, own FFN, untied": GPT2 | {"n_inner": 6, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 1},
    "gpt_neox, only sizes": GATED | {"model_type": "gpt_neox"},
    "gpt_neox, no attention bias": GATED | {"model_type": "gpt_neox", "attention_bias": False},
    "olmo2, only sizes": GATED | {"model_type": "olmo2"},
    "olmo2, fewer kv heads, biases, tied": GATED
    | {"model_type": "olmo2", "num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": True},
    "granite, only sizes": GATED | {"model_type": "granite"},
    "granite, biases, tied": GATED
    | {"model_type": "granite", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "smollm3, only sizes": GATED | {"model_type": "smollm3"},
    "smollm3, biases, untied": GATED
    | {"model_type": "smollm3", "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
    | {"tie_word_embeddings": False, "no_rope_layers": [1, 0]},
    "gemma3_text, only sizes": GATED | {"model_type": "gemma3_text"},
    "gemma3_text, own head size, biases, untied": GATED
    | {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True}
    | {"tie_word_embeddings": False},
    "opt, only sizes": OPT | {"model_type": "opt"},
    "opt, no biases, untied": OPT | {"model_type": "opt", "enable_bias": False, "tie_word_embeddings": False},
}


def shape(config: dict[str, Any]) -> ModelShape:
    return shape_from_config(config, name="test")


def parameters_in_transformers(config: dict[str, Any]) -> int:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    built = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(built)
    return sum(parameter.numel() for parameter in model.parameters())


def test_llama_by_hand() -> None:
    tiny = shape(LLAMA)
    assert tiny.head_dim == 2
    assert tiny.embedding_parameters == 40  # 10 * 4
    assert tiny.head_parameters == 40
    assert tiny.position_parameters == 0
    assert tiny.attention_parameters_per_layer == 48  # q 4*4, k 4*2, v 4*2, o 4*4
    assert tiny.mlp_parameters_per_layer == 72  # 3 * 4 * 6
    assert tiny.linear_parameters_per_layer == 120
    assert tiny.norm_parameters == 20  # 2 layers * 2 * 4, and the final 4
    assert tiny.bias_parameters == 0
    assert tiny.num_parameters == 340  # 40 + 40 + 2*120 + 20


def test_gpt2_by_hand() -> None:
    tiny = shape(GPT2)
    assert tiny.embedding_parameters == 40
    assert tiny.head_parameters == 0  # tied
    assert tiny.position_parameters == 32  # 8 * 4
    assert tiny.linear_parameters_per_layer == 192  # attention 4 * 4*4, FFN 2 * 4*16
    assert tiny.norm_parameters == 24  # (2*4 + 4) weights and as many biases
    assert tiny.bias_parameters == 36  # q, k, v 12, output 4, up 16, down 4
    assert tiny.num_parameters == 324  # 40 + 32 + 192 + 24 + 36


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    assert load_model(name)[0].num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", model_names())
def test_built_in_models_count_as_in_transformers(name: str) -> None:
    model, config, _ = load_model(name)
    assert model.num_parameters == parameters_in_transformers(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_count_as_in_transformers(variant: str) -> None:
    assert shape(VARIANTS[variant]).num_parameters == parameters_in_transformers(VARIANTS[variant])


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "qwen3-0.6b", "phi-2", "gpt2", "gemma-2-2b", "olmo-2-1b", "gemma-3-1b"]
)
def test_parts_count_as_in_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, config, _ = load_model(name)
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    head = real.get_output_embeddings()
    embeddings = [module for module in real.modules() if isinstance(module, torch.nn.Embedding)]
    linear = [
        module
        for module in real.modules()
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D) and module is not head
    ]
    biases = [module.bias for module in (*linear, head) if getattr(module, "bias", None) is not None]
    norms = [module for module in real.modules() if "Norm" in type(module).__name__]

    def count(tensors: Any) -> int:
        return sum(tensor.numel() for tensor in tensors)

    assert count(module.weight for module in embeddings) == model.embedding_parameters + model.position_parameters
    assert count(module.weight for module in linear) == model.num_layers * model.linear_parameters_per_layer
    assert count(biases) == model.bias_parameters
    assert count(tensor for norm in norms for tensor in norm.parameters()) == model.norm_parameters


@given(layers=st.integers(1, 200), heads=st.sampled_from([1, 2, 4]), tied=st.booleans(), bias=st.booleans())
def test_every_layer_adds_the_same(layers: int, heads: int, tied: bool, bias: bool) -> None:
    switches = {"num_key_value_heads": heads, "tie_word_embeddings": tied, "attention_bias": bias}
    config = LLAMA | {"num_attention_heads": 4, "num_hidden_layers": layers} | switches
    here, deeper = shape(config), shape(config | {"num_hidden_layers": layers + 1})
    norms = 2 * here.hidden_size
    per_layer = here.linear_parameters_per_layer + here.bias_parameters_per_layer + norms
    assert deeper.num_parameters - here.num_parameters == per_layer


def test_what_is_read_beside_the_sizes() -> None:
    phi = load_model("phi-2")[0]
    assert (phi.parallel_blocks, phi.head_bias, phi.norm, phi.activation) == (True, True, "layernorm", "gelu_new")
    gemma = load_model("gemma-2-2b")[0]
    assert (gemma.logit_softcap, gemma.norms_per_layer, gemma.head_dim) == (True, 4, 256)
    assert not shape(VARIANTS["gemma2, only sizes"] | {"final_logit_softcapping": None}).logit_softcap
    assert not load_model("llama-7b")[0].logit_softcap
    assert shape(VARIANTS["gpt_neox, only sizes"]).parallel_blocks
    assert not shape(VARIANTS["gpt_neox, only sizes"] | {"use_parallel_residual": False}).parallel_blocks
    assert load_model("gpt2")[0].max_positions == 1024


def test_null_kv_heads_are_as_many_as_heads() -> None:
    null = GATED | {"model_type": "mistral", "num_key_value_heads": None}
    assert shape(null).num_kv_heads == 4  # absent, it would be Mistral's 8
    assert shape(VARIANTS["mistral, kv heads absent"]).num_kv_heads == 8


def test_every_supported_type_has_a_built_in_model() -> None:
    assert {load_model(name)[0].model_type for name in model_names()} == set(SUPPORTED_MODEL_TYPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mamba"},
            r"model_type 'mamba' is not supported; supported: gemma, gemma2, gemma3_text, .*3$",
        ),
        ({"model_type": None}, "no model_type; is this the config.json"),
        ({"hidden_size": None}, "config field hidden_size is missing"),
        ({"vocab_size": "32k"}, "vocab_size = '32k' is not a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 is not a positive integer"),
        ({"intermediate_size": -6}, "intermediate_size = -6 is not a positive integer"),
        ({"intermediate_size": True}, "intermediate_size = True is not a positive integer"),
        ({"hidden_size": 4.0}, "hidden_size = 4.0 is not a positive integer"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no' is not true or false"),
        ({"hidden_act": 3}, "hidden_act = 3 is not text"),
        ({"num_attention_heads": 3}, "num_attention_heads = 3 is not a divisor of hidden_size 4"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
    ],
)
def test_bad_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        shape_from_config(LLAMA | change, name="bad")
    assert str(caught.value).startswith("model bad: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before = False is not supported"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False is not supported"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True is not supported"),
        ({"word_embed_proj_dim": 12}, "word_embed_proj_dim = 12 is not hidden_size 24"),
    ],
)
def test_unusual_opt_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shape(VARIANTS["opt, only sizes"] | change)


def test_gpt2_with_cross_attention_is_refused() -> None:
    with pytest.raises(UsageError, match="add_cross_attention = True is not supported"):
        shape(GPT2 | {"add_cross_attention": True})


def test_what_new_families_have_of_their_own() -> None:
    smollm3 = load_model("smollm3-3b")[0]
    assert (smollm3.rotary_pause, smollm3.tied_embeddings) == (4, True)
    assert shape(VARIANTS["smollm3, only sizes"]).rotary_pause == 0  # of two layers, none is the fourth
    assert shape(VARIANTS["smollm3, only sizes"] | {"no_rope_layers": [1, 1]}).rotary_pause == 0
    with pytest.raises(UsageError, match=r"no_rope_layers = \[0, 1\] is not a regular pattern"):
        shape(VARIANTS["smollm3, only sizes"] | {"no_rope_layers": [0, 1]})
    with pytest.raises(UsageError, match="use_sliding_window = True is not supported"):
        shape(VARIANTS["smollm3, only sizes"] | {"use_sliding_window": True})
    olmo = load_model("olmo-2-1b")[0]
    assert (olmo.norms_after, olmo.joint_head_norms) == (True, True)
    gemma = load_model("gemma-3-1b")[0]
    assert (gemma.rotary_sets, gemma.window, gemma.logit_softcap) == (2, 512, False)
    assert shape(VARIANTS["gemma3_text, only sizes"]).rotary_sets == 1  # of two layers, none is the sixth
    with pytest.raises(UsageError, match="use_bidirectional_attention = True is not supported"):
        shape(VARIANTS["gemma3_text, only sizes"] | {"use_bidirectional_attention": True})


def test_gemma_s_published_gelu_is_the_approximation_that_it_loads_with() -> None:
    transformers = pytest.importorskip("transformers")
    config = GATED | {"model_type": "gemma", "num_attention_heads": 16, "hidden_act": "gelu", "hidden_activation": None}
    loaded = transformers.AutoConfig.for_model(**config).to_dict()
    assert shape(config).activation == shape(loaded).activation == "gelu_pytorch_tanh"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_reads_the_same_once_transformers_has_loaded_it(variant) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoConfig.for_model(**VARIANTS[variant]).to_dict()
    assert shape(VARIANTS[variant]).differences(shape(loaded)) == {}


def test_the_text_part_of_a_model_of_text_and_images(tmp_path) -> None:
    """Gemma 3's larger configs name few sizes; 34 layers of the 4B one, its other sizes at their defaults."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, read, folder = load_model(str(tmp_path))
    assert found.num_parameters == PUBLISHED["gemma-3-4b"] == parameters_in_transformers(read)
    assert folder == str(tmp_path.resolve())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "another"}))
    with pytest.raises(UsageError, match="no causal LM of model_type 'another'"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("num_hidden_layers", 100_000, "512"),
        ("head_dim", 10**18, "65,536"),
        ("vocab_size", 2**63, "67,108,864"),
        ("hidden_size", 2**21, "1,048,576"),
        ("max_position_embeddings", 10**30, "1,099,511,627,776"),
    ],
)
def test_a_size_that_no_model_has_is_refused_by_its_field(field, value, limit) -> None:
    with pytest.raises(UsageError, match=rf"config field {field} = {value} is not within {limit}, the largest that is"):
        shape_from_config(LLAMA | {field: value}, name="x")


def test_sizes_that_are_too_many_parameters_together_are_refused() -> None:
    large = {"hidden_size": 1 << 20, "intermediate_size": 1 << 24, "num_hidden_layers": 512, "head_dim": 2}
    with pytest.raises(UsageError, match=r"parameters are more than 17,592,186,044,416, the most that is read"):
        shape_from_config(LLAMA | large, name="x")


def test_a_value_that_is_refused_is_shown_shortened() -> None:
    with pytest.raises(UsageError, match=r"config field hidden_size = 'x+\.\.\. is not a positive integer$") as caught:
        shape_from_config(LLAMA | {"hidden_size": "x" * 100_000}, name="x")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("model_type", [{}, [], None, 5, True])
def test_a_model_type_that_is_no_text_is_one_line(tmp_path, model_type) -> None:
    """Also one that cannot be looked up in a table, which ended in a TypeError."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": model_type, "text_config": {}}))
    with pytest.raises(UsageError, match="config has no model_type"):
        load_model(str(path))
