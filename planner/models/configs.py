"""``config.json`` of a Hugging Face causal LM, read as a :class:`~meft.planner.models.architecture.ModelShape`.

One reader for each ``model_type``. Letters: ``D`` hidden size, ``H`` heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meft.planner.base.errors import UsageError
from meft.planner.base.schema import shortened, validated
from meft.planner.models.architecture import SHAPE_LIMITS, ModelShape
from meft.planner.models.measured import Measured, MeasuredLinear

_SHAPE_FIELDS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_positions",
}
"""Fields of a config by the name that a shape has for them, where it is another one."""


class NoClosedForm(UsageError):
    """A known family in a variant that the closed form does not describe."""


def shape_from_config(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """Read a Hugging Face ``config.json``; ``name`` names the model in the record and in errors.

    Sizes must be present; switches that are absent take the default that transformers gives that ``model_type``.
    Raises :class:`UsageError` for an unsupported ``model_type`` and for a missing or invalid field.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UsageError(f"model {name}: config has no model_type; is this the config.json of a Hugging Face model?")
    reader = (_READERS | _COUNTED).get(model_type)
    if reader is None:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise UsageError(
            f"model {name}: model_type {shortened(repr(model_type))} is not supported; supported: {supported}"
        )
    fields = {"name": name, "model_type": model_type} | reader(_Fields(config, name))
    experts = fields.pop("experts", None)
    shape = validated(ModelShape, fields, source=f"model {name}")
    return shape if experts is None else _with_experts(shape, *experts)


def _with_experts(shape: ModelShape, experts: int, chosen: int, inner: int) -> ModelShape:
    """The shape of a decoder whose FFNs are ``experts`` gated ones of ``inner``, of which a token meets ``chosen``,
    and a router."""
    dense = shape.num_parameters - shape.num_layers * shape.mlp_parameters_per_layer
    one, router = 3 * shape.hidden_size * inner, shape.hidden_size * experts
    layers, attention = shape.num_layers, shape.attention_parameters_per_layer
    linears = (("q_proj", shape.query_size), ("k_proj", shape.kv_size), ("v_proj", shape.kv_size))
    sizes = [(name, shape.hidden_size, outputs) for name, outputs in linears]
    sizes.append(("o_proj", shape.query_size, shape.hidden_size))
    measured = Measured(
        class_name="Qwen3MoeForCausalLM",
        parameters=dense + layers * (experts * one + router),
        active_parameters=dense + layers * (chosen * one + router),
        block_parameters=layers * (attention + experts * one + router),
        attention_parameters=attention,
        active_ffn_parameters=chosen * one + router,
        experts=experts,
        active_experts=chosen,
        linears=tuple(
            MeasuredLinear(name=name, place="attention", inputs=i, outputs=o, bias=shape.qkv_bias, count=layers)
            for name, i, o in sizes
        ),
    )
    return ModelShape.model_validate({**shape.model_dump(), "measured": measured})


@dataclass(frozen=True)
class _Fields:
    """Typed look-ups in a config; the first of several alternative names that is present and not null wins."""

    config: Mapping[str, Any]
    model: str

    def size(self, *names: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._value(names, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.invalid(names[0], value, "a positive integer")
        limit = SHAPE_LIMITS.get(_SHAPE_FIELDS.get(names[0], names[0]))
        if limit is not None and value > limit:
            raise self.invalid(names[0], value, f"within {limit:,}, the largest that is read")
        return value

    def has(self, name: str) -> bool:
        """Present and not null."""
        return self.config.get(name) is not None

    def flag(self, name: str, *, default: bool) -> bool:
        """A boolean."""
        value = self._value((name,), default)
        if not isinstance(value, bool):
            raise self.invalid(name, value, "true or false")
        return value

    def text(self, *names: str, default: str) -> str:
        """A string."""
        value = self._value(names, default)
        if not isinstance(value, str):
            raise self.invalid(names[0], value, "text")
        return value

    def fraction(self, *names: str, default: float) -> float:
        """A number from 0 to 1."""
        value = self._value(names, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise self.invalid(names[0], value, "a number from 0 to 1")
        return float(value)

    def rotary_fraction(self, *names: str, default: float) -> float:
        """The share of a head that is rotated; newer configs have it among their ``rope_parameters``."""
        parameters = self.config.get("rope_parameters")
        if isinstance(parameters, Mapping) and parameters.get("partial_rotary_factor") is not None:
            return _Fields(parameters, self.model).fraction("partial_rotary_factor", default=default)
        return self.fraction(*names, default=default)

    def require(self, name: str, expected: bool) -> None:
        """Refuse a variant whose layers are built differently."""
        if self.flag(name, default=expected) is not expected:
            raise NoClosedForm(f"model {self.model}: config field {name} = {not expected} is not supported")

    def invalid(self, name: str, value: object, expected: str) -> UsageError:
        """The error for a field of the wrong type or out of range."""
        return UsageError(f"model {self.model}: config field {name} = {shortened(repr(value))} is not {expected}")

    def _value(self, names: tuple[str, ...], default: object) -> Any:
        for name in names:
            if self.has(name):
                return self.config[name]
        if default is None:
            raise UsageError(f"model {self.model}: config field {names[0]} is missing")
        return default


def _sizes(fields: _Fields, *, own_head_dim: bool = False) -> dict[str, Any]:
    """Fields that most decoders name alike; head size is ``D / H`` and key-value heads are ``H`` until overridden."""
    hidden_size = fields.size("hidden_size", "n_embd")
    num_heads = fields.size("num_attention_heads", "n_head")
    if hidden_size % num_heads and not own_head_dim:
        raise fields.invalid("num_attention_heads", num_heads, f"a divisor of hidden_size {hidden_size}")
    return {
        "num_layers": fields.size("num_hidden_layers", "n_layer"),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "vocab_size": fields.size("vocab_size"),
        "max_positions": fields.size("max_position_embeddings", "n_positions"),
    }


def _kv_heads(fields: _Fields, *, absent: int) -> int:
    """Key-value heads: as many as heads when the field is null, ``absent`` when it is not there at all."""
    if "num_key_value_heads" in fields.config and fields.config["num_key_value_heads"] is None:
        return fields.size("num_attention_heads")
    return fields.size("num_key_value_heads", default=absent)


def _gated(fields: _Fields, *, kv_heads: int | None = None, head_dim: int | None = None) -> dict[str, Any]:
    """What LLaMA and its descendants share: RMSNorm twice per layer, gated FFN, no biases.

    ``kv_heads`` and ``head_dim`` are the family's defaults when the config has no such field.
    """
    sizes = _sizes(fields, own_head_dim=head_dim is not None or fields.has("head_dim"))
    return sizes | {
        "intermediate_size": fields.size("intermediate_size"),
        "num_kv_heads": _kv_heads(fields, absent=kv_heads or sizes["num_heads"]),
        "head_dim": fields.size("head_dim", default=head_dim or sizes["head_dim"]),
        "tied_embeddings": fields.flag("tie_word_embeddings", default=False),
        "gated_mlp": True,
        "activation": fields.text("hidden_act", default="silu"),
        "norm": "rmsnorm",
        "attention_dropout": fields.fraction("attention_dropout", default=0.0) > 0,
        "norms_per_layer": 2,
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
    }


def _attention_bias(fields: _Fields, *, default: bool) -> dict[str, Any]:
    bias = fields.flag("attention_bias", default=default)
    return {"qkv_bias": bias, "output_bias": bias}


def _window(fields: _Fields, *, absent: int = 0) -> dict[str, Any]:
    """The tokens that sliding layers see: nothing where the field is null, ``absent`` where it is not there."""
    if not fields.has("sliding_window"):
        absent = 0 if "sliding_window" in fields.config else absent
        return {"window": absent} if absent else {}
    return {"window": fields.size("sliding_window")}


def _sliding(kinds: Sequence[object]) -> dict[str, Any]:
    """Which layers slide, of their kinds; nothing is said where all do."""
    slides = tuple(str(kind).startswith("sliding") for kind in kinds)
    return {} if all(slides) else {"sliding_layers": slides}


def _upper_window(fields: _Fields, num_layers: int) -> dict[str, Any]:
    """Qwen's: if it is used at all, by the layers from ``max_window_layers`` on, unless their kinds are listed."""
    if not fields.flag("use_sliding_window", default=False):
        return {}
    kinds = fields.config.get("layer_types")
    if kinds is None:
        first = fields.size("max_window_layers", default=28)
        kinds = ["full" if layer < first else "sliding" for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.invalid("layer_types", kinds, f"a list of num_hidden_layers {num_layers} entries")
    found = _window(fields, absent=4096) | _sliding(kinds)
    return found if any(found.get("sliding_layers", (True,))) and "window" in found else {}


def _llama(fields: _Fields) -> dict[str, Any]:
    own = {"mlp_bias": fields.flag("mlp_bias", default=False)}
    return _gated(fields) | _attention_bias(fields, default=False) | own


def _mistral(fields: _Fields) -> dict[str, Any]:
    return _gated(fields, kv_heads=8) | _window(fields, absent=4096)


def _qwen2(fields: _Fields) -> dict[str, Any]:
    shape = _gated(fields, kv_heads=32)
    return shape | {"qkv_bias": True} | _upper_window(fields, shape["num_layers"])


def _qwen3(fields: _Fields) -> dict[str, Any]:
    shape = _gated(fields, kv_heads=32, head_dim=128) | {"head_norms_per_layer": 2}
    return shape | _attention_bias(fields, default=False) | _upper_window(fields, shape["num_layers"])


def _qwen3_moe(fields: _Fields) -> dict[str, Any]:
    """Every layer a mixture of experts, as published; its counts are exact, what it takes is traced."""
    shape = _gated(fields, kv_heads=4) | _attention_bias(fields, default=False) | {"head_norms_per_layer": 2}
    experts = fields.size("num_experts", "num_local_experts", default=128)
    chosen = fields.size("num_experts_per_tok", default=8)
    inner = fields.size("moe_intermediate_size", default=768)
    if chosen > experts:
        raise fields.invalid("num_experts_per_tok", chosen, f"within num_experts {experts}")
    if fields.config.get("mlp_only_layers") or fields.size("decoder_sparse_step", default=1) != 1:
        raise NoClosedForm(f"model {fields.model}: some layers have a dense FFN, which is not read by closed form")
    return shape | {"intermediate_size": chosen * inner, "experts": (experts, chosen, inner)}


def _olmo2(fields: _Fields) -> dict[str, Any]:
    own = {"head_norms_per_layer": 2, "joint_head_norms": True, "norms_after": True}
    return _gated(fields) | _attention_bias(fields, default=False) | own


def _granite(fields: _Fields) -> dict[str, Any]:
    own = {
        "mlp_bias": fields.flag("mlp_bias", default=False),
        "tied_embeddings": fields.flag("tie_word_embeddings", default=False),
    }
    return _gated(fields) | _attention_bias(fields, default=False) | own


def _smollm3(fields: _Fields) -> dict[str, Any]:
    fields.require("use_sliding_window", False)
    shape = _gated(fields, kv_heads=4) | _attention_bias(fields, default=False)
    own = {
        "mlp_bias": fields.flag("mlp_bias", default=False),
        "tied_embeddings": fields.flag("tie_word_embeddings", default=True),
        "rotary_pause": _rotary_pause(fields, shape["num_layers"]),
    }
    return shape | own


def _rotary_pause(fields: _Fields, num_layers: int) -> int:
    """The period of the layers without rotary positions: ``no_rope_layers`` has 1 for a layer that rotates."""
    listed = fields.config.get("no_rope_layers")
    if listed is None:
        interval = fields.size("no_rope_layer_interval", default=4)
        return interval if interval <= num_layers else 0
    if not isinstance(listed, list) or len(listed) != num_layers:
        raise fields.invalid("no_rope_layers", listed, f"a list of num_hidden_layers {num_layers} entries")
    pause = next((index for index, rotates in enumerate(listed, start=1) if not rotates), 0)
    if [int(bool(each)) for each in listed] != [
        int(not pause or index % pause > 0) for index in range(1, num_layers + 1)
    ]:
        raise NoClosedForm(str(fields.invalid("no_rope_layers", listed, "a regular pattern, which alone is supported")))
    return pause


def _gemma1(fields: _Fields) -> dict[str, Any]:
    """Published configs say ``gelu`` and mean its approximation, as transformers reads them."""
    activation = fields.text("hidden_act", default="gelu_pytorch_tanh")
    return _gemma(fields) | {"activation": "gelu_pytorch_tanh" if activation == "gelu" else activation}


def _gemma(fields: _Fields, *, kv_heads: int = 16) -> dict[str, Any]:
    own = {
        "tied_embeddings": fields.flag("tie_word_embeddings", default=True),
        "activation": fields.text("hidden_activation", "hidden_act", default="gelu_pytorch_tanh"),
    }
    return _gated(fields, kv_heads=kv_heads, head_dim=256) | _attention_bias(fields, default=False) | own


def _gemma2(fields: _Fields) -> dict[str, Any]:
    own = {
        "norms_per_layer": 4,  # before and after attention, before and after the FFN
        "logit_softcap": fields.config.get("final_logit_softcapping", 30.0) is not None,
    }
    return _gemma(fields, kv_heads=4) | own


def _gemma3_text(fields: _Fields) -> dict[str, Any]:
    """Published configs of the larger ones leave out what is at its default."""
    fields.require("use_bidirectional_attention", False)
    usual = {"num_attention_heads": 8, "vocab_size": 262_208, "max_position_embeddings": 131_072}
    filled = _Fields(usual | {name: value for name, value in fields.config.items() if value is not None}, fields.model)
    kinds = filled.config.get("layer_types")
    if kinds is None:
        pattern = filled.size("sliding_window_pattern", default=6)
        kinds = [
            "full" if (layer + 1) % pattern == 0 else "sliding" for layer in range(filled.size("num_hidden_layers"))
        ]
    if filled.has("attn_logit_softcapping"):
        cap = filled.config["attn_logit_softcapping"]
        raise NoClosedForm(str(filled.invalid("attn_logit_softcapping", cap, "null, as published")))
    own = {
        "norms_per_layer": 4,
        "head_norms_per_layer": 2,
        "logit_softcap": filled.has("final_logit_softcapping"),
        "rotary_sets": len(set(kinds)),
    }
    if any(kind.startswith("sliding") for kind in kinds):
        own |= {"window": filled.size("sliding_window", default=4096)} | _sliding(kinds)
    return _gemma(filled, kv_heads=4) | own


def _phi3(fields: _Fields) -> dict[str, Any]:
    own = {
        "rotary_fraction": fields.rotary_fraction("partial_rotary_factor", default=1.0),
        "hidden_dropout": fields.fraction("resid_pdrop", default=0.0) > 0,
    }
    return _gated(fields) | own | _window(fields)


def _plain(fields: _Fields, *, intermediate_size: int, activation: str, tied: bool) -> dict[str, Any]:
    """What GPT-2 and its descendants share: LayerNorm, plain FFN, biases on every linear layer."""
    return _sizes(fields) | {
        "intermediate_size": intermediate_size,
        "tied_embeddings": fields.flag("tie_word_embeddings", default=tied),
        "gated_mlp": False,
        "activation": activation,
        "norm": "layernorm",
        "norms_per_layer": 2,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    }


def _gpt2(fields: _Fields) -> dict[str, Any]:
    inner = fields.size("n_inner", default=4 * fields.size("n_embd", "hidden_size"))
    activation = fields.text("activation_function", default="gelu_new")
    shape = _plain(fields, intermediate_size=inner, activation=activation, tied=True)
    fields.require("add_cross_attention", False)
    own = {
        "learned_positions": shape["max_positions"],
        "hidden_dropout": fields.fraction("resid_pdrop", default=0.1) > 0,
        "embedding_dropout": fields.fraction("embd_pdrop", default=0.1) > 0,
        "attention_dropout": fields.fraction("attn_pdrop", default=0.1) > 0,
    }
    return shape | own


def _gpt_neox(fields: _Fields) -> dict[str, Any]:
    activation = fields.text("hidden_act", default="gelu")
    shape = _plain(fields, intermediate_size=fields.size("intermediate_size"), activation=activation, tied=False)
    parallel = fields.flag("use_parallel_residual", default=True)
    hidden_dropout = fields.fraction("hidden_dropout", default=0.0) > 0
    own = {
        "parallel_blocks": parallel,
        "rotary_fraction": fields.rotary_fraction("rotary_pct", default=0.25),
        "hidden_dropout": hidden_dropout,
        "embedding_dropout": hidden_dropout,
        "attention_dropout": fields.fraction("attention_dropout", default=0.0) > 0,
    }
    return shape | _attention_bias(fields, default=True) | own


def _phi(fields: _Fields) -> dict[str, Any]:
    activation = fields.text("hidden_act", default="gelu_new")
    shape = _plain(fields, intermediate_size=fields.size("intermediate_size"), activation=activation, tied=False)
    return shape | {
        "num_kv_heads": _kv_heads(fields, absent=shape["num_heads"]),
        "norms_per_layer": 1,
        "head_norms_per_layer": 2 if fields.flag("qk_layernorm", default=False) else 0,
        "head_bias": True,
        "parallel_blocks": True,
        "rotary_fraction": fields.rotary_fraction("partial_rotary_factor", default=0.5),
        "hidden_dropout": fields.fraction("resid_pdrop", default=0.0) > 0,
        "embedding_dropout": fields.fraction("embd_pdrop", default=0.0) > 0,
        "attention_dropout": fields.fraction("attention_dropout", default=0.0) > 0,
    }


def _opt(fields: _Fields) -> dict[str, Any]:
    activation = fields.text("activation_function", default="relu")
    shape = _plain(fields, intermediate_size=fields.size("ffn_dim"), activation=activation, tied=True)
    fields.require("do_layer_norm_before", True)
    fields.require("layer_norm_elementwise_affine", True)
    fields.require("_remove_final_layer_norm", False)
    projected = fields.size("word_embed_proj_dim", default=shape["hidden_size"])
    if projected != shape["hidden_size"]:
        expected = f"hidden_size {shape['hidden_size']}"
        raise NoClosedForm(str(fields.invalid("word_embed_proj_dim", projected, expected)))
    bias = fields.flag("enable_bias", default=True)
    # OPT's position table has two rows more than positions: it was trained with an offset for padding.
    own = {
        "learned_positions": shape["max_positions"] + 2,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "hidden_dropout": fields.fraction("dropout", default=0.1) > 0,
        "attention_dropout": fields.fraction("attention_dropout", default=0.0) > 0,
    }
    return shape | own


_READERS: dict[str, Callable[[_Fields], dict[str, Any]]] = {
    "gemma": _gemma1,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "granite": _granite,
    "llama": _llama,
    "mistral": _mistral,
    "olmo2": _olmo2,
    "opt": _opt,
    "phi": _phi,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
}

_COUNTED: dict[str, Callable[[_Fields], dict[str, Any]]] = {"qwen3_moe": _qwen3_moe}
"""Types whose parameters are counted here, and whose memory is traced."""

SUPPORTED_MODEL_TYPES: tuple[str, ...] = tuple(_READERS)
"""Every ``model_type`` with a closed form of parameters and memory."""

COUNTED_MODEL_TYPES: tuple[str, ...] = (*_READERS, *_COUNTED)
"""Every ``model_type`` that :func:`shape_from_config` reads."""
