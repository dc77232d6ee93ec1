"""A method's model as a generator of answers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meft.runtime.use.generation import Generator, ModelGenerator


@dataclass(frozen=True)
class UnpaddedGenerator:
    """Prompts of one length at a time: between a trained prompt and the user's there must be no padding, since such
    models count positions over both, and an answer must not depend on which prompts share a batch."""

    inner: ModelGenerator

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, max_new_tokens: int, pad_id: int
    ) -> torch.Tensor:
        """See :class:`~meft.runtime.use.generation.Generator`."""
        made = torch.full((input_ids.shape[0], max_new_tokens), pad_id, dtype=input_ids.dtype)
        lengths = attention_mask.sum(dim=1)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            ids, mask = input_ids[rows][:, -length:], attention_mask[rows][:, -length:]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that position ids are not used
                new = self.inner.generate(ids, mask, max_new_tokens=max_new_tokens, pad_id=pad_id)
            made[rows, : new.shape[1]] = new
        return made


def generator_of(model: nn.Module) -> Generator:
    """Asks a model as it is to be asked."""
    plain = ModelGenerator(model)
    config: Any = getattr(model, "active_peft_config", None)
    unpadded = getattr(config, "is_prompt_learning", False) or getattr(model, "asked_unpadded", False)
    return UnpaddedGenerator(plain) if unpadded else plain
