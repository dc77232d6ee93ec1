"""The shape of a Hugging Face causal LM, and its exact parameter count; :mod:`meft.planner.models.configs` reads it.

Letters: ``L`` layers, ``D`` hidden size, ``I`` intermediate size, ``V`` vocabulary, ``H`` heads, ``G`` key-value heads,
``d`` head size.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from meft.planner.base.schema import Count, Fraction, Index, Record
from meft.planner.models.measured import Measured, TracedTerms
from meft.planner.models.stored import StoredWeights

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


_LATER = frozenset(
    (
        *("joint_head_norms", "norms_after", "rotary_pause", "rotary_sets", "window", "sliding_layers"),
        *("stored", "measured", "traced"),
    )
)
"""Fields of a shape that came with families after the first."""


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
    joint_head_norms: bool = False
    """The q/k norms span all heads at once, ``H * d`` and ``G * d`` weights (OLMo 2)."""
    norms_after: bool = False
    """The two norms of a layer are on what attention and FFN give, none on what they take (OLMo 2)."""
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
    rotary_pause: Index = 0
    """Every so manieth layer rotates nothing (SmolLM3: 4); 0: every layer rotates."""
    rotary_sets: Count = 1
    """Kinds of layers with rotary positions of their own (Gemma 3: sliding and full layers)."""
    window: Index = 0
    """Tokens that a sliding layer sees; 0: all layers see the whole sequence."""
    sliding_layers: tuple[bool, ...] = ()
    """Which layers slide, where not all of them do."""
    hidden_dropout: bool = False
    """Dropout on what attention and FFN add to the residual stream."""
    embedding_dropout: bool = False
    attention_dropout: bool = False
    stored: StoredWeights | None = None
    """How the folder stores its linear layers quantized; None: in the dtype that they are loaded in."""
    measured: Measured | None = None
    """Set where no closed form describes the model: then its counts are these, and the fields above are the nearest
    that a decoder of this kind has."""
    traced: TracedTerms | None = None
    """Terms of its device memory for one workload; no part of what the model is."""

    @model_serializer(mode="wrap")
    def _without_what_later_families_added(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Written only where they say something, so that files of the models before them stay as they were."""
        content: dict[str, Any] = handler(self)
        defaults = type(self).model_fields
        return {key: value for key, value in content.items() if key not in _LATER or value != defaults[key].default}

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
        """Fields other than the name in which two shapes differ, with both values; what was traced is no such field."""
        fields = [field for field in type(self).model_fields if field not in ("name", "traced")]
        pairs = {field: (getattr(self, field), getattr(other, field)) for field in fields}
        return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}

    def slides(self, layer: int) -> bool:
        """Whether the layer of that number, from 0, sees a window."""
        return self.window > 0 and (not self.sliding_layers or self.sliding_layers[layer])

    @property
    def num_sliding(self) -> int:
        """Layers that see a window."""
        return sum(self.slides(layer) for layer in range(self.num_layers))

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
        if self.measured is not None:
            return self.measured.attention_parameters
        return 2 * self.hidden_size * (self.query_size + self.kv_size)

    @property
    def mlp_parameters_per_layer(self) -> int:
        """Weights of the FFN, without biases: up and down, and a gate when :attr:`gated_mlp`."""
        return (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size

    @property
    def active_mlp_parameters_per_layer(self) -> int:
        """Of the FFN's weights those that a token meets."""
        if self.measured is not None:
            return self.measured.active_ffn_parameters
        return self.mlp_parameters_per_layer

    @property
    def linear_parameters_per_layer(self) -> int:
        """Weights of a layer's linear layers, without biases: what nf4 and int8 quantization touch."""
        if self.measured is not None:
            return self.measured.block_parameters // self.num_layers
        return self.attention_parameters_per_layer + self.mlp_parameters_per_layer

    @property
    def norm_parameters(self) -> int:
        """Weights of every norm, and their biases when ``norm`` is ``layernorm``; the final norm included."""
        head_norms = self.head_norms_per_layer * self.head_dim
        if self.joint_head_norms:
            head_norms = self.query_size + self.kv_size
        per_layer = self.norms_per_layer * self.hidden_size + head_norms
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
        if self.measured is not None:
            return self.measured.parameters
        outside_layers = self.embedding_parameters + self.position_parameters + self.head_parameters
        linear = self.num_layers * self.linear_parameters_per_layer
        return outside_layers + linear + self.norm_parameters + self.bias_parameters
