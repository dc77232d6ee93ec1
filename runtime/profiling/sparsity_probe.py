"""Measuring activation sparsity: real text through a frozen model, and which rows of an adapter it would choose.

Rows are the model's own FFN rows (what the first FFN product multiplies with: gate and up projections, and the up
projection's negative, whose sign is free), shuffled, or those of a trained adapter. Every hidden state at an FFN's
entry is scored against them; unions are counted over consecutive tokens, for many ``T``, ``K`` and ``R`` at once.

Letters: ``T`` tokens, ``D`` hidden size, ``R`` adapter rows, ``K`` rows per token, ``L`` layers, ``M`` rows in a pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from meft.planner.base.errors import UsageError
from meft.runtime.adapter.blocks import ffn_modules

TOKENS = (64, 128, 256, 512, 1024, 2048)
TOP_KS = (8, 16, 32, 64, 128)
WIDTHS = (256, 512, 1024, 2048, 4096)
GROUP_TOKENS = max(TOKENS)
"""Tokens that are measured together."""
LEAST_TOKENS = min(TOKENS)
ROW_SETS = 4
"""Disjoint sets of rows over which a smaller width is averaged: which rows an adapter has is chance."""
DEPTHS = 4
BATCH_SEQUENCES = 8
HOT_SHARES = (0.01, 0.05, 0.10, 0.25, 0.50)
EXPERT_WIDTH, NUM_EXPERTS = 2048, 32
PROBES = (4, 8, 16)
_NEVER = 1 << 14


# --- the rows ------------------------------------------------------------------------------------------------------


def model_rows(model: nn.Module, *, seed: int = 0, at_most: int = max(WIDTHS)) -> list[torch.Tensor]:
    """Per layer ``[M, D]`` fp32: rows of the first product of the model's own FFN, shuffled, no more than ``at_most``.

    Raises :class:`UsageError` for an FFN in which they cannot be found.
    """
    generator = torch.Generator().manual_seed(seed)
    pools = []
    for block in ffn_modules(model):
        pool = torch.cat(_first_product(block)).detach().float()
        pools.append(pool[torch.randperm(len(pool), generator=generator)[:at_most]])
    return pools


def _first_product(block: nn.Module) -> list[torch.Tensor]:
    gate, up = getattr(block, "gate_proj", None), getattr(block, "up_proj", None)
    if isinstance(gate, nn.Linear) and isinstance(up, nn.Linear):
        return [gate.weight, up.weight, -up.weight]
    for name, by_column in (("gate_up_proj", False), ("fc1", False), ("dense_h_to_4h", False), ("c_fc", True)):
        first = getattr(block, name, None)
        if first is not None:
            weight = first.weight.T if by_column else first.weight
            return [weight, -weight]
    names = ", ".join(name for name, _ in block.named_children())
    raise UsageError(f"{type(block).__name__}: no first product of an FFN is known among {names}; give --adapter")


# --- hidden states -------------------------------------------------------------------------------------------------


def hidden_groups(model: nn.Module, sequences: Sequence[tuple[int, ...]]) -> Iterator[list[torch.Tensor]]:
    """Hidden states at every FFN's entry, per layer ``[GROUP_TOKENS, D]``, padding left out, group after group.

    The last incomplete group is left out too.
    """
    entries: list[torch.Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: entries.append(args[0])) for block in ffn_modules(model)]
    waiting: list[torch.Tensor] = []
    try:
        for start in range(0, len(sequences), BATCH_SEQUENCES):
            ids, mask = _padded(sequences[start : start + BATCH_SEQUENCES])
            entries.clear()
            with torch.inference_mode():
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
            states = [entry[mask].float() for entry in entries]
            waiting = [torch.cat(pair) for pair in zip(waiting, states, strict=True)] if waiting else states
            while len(waiting[0]) >= GROUP_TOKENS:
                yield [states[:GROUP_TOKENS] for states in waiting]
                waiting = [states[GROUP_TOKENS:] for states in waiting]
    finally:
        for hook in hooks:
            hook.remove()


def _padded(sequences: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``[B, S]``, padded on the right with id 0: attention is causal, so no token sees the padding."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = True
    return ids, mask


# --- unions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """What is counted: every ``T`` with every ``K`` below every ``R``."""

    tokens: tuple[int, ...] = TOKENS
    top_ks: tuple[int, ...] = TOP_KS
    widths: tuple[int, ...] = WIDTHS

    def up_to(self, rows: int) -> Grid:
        """With the widths that a pool of so many rows serves, and the largest of them its whole."""
        widths = tuple(width for width in self.widths if width <= rows) or (rows,)
        return Grid(self.tokens, tuple(k for k in self.top_ks if k < widths[-1]), widths)


def count_unions(keys: torch.Tensor, hidden: torch.Tensor, grid: Grid) -> dict[tuple[int, int, int], list[float]]:
    """One layer's unions in one group: for each ``(T, K, R)`` the sizes over windows of ``T`` tokens, each the mean
    over disjoint sets of rows. ``keys [M, D]``, ``hidden [GROUP_TOKENS, D]``.
    """
    scores = hidden @ keys.T
    found: dict[tuple[int, int, int], list[float]] = {}
    for width in grid.widths:
        sets = min(ROW_SETS, keys.shape[0] // width)
        firsts = [_first_ranks(scores[:, place * width : (place + 1) * width], grid) for place in range(sets)]
        for tokens in grid.tokens:
            merged = [first.view(-1, tokens // LEAST_TOKENS, width).amin(1) for first in firsts]
            for top_k in grid.top_ks:
                if top_k < width:
                    sizes = torch.stack([(first < top_k).sum(1) for first in merged]).float().mean(0)
                    found[tokens, top_k, width] = sizes.tolist()
    return found


def _first_ranks(scores: torch.Tensor, grid: Grid) -> torch.Tensor:
    """int16 ``[windows, R]``: the best rank that a row has with any token of a window of ``LEAST_TOKENS``.

    A row is in the window's union for ``K`` exactly if that rank is below ``K``: one choice serves every ``K``.
    """
    tokens, width = scores.shape
    deepest = min(max(grid.top_ks), width)
    rows = scores.topk(deepest, dim=1).indices
    ranks = torch.arange(deepest, dtype=torch.int16).expand(tokens, deepest)
    window = (torch.arange(tokens) // LEAST_TOKENS).unsqueeze(1)
    first = torch.full((tokens // LEAST_TOKENS * width,), _NEVER, dtype=torch.int16)
    first.scatter_reduce_(0, (rows + window * width).flatten(), ranks.flatten(), "amin")
    return first.view(-1, width)


# --- looking ahead, experts, popularity ----------------------------------------------------------------------------


def chosen_rows(keys: torch.Tensor, hidden: torch.Tensor, *, top_k: int) -> torch.Tensor:
    """bool ``[R]``: the union over the tokens' exact choices."""
    union = torch.zeros(keys.shape[0], dtype=torch.bool)
    union[(hidden @ keys.T).topk(top_k, dim=1).indices.flatten()] = True
    return union


def window_unions(keys: torch.Tensor, hidden: torch.Tensor, *, tokens: int, top_k: int) -> torch.Tensor:
    """bool ``[windows, R]``: :func:`chosen_rows` of every window of ``tokens``."""
    return torch.stack([chosen_rows(keys, window, top_k=top_k) for window in hidden.split(tokens)])


def look_ahead_recall(
    keys: Sequence[torch.Tensor],
    hidden: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    *,
    depth: int,
    tokens: int,
    top_k: int,
) -> float:
    """Share of the exact unions (per layer, from :func:`window_unions`) that the hidden state ``depth`` layers earlier
    (at least layer 0's) finds, mean over layers and windows of ``tokens``."""
    recalls = []
    for layer, rows in enumerate(keys):
        ahead = window_unions(rows, hidden[max(0, layer - depth)], tokens=tokens, top_k=top_k)
        found = (exact[layer] & ahead).sum(1) / exact[layer].sum(1)
        recalls.append(float(found.mean()))
    return float(np.mean(recalls))


def expert_recall(
    keys: torch.Tensor, hidden: torch.Tensor, router: torch.Tensor, *, num_probes: int, top_k: int
) -> float:
    """Share of each token's exact choice that lies in its ``num_probes`` best experts, mean over tokens.

    ``router [N, D]``; expert ``n`` owns ``R/N`` consecutive rows of ``keys [R, D]``.
    """
    rows_per_expert = keys.shape[0] // router.shape[0]
    exact = (hidden @ keys.T).topk(top_k, dim=1).indices // rows_per_expert
    probed = (hidden @ router.T).topk(num_probes, dim=1).indices
    inside = (exact.unsqueeze(2) == probed.unsqueeze(1)).any(2)
    return float(inside.float().mean())


def clustered(keys: torch.Tensor, num_experts: int, *, seed: int = 0, rounds: int = 10) -> torch.Tensor:
    """Rows ordered so that alike ones share an expert of ``R/N`` rows: k-means by direction, each centre filled with
    its nearest rows that are left."""
    directions = nn.functional.normalize(keys, dim=1)
    centres = _far_apart(directions, num_experts, seed=seed)
    for _ in range(rounds):
        nearest = (directions @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, directions)
        centres = nn.functional.normalize(sums, dim=1)
    left = torch.ones(len(keys), dtype=torch.bool)
    order = []
    for centre in centres:
        closeness = (directions @ centre).masked_fill(~left, -torch.inf)
        taken = closeness.topk(len(keys) // num_experts).indices
        left[taken] = False
        order.append(taken)
    return keys[torch.cat(order)]


def _far_apart(directions: torch.Tensor, count: int, *, seed: int) -> torch.Tensor:
    """A row at random, then again and again the row least like all that were taken."""
    first = torch.randint(len(directions), (1,), generator=torch.Generator().manual_seed(seed))
    taken = [directions[first[0]]]
    likeness = directions @ taken[0]
    while len(taken) < count:
        taken.append(directions[likeness.argmin()])
        likeness = torch.maximum(likeness, directions @ taken[-1])
    return torch.stack(taken)


def popularity(fetches: NDArray[np.int64], *, ranked_by: NDArray[np.int64] | None = None) -> dict[float, float]:
    """Share of all fetches that the hottest rows carry, by the share of rows; ``fetches [rows]`` counts windows whose
    union held the row. Which rows are hot, other text may say (``ranked_by``), as it does for rows kept for a run."""
    hottest_first = np.argsort(-(fetches if ranked_by is None else ranked_by), kind="stable")
    ordered = fetches[hottest_first].cumsum()
    total = max(1, int(ordered[-1]))
    return {hot: float(ordered[max(1, round(hot * len(ordered))) - 1] / total) for hot in HOT_SHARES}
