"""The shape of any causal LM that transformers builds, read from its real class on the meta device: no weights, no
memory.

Letters: ``L`` layers, ``D`` hidden size, ``H`` heads, ``G`` key-value heads, ``d`` head size, ``E`` experts, ``k`` of
them that a token meets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from meft.planner.base.errors import MeftError, UsageError
from meft.planner.base.schema import shortened, validated
from meft.planner.models.architecture import SHAPE_LIMITS, ModelShape
from meft.planner.models.measured import Measured, MeasuredLinear
from meft.runtime.adapter.blocks import decoder_blocks, ffn_modules

_MOST_LAYERS = SHAPE_LIMITS["num_layers"]
_ANY_POSITIONS = SHAPE_LIMITS["max_positions"]
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_STACKED_DIMS = 3
"""Experts' weights are stacked: ``[E, ...]``."""


def measured_shape(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """Build the class that ``config`` names and read it; ``name`` names the model in the record and in errors.

    Raises:
        UsageError: transformers has no causal LM of that type, cannot build one from the config, or it has no blocks.
    """
    model = empty_model(config, name=name)
    try:
        blocks = decoder_blocks(model)
    except UsageError as error:
        raise UsageError(f"model {name}: {error}") from None
    text = model.config.get_text_config(decoder=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    measured = _measured(model, blocks, text)
    hidden_size = _hidden_size(text, embedding)
    gated = _is_gated(blocks)
    heads = _first(text, _HEADS) or 1
    kv_heads = _first(text, _KV_HEADS) or heads
    inner = max(1, measured.active_ffn_parameters // ((3 if gated else 2) * hidden_size))
    fields = {
        "name": name,
        "model_type": config["model_type"],
        "num_layers": len(blocks),
        "hidden_size": hidden_size,
        "intermediate_size": inner,
        "num_heads": heads,
        "num_kv_heads": kv_heads if heads % kv_heads == 0 else heads,
        "head_dim": _first(text, ("head_dim",)) or max(1, hidden_size // heads),
        "vocab_size": embedding.weight.shape[0] if head is None else head.weight.shape[0],
        "max_positions": _first(text, _POSITIONS) or _ANY_POSITIONS,
        "tied_embeddings": head is not None and head.weight is embedding.weight,
        "gated_mlp": gated,
        "activation": _activation(text),
        "norm": "rmsnorm" if any("RMS" in type(module).__name__ for module in blocks.modules()) else "layernorm",
        "norms_per_layer": 2,
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "measured": measured,
    }
    return validated(ModelShape, fields, source=f"model {name}")


def empty_model(config: Mapping[str, Any], *, name: str, **options: Any) -> Any:
    """The real class on the meta device; see :func:`measured_shape` for the errors."""
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    _check_sizes(config, name)
    fields = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    try:
        made = AutoConfig.for_model(config["model_type"], **fields)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(made, trust_remote_code=False, **options)
    except MeftError:
        raise
    except Exception as error:  # whatever a class makes of a config that others wrote
        reason = _reason(config, error)
        known = f"transformers {__version__} builds no causal LM of model_type {shortened(repr(config['model_type']))}"
        raise UsageError(f"model {name}: {known}: {reason}") from error


def _reason(config: Mapping[str, Any], error: Exception) -> str:
    if config.get("auto_map"):
        return "it asks for code of its own to be run (auto_map), which is never done"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return shortened(text)


def _check_sizes(config: Mapping[str, Any], name: str) -> None:
    """A config of a few bytes must not make this machine build for days."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for field in _LAYERS:
            value = part.get(field)
            if isinstance(value, int) and value > _MOST_LAYERS:
                raise UsageError(
                    f"model {name}: config field {field} = {value} is not within {_MOST_LAYERS}, the largest that is "
                    f"read"
                )


def _measured(model: Any, blocks: nn.ModuleList, text: Any) -> Measured:
    try:
        ffns, without = ffn_modules(model), None
    except UsageError as error:
        ffns, without = [], str(error)
    num_layers = len(blocks)
    idle, experts, chosen = _idle_expert_parameters(blocks, text)
    in_blocks = _matrix_parameters(blocks)
    in_ffns = sum(_matrix_parameters(ffn) for ffn in ffns) or in_blocks * 2 // 3
    return Measured(
        class_name=type(model).__name__,
        parameters=model.num_parameters(),
        active_parameters=model.num_parameters() - idle,
        block_parameters=in_blocks,
        attention_parameters=(in_blocks - in_ffns) // num_layers,
        active_ffn_parameters=(in_ffns - idle) // num_layers,
        experts=experts,
        active_experts=chosen,
        linears=_linears(blocks, ffns),
        checkpointing=bool(getattr(model, "supports_gradient_checkpointing", False)),
        sdpa=bool(getattr(model, "_supports_sdpa", False)),
        without_ffn=without,
    )


def _matrix_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def _idle_expert_parameters(blocks: nn.ModuleList, text: Any) -> tuple[int, int, int]:
    """Parameters of experts that a token does not meet, ``E`` and ``k``; all are met where ``k`` is not told."""
    chosen = _first(text, _CHOSEN)
    idle = experts = 0
    for group, count in _expert_groups(blocks):
        experts = max(experts, count)
        if chosen is not None and chosen < count:
            idle += group * (count - chosen) // count
    return idle, experts, min(chosen or experts, experts)


def _expert_groups(blocks: nn.ModuleList) -> Iterator[tuple[int, int]]:
    """Parameters and number of each group of experts: a module of that name with stacked weights, or a list."""
    for path, module in blocks.named_modules():
        if path.rsplit(".", 1)[-1] != "experts" and not type(module).__name__.endswith("Experts"):
            continue
        if any(part == "experts" for part in path.split(".")[:-1]):
            continue
        own = list(module.parameters(recurse=False))
        stacked = [parameter for parameter in own if parameter.dim() >= _STACKED_DIMS]
        if stacked:
            yield sum(parameter.numel() for parameter in own), stacked[0].shape[0]
        elif isinstance(module, nn.ModuleList) and len(module) > 1:
            yield sum(parameter.numel() for parameter in module.parameters()), len(module)


def _linears(blocks: nn.ModuleList, ffns: list[nn.Module]) -> tuple[MeasuredLinear, ...]:
    """Linear modules of the blocks by name and size, in the order of the modules; the first size of a name is told."""
    in_ffn = {id(module) for ffn in ffns for module in ffn.modules()}
    found: dict[str, MeasuredLinear] = {}
    counts: Counter[str] = Counter()
    for path, module in blocks.named_modules():
        if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
            continue
        label = path.rsplit(".", 1)[-1]
        counts[label] += 1
        outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else reversed(module.weight.shape)
        if label not in found:
            found[label] = MeasuredLinear(
                name=label,
                place="ffn" if id(module) in in_ffn else "attention",
                inputs=inputs,
                outputs=outputs,
                bias=module.bias is not None,
                count=1,
            )
    return tuple(each.model_copy(update={"count": counts[name]}) for name, each in found.items())


def _is_gated(blocks: nn.ModuleList) -> bool:
    """Whether an FFN multiplies two products: families have ``gate`` in the name of one of its weights."""
    return any("gate" in name and "gate.weight" not in name for name, _ in blocks.named_parameters())


def _activation(text: Any) -> str:
    named = (_field(text, name) for name in _ACTIVATIONS)
    return next((name for name in named if isinstance(name, str) and name), "unknown")


def _hidden_size(text: Any, embedding: Any) -> int:
    return _first(text, ("hidden_size",)) or int(embedding.weight.shape[-1])


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    """The first of these fields that is a positive number."""
    for name in names:
        value = _field(config, name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _field(config: Any, name: str) -> Any:
    """A field as it was given: where it differs from layer to layer, asking the config for it is an error."""
    return vars(config).get(getattr(config, "attribute_map", {}).get(name, name))
