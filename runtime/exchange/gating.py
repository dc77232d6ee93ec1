"""How a router on the device finds a token's experts, what they multiply its rows by, and how that trains the router.

*Key-Experts* (the authors' code): an expert's score, without softmax, for the ``P`` best.

*Switch* (Fedus, Zoph and Shazeer, 2021): a token goes to the one expert of the highest probability, which is the gate.
An expert takes the first ``ceil(capacity_factor * T / N)`` tokens that choose it. A token that comes later is dropped:
it brings no rows, its gate is 0, and so only the frozen FFN answers it. What the router reads in training is multiplied
by random numbers within ``1 +- jitter``, which follow from the seed, the micro-batch and the layer, so that a run that
went on had the same. To the loss comes, per layer, ``alpha * N * sum_i f_i P_i``: ``f_i`` the share of tokens that
choose expert ``i``, dropped or not, ``P_i`` the mean probability that the router gives it. The router computes in its
weights' dtype, fp32, whatever the adapter's (the paper's selective precision). Padding is on the device as any token.

*Stable* (StableMoE, Dai et al., ACL 2022): the router has ``2N`` rows, those of the gate and below them the light
router's. A token goes to one expert, however many it has, and the gate is the sigmoid of that expert's score
``s = E h``. In the first stage the expert is that of the highest score, and to the loss come, per layer, ``alpha / T *
sum_i (T_i - T/N) / (T/N) * sum of the gates of the T_i tokens of i``, and the mean cross-entropy of the light router's
scores to the experts that were chosen, whose gradient goes to the light router alone. In the second the light router is
frozen and chooses, and the task alone trains the gate. The paper's light router reads the token's embedding, this one
the layer's input, which the row's choice needs on the host anyway. Sums over tokens are means here, as losses are.

Letters: ``T`` tokens, ``D`` hidden size, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor

from meft.planner.records.plan import Decision
from meft.planner.records.routing import StableOptions, SwitchOptions

_PRIMES = (1_000_003, 8_191)
_SEED_RANGE = 1 << 62


class Gating(Protocol):
    """The device's part of a routing with a router ``weight [N, D]``."""

    def probes(self, layer: int, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Int32 ``[T, P]``: the experts that each token of ``inputs [T, D]`` probes; ``~n`` where expert ``n`` does not
        take it."""
        ...

    def scores(self, layer: int, inputs: torch.Tensor, weight: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
        """``[T, N]`` (stable: ``[T, 2N]``), kept for backward: what :meth:`gate` makes the gate of."""
        ...

    def gate(self, scores: torch.Tensor, probes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the rows of each expert are multiplied by, ``[T, N]``: zero where a token does not probe it."""
        ...

    def balance_loss(self, scores: torch.Tensor, probes: torch.Tensor) -> torch.Tensor | None:
        """A number that is added to the loss; None where there is none."""
        ...

    def backward(
        self,
        grad_gate: torch.Tensor,
        grad_balance: torch.Tensor | None,
        scores: torch.Tensor,
        probes: torch.Tensor,
    ) -> torch.Tensor:
        """The gradient of the products of inputs and router, shaped like ``scores``, from those of gate and balance
        loss."""
        ...

    def add_input_gradient(
        self, layer: int, grad_scores: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
    ) -> None:
        """Add what comes through the router to the gradient ``[T, D]`` of the inputs."""
        ...

    def weight_gradient(
        self, layer: int, grad_scores: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """The router's own, shaped like it."""
        ...


def probed(probes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One where a token probes an expert that takes it, zero elsewhere, shaped and typed like ``like [T, N]``."""
    return torch.zeros_like(like).scatter_(1, probes.long(), 1.0)


@dataclass(frozen=True)
class ScoreGating:
    """Key-Experts."""

    num_probes: int

    def probes(self, layer: int, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See :class:`Gating`: the experts of the best scores."""
        del layer
        scores = inputs @ weight.to(inputs.dtype).T
        return scores.topk(self.num_probes, dim=1).indices.to(torch.int32)

    def scores(self, layer: int, inputs: torch.Tensor, weight: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
        """See :class:`Gating`: they are the gate already."""
        del layer
        scores = inputs @ weight.to(inputs.dtype).T
        return scores.mul_(probed(probes, scores))

    def gate(self, scores: torch.Tensor, probes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`Gating`."""
        del probes, dtype
        return scores

    def balance_loss(self, scores: torch.Tensor, probes: torch.Tensor) -> torch.Tensor | None:
        """See :class:`Gating`: none."""
        del scores, probes
        return None

    def backward(
        self, grad_gate: torch.Tensor, grad_balance: torch.Tensor | None, scores: torch.Tensor, probes: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Gating`."""
        del grad_balance
        return grad_gate.mul_(probed(probes, scores))

    def add_input_gradient(
        self, layer: int, grad_scores: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
    ) -> None:
        """See :class:`Gating`."""
        del layer
        grad.addmm_(grad_scores, weight.to(grad.dtype))

    def weight_gradient(
        self, layer: int, grad_scores: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Gating`."""
        del layer
        return (grad_scores.T @ inputs).to(weight.dtype)


@dataclass(frozen=True)
class SwitchGating:
    """Switch. ``micro_batch`` gives the number of the present one."""

    options: SwitchOptions
    seed: int
    micro_batch: Callable[[], int]

    def probes(self, layer: int, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See :class:`Gating`: the one expert of the highest score, if there is room for one more token."""
        scores = self._read(layer, inputs, weight.dtype) @ weight.T
        best = scores.argmax(dim=1, keepdim=True)
        places = torch.zeros_like(scores, dtype=torch.int32).scatter_(1, best, 1).cumsum_(0).gather(1, best)
        chosen = best.to(torch.int32)
        return torch.where(places > capacity(self.options, *scores.shape), ~chosen, chosen)

    def scores(self, layer: int, inputs: torch.Tensor, weight: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
        """See :class:`Gating`: probabilities."""
        del probes
        return (self._read(layer, inputs, weight.dtype) @ weight.T).softmax(dim=1)

    def gate(self, scores: torch.Tensor, probes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`Gating`."""
        index, taken = _taken(probes)
        return torch.zeros_like(scores).scatter_(1, index, scores.gather(1, index).mul_(taken)).to(dtype)

    def balance_loss(self, scores: torch.Tensor, probes: torch.Tensor) -> torch.Tensor | None:
        """See :class:`Gating`."""
        if not self.options.balance_loss:
            return None
        shares = shares_of_experts(probes, scores)
        return scores.mean(dim=0).mul_(shares).sum().mul_(self.options.balance_loss * scores.shape[1])

    def backward(
        self, grad_gate: torch.Tensor, grad_balance: torch.Tensor | None, scores: torch.Tensor, probes: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Gating`. Of probabilities ``p`` with gradient ``g`` it is ``p * (g - sum_i g_i p_i)``;
        ``g`` is the gate's, of the expert that takes the token, and the balance loss's, alike for all tokens."""
        index, taken = _taken(probes)
        of_chosen = grad_gate.gather(1, index).to(scores.dtype).mul_(taken)
        inner = scores.gather(1, index).mul_(of_chosen)
        if grad_balance is None:
            grad = torch.zeros_like(scores).sub_(inner)
        else:
            factor = self.options.balance_loss * scores.shape[1] / scores.shape[0]
            of_mean = shares_of_experts(probes, scores).mul_(grad_balance).mul_(factor)
            inner += (scores @ of_mean).unsqueeze(1)
            grad = of_mean - inner
        return grad.scatter_add_(1, index, of_chosen).mul_(scores)

    def add_input_gradient(
        self, layer: int, grad_scores: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
    ) -> None:
        """See :class:`Gating`: through the same random numbers."""
        through = grad_scores @ weight
        noise = self._noise(layer, through, through.dtype)
        grad.add_(through if noise is None else through.mul_(noise))

    def weight_gradient(
        self, layer: int, grad_scores: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Gating`."""
        return grad_scores.T @ self._read(layer, inputs, weight.dtype)

    def _read(self, layer: int, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the router reads, ``[T, D]`` in its dtype."""
        noise = self._noise(layer, inputs, dtype)
        return inputs.to(dtype) if noise is None else noise.mul_(inputs)

    def _noise(self, layer: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The layer's random numbers in this micro-batch, the same as often as they are asked for; None without
        jitter."""
        jitter = self.options.jitter
        if not jitter:
            return None
        numbers = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        generator = None
        if not isinstance(like, FakeTensor):
            mixed = (self.seed * _PRIMES[0] + self.micro_batch()) * _PRIMES[1] + layer
            generator = torch.Generator(like.device).manual_seed(mixed % _SEED_RANGE)
        return numbers.uniform_(1 - jitter, 1 + jitter, generator=generator)


@dataclass
class StableGating:
    """Stable, in its first stage or, once :attr:`frozen`, its second."""

    options: StableOptions
    num_experts: int
    frozen: bool = False

    def probes(self, layer: int, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See :class:`Gating`: the one expert of the highest score, of the gate's or in the second stage of the light
        router's."""
        del layer
        gate, light = weight.tensor_split(2)
        scores = inputs.to(weight.dtype) @ (light if self.frozen else gate).T
        return scores.argmax(dim=1, keepdim=True).to(torch.int32)

    def scores(self, layer: int, inputs: torch.Tensor, weight: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
        """See :class:`Gating`: of gate and light router, ``[T, 2N]``."""
        del layer, probes
        return inputs.to(weight.dtype) @ weight.T

    def gate(self, scores: torch.Tensor, probes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`Gating`."""
        index = probes.long()
        gate = scores.new_zeros(scores.shape[0], self.num_experts)
        return gate.scatter_(1, index, scores.gather(1, index).sigmoid_()).to(dtype)

    def balance_loss(self, scores: torch.Tensor, probes: torch.Tensor) -> torch.Tensor | None:
        """See :class:`Gating`: with what the light router has to learn."""
        if self.frozen:
            return None
        index = probes.long()
        learnt = self._light(scores).log_softmax(dim=1).gather(1, index).mean()
        gates = scores.gather(1, index).sigmoid_()
        return gates.mul_(self._excess(scores, probes)).mean().mul_(self.options.balance_loss).sub_(learnt)

    def backward(
        self, grad_gate: torch.Tensor, grad_balance: torch.Tensor | None, scores: torch.Tensor, probes: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Gating`. A gate ``g`` gives its score ``g (1 - g)`` of its gradient; the light router's scores
        get ``(softmax - 1 where chosen) / T`` of the loss's."""
        index = probes.long()
        of_chosen = grad_gate.gather(1, index).to(scores.dtype)
        grad = torch.zeros_like(scores)
        if grad_balance is not None:
            share = grad_balance / scores.shape[0]
            of_chosen.add_(self._excess(scores, probes).mul_(share).mul_(self.options.balance_loss))
            light = grad[:, self.num_experts :].add_(self._light(scores).softmax(dim=1))
            light.scatter_add_(1, index, torch.full_like(of_chosen, -1.0)).mul_(share)
        gates = scores.gather(1, index).sigmoid_()
        of_chosen.mul_(gates).mul_(gates.neg_().add_(1))
        return grad.scatter_add_(1, index, of_chosen)

    def add_input_gradient(
        self, layer: int, grad_scores: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
    ) -> None:
        """See :class:`Gating`: through the gate."""
        del layer
        num_experts = self.num_experts
        grad.add_(grad_scores[:, :num_experts] @ weight[:num_experts])

    def weight_gradient(
        self, layer: int, grad_scores: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`Gating`: zeros for the light router in the second stage."""
        del layer
        return grad_scores.T @ inputs.to(weight.dtype)

    def _light(self, scores: torch.Tensor) -> torch.Tensor:
        """The light router's scores ``[T, N]``."""
        return scores[:, self.num_experts :].contiguous()

    def _excess(self, scores: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
        """How far each token's expert is above its even share of tokens, over that share: ``[T, 1]``."""
        shares = shares_of_experts(probes, scores)
        return shares.mul_(self.num_experts).sub_(1)[probes.long()]


def capacity(options: SwitchOptions, num_tokens: int, num_experts: int) -> int:
    """Tokens of a micro-batch that an expert takes: ``ceil(capacity_factor * T / N)``."""
    return math.ceil(options.capacity_factor * num_tokens / num_experts)


def shares_of_experts(probes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Of each of ``N`` experts the share of tokens that choose it, dropped or not; typed as ``scores [T, N]``."""
    chosen = torch.where(probes < 0, ~probes, probes).flatten()
    once = scores.new_full((scores.shape[0],), 1 / scores.shape[0])
    return scores.new_zeros(scores.shape[1]).index_add_(0, chosen, once)


def _taken(probes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's expert, int64 ``[T, 1]`` (0 for those dropped), and whether it takes the token."""
    return probes.long().clamp_(min=0), probes >= 0


def gating_of(decision: Decision, *, seed: int, micro_batch: Callable[[], int]) -> Gating | None:
    """The device's part of a decision's routing; None where the device has none."""
    if not decision.needs.gated:
        return None
    if decision.stable is not None:
        return StableGating(decision.stable, decision.num_experts)
    if decision.switch is None:
        return ScoreGating(decision.num_probes)
    return SwitchGating(decision.switch, seed, micro_batch)
