"""Ordinary text among what is to be learnt, so that less of what the model knew is forgotten.

A share of every epoch's examples is *replayed*: text that has nothing to do with the data, such as what the model was
trained on. It is mixed in by the same shuffling that orders an epoch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from meft.planner.base.errors import UsageError
from meft.runtime.data.examples import Example
from meft.runtime.data.loading import Dataset

MOST_SHARE = 0.9


def num_replayed(num_examples: int, share: float) -> int:
    """How many examples are replayed beside so many others, for them to be the ``share`` of all: one at least.

    Raises:
        UsageError: the share is not above 0 and at most :data:`MOST_SHARE`.
    """
    if not 0 < share <= MOST_SHARE:
        raise UsageError(f"--replay-share {share:g}: give more than 0 and at most {MOST_SHARE:g}")
    return max(1, round(num_examples * share / (1 - share)))


def with_replay(dataset: Dataset, replayed: Sequence[Example], *, share: float, seed: int) -> Dataset:
    """The dataset with examples of ``replayed`` behind its own, as :func:`mixed` chooses them."""
    return replace(dataset, examples=mixed(dataset.examples, replayed, share=share, seed=seed))


def mixed(examples: Sequence[Example], replayed: Sequence[Example], *, share: float, seed: int) -> tuple[Example, ...]:
    """The examples, and behind them some of ``replayed`` in an order that follows from the seed.

    Where it takes more than there are, all come again.
    """
    count = num_replayed(len(examples), share)
    order = random.Random(f"replay {seed}").sample(range(len(replayed)), len(replayed))
    chosen = (order * math.ceil(count / len(order)))[:count]
    return (*examples, *(replayed[index] for index in chosen))
