"""SparseGPT on one linear layer: which weights go, and how the others make up for them.

Frantar and Alistarh, *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot* (2023), section 3. A
layer's weights ``W [R, C]`` meet inputs ``X [C, n]``; wanted are weights with zeros at the chosen places for which
``|| W X - W' X ||^2`` is least. That is a least-squares problem of the Hessian ``H = X X^T`` for each row. Columns are
gone through from the left: what a column's zeros (and nothing else) cost is made up for by all columns to its right,
for which the inverse Hessian of those columns is needed, all of which one Cholesky factor holds.

Letters: ``R`` rows of a layer (outputs), ``C`` columns (inputs), ``n`` calibration tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from meft.planner.base.errors import UsageError

COLUMNS_AT_ONCE = 128
"""Zeros are chosen for so many columns together, as in the paper; what they cost the others is then made up for at
once."""
DAMPING = 0.01
"""Of the Hessian's mean diagonal, added to it: the paper's, for inputs that do not span every direction."""


@dataclass(frozen=True)
class Sparsity:
    """Which share of a layer's weights goes: any of them, or ``zeros`` of every ``group`` along a row."""

    fraction: float
    zeros: int = 0
    group: int = 0

    @property
    def is_structured(self) -> bool:
        """Whether every group of columns has as many zeros."""
        return self.group > 0

    def __str__(self) -> str:
        return f"{self.zeros}:{self.group}" if self.is_structured else f"{self.fraction:g}"


def parse_sparsity(text: str) -> Sparsity:
    """``0.5``, or ``2:4`` for two zeros in every four weights; raises :class:`UsageError`."""
    structured = re.fullmatch(r"(\d+):(\d+)", text)
    try:
        if structured is None:
            fraction, zeros, group = float(text), 0, 0
        else:
            zeros, group = map(int, structured.groups())
            fraction = zeros / group if group else 1.0
    except ValueError:
        fraction = -1.0
    if not 0.0 < fraction < 1.0:
        raise UsageError(
            f"--sparsity {text}: give a share of the weights between 0 and 1, such as 0.5, or zeros in a group, such "
            f"as 2:4"
        )
    return Sparsity(fraction, zeros, group)


class Hessian:
    """``X X^T / n`` of a layer's inputs, ``[C, C]`` fp32, added up batch by batch."""

    def __init__(self, num_columns: int, device: torch.device) -> None:
        self.matrix = torch.zeros(num_columns, num_columns, device=device)
        self.num_tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Take in inputs ``[..., C]``; the mean of all so far is kept, which no number of tokens makes overflow."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        total = self.num_tokens + len(rows)
        if len(rows):
            self.matrix.mul_(self.num_tokens / total).addmm_(rows.t(), rows, alpha=1 / total)
        self.num_tokens = total


def pruned(weight: torch.Tensor, hessian: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """SparseGPT: the weights ``[R, C]`` with zeros, the others changed to make up for them; in the weights' dtype.

    ``hessian`` is ``[C, C]``. Raises :class:`UsageError` where groups do not divide the columns.
    """
    _check_groups(weight, sparsity)
    left = weight.float().clone()
    dead = hessian.diagonal() == 0  # inputs that are always 0: their weights are no matter
    left[:, dead] = 0.0
    factor = _inverse_factor(hessian, dead)
    for first in range(0, left.shape[1], COLUMNS_AT_ONCE):
        last = min(first + COLUMNS_AT_ONCE, left.shape[1])
        block, own = left[:, first:last], factor[first:last, first:last]
        costs = _column_errors(block, own, sparsity)
        left[:, last:] -= costs @ factor[first:last, last:]
    return left.to(weight.dtype)


def pruned_by_magnitude(weight: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """The smallest weights of a layer (or of each group) set to zero, the others as they are."""
    _check_groups(weight, sparsity)
    return weight.masked_fill(_smallest(weight.float().abs(), sparsity), 0.0)


def objective(weight: torch.Tensor, changed: torch.Tensor, hessian: torch.Tensor) -> float:
    """``|| W X - W' X ||^2 / n``, what pruning makes as small as it can."""
    difference = weight.float() - changed.float()
    return float(((difference @ hessian) * difference).sum())


def _column_errors(block: torch.Tensor, factor: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Prune a block of columns in place, and make up for it within the block; returns each column's error over its
    diagonal ``[R, columns]``, which is what the columns after the block are to make up for."""
    errors = torch.zeros_like(block)
    diagonal = factor.diagonal()
    goes = torch.zeros_like(block, dtype=torch.bool)
    if not sparsity.is_structured:
        goes = _smallest((block / diagonal).square(), sparsity)
    for column in range(block.shape[1]):
        if sparsity.is_structured and column % sparsity.group == 0:
            group = slice(column, column + sparsity.group)
            goes[:, group] = _smallest((block[:, group] / diagonal[group]).square(), sparsity)
        kept = block[:, column].masked_fill(goes[:, column], 0.0)
        errors[:, column] = (block[:, column] - kept) / diagonal[column]
        block[:, column:] -= errors[:, column, None] * factor[column, None, column:]
        block[:, column] = kept
    return errors


def _smallest(scores: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Places of the smallest scores: ``zeros`` in every group along a row, or the whole matrix's share."""
    if sparsity.is_structured:
        groups = scores.unflatten(1, (-1, sparsity.group))
        smallest = groups.topk(sparsity.zeros, dim=-1, largest=False).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, smallest, True).flatten(1)
    count = round(sparsity.fraction * scores.numel())
    smallest = scores.flatten().topk(count, largest=False).indices
    return (
        torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        .index_fill_(0, smallest, True)
        .view_as(scores)
    )


def _inverse_factor(hessian: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor ``U`` of the damped Hessian's inverse ``U^T U``: a row over its diagonal is what its
    column asks of those to its right."""
    damped = hessian.float().clone()
    damped.diagonal()[dead] = 1.0
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _check_groups(weight: torch.Tensor, sparsity: Sparsity) -> None:
    if sparsity.is_structured and (weight.shape[1] % sparsity.group or COLUMNS_AT_ONCE % sparsity.group):
        raise UsageError(
            f"--sparsity {sparsity}: groups of {sparsity.group} do not divide the {weight.shape[1]:,} inputs of a "
            f"layer and the {COLUMNS_AT_ONCE} columns pruned at once; give another group, or a share such as 0.5"
        )
