"""The shape of a Hugging Face causal LM, read from its ``config.json``, and its exact parameter count.

Letters: ``L`` layers, ``D`` hidden size, ``I`` intermediate size, ``V`` vocabulary, ``H`` heads, ``G`` key-value heads,
``d`` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import model_validator

from meft.planner.base.errors import UsageError
from meft.planner.base.schema import Count, Fraction, Index, Record, shortened, validated

Norm = Literal["rmsnorm", "layernorm"]


SHAPE_LIMITS = {
    "num_layers": 512,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_heads": 1 << 16,
    "num_kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 26,
    "max_positions": 1 << 40,
    "learned_positions": 1 << 32,
    "norms_per_layer": 64,
    "head_norms_per_layer": 64,
}
"""The largest sizes that are read: far beyond any model; sums and products stay 64-bit integers."""
MAX_PARAMETERS = 1 << 44
_SHAPE_FIELDS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_positions",
}
"""Fields of a config by the name that a shape has for them, where it is another one."""


class ModelShape(Record):
    """What the models of memory, transfer and time need to know of a frozen decoder.

    ``norms_per_layer`` counts vectors of ``D`` weights (each with a bias when ``norm`` is ``layernorm``);
    ``head_norms_per_layer`` counts vectors of ``d`` weights (q/k norms). Every parameter is counted once: weights of
    linear layers, their biases, norms, embeddings, positions and head are disjoint and add up to
    :attr:`num_parameters`.
    """

    name: str
    model_type: str
    num_layers: Count
    hidden_size: Count
    intermediate_size: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    vocab_size: Count
    max_positions: Count
    learned_positions: Index = 0
    """Rows of a trained position table; 0 for rotary models."""
    tied_embeddings: bool
    gated_mlp: bool
    activation: str
    norm: Norm
    norms_per_layer: Count
    head_norms_per_layer: Index = 0
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_bias: bool = False
    parallel_blocks: bool = False
    """Attention and FFN read the same residual instead of one after the other (Phi, GPT-NeoX)."""
    logit_softcap: bool = False
    """Logits pass through ``c * tanh(logits / c)`` (Gemma 2)."""
    rotary_fraction: Fraction = 1.0
    """Share of the head size that positions rotate (Phi: half, GPT-NeoX: a quarter)."""
    hidden_dropout: bool = False
    """Dropout on what attention and FFN add to the residual stream."""
    embedding_dropout: bool = False
    attention_dropout: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> ModelShape:
        for field, limit in SHAPE_LIMITS.items():
            if getattr(self, field) > limit:
                raise ValueError(f"{field} {getattr(self, field)} is more than {limit:,}, the largest that is read")
        if self.num_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"{self.num_parameters:,} parameters are more than {MAX_PARAMETERS:,}, the most that is read"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        return self

    def differences(self, other: ModelShape) -> dict[str, tuple[object, object]]:
        """Fields other than the name in which two shapes differ, with both values."""
        mine, theirs = self.model_dump(exclude={"name"}), other.model_dump(exclude={"name"})
        return {field: (mine[field], theirs[field]) for field in mine if mine[field] != theirs[field]}

    @property
    def query_size(self) -> int:
        """``H * d``: outputs of the query projection, inputs of the output projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """``G * d``: outputs of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Token embedding, ``V * D``; it is the head's weight too when :attr:`tied_embeddings`."""
        return self.vocab_size * self.hidden_size

    @property
    def position_parameters(self) -> int:
        """Trained position table."""
        return self.learned_positions * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Weights of the language-model head that are its own: 0 when tied to the embedding."""
        return 0 if self.tied_embeddings else self.embedding_parameters

    @property
    def attention_parameters_per_layer(self) -> int:
        """Weights of the query, key, value and output projections, without biases."""
        return 2 * self.hidden_size * (self.query_size + self.kv_size)

    @property
    def mlp_parameters_per_layer(self) -> int:
        """Weights of the FFN, without biases: up and down, and a gate when :attr:`gated_mlp`."""
        return (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size

    @property
    def linear_parameters_per_layer(self) -> int:
        """Weights of a layer's linear layers, without biases: what nf4 and int8 quantization touch."""
        return self.attention_parameters_per_layer + self.mlp_parameters_per_layer

    @property
    def norm_parameters(self) -> int:
        """Weights of every norm, and their biases when ``norm`` is ``layernorm``; the final norm included."""
        per_layer = self.norms_per_layer * self.hidden_size + self.head_norms_per_layer * self.head_dim
        vectors = self.num_layers * per_layer + self.hidden_size
        return 2 * vectors if self.norm == "layernorm" else vectors

    @property
    def bias_parameters_per_layer(self) -> int:
        """Biases of a layer's linear layers."""
        qkv = self.qkv_bias * (self.query_size + 2 * self.kv_size)
        up_projections = 2 if self.gated_mlp else 1
        mlp = self.mlp_bias * (up_projections * self.intermediate_size + self.hidden_size)
        return qkv + self.output_bias * self.hidden_size + mlp

    @property
    def bias_parameters(self) -> int:
        """Biases of every linear layer, the head's included; those of norms are in :attr:`norm_parameters`."""
        return self.num_layers * self.bias_parameters_per_layer + self.head_bias * self.vocab_size

    @property
    def num_parameters(self) -> int:
        """All parameters, exactly; a tied head counts once."""
        outside_layers = self.embedding_parameters + self.position_parameters + self.head_parameters
        linear = self.num_layers * self.linear_parameters_per_layer
        return outside_layers + linear + self.norm_parameters + self.bias_parameters


def shape_from_config(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """Read a Hugging Face ``config.json``; ``name`` names the model in the record and in errors.

    Sizes must be present; switches that are absent take the default that transformers gives that ``model_type``.
    Raises :class:`UsageError` for an unsupported ``model_type`` and for a missing or invalid field.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UsageError(f"model {name}: config has no model_type; is this the config.json of a Hugging Face model?")
    reader = _READERS.get(model_type)
    if reader is None:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise UsageError(
            f"model {name}: model_type {shortened(repr(model_type))} is not supported; supported: {supported}"
        )
    fields = {"name": name, "model_type": model_type} | reader(_Fields(config, name))
    return validated(ModelShape, fields, source=f"model {name}")


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
            raise UsageError(f"model {self.model}: config field {name} = {not expected} is not supported")

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


def _llama(fields: _Fields) -> dict[str, Any]:
    own = {"mlp_bias": fields.flag("mlp_bias", default=False)}
    return _gated(fields) | _attention_bias(fields, default=False) | own


def _mistral(fields: _Fields) -> dict[str, Any]:
    return _gated(fields, kv_heads=8)


def _qwen2(fields: _Fields) -> dict[str, Any]:
    return _gated(fields, kv_heads=32) | {"qkv_bias": True}


def _qwen3(fields: _Fields) -> dict[str, Any]:
    shape = _gated(fields, kv_heads=32, head_dim=128)
    return shape | _attention_bias(fields, default=False) | {"head_norms_per_layer": 2}


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


def _phi3(fields: _Fields) -> dict[str, Any]:
    own = {
        "rotary_fraction": fields.rotary_fraction("partial_rotary_factor", default=1.0),
        "hidden_dropout": fields.fraction("resid_pdrop", default=0.0) > 0,
    }
    return _gated(fields) | own


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
        raise fields.invalid("word_embed_proj_dim", projected, f"hidden_size {shape['hidden_size']}")
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
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _mistral,
    "opt": _opt,
    "phi": _phi,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}

SUPPORTED_MODEL_TYPES: tuple[str, ...] = tuple(_READERS)
"""Every ``model_type`` that :func:`shape_from_config` reads."""
