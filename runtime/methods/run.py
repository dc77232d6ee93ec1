"""One method from a model's folder and data to a folder of what was learnt, with what it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import SerializerFunctionWrapHandler, model_serializer

from meft.planner.base.errors import UsageError
from meft.planner.base.files import writing
from meft.planner.base.schema import Bytes, Count, File, Fraction, Index
from meft.planner.base.units import format_bytes
from meft.planner.base.version import VERSION
from meft.planner.records.report import Evaluation, without_plain_loss
from meft.planner.records.setup import TrainingSetup
from meft.runtime.data.examples import pad_token_id
from meft.runtime.data.loading import DataOptions, describe, load_dataset
from meft.runtime.data.metrics import evaluation_line
from meft.runtime.device.device import CudaDevice, Device, EmulatedDevice
from meft.runtime.host.optimizer import AdamWSettings
from meft.runtime.methods.generating import generator_of
from meft.runtime.methods.opening import check_method, load_model, open_method
from meft.runtime.methods.saving import save_method
from meft.runtime.methods.training import MethodTrainer
from meft.runtime.session.baselines import BaselineSession
from meft.runtime.session.checkpoint import latest_checkpoint
from meft.runtime.session.model_loading import check_token_ids, load_tokenizer
from meft.runtime.training import output
from meft.runtime.training.interrupts import Interrupts
from meft.runtime.training.options import Length
from meft.runtime.training.training import Progress, TrainingOptions
from meft.runtime.use.evaluation import EvaluationOptions, Evaluator, make_evaluator

REPORT = "report.json"


class MethodReport(File):
    """What a run of a method took and gave. Bytes per step are of one micro-batch."""

    kind: ClassVar[str] = "method report"

    meft_version: str
    method: str
    setup: TrainingSetup
    device: str
    trainable_parameters: Index
    steps: Count
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes
    h2d_bytes_per_step: Bytes
    d2h_bytes_per_step: Bytes
    seconds_per_step: float
    loss_per_step: tuple[float, ...]
    seed: int
    known_token_weight: Fraction = 1.0
    """What tokens that the model knew already weighed in the losses; written where it is not 1."""
    evaluations: tuple[Evaluation, ...] = ()

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_plain_loss(handler(self))


@dataclass(frozen=True)
class MethodOptions:
    """A run as asked for on the command line."""

    setup: TrainingSetup
    model: Path
    data: tuple[Path, ...]
    training: TrainingOptions
    epochs: float | None = None
    """Instead of the training's steps."""
    settings: AdamWSettings = field(default_factory=AdamWSettings)
    reading: DataOptions = field(default_factory=DataOptions)
    show: int = 0
    output_dir: Path = Path("output")
    resume: bool = False
    overwrite: bool = False
    device: Literal["auto", "cuda", "emulated"] = "auto"
    gpu_mem_bytes: int = 1 << 50
    evaluation: EvaluationOptions | None = None


@dataclass
class MethodEvaluation:
    """Scores the method's model at the end, and every so many optimizer steps."""

    evaluator: Evaluator
    every: int
    on_result: Callable[[Evaluation], None]
    results: list[Evaluation] = field(default_factory=list)

    def due(self, optimizer_steps: int, *, last: bool) -> bool:
        """Whether to evaluate after so many optimizer steps."""
        return last or (self.every > 0 and optimizer_steps % self.every == 0)

    def evaluate(self, session: Any, optimizer_steps: int) -> None:
        """Evaluate, and keep and tell the result; the books see none of it."""
        with session.device.host():
            result = self.evaluator.evaluate(generator_of(session.model), optimizer_steps=optimizer_steps)
        self.results.append(result)
        self.on_result(result)


def run_method(
    options: MethodOptions,
    *,
    say: Callable[[str], None],
    on_step: Callable[[Progress], None] = lambda _: None,
    interrupts: Interrupts | None = None,
) -> MethodReport:
    """Train, evaluate, save and report; everything goes to ``options.output_dir``.

    Raises:
        UsageError: options, data, model or method that do not go together.
        DeviceOutOfMemory: the budget did not suffice.
    """
    check_method(options.setup)
    if not options.data:
        raise UsageError("--data: what should it learn? Give a file")
    interrupts = interrupts or Interrupts()
    with output.locked(options.output_dir, say):
        output.require_unused(options.output_dir, resume=options.resume, overwrite=options.overwrite)
        checkpoint = latest_checkpoint(options.output_dir) if options.resume else None
        trainer = _prepared(options, say=say)
        with closing(trainer.session):
            trainer.on_step = on_step
            if checkpoint is not None:
                trainer.resume(checkpoint)
                say(f"resumed from {checkpoint} after step {trainer.steps_done}")
            else:
                output.remove_replaced(options.output_dir, say)
            interrupts.check()
            report = _trained(trainer, options, interrupts)
        path = options.output_dir / REPORT
        with writing(path, hint="the adapter and the last checkpoint beside it are whole"):
            report.save(path)
    return report


def open_device(kind: Literal["auto", "cuda", "emulated"], budget_bytes: int) -> Device:
    """The card where there is one, unless another is asked for; else the emulated device."""
    if kind == "cuda" or (kind == "auto" and torch.cuda.is_available()):
        return CudaDevice(budget_bytes)
    return EmulatedDevice(budget_bytes)


def _prepared(options: MethodOptions, *, say: Callable[[str], None]) -> MethodTrainer:
    """Everything read and put on the device, nothing trained."""
    setup = options.setup
    tokenizer = load_tokenizer(options.model)
    dataset = load_dataset(
        options.data, tokenizer, seq_len=setup.seq_len, options=options.reading, show=max(options.show, 1)
    )
    describe(dataset, say, seq_len=setup.seq_len, show=options.show)
    names, pad_id = ", ".join(map(str, options.data)), pad_token_id(tokenizer)
    check_token_ids((each.input_ids for each in dataset.examples), setup.model.vocab_size, where=f"--data {names}")
    device = open_device(options.device, options.gpu_mem_bytes)
    torch.manual_seed(options.training.seed)
    model = load_model(setup, options.model, device_kind=device.kind)
    session = open_method(setup, model, device, seed=options.training.seed, settings=options.settings)
    say(f"{setup.label}: {session.trainable_parameters:,} numbers are trained")
    say(f"device: {device.name}, budget {format_bytes(device.budget_bytes)}")
    training = options.training
    if options.epochs is not None:
        length = Length(epochs=options.epochs)
        steps = length.total_steps(num_examples=len(dataset.examples), batch_size=setup.batch_size, before=None)
        training = replace(training, steps=steps)
    opened: Any = session
    trainer = MethodTrainer(
        opened,
        dataset.examples,
        training,
        pad_id=pad_id,
        meft_version=VERSION,
        output=options.output_dir,
        data=names,
        setup=setup,
    )
    if options.evaluation is not None:
        evaluator = make_evaluator(options.evaluation, tokenizer, raw=options.reading.raw, seed=training.seed)
        trainer.evaluation = MethodEvaluation(
            evaluator, options.evaluation.every, on_result=lambda result: say(evaluation_line(result))
        )
    return trainer


def _trained(trainer: MethodTrainer, options: MethodOptions, interrupts: Interrupts) -> MethodReport:
    started, before = time.perf_counter(), trainer.steps_done
    with interrupts.while_training(lambda: setattr(trainer, "stop_requested", True)):
        trainer.run()
    seconds = time.perf_counter() - started
    if trainer.steps_done < trainer.options.steps:
        interrupts.stopped_after = trainer.steps_done
    session: Any = trainer.session
    folder = options.output_dir / output.ADAPTER
    save_method(session, options.setup, folder, meft_version=VERSION)
    if options.setup.method == "full":
        load_tokenizer(options.model).save_pretrained(folder)
    return report_of(trainer, session, seconds / max(1, trainer.steps_done - before))


def report_of(trainer: MethodTrainer, session: BaselineSession, seconds_per_step: float) -> MethodReport:
    """What the trainer and the session's books have counted."""
    assert trainer.setup is not None
    measured, steps = trainer.measured, max(1, trainer.measured.steps)
    return MethodReport(
        meft_version=VERSION,
        method=trainer.setup.label,
        setup=trainer.setup,
        device=session.device.name,
        trainable_parameters=session.trainable_parameters,
        steps=max(1, trainer.steps_done),
        peak_allocated_bytes=measured.peaks.allocated_bytes,
        peak_reserved_bytes=measured.peaks.reserved_bytes,
        h2d_bytes_per_step=session.engine.bytes_in("h2d", "step") // steps,
        d2h_bytes_per_step=session.engine.bytes_in("d2h", "step") // steps,
        seconds_per_step=seconds_per_step,
        loss_per_step=tuple(trainer.history.losses),
        seed=trainer.options.seed,
        known_token_weight=trainer.options.known_token_weight,
        evaluations=() if trainer.evaluation is None else tuple(trainer.evaluation.results),
    )
