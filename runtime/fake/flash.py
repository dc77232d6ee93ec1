"""``flash_attention_2`` without its package: transformers' own path, with stand-ins at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from meft.runtime.fake.attention import FlashAttention


def use_flash_attention(model: nn.Module) -> None:
    """Let the model take that path; transformers would refuse it where the package is missing."""
    model.config._attn_implementation_internal = "flash_attention_2"  # type: ignore[union-attr]


@contextmanager
def flash_attention_package() -> Iterator[None]:
    """Inside, the package's functions are there, and what transformers would read from tensors is said instead.

    No sequence is packed. Of a padded batch every token is taken to be kept, which is the most a batch can need.
    """
    from transformers import masking_utils
    from transformers import modeling_flash_attention_utils as utils

    functions = (_flash, _flash_varlen, None, utils._pad_input, utils._unpad_input)
    replaced = {
        "lazy_import_flash_attention": lambda *_, **__: (functions, (_no_arguments, _no_arguments)),
        "_is_packed_sequence": lambda *_: False,
        "_get_unpad_data": _every_token,
    }
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(utils, name, function))
        masks = masking_utils.AttentionMaskInterface._global_mapping
        stack.enter_context(mock.patch.dict(masks, {"flash_attention_2": _mask_as_given}))
        yield


def _mask_as_given(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> torch.Tensor | None:
    """Transformers drops a mask of ones; where there is one here, the batch is padded."""
    return attention_mask


def _no_arguments(**_: Any) -> dict[str, Any]:
    return {}


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = FlashAttention.apply(query, key, value)
    return output


def _flash_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> torch.Tensor:
    del cu_seqlens_k
    output: torch.Tensor = FlashAttention.apply(query, key, value, cu_seqlens_q.shape[0] - 1)
    return output


def _every_token(attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Indices of the kept tokens, ends of the sequences and the longest length, for a mask ``[B, S]``."""
    lengths = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.zeros(attention_mask.numel(), dtype=torch.int64, device=attention_mask.device)
    ends = torch.nn.functional.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))
    return indices, ends, attention_mask.shape[1]
