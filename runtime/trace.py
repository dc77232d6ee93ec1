"""The trace: a training run of the real model under fake tensors, as the stream of allocations of a CUDA device.

Nothing is computed and no weight is read: the model's own code, PEFT, torch's autograd and its optimizers run on
tensors without content, and the books write down every storage that comes and goes. Where CUDA does otherwise than the
CPU that runs this, the books and the replaced functions follow CUDA.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meft.planner.setup import TrainingSetup
from meft.planner.stream import Stream
from meft.runtime.model_loading import COMPUTE_DTYPES
from meft.runtime.rehearse import unpacked_sequences
from meft.runtime.trace_books import CudaBooks
from meft.runtime.trace_functions import CudaFunctions
from meft.runtime.trace_methods import attach_method
from meft.runtime.trace_scopes import Scopes, decoder_layers, first_tensor

WORKSPACE_BYTES = 8_519_680
"""cuBLAS's workspace below Hopper: 4096 KiB x 2 + 16 KiB x 8, torch's default CUBLAS_WORKSPACE_CONFIG."""
STEPS = 2
"""In the first step the optimizer has no state yet."""


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
        model = _build_model(self.setup, self.config)
        self._adopt(model, trained="other_weights")
        self.log.moment("loaded")
        model = attach_method(model, self.setup)
        self._adopt(model, trained="trainable_weights")
        self.log.moment("attached")
        model.train()
        self._train(model)
        return self.log.stream()

    def _adopt(self, model: nn.Module, *, trained: str) -> None:
        """Enter what is new of a model's parameters and buffers."""
        linear = {id(weight) for weight in linear_weights(model)}
        for name, parameter in model.named_parameters():
            kind = "linear_weights" if id(parameter) in linear and "lora_" not in name else trained
            with self.books.category(kind):
                self.books.adopt(parameter)
        with self.books.category("rotary_frequencies"):
            for buffer in model.buffers():
                self.books.adopt(buffer)

    def _train(self, model: nn.Module) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: self.books.recategorise(p.grad, "gradients"))
        with ExitStack() as stack:
            stack.enter_context(unpacked_sequences())
            stack.enter_context(self.scopes.following(model))
            stack.enter_context(self._phases(model))
            stack.enter_context(CudaFunctions())
            stack.enter_context(self.books)
            for step in range(1, STEPS + 1):
                self._step(model, optimizer, step)

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        self.scopes.enter("forward", default="forward_temporaries")
        with self.books.category("inputs"):
            self.batch = self._new_batch()
        self.outputs = model(**self.batch)
        loss = self.outputs.loss
        self.log.moment(f"forward_{step}")
        if not self.setup.outputs_kept:
            self.outputs = None
        with self.books.autograd_thread():
            loss.backward()
        del loss
        self.log.moment(f"backward_{step}")
        self._optimizer_step(optimizer)
        self.log.moment(f"optimizer_step_{step}")

    def _optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.scopes.enter("optimizer_step", default="optimizer_temporary")
        self.books.scalars_on_host = True
        optimizer.step()
        self.books.scalars_on_host = False
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    self.books.recategorise(value, "optimizer_moments")
        optimizer.zero_grad(set_to_none=True)

    def _new_batch(self) -> dict[str, torch.Tensor]:
        shape = (self.setup.batch_size, self.setup.seq_len)
        return {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels")}

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

        handle = decoder_layers(model)[-1].register_forward_hook(loss_begins)
        try:
            yield
        finally:
            handle.remove()


def _build_model(setup: TrainingSetup, config: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(config)
    made = AutoConfig.for_model(options.pop("model_type"), **options)
    dtype = COMPUTE_DTYPES[setup.weights_dtype]
    model: nn.Module = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation=setup.attention)
    return model


def linear_weights(model: nn.Module) -> list[torch.Tensor]:
    """Weights of the decoder layers' linear modules (GPT-2's are called Conv1D)."""
    modules = decoder_layers(model).modules()
    linear = (each for each in modules if isinstance(each, nn.Linear) or type(each).__name__ == "Conv1D")
    return [each.get_parameter("weight") for each in linear]


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
