"""When a run has diverged: its loss stays far above where it began, though finite. Pure: losses in, a verdict out.

The first :data:`FIRST_STEPS` steps' mean loss says where the run began. An optimizer step's loss (the mean over its
micro-batches) is too high if it is above ``factor`` times that, and above it by :data:`LEAST_RISE` at least, so that a
run that begins near zero is not stopped for noise. After :data:`PATIENCE` such optimizer steps in a row the run has
diverged: a single bad batch, or a learning rate's warm-up, is none. A loss that is not finite ends a run at once.
"""

from __future__ import annotations

from collections.abc import Sequence

FIRST_STEPS = 10
"""Micro-batches whose losses say where a run began."""
LEAST_RISE = 1.0
"""In the loss's own unit, nats per token."""
PATIENCE = 20
"""Optimizer steps in a row."""


def highest_sound_loss(losses: Sequence[float], factor: float) -> float:
    """Above this a loss is too high; ``losses`` are those of every micro-batch since the run first began."""
    first = losses[:FIRST_STEPS]
    began = sum(first) / len(first)
    return max(factor * began, began + LEAST_RISE)


def windows_too_high(losses: Sequence[float], *, window: int, factor: float) -> int:
    """How many of the last optimizer steps in a row had a loss that is too high.

    ``losses`` are as in :func:`highest_sound_loss`, ``window`` is the micro-batches of an optimizer step; 0 without
    losses, and where ``factor`` is 0, which switches this off.
    """
    if not losses or not factor:
        return 0
    limit = highest_sound_loss(losses, factor)
    count = 0
    for first in reversed(range(0, len(losses), window)):
        part = losses[first : first + window]
        if sum(part) / len(part) <= limit:
            return count
        count += 1
        if count == PATIENCE:
            return count
    return count
