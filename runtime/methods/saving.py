"""What a method has learnt, on disk: in ``peft``'s own folder where ``peft`` trained it, and checkpoints to go on from.

A folder of a method that ``peft`` has is what its ``save_pretrained`` writes, and any program that knows ``peft`` reads
it. ``full`` is a model's folder. Of the others (a dense adapter, biases) it holds ``meft_method.safetensors``, the
trained tensors by name, and ``meft_method.json``. A checkpoint has the trained tensors themselves, the optimizer's
state and the random generator's, so that a run that goes on is the run that was never interrupted, bit for bit.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import nn

from meft.planner.base.errors import UsageError
from meft.planner.base.files import replace_folder, writing
from meft.planner.base.schema import File
from meft.planner.records.setup import TrainingSetup
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.methods.opening import open_method
from meft.runtime.methods.peft_methods import with_adapter
from meft.runtime.session.baselines import STATES, BaselineSession
from meft.runtime.session.checkpoint import TRAINING_STATE, TrainingState, list_checkpoints
from meft.runtime.session.tensor_files import load_tensors

METHOD_CONFIG = "meft_method.json"
METHOD_WEIGHTS = "meft_method.safetensors"
TRAINED_WEIGHTS = "trained.safetensors"
OPTIMIZER_STATE = "optimizer.safetensors"
RANDOM_STATE = "rng_state"
PEFT_CONFIG = "adapter_config.json"
UNLIMITED_BYTES = 1 << 50


class MethodConfig(File):
    """What a folder of a trained method says of itself."""

    kind: ClassVar[str] = "method config"

    meft_version: str
    setup: TrainingSetup


def names_of(session: BaselineSession) -> dict[str, nn.Parameter]:
    """The trained parameters by their names in the model."""
    trained = {id(parameter) for parameter in session.trained}
    return {name: each for name, each in session.model.named_parameters() if id(each) in trained}


def save_method(session: BaselineSession, setup: TrainingSetup, folder: Path, *, meft_version: str) -> None:
    """Write what was learnt, replacing an older folder whole.

    Raises:
        MachineError: the disk is full or refuses; what was there before is there still.
    """

    def write(new: Path) -> None:
        model: Any = session.model
        if hasattr(model, "peft_config") or setup.method == "full":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no hub says what the base model's vocabulary was
                model.save_pretrained(new)
            return
        _save(dict(names_of(session)), new / METHOD_WEIGHTS)
        MethodConfig(meft_version=meft_version, setup=setup).save(new / METHOD_CONFIG)

    with writing(folder), session.device.host():
        replace_folder(folder, write)


def holds_method(folder: Path) -> bool:
    """Whether a folder is one of :func:`save_method`'s or of ``peft``'s own."""
    if (folder / METHOD_CONFIG).is_file():
        return True
    try:
        content = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "peft_type" in content


def load_method(base: nn.Module, folder: Path) -> nn.Module:
    """A base model with what a method learnt, for inference.

    Raises:
        UsageError: the folder holds no method, or one that does not fit the model.
    """
    if (folder / PEFT_CONFIG).is_file():
        return with_adapter(base, folder)
    config = MethodConfig.load(folder / METHOD_CONFIG)
    session = open_method(config.setup, base, EmulatedDevice(UNLIMITED_BYTES), seed=0)
    _fill(names_of(session), load_tensors(folder / METHOD_WEIGHTS), folder / METHOD_WEIGHTS)
    return session.model.eval()


def save_method_checkpoint(session: BaselineSession, output: Path, state: TrainingState) -> Path:
    """Write ``checkpoint-<steps>`` under ``output``, then remove older ones; returns its path."""

    def write(new: Path) -> None:
        _save(dict(names_of(session)), new / TRAINED_WEIGHTS)
        _save(_optimizer_tensors(session) | {RANDOM_STATE: torch.get_rng_state()}, new / OPTIMIZER_STATE)
        state.save(new / TRAINING_STATE)

    before = list_checkpoints(output)
    folder = output / f"checkpoint-{state.steps_done:08d}"
    with writing(folder), session.device.host():
        replace_folder(folder, write)
        for older in before:
            if older != folder:
                shutil.rmtree(older)
    return folder


def load_method_checkpoint(session: BaselineSession, setup: TrainingSetup, folder: Path) -> TrainingState:
    """Bring a session, opened with the same setup and seed, to where the checkpoint stood.

    Raises:
        UsageError: the checkpoint is of another method, size or model, or damaged.
    """
    state = TrainingState.load(folder / TRAINING_STATE)
    if state.plan_digest != setup.content_digest():
        raise UsageError(f"--resume {folder}: was made by another method or size; give what the run began with")
    _fill(names_of(session), load_tensors(folder / TRAINED_WEIGHTS), folder / TRAINED_WEIGHTS)
    tensors = load_tensors(folder / OPTIMIZER_STATE)
    torch.set_rng_state(tensors.pop(RANDOM_STATE))
    _restore_optimizer(session, tensors)
    return state


def _optimizer_tensors(session: BaselineSession) -> dict[str, torch.Tensor]:
    """Per trained tensor, by its place, what AdamW keeps of it."""
    found: dict[str, torch.Tensor] = {}
    for index, parameter in enumerate(session.trained):
        state = session.optimizer.state.get(parameter, {}) if session.optimizer is not None else {}
        found |= {f"{index}.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return found


def _restore_optimizer(session: BaselineSession, tensors: dict[str, torch.Tensor]) -> None:
    assert session.optimizer is not None
    with session.device.scope(), session.device.category(STATES):
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            place = "cpu" if name == "step" else session.device.torch_device  # as AdamW has it
            made = torch.empty(value.shape, dtype=value.dtype, device=place)
            with session.device.host():
                made.copy_(value)
            session.optimizer.state[session.trained[int(index)]][name] = made


def _fill(parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Put saved numbers in their places."""
    shapes = {name: tuple(each.shape) for name, each in parameters.items()}
    found = {name: tuple(each.shape) for name, each in tensors.items()}
    if shapes != found:
        wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise UsageError(
            f"{path}: does not fit this model and method: {wrong[0]} should be {shapes.get(wrong[0], 'absent')}, "
            f"found {found.get(wrong[0], 'nothing')}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _save(tensors: dict[str, Any], path: Path) -> None:
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, path)
