"""The method of a traced run, attached to a real model as its users attach it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meft.planner.base.errors import UsageError
from meft.planner.records.setup import TrainingSetup
from meft.runtime.adapter.adapter import add_to, ffn_input
from meft.runtime.adapter.blocks import ffn_modules
from meft.runtime.fake.linear4bit import Linear4bit, LoraLinear4bit
from meft.runtime.methods.opening import only_biases, with_ladder
from meft.runtime.methods.peft_methods import attach_peft
from meft.runtime.session.session import ADAPTER_DTYPES

LORA_DROPOUT = 0.1
"""Any rate above 0 needs the same memory."""


class DenseAdapter(nn.Module):
    """A parallel adapter trained on the device, ``ReLU(h K^T) V^T`` in its own dtype; ``K [R, D]``, ``V [D, R]``."""

    def __init__(self, hidden_size: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.keys = nn.Linear(hidden_size, width, bias=False, dtype=dtype)
        self.values = nn.Linear(width, hidden_size, bias=False, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Output in the dtype of ``hidden``."""
        inputs = hidden.to(self.keys.weight.dtype)
        added: torch.Tensor = self.values(torch.relu(self.keys(inputs)))
        return added.to(hidden.dtype)


def attach_method(model: nn.Module, setup: TrainingSetup) -> nn.Module:
    """Freeze what the method freezes and attach what it trains; returns the model to train, which PEFT wraps.

    New parameters are made now, all others are as they were.
    """
    if setup.method == "parallel-adapter":
        model.requires_grad_(False)
        _attach_dense_adapters(model, setup)
    if setup.method == "bitfit":
        return only_biases(model)[0]
    if setup.method == "lst":
        model.requires_grad_(False)
        return with_ladder(model, setup)[0]
    if setup.peft is not None:
        model.requires_grad_(False)
        with fake_peft():
            return attach_peft(model, setup.peft)
    return model if setup.method in ("full", "parallel-adapter") else _with_lora(model, setup)


def _attach_dense_adapters(model: nn.Module, setup: TrainingSetup) -> None:
    if setup.adapter_width is None:
        raise UsageError("adapter_width: a parallel adapter needs one")
    for entry, exit_ in ffn_ends(model):
        adapter = DenseAdapter(setup.model.hidden_size, setup.adapter_width, ADAPTER_DTYPES[setup.adapter_dtype])
        exit_.adapter = adapter
        _place_beside(entry, exit_, adapter)


def ffn_ends(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Per block the module that takes the FFN's input and the one that gives its output: the same, but for OPT."""
    if getattr(model.config, "model_type", None) == "opt":
        return [(block.fc1, block.fc2) for block in model.model.decoder.layers]  # type: ignore[union-attr]
    return [(module, module) for module in ffn_modules(model)]


def _place_beside(entry: nn.Module, exit_: nn.Module, adapter: nn.Module) -> None:
    if entry is exit_:
        exit_.register_forward_hook(
            lambda module, args, kwargs, output: add_to(output, adapter(ffn_input(module, args, kwargs))),
            with_kwargs=True,
        )
        return
    held: list[torch.Tensor] = []
    entry.register_forward_pre_hook(lambda _module, args: held.append(args[0]))
    exit_.register_forward_hook(lambda _module, _args, output: output + adapter(held.pop()))


def _with_lora(model: nn.Module, setup: TrainingSetup) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    if setup.rank is None or not setup.target_modules:
        raise UsageError(f"rank and target_modules: {setup.method} needs both")
    config = LoraConfig(
        r=setup.rank,
        lora_alpha=2 * setup.rank,
        target_modules=list(setup.target_modules),
        lora_dropout=LORA_DROPOUT if setup.lora_dropout else 0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({Linear4bit: LoraLinear4bit})
    fp32 = setup.adapter_dtype == "fp32"
    with warnings.catch_warnings(), _parameters_replaced_by_casts():
        warnings.simplefilter("ignore")  # about fan_in_fan_out of GPT-2's Conv1D, which PEFT sets itself
        try:
            adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=fp32)
        except ValueError as error:
            raise UsageError(f"target_modules {', '.join(setup.target_modules)}: {error}") from error
        if not fp32:  # PEFT gives adapters the dtype of their layer, but beside quantized ones fp32
            for name, module in adapted.named_modules():
                if name.endswith(("lora_A.default", "lora_B.default")):
                    module.to(ADAPTER_DTYPES[setup.adapter_dtype])
    return adapted


@contextmanager
def fake_peft() -> Iterator[None]:
    """What ``peft`` does when it attaches, possible under fake tensors: casts, and copies of whole layers."""
    one_mode = mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, _memo: mode, create=True)
    with _parameters_replaced_by_casts(), one_mode:
        yield


@contextmanager
def _parameters_replaced_by_casts() -> Iterator[None]:
    """``Module.to`` puts new parameters in place of old ones: fake tensors cannot be changed in place."""

    def apply(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            apply(child, fn)
        with torch.no_grad():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(fn(parameter), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = fn(buffer)
        return module

    with mock.patch.object(nn.Module, "_apply", apply):
        yield
