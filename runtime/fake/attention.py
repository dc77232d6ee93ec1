"""Attention as CUDA runs it: which kernel ``scaled_dot_product_attention`` takes, what it keeps and needs for a while.

On an Ampere or newer card torch tries, in this order (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp): the flash
kernel for 16-bit tensors without a mask, grouped heads included; the memory-efficient kernel, masks and fp32 included,
which wants as many key heads as query heads; the plain formula ("math"), which writes the scores out. cuDNN's kernel,
which newer torch prefers on Hopper, is left out, and so are the flash kernel's splits along keys for small batches.

Shapes in SDPA are ``[B, H, S, d]``, in the kernels ``[B, S, H, d]``; keys and values have ``G`` heads.

Letters: ``B`` batch, ``S`` sequence length, ``H`` heads, ``G`` key-value heads, ``d`` head size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from meft.runtime.fake.autocast import autocast_dtype, cast_to, without_autocast

Kernel = Literal["flash", "efficient", "math"]

_HALF = (torch.float16, torch.bfloat16)
_MAX_FLASH_HEAD = 256
_FLASH_ROWS = 128
"""Rows of the backward pass's workspace are rounded up to this, or as many are added to each sequence."""
_EFFICIENT_ALIGNMENT_BYTES = 16
"""Rows of queries, keys and values must start on such a boundary."""
_EFFICIENT_MASK_ALIGNMENT = 8
_EFFICIENT_BLOCK = 64
_EFFICIENT_LSE_ROUNDING = 32
_EFFICIENT_HEAD_IN_REGISTERS = 128


def choose_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, enable_gqa: bool
) -> Kernel:
    """The kernel that CUDA takes for ``query [B, H, S, d]``, ``key`` and ``value [B, G, S, d]``."""
    head_size = query.shape[-1]
    same_heads = query.shape[1] == key.shape[1] == value.shape[1]
    if any(tensor.stride(-1) != 1 for tensor in (query, key, value)) or head_size != value.shape[-1]:
        return "math"
    if mask is None and query.dtype in _HALF and head_size <= _MAX_FLASH_HEAD and (same_heads or enable_gqa):
        return "flash"
    aligned = head_size * query.element_size() % _EFFICIENT_ALIGNMENT_BYTES == 0
    return "efficient" if same_heads and aligned else "math"


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Torch's function of that name, with CUDA's memory; autocast runs it in 16 bits."""
    dtype = autocast_dtype()
    if dtype is not None:
        query, key, value, attn_mask = (cast_to(each, dtype) for each in (query, key, value, attn_mask))
    with without_autocast():
        return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    kernel = choose_kernel(query, key, value, attn_mask, enable_gqa=enable_gqa)
    if kernel == "flash":
        return _flash(query, key, value)
    mask = None if attn_mask is None else _additive(attn_mask, query.dtype)
    if kernel == "efficient":
        bias = None if mask is None else _aligned(mask).expand(*query.shape[:3], key.shape[2])
        output: torch.Tensor = EfficientAttention.apply(query, key, value, bias)
        return output
    return _math(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask becomes numbers to add, at every call."""
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask.logical_not(), float("-inf"), torch.zeros((), dtype=dtype, device=mask.device))


def _aligned(mask: torch.Tensor) -> torch.Tensor:
    """Rows that do not start on a boundary of 8 elements are padded, and the padding cut off again as a view."""
    if all(stride % _EFFICIENT_MASK_ALIGNMENT == 0 for stride in mask.stride()[:-1]):
        return mask
    length = mask.shape[-1]
    padding = _EFFICIENT_MASK_ALIGNMENT - length % _EFFICIENT_MASK_ALIGNMENT
    return torch.nn.functional.pad(mask, (0, padding))[..., :length]


# --- the flash kernel ------------------------------------------------------------------------------------------------


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Head sizes that are no multiple of 8 are padded, each tensor a copy."""
    head_size = query.shape[-1]
    padding = -head_size % 8
    if padding:
        query, key, value = (torch.nn.functional.pad(tensor, (0, padding)) for tensor in (query, key, value))
    transposed = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output: torch.Tensor = FlashAttention.apply(*transposed).transpose(1, 2)
    return output[..., :head_size] if padding else output


class FlashAttention(torch.autograd.Function):
    """FlashAttention 2 over ``[B, S, H, d]``, as torch has it built in and as the package ``flash-attn`` runs it; or
    over ``[T, H, d]``, ``num_sequences`` of varying length one after the other.

    Kept: query, key, value, output, the log-sum-exp and the state of the random numbers. In backward the gradients of
    grouped keys and values are made for every query head first and summed then; the query's is summed in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_sequences: int = 0
    ) -> torch.Tensor:
        """Output like ``query``."""
        *batch, length, heads, _ = query.shape
        output = torch.empty_like(query)
        log_sum_exp = torch.empty((*batch, heads, length), dtype=torch.float32, device=query.device)
        random_state = torch.empty(2, dtype=torch.int64, device=query.device)
        ctx.save_for_backward(query, key, value, output, log_sum_exp, random_state)
        ctx.num_sequences = num_sequences
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients laid out like their tensors."""
        query, key, value, output, _, _ = ctx.saved_tensors
        held = (grad_output.contiguous(), output.contiguous())
        gradients = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        workspace = _flash_backward_workspace(query, key, ctx.num_sequences)
        del held, workspace
        return (*gradients, None)


def _flash_backward_workspace(query: torch.Tensor, key: torch.Tensor, num_sequences: int) -> list[torch.Tensor]:
    """What ``mha_bwd`` of flash_api.cpp allocates: row sums, the query's gradient in fp32, and for grouped heads the
    gradients of keys and values for all query heads."""
    *batch, length, heads, head_size = query.shape
    rows = length + _FLASH_ROWS * num_sequences if num_sequences else -(-length // _FLASH_ROWS) * _FLASH_ROWS
    sums = (*batch, heads, rows)
    accumulated = (*batch, rows, heads, _round_head_size(head_size))
    workspace = [torch.empty(shape, dtype=torch.float32, device=query.device) for shape in (sums, accumulated)]
    if key.shape[-2] != heads:
        expanded = (*key.shape[:-2], heads, head_size)
        workspace += [torch.empty(expanded, dtype=key.dtype, device=key.device) for _ in range(2)]
    return workspace


def _round_head_size(head_size: int) -> int:
    multiple = 32 if head_size <= 128 else 64
    return -(-head_size // multiple) * multiple


# --- the memory-efficient kernel -------------------------------------------------------------------------------------


class EfficientAttention(torch.autograd.Function):
    """The memory-efficient kernel over ``[B, H, S, d]``; ``bias`` is an additive mask ``[B, H, S, S]``, or None.

    Kept: query, key, value, bias, output, and the log-sum-exp with rows rounded up to 32.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Output ``[B, H, S, d]``, laid out as ``[B, S, H, d]``."""
        batch, heads, length, head_size = query.shape
        output = torch.empty((batch, length, heads, head_size), dtype=query.dtype, device=query.device)
        needed = any(ctx.needs_input_grad[:3])
        rows = -(-length // _EFFICIENT_LSE_ROUNDING) * _EFFICIENT_LSE_ROUNDING if needed else 0
        log_sum_exp = torch.empty((batch, heads, rows), dtype=torch.float32, device=query.device)
        if query.dtype in _HALF and head_size > _EFFICIENT_HEAD_IN_REGISTERS:
            torch.empty_like(output, dtype=torch.float32)  # the output is summed in fp32, outside of registers
        transposed = output.transpose(1, 2)
        ctx.save_for_backward(query, key, value, bias, transposed, log_sum_exp)
        return transposed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients ``[B, H, S, d]``, laid out as ``[B, S, H, d]``."""
        query, key, value, _, output, _ = ctx.saved_tensors
        held = grad_output.transpose(1, 2).contiguous()
        gradients = [
            torch.empty(tensor.transpose(1, 2).shape, dtype=tensor.dtype, device=tensor.device)
            for tensor in (query, key, value)
        ]
        workspace = [_row_sums(query, held, output.transpose(1, 2)), _efficient_workspace(query)]
        del held, workspace
        return (*(gradient.transpose(1, 2) for gradient in gradients), None)


def _row_sums(query: torch.Tensor, grad_output: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """``[B, H, S]`` in fp32. The kernels for 16 bits make them; for fp32 torch multiplies the tensors first."""
    if query.dtype in _HALF:
        return torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    return (grad_output * output).sum(-1).transpose(-2, -1).contiguous()


def _efficient_workspace(query: torch.Tensor) -> torch.Tensor:
    """The query's gradient in fp32, in blocks of 64 x 64, each with a lock and a counter (kernel_backward.h)."""
    batch, heads, length, head_size = query.shape
    blocks = -(-length // _EFFICIENT_BLOCK) * -(-head_size // _EFFICIENT_BLOCK)
    block_bytes = 4 * 4 + 4 * _EFFICIENT_BLOCK**2
    return torch.empty(batch * heads * blocks * block_bytes, dtype=torch.uint8, device=query.device)


class SafeSoftmax(torch.autograd.Function):
    """``_safe_softmax`` of attention.cpp: the softmax, which is kept, rows in which every score is -inf, and zeros
    written over those."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor:
        """Like ``scores``."""
        output = torch.softmax(scores, -1)
        masked = torch.isneginf(scores)  # there until the end, as in the C++ code
        rows = masked.all(-1, keepdim=True)
        output.masked_fill_(rows, 0.0)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """Of the scores."""
        (output,) = ctx.saved_tensors
        gradient: torch.Tensor = torch.ops.aten._softmax_backward_data(grad, output, -1, output.dtype)
        return gradient


# --- the plain formula -----------------------------------------------------------------------------------------------


def _math(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """``_scaled_dot_product_attention_math`` of attention.cpp: 16-bit tensors are computed in fp32, query and key are
    each scaled by the root of the scale, and the mask is added in place."""
    dtype = query.dtype
    if dtype in _HALF:
        query, key, value = query.float(), key.float(), value.float()
    root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    scaled = query * root
    if is_causal:
        mask = torch.ones((query.shape[-2], key.shape[-2]), dtype=torch.bool, device=query.device).tril()
        mask = _additive(mask, query.dtype)
    if enable_gqa and key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    scores = torch.matmul(scaled, key.transpose(-2, -1) * root)
    if mask is not None:
        scores.add_(mask)
    scores = SafeSoftmax.apply(scores)
    if dropout_p > 0.0:
        scores = torch.nn.functional.dropout(scores, dropout_p, training=True)
    output = torch.matmul(scores, value).to(dtype)
    rounded = scores.to(dtype)  # torch returns the probabilities too, and drops them
    del rounded
    return output
