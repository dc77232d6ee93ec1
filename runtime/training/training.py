"""The training loop: micro-batches, accumulation windows, schedule, checkpoints, and what the report needs to know.

A step is one micro-batch. ``grad_accum`` steps make a window, which ends with one optimizer step; a last window that
``--steps`` leaves incomplete is applied with the steps it has.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from meft.planner.base.errors import MeftError, UsageError
from meft.planner.records.plan import Lane
from meft.planner.records.report import Evaluation as Scores
from meft.runtime.data.examples import Batch, Example, batch_indices, collate
from meft.runtime.data.metrics import MAIN_SCORE
from meft.runtime.host.optimizer import scheduled_learning_rate
from meft.runtime.ranks.rounds import Rounds
from meft.runtime.session.checkpoint import (
    RunObserved,
    TrainingState,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from meft.runtime.session.known_tokens import known_tokens_weighed
from meft.runtime.session.session import Session, StepResult, WindowEnd
from meft.runtime.session.stages import begin_second_stage_if_due
from meft.runtime.training.divergence import PATIENCE, highest_sound_loss, windows_too_high
from meft.runtime.training.journal import Tell, silent
from meft.runtime.training.measured import Measurements, Worked


@dataclass(frozen=True)
class TrainingOptions:
    """Hyperparameters of a run; the peak learning rate and its warm-up are the MEFT paper's for LLaMA (section 4.3)."""

    steps: int
    learning_rate: float = 1e-4
    warmup_fraction: float = 0.02
    max_norm: float | None = 1.0
    seed: int = 0
    save_every: int = 0
    """Optimizer steps between checkpoints; 0 saves only at the end."""
    patience: int | None = None
    """End after so many evaluations in a row that were no better than the best before; None: never."""
    known_token_weight: float = 1.0
    """What a token that the model knows already weighs in the loss; see :mod:`meft.runtime.session.known_tokens`."""
    divergence_factor: float = 3.0
    """How often its first loss a run's loss may be for long; 0: as often as it likes. See
    :mod:`meft.runtime.training.divergence`."""


@dataclass
class History:
    """What happened, step by step, since the run first began (a resumed run goes on with the lists it left)."""

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """One finished step, for a progress display."""

    step: int
    total_steps: int
    loss: float


class Evaluation(Protocol):
    """Something that uses the session between windows and changes nothing of training."""

    results: list[Scores]
    """Of the whole run, oldest first."""

    def due(self, optimizer_steps: int, *, last: bool) -> bool:
        """Whether it wants to, after so many optimizer steps; ``last`` if there are no more."""
        ...

    def evaluate(self, session: Session, optimizer_steps: int) -> None:
        """Use the session, whose lanes are idle."""
        ...


@dataclass
class Trainer:
    """Runs a session over examples. ``output`` is where checkpoints go, ``None`` for none."""

    session: Session
    examples: Sequence[Example]
    options: TrainingOptions
    pad_id: int
    meft_version: str
    output: Path | None = None
    sequence_tokens: tuple[int, ...] = ()
    """Lengths of the data's sequences, for the report."""
    on_step: Callable[[Progress], None] = lambda _: None
    on_trained: Callable[[], None] = lambda: None
    """Called before each evaluation and after the last window: the device holds what training needs of it."""
    observe: Callable[[], RunObserved] | None = None
    """What a checkpoint says of the run so far beside its state; the lanes are idle."""
    on_best: Callable[[], None] = lambda: None
    """Called after an evaluation that was better than all before."""
    tell: Tell = silent
    """Told of every event; see :mod:`meft.runtime.training.journal`."""
    evaluation: Evaluation | None = None
    """What it needs of the device is not counted as training's."""
    history: History = field(default_factory=History)
    measured: Measurements = field(default_factory=Measurements)
    data: str = ""
    """Where the examples come from, for errors."""
    stop_requested: bool = False
    """Set by a signal handler: the run ends after the current window, with a checkpoint. Of several ranks the first to
    be asked asks the others."""
    _agreed: bool = False
    """Of several ranks: whether one was asked, as all know since their last round."""

    def __post_init__(self) -> None:
        peers = self.session.peers
        self._rounds = None if peers is None else Rounds(peers)
        self._rank, self._ranks = (0, 1) if peers is None else (peers.rank, peers.size)

    @property
    def steps_done(self) -> int:
        """Micro-batches since the run first began."""
        return len(self.history.losses)

    @property
    def _stops(self) -> bool:
        """Whether the run ends after this window; the same in every rank."""
        return self.stop_requested if self._rounds is None else self._agreed

    @property
    def best_evaluation(self) -> Scores | None:
        """Of the whole run, if there were any."""
        results = [] if self.evaluation is None else self.evaluation.results
        return results[best_result(results)] if results else None

    @property
    def out_of_patience(self) -> bool:
        """Whether the evaluations say that the run should end."""
        patience = self.options.patience
        if patience is None or self.evaluation is None or not self.evaluation.results:
            return False
        return len(self.evaluation.results) - 1 - best_result(self.evaluation.results) >= patience

    def run(self) -> None:
        """Train up to ``options.steps`` steps, from where the history stands."""
        self.session.device.reset_peaks()
        self.tell("begin", step=self.steps_done, total_steps=self.options.steps)
        try:
            made_up = self._make_up_for_evaluation()
            if not self.out_of_patience:
                with known_tokens_weighed(self.session.model, self.options.known_token_weight):
                    self._train()
            elif made_up:
                self.save()
        finally:
            self.measured.peaks = self.measured.peaks.larger(self.session.device.peaks())
        self.tell("end", step=self.steps_done, reason=self._reason())

    def _train(self) -> None:
        for first, last in self._windows():
            if begin_second_stage_if_due(self.session, first / self.options.steps):
                self.tell("second_stage", step=first)
            self._run_window(first, last)
            ends = self._stops or last == self.options.steps
            evaluates = self._evaluation_due(last=last == self.options.steps) and not self._stops
            sound = self._sound()
            if ends or (sound and self._save_due()):
                self.save()
            if ends or evaluates:
                self.on_trained()
            if evaluates:
                self._evaluate()
            if ends:
                return
            if evaluates and (self.out_of_patience or self._stops):
                self.save()
                return

    def _reason(self) -> str:
        if self.steps_done >= self.options.steps:
            return "done"
        return "patience" if self.out_of_patience else "interrupted"

    def _save_due(self) -> bool:
        every = self.options.save_every
        return every > 0 and len(self.history.learning_rates) % every == 0

    def save(self) -> None:
        """Write a checkpoint of the present state, if there is somewhere to write it."""
        self.session.meet()
        self.session.require_replicas()
        if self.output is None or not self.history.losses:
            return
        observe = self.observe
        if observe is not None and self.session.peers is not None:
            seen = observe()  # every rank has a part in it
            observe = lambda: seen  # noqa: E731
        output = self.output
        folder = self.session.at_first(
            lambda: save_checkpoint(
                self.session, output, self._state(), meft_version=self.meft_version, observe=observe
            )
        )
        if folder is not None:
            self.tell("checkpoint", step=self.steps_done, folder=str(folder))
        if self.session.peers is not None:
            self.session.peers.barrier()

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint: same data, seed and settings, or a :class:`UsageError` that names what differs.

        More steps than before make the run longer: from here on the learning rate is that of a run of so many steps.
        """
        state = self.load(folder)
        now = self._state()
        if state.data_digest != now.data_digest:
            raise UsageError(f"--resume {folder}: {_data_changed(state, now)}")
        for name in ("seed", "settings"):
            before, given = getattr(state, name), getattr(now, name)
            if before != given:
                raise UsageError(f"--resume {folder}: {name} was {before}, now {given}; give what the run began with")
        if now.total_steps < state.total_steps:
            raise UsageError(
                f"--resume {folder}: the run was to be {state.total_steps} steps long, now {now.total_steps}; it can "
                f"be made longer, not shorter"
            )
        self.history = History(
            list(state.loss_per_step),
            list(state.learning_rate_per_optimizer_step),
            list(state.gradient_norm_per_optimizer_step),
        )
        if self.evaluation is not None:
            self.evaluation.results[:] = state.evaluations

    def load(self, folder: Path) -> TrainingState:
        """Bring the session to where a checkpoint stood."""
        return load_checkpoint(self.session, folder)

    def batch(self, step: int) -> Batch:
        """The batch of a step, the same in every process."""
        request = self.session.plan.request
        chosen = batch_indices(
            step, num_examples=len(self.examples), batch_size=request.batch_size, seed=self.options.seed
        )
        return collate([self.examples[index] for index in chosen], seq_len=request.seq_len, pad_id=self.pad_id)

    def measure_recall(self) -> float | None:
        """Share of the exact choice that look-ahead finds, mean over layers, on one batch that is not trained on.

        Its transfers are counted apart from the steps'. None where other ranks would have to take part, which are
        done then: those that own rows, or have their part of the base.
        """
        session = self.session
        if session.exchange.depth == 0:
            return 1.0
        if session.tables is not None or session.base is not None:
            return None
        recalls: list[float] = []

        def observe(layer: int, hidden: torch.Tensor) -> None:
            if layer:
                recalls.append(session.exchange.look_ahead_recall(layer, hidden))

        batch = self.batch(len(self.history.losses))
        session.exchange.expect_tokens(batch.attention_mask.flatten().bool())
        with _probing(session), session.device.scope(), torch.no_grad():
            session.exchange.observer = observe
            session.loss(batch)
        return sum(recalls, start=1.0) / (len(recalls) + 1)  # layer 0 is routed exactly

    def _sound(self) -> bool:
        """Whether the loss is where a checkpoint should be: one that is rising would take the last good one's place.

        Raises :class:`MeftError` if the run has diverged.
        """
        size, factor = self.session.plan.request.grad_accum, self.options.divergence_factor
        too_high = windows_too_high(self.history.losses, window=size, factor=factor)
        if too_high >= PATIENCE:
            limit = highest_sound_loss(self.history.losses, factor)
            raise MeftError(
                f"the run has diverged: in the last {too_high} optimizer steps the loss was above {limit:.4g}, "
                f"{factor:g} times where it began or more; {self._last_checkpoint()}. Try a lower --learning-rate; "
                f"--divergence-factor 0 lets it go on"
            )
        return too_high == 0

    def _last_checkpoint(self) -> str:
        """What is left of a run that ends here."""
        found = [] if self.output is None else list_checkpoints(self.output)
        return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint was due before"

    def _windows(self) -> Iterator[tuple[int, int]]:
        """First and one-past-last step of every window still to run."""
        size = self.session.plan.request.grad_accum
        for first in range(len(self.history.losses), self.options.steps, size):
            yield first, min(first + size, self.options.steps)

    def _evaluation_due(self, *, last: bool) -> bool:
        return self.evaluation is not None and self.evaluation.due(len(self.history.learning_rates), last=last)

    def _make_up_for_evaluation(self) -> bool:
        """A checkpoint is written before its window's evaluation: a run that was killed between goes on there."""
        done = len(self.history.learning_rates)
        last = self.steps_done >= self.options.steps
        if self.evaluation is None or not done or not self._evaluation_due(last=last):
            return False
        if any(result.optimizer_steps == done for result in self.evaluation.results):
            return False
        self._evaluate()
        return True

    def _evaluate(self) -> None:
        """Lend the device out between two windows, and keep that out of the peaks of training."""
        assert self.evaluation is not None
        device, peers, results = self.session.device, self.session.peers, self.evaluation.results
        self.session.meet()
        self.measured.peaks = self.measured.peaks.larger(device.peaks())
        try:
            if self._rank == 0:
                self.evaluation.evaluate(self.session, len(self.history.learning_rates))
        finally:
            device.empty_cache()
            device.reset_peaks()
        if peers is not None:
            results[:] = peers.from_first(list(results))
            self._agreed = any(peers.of_all(self.stop_requested))
        self.tell("evaluation", step=self.steps_done, scores=results[-1].scores)
        if best_result(results) == len(results) - 1:
            self.on_best()

    def _run_window(self, first: int, last: int) -> None:
        started = time.perf_counter()
        rate = self._learning_rate(len(self.history.learning_rates))
        end = WindowEnd(learning_rate=rate, max_norm=self.options.max_norm)
        for start in range(first, last, self._ranks):
            self._run_round(start, last, loss_scale=1 / (last - first), end=end)
        outcome = self.session.optimizer_step(learning_rate=rate, max_norm=self.options.max_norm)
        self.measured.kept_rows.add(outcome.kept_rows)
        self.measured.hot_windows += outcome.updated_hot_rows
        self.history.learning_rates.append(rate)
        self.history.gradient_norms.append(outcome.gradient_norm)
        self.tell("optimizer_step", step=last, learning_rate=rate, gradient_norm=outcome.gradient_norm)
        self.measured.windows += 1
        ends = last == self.options.steps
        if ends or self._evaluation_due(last=ends):
            self.session.drain()  # what the lanes have left belongs to this window
        rounds = -(-(last - first) // self._ranks)
        self.measured.window_seconds.append((time.perf_counter() - started) / rounds)
        if len(self.measured.window_seconds) == 1 and not ends:
            self.measured.warm_up = worked(self.session, self.measured.steps)

    def _run_round(self, start: int, last: int, *, loss_scale: float, end: WindowEnd) -> None:
        """One micro-batch of each rank, those from ``start`` on, of a window that ends before ``last``."""
        step, started = start + self._rank, time.perf_counter()
        closing = end if start + self._ranks >= last else None
        if start + self._ranks >= self.options.steps:
            self.session.clock.restart()  # of the tasks, those of the last step are kept
        loss = 0.0
        if step < last:
            loss = self._run_step(step, loss_scale=loss_scale, closing=closing)
        else:
            self.session.sit_out(window_end=closing)
        losses = [loss]
        if self._rounds is not None:
            taking_part = min(self._ranks, last - start)
            losses, self._agreed = self._rounds.tell(loss, stop=self.stop_requested, taking_part=taking_part)
        for place, each in enumerate(losses):
            self._note_loss(each)
            self.on_step(Progress(start + place + 1, self.options.steps, each))
            self.tell("step", step=start + place + 1, loss=each, seconds=time.perf_counter() - started)

    def _run_step(self, step: int, *, loss_scale: float, closing: WindowEnd | None) -> float:
        """One micro-batch of this rank; its loss."""
        told: dict[str, int] = {}
        if self._ranks > 1:  # dropout and jitter: the same whichever rank has the micro-batch
            torch.manual_seed(self.options.seed + step)
            told = {"micro_batch": step}
        batch = self.batch(step)
        result = self.session.step(batch, loss_scale=loss_scale, window_end=closing, **told)
        self._note_step(result, batch)
        return result.loss

    def _note_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise MeftError(
                f"the loss became {loss} at step {len(self.history.losses) + 1}; nothing of this window was "
                f"applied; {self._last_checkpoint()}. Try a lower --learning-rate, or --weights-dtype fp32 in the plan"
            )
        self.history.losses.append(loss)

    def _note_step(self, result: StepResult, batch: Batch) -> None:
        self.measured.steps += 1
        self.measured.active_rows.add(result.counters.active_rows)
        self.measured.missing_rows.add(result.counters.missing_rows)
        self.measured.overflow_rows.add(result.counters.overflow_rows)
        self.measured.hot_rows.add(result.counters.hot_rows)
        self.measured.dropped_rows += result.counters.dropped_rows
        self.measured.tokens += int(batch.attention_mask.sum())

    def _learning_rate(self, optimizer_step: int) -> float:
        total = math.ceil(self.options.steps / self.session.plan.request.grad_accum)
        return scheduled_learning_rate(
            optimizer_step,
            total_steps=total,
            peak=self.options.learning_rate,
            warmup_fraction=self.options.warmup_fraction,
        )

    def _state(self) -> TrainingState:
        settings = asdict(self.session.settings) | {
            "learning_rate": self.options.learning_rate,
            "warmup_fraction": self.options.warmup_fraction,
            "max_norm": self.options.max_norm or 0.0,
        }
        if self.options.known_token_weight != 1.0:  # checkpoints without it stay as they were
            settings["known_token_weight"] = self.options.known_token_weight
        return TrainingState(
            plan_digest=self.session.plan.content_digest(),
            seed=self.options.seed,
            steps_done=len(self.history.losses),
            total_steps=self.options.steps,
            loss_per_step=tuple(self.history.losses),
            learning_rate_per_optimizer_step=tuple(self.history.learning_rates),
            gradient_norm_per_optimizer_step=tuple(self.history.gradient_norms),
            data_digest=digest_of(self.examples),
            data=self.data,
            num_examples=len(self.examples),
            settings=settings,
            evaluations=() if self.evaluation is None else tuple(self.evaluation.results),
        )


def _data_changed(before: TrainingState, now: TrainingState) -> str:
    """Which data, and what is different about it."""
    what = f"as many examples, {now.num_examples:,}, but other tokens or another part of them with loss"
    if before.num_examples == 0:  # of an older version
        what = f"{now.num_examples:,} examples, which are not those of then"
    elif before.num_examples != now.num_examples:
        what = f"{before.num_examples:,} examples then, {now.num_examples:,} now"
    was = f" (it was {before.data} then)" if before.data not in ("", now.data) else ""
    return (
        f"the data is not what the checkpoint was made with: {now.data}{was} has {what}; give the same data and "
        f"options (--raw), or begin anew: --overwrite, with --adapter to start from what is learnt"
    )


def best_result(results: Sequence[Scores]) -> int:
    """The place of the best evaluation by its metric's main score, of equal ones the first."""
    scores = [result.scores[MAIN_SCORE[result.metric]] for result in results]
    return scores.index(max(scores))


def worked(session: Session, steps: int) -> Worked:
    """What the lanes have done in ``steps`` steps, once nothing is under way."""
    copies, clock = session.engine.busy_seconds(), session.clock
    clock.settle()
    lanes: dict[Lane, float] = {"h2d": copies["h2d"], "d2h": copies["d2h"]}
    lanes |= {"cpu": clock.busy_seconds["cpu"], "gpu": clock.busy_seconds["gpu"]}
    return Worked(steps, lanes, dict(clock.host_seconds))


def digest_of(examples: Sequence[Example]) -> str:
    """SHA-256 over token ids and labels: the same data, whatever its file is called."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.input_ids, example.labels)).encode())
    return digest.hexdigest()


@contextmanager
def _probing(session: Session) -> Iterator[None]:
    """Count transfers and time as a probe's, not as a step's, and leave no observer behind."""
    session.drain()
    session.engine.per = "probe"
    try:
        with session.clock.paused():
            yield
            session.drain()
    finally:
        session.engine.per = "step"
        session.exchange.observer = None
