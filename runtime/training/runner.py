"""A run from a plan file to a report: load, check, train, measure, save."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from meft.planner.base.errors import MachineError, UsageError
from meft.planner.base.files import writing
from meft.planner.base.units import format_bytes
from meft.planner.base.version import VERSION
from meft.planner.models.catalogue import how_to_download, hub_name_of, load_model
from meft.planner.records.plan import Plan
from meft.planner.records.report import Report
from meft.runtime.data.embedded import SMOLLM2_PROFILE, smollm2_folder
from meft.runtime.data.examples import pad_token_id
from meft.runtime.data.loading import DataOptions, Dataset, describe, load_dataset
from meft.runtime.data.metrics import evaluation_line
from meft.runtime.device.device import CudaDevice, Device, EmulatedDevice
from meft.runtime.device.nvml import MemoryReading, NvmlReader, NvmlUnavailable, PcieReading
from meft.runtime.host import kernels
from meft.runtime.ranks.peers import Peers
from meft.runtime.session import model_loading
from meft.runtime.session.checkpoint import (
    TRAINING_STATE,
    RunObserved,
    TrainingState,
    base_digest,
    load_adapter,
    load_observed,
    save_adapter,
)
from meft.runtime.session.session import Session
from meft.runtime.training import output, packing, preflight, together
from meft.runtime.training.journal import Tell, journal
from meft.runtime.training.options import DeviceKind, Display, RunOptions, open_run, write_trace
from meft.runtime.training.rehearse import rehearse
from meft.runtime.training.replay import num_replayed, with_replay
from meft.runtime.training.reporting import build_report
from meft.runtime.training.training import Trainer, digest_of
from meft.runtime.use.evaluation import EvaluationSchedule, make_evaluator

DEFAULT_REPLAY_SHARE = 0.1


def run_rehearsal(plan: Plan, options: RunOptions, display: Display) -> Report:
    """The books of one step, for a model given by name, ``config.json`` or folder; the report goes to the output."""
    reference = options.model or plan.request.model_path or plan.request.model.name
    shape, config, _ = load_model(reference)
    model_loading.check_shape(plan.request.model, shape, where=reference)
    with output.locked(options.output_dir, display.say):
        output.require_unused(options.output_dir, resume=False, overwrite=options.overwrite)
        display.say(f"rehearsing one step of {plan.request.model.name} under fake tensors: no weights, data or GPU")
        report = rehearse(plan, dict(config), budget_bytes=_budget(plan, options), meft_version=VERSION)
        _save_report(report, options)
    return report


def check_run(plan: Plan, options: RunOptions, *, ranks: int) -> None:
    """What can be refused before ``ranks`` processes begin."""
    _check_options(options)
    together.check(plan, ranks, steps=_steps_given(options))


def _steps_given(options: RunOptions) -> int | None:
    return options.training.steps if options.length is None else options.length.steps


def run_training(plan: Plan, options: RunOptions, display: Display) -> Report | None:
    """Train the plan's adapter and report; adapter, checkpoints and report go to ``options.output_dir``.

    Of several ranks the first reports, and the others give None.

    ``display.interrupts`` says whether a signal ended it early.
    """
    _check_options(options)
    _device_kind(plan, options)  # before anything is written
    with together.ranks(plan, steps=_steps_given(options)) as peers:
        display = together.shown(display, peers)
        with together.first_alone(peers):
            folder = _model_folder(plan, options, display)
        model_loading.check_model_folder(plan, folder)
        display.interrupts.check()
        with together.output_folder(options, peers, display.say) as checkpoint:
            log = (options.log, options.tensorboard) if together.is_first(peers) else (None, None)
            with journal(*log) as tell:
                report = _run(plan, options, display, folder, checkpoint, tell, peers)
            if report is not None:
                _save_report(report, options)
    return report


def _check_options(options: RunOptions) -> None:
    """What can be refused before anything is looked at."""
    if not options.data:
        hint = "; to score without training: meft-run evaluate" if options.evaluation else ""
        raise UsageError(f"--data: what should it learn? Give a file, or --rehearse to run without data{hint}")
    if options.replay is None and options.replay_share is not None:
        raise UsageError(f"--replay-share {options.replay_share:g}: of what? Give a file with --replay")
    if options.replay_share is not None:
        num_replayed(1, options.replay_share)
    if options.adapter is not None and options.resume:
        raise UsageError("--adapter begins a run and --resume goes on with one; give one of them")
    if options.adapter is not None and options.key_init != "random":
        raise UsageError(
            f"--key-init {options.key_init}: with --adapter the keys begin as that adapter's; leave it out"
        )
    if options.trace is not None:
        _require_writable(options.trace)


def _require_writable(trace: Path) -> None:
    """It is written when all is trained, too late to learn that it cannot be."""
    there = trace.exists()
    try:
        trace.open("a").close()
        if not there:
            trace.unlink()
    except OSError as error:
        raise UsageError(f"--trace {trace}: cannot be written ({error.strerror})") from None


def _save_report(report: Report, options: RunOptions) -> None:
    path = options.output_dir / output.REPORT
    with writing(path, hint="the adapter and the last checkpoint beside it are whole"):
        report.save(path)


def _preflight(
    plan: Plan, options: RunOptions, folder: Path, kind: DeviceKind, peers: Peers | None, display: Display
) -> None:
    """Raise :class:`MachineError` for what this machine lacks; say what else a user should see."""
    notes = preflight.check(
        plan,
        preflight.Machine.here(),
        device_kind=kind,
        budget_bytes=_budget(plan, options),
        ranks=1 if peers is None else peers.here,
        machines=1 if peers is None else peers.machines,
        converted_bytes=model_loading.converted_bytes(plan, folder) if kind == "cuda" else 0,
    )
    for note in notes:
        display.say(f"note: {note}")


def _run(
    plan: Plan,
    options: RunOptions,
    display: Display,
    folder: Path,
    checkpoint: Path | None,
    tell: Tell,
    peers: Peers | None,
) -> Report | None:
    """The stages of a run, in a folder that is this run's alone; between two of them a signal is obeyed."""
    kind, check = _device_kind(plan, options), display.interrupts.check
    with closing(_open_nvml(kind)) as nvml:
        _preflight(plan, options, folder, kind, peers, display)
        check()
        tokenizer = model_loading.load_tokenizer(folder)
        check()
        seq_len, show = plan.request.seq_len, options.show

        def load(reading: DataOptions) -> Dataset:
            return load_dataset(options.data, tokenizer, seq_len=seq_len, options=reading, show=max(show, 1))

        dataset = packing.load(load, options.reading, plan, budget_bytes=_budget(plan, options), say=display.say)
        describe(dataset, display.say, seq_len=seq_len, show=show)
        dataset = _with_replay(plan, options, dataset, tokenizer, display)
        _check_tokens(plan, dataset, pad_token_id(tokenizer), options)
        check()
        options = _with_length(plan, options, dataset, checkpoint)
        together.require_same(peers, _told(plan, options, dataset))
        if together.is_first(peers):
            _require_room(plan, options, resumed=checkpoint is not None)
        if options.evaluation is not None:
            together.check_evaluation(plan, peers)
        evaluation = _evaluation(options, tokenizer, display)
        check()
        with together.first_alone(peers):
            kernels.warm_up(display.say)
        check()
        device = _device(plan, options, kind)
        with closing(open_run(plan, options, folder, device, dataset, display.say, peers)) as session:
            together.require_same(peers, {"--model": base_digest(session.model)})
            check()
            display.say(f"device: {session.device.name}, budget {format_bytes(session.device.budget_bytes)}")
            trainer = _trainer(session, dataset, options, pad_token_id(tokenizer), display)
            trainer.evaluation, trainer.tell = evaluation, tell
            _begin(trainer, options, checkpoint, display)
            check()
            report = _train(trainer, nvml, options, display, checkpoint)
    if report is None:
        return None
    return report.model_copy(update={"evaluations": () if evaluation is None else tuple(evaluation.results)})


def _names(options: RunOptions) -> str:
    return ", ".join(map(str, options.data))


def _told(plan: Plan, options: RunOptions, dataset: Dataset) -> dict[str, str]:
    """What several machines must have been given alike."""
    return {
        "plan.json": plan.content_digest(),
        "--data": digest_of(dataset.examples),
        "the options of training": repr((options.training, options.settings, options.key_init)),
    }


def _with_replay(plan: Plan, options: RunOptions, dataset: Dataset, tokenizer: Any, display: Display) -> Dataset:
    """The data, with ordinary text among it where that was asked for."""
    if options.replay is None:
        return dataset
    share = DEFAULT_REPLAY_SHARE if options.replay_share is None else options.replay_share
    packs = plan.request.packed or packing.shares_sequences(dataset)
    reading = DataOptions(raw=True, packing="text" if packs else "none")
    text = load_dataset(options.replay, tokenizer, seq_len=plan.request.seq_len, options=reading, show=0)
    mixed = with_replay(dataset, text.examples, share=share, seed=options.training.seed)
    count = len(mixed.examples) - len(dataset.examples)
    display.say(f"{options.replay}: {count:,} examples replayed ({len(text.examples):,} there are)")
    return mixed


def _with_length(plan: Plan, options: RunOptions, dataset: Dataset, checkpoint: Path | None) -> RunOptions:
    """The options with the number of steps that the run shall have in all."""
    if options.length is None:
        return options
    before = None if checkpoint is None else TrainingState.load(checkpoint / TRAINING_STATE).total_steps
    total = options.length.total_steps(
        num_examples=len(dataset.examples), batch_size=plan.request.batch_size, before=before
    )
    return replace(options, training=replace(options.training, steps=total))


def _require_room(plan: Plan, options: RunOptions, *, resumed: bool) -> None:
    training = options.training
    windows = math.ceil(training.steps / plan.request.grad_accum)
    writes = output.Writes(
        steps=training.steps,
        several_checkpoints=0 < training.save_every < windows or training.patience is not None,
        resumed=resumed,
        keeps_best=training.patience is not None,
    )
    output.require_room(options.output_dir, plan, writes, overwrite=options.overwrite)


def _begin(trainer: Trainer, options: RunOptions, checkpoint: Path | None, display: Display) -> None:
    """Where the run starts from: a checkpoint, a trained adapter, or nothing."""
    if checkpoint is not None:
        trainer.resume(checkpoint)
        if together.is_first(trainer.session.peers):
            output.remove_superseded(checkpoint)
        display.say(f"resumed from {checkpoint} after step {trainer.steps_done}")
        if output.reported(options.output_dir, trainer.history.losses):
            _require_steps_left(trainer, options)
        return
    if options.adapter is not None:
        load_adapter(trainer.session, options.adapter)
        display.say(f"starting from the adapter in {options.adapter}")
    if together.is_first(trainer.session.peers):
        output.remove_replaced(options.output_dir, display.say)


def _require_steps_left(trainer: Trainer, options: RunOptions) -> None:
    """Raise :class:`UsageError` if the run has come to its end. One that was killed between its last checkpoint and its
    report has no report yet, and is not asked: it goes on to that."""
    done = trainer.steps_done
    if done >= options.training.steps:
        adapter = _save_adapter(trainer, options)  # in case that someone removed it
        trainer.session.meet()
        raise UsageError(
            f"--steps {options.training.steps}: the run is complete, and its adapter is in {adapter}; give more "
            f"steps to train on"
        )
    if trainer.out_of_patience:
        raise UsageError(
            f"--patience {options.training.patience}: it ended this run after step {done}; give a larger one to train "
            f"on"
        )


def _check_tokens(plan: Plan, dataset: Dataset, pad_id: int, options: RunOptions) -> None:
    """The tokenizer's tokens are the model's, that of padding too."""
    vocab_size, ids = plan.request.model.vocab_size, (example.input_ids for example in dataset.examples)
    model_loading.check_token_ids(ids, vocab_size, where=f"--data {_names(options)}")
    model_loading.check_token_ids([[pad_id]], vocab_size, where="the tokenizer's padding")


def _evaluation(options: RunOptions, tokenizer: Any, display: Display) -> EvaluationSchedule | None:
    """When and what to evaluate, read before anything is loaded for long."""
    if options.evaluation is None:
        return None
    evaluator = make_evaluator(options.evaluation, tokenizer, raw=options.reading.raw, seed=options.training.seed)
    return EvaluationSchedule(
        evaluator,
        options.evaluation.every,
        on_result=lambda result: display.say(evaluation_line(result)),
        warn=lambda text: display.say(f"note: {text}"),
    )


def _open_nvml(kind: DeviceKind) -> NvmlReader | NvmlUnavailable:
    """The reader, opened before anything allocates: its growth counts from what the card holds then.

    Preflight comes later, as even asking torch for bf16 allocates on cards that have none.
    """
    if kind == "cuda":
        return NvmlReader.open(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return NvmlUnavailable("emulated device: there is no GPU to ask")


def _train(
    trainer: Trainer,
    nvml: NvmlReader | NvmlUnavailable,
    options: RunOptions,
    display: Display,
    checkpoint: Path | None,
) -> Report | None:
    readings: list[tuple[MemoryReading, PcieReading]] = []
    trainer.on_trained = lambda: readings.append(_read_nvml(trainer, nvml))
    trainer.observe = lambda: _observed(trainer, _read_nvml(trainer, nvml), checkpoint)
    nvml.start_pcie()
    with display.interrupts.while_training(lambda: setattr(trainer, "stop_requested", True)):
        trainer.run()
    trainer.session.meet()
    seen = _observed(trainer, readings[-1] if readings else _read_nvml(trainer, nvml), checkpoint)
    _say_why_it_ended(trainer, options, display)
    _save_adapter(trainer, options)
    if options.trace is not None and together.is_first(trainer.session.peers):
        write_trace(trainer.session, options.trace)
        display.say(f"wrote {options.trace}, the last step's tasks")
    return trainer.session.at_first(
        lambda: build_report(trainer, seen, recall=trainer.measure_recall(), meft_version=VERSION)
    )


def _observed(trainer: Trainer, reading: tuple[MemoryReading, PcieReading], checkpoint: Path | None) -> RunObserved:
    """By this process, or if it found no step left to do by the one before: that was killed before its report."""
    if trainer.measured.windows:
        return together.observe_all(trainer, memory=reading[0], pcie=reading[1])
    seen = None if checkpoint is None else load_observed(checkpoint)
    if seen is None:
        raise UsageError(
            f"--resume: the run is complete, and {checkpoint} of an older version does not say what a report needs; "
            f"give more steps to train on"
        )
    return seen


def _say_why_it_ended(trainer: Trainer, options: RunOptions, display: Display) -> None:
    done, best = trainer.steps_done, trainer.best_evaluation
    if best is not None and options.training.patience is not None:
        place = options.output_dir / output.BEST_ADAPTER
        display.say(f"the best evaluation was after optimizer step {best.optimizer_steps}; its adapter: {place}")
    if done == options.training.steps:
        return
    if trainer.out_of_patience:
        display.say(f"stopped after step {done}: {options.training.patience} evaluations in a row were no better")
    elif display.interrupts.number is not None:
        display.interrupts.stopped_after = done


def _save_adapter(trainer: Trainer, options: RunOptions) -> Path:
    folder, session = options.output_dir / output.ADAPTER, trainer.session
    session.at_first(lambda: save_adapter(session, folder, meft_version=VERSION))
    return folder


def _read_nvml(trainer: Trainer, nvml: NvmlReader | NvmlUnavailable) -> tuple[MemoryReading, PcieReading]:
    reserved = torch.cuda.memory_reserved() if trainer.session.device.kind == "cuda" else 0
    return nvml.process_memory(at_least_bytes=reserved), nvml.pcie_bytes()


def _device(plan: Plan, options: RunOptions, kind: DeviceKind) -> Device:
    if options.link_gbps is not None and kind == "cuda":
        raise UsageError("--link-gbps slows the emulated device's link down; a real link has its own speed")
    return CudaDevice(_budget(plan, options)) if kind == "cuda" else EmulatedDevice(_budget(plan, options))


def _trainer(session: Session, dataset: Dataset, options: RunOptions, pad_id: int, display: Display) -> Trainer:
    def keep_best() -> None:
        if options.training.patience is not None:
            folder = options.output_dir / output.BEST_ADAPTER
            session.at_first(lambda: save_adapter(session, folder, meft_version=VERSION))

    return Trainer(
        session,
        dataset.examples,
        options.training,
        pad_id=pad_id,
        meft_version=VERSION,
        output=options.output_dir,
        sequence_tokens=dataset.statistics.sequence_tokens,
        on_step=display.on_step,
        on_best=keep_best,
        data=_names(options),
    )


def _model_folder(plan: Plan, options: RunOptions, display: Display) -> Path:
    reference = options.model or plan.request.model_path
    if reference is None and plan.request.model.name == SMOLLM2_PROFILE:
        return smollm2_folder(display.say)
    if reference is None:
        name = plan.request.model.name
        hub_name = hub_name_of(name)
        how = f" ({how_to_download(hub_name)})" if hub_name else ""
        raise UsageError(f"--model: give the folder that holds the weights of {name}{how}, or --rehearse")
    return model_loading.existing_folder(reference)


def _device_kind(plan: Plan, options: RunOptions) -> DeviceKind:
    """Where the run takes place; a plan for a card is never trained elsewhere without a word."""
    if options.device != "auto":
        return options.device
    if torch.cuda.is_available():
        return "cuda"
    if preflight.for_emulated_device(plan):
        return "emulated"
    raise MachineError(
        f"the plan is for {plan.request.gpu} and torch sees no CUDA device here; --device emulated trains on the CPU "
        f"within the same books and budget (slow), --rehearse counts one step without weights"
    )


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
