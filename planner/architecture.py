"""The shape of a Hugging Face causal LM, read from its ``config.json``, and its exact parameter count.

Letters: ``L`` layers, ``D`` hidden size, ``I`` intermediate size, ``V`` vocabulary, ``H`` heads, ``G`` key-value heads,
``d`` head size.
"""

from __future__ import annotations

from typing import Literal

from meft.planner.schema import Count, Index, Record


class ModelShape(Record):
    """What the models of memory, transfer and time need to know of a frozen decoder.

    ``norms_per_layer`` counts vectors of ``D`` weights (each with a bias when ``norm`` is ``layernorm``);
    ``head_norms_per_layer`` counts vectors of ``d`` weights (q/k norms).
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
    norm: Literal["rmsnorm", "layernorm"]
    norms_per_layer: Count
    head_norms_per_layer: Index = 0
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_bias: bool = False
    parallel_blocks: bool = False
    """Attention and FFN read the same normalised input (Phi)."""
