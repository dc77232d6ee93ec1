"""What one frozen layer keeps for backward, and which layers keep more because sdpa is given a mask there."""

from __future__ import annotations

from dataclasses import dataclass

from meft.planner.base.quantities import Flags, Ints
from meft.planner.models.architecture import ModelShape
from meft.planner.terms import activations as act
from meft.planner.terms.activations import choose, smallest
from meft.planner.terms.methods import Workload


@dataclass(frozen=True, eq=False, repr=False)
class FrozenLayer:
    """Bytes that one frozen layer keeps for backward."""

    norms: Ints
    attention: Ints
    ffn: Ints
    norms_after_ffn: Ints
    masked: Ints = 0
    """What attention keeps more in a layer that is given a mask."""

    @property
    def total(self) -> Ints:
        """All of it."""
        return self.norms + self.attention + self.masked + self.ffn + self.norms_after_ffn


def norm_bytes(shape: ModelShape, workload: Workload) -> Ints:
    """What one norm over ``[T, D]`` keeps."""
    return act.norm_saved_bytes(
        tokens=workload.tokens,
        width=shape.hidden_size,
        layernorm=shape.norm == "layernorm",
        compute_bytes=workload.compute_bytes,
    )


def frozen_layer(shape: ModelShape, workload: Workload) -> FrozenLayer:
    """Of a model of ``shape`` in a step of ``workload``."""
    tokens, q = workload.tokens, workload.compute_bytes
    heads = act.head_norms_saved_bytes(shape, tokens=tokens, compute_bytes=q)
    mask = act.dropout_mask_bytes(tokens=tokens, hidden_size=shape.hidden_size, active=shape.hidden_dropout)
    return FrozenLayer(
        norms=heads + act.norms_before_ffn_saved_bytes(shape, tokens=tokens, compute_bytes=q),
        attention=act.attention_saved_bytes(
            shape,
            tokens=tokens,
            seq_len=workload.seq_len,
            compute_bytes=q,
            attention=workload.attention,
        )
        + mask,
        ffn=act.mlp_saved_bytes(
            tokens=tokens,
            intermediate_size=shape.intermediate_size,
            gated=shape.gated_mlp,
            activation=shape.activation,
            compute_bytes=q,
        )
        + mask,
        norms_after_ffn=act.norms_after_ffn(shape) * norm_bytes(shape, workload),
        masked=_masked_bytes(shape, workload),
    )


def _masked_bytes(shape: ModelShape, workload: Workload) -> Ints:
    masked: Flags = act.block_masks(shape, attention=workload.attention, packed=workload.packed)
    if not masked:
        masked = act.window_masks(shape, seq_len=workload.seq_len, attention=workload.attention)
    if isinstance(masked, bool) and not masked:
        return 0
    more = act.masked_saved_bytes(
        tokens=workload.tokens,
        seq_len=workload.seq_len,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        compute_bytes=workload.compute_bytes,
    )
    return choose(masked, more, 0)


def masked_layers(shape: ModelShape, whole: Ints, *, packed: bool) -> Ints:
    """How many of ``whole`` layers are given a mask, where any is: of packed sequences all; else those that see a
    window: of one layer the most that it can be, else of all but the first."""
    if packed:
        return whole
    after_first = shape.num_sliding - int(shape.slides(0))
    return smallest(whole, choose(whole == 1, 1, after_first)) if shape.window else 0
