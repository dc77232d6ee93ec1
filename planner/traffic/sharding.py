"""A base that is sharded over a machine's cards: what each has of it, and what it gathers.

FSDP2 (torch's ``fully_shard``) divides each of a layer's matrices by its rows, those that a module's weight has first,
into ``N`` parts of ``ceil(rows / N)``; the last are padded to that. To run a layer it gathers all parts of all its
matrices into one flat buffer, and copies them out into the matrices, which are padded too. Scales of quantized weights,
norms, biases, embeddings and head stay whole.

Letters: ``N`` cards, ``L`` layers, ``W`` bytes of a layer's matrices, padded.
"""

from __future__ import annotations

from meft.planner.base.dtypes import WeightsDtype
from meft.planner.base.quantities import COMPUTE_DTYPE_BYTES, Flags, Ints
from meft.planner.models.architecture import ModelShape
from meft.planner.models.linears import Linear, linear_layers
from meft.planner.records.plan import Decision, Request

TRANSPOSED = ("gpt2",)
"""Model types whose linear layers keep their weights [inputs, outputs]."""
WEIGHTS = "weights"
"""Category of what cards gather from each other."""
GATHERED_AT_ONCE = 2
"""Layers' worth: the weights of the one that runs, and the flat buffer of the next."""


def shard_bytes(shape: ModelShape, layer: Linear, *, dtype: WeightsDtype, shards: int) -> int:
    """One card's part of a linear layer's matrix; of nf4 the matrix is a column of packed bytes.

    >>> from types import SimpleNamespace
    >>> layer, shape = SimpleNamespace(num_weights=15, inputs=3, outputs=5), SimpleNamespace(model_type="llama")
    >>> shard_bytes(shape, layer, dtype="bf16", shards=2)  # 3 of 5 rows of 3 numbers of 2 bytes
    18
    """
    if dtype == "nf4":
        packed = -(-layer.num_weights // 2)
        return -(-packed // shards)
    rows = layer.inputs if shape.model_type in TRANSPOSED else layer.outputs
    return -(-rows // shards) * (layer.num_weights // rows) * COMPUTE_DTYPE_BYTES[dtype]


def layer_shard_bytes(shape: ModelShape, *, dtype: WeightsDtype, shards: int) -> int:
    """One card's part of a layer's matrices: ``W / N``."""
    return sum(shard_bytes(shape, layer, dtype=dtype, shards=shards) for layer in linear_layers(shape))


def matrices_bytes(shape: ModelShape, *, dtype: WeightsDtype) -> int:
    """All layers' matrices, whole: what is sharded."""
    return shape.num_layers * layer_shard_bytes(shape, dtype=dtype, shards=1)


def gathered_layer_bytes(shape: ModelShape, *, dtype: WeightsDtype, shards: int) -> int:
    """``W``, of a layer that has been gathered, and as much of the buffer that the next one's come in; 0 where each
    card has all."""
    return shards * layer_shard_bytes(shape, dtype=dtype, shards=shards) if shards > 1 else 0


def gathers(num_layers: int, *, activation_checkpointing: Flags) -> Ints:
    """How many layers are gathered in a micro-batch: all in forward, and in backward; without checkpointing the first
    has no backward, as its input needs no gradient."""
    return 2 * num_layers - 1 + activation_checkpointing


def received_bytes(shape: ModelShape, *, dtype: WeightsDtype, shards: int, activation_checkpointing: Flags) -> Ints:
    """What a card receives of weights in a micro-batch, and sends as well: of each gathered layer ``(N - 1) / N``."""
    layer = layer_shard_bytes(shape, dtype=dtype, shards=shards) * (shards - 1)
    return gathers(shape.num_layers, activation_checkpointing=activation_checkpointing) * layer


def gathered_bytes_of(request: Request, decision: Decision) -> int:
    """:func:`received_bytes` of a plan's step; 0 where each card has all of the base."""
    received = received_bytes(
        request.model,
        dtype=request.weights_dtype,
        shards=request.base_shards,
        activation_checkpointing=decision.activation_checkpointing,
    )
    return int(received)
