"""Batches of sequences whose lengths vary, as data loaders make them: the shapes that steps have.

Tensors of ever other sizes leave gaps in the allocator's segments, so a run on such batches reserves more than one on
batches of the longest length, and how much more depends on the order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

Batching = Literal["padded", "sorted", "packed", "padding-free"]
"""*padded*: batches as they come, each as long as its longest sequence. *sorted*: the same, of sequences of like length
(transformers' ``group_by_length``). *packed*: rows filled up to the longest length. *padding-free*: one row of all of a
batch's sequences, one after the other."""
BATCHINGS = get_args(Batching)
Shuffled: TypeAlias = Callable[[int], NDArray[np.int64]]
"""Gives so many indices in an order of chance."""
MEGABATCH = 50
"""transformers sorts within so many batches, or a quarter of the data if that is less."""


@dataclass(frozen=True)
class BatchShape:
    """Of one micro-batch: sequences and tokens of each; ``padded`` if some are shorter than that."""

    batch_size: int
    seq_len: int
    padded: bool = False


def distributed_lengths(mean: float, std: float, *, most: int, count: int) -> tuple[int, ...]:
    """``count`` lengths that are log-normally distributed, which lengths of texts are like, from 1 to ``most`` tokens.

    If ln x has mean m and variance v, x has mean exp(m + v/2) and variance (exp(v) - 1) exp(2m + v). The lengths are
    the quantiles in the middle of ``count`` equal parts.
    """
    variance = math.log1p((std / mean) ** 2)
    middle, deviation = math.log(mean) - variance / 2, math.sqrt(variance)
    quantiles = (NormalDist().inv_cdf((number + 0.5) / count) for number in range(count))
    return tuple(min(max(round(math.exp(middle + deviation * each)), 1), most) for each in quantiles)


def batch_shapes(
    lengths: Sequence[int], *, batch_size: int, batching: Batching, most: int, shuffled: Shuffled
) -> Iterator[BatchShape]:
    """Shapes of one micro-batch after the other, epoch after epoch, each in an order that ``shuffled`` gives.

    Longer sequences are cut to ``most`` tokens. What is left over at the end of an epoch is dropped unless it is all.
    """
    cut = np.minimum(np.asarray(lengths, dtype=np.int64), most)
    while True:
        order = shuffled(len(cut))
        if batching == "sorted":
            order = _sorted(order, cut, batch_size)
        ordered = cut[order]
        if batching == "packed":
            rows = max(int(ordered.sum()) // most, 1)
            yield from (BatchShape(min(batch_size, rows), most) for _ in range(max(rows // batch_size, 1)))
            continue
        whole = len(ordered) // batch_size * batch_size or len(ordered)
        for start in range(0, whole, batch_size):
            batch = ordered[start : start + batch_size]
            if batching == "padding-free":
                yield BatchShape(1, int(batch.sum()))
            else:
                yield BatchShape(len(batch), int(batch.max()), bool((batch != batch.max()).any()))


def _sorted(order: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int) -> NDArray[np.int64]:
    """``get_length_grouped_indices`` of transformers' trainer_pt_utils: longest first within each megabatch, and the
    longest of all at the very beginning."""
    factor = min(len(order) // (batch_size * 4), MEGABATCH) or 1
    size = factor * batch_size
    groups = [
        sorted(order[start : start + size], key=lambda index: -lengths[index]) for start in range(0, len(order), size)
    ]
    first = max(range(len(groups)), key=lambda number: int(lengths[groups[number][0]]))
    groups[0][0], groups[first][0] = groups[first][0], groups[0][0]
    return np.asarray([index for group in groups for index in group], dtype=np.int64)
