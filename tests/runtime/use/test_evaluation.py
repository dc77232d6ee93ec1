"""Evaluation amid training: it begins when the lanes are idle, and training does not notice it."""

from __future__ import annotations

import json

import pytest
import torch
from late_lanes import CACHED, Delays, assert_bit_equal
from sessions import AMPLE_BYTES, EXPERTS, small_plan, small_trainer

from meft.runtime.device.device import EmulatedDevice
from meft.runtime.device.lanes import Overlapped, Sequential
from meft.runtime.device.timeline import LaneClock
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import open_session
from meft.runtime.use.evaluation import EvaluationOptions, EvaluationSchedule, make_evaluator
from meft.runtime.use.inference import serving

STEPS = 8
IDS = torch.tensor([[5, 6, 7, 8, 9]])
PROMPTS = ("The queen said", "Alice", "the White Rabbit looked at the")
CHOICES = [
    pytest.param({}, 1.0, id="exact"),
    pytest.param({"prefetch_depth": 1, **EXPERTS}, None, id="experts, updates in backward"),
    pytest.param({"rows_in_backward": "refetched", **CACHED, **EXPERTS}, 1.0, id="cached"),
    pytest.param({"prefetch_depth": 2, "activation_checkpointing": True, **CACHED}, None, id="cached, look-ahead"),
]


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory, glass_tokenizer):
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": " x"}) + "\n" for prompt in PROMPTS))
    return make_evaluator(EvaluationOptions(str(path), max_new_tokens=2), glass_tokenizer, raw=True)


def trained(folder, plan, schedule, *, evaluation=None, **options):
    """A run of STEPS steps; ``evaluation`` takes place every second optimizer step."""
    clock = LaneClock(keep=True)
    session = open_session(
        plan, load_frozen_model(plan, folder), EmulatedDevice(AMPLE_BYTES), seed=0, schedule=schedule, clock=clock
    )
    try:
        trainer = small_trainer(session, steps=STEPS, **options)
        trainer.evaluation = evaluation
        trainer.run()
    finally:
        session.close()
    return trainer


def without_probes(trainer):
    """What crossed the link, evaluations left out."""
    counted = trainer.session.engine.counted_bytes
    return {key: size for key, size in counted.items() if key[2] != "probe"}


class Watched(EvaluationSchedule):
    """Keeps the logits that the model gives when it is evaluated."""

    def evaluate(self, session, optimizer_steps) -> None:
        super().evaluate(session, optimizer_steps)
        with serving(session):
            self.logits = [*getattr(self, "logits", []), session.model(input_ids=IDS).logits]


@pytest.mark.parametrize(("choice", "max_norm"), CHOICES)
def test_training_with_evaluations_is_training_bit_for_bit(glass_folder, evaluator, choice, max_norm) -> None:
    plan = small_plan(glass_folder, choice=choice, grad_accum=2, seq_len=16, batch_size=1)
    plain = trained(glass_folder, plan, Sequential(), max_norm=max_norm)
    seen = []
    for schedule in (Sequential(), Overlapped(delay=Delays((), 0, slow="adamw"))):
        evaluation = Watched(evaluator, every=2)
        run = trained(glass_folder, plan, schedule, evaluation=evaluation, max_norm=max_norm)
        assert [result.optimizer_steps for result in evaluation.results] == [2, 4]
        seen.append(evaluation.logits)
        assert run.session.engine.counted_bytes["h2d", "outputs", "probe"] > 0
        run.session.engine.counted_bytes = without_probes(run)
        assert_bit_equal(run, plain)
        assert run.measured.kept_rows == plain.measured.kept_rows
        assert run.measured.missing_rows == plain.measured.missing_rows
        if not schedule.overlapped:
            assert run.measured.peaks == plain.measured.peaks
    assert not torch.equal(seen[0][0], seen[0][1])
    assert all(map(torch.equal, *seen))  # with the rows as they were after the update


def busy(session) -> tuple[dict[str, float], dict[str, float]]:
    return session.engine.busy_seconds(), dict(session.clock.busy_seconds)


class Timed(EvaluationSchedule):
    """Keeps each lane's busy seconds from before and after it is evaluated."""

    def evaluate(self, session, optimizer_steps) -> None:
        self.before = busy(session)
        super().evaluate(session, optimizer_steps)
        self.after = busy(session)


@pytest.mark.parametrize("schedule", [Sequential, Overlapped])
def test_an_evaluation_is_no_work_of_a_lane_and_no_task_of_the_trace(glass_folder, evaluator, schedule) -> None:
    plan, evaluation = small_plan(glass_folder, seq_len=16, batch_size=1), Timed(evaluator)
    plain, run = (trained(glass_folder, plan, schedule(), evaluation=each) for each in (None, evaluation))
    assert evaluation.after == evaluation.before
    assert min(evaluation.before[0].values()) > 0
    names = [{event.name for event in each.session.clock.events()} for each in (plain, run)]
    assert names[0] == names[1]
