"""The oracle: the parallel adapter as one writes it down, dense and slow. The sparse runtime must equal it.

    y = (gate * ReLU(h W_A^T)) W_B, summed over the rows in play

Letters: ``T`` tokens, ``D`` hidden size, ``R`` adapter rows, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

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
        self, hidden: torch.Tensor, rows: torch.Tensor | None = None, probes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Adapter output ``[T, D]`` for ``hidden [T, D]``.

        ``rows`` (int64 ``[A]``) restricts the adapter to those rows by a mask; ``probes`` (int64 ``[T, P]``) are the
        experts that each token may use, all of them by default.
        """
        activations = torch.relu(hidden @ self.keys.T)
        if self.router is not None:
            activations = activations * self._gate(hidden, probes)
        if rows is not None:
            in_play = torch.zeros(self.keys.shape[0], dtype=hidden.dtype, device=hidden.device)
            in_play[rows] = 1
            activations = activations * in_play
        return activations @ self.values

    def _gate(self, hidden: torch.Tensor, probes: torch.Tensor | None) -> torch.Tensor:
        """Gate ``[T, R]``: the score of each row's expert, zero where the token does not probe that expert."""
        assert self.router is not None
        scores = hidden @ self.router.T
        if probes is not None:
            probed = torch.zeros_like(scores)
            scores = scores * probed.scatter(1, probes, 1.0)
        rows_per_expert = self.keys.shape[0] // self.router.shape[0]
        return scores.repeat_interleave(rows_per_expert, dim=1)
