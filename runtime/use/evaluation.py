"""Scoring a model on a task: greedy answers against gold answers; and the loss on prose, which shows forgetting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meft.planner.records.report import Evaluation
from meft.runtime.data.examples import Batch, Example, collate
from meft.runtime.data.metrics import Metric, scores
from meft.runtime.data.task_sources import load_task
from meft.runtime.data.tasks import Task
from meft.runtime.session.session import Session
from meft.runtime.use.generation import GenerationOptions, Generator, SessionGenerator, answers
from meft.runtime.use.inference import AS_TRAINED, Serving, rows_met, serving


@dataclass(frozen=True)
class EvaluationOptions:
    """An evaluation as asked for: a file or a source of :mod:`meft.runtime.data.task_sources`, and how to ask."""

    task: str
    metric: Metric | None = None
    every: int = 0
    """Optimizer steps between evaluations; 0 evaluates once, at the end."""
    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int = 32
    rows_per_token: int | None = None
    min_score: float | None = None
    """Both as :class:`~meft.runtime.use.inference.Serving` has them."""

    @property
    def serving(self) -> Serving:
        """Which rows of the adapter a token meets."""
        return Serving(self.rows_per_token, self.min_score)


@dataclass(frozen=True)
class Evaluator:
    """A task, the tokenizer of the model it is asked of, and how."""

    task: Task
    tokenizer: Any
    options: GenerationOptions
    on_answer: Callable[[str, str], None] | None = None
    """Told each prompt and what the model said."""

    def listening(self, on_answer: Callable[[str, str], None]) -> Evaluator:
        """The same, telling each prompt and answer."""
        return replace(self, on_answer=on_answer)

    def evaluate(self, generator: Generator, *, optimizer_steps: int) -> Evaluation:
        """Ask everything and score it; scores are means over the items."""
        started = time.perf_counter()
        prompts = [item.prompt for item in self.task.items]
        said = answers(generator, self.tokenizer, prompts, self.options)
        each = [
            scores(self.task.metric, output, item.answers) for output, item in zip(said, self.task.items, strict=True)
        ]
        if self.on_answer is not None:
            for prompt, output in zip(prompts, said, strict=True):
                self.on_answer(prompt, output)
        return Evaluation(
            task=self.task.name,
            metric=self.task.metric,
            optimizer_steps=optimizer_steps,
            items=len(each),
            left_out=self.task.left_out,
            scores={name: statistics.fmean(score[name] for score in each) for name in each[0]},
            max_new_tokens=self.options.max_new_tokens,
            rows_per_token=self.options.serving.rows_per_token,
            min_score=self.options.serving.min_score,
            seconds=time.perf_counter() - started,
        )


def make_evaluator(options: EvaluationOptions, tokenizer: Any, *, raw: bool, seed: int = 0) -> Evaluator:
    """Read the task; a :class:`~meft.planner.base.errors.UsageError` says what is wrong with it."""
    task = load_task(options.task, metric=options.metric, limit=options.limit, seed=seed)
    how = GenerationOptions(options.max_new_tokens, options.batch_size, raw, options.serving)
    return Evaluator(task, tokenizer, how)


@dataclass
class EvaluationSchedule:
    """Evaluates a session every so many optimizer steps (0: only at the end)."""

    evaluator: Evaluator
    every: int = 0
    on_result: Callable[[Evaluation], None] = lambda _: None
    warn: Callable[[str], None] = lambda _: None
    """Told once where tokens meet more rows than in training."""
    results: list[Evaluation] = field(default_factory=list)

    def due(self, optimizer_steps: int, *, last: bool) -> bool:
        """Whether to evaluate after so many optimizer steps."""
        return last or (self.every > 0 and optimizer_steps % self.every == 0)

    def evaluate(self, session: Session, optimizer_steps: int) -> None:
        """Evaluate, and keep and tell the result."""
        how, decision = self.evaluator.options.serving, session.plan.decision
        generator = SessionGenerator(session, how)
        warning = how.warning(rows_met(decision.tokens_see, decision.top_k, session.store.use.active_rows()))
        if warning is not None and not self.results:
            self.warn(warning)
        result = self.evaluator.evaluate(generator, optimizer_steps=optimizer_steps)
        self.results.append(result)
        self.on_result(result)


def mean_loss(
    batch_loss: Callable[[Batch], float], examples: Sequence[Example], *, batch_size: int, seq_len: int, pad_id: int
) -> float:
    """Mean loss per trained token over examples; ``batch_loss`` gives a batch's mean over its trained tokens."""
    total, tokens = 0.0, 0
    for first in range(0, len(examples), batch_size):
        batch = collate(examples[first : first + batch_size], seq_len=seq_len, pad_id=pad_id)
        total += batch_loss(batch) * batch.num_trained_tokens
        tokens += batch.num_trained_tokens
    return total / tokens


def session_loss(session: Session, batch: Batch, how: Serving = AS_TRAINED) -> float:
    """A batch's loss with the adapter as at inference."""
    with serving(session, how), session.device.scope():
        return session.engine.read_scalar(session.loss(batch), category="loss")
