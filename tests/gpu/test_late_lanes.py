"""Overlap on CUDA: with late threads and late streams, training is the sequential one bit for bit.

The bodies are those of tests/runtime/exchange/test_overlap.py, which runs them on the emulated device. Here a delay
holds up the task's stream too, so a missing event shows: the device would compute with rows that have not arrived, or
overwrite gradients that have not left.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from late_lanes import CHOICES, SLOW, assert_late_lanes_change_nothing, assert_whoever_needs_a_slow_task_waits

from meft.runtime.device.device import CudaDevice

STEPS = 30


@pytest.fixture(autouse=True)
def deterministic_kernels() -> Iterator[None]:
    """Two runs can only be equal if each kernel gives the same sums every time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cuBLAS, which always sums alike where one stream computes
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)


def cuda() -> CudaDevice:
    return CudaDevice(4 << 30)


@pytest.mark.parametrize(("choice", "late", "max_norm"), [*CHOICES, (CHOICES[1][0], "gpu", 1.0)])
def test_thirty_steps_are_the_sequential_ones_bit_for_bit(glass_folder, choice, late, max_norm) -> None:
    assert_late_lanes_change_nothing(glass_folder, choice, late, max_norm, device=cuda, steps=STEPS)


@pytest.mark.parametrize("slow", SLOW)
def test_whoever_needs_a_slow_task_waits_for_it(glass_folder, slow) -> None:
    assert_whoever_needs_a_slow_task_waits(glass_folder, slow, device=cuda)
