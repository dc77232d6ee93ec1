"""The stage on which a model is traced: books, phases, moments, and what is said or replaced around the model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from meft.runtime.adapter.blocks import decoder_blocks
from meft.runtime.device.books import DeviceBooks
from meft.runtime.device.event_log import EventLog
from meft.runtime.fake.autocast import cuda_lists
from meft.runtime.fake.books import CudaBooks
from meft.runtime.fake.experts import grouped_products
from meft.runtime.fake.flash import flash_attention_package
from meft.runtime.fake.functions import cuda_functions
from meft.runtime.session.documents import unpacked_sequences
from meft.runtime.trace.scopes import Scopes, first_tensor

STEPS = 2
"""In the first step the optimizer has no state yet."""
MICRO_BATCHES = 2
"""At most so many per step: from the second on, gradients are added to those that are there."""


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection amid the run: cycles would otherwise go at moments of chance."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Stage:
    """The books of one run and what is known of where it is. ``step`` counts from 1; the runner sets it. ``packed``:
    sequences hold several documents.

    Around CUDA's books the model runs with what CUDA does; around others as the CPU runs it.
    """

    def __init__(self, books: DeviceBooks, scopes: Scopes, *, packed: bool = False) -> None:
        self.scopes, self.books, self.packed = scopes, books, packed
        self.log = self.scopes.log = books.log or EventLog()
        self.step = 1

    def begin_micro_batch(self) -> None:
        """From here on it is forward; the rest follows from the model."""
        self.scopes.enter("forward", default="forward_temporaries")

    def begin_optimizer_step(self) -> None:
        """From here on it is the optimizer."""
        self.scopes.enter("optimizer_step", default="optimizer_temporary")

    def moment(self, name: str) -> None:
        """Name this place in the stream, with the step's number."""
        self.log.moment(f"{name}_{self.step}")

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Inside, ``model`` runs as on the books' device, but for the books, which its runner opens."""
        replaced: tuple[AbstractContextManager[None], ...] = (unpacked_sequences(self.packed), grouped_products())
        if isinstance(self.books, CudaBooks):
            replaced += (flash_attention_package(), cuda_lists(), cuda_functions())
        with ExitStack() as stack:
            for context in replaced:
                stack.enter_context(context)
            stack.enter_context(self.scopes.following(model))
            stack.enter_context(self._phases(model))
            yield

    @contextmanager
    def _phases(self, model: nn.Module) -> Iterator[None]:
        """The last decoder layer's output ends ``forward``; when its gradient is there ``loss`` ends."""
        layers = decoder_blocks(model)
        handles = [
            layers[0].register_forward_pre_hook(self._mask_is_there, with_kwargs=True),
            layers[-1].register_forward_hook(self._loss_begins),
            model.register_forward_hook(lambda *_: self.moment("forward")),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mask_is_there(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        del module, args
        if isinstance(kwargs.get("attention_mask"), torch.Tensor):
            self.books.recategorise(kwargs["attention_mask"], "attention_mask")

    def _loss_begins(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        if self.log.phase != "forward":  # a recompute
            return
        self.scopes.enter("loss", default="loss_chain")
        hidden = first_tensor(output)
        if hidden.requires_grad:
            hidden.register_hook(self._backward_begins)

    def _backward_begins(self, gradient: torch.Tensor) -> None:
        del gradient
        self.scopes.enter("backward", default="backward_temporaries")
