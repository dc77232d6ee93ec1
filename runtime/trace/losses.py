"""Losses of a traced run: transformers' own, and the fused kernels of Unsloth, Liger and others, as far as memory goes.

Letters: ``T`` tokens, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from meft.planner.records.setup import LossName
from meft.planner.simulation.losses import TORCHTUNE_CHUNKS, TRL_TILE_TOKENS, TRL_TILE_VOCABULARY

IGNORED = -100


class FusedCrossEntropy(torch.autograd.Function):
    """Cross-entropy over logits ``[T, V]`` in their own dtype; the gradient is written over them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss, fp32."""
        losses = torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
        ctx.save_for_backward(logits.detach())
        return losses.sum() / (targets != IGNORED).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The logits' own storage."""
        del grad_output
        (gradient,) = ctx.saved_tensors
        return gradient, None


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Liger's loss over hidden states ``[T, D]`` and the head ``[V, D]``: logits exist for a chunk of tokens at a time.

    Forward makes the gradients too: of the hidden states, and of the head where it is trained.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The mean loss, fp32."""
        tokens, size = hidden.shape
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None else None
        losses = torch.zeros(tokens, dtype=torch.float32, device=hidden.device)
        count = (targets != IGNORED).sum()
        step = chunk_tokens(tokens, size, weight.shape[0])
        for start in range(0, tokens, step):
            rows = hidden[start : start + step]
            logits = rows @ weight.t()
            if bias is not None:
                logits = logits + bias
            gradients = logits  # written over the logits; until here this name held the chunk before
            grad_hidden[start : start + step] = gradients @ weight
            if grad_weight is not None:
                grad_weight += torch.mm(gradients.t(), rows).float()
            if grad_bias is not None:
                grad_bias += gradients.sum(dim=0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients that forward made, scaled in place."""
        del grad_output
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return grad_hidden, grad_weight, None, grad_bias


def chunk_tokens(tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Tokens whose logits exist at once: about as many as make the chunk no larger than the hidden states.

    >>> chunk_tokens(4096, 4096, 32000)
    512
    """
    factor = -(-vocab_size // hidden_size)
    needed = -(-tokens // factor)
    return 1 << (needed - 1).bit_length()


def use_loss(model: nn.Module, name: LossName) -> None:
    """Let a causal LM of transformers, wrapped by PEFT or not, compute its loss that way."""
    core: Any = model
    if hasattr(model, "get_base_model"):
        core = core.get_base_model()
    if name == "fused-ce":
        core.loss_function = _fused_cross_entropy
    elif name == "fused-ce-shifted":
        core.loss_function = _fused_cross_entropy_of_shifted_logits
    elif name == "fused-ce-upcast":
        core.get_output_embeddings().register_forward_hook(lambda _module, _args, logits: logits.float())
        core.loss_function = _fused_cross_entropy_of_shifted_logits
    elif name in _OF_HIDDEN_STATES:
        core.forward = partial(_forward_with_loss_of_hidden_states, core, _OF_HIDDEN_STATES[name])
    elif name == "hf-shifted-logits":
        core.loss_function = _cross_entropy_of_shifted_logits
    elif name == "fused-linear-ce":
        core.forward = partial(_forward_without_logits, core)


def _fused_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    loss: torch.Tensor = FusedCrossEntropy.apply(logits.view(-1, vocab_size), shifted(labels))
    return loss


def _cross_entropy_of_shifted_logits(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any
) -> torch.Tensor:
    """As transformers did until 4.48: the logits without each sequence's last are copied in fp32."""
    logits = logits.float()
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    shift_logits = shift_logits.view(-1, vocab_size)
    return nn.functional.cross_entropy(shift_logits, shift_labels.view(-1), ignore_index=IGNORED)


def _forward_without_logits(core: Any, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> Any:
    """As Liger replaces a causal LM's forward: the decoder, then the fused loss. PEFT passes more than that takes."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    passed = {name: value for name, value in kwargs.items() if value is not None and name != "return_dict"}
    decoded = core.base_model(input_ids=input_ids, **passed)
    hidden, head = decoded.last_hidden_state, core.get_output_embeddings()
    loss = FusedLinearCrossEntropy.apply(hidden.view(-1, hidden.shape[-1]), head.weight, shifted(labels), head.bias)
    return CausalLMOutputWithPast(loss=loss, past_key_values=decoded.past_key_values)


def _fused_cross_entropy_of_shifted_logits(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any
) -> torch.Tensor:
    """Such a kernel in the place of torch's, in transformers until 4.48: over the upcast, shifted copy."""
    logits = logits.float()
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    loss: torch.Tensor = FusedCrossEntropy.apply(shift_logits.view(-1, vocab_size), shift_labels.view(-1))
    return loss


class TiledLogProbabilities(torch.autograd.Function):
    """TRL's ``ChunkedLogProbFunction`` over hidden states ``[T, D]`` and the head ``[V, D]``: one buffer for a tile of
    tokens and vocabulary, filled again in backward, where gradients are summed in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Log-probabilities ``[T]``, fp32."""
        tokens = hidden.shape[0]
        ctx.compute_dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        statistics = [torch.zeros(tokens, dtype=torch.float32, device=hidden.device) for _ in range(7)]
        tile = _tile(hidden, ctx.compute_dtype)
        del tile
        loss, log_z = (torch.zeros(tokens, dtype=torch.float32, device=hidden.device) for _ in range(2))
        del statistics
        ctx.save_for_backward(hidden, weight, log_z)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """In the dtypes of hidden states and head."""
        del grad_output
        hidden, weight, _ = ctx.saved_tensors
        of_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        tile = _tile(hidden, ctx.compute_dtype)
        del tile
        return of_hidden.to(hidden.dtype), None if of_weight is None else of_weight.to(weight.dtype)


def _tile(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows = min(hidden.shape[0], TRL_TILE_TOKENS)
    return torch.empty((rows, TRL_TILE_VOCABULARY), dtype=dtype, device=hidden.device)


def _tiled(hidden: torch.Tensor, head: Any, labels: torch.Tensor) -> torch.Tensor:
    """Of the positions that have a label: here all."""
    selected = hidden.reshape(-1, hidden.shape[-1]).clone()
    loss: torch.Tensor = TiledLogProbabilities.apply(selected, head.weight)
    return loss.sum() / labels.numel()


def _chunked(hidden: torch.Tensor, head: Any, labels: torch.Tensor) -> torch.Tensor:
    """torchtune's ``CEWithChunkedOutputLoss``, whose recipes let the logits go before backward."""
    chunks = [head(chunk) for chunk in hidden.chunk(TORCHTUNE_CHUNKS, dim=1)]
    total: Any = 0.0
    for logits, targets in zip(chunks, shifted(labels).view(labels.shape).chunk(TORCHTUNE_CHUNKS, dim=1), strict=True):
        flat = logits.reshape(-1, logits.shape[-1]).float()
        total = total + nn.functional.cross_entropy(flat, targets.reshape(-1), reduction="sum")
        del flat
    loss: torch.Tensor = total / labels.numel()
    return loss


_OF_HIDDEN_STATES: dict[str, Callable[..., torch.Tensor]] = {"trl-chunked": _tiled, "torchtune-chunked": _chunked}


def _forward_with_loss_of_hidden_states(
    core: Any, loss_of: Callable[..., torch.Tensor], input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any
) -> Any:
    """The decoder, then the head and loss in one."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    passed = {name: value for name, value in kwargs.items() if value is not None and name != "return_dict"}
    decoded = core.base_model(input_ids=input_ids, **passed)
    loss = loss_of(decoded.last_hidden_state, core.get_output_embeddings(), labels)
    return CausalLMOutputWithPast(loss=loss, past_key_values=decoded.past_key_values)


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Each position's target is the next token: ``[B * S]``."""
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous().view(-1)
