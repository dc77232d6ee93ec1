"""A tower of sparse adapters trained over whole windows, with and without hot rows."""

from __future__ import annotations

import math

import torch
from sparse_setup import run_step, sparse_setup

from meft.runtime.host.optimizer import AdamWSettings, clip_scale

EXACT = {"rtol": 1e-9, "atol": 1e-11}
"""In fp64. Not bit-equal to rows on the host: hot rows stand last in a layer's matrix of active rows, and so sums over
its rows are made in another order."""
STATE = ("weights", "first_moment", "second_moment", "step_counts")
HOT = {"hot_rows": 4, "hot_after_steps": 3}


def optimizer_step(setup, settings: AdamWSettings, *, max_norm: float) -> float:
    """What a session does at a window's end; the norm before clipping."""
    exchange, hot, layers = setup.exchange, setup.exchange.hot, range(setup.store.num_layers)
    with setup.device.scope(), torch.no_grad():
        exchange.close_window()
        squared = math.fsum(exchange.squared_norm(layer).result() for layer in layers)
        if hot is not None and hot.rows:
            squared += float(hot.squared_norm())
        norm, scale = clip_scale(squared, max_norm)
        for layer in layers:
            exchange.update(layer, settings, learning_rate=0.05, gradient_scale=scale)
        if hot is not None:
            hot.update(settings, learning_rate=0.05, gradient_scale=scale)
            hot.choose_if_due()
    return norm


def train_tower(chosen, *, windows: int = 4, max_norm: float = 5.0, device=None):
    """Windows of three micro-batches; the setup, and each window's rows and norm."""
    setup = sparse_setup(chosen, device=device)
    settings, history = AdamWSettings(weight_decay=0.1), []
    for window in range(windows):
        active = []
        for step in range(3):
            torch.manual_seed(10 * window + step)
            hidden, grad = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
            run_step(setup, hidden, grad)
            active.append([state.selection.rows.sort().values.tolist() for state in setup.exchange.layers])
        history.append((active, optimizer_step(setup, settings, max_norm=max_norm)))
    if setup.exchange.hot is not None:
        setup.exchange.hot.bring_home()
    return setup, history
