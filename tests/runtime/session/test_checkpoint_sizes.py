"""The planner's figures for disk are those of real files, of the tiny model on the emulated device."""

from __future__ import annotations

from pathlib import Path

import pytest
from sessions import EXPERTS, open_small, small_plan, small_trainer

from meft.planner.memory.disk import disk
from meft.runtime.session.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    OPTIMIZER_STATE,
    TRAINING_STATE,
    latest_checkpoint,
)

HEADER_BYTES = 32 << 10
"""Names, shapes and offsets of the tensors: some 100 bytes each; and the JSON files."""


@pytest.mark.parametrize(
    "choice",
    [{}, EXPERTS, {"hot_rows": 16, "hot_after_steps": 2}, EXPERTS | {"hot_rows": 16, "hot_after_steps": 2}],
    ids=["exact", "experts", "hot", "hot experts"],
)
def test_a_checkpoint_takes_the_disk_that_the_planner_says(
    glass_folder: Path, tmp_path: Path, choice: dict[str, object]
) -> None:
    plan = small_plan(glass_folder, choice=choice)
    session = open_small(glass_folder, plan)
    small_trainer(session, steps=4, output=tmp_path, save_every=4).run()
    folder = latest_checkpoint(tmp_path)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes.keys() >= {ADAPTER_WEIGHTS, ADAPTER_CONFIG, OPTIMIZER_STATE, TRAINING_STATE}
    predicted = disk(plan.request, plan.decision)
    assert 0 < sizes[ADAPTER_WEIGHTS] - predicted.adapter_bytes < HEADER_BYTES
    state_bytes = predicted.checkpoint_bytes - predicted.adapter_bytes
    assert 0 < sizes[OPTIMIZER_STATE] - state_bytes < HEADER_BYTES
    assert 0 < sum(sizes.values()) - predicted.checkpoint_bytes < 2 * HEADER_BYTES
