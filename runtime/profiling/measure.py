"""Timing code so that the number can be believed: repetitions, quartiles, and the line through copies of many sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from meft.planner.records.profile_file import Measurement

LEAST_REPETITIONS = 5
SECONDS_PER_MEASUREMENT = 0.35
"""What a measurement may take, once its least repetitions are done."""


@dataclass(frozen=True)
class Sample:
    """Seconds of one piece of work, repetition by repetition, the first left out: it warms caches up."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds, the median."""
        return statistics.median(self.seconds)

    def rate(self, name: str, unit: str, detail: str, *, amount: float) -> Measurement:
        """``amount`` of work per second, with the quartiles of its repetitions."""
        return measurement(name, unit, detail, [amount / seconds for seconds in self.seconds])

    def duration(self, name: str, detail: str, *, parts: int = 1) -> Measurement:
        """Seconds of each of ``parts`` equal pieces of the work."""
        return measurement(name, "s", detail, [seconds / parts for seconds in self.seconds])


def measurement(name: str, unit: str, detail: str, values: Sequence[float]) -> Measurement:
    """Median and quartiles of ``values`` under a name."""
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return Measurement(
        name=name,
        unit=unit,
        detail=detail,
        median=middle,
        low_quartile=low,
        high_quartile=high,
        repetitions=len(values),
    )


def sample(
    work: Callable[[], object],
    *,
    device: torch.device | None = None,
    prepare: Callable[[], object] | None = None,
    seconds: float = SECONDS_PER_MEASUREMENT,
    clock: Callable[[], float] = time.perf_counter,
) -> Sample:
    """Time ``work`` over and over for ``seconds``, at least five times; ``prepare`` runs before each, off the clock.

    On a CUDA device each repetition ends when the device has done its work.
    """
    finish = torch.cuda.synchronize if device is not None and device.type == "cuda" else _nothing
    times: list[float] = []
    began = clock()
    while len(times) <= LEAST_REPETITIONS or clock() - began < seconds:
        if prepare is not None:
            prepare()
            finish()
        started = clock()
        work()
        finish()
        times.append(clock() - started)
    return Sample(tuple(times[1:]))


def _nothing() -> None:
    """What is computed on the host is done when its call returns."""


@dataclass(frozen=True)
class CopyLine:
    """Copies of many sizes as ``latency_seconds + bytes / bytes_per_second``."""

    latency_seconds: float
    bytes_per_second: float
    worst_error_fraction: float
    """Largest difference between line and median, over the median."""


def fit_copies(sizes: Sequence[int], seconds: Sequence[float]) -> CopyLine:
    """The line of least relative squares with no negative part.

    On a machine so busy that larger copies did not take longer, the largest's bandwidth and no latency; the error of
    the line tells. Raises :class:`ValueError` for fewer than two sizes.
    """
    from scipy.optimize import nnls

    if len(set(sizes)) < 2:
        raise ValueError(f"a line needs copies of two sizes or more, not of {sorted(set(sizes))}")
    num_bytes, took = np.asarray(sizes, dtype=float), np.asarray(seconds, dtype=float)
    scale = num_bytes.max()  # so that both unknowns have the same magnitude
    weighted = np.column_stack([np.ones_like(took), num_bytes / scale]) / took[:, None]
    (latency, per_scale), _ = nnls(weighted, np.ones_like(took))
    if per_scale <= 0:
        latency, per_scale = 0.0, float(took[num_bytes.argmax()])
    fitted = latency + per_scale * num_bytes / scale
    return CopyLine(float(latency), float(scale / per_scale), float(np.abs(fitted / took - 1).max()))
