"""A run whose loss rises without end stops, and its last good checkpoint stays."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sessions import open_small, small_plan, small_trainer

from meft.planner.base.errors import MeftError
from meft.runtime.session.checkpoint import TrainingState, list_checkpoints
from meft.runtime.training.divergence import PATIENCE, highest_sound_loss, windows_too_high

LOSSES = st.lists(st.floats(0, 20), max_size=80)


def test_where_a_run_began_says_what_is_too_high() -> None:
    assert highest_sound_loss([2.0] * 10 + [50.0] * 90, 3.0) == 6.0
    assert highest_sound_loss([1.0, 3.0], 3.0) == 6.0  # a young run
    assert highest_sound_loss([0.05] * 10, 3.0) == 1.05  # three times next to nothing is noise


def test_optimizer_steps_that_are_too_high_are_counted_from_the_last() -> None:
    began = [2.0] * 10
    assert windows_too_high([], window=2, factor=3) == 0
    assert windows_too_high([*began, 7, 7, 5, 6, 7, 7, 8, 5], window=2, factor=3) == 2  # means 7, 5.5, 7, 6.5
    assert windows_too_high([*began, 7, 7, 7], window=2, factor=3) == 2  # the last one is not whole
    assert windows_too_high([*began, *[7.0] * 100], window=1, factor=3) == PATIENCE
    assert windows_too_high([*began, *[7.0] * 100], window=1, factor=0) == 0


@given(LOSSES, st.integers(1, 5), st.floats(1, 10))
def test_a_larger_factor_never_stops_earlier(losses, window, factor) -> None:
    counts = [windows_too_high(losses, window=window, factor=each) for each in (factor, factor + 1)]
    assert counts[1] <= counts[0] <= PATIENCE


@given(LOSSES, st.integers(1, 5))
def test_a_run_whose_loss_falls_is_sound(losses, window) -> None:
    assert windows_too_high(sorted(losses, reverse=True), window=window, factor=3) == 0


def diverging(trainer, *, after: int) -> None:
    """Losses as they are up to a step, then ever higher."""
    step, count = trainer.session.step, 0

    def higher(batch, **options):
        nonlocal count
        count += 1
        result = step(batch, **options)
        return result if count <= after else type(result)(30.0 + count, result.seconds, result.counters)

    trainer.session.step = higher


@pytest.fixture
def trainer(glass_folder, tmp_path):
    return small_trainer(
        open_small(glass_folder, small_plan(glass_folder)), steps=80, output=tmp_path, save_every=4, learning_rate=1e-3
    )


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(trainer, tmp_path) -> None:
    diverging(trainer, after=14)
    with pytest.raises(MeftError, match=rf"has diverged: in the last {PATIENCE} .* is .*checkpoint-00000012\. Try"):
        trainer.run()
    assert len(trainer.history.losses) == 14 + PATIENCE
    (left,) = list_checkpoints(tmp_path)
    state = TrainingState.load(left / "training_state.json")
    assert state.steps_done == 12  # those due at 16, 20 ... would have taken its place
    assert max(state.loss_per_step) < 30


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(trainer) -> None:
    step = trainer.session.step

    def broken(batch, **options):
        result = step(batch, **options)
        bad = len(trainer.history.losses) == 9
        return type(result)(math.nan, result.seconds, result.counters) if bad else result

    trainer.session.step = broken
    with pytest.raises(MeftError, match=r"became nan at step 10; .* is .*checkpoint-00000008\."):
        trainer.run()


def test_the_factor_0_lets_a_run_go_on(glass_folder) -> None:
    trainer = small_trainer(
        open_small(glass_folder, small_plan(glass_folder)), steps=30, divergence_factor=0.0, learning_rate=1e-3
    )
    diverging(trainer, after=4)
    trainer.run()
    assert len(trainer.history.losses) == 30
