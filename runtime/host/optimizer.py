"""AdamW on the rows that were touched, on the host.

Semantics. A row's optimizer clock is its own: ``step_counts`` counts its updates, and bias correction uses that count.
A row without a gradient in the window is left exactly as it is: no decay of weight or moments. When every row is
touched at every step this is ``torch.optim.AdamW`` (Loshchilov & Hutter 2019), and a test says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from meft.runtime.host.store import HostStore, LayerTables, in_chunks


@dataclass(frozen=True)
class AdamWSettings:
    """Hyperparameters of both optimizers, the rows' and the router's."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


def update_touched_rows(
    store: HostStore, settings: AdamWSettings, *, learning_rate: float, gradient_scale: float = 1.0
) -> int:
    """Update every touched row from its accumulated gradient times ``gradient_scale``; returns how many there were.

    Does not clear the gradients: see :meth:`HostStore.clear_gradients`.
    """
    updated = 0
    for layer, tables in enumerate(store.layers):
        for rows in in_chunks(store.touched_rows(layer), tables.gradients):
            _update_rows(tables, rows, settings, learning_rate=learning_rate, gradient_scale=gradient_scale)
            updated += rows.shape[0]
    return updated


def update_layer(
    store: HostStore, layer: int, settings: AdamWSettings, *, learning_rate: float, gradient_scale: float = 1.0
) -> int:
    """Update one layer's touched rows, clear their gradients and open a new window; returns how many there were.

    By the store's kernels where it has them, else by the code below, which says what they do.
    """
    tables, rows = store.layers[layer], store.touched_rows(layer)
    copy = store.copies[layer] if store.copies else None
    if store.kernels is not None:
        store.kernels.adamw(
            tables.weights,
            tables.first_moment,
            tables.second_moment,
            tables.gradients,
            tables.step_counts,
            rows,
            learning_rate=learning_rate,
            gradient_scale=gradient_scale,
            clear_gradients=True,
            bf16_copy=copy,
            **asdict(settings),
        )
    else:
        for some in in_chunks(rows, tables.gradients):
            _update_rows(tables, some, settings, learning_rate=learning_rate, gradient_scale=gradient_scale)
        tables.gradients.index_fill_(0, rows, 0.0)
        if copy is not None:
            copy[rows] = tables.weights[rows].to(copy.dtype)
    store.own_touched(layer).zero_()
    store.keys_changed(layer)
    return rows.shape[0]


def _update_rows(
    tables: LayerTables, rows: torch.Tensor, settings: AdamWSettings, *, learning_rate: float, gradient_scale: float
) -> None:
    gradients = tables.gradients[rows].mul_(gradient_scale)
    first, second, weights = tables.first_moment[rows], tables.second_moment[rows], tables.weights[rows]
    counts = tables.step_counts[rows] + 1
    adamw(weights, first, second, gradients, counts, settings, learning_rate=learning_rate)
    tables.weights[rows] = weights
    tables.first_moment[rows] = first
    tables.second_moment[rows] = second
    tables.step_counts[rows] = counts


def adamw(
    weights: torch.Tensor,
    first_moment: torch.Tensor,
    second_moment: torch.Tensor,
    gradients: torch.Tensor,
    step_counts: torch.Tensor,
    settings: AdamWSettings,
    *,
    learning_rate: float,
) -> None:
    """One update of some rows ``[n, 2D]``, in place. ``step_counts [n]`` include this update.

    For rows on the host and on the device alike.
    """
    beta1, beta2 = settings.beta1, settings.beta2
    first_moment.lerp_(gradients, 1 - beta1)
    second_moment.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)

    exponent = step_counts.to(torch.float64).unsqueeze(1)
    step_size = (learning_rate / (1 - beta1**exponent)).to(gradients.dtype)
    root_correction = (1 - beta2**exponent).sqrt().to(gradients.dtype)
    denominator = second_moment.sqrt().div_(root_correction).add_(settings.eps)
    weights.mul_(1 - learning_rate * settings.weight_decay)
    weights.sub_(torch.div(first_moment, denominator, out=denominator).mul_(step_size))


def clip_scale(squared_norm: float, max_norm: float | None) -> tuple[float, float]:
    """The global norm and the factor that brings it to ``max_norm`` (1 when it is below, or without a limit)."""
    norm = squared_norm**0.5
    if max_norm is None or norm <= max_norm:
        return norm, 1.0
    return norm, max_norm / (norm + 1e-6)


def scheduled_learning_rate(optimizer_step: int, *, total_steps: int, peak: float, warmup_fraction: float) -> float:
    """Linear warm-up to ``peak``, then linear decay to zero at the end, as the MEFT paper trains (its section 4.3).

    ``optimizer_step`` counts from 0; the first step already learns.
    """
    warmup_steps = round(total_steps * warmup_fraction)
    if optimizer_step < warmup_steps:
        return peak * (optimizer_step + 1) / warmup_steps
    return peak * (total_steps - optimizer_step) / max(1, total_steps - warmup_steps)
