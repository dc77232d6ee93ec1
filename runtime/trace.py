"""The trace: a training run of the real model under fake tensors, as the stream of allocations of a CUDA device.

Nothing is computed and no weight is read: the model's own code, PEFT, torch's autograd and its optimizers run on
tensors without content, and the books write down every storage that comes and goes. Where CUDA does otherwise than the
CPU that runs this, the books and the replaced functions follow CUDA.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meft.planner.setup import TrainingSetup
from meft.planner.stream import Stream
from meft.runtime.model_loading import COMPUTE_DTYPES
from meft.runtime.rehearse import unpacked_sequences
from meft.runtime.trace_autocast import cuda_lists
from meft.runtime.trace_books import CudaBooks
from meft.runtime.trace_flash import flash_attention_package, use_flash_attention
from meft.runtime.trace_functions import cuda_functions
from meft.runtime.trace_loading import build_model, load, prepare_for_kbit_training
from meft.runtime.trace_losses import use_loss
from meft.runtime.trace_methods import attach_method
from meft.runtime.trace_optimizers import keeps_steps_on_host, make_optimizer, state_tensors
from meft.runtime.trace_scopes import Scopes, decoder_layers, first_tensor

WORKSPACE_BYTES = 8_519_680
"""cuBLAS's workspace below Hopper: 4096 KiB x 2 + 16 KiB x 8, torch's default CUBLAS_WORKSPACE_CONFIG."""
STEPS = 2
"""In the first step the optimizer has no state yet."""
MICRO_BATCHES = 2
"""At most so many per step: from the second on, gradients are added to those that are there."""


def trace_training(setup: TrainingSetup, config: dict[str, Any], *, workspace_bytes: int = WORKSPACE_BYTES) -> Stream:
    """Load, attach and two whole steps of ``setup``; ``config`` is the model's Hugging Face config."""
    with FakeTensorMode(), _no_collection():
        return _Run(setup, config, workspace_bytes).trace()


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection amid the run: cycles would otherwise go at moments of chance."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Run:
    """One run in the making."""

    def __init__(self, setup: TrainingSetup, config: dict[str, Any], workspace_bytes: int) -> None:
        self.setup, self.config = setup, config
        self.scopes = Scopes()
        self.books = CudaBooks(workspace_bytes=workspace_bytes, categorise=self.scopes.category)
        self.log = self.scopes.log = self.books.log
        self.outputs: Any = None
        self.batch: dict[str, torch.Tensor] = {}

    def trace(self) -> Stream:
        """The whole run."""
        setup = self.setup
        model = build_model(setup, self.config)
        load(self.books, model, setup)
        if setup.kbit_preparation:
            prepare_for_kbit_training(self.books, model, setup)
        elif setup.activation_checkpointing:
            model.activation_checkpointing_enable()  # type: ignore[operator]  # with transformers' own defaults
        self.log.moment("loaded")
        model = attach_method(model, setup)
        self._adopt_new(model)
        self.log.moment("attached")
        if setup.attention == "flash":
            use_flash_attention(model)
        use_loss(model, setup.loss)
        self._train(model.train())
        return self.log.stream()

    def _adopt_new(self, model: nn.Module) -> None:
        with self.books.category("trainable_weights"):
            for parameter in model.parameters():
                self.books.adopt(parameter)

    def _train(self, model: nn.Module) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._gradient_is_there)
        optimizer = make_optimizer(self.setup.optimizer, parameters)
        with ExitStack() as stack:
            for context in (unpacked_sequences(), flash_attention_package(), cuda_lists(), cuda_functions()):
                stack.enter_context(context)
            for context in (self.scopes.following(model), self._phases(model)):
                stack.enter_context(context)
            stack.enter_context(self.books)
            for step in range(1, STEPS + 1):
                for _ in range(min(self.setup.grad_accum, MICRO_BATCHES)):
                    self._micro_batch(model, step)
                self._optimizer_step(optimizer, step)

    def _gradient_is_there(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.books.recategorise(parameter.grad, "gradients")

    def _micro_batch(self, model: nn.Module, step: int) -> None:
        self.scopes.enter("forward", default="forward_temporaries")
        with self.books.category("inputs"):
            self.batch = self._new_batch()
        with self._autocast():
            self.outputs = model(**self.batch)
        loss = self.outputs.loss
        self.log.moment(f"forward_{step}")
        if not self.setup.outputs_kept:
            self.outputs = None
        with self.books.autograd_thread():
            loss.backward()
        self.log.moment(f"backward_{step}")

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.setup.autocast == "none":
            return nullcontext()
        return torch.autocast("cpu", COMPUTE_DTYPES[self.setup.autocast])

    def _optimizer_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        self.scopes.enter("optimizer_step", default="optimizer_temporary")
        self.books.scalars_on_host = keeps_steps_on_host(self.setup.optimizer)
        optimizer.step()
        self.books.scalars_on_host = False
        for tensor in state_tensors(optimizer):
            self.books.recategorise(tensor, "optimizer_moments")
        self.log.moment(f"updated_{step}")
        optimizer.zero_grad(set_to_none=True)
        self.log.moment(f"optimizer_step_{step}")

    def _new_batch(self) -> dict[str, torch.Tensor]:
        names = ("input_ids", "labels", *(["attention_mask"] if self.setup.padded else []))
        shape = (self.setup.batch_size, self.setup.seq_len)
        return {name: torch.zeros(shape, dtype=torch.int64) for name in names}

    @contextmanager
    def _phases(self, model: nn.Module) -> Iterator[None]:
        """The last decoder layer's output ends ``forward``; when its gradient is there ``loss`` ends."""

        def loss_begins(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            if self.log.phase != "forward":  # a recompute
                return
            hidden = first_tensor(output)
            self.scopes.enter("loss", default="loss_chain")
            if hidden.requires_grad:
                hidden.register_hook(backward_begins)

        def backward_begins(gradient: torch.Tensor) -> None:
            del gradient
            self.scopes.enter("backward", default="backward_temporaries")

        def mask_is_there(module: nn.Module, args: Any, kwargs: Any) -> None:
            del module, args
            if isinstance(kwargs.get("attention_mask"), torch.Tensor):
                self.books.recategorise(kwargs["attention_mask"], "attention_mask")

        layers = decoder_layers(model)
        handles = [
            layers[0].register_forward_pre_hook(mask_is_there, with_kwargs=True),
            layers[-1].register_forward_hook(loss_begins),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def peak_holders(stream: Stream, n: int = 20) -> list[tuple[int, int, str, str]]:
    """What is live at the peak of requested bytes, largest first: (bytes, tensors, category, label), ``n`` of them."""
    live_bytes, peak_bytes, at = 0, 0, 0
    for passed, event in enumerate(stream.events, start=1):
        live_bytes += event.num_bytes
        if live_bytes > peak_bytes:
            peak_bytes, at = live_bytes, passed
    live = {}
    for event in stream.events[:at]:
        if event.num_bytes > 0:
            live[event.tensor] = event
        else:
            del live[event.tensor]
    totals: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for event in live.values():
        totals[event.category, event.label] += event.num_bytes
        counts[event.category, event.label] += 1
    return [(total, counts[key], *key) for key, total in totals.most_common(n)]
