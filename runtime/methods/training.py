"""The one training loop over a method's session, with checkpoints of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meft.planner.records.setup import TrainingSetup
from meft.runtime.methods.saving import load_method_checkpoint, save_method_checkpoint
from meft.runtime.session.baselines import BaselineSession
from meft.runtime.session.checkpoint import TrainingState
from meft.runtime.training.training import Trainer


@dataclass
class MethodTrainer(Trainer):
    """A :class:`~meft.runtime.training.training.Trainer` of a session of
    :func:`~meft.runtime.methods.opening.open_method`."""

    setup: TrainingSetup | None = None
    """What the session was opened with; required."""

    def save(self) -> None:
        """Write a checkpoint of the present state, if there is somewhere to write it."""
        if self.output is not None and self.history.losses:
            folder = save_method_checkpoint(self._method, self.output, self._state())
            self.tell("checkpoint", step=self.steps_done, folder=str(folder))

    def load(self, folder: Path) -> TrainingState:
        """Bring the session to where a checkpoint stood."""
        assert self.setup is not None
        return load_method_checkpoint(self._method, self.setup, folder)

    def _state(self) -> TrainingState:
        assert self.setup is not None
        return super()._state().model_copy(update={"plan_digest": self.setup.content_digest()})

    @property
    def _method(self) -> BaselineSession:
        session: object = self.session
        assert isinstance(session, BaselineSession)
        return session
