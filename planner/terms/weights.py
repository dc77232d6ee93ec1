"""Bytes of a model's weights by dtype, and what quantization adds to them.

Letters: ``L`` layers, ``D`` hidden size, ``I`` intermediate size, ``V`` vocabulary, ``H`` heads, ``G`` key-value heads,
``d`` head size.
"""

from __future__ import annotations

from meft.planner.base.dtypes import WeightsDtype
from meft.planner.base.quantities import COMPUTE_DTYPE_BYTES
from meft.planner.models.architecture import ModelShape
from meft.planner.models.linears import Linear, is_stored, linear_layers

NF4_BLOCK = 64
"""Weights that share one scale; two weights to a byte."""
DOUBLE_QUANT_BLOCK = 256
"""Scales that share one scale of their own when the first are stored in 8 bits."""
FP32_BYTES = 4


def linear_parameters(shape: ModelShape) -> int:
    """Weights of all blocks' linear layers: what quantization shrinks."""
    return shape.num_layers * shape.linear_parameters_per_layer


def linear_outputs(shape: ModelShape) -> int:
    """Output rows of all blocks' linear layers: int8 keeps one fp32 scale for each."""
    return shape.num_layers * sum(layer.outputs for layer in linear_layers(shape))


def largest_linear(shape: ModelShape) -> int:
    """Weights of the largest linear layer of a block."""
    return max(layer.num_weights for layer in linear_layers(shape))


def nf4_bytes(*, num_weights: int, double_quant: bool) -> int:
    """Half a byte per weight, and per block of 64 an fp32 scale; doubly quantized an 8-bit one, and per 256 of those an
    fp32 scale."""
    num_blocks = -(-num_weights // NF4_BLOCK)
    if not double_quant:
        return num_weights // 2 + num_blocks * FP32_BYTES
    return num_weights // 2 + num_blocks + -(-num_blocks // DOUBLE_QUANT_BLOCK) * FP32_BYTES


def int8_bytes(*, num_weights: int, num_outputs: int) -> int:
    """One byte per weight and an fp32 scale per output row."""
    return num_weights + num_outputs * FP32_BYTES


def linear_weights_bytes(shape: ModelShape, *, dtype: WeightsDtype, double_quant: bool) -> int:
    """The blocks' linear layers as stored."""
    if shape.stored is not None:
        return _as_stored_bytes(shape, dtype=dtype, double_quant=double_quant)
    num_weights = linear_parameters(shape)
    if dtype == "nf4":
        return nf4_bytes(num_weights=num_weights, double_quant=double_quant)
    if dtype == "int8":
        return int8_bytes(num_weights=num_weights, num_outputs=linear_outputs(shape))
    return num_weights * COMPUTE_DTYPE_BYTES[dtype]


def stored_tensors_bytes(shape: ModelShape, layer: Linear, *, double_quant: bool) -> tuple[int, ...]:
    """The tensors of one linear layer that its folder stores quantized."""
    stored = shape.stored
    assert stored is not None
    if stored.method == "bitsandbytes-4bit":
        return (nf4_bytes(num_weights=layer.num_weights, double_quant=double_quant),)
    return stored.tensor_bytes(inputs=layer.inputs, outputs=layer.outputs)


def _as_stored_bytes(shape: ModelShape, *, dtype: WeightsDtype, double_quant: bool) -> int:
    """Layer by layer: the folder's config may leave some of them in 16 bits."""
    layers = linear_layers(shape)
    quantized = [sum(stored_tensors_bytes(shape, layer, double_quant=double_quant)) for layer in layers]
    plain = [layer.num_weights * COMPUTE_DTYPE_BYTES[dtype] for layer in layers]
    return sum(
        quantized[index] if is_stored(shape, layer, block=block) else plain[index]
        for block in range(shape.num_layers)
        for index, layer in enumerate(layers)
    )


def other_weights_bytes(shape: ModelShape, *, dtype: WeightsDtype) -> int:
    """Embeddings, head, norms and biases, which quantization leaves in 16 bits."""
    return (shape.num_parameters - linear_parameters(shape)) * COMPUTE_DTYPE_BYTES[dtype]


def dequantized_bytes(shape: ModelShape, *, dtype: WeightsDtype) -> int:
    """A quantized linear layer is written out in 16 bits while it is multiplied: the largest one."""
    quantized = dtype in ("int8", "nf4") or shape.stored is not None
    return largest_linear(shape) * COMPUTE_DTYPE_BYTES[dtype] if quantized else 0


def tensor_sizes_bytes(shape: ModelShape, *, dtype: WeightsDtype) -> list[int]:
    """Every tensor of a model whose weights are not quantized, rotary frequencies among them; in no order."""
    norm = [shape.hidden_size] * (2 if shape.norm == "layernorm" else 1)
    head_norms = shape.head_norms_per_layer * len(norm) * [shape.head_dim]
    if shape.joint_head_norms:
        head_norms = [shape.query_size, shape.kv_size]
    layers = linear_layers(shape)
    block = [
        *(layer.num_weights for layer in layers),
        *(layer.outputs for layer in layers if layer.bias),
        *shape.norms_per_layer * norm,
        *head_norms,
    ]
    beside = [shape.embedding_parameters, *norm]
    if shape.learned_positions:
        beside.append(shape.position_parameters)
    if not shape.tied_embeddings:
        beside.append(shape.embedding_parameters)
    if shape.head_bias:
        beside.append(shape.vocab_size)
    rotated = 0 if shape.learned_positions else int(shape.head_dim * shape.rotary_fraction)
    frequencies = shape.rotary_sets * 2 * [rotated // 2 * FP32_BYTES]
    return [numel * COMPUTE_DTYPE_BYTES[dtype] for numel in (*beside, *shape.num_layers * block)] + frequencies


def rotary_frequencies_bytes(shape: ModelShape) -> int:
    """Two fp32 buffers of ``d/2`` frequencies in a rotary model, for each kind of layers with its own."""
    return 0 if shape.learned_positions else shape.rotary_sets * 2 * (shape.head_dim // 2) * FP32_BYTES
