"""Products are made of whole 64s of rows, those behind the active ones zero whatever lay there before."""

from __future__ import annotations

import pytest
import torch
from late_lanes import open_with
from sessions import EXPERTS, small_plan, small_trainer

from meft.planner.base.quantities import ALIGNED_ROWS
from meft.runtime.device.lanes import Sequential
from meft.runtime.training.training import Trainer

WIDE: dict[str, object] = {"adapter_width": 512, "active_rows_cap": 400, "top_k": 8}
KEPT: dict[str, object] = {"cached_rows": 60, "gradients_on_device": True}


def run(plan, folder, *, poisoned: bool) -> tuple[Trainer, set[tuple[int, int]]]:
    """Three windows, and the numbers of rows active and multiplied that were seen."""
    session = open_with(plan, folder, Sequential())
    exchange, seen = session.exchange, set()
    buffers = [slot.buffer for slot in (*exchange._on_device.ring, *exchange._window.slots)]
    with torch.no_grad():
        for buffer in buffers if poisoned else ():
            buffer.fill_(float("nan"))
    own = exchange.rows

    def rows(layer: int) -> torch.Tensor:
        found = own(layer)
        active = exchange._state.placement(layer).num_rows
        assert not found[active:].any()
        seen.add((active, found.shape[0]))
        return found

    exchange.rows = rows
    try:
        trainer = small_trainer(session, steps=6)
        trainer.run()
    finally:
        session.close()
    return trainer, seen


@pytest.mark.parametrize(
    "choice",
    [
        {"prefetch_depth": 0, "rows_in_backward": "retained"},
        {"prefetch_depth": 1, "rows_in_backward": "refetched", **EXPERTS, **KEPT},
        {"prefetch_depth": 1, "hot_rows": 40, "hot_after_steps": 2, "tokens_see": "own", **EXPERTS},
    ],
    ids=["exact", "experts, kept", "experts, hot, own"],
)
def test_what_lay_behind_the_active_rows_changes_nothing(glass_folder, choice) -> None:
    plan = small_plan(glass_folder, choice=WIDE | choice, grad_accum=2, seq_len=8, batch_size=1)
    clean, seen = run(plan, glass_folder, poisoned=False)
    poisoned, _ = run(plan, glass_folder, poisoned=True)
    assert poisoned.history.losses == clean.history.losses
    for mine, theirs in zip(poisoned.session.store.layers, clean.session.store.layers, strict=True):
        assert torch.equal(mine.weights, theirs.weights)
    assert all(used % ALIGNED_ROWS == 0 and 0 <= used - active < ALIGNED_ROWS for active, used in seen)
    assert any(used > active for active, used in seen)


def test_rows_up_to_a_cap_that_is_no_multiple_are_as_many_as_there_is_room_for(glass_folder) -> None:
    plan = small_plan(glass_folder, choice={"active_rows_cap": 50, "prefetch_depth": 0}, seq_len=16)
    _, seen = run(plan, glass_folder, poisoned=True)
    assert {used for _, used in seen} == {50}
