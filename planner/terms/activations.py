"""Device bytes of one training step of a frozen decoder, term by term: what autograd keeps, and what backward adds.

Every term is a short pure function of ints or numpy int64 arrays alike, so the ledger that a person reads and the
search over many candidates are the same code. The counts of tensors were found by following every storage of
transformers 5.23 on torch 2.13 through forward and backward; ``tests/planner/memory/test_device.py`` repeats that
measurement.

Letters: ``B`` batch, ``S`` sequence length, ``T = B*S`` tokens, ``L`` layers, ``D`` hidden size, ``I`` intermediate
size, ``V`` vocabulary, ``H`` heads, ``G`` key-value heads, ``d`` head size, ``q`` bytes of a hidden-state element.

What a frozen layer keeps for backward: a linear layer keeps only its weight, so of the hidden states there remain
the inputs of the norms, of the attention kernel and of the FFN's elementwise products.
"""

from __future__ import annotations

from functools import reduce
from typing import cast

import numpy as np

from meft.planner.allocator.blocks import BIG_REQUEST_BYTES, SEGMENT_ROUND_BYTES, SMALL_LIMIT_BYTES
from meft.planner.allocator.rounding import MIN_BLOCK_BYTES
from meft.planner.base.quantities import Flags, Ints
from meft.planner.models.architecture import ModelShape
from meft.planner.records.plan import Attention

FP32_BYTES = 4

FUSED_ACTIVATION = (1, 2)
ACTIVATION_CHAINS: dict[str, tuple[int, int]] = {
    "gelu_new": (4, 3),
    "gelu_accurate": (4, 3),
    "gelu_fast": (7, 3),
    "gelu_python": (3, 5),
    "quick_gelu": (2, 3),
    "relu2": (1, 4),
}
"""``[T, I]`` tensors that an activation written out in Python keeps, and those that its backward adds; an activation
with a kernel of its own (silu, gelu, gelu_pytorch_tanh, relu ...) is :data:`FUSED_ACTIVATION`."""

SOFT_CAPPED_ATTENTION = frozenset({"gemma2"})
"""Model types that cap attention scores by a tanh, which transformers does eagerly and in flash attention."""

EAGER_SOFTMAX_AS_COMPUTED = frozenset({"gpt2"})
"""Model types whose eager softmax stays in the dtype of the hidden states instead of going through fp32."""

PARTIAL_ROTARY = frozenset({"phi", "gpt_neox"})
"""Model types that rotate a share of each head and put it before the rest."""

MASKS_PER_MODEL = {"gemma2": 2, "gemma3_text": 2}
"""Model types that make more than one mask: Gemma 2 and 3 for their full and their sliding layers."""

FUSED_QKV_ROTARY = frozenset({"gpt_neox", "phi3"})
"""Model types whose value is a view of one query-key-value product: keeping the value keeps the product, beside the
rotated query and key."""

LOGIT_BYTES = 3 * FP32_BYTES
"""Bytes per logit when the loss goes backward: fp32 log-probabilities, their gradient, and the logits' gradient."""


def choose(condition: Flags, if_true: Ints, if_false: Ints) -> Ints:
    """``if_true`` where the condition holds, else ``if_false``; stays an int for a plain bool."""
    if isinstance(condition, (bool, np.bool_)):
        return if_true if condition else if_false
    return cast(Ints, np.where(condition, if_true, if_false))


def largest(*values: Ints) -> Ints:
    """Elementwise maximum; stays an int for ints."""
    if all(isinstance(value, int) for value in values):
        return max(cast(tuple[int, ...], values))
    return reduce(np.maximum, values)


def smallest(*values: Ints) -> Ints:
    """Elementwise minimum; stays an int for ints."""
    return -largest(*(-value for value in values))


# --- kept for backward, per layer -----------------------------------------------------------------------------------


def norm_saved_bytes(*, tokens: Ints, width: int, layernorm: bool, compute_bytes: int) -> Ints:
    """One norm over ``[T, width]``. RMSNorm computes in fp32 and keeps that copy (in fp32 the input itself) and one
    factor per token; LayerNorm is one kernel that keeps its input, a mean and a factor."""
    if layernorm:
        return tokens * (compute_bytes * width + 2 * FP32_BYTES)
    return tokens * (FP32_BYTES * width + FP32_BYTES)


def fused_attention_saved_bytes(
    *,
    tokens: Ints,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    compute_bytes: int,
) -> Ints:
    """sdpa or flash: query, key, value, output ``[T, heads, d]``, and the log-sum-exp per query and head."""
    heads = 2 * num_heads + 2 * num_kv_heads
    return tokens * (heads * head_dim * compute_bytes + FP32_BYTES * num_heads)


def masked_saved_bytes(
    *, tokens: Ints, seq_len: Ints, num_heads: int, num_kv_heads: int, head_dim: int, compute_bytes: int
) -> Ints:
    """What sdpa keeps more of a layer that is given a mask: keys and values of every query head instead of every group,
    but of a single group, which stays a view, and the mask as numbers to add, ``[B, 1, S, S]``."""
    written_out = 0 if num_kv_heads == 1 else num_heads - num_kv_heads
    return tokens * compute_bytes * (2 * written_out * head_dim + seq_len)


def eager_attention_saved_bytes(
    *,
    tokens: Ints,
    seq_len: Ints,
    num_heads: int,
    head_dim: int,
    compute_bytes: int,
    fp32: bool,
    soft_capped: bool,
    dropped: bool = False,
) -> Ints:
    """Query, key and value of all ``H`` heads and the probabilities ``[B, H, S, S]``: as softmax made them (fp32, or
    as computed) and, where that differs, their cast; a soft cap keeps its tanh, dropout a mask and what it left."""
    cast = fp32 and compute_bytes != FP32_BYTES
    probabilities = FP32_BYTES + compute_bytes if cast else compute_bytes
    tanh = compute_bytes if soft_capped else 0
    dropout = (1 if cast else 1 + compute_bytes) if dropped else 0
    return tokens * num_heads * (3 * head_dim * compute_bytes + seq_len * (probabilities + tanh + dropout))


def mlp_saved_bytes(*, tokens: Ints, intermediate_size: int, gated: bool, activation: str, compute_bytes: int) -> Ints:
    """The activation's own tensors, and for a gated MLP both factors of the product: its output and the up
    projection."""
    kept, _ = ACTIVATION_CHAINS.get(activation, FUSED_ACTIVATION)
    return tokens * intermediate_size * compute_bytes * (kept + (2 if gated else 0))


def rotary_tables_bytes(*, positions: Ints, head_dim: int, compute_bytes: int) -> Ints:
    """Cosines and sines ``[1, S, d]``, shared by all layers and sequences; of packed sequences ``[B, S, d]``."""
    return 2 * positions * head_dim * compute_bytes


def layer_inputs_bytes(*, tokens: Ints, num_layers: int, hidden_size: int, compute_bytes: int) -> Ints:
    """With activation checkpointing: the input ``[T, D]`` of every layer."""
    return num_layers * tokens * hidden_size * compute_bytes


def mask_bytes(*, batch_size: Ints, seq_len: Ints, element_bytes: int) -> Ints:
    """One mask ``[B, 1, S, S]``."""
    return batch_size * seq_len * seq_len * element_bytes


def dropout_mask_bytes(*, tokens: Ints, hidden_size: int, active: bool) -> Ints:
    """Dropout on ``[T, D]`` keeps a mask of one byte an element."""
    return tokens * hidden_size if active else 0


# --- the loss -------------------------------------------------------------------------------------------------------


def loss_chain_bytes(*, tokens: Ints, vocab_size: int) -> Ints:
    """Logits and loss at their peak, in the backward of log-softmax."""
    return tokens * vocab_size * LOGIT_BYTES


def loss_chain_rounding_bytes(*, tokens: Ints, vocab_size: int) -> Ints:
    """What the three fp32 blocks of the chain hold above their tensors.

    From 10 MiB on each has a segment of its own, of whole 2 MiB, and a remainder of up to 1 MiB is not split off;
    smaller ones are multiples of 512 bytes.
    """
    one = tokens * vocab_size * FP32_BYTES
    in_segment = -one % SEGMENT_ROUND_BYTES
    unsplit = choose((one >= BIG_REQUEST_BYTES) & (in_segment <= SMALL_LIMIT_BYTES), in_segment, -one % MIN_BLOCK_BYTES)
    return LOGIT_BYTES // FP32_BYTES * unsplit


def logits_bytes(*, tokens: Ints, vocab_size: int, compute_bytes: int) -> Ints:
    """The logits in the dtype of the head."""
    return tokens * vocab_size * compute_bytes


# --- what backward adds for a while ---------------------------------------------------------------------------------


def norm_backward_bytes(*, tokens: Ints, hidden_size: int, layernorm: bool, compute_bytes: int) -> Ints:
    """RMSNorm's fp32 chain holds five ``[T, D]`` at once; LayerNorm's kernel has a gradient in and one out."""
    if layernorm:
        return 2 * tokens * hidden_size * compute_bytes
    return 5 * tokens * hidden_size * FP32_BYTES


def mlp_backward_bytes(
    *, tokens: Ints, intermediate_size: int, gated: bool, activation: str, compute_bytes: int
) -> Ints:
    """Gradients ``[T, I]`` where the FFN's product is taken apart: of the product and of its two factors."""
    _, added = ACTIVATION_CHAINS.get(activation, FUSED_ACTIVATION)
    return tokens * intermediate_size * compute_bytes * (max(added, 3) if gated else added)


def fused_attention_backward_bytes(*, tokens: Ints, num_heads: int, head_dim: int, compute_bytes: int) -> Ints:
    """Gradients of output, query, key and value."""
    return 4 * tokens * num_heads * head_dim * compute_bytes


def eager_attention_backward_bytes(
    *, tokens: Ints, seq_len: Ints, num_heads: int, compute_bytes: int, fp32: bool, dropped: bool = False
) -> Ints:
    """Gradients of the probabilities and of the scores ``[B, H, S, S]``; where softmax was cast, the kept cast is free
    by then, and so is what dropout kept."""
    if not fp32 or compute_bytes == FP32_BYTES:
        return (1 if dropped else 2) * tokens * num_heads * seq_len * compute_bytes
    return tokens * num_heads * seq_len * (2 * FP32_BYTES - compute_bytes - (1 if dropped else 0))


# --- one model's layer ----------------------------------------------------------------------------------------------


def soft_capped_attention(shape: ModelShape) -> bool:
    """Whether the model caps its attention scores."""
    return shape.model_type in SOFT_CAPPED_ATTENTION


def attention_used(shape: ModelShape, attention: Attention) -> Attention:
    """The attention that runs: sdpa has no soft cap."""
    return "eager" if soft_capped_attention(shape) and attention == "sdpa" else attention


def window_masks(shape: ModelShape, *, seq_len: Ints, attention: Attention) -> Flags:
    """Whether sdpa is given masks because some layers see a window that is no longer than the sequence."""
    if attention_used(shape, attention) != "sdpa" or not shape.window:
        return False
    return seq_len >= shape.window


def block_masks(shape: ModelShape, *, attention: Attention, packed: bool) -> bool:
    """Whether sdpa is given masks in every layer because several documents share a sequence."""
    return packed and attention_used(shape, attention) == "sdpa"


def masks_per_model(shape: ModelShape) -> int:
    """How many masks a forward makes: two where some layers see a window and others the whole sequence."""
    mixed = 0 < shape.num_sliding < shape.num_layers
    return MASKS_PER_MODEL.get(shape.model_type, 2 if mixed else 1)


def masks_bytes(
    shape: ModelShape, *, batch_size: Ints, seq_len: Ints, compute_bytes: int, attention: Attention, packed: bool
) -> Ints:
    """The additive masks that all layers of eager attention share, ``[B, 1, S, S]``. The fused kernels need none, but
    sdpa one of bytes for all layers that see a window, ``[1, 1, S, S]``, and of packed sequences one for each kind of
    layers, ``[B, 1, S, S]``."""
    used = attention_used(shape, attention)
    if used != "eager" and not block_masks(shape, attention=attention, packed=packed):
        windowed = window_masks(shape, seq_len=seq_len, attention=attention)
        return choose(windowed, mask_bytes(batch_size=1, seq_len=seq_len, element_bytes=1), 0)
    element_bytes = compute_bytes if used == "eager" else 1
    return masks_per_model(shape) * mask_bytes(batch_size=batch_size, seq_len=seq_len, element_bytes=element_bytes)


def norms_after_ffn(shape: ModelShape) -> int:
    """Norms on the FFN's output (Gemma 2: four per layer, the last of them there; OLMo 2: the second of two)."""
    return 1 if shape.norms_per_layer == 4 or shape.norms_after else 0


def norms_before_ffn_saved_bytes(shape: ModelShape, *, tokens: Ints, compute_bytes: int) -> Ints:
    """One layer's norms up to the FFN; parallel blocks norm one and the same input, which LayerNorm keeps once."""
    count = shape.norms_per_layer - norms_after_ffn(shape)
    one = norm_saved_bytes(
        tokens=tokens,
        width=shape.hidden_size,
        layernorm=shape.norm == "layernorm",
        compute_bytes=compute_bytes,
    )
    shared_inputs = count - 1 if shape.parallel_blocks and shape.norm == "layernorm" else 0
    return count * one - shared_inputs * tokens * shape.hidden_size * compute_bytes


def head_norms_saved_bytes(shape: ModelShape, *, tokens: Ints, compute_bytes: int) -> Ints:
    """One layer's norms of query and key, per head or over all of them."""
    if not shape.head_norms_per_layer:
        return 0
    if shape.joint_head_norms:
        layernorm = shape.norm == "layernorm"
        widths = (shape.query_size, shape.kv_size)
        return sum(
            norm_saved_bytes(tokens=tokens, width=width, layernorm=layernorm, compute_bytes=compute_bytes)
            for width in widths
        )
    return norm_saved_bytes(
        tokens=tokens * (shape.num_heads + shape.num_kv_heads),
        width=shape.head_dim,
        layernorm=shape.norm == "layernorm",
        compute_bytes=compute_bytes,
    )


def attention_saved_bytes(
    shape: ModelShape, *, tokens: Ints, seq_len: Ints, compute_bytes: int, attention: Attention
) -> Ints:
    """What one layer's attention keeps, without its norms."""
    if attention_used(shape, attention) == "eager":
        return eager_attention_saved_bytes(
            tokens=tokens,
            seq_len=seq_len,
            num_heads=shape.num_heads,
            head_dim=shape.head_dim,
            compute_bytes=compute_bytes,
            fp32=shape.model_type not in EAGER_SOFTMAX_AS_COMPUTED,
            soft_capped=soft_capped_attention(shape),
            dropped=shape.attention_dropout,
        )
    fused = fused_attention_saved_bytes(
        tokens=tokens,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        compute_bytes=compute_bytes,
    )
    if shape.model_type in FUSED_QKV_ROTARY:
        fused = fused + tokens * (shape.query_size + shape.kv_size) * compute_bytes
    return fused


def attention_backward_bytes(
    shape: ModelShape, *, tokens: Ints, seq_len: Ints, compute_bytes: int, attention: Attention
) -> Ints:
    """What the backward of one layer's attention adds."""
    if attention_used(shape, attention) == "eager":
        return eager_attention_backward_bytes(
            tokens=tokens,
            seq_len=seq_len,
            num_heads=shape.num_heads,
            compute_bytes=compute_bytes,
            fp32=shape.model_type not in EAGER_SOFTMAX_AS_COMPUTED,
            dropped=shape.attention_dropout,
        )
    return fused_attention_backward_bytes(
        tokens=tokens, num_heads=shape.num_heads, head_dim=shape.head_dim, compute_bytes=compute_bytes
    )
