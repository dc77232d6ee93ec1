"""The sizes of ladder side tuning's network, which the planner prices and the runtime builds.

Letters: ``D`` hidden size, ``r`` reduction, ``H`` heads, ``G`` key-value heads, ``m`` the FFN's inner size.
"""

from __future__ import annotations

from dataclasses import dataclass

from meft.planner.base.errors import UsageError
from meft.planner.models.architecture import ModelShape

FAMILIES = frozenset({"llama", "mistral"})
"""Model types whose blocks have the parts that the side network is pruned from, and no others."""


@dataclass(frozen=True)
class SideShape:
    """One block of the side network."""

    width: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def parameters(self) -> int:
        """Numbers of a block: four attention matrices, three of the FFN, two norms."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return self.width * (heads + 3 * self.inner + 2)


def side_shape(shape: ModelShape, reduction: int) -> SideShape:
    """Width ``D / r``, inner size ``m / r``, ``H / r`` heads of the backbone's size, at least one, in as many groups as
    ``G / r`` lets them be.

    Raises:
        UsageError: a model of another kind, or a reduction that leaves nothing.
    """
    if shape.model_type not in FAMILIES or shape.qkv_bias or shape.head_norms_per_layer:
        raise UsageError(
            f"--method lst: {shape.name} ({shape.model_type}) has no blocks that a side network is pruned from; it is "
            f"for Llama and its descendants without biases and head norms"
        )
    if not 1 < reduction <= shape.hidden_size:
        raise UsageError(f"--reduction {reduction}: is not between 2 and the hidden size, {shape.hidden_size}")
    heads = max(1, shape.num_heads // reduction)
    group = shape.num_heads // shape.num_kv_heads
    kv_heads = min(
        (each for each in range(1, heads + 1) if heads % each == 0 and heads // each <= group),
        key=lambda each: abs(each - max(1, shape.num_kv_heads // reduction)),
    )
    return SideShape(
        width=max(1, shape.hidden_size // reduction),
        inner=max(1, shape.intermediate_size // reduction),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=shape.head_dim,
    )


def kept_layers(num_layers: int, dropped: int) -> tuple[int, ...]:
    """Which blocks have a rung, when ``dropped`` of them, evenly spread, have none; the last always has.

    >>> kept_layers(6, 0), kept_layers(6, 2), kept_layers(6, 3)
    ((0, 1, 2, 3, 4, 5), (0, 2, 3, 5), (1, 3, 5))

    Raises:
        UsageError: none would be left.
    """
    if not 0 <= dropped < num_layers:
        raise UsageError(f"--dropped-layers {dropped}: the model has {num_layers} layers; leave at least one")
    kept = num_layers - dropped
    return tuple((place + 1) * num_layers // kept - 1 for place in range(kept))


def ladder_sizes(shape: ModelShape, reduction: int, dropped: int) -> list[int]:
    """Numbers of all that a ladder trains: entrance, per rung projection, gate and block, and the way up."""
    side = side_shape(shape, reduction)
    table = shape.hidden_size * side.width
    rungs = shape.num_layers - dropped
    return [table, *[table] * rungs, *[1] * rungs, *[side.parameters] * rungs, table]
