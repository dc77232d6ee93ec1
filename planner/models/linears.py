"""The linear layers of a block by the names that their modules have in transformers, in the order of the modules.

LoRA names its targets by these names, quantization touches these layers, and weights are loaded in this order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from meft.planner.base.errors import UsageError, unknown_name
from meft.planner.models.architecture import ModelShape

Place = Literal["attention", "ffn"]


@dataclass(frozen=True)
class Linear:
    """One linear layer ``inputs -> outputs`` of a block."""

    name: str
    place: Place
    inputs: int
    outputs: int
    bias: bool

    @property
    def num_weights(self) -> int:
        """Weights without the bias."""
        return self.inputs * self.outputs


def linear_layers(shape: ModelShape) -> tuple[Linear, ...]:
    """The linear layers of one block; of a measured model, one of each name."""
    if shape.measured is not None:
        return tuple(
            Linear(each.name, each.place, each.inputs, each.outputs, each.bias) for each in shape.measured.linears
        )
    build = _LAYOUTS.get(shape.model_type, _separate)
    return build(shape)


def is_stored(shape: ModelShape, layer: Linear, *, block: int) -> bool:
    """Whether the folder stores that layer of a block quantized."""
    part = "self_attn" if layer.place == "attention" else "mlp"
    return shape.stored is not None and not shape.stored.skips(f"model.layers.{block}.{part}.{layer.name}")


def module_names(shape: ModelShape) -> tuple[str, ...]:
    """Names that LoRA may target, each once (GPT-2 has a ``c_proj`` in attention and in its FFN)."""
    return tuple(dict.fromkeys(layer.name for layer in linear_layers(shape)))


def resolve_targets(shape: ModelShape, names: Iterable[str]) -> tuple[str, ...]:
    """The module names that ``names`` mean on this model: its own names, short ones (``q``), or a group.

    Groups are ``attention``, ``ffn`` and ``all-linear``. Names of other architectures' modules are passed over, as PEFT
    passes over them, while at least one name is the model's own. Raises :class:`UsageError` for a name that no
    architecture has, and when nothing is left.
    """
    asked = [name.strip() for name in names if name.strip()]
    found: set[str] = set()
    for name in asked:
        found |= _matches(shape, name)
    if not found:
        given = ", ".join(asked) or "nothing"
        own = ", ".join((*module_names(shape), *_GROUPS))
        raise UsageError(f"--target-modules {given}: {shape.model_type} has no such linear layer; it has {own}")
    return tuple(name for name in module_names(shape) if name in found)


def passed_over(shape: ModelShape, names: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that this model has no layer for."""
    return tuple(name for name in names if not _matches(shape, name))


_GROUPS = ("attention", "ffn", "all-linear")
_SHORT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"} | {
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
_OF_ANY_ARCHITECTURE = frozenset(
    [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "qkv_proj",
        "gate_up_proj",
        "c_attn",
        "c_proj",
        "c_fc",
        "dense",
        "fc1",
        "fc2",
        "query_key_value",
        "dense_h_to_4h",
        "dense_4h_to_h",
        "out_proj",
    ]
)


def _matches(shape: ModelShape, name: str) -> set[str]:
    layers = linear_layers(shape)
    if name == "all-linear":
        return {layer.name for layer in layers}
    if name in ("attention", "ffn"):
        return {layer.name for layer in layers if layer.place == name}
    full = _SHORT.get(name, name)
    if full not in _OF_ANY_ARCHITECTURE and full not in {layer.name for layer in layers}:
        raise unknown_name("linear layer in --target-modules", name, [*module_names(shape), *_GROUPS])
    return {full} & {layer.name for layer in layers}


def _attention(shape: ModelShape, *, output: str, order: str = "qkvo") -> list[Linear]:
    hidden, queries, keys = shape.hidden_size, shape.query_size, shape.kv_size
    bias, output_bias = shape.qkv_bias, shape.output_bias
    by_letter = {
        "q": Linear("q_proj", "attention", hidden, queries, bias),
        "k": Linear("k_proj", "attention", hidden, keys, bias),
        "v": Linear("v_proj", "attention", hidden, keys, bias),
        "o": Linear(output, "attention", queries, hidden, output_bias),
    }
    return [by_letter[letter] for letter in order]


def _plain_ffn(shape: ModelShape, up: str, down: str) -> list[Linear]:
    hidden, inner, bias = shape.hidden_size, shape.intermediate_size, shape.mlp_bias
    return [Linear(up, "ffn", hidden, inner, bias), Linear(down, "ffn", inner, hidden, bias)]


def _separate(shape: ModelShape) -> tuple[Linear, ...]:
    """LLaMA and its descendants."""
    hidden, inner, bias = shape.hidden_size, shape.intermediate_size, shape.mlp_bias
    gate = Linear("gate_proj", "ffn", hidden, inner, bias)
    return (*_attention(shape, output="o_proj"), gate, *_plain_ffn(shape, "up_proj", "down_proj"))


def _phi3(shape: ModelShape) -> tuple[Linear, ...]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return (
        Linear("o_proj", "attention", shape.query_size, hidden, False),
        Linear("qkv_proj", "attention", hidden, shape.query_size + 2 * shape.kv_size, False),
        Linear("gate_up_proj", "ffn", hidden, 2 * inner, False),
        Linear("down_proj", "ffn", inner, hidden, False),
    )


def _gpt2(shape: ModelShape) -> tuple[Linear, ...]:
    hidden = shape.hidden_size
    attention = Linear("c_attn", "attention", hidden, 3 * hidden, True)
    output = Linear("c_proj", "attention", hidden, hidden, True)
    return (attention, output, *_plain_ffn(shape, "c_fc", "c_proj"))


def _phi(shape: ModelShape) -> tuple[Linear, ...]:
    return (*_attention(shape, output="dense"), *_plain_ffn(shape, "fc1", "fc2"))


def _gpt_neox(shape: ModelShape) -> tuple[Linear, ...]:
    hidden, bias = shape.hidden_size, shape.qkv_bias
    attention = Linear("query_key_value", "attention", hidden, 3 * hidden, bias)
    output = Linear("dense", "attention", hidden, hidden, shape.output_bias)
    return (attention, output, *_plain_ffn(shape, "dense_h_to_4h", "dense_4h_to_h"))


def _opt(shape: ModelShape) -> tuple[Linear, ...]:
    return (*_attention(shape, output="out_proj", order="kvqo"), *_plain_ffn(shape, "fc1", "fc2"))


_LAYOUTS = {"phi3": _phi3, "gpt2": _gpt2, "phi": _phi, "gpt_neox": _gpt_neox, "opt": _opt}
