"""A run from a plan file to a report: load, check, train, measure, save."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from meft.planner.base.errors import UsageError
from meft.planner.base.units import format_bytes
from meft.planner.models.catalogue import load_model
from meft.planner.records.plan import Plan
from meft.planner.records.report import Report
from meft.planner.timing.chrome import chrome_trace
from meft.runtime.adapter.initialise import KeyInit
from meft.runtime.data.embedded import SMOLLM2_PROFILE, smollm2_folder
from meft.runtime.data.examples import Dataset, load_dataset, pad_token_id
from meft.runtime.data.metrics import evaluation_line
from meft.runtime.device.device import CudaDevice, Device, EmulatedDevice
from meft.runtime.device.lanes import Overlapped, Sequential
from meft.runtime.device.nvml import MemoryReading, NvmlReader, NvmlUnavailable, PcieReading
from meft.runtime.device.timeline import LaneClock
from meft.runtime.host import kernels
from meft.runtime.host.optimizer import AdamWSettings
from meft.runtime.session import model_loading
from meft.runtime.session.checkpoint import latest_checkpoint, save_adapter
from meft.runtime.session.session import Session, open_session
from meft.runtime.training import preflight
from meft.runtime.training.rehearse import rehearse
from meft.runtime.training.reporting import build_report
from meft.runtime.training.training import Progress, Trainer, TrainingOptions
from meft.runtime.use.evaluation import EvaluationOptions, EvaluationSchedule, make_evaluator

DeviceKind = Literal["cuda", "emulated"]


@dataclass(frozen=True)
class RunOptions:
    """A run as asked for on the command line."""

    training: TrainingOptions
    settings: AdamWSettings
    model: str | None = None
    data: Path | None = None
    output_dir: Path = Path("output")
    device: Literal["auto", "cuda", "emulated"] = "auto"
    gpu_mem_bytes: int | None = None
    """Another device budget than the plan's."""
    resume: bool = False
    raw: bool = False
    schedule: Literal["overlapped", "sequential"] = "overlapped"
    link_gbps: float | None = None
    trace: Path | None = None
    """Where the Chrome trace of the last step goes."""
    evaluation: EvaluationOptions | None = None
    key_init: KeyInit = "random"


@dataclass(frozen=True)
class Display:
    """Where a run tells how it goes."""

    say: Callable[[str], None]
    on_step: Callable[[Progress], None]


def run_rehearsal(plan: Plan, options: RunOptions, display: Display) -> Report:
    """The books of one step, for a model given by name, ``config.json`` or folder."""
    reference = options.model or plan.request.model_path or plan.request.model.name
    shape, config, _ = load_model(reference)
    model_loading.check_shape(plan.request.model, shape, where=reference)
    display.say(f"rehearsing one step of {plan.request.model.name} under fake tensors: no weights, data or GPU")
    return rehearse(plan, dict(config), budget_bytes=_budget(plan, options), meft_version=version("meft"))


def run_training(plan: Plan, options: RunOptions, display: Display) -> Report:
    """Train the plan's adapter and report; the adapter and checkpoints go to ``options.output_dir``."""
    if options.data is None:
        hint = "; to score without training: meft-run evaluate" if options.evaluation else ""
        raise UsageError(f"--data: what should it learn? Give a JSONL file, or --rehearse to run without data{hint}")
    folder = _model_folder(plan, options, display)
    model_loading.check_model_folder(plan, folder)
    checkpoint = latest_checkpoint(options.output_dir) if options.resume else None
    kind = _device_kind(options)
    with closing(_open_nvml(kind)) as nvml:
        machine = preflight.Machine.here()
        for note in preflight.check(plan, machine, device_kind=kind, budget_bytes=_budget(plan, options)):
            display.say(f"note: {note}")
        tokenizer = model_loading.load_tokenizer(folder)
        dataset = load_dataset(options.data, tokenizer, seq_len=plan.request.seq_len, raw=options.raw)
        display.say(f"{options.data}: {dataset.statistics.summary(plan.request.seq_len)}")
        _check_tokens(plan, dataset, pad_token_id(tokenizer), options)
        evaluation = _evaluation(options, tokenizer, display)
        kernels.warm_up(display.say)
        with closing(_open_session(plan, options, folder, kind)) as session:
            display.say(f"device: {session.device.name}, budget {format_bytes(session.device.budget_bytes)}")
            trainer = _trainer(session, dataset, options, pad_token_id(tokenizer), display)
            trainer.evaluation = evaluation
            if checkpoint is not None:
                trainer.resume(checkpoint)
                display.say(f"resumed from {checkpoint} after step {len(trainer.history.losses)}")
            report = _train(trainer, nvml, options, display)
    return report.model_copy(update={"evaluations": () if evaluation is None else tuple(evaluation.results)})


def _check_tokens(plan: Plan, dataset: Dataset, pad_id: int, options: RunOptions) -> None:
    """The tokenizer's tokens are the model's, that of padding too."""
    vocab_size, ids = plan.request.model.vocab_size, (example.input_ids for example in dataset.examples)
    model_loading.check_token_ids(ids, vocab_size, where=f"--data {options.data}")
    model_loading.check_token_ids([[pad_id]], vocab_size, where="the tokenizer's padding")


def _evaluation(options: RunOptions, tokenizer: Any, display: Display) -> EvaluationSchedule | None:
    """When and what to evaluate, read before anything is loaded for long."""
    if options.evaluation is None:
        return None
    evaluator = make_evaluator(options.evaluation, tokenizer, raw=options.raw, seed=options.training.seed)
    return EvaluationSchedule(evaluator, options.evaluation.every, lambda result: display.say(evaluation_line(result)))


def _open_nvml(kind: DeviceKind) -> NvmlReader | NvmlUnavailable:
    """The reader, opened before anything allocates: its growth counts from what the card holds then.

    Preflight comes later, as even asking torch for bf16 allocates on cards that have none.
    """
    if kind == "cuda":
        return NvmlReader.open(0)
    return NvmlUnavailable("emulated device: there is no GPU to ask")


def _train(trainer: Trainer, nvml: NvmlReader | NvmlUnavailable, options: RunOptions, display: Display) -> Report:
    if len(trainer.history.losses) >= options.training.steps:
        raise UsageError(f"--steps {options.training.steps}: the checkpoint is there already; leave --resume out")
    readings: list[tuple[MemoryReading, PcieReading]] = []
    trainer.on_trained = lambda: readings.append(_read_nvml(trainer, nvml))
    nvml.start_pcie()
    with _stopping_on_signals(trainer, display):
        trainer.run()
    ((memory, pcie),) = readings
    save_adapter(trainer.session, options.output_dir / "adapter", meft_version=version("meft"))
    if trainer.stop_requested:
        display.say(f"stopped after step {len(trainer.history.losses)}; go on with --resume")
    if options.trace is not None:
        _write_trace(trainer.session, options.trace)
        display.say(f"wrote {options.trace}, the last step's tasks")
    recall = trainer.measure_recall()
    return build_report(trainer, memory=memory, pcie=pcie, recall=recall, meft_version=version("meft"))


def _read_nvml(trainer: Trainer, nvml: NvmlReader | NvmlUnavailable) -> tuple[MemoryReading, PcieReading]:
    reserved = torch.cuda.memory_reserved() if trainer.session.device.kind == "cuda" else 0
    return nvml.process_memory(at_least_bytes=reserved), nvml.pcie_bytes()


def _open_session(plan: Plan, options: RunOptions, folder: Path, kind: DeviceKind) -> Session:
    torch.manual_seed(options.training.seed)
    device: Device = CudaDevice(_budget(plan, options)) if kind == "cuda" else EmulatedDevice(_budget(plan, options))
    if options.link_gbps is not None and kind == "cuda":
        raise UsageError("--link-gbps slows the emulated device's link down; a real link has its own speed")
    model = model_loading.load_frozen_model(plan, folder)
    return open_session(
        plan,
        model,
        device,
        seed=options.training.seed,
        settings=options.settings,
        schedule=Overlapped() if options.schedule == "overlapped" else Sequential(),
        link_gbps=options.link_gbps,
        clock=LaneClock(keep=options.trace is not None),
        key_init=options.key_init,
    )


def _write_trace(session: Session, path: Path) -> None:
    """The tasks of the last step; on CUDA those of the cpu lane alone, as its streams keep no log."""
    session.drain()
    events = session.clock.events()
    if session.device.kind == "cuda":
        events = [event for event in events if event.lane == "cpu"]
    text = json.dumps(chrome_trace(events), separators=(",", ":"))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--trace {path}: cannot be written ({error.strerror})") from None


def _trainer(session: Session, dataset: Dataset, options: RunOptions, pad_id: int, display: Display) -> Trainer:
    return Trainer(
        session,
        dataset.examples,
        options.training,
        pad_id=pad_id,
        meft_version=version("meft"),
        output=options.output_dir,
        sequence_tokens=dataset.statistics.sequence_tokens,
        on_step=display.on_step,
    )


def _model_folder(plan: Plan, options: RunOptions, display: Display) -> Path:
    reference = options.model or plan.request.model_path
    if reference is None and plan.request.model.name == SMOLLM2_PROFILE:
        return smollm2_folder(display.say)
    if reference is None:
        raise UsageError(f"--model: give the folder that holds the weights of {plan.request.model.name}, or --rehearse")
    if not Path(reference).is_dir():
        raise UsageError(f"--model {reference}: no such folder; training needs one with config.json and weights")
    return Path(reference)


def _device_kind(options: RunOptions) -> DeviceKind:
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "emulated"
    return options.device


def _budget(plan: Plan, options: RunOptions) -> int:
    """What the allocator may reserve: the plan's, or the budget given less the planned context."""
    memory = plan.prediction.device_memory
    if options.gpu_mem_bytes is None:
        return memory.allocator_budget_bytes
    budget = options.gpu_mem_bytes - memory.context_bytes.high_bytes
    if budget <= 0:
        context = format_bytes(memory.context_bytes.high_bytes)
        raise UsageError(f"--gpu-mem {format_bytes(options.gpu_mem_bytes)}: the CUDA context alone may take {context}")
    return budget


@contextmanager
def _stopping_on_signals(trainer: Trainer, display: Display) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run after its window, with a checkpoint; the second ends it at once."""
    before: dict[int, Any] = {}

    def stop(number: int, frame: object) -> None:
        del frame
        trainer.stop_requested = True
        display.say(f"{signal.Signals(number).name}: stopping after this accumulation window; again to stop at once")
        signal.signal(number, before[number])

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
