"""The trace: a training run of the real model under fake tensors, as the stream of allocations of a CUDA device.

Nothing is computed and no weight is read: the model's own code, PEFT, torch's autograd and its optimizers run on
tensors without content, and the books write down every storage that comes and goes. Where CUDA does otherwise than the
CPU that runs this, the books and the replaced functions follow CUDA.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meft.planner.base.errors import UsageError
from meft.planner.models.architecture import ModelShape
from meft.planner.records.plan import Plan
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.stream import Stream
from meft.runtime.adapter.blocks import decoder_blocks
from meft.runtime.fake.books import CudaBooks
from meft.runtime.session.model_loading import COMPUTE_DTYPES
from meft.runtime.trace.emulated import trace_emulated_method
from meft.runtime.trace.kernels import rotations, use_kernels
from meft.runtime.trace.loading import build_model, cast_as_trl, load, prepare
from meft.runtime.trace.losses import use_loss
from meft.runtime.trace.meft import plan_of_traced, trace_meft
from meft.runtime.trace.methods import attach_method
from meft.runtime.trace.optimizers import MasterWeights, keeps_steps_on_host, make_optimizer, state_tensors
from meft.runtime.trace.scopes import Scopes
from meft.runtime.trace.stage import MICRO_BATCHES, STEPS, Stage, without_collection

WORKSPACE_BYTES = 8_519_680
"""cuBLAS's workspace below Hopper: 4096 KiB x 2 + 16 KiB x 8, torch's default CUBLAS_WORKSPACE_CONFIG."""


def trace_training(setup: TrainingSetup, config: dict[str, Any], *, workspace_bytes: int = WORKSPACE_BYTES) -> Stream:
    """Load, attach and two whole steps of ``setup``; ``config`` is the model's Hugging Face config.

    Raises :class:`~meft.planner.base.errors.UsageError` for a setup that cannot be run.
    """
    _check(setup)
    if setup.method == "meft":
        return trace_meft(plan_of_traced(setup), config, workspace_bytes=workspace_bytes)
    if setup.emulated:
        return trace_emulated_method(setup, config)
    with FakeTensorMode(), without_collection():
        return _Run(setup, config, workspace_bytes).trace()


def trace_plan(plan: Plan, config: dict[str, Any], *, workspace_bytes: int = WORKSPACE_BYTES) -> Stream:
    """The same for a MEFT plan, with the plan's own active rows."""
    _check_stored(plan.request.model)
    return trace_meft(plan, config, workspace_bytes=workspace_bytes)


def _check(setup: TrainingSetup) -> None:
    """Refuse what no run could be, and what is not known well enough to be traced."""
    _check_stored(setup.model)
    if setup.weights_dtype == "int8":
        raise UsageError("weights_dtype int8: its kernels' own memory is not known; give nf4, bf16, fp16 or fp32")
    if setup.weights_dtype == "nf4" and setup.method == "full":
        raise UsageError("weights_dtype nf4: full cannot train quantized weights; give bf16, or method qlora")
    if setup.attention == "flash" and setup.weights_dtype == "fp32" and setup.autocast == "none":
        raise UsageError("attention flash: it computes in 16 bits; give sdpa, 16-bit weights, or autocast")
    simulated_only = {
        "--kernels lora": "lora" in setup.kernels,
        "--repeated-heads": setup.repeated_heads,
        f"--offload {setup.offload}": setup.offload in ("trl", "unsloth"),
    }
    for option, is_given in simulated_only.items():
        if is_given:  # kernels and streams of GPUs alone, and code of an older transformers
            raise UsageError(f"{option} is simulated only; leave out --verify, or it")


def _check_stored(shape: ModelShape) -> None:
    stored = shape.stored
    if stored is not None and stored.method != "bitsandbytes-4bit":
        raise UsageError(f"model {shape.name}: weights stored as {stored.title} are not traced; leave --verify out")


class _Run:
    """One run in the making."""

    def __init__(self, setup: TrainingSetup, config: dict[str, Any], workspace_bytes: int) -> None:
        self.setup, self.config = setup, config
        scopes = Scopes()
        self.books = CudaBooks(workspace_bytes=workspace_bytes, categorise=scopes.category)
        self.books.takes_host_tensors = setup.peft is not None
        self.stage = Stage(self.books, scopes, packed=setup.packed)
        self.outputs: Any = None
        self.batch: dict[str, Any] = {}

    def trace(self) -> Stream:
        """The whole run."""
        setup = self.setup
        model = build_model(setup, self.config)
        load(self.books, model, setup)
        prepare(self.books, model, setup)
        self.books.log.moment("loaded")
        model = attach_method(model, setup)
        self._adopt_trained(model)
        if setup.trl_casts:  # once what is trained is there
            cast_as_trl(self.books, model)
        self.books.log.moment("attached")
        use_kernels(model, setup.kernels)
        use_loss(model, setup.loss)
        self._train(model.train())
        return self.books.log.stream()

    def _adopt_trained(self, model: nn.Module) -> None:
        """A function of its own: its loop would keep the last parameter beyond a cast."""
        with self.books.category("trainable_weights"):
            for parameter in model.parameters():
                self.books.adopt(parameter)

    def _train(self, model: nn.Module) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._gradient_is_there)
        with self.books.category("optimizer_moments"), self.books:
            optimizer = self._optimizer(model, parameters)
        with self.stage.of(model), rotations(model, self.setup.kernels), self.books:
            for self.stage.step in range(1, STEPS + 1):
                for _ in range(min(self.setup.grad_accum, MICRO_BATCHES)):
                    self._micro_batch(model)
                self.stage.moment("backward")
                self._optimizer_step(optimizer)

    def _optimizer(self, model: nn.Module, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Over all parameters; or, in backward, one for each, which leaves the step itself nothing to do."""
        setup = self.setup
        in_block = {id(each) for each in decoder_blocks(model).parameters() if each.dim() > 1}

        def make(over: list[nn.Parameter]) -> torch.optim.Optimizer:
            if not setup.master_weights:
                return make_optimizer(setup.optimizer, over, in_block=in_block)
            return MasterWeights(over, lambda masters: make_optimizer(setup.optimizer, masters, in_block=in_block))

        if not setup.optimizer_in_backward:
            return make(parameters)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._update_with(make([parameter])))
        return torch.optim.SGD(parameters)

    def _update_with(self, optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            with self.books.category("optimizer_temporary"):
                self._run(optimizer)
            parameter.grad = None

        return hook

    def _run(self, optimizer: torch.optim.Optimizer) -> None:
        self.books.scalars_on_host = keeps_steps_on_host(self.setup.optimizer)
        optimizer.step()
        self.books.scalars_on_host = False
        for tensor in state_tensors(optimizer):
            self.books.recategorise(tensor, "optimizer_moments")

    def _gradient_is_there(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.books.recategorise(parameter.grad, "gradients")

    def _micro_batch(self, model: nn.Module) -> None:
        self.stage.begin_micro_batch()
        with self.books.category("inputs"):
            self.batch = self._new_batch()
        with self._autocast(), self._offloading():
            self.outputs = model(**self.batch)
        loss = self.outputs.loss
        if not self.setup.outputs_kept:
            self.outputs = None
        loss.backward()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.setup.autocast == "none":
            return nullcontext()
        return torch.autocast("cpu", COMPUTE_DTYPES[self.setup.autocast])

    def _offloading(self) -> AbstractContextManager[Any]:
        """torch's own ``save_on_cpu``: what it packs lies on the host, and what it unpacks is a device tensor again."""
        if self.setup.offload != "save-on-cpu":
            return nullcontext()
        own = torch.autograd.graph.save_on_cpu(pin_memory=True)  # which copies, whatever device it is on

        def pack(tensor: torch.Tensor) -> Any:
            with self.books.host():
                return own.pack_hook(tensor)

        def unpack(packed: Any) -> torch.Tensor:
            with self.books.host():
                host: torch.Tensor = own.unpack_hook(packed)
            with self.books.category("offloaded_activations"):
                return torch.empty_strided(host.size(), host.stride(), dtype=host.dtype)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.stage.begin_optimizer_step()
        self._run(optimizer)
        self.stage.moment("updated")
        optimizer.zero_grad(set_to_none=True)
        self.stage.moment("optimizer_step")

    def _new_batch(self) -> dict[str, Any]:
        """The tensors of a batch; packed documents are told apart only where there is no KV cache."""
        setup = self.setup
        more = {"attention_mask": setup.padded, "position_ids": setup.packed}
        names = ("input_ids", "labels", *(name for name, there in more.items() if there))
        shape = (setup.batch_size, setup.seq_len)
        tensors = {name: torch.zeros(shape, dtype=torch.int64) for name in names}
        return tensors | ({"use_cache": False} if setup.packed else {})


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
