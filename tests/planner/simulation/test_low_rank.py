"""GaLore's and APOLLO's states, by the shapes that their papers and packages give."""

from __future__ import annotations

import pytest

from meft.planner.models.catalogue import load_model
from meft.planner.models.linears import linear_layers
from meft.planner.records.setup import OptimizerName, TrainingSetup
from meft.planner.simulation.run import simulate
from meft.planner.simulation.stream import stream_peaks

SHAPE = load_model("smollm2-135m")[0]


def state_bytes(optimizer: OptimizerName) -> int:
    """What is there after the second step, beyond what SGD leaves."""
    left = []
    for name in (optimizer, "sgd"):
        setup = TrainingSetup(model=SHAPE, method="full", weights_dtype="bf16", optimizer=name, seq_len=16)
        left.append(stream_peaks(simulate(setup, workspace_bytes=0)).at_moment["optimizer_step_2"][0])
    return left[0] - left[1]


@pytest.mark.parametrize(("optimizer", "rank"), [("galore", 128), ("apollo", 256), ("apollo-mini", 1)])
def test_states_of_a_matrix_are_of_its_rank(optimizer: OptimizerName, rank: int) -> None:
    """Of a matrix m x n: the directions, rank x min(m, n), and two moments, rank x max(m, n); of everything else two
    moments. 2 bytes each beside bf16 weights; blocks of 512 bytes or with an unsplit rest add at most 1.5 %.
    """
    numbers = 0
    in_matrices = 0
    for layer in linear_layers(SHAPE):
        short, long = sorted((layer.inputs, layer.outputs))
        least = min(rank, short)
        numbers += SHAPE.num_layers * (least * short + 2 * least * long)
        in_matrices += SHAPE.num_layers * layer.num_weights
    numbers += 2 * (SHAPE.num_parameters - in_matrices)
    assert state_bytes(optimizer) == pytest.approx(2 * numbers, rel=0.015)
