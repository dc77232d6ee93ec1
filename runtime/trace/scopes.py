"""Where a traced run is: which phase, and inside which module, from which the categories of its tensors follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from meft.planner.records.plan import Phase
from meft.runtime.adapter.blocks import decoder_blocks
from meft.runtime.device.event_log import EventLog
from meft.runtime.fake.script_scopes import modules_followed

_BY_NAME = {
    "mlp": "ffn",
    "fc1": "ffn",
    "fc2": "ffn",
    "self_attn": "attention",
    "attention": "attention",
    "attn": "attention",
    "rotary_emb": "rotary_tables",
    "lm_head": "logits",
    "embed_out": "logits",
    "lora_A": "adapter",
    "lora_B": "adapter",
}
_BY_CLASS_SUFFIX = {
    "RMSNorm": "norms",
    "LayerNorm": "norms",
    "DenseAdapter": "adapter",
    "Embedding": "layer_inputs",
    "RotaryEmbedding": "rotary_tables",
}


def module_categories(model: nn.Module) -> dict[int, str]:
    """Category of what each module allocates, by ``id``; modules that say nothing are left out."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        parts = path.split(".")
        name = parts[-2] if parts[-1].isdigit() or parts[-1] == "default" else parts[-1]
        category = _BY_NAME.get(name)
        for suffix, by_class in _BY_CLASS_SUFFIX.items():
            if type(module).__name__.endswith(suffix):
                category = by_class
        if category is not None:
            found[id(module)] = category
    return found | {id(layer): "layer_inputs" for layer in decoder_blocks(model)}


class Scopes:
    """Follows the phases of a step, and with hooks on every module the innermost one that has a category."""

    def __init__(self) -> None:
        self.log: EventLog | None = None
        self._categories: dict[int, str] = {}
        self._stack: list[str | None] = []
        self._default: str = "forward_temporaries"

    def category(self) -> str:
        """Of what is allocated now."""
        for name in reversed(self._stack):
            if name is not None:
                return name
        return self._default

    def enter(self, phase: Phase, *, default: str) -> None:
        """A phase begins; ``default`` is the category outside of modules that have one."""
        assert self.log is not None
        self.log.phase, self._default = phase, default

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Hook every module that runs."""
        self._categories = module_categories(model)
        with modules_followed(self._entered, self._left):
            try:
                yield
            finally:
                self._stack.clear()

    def push(self, category: str) -> None:
        """Until :meth:`pop`, this is the innermost category."""
        self._stack.append(category)

    def pop(self) -> None:
        """End what :meth:`push` began."""
        self._stack.pop()

    def _entered(self, module: nn.Module, args: Any) -> None:
        del args
        self._stack.append(self._categories.get(id(module)))

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args, output
        self._stack.pop()


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden state that a decoder layer returns, alone or first of a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]
