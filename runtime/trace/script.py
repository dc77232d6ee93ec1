"""A user's own training script, run on a card that is not there: the stream of its allocations for a few steps.

The script is run as it is, by its own libraries: models come without weights, the device's tensors without content, and
the books write down every storage that comes and goes on ``cuda``. After ``steps`` optimizer steps it is stopped.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from meft.planner.simulation.stream import Stream
from meft.runtime.fake.autocast import cuda_lists
from meft.runtime.fake.experts import grouped_products
from meft.runtime.fake.flash import flash_attention_package
from meft.runtime.fake.functions import cuda_functions
from meft.runtime.fake.present import PresentCard, cuda_is_there
from meft.runtime.fake.script_books import ScriptBooks
from meft.runtime.fake.script_scopes import ScriptScopes
from meft.runtime.trace.script_models import Models, libraries_look_again
from meft.runtime.trace.stage import without_collection


class ScriptDone(BaseException):
    """The steps that were asked for are done; no error, and so no ``except Exception`` of a script's catches it."""


class ScriptTracer:
    """Around a script: ``with ScriptTracer(...) as tracer: run it``, then ``tracer.stream``."""

    def __init__(
        self, *, name: str, memory_bytes: int, capability: tuple[int, int], workspace_bytes: int, steps: int
    ) -> None:
        self.card = PresentCard(name, memory_bytes, capability)
        self.steps = steps
        self.steps_done = 0
        self.scopes = ScriptScopes()
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.books = ScriptBooks(workspace_bytes=workspace_bytes, categorise=self.scopes.category, fake=fake)
        self.scopes.books = self.books
        self.models = Models(self.books)
        self._done_by: dict[int, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ScriptTracer:
        with ExitStack() as stack:
            for context in (
                without_collection(),
                libraries_look_again(),
                _quiet(),
                flash_attention_package(),
                grouped_products(),
                cuda_lists(),
                cuda_functions(),
                cuda_is_there(self.card, self.books),
                self.models.without_weights(),
                self.scopes.following(),
                self._optimizer_steps(),
                self.books,
            ):
                stack.enter_context(context)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._stack.__exit__(kind, error, trace)
        self.books.log.moment("end")
        return kind is ScriptDone

    @property
    def stream(self) -> Stream:
        """What came and went on the device, in order."""
        return self.books.log.stream()

    @property
    def not_followed(self) -> tuple[str, ...]:
        """What the trace could not know, a line each."""
        kinds = (
            ("numbers computed on the device are read, and taken as 0", self.books.numbers_asked_for),
            ("selections by numbers computed on the device are taken to select all", self.books.rows_unknown),
        )
        return tuple(f"{what}: {', '.join(sorted(places))}" for what, places in kinds if places)

    @contextmanager
    def _optimizer_steps(self) -> Iterator[None]:
        handles = [register_optimizer_step_pre_hook(self._begins), register_optimizer_step_post_hook(self._ended)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begins(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        self.scopes.optimizer_begins(optimizer)

    def _ended(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """A step is done when every optimizer that there is has made it."""
        del args, kwargs
        self.scopes.optimizer_ended(optimizer)
        self._done_by[id(optimizer)] = self._done_by.get(id(optimizer), 0) + 1
        done = min(self._done_by.values())
        if done > self.steps_done:
            self.steps_done = done
            self.books.log.moment(f"updated_{done}")
        if done >= self.steps:
            raise ScriptDone


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of libraries about what a trace does on purpose."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
