"""Training runs under the happens-before checker, and code with one wait taken out."""

from __future__ import annotations

import inspect
import textwrap
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from happens_before import CheckedDevice, CheckedLanes, Checker, Watch
from sessions import small_plan, small_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from meft.planner.base.errors import MeftError
from meft.runtime.device.lanes import Schedule, Sequential
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import open_session
from meft.runtime.training.training import Trainer
from meft.runtime.use.evaluation import session_loss

STEPS, WINDOW = 6, 2


def save_tiny_llama(folder: Path) -> Path:
    """Three layers of 16: what is checked is the order of operators, not what they compute."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def checked_run(
    folder: Path,
    choice: dict[str, object],
    *,
    overlapped: bool = True,
    max_norm: float | None = 1.0,
    beside: str = "nothing",
    mutated: bool = False,
    **request: Any,
) -> Checker:
    """Train three windows, and do something ``beside`` them; what the checker has to say. Code that is ``mutated`` may
    come to a loss that is no number, which ends a run."""
    device = CheckedDevice()
    with suppress(MeftError if mutated else ()):
        checked_trainer(
            folder, choice, overlapped=overlapped, max_norm=max_norm, beside=beside, device=device, **request
        )
    return device.checker


def checked_trainer(
    folder: Path,
    choice: dict[str, object],
    *,
    overlapped: bool,
    max_norm: float | None,
    beside: str,
    device: CheckedDevice | None = None,
    **request: Any,
) -> Trainer:
    """The trainer of such a run, its session closed: after the window in which something was found, if anything was."""
    device = device or CheckedDevice()
    plan = small_plan(folder, choice=choice, grad_accum=WINDOW, seq_len=8, batch_size=1, **request)
    schedule: Schedule = CheckedLanes(device.checker) if overlapped else Sequential()
    with Watch(device.checker):
        model = load_frozen_model(plan, folder)
        session = open_session(plan, model, device, seed=0, schedule=schedule, compiled=False)
        try:
            trainer = small_trainer(session, steps=STEPS, max_norm=max_norm)
            for first, last in trainer._windows():
                trainer._run_window(first, last)
                BESIDE[beside](trainer)
                if device.checker.findings:
                    return trainer  # one is enough
            session.bring_home()
        finally:
            session.close()
    assert len(trainer.history.losses) == STEPS
    return trainer


def evaluate(trainer: Trainer) -> None:
    session_loss(trainer.session, trainer.batch(0))


def measure_recall(trainer: Trainer) -> None:
    trainer.measure_recall()


def only_forward(trainer: Trainer) -> None:
    """Two forwards that no backward follows, one of which could have had one."""
    session = trainer.session
    for context in (nullcontext(), torch.no_grad()):
        with session.device.scope(), context:
            session.engine.read_scalar(session.loss(trainer.batch(0)), category="loss")


def drop_window(trainer: Trainer) -> None:
    """A window that is given up halfway."""
    trainer.session.step(trainer.batch(0), loss_scale=1.0)
    trainer.session.forget_gradients()


def write_rows(trainer: Trainer) -> None:
    """Rows are written on the host while a window is open, as by loading a checkpoint."""
    session = trainer.session
    session.step(trainer.batch(0), loss_scale=1.0)
    session.bring_home()
    with torch.no_grad():
        for tables in session.store.layers:
            tables.weights.mul_(1.01)
    session.rows_were_written()


def nothing(trainer: Trainer) -> None:
    del trainer


BESIDE = {
    "nothing": nothing,
    "evaluation": evaluate,
    "recall": measure_recall,
    "only forward": only_forward,
    "dropped window": drop_window,
    "written rows": write_rows,
}
"""What may happen between two windows."""


def changed(monkeypatch: Any, module: ModuleType, name: str, old: str, new: str) -> None:
    """Replace ``old``, which must be there once, by ``new`` in the source of a method ``Class.method``."""
    owner_name, method = name.split(".")
    owner = getattr(module, owner_name)
    source = textwrap.dedent(inspect.getsource(getattr(owner, method)))
    assert source.count(old) == 1, f"{name} does not contain {old!r} once: the mutant is out of date"
    made: dict[str, Any] = {}
    exec(compile(source.replace(old, new), f"<{name} changed>", "exec"), vars(module), made)
    monkeypatch.setattr(owner, method, made[method])
