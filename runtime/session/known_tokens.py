"""Loss on what is not yet known: tokens that the model already gives more than an even chance weigh less.

Above p = 0.5 greedy decoding says a token for certain, whatever else has probability, and pushing it on costs what the
model knew before. This follows MemFT (Xu et al., "How LoRA Remembers?", arXiv 2605.30260), which moves training towards
tokens below that threshold; here the mean stays one over all tokens with a label, so that the others count as before.

Letters: ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from meft.planner.base.errors import UsageError
from meft.runtime.data.examples import IGNORE_INDEX

KNOWN_ABOVE = 0.5
"""A token's probability above which it is known."""
OPTION = "--known-token-weight"


def require_weight(weight: float) -> None:
    """Raise :class:`UsageError` unless it is between 0 (known tokens teach nothing) and 1 (as any other)."""
    if not 0 <= weight <= 1:
        raise UsageError(f"{OPTION} {weight:g}: give 0, by which known tokens teach nothing, to 1, which is off")


@contextmanager
def known_tokens_weighed(model: nn.Module, weight: float) -> Iterator[None]:
    """Let known tokens weigh ``weight`` in the losses that ``model`` gives for training; 1 changes nothing.

    A loss without gradients, which says how good a model is, stays the plain mean. The model is afterwards as it was.

    Raises:
        UsageError: a weight outside [0, 1]; at once, or at the first forward, a model whose loss is not transformers'
            for causal models.
    """
    require_weight(weight)
    if weight == 1:
        yield
        return
    core = _causal_model(model, weight)
    before = vars(core).get("_loss_function")
    weighed = _Weighed(weight, core.loss_function)
    core.loss_function = weighed
    hook = model.register_forward_hook(weighed.require_used)
    try:
        yield
    finally:
        hook.remove()
        if before is None:
            del core._loss_function
        else:
            core.loss_function = before


def _causal_model(model: nn.Module, weight: float) -> Any:
    """The model of transformers in ``model``, itself or what a method is wrapped around."""
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import LOSS_MAPPING

    core = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if core is None or core.loss_function is not LOSS_MAPPING["ForCausalLM"]:
        raise _other_loss(model if core is None else core, weight)
    return core


def _other_loss(model: object, weight: float) -> UsageError:
    return UsageError(
        f"{OPTION} {weight:g}: {type(model).__name__} has a loss of its own in the place of transformers' for causal "
        f"models; leave the option out"
    )


@dataclass
class _Weighed:
    """Stands where transformers' ``ForCausalLMLoss`` stands, with its arguments."""

    weight: float
    plain: Callable[..., torch.Tensor]
    used: bool = False

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """The loss of ``logits`` ``[..., S, V]``: fp32, a mean over labels, or over ``num_items_in_batch`` of them."""
        if not logits.requires_grad:
            told = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
            return self.plain(logits, labels, vocab_size, ignore_index=ignore_index, **told, **more)
        self.used = True
        logits = logits.float()  # held until the end, as transformers' loss does
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
        targets = shift_labels.view(-1).to(logits.device)
        log_probabilities = logits.view(-1, vocab_size).log_softmax(dim=1)
        items: Any = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        total: torch.Tensor = WeighedSum.apply(log_probabilities, targets, self.weight, ignore_index)
        return total / (items.to(total.device) if torch.is_tensor(items) else items)

    def require_used(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook: a loss to go backward from that did not come from here is not weighed."""
        del args
        loss = getattr(output, "loss", None)
        if loss is not None and loss.requires_grad and not self.used:
            raise _other_loss(module, self.weight)


class WeighedSum(torch.autograd.Function):
    """The sum of tokens' losses times their weights, which are constants to the gradient.

    Between forward and backward it keeps what torch's ``nll_loss`` keeps, log-probabilities and targets, and makes the
    weights again, so that a step takes no more memory at its peak than with the plain loss.
    """

    @staticmethod
    def forward(
        ctx: Any, log_probabilities: torch.Tensor, targets: torch.Tensor, weight: float, ignore_index: int
    ) -> torch.Tensor:
        """Of ``log_probabilities`` ``[T, V]`` and ``targets`` ``[T]``, a scalar."""
        ctx.save_for_backward(log_probabilities, targets)
        ctx.weight, ctx.ignore_index = weight, ignore_index
        places, found = _log_probability_of(targets, log_probabilities, ignore_index)
        del places
        return -(found * token_weights(found, targets, weight, ignore_index)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of the log-probabilities: each token's weight, negated, where its target is."""
        log_probabilities, targets = ctx.saved_tensors
        places, found = _log_probability_of(targets, log_probabilities, ctx.ignore_index)
        scale = token_weights(found, targets, ctx.weight, ctx.ignore_index) * -grad_output
        gradient = torch.zeros_like(log_probabilities)
        gradient.scatter_(1, places, scale.unsqueeze(1))
        return gradient, None, None, None


def token_weights(found: torch.Tensor, targets: torch.Tensor, weight: float, ignore_index: int) -> torch.Tensor:
    """``[T]``: ``weight`` for tokens whose log-probability ``found`` says that they are known, 0 without a label."""
    known = found > math.log(KNOWN_ABOVE)
    return torch.ones_like(found).masked_fill_(known, weight).masked_fill_(targets == ignore_index, 0.0)


def _log_probability_of(
    targets: torch.Tensor, log_probabilities: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in its row each target lies ``[T, 1]``, any place for one without a label, and what is there ``[T]``, for
    such a one 0."""
    ignored = targets == ignore_index
    places = targets.masked_fill(ignored, 0).unsqueeze(1)
    return places, log_probabilities.gather(1, places).squeeze(1).masked_fill_(ignored, 0.0)
