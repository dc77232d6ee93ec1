"""Weights that a folder stores quantized, from ``quantization_config``, and the tensors that each linear layer is.

Formats by their libraries' own layouts: bitsandbytes (4 bits in blocks of 64, 8 bits with a scale per output), AWQ and
GPTQ (integers packed into int32, a scale and a zero point per group of inputs), FP8 (a scale per block, or one for
all), compressed-tensors (packed integers, or 8 bits, with a scale per group, output or tensor). What is not a block's
linear layer (embeddings, head, norms) stays in 16 bits, and so does what the config says is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from meft.planner.base.errors import UsageError
from meft.planner.base.schema import Count, Index, Record, shortened

StoredMethod = Literal["bitsandbytes-4bit", "bitsandbytes-8bit", "awq", "gptq", "fp8", "compressed-tensors"]

INT32_BYTES, INT64_BYTES, FP32_BYTES, HALF_BYTES = 4, 8, 4, 2
_SHAPE_NUMBERS = 2
"""compressed-tensors keeps the size of what it packed."""


class StoredWeights(Record):
    """How the linear layers of the blocks are stored."""

    method: StoredMethod
    bits: Count
    group_size: Index = 0
    """Inputs that share a scale; 0: all of an output's."""
    scale_bytes: Index = HALF_BYTES
    zero_points: bool = False
    """Packed like the weights, one for each scale."""
    input_order: bool = False
    """GPTQ: int32, each input's group."""
    block: tuple[Count, Count] | None = None
    """FP8: outputs and inputs that share a scale."""
    one_scale: bool = False
    """One for the whole tensor."""
    double_quant: bool = False
    skipped: tuple[str, ...] = ()
    """Names, paths or ``re:`` patterns of modules that are left in 16 bits."""

    @property
    def title(self) -> str:
        """As a person says it."""
        return f"{self.method} ({self.bits} bits)" if "bit" not in self.method else self.method

    def skips(self, path: str) -> bool:
        """Whether a module, such as ``model.layers.0.mlp.down_proj``, is left in 16 bits."""
        return any(_names(entry, path) for entry in self.skipped)

    def tensor_bytes(self, *, inputs: int, outputs: int) -> tuple[int, ...]:
        """Bytes of each tensor of one linear layer, weights first; of bitsandbytes' 4 bits see the terms of nf4."""
        packed = -(-inputs * outputs * self.bits // 8)
        if self.block is not None:
            of_outputs, of_inputs = self.block
            return packed, -(-outputs // of_outputs) * -(-inputs // of_inputs) * self.scale_bytes
        if self.one_scale:
            return packed, self.scale_bytes
        groups = -(-inputs // self.group_size) if self.group_size else 1
        tensors = [packed, groups * outputs * self.scale_bytes]
        if self.zero_points:
            tensors.append(-(-groups * outputs * self.bits // (8 * INT32_BYTES)) * INT32_BYTES)
        if self.input_order:
            tensors.append(inputs * INT32_BYTES)
        if self.method == "compressed-tensors":
            tensors.append(_SHAPE_NUMBERS * INT64_BYTES)
        return tuple(tensors)


def _names(entry: str, path: str) -> bool:
    if entry.startswith("re:"):
        try:
            return re.match(entry[3:], path) is not None
        except re.error:
            return False
    return path == entry or f".{entry}." in f".{path}."


def stored_weights(config: Mapping[str, Any], *, name: str) -> StoredWeights | None:
    """What ``quantization_config`` says; None where there is none.

    Raises:
        UsageError: a method whose bytes are not known here, or a field that is not as its library writes it.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise UsageError(f"model {name}: config field quantization_config is not an object")
    unnamed = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & found.keys() else ""
    method = str(found.get("quant_method") or unnamed)
    reader = _READERS.get(method)
    if reader is None:
        raise UsageError(
            f"model {name}: its weights are stored by quantization_config {shortened(repr(method))}, whose bytes are "
            f"not known here; known: {', '.join(_READERS)}; give a folder of 16-bit weights"
        )
    try:
        return reader(found)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"model {name}: quantization_config of {method} cannot be read ({reason})") from None


def _skipped(*lists: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(entry) for each in lists for entry in each or ()))


def _bitsandbytes(found: Mapping[str, Any]) -> StoredWeights:
    skipped = _skipped(found.get("llm_int8_skip_modules"))
    if found.get("load_in_4bit") or found.get("_load_in_4bit"):
        double_quant = bool(found.get("bnb_4bit_use_double_quant"))
        return StoredWeights(method="bitsandbytes-4bit", bits=4, double_quant=double_quant, skipped=skipped)
    return StoredWeights(method="bitsandbytes-8bit", bits=8, scale_bytes=FP32_BYTES, skipped=skipped)


def _awq(found: Mapping[str, Any]) -> StoredWeights:
    bits = found.get("bits", found.get("w_bit", 4))
    return StoredWeights(
        method="awq",
        bits=bits,
        group_size=max(found.get("group_size", found.get("q_group_size", 128)), 0),
        zero_points=True,  # the tensors are there whether or not they are used
        skipped=_skipped(found.get("modules_to_not_convert")),
    )


def _gptq(found: Mapping[str, Any]) -> StoredWeights:
    return StoredWeights(
        method="gptq",
        bits=found["bits"],
        group_size=max(found.get("group_size", 128), 0),
        zero_points=True,
        input_order=True,
        skipped=_skipped(found.get("modules_in_block_to_not_quantize"), found.get("modules_to_not_convert")),
    )


def _fp8(found: Mapping[str, Any]) -> StoredWeights:
    block = found.get("weight_block_size")
    return StoredWeights(
        method="fp8",
        bits=8,
        scale_bytes=FP32_BYTES,
        block=None if block is None else tuple(block),
        one_scale=block is None,
        skipped=_skipped(found.get("modules_to_not_convert"), found.get("ignored_layers")),
    )


def _fbgemm_fp8(found: Mapping[str, Any]) -> StoredWeights:
    """A scale per output."""
    skipped = _skipped(found.get("modules_to_not_convert"))
    return StoredWeights(method="fp8", bits=8, scale_bytes=FP32_BYTES, skipped=skipped)


def _compressed_tensors(found: Mapping[str, Any]) -> StoredWeights:
    groups = list(found["config_groups"].values())
    kinds = {repr(sorted((key, repr(value)) for key, value in group["weights"].items())) for group in groups}
    if len(kinds) != 1:
        raise ValueError(f"{len(kinds)} kinds of weights in config_groups, one is known")
    weights = groups[0]["weights"]
    if (weights["type"], weights["num_bits"]) not in (("int", 4), ("int", 8), ("float", 8)):
        raise ValueError(f"{weights['type']} of {weights['num_bits']} bits; known are int 4, int 8 and float 8")
    return StoredWeights(
        method="compressed-tensors",
        bits=weights["num_bits"],
        group_size=max(weights.get("group_size") or 0, 0),
        zero_points=not weights.get("symmetric", True),
        one_scale=weights.get("strategy") == "tensor",
        skipped=_skipped(found.get("ignore")),
    )


_READERS = {
    "bitsandbytes": _bitsandbytes,
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "compressed-tensors": _compressed_tensors,
}
