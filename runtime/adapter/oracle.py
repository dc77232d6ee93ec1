"""The oracle: the parallel adapter as one writes it down, dense and slow. The sparse runtime must equal it.

    y = (gate * ReLU(h W_A^T)) W_B, summed over the rows in play

Letters: ``T`` tokens, ``D`` hidden size, ``R`` adapter rows, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class DenseAdapter(nn.Module):
    """A parallel adapter whose rows are ordinary parameters.

    ``keys`` and ``values`` are ``[R, D]``; ``router`` is ``[N, D]``, or None for an adapter without Key-Experts.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, router: torch.Tensor | None = None) -> None:
        super().__init__()
        self.keys = nn.Parameter(keys.clone())
        self.values = nn.Parameter(values.clone())
        self.router = None if router is None else nn.Parameter(router.clone())

    def forward(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor | None = None,
        probes: torch.Tensor | None = None,
        top_k: int | None = None,
    ) -> torch.Tensor:
        """Adapter output ``[T, D]`` for ``hidden [T, D]``.

        ``rows`` (int64 ``[A]``) restricts the adapter to those rows by a mask; ``probes`` (int64 ``[T, P]``) are the
        experts that each token may use, all of them by default. With ``top_k`` a token uses, of the rows that it may,
        its own best so many.
        """
        activations = torch.relu(hidden @ self.keys.T)
        if self.router is not None:
            activations = activations * self._gate(hidden, probes)
        if rows is not None:
            in_play = torch.zeros(self.keys.shape[0], dtype=hidden.dtype, device=hidden.device)
            in_play[rows] = 1
            activations = activations * in_play
        if top_k is not None:
            activations = activations * self._own(hidden, rows, probes, top_k)
        return activations @ self.values

    @property
    def num_experts(self) -> int:
        """``N``."""
        return 1 if self.router is None else self.router.shape[0]

    def by_chunks(
        self,
        hidden: torch.Tensor,
        rows: Sequence[torch.Tensor],
        probes: torch.Tensor | None = None,
        top_k: int | None = None,
    ) -> torch.Tensor:
        """The same where tokens come in as many chunks as there are ``rows``: a token's output uses its chunk's alone.

        A chunk has ``T / C`` tokens, rounded up; the last has the rest. With ``top_k`` and rows that are the unions of
        their tokens' own best, it is what one chunk of all tokens would be: a token's own best are in its chunk.
        """
        size = -(-hidden.shape[0] // len(rows))
        outputs = []
        for chunk, own_rows in enumerate(rows):
            tokens = slice(chunk * size, (chunk + 1) * size)
            outputs.append(self(hidden[tokens], own_rows, None if probes is None else probes[tokens], top_k))
        return torch.cat(outputs)

    def _own(
        self, hidden: torch.Tensor, rows: torch.Tensor | None, probes: torch.Tensor | None, top_k: int
    ) -> torch.Tensor:
        """One for a token's best ``top_k`` rows by ``h . key``, token by token; zero elsewhere ``[T, R]``."""
        own = torch.zeros(hidden.shape[0], self.keys.shape[0], dtype=hidden.dtype, device=hidden.device)
        per_expert = self.keys.shape[0] // self.num_experts
        for token, scores in enumerate((hidden @ self.keys.T).detach()):
            allowed = range(len(scores)) if rows is None else rows.tolist()
            if probes is not None:
                allowed = [row for row in allowed if row // per_expert in probes[token].tolist()]
            own[token, sorted(allowed, key=lambda row: -float(scores[row]))[:top_k]] = 1
        return own

    def _gate(self, hidden: torch.Tensor, probes: torch.Tensor | None) -> torch.Tensor:
        """Gate ``[T, R]``: the score of each row's expert, zero where the token does not probe that expert."""
        assert self.router is not None
        scores = hidden @ self.router.T
        if probes is not None:
            probed = torch.zeros_like(scores)
            scores = scores * probed.scatter(1, probes, 1.0)
        rows_per_expert = self.keys.shape[0] // self.router.shape[0]
        return scores.repeat_interleave(rows_per_expert, dim=1)


class DenseStable(DenseAdapter):
    """The same with the two stages of StableMoE: ``router`` is ``[2N, D]``, the gate's and below it the light router's.

    A token's one expert is that of its highest score, of the gate's or where ``frozen`` of the light router's; its gate
    is the sigmoid of the gate's. ``balance`` is the last forward's loss: of balance, weighed ``balance_weight``, and
    what the light router has to learn.
    """

    frozen = False
    balance: torch.Tensor

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, router: torch.Tensor, *, balance_weight: float
    ) -> None:
        super().__init__(keys, values, router)
        self.balance_weight = balance_weight

    @property
    def num_experts(self) -> int:
        """``N``."""
        return super().num_experts // 2

    def dispatch(self, hidden: torch.Tensor) -> torch.Tensor:
        """Each token's expert, int64 ``[T, 1]``."""
        assert self.router is not None
        gate, light = self.router.tensor_split(2)
        return torch.tensor([[int((light if self.frozen else gate).mv(token).argmax())] for token in hidden])

    def _gate(self, hidden: torch.Tensor, probes: torch.Tensor | None) -> torch.Tensor:
        """Gate ``[T, R]``: the sigmoid of the score of each row's expert where the token goes there, else zero."""
        assert self.router is not None
        experts = (self.dispatch(hidden) if probes is None else probes).flatten().tolist()
        gate, light = self.router.tensor_split(2)
        gates = torch.sigmoid(hidden @ gate.T)
        mask = torch.zeros_like(gates)
        mask[range(len(experts)), experts] = 1
        if not self.frozen:
            self.balance = self._loss(gates * mask, torch.softmax(hidden.detach() @ light.T, dim=1), experts)
        return (gates * mask).repeat_interleave(self.keys.shape[0] // mask.shape[1], dim=1)

    def _loss(self, gates: torch.Tensor, likely: torch.Tensor, experts: list[int]) -> torch.Tensor:
        num_tokens, num_experts = gates.shape
        even = num_tokens / num_experts
        over = [(experts.count(expert) - even) / even for expert in range(num_experts)]
        excess = torch.tensor(over, dtype=gates.dtype)
        balance = self.balance_weight * (excess * gates.sum(dim=0)).sum() / num_tokens
        return balance - sum(likely[token, expert].log() for token, expert in enumerate(experts)) / num_tokens


class DenseSwitch(DenseAdapter):
    """The same with a switch router: a token's one expert, its probability as the gate, and the loss of balance.

    ``capacity`` is how many tokens an expert takes, ``balance_weight`` the loss's ``alpha``. ``noise [T, D]`` is what
    the router's reading is multiplied by, where it is set; ``balance`` is the last forward's loss.
    """

    noise: torch.Tensor | None = None
    balance: torch.Tensor

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, router: torch.Tensor, *, capacity: int, balance_weight: float
    ) -> None:
        super().__init__(keys, values, router)
        self.capacity, self.balance_weight = capacity, balance_weight

    def probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of each expert for each token, ``[T, N]``."""
        assert self.router is not None
        read = hidden if self.noise is None else hidden * self.noise
        return torch.softmax(read @ self.router.T, dim=1)

    def dispatch(self, hidden: torch.Tensor) -> torch.Tensor:
        """Each token's expert, int64 ``[T, 1]``, one token after the other; ``~n`` where expert ``n`` is full."""
        probabilities = self.probabilities(hidden)
        taken, found = [0] * probabilities.shape[1], []
        for token in probabilities.tolist():
            best = token.index(max(token))
            found.append(best if taken[best] < self.capacity else ~best)
            taken[best] += 1
        return torch.tensor(found).unsqueeze(1)

    def _gate(self, hidden: torch.Tensor, probes: torch.Tensor | None) -> torch.Tensor:
        """Gate ``[T, R]``: the probability of each row's expert where that takes the token, else zero."""
        probabilities = self.probabilities(hidden)
        probes = self.dispatch(hidden) if probes is None else probes
        chosen = [int(probe) if probe >= 0 else ~int(probe) for probe in probes]
        counts = torch.bincount(torch.tensor(chosen), minlength=probabilities.shape[1])
        shares = counts.to(probabilities.dtype) / len(chosen)
        self.balance = self.balance_weight * probabilities.shape[1] * (shares * probabilities.mean(dim=0)).sum()
        mask = torch.zeros_like(probabilities)
        for token, expert in enumerate(probes.flatten().tolist()):
            if expert >= 0:
                mask[token, expert] = 1
        return (probabilities * mask).repeat_interleave(self.keys.shape[0] // mask.shape[1], dim=1)
