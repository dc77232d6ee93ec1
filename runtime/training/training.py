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
from meft.runtime.data.examples import Batch, Example, batch_indices, collate
from meft.runtime.device.device import MemoryPeaks
from meft.runtime.host.optimizer import scheduled_learning_rate
from meft.runtime.session.checkpoint import TrainingState, list_checkpoints, load_checkpoint, save_checkpoint
from meft.runtime.session.session import Session, StepResult, WindowEnd
from meft.runtime.training.divergence import PATIENCE, highest_sound_loss, windows_too_high


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
class Worked:
    """How long the lanes worked in so many steps, and the host at each kind of task."""

    steps: int = 0
    lanes: dict[Lane, float] = field(default_factory=dict)
    host_tasks: dict[str, float] = field(default_factory=dict)

    def since(self, before: Worked) -> Worked:
        """What was done after ``before``."""
        lanes = {lane: seconds - before.lanes.get(lane, 0.0) for lane, seconds in self.lanes.items()}
        tasks = {task: seconds - before.host_tasks.get(task, 0.0) for task, seconds in self.host_tasks.items()}
        return Worked(self.steps - before.steps, lanes, tasks)


@dataclass
class Measurements:
    """What this process measured.

    ``active_rows``, ``missing_rows``, ``overflow_rows`` and ``hot_rows`` are steps x layers.
    """

    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    window_seconds: list[float] = field(default_factory=list)
    """Per step, of each whole window: its steps, its optimizer step, and what the lanes had left of the one before."""
    warm_up: Worked | None = None
    """In the first window, where there are more."""
    active_rows: list[list[int]] = field(default_factory=list)
    missing_rows: list[list[int]] = field(default_factory=list)
    overflow_rows: list[list[int]] = field(default_factory=list)
    hot_rows: list[list[int]] = field(default_factory=list)
    hot_windows: int = 0
    """Windows in which hot rows were on the device."""
    kept_rows: list[list[int]] = field(default_factory=list)
    """Rows on the device at the end of each window: windows x layers."""
    dropped_rows: int = 0
    tokens: int = 0
    peaks: MemoryPeaks = field(default_factory=lambda: MemoryPeaks(0, 0))

    @property
    def steps(self) -> int:
        """Steps run by this process."""
        return len(self.step_seconds)


@dataclass(frozen=True)
class Progress:
    """One finished step, for a progress display."""

    step: int
    total_steps: int
    loss: float


class Evaluation(Protocol):
    """Something that uses the session between windows and changes nothing of training."""

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
    """Called after the last window, before the last evaluation: the device holds what training needs of it."""
    evaluation: Evaluation | None = None
    """What it needs of the device is not counted as training's."""
    history: History = field(default_factory=History)
    measured: Measurements = field(default_factory=Measurements)
    stop_requested: bool = False
    """Set by a signal handler: the run ends after the current window, with a checkpoint."""

    def run(self) -> None:
        """Train up to ``options.steps`` steps, from where the history stands."""
        self.session.device.reset_peaks()
        try:
            for first, last in self._windows():
                self._run_window(first, last)
                window = len(self.history.learning_rates)
                ends = self.stop_requested or last == self.options.steps
                sound = self._sound()
                due = bool(self.options.save_every) and window % self.options.save_every == 0
                if ends or (due and sound):
                    self.save()
                if ends:
                    self.on_trained()
                if self._evaluation_due(last=ends):
                    self._evaluate(window)
                if ends:
                    return
        finally:
            self.measured.peaks = self.measured.peaks.larger(self.session.device.peaks())

    def save(self) -> None:
        """Write a checkpoint of the present state, if there is somewhere to write it."""
        self.session.drain()
        if self.output is not None and self.history.losses:
            save_checkpoint(self.session, self.output, self._state(), meft_version=self.meft_version)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint: same data, seed and schedule, or a :class:`UsageError` that names what differs."""
        state = load_checkpoint(self.session, folder)
        now = self._state()
        for name in ("data_digest", "seed", "total_steps", "settings"):
            before, given = getattr(state, name), getattr(now, name)
            if before != given:
                raise UsageError(f"--resume {folder}: {name} was {before}, now {given}; give what the run began with")
        self.history = History(
            list(state.loss_per_step),
            list(state.learning_rate_per_optimizer_step),
            list(state.gradient_norm_per_optimizer_step),
        )

    def batch(self, step: int) -> Batch:
        """The batch of a step, the same in every process."""
        request = self.session.plan.request
        chosen = batch_indices(
            step, num_examples=len(self.examples), batch_size=request.batch_size, seed=self.options.seed
        )
        return collate([self.examples[index] for index in chosen], seq_len=request.seq_len, pad_id=self.pad_id)

    def measure_recall(self) -> float:
        """Share of the exact choice that look-ahead finds, mean over layers, on one batch that is not trained on.

        Its transfers are counted apart from the steps'.
        """
        session = self.session
        if session.exchange.depth == 0:
            return 1.0
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

    def _evaluate(self, optimizer_steps: int) -> None:
        """Lend the device out between two windows, and keep that out of the peaks of training."""
        assert self.evaluation is not None
        device = self.session.device
        self.session.drain()
        self.measured.peaks = self.measured.peaks.larger(device.peaks())
        try:
            self.evaluation.evaluate(self.session, optimizer_steps)
        finally:
            device.empty_cache()
            device.reset_peaks()

    def _run_window(self, first: int, last: int) -> None:
        started = time.perf_counter()
        rate = self._learning_rate(len(self.history.learning_rates))
        end = WindowEnd(learning_rate=rate, max_norm=self.options.max_norm)
        for step in range(first, last):
            if step == self.options.steps - 1:
                self.session.clock.restart()  # of the tasks, those of the last step are kept
            batch = self.batch(step)
            closing = end if step == last - 1 else None
            result = self.session.step(batch, loss_scale=1 / (last - first), window_end=closing)
            self._note_step(result, batch)
            self.on_step(Progress(step + 1, self.options.steps, result.loss))
        outcome = self.session.optimizer_step(learning_rate=rate, max_norm=self.options.max_norm)
        self.measured.kept_rows.append(outcome.kept_rows)
        self.measured.hot_windows += outcome.updated_hot_rows
        self.history.learning_rates.append(rate)
        self.history.gradient_norms.append(outcome.gradient_norm)
        self.measured.optimizer_seconds.append(outcome.seconds)
        ends = last == self.options.steps
        if ends or self._evaluation_due(last=ends):
            self.session.drain()  # what the lanes have left belongs to this window
        self.measured.window_seconds.append((time.perf_counter() - started) / (last - first))
        if len(self.measured.window_seconds) == 1 and not ends:
            self.measured.warm_up = worked(self.session, self.measured.steps)

    def _note_step(self, result: StepResult, batch: Batch) -> None:
        if not math.isfinite(result.loss):
            raise MeftError(
                f"the loss became {result.loss} at step {len(self.history.losses) + 1}; nothing of this window was "
                f"applied; {self._last_checkpoint()}. Try a lower --learning-rate, or --weights-dtype fp32 in the plan"
            )
        self.history.losses.append(result.loss)
        self.measured.step_seconds.append(result.seconds)
        self.measured.active_rows.append(list(result.counters.active_rows))
        self.measured.missing_rows.append(list(result.counters.missing_rows))
        self.measured.overflow_rows.append(list(result.counters.overflow_rows))
        self.measured.hot_rows.append(list(result.counters.hot_rows))
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
        return TrainingState(
            plan_digest=self.session.plan.content_digest(),
            seed=self.options.seed,
            steps_done=len(self.history.losses),
            total_steps=self.options.steps,
            loss_per_step=tuple(self.history.losses),
            learning_rate_per_optimizer_step=tuple(self.history.learning_rates),
            gradient_norm_per_optimizer_step=tuple(self.history.gradient_norms),
            data_digest=digest_of(self.examples),
            settings=settings,
        )


def worked(session: Session, steps: int) -> Worked:
    """What the lanes have done in ``steps`` steps, once nothing is under way; the gpu's work is not timed on CUDA."""
    copies, clock = session.engine.busy_seconds(), session.clock
    lanes: dict[Lane, float] = {"h2d": copies["h2d"], "d2h": copies["d2h"], "cpu": clock.busy_seconds["cpu"]}
    if session.device.kind == "emulated":
        lanes["gpu"] = clock.busy_seconds["gpu"]
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
