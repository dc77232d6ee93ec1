"""What a frozen layer's kernels do beside its products: how many there are, and the memory that elementwise ones move.

Norms, rotary positions, activation, residuals, and their backward read and write whole ``[T, D]`` tensors between the
products; on a GPU they take a tenth of a step and more. All numbers are counted by dispatching one training step of
random models of 2 and 4 layers on CPU with torch 2.13 and transformers 5.23
(``tests/planner/timing/test_layer_kernels.py`` counts them again), weights frozen, gradients flowing to the embeddings,
views left out.

Letters: ``T`` tokens, ``S`` sequence length, ``D`` hidden size, ``H`` attention heads, ``G`` key-value heads, ``d``
head size, ``I`` intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from meft.planner.models.architecture import ModelShape
from meft.planner.records.plan import Attention

Family = Literal["llama", "gpt2"]
ScoreKernel = Literal["fused", "eager"]


@dataclass(frozen=True)
class Kernels:
    """One part of a layer: its launches, and the bytes read and written by kernels that are not products.

    Bytes per number of a tensor of the part: ``hidden`` per ``T*D``, ``heads`` per ``T*H*d``, ``kv_heads`` per
    ``T*G*d``, ``intermediate`` per ``T*I``, ``scores`` per ``T*H*S``. What a norm's weight, a row's variance and the
    rotary table move is left out: a few thousandths.
    """

    launches: int
    hidden: int = 0
    heads: int = 0
    kv_heads: int = 0
    intermediate: int = 0
    scores: int = 0

    def elementwise_bytes(self, shape: ModelShape, *, tokens: int, seq_len: int) -> int:
        """Read and written for ``tokens`` in sequences of ``seq_len``."""
        per_token = (
            self.hidden * shape.hidden_size
            + self.heads * shape.num_heads * shape.head_dim
            + self.kv_heads * shape.num_kv_heads * shape.head_dim
            + self.intermediate * shape.intermediate_size
            + self.scores * shape.num_heads * seq_len
        )
        return tokens * per_token


@dataclass(frozen=True)
class LayerKernels:
    """A layer's parts as a step runs them."""

    attention: Kernels
    """Forward up to the FFN's entry, both norms included."""
    ffn: Kernels
    """Forward, with the residual addition."""
    backward: Kernels
    """Of the whole layer."""


@dataclass(frozen=True)
class OuterLaunches:
    """Kernels outside the layers."""

    embedding: int
    """Before the first layer: embedding, positions, mask."""
    head: int
    """After the last layer: norm, head and loss, forward and backward."""


OUTER: dict[Family, OuterLaunches] = {
    "llama": OuterLaunches(embedding=18, head=14 + 19),
    "gpt2": OuterLaunches(embedding=10, head=7 + 6),
}

LAYERS: dict[tuple[Family, int, ScoreKernel], LayerKernels] = {
    ("llama", 4, "fused"): LayerKernels(
        Kernels(28, hidden=68, heads=40, kv_heads=40),
        Kernels(6, hidden=12, intermediate=20),
        Kernels(56, hidden=212, heads=64, kv_heads=64, intermediate=36),
    ),
    ("llama", 2, "fused"): LayerKernels(
        Kernels(32, hidden=78, heads=20, kv_heads=20),
        Kernels(6, hidden=6, intermediate=10),
        Kernels(60, hidden=198, heads=32, kv_heads=32, intermediate=18),
    ),
    ("llama", 4, "eager"): LayerKernels(
        Kernels(36, hidden=68, heads=64, kv_heads=48, scores=24),
        Kernels(6, hidden=12, intermediate=20),
        Kernels(65, hidden=212, heads=80, kv_heads=80, intermediate=36, scores=20),
    ),
    ("llama", 2, "eager"): LayerKernels(
        Kernels(42, hidden=78, heads=32, kv_heads=24, scores=28),
        Kernels(6, hidden=6, intermediate=10),
        Kernels(71, hidden=198, heads=40, kv_heads=40, intermediate=18, scores=28),
    ),
    ("gpt2", 4, "fused"): LayerKernels(
        Kernels(6, hidden=28),
        Kernels(11, hidden=12, intermediate=72),
        Kernels(21, hidden=72, intermediate=112),
    ),
    ("gpt2", 2, "fused"): LayerKernels(
        Kernels(6, hidden=14),
        Kernels(11, hidden=6, intermediate=36),
        Kernels(21, hidden=36, intermediate=56),
    ),
    ("gpt2", 4, "eager"): LayerKernels(
        Kernels(14, hidden=60, scores=24),
        Kernels(11, hidden=12, intermediate=72),
        Kernels(29, hidden=96, intermediate=112, scores=20),
    ),
    ("gpt2", 2, "eager"): LayerKernels(
        Kernels(14, hidden=30, scores=12),
        Kernels(11, hidden=6, intermediate=36),
        Kernels(29, hidden=48, intermediate=56, scores=10),
    ),
}
"""By family, bytes per number of the compute dtype, and whether one kernel computes the attention products.

``llama``: RMS norms of 8 kernels each that compute in fp32, rotary positions, gated FFN: LlamaForCausalLM. ``gpt2``:
layer norms of one kernel, learned positions, GELU of 8 kernels: GPT2LMHeadModel.
"""


def family_of(shape: ModelShape) -> Family:
    """The counted model that ``shape`` resembles."""
    return "llama" if shape.norm == "rmsnorm" else "gpt2"


def layer_kernels(shape: ModelShape, *, element_bytes: int, attention: Attention) -> LayerKernels:
    """Of one frozen layer that computes in numbers of ``element_bytes``."""
    return LAYERS[family_of(shape), element_bytes, "eager" if attention == "eager" else "fused"]
