"""Documents packed into one sequence: their positions, and whether a model's attention keeps to each of them.

transformers tells packed documents by position ids that begin anew, without an attention mask: SDPA and eager attention
then get a mask of blocks, and every document its own positions. A model that makes no such mask (its attention takes no
position ids, or its positions are learned another way) attends across documents; that is tried, not looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from meft.runtime.data.examples import IGNORE_INDEX

DOCUMENT_START = -101
"""Label of a packed document's first token on its way to the device; there it becomes one without loss."""
_TRIED_TOKENS = 4
_NOTICED = 1e-4
"""Of the change where the tokens changed: what is masked changes by nothing at all, one layer of Bloom's by 2e-3."""


def positions_from(labels: torch.Tensor) -> torch.Tensor:
    """Position ids ``[B, S]`` that begin anew at every :data:`DOCUMENT_START`, whose labels become those without loss.

    Padding goes on counting: nothing attends to it from before.
    """
    starts = labels == DOCUMENT_START
    places = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    first = torch.where(starts, places, 0).cummax(dim=1).values
    labels.masked_fill_(starts, IGNORE_INDEX)
    return places - first


@contextmanager
def unpacked_sequences(packed: bool = False) -> Iterator[None]:
    """Tell transformers that no sequence is packed, unless they are ``packed``, so that it need not look.

    It looks by asking the device whether some position ids begin anew, and the host waits for the answer, which is
    behind all that the device was given before. Fake position ids cannot be read at all: left to itself it then builds
    a mask in case there were one, and repeats keys and values because of the mask.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    original = getattr(masking_utils, name, None)
    if original is None or packed:  # a version without the check, or what it would find
        yield
        return
    setattr(masking_utils, name, lambda *_args, **_kwargs: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, original)


def attends_across(model: nn.Module, *, batch_size: int, vocab_size: int) -> bool:
    """Whether what stands in one packed document changes another's outputs in the same sequence.

    One forward of eight tokens in each of ``batch_size`` sequences with one beginning, and one with another.
    """
    device = next(model.parameters()).device
    size = _TRIED_TOKENS
    ids = torch.arange(2 * size, device=device).remainder(vocab_size).repeat(batch_size, 1)
    changed = ids.clone()
    changed[:, :size] = (changed[:, :size] + size + 1).remainder(vocab_size)
    positions = torch.arange(size, device=device).repeat(batch_size, 2)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            apart = (_logits(model, ids, positions) - _logits(model, changed, positions)).abs()
    except TypeError:  # it takes no position ids at all
        return True
    finally:
        model.train(was_training)
    return bool(apart[:, size:].max() > _NOTICED * apart[:, :size].max())


def _logits(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits.float()
