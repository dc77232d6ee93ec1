"""Where a traced script is: in which phase, and in which module, whatever the script and its model are.

In forward, hooks on every module say it. In backward the gradient of a module's output says that its own operators
come next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from meft.runtime.fake.books import in_backward
from meft.runtime.fake.linear4bit import Linear4bit

if TYPE_CHECKING:
    from meft.runtime.fake.script_books import ScriptBooks

OUTSIDE = "outside of modules"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@contextmanager
def modules_followed(entered: Callable[..., None], left: Callable[..., None]) -> Iterator[None]:
    """Inside, every module that runs tells when it is entered, with its arguments, and left, with its output too.

    It tells whatever ends it: activation checkpointing leaves a recompute by an exception once it has what it needs.
    """
    handles = [register_module_forward_pre_hook(entered), register_module_forward_hook(left, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ScriptScopes:
    """The innermost module that runs, by its path with ``*`` in place of a layer's number."""

    def __init__(self) -> None:
        self.books: ScriptBooks
        self._paths: dict[int, str] = {}
        self._stack: list[str] = []
        self._in_backward = OUTSIDE
        self._seen: set[int] = set()

    def category(self) -> str:
        """The module that allocates now."""
        log = self.books.log
        if log.phase != "optimizer_step":
            log.phase = "backward" if in_backward() else self._phase_of_forward()
        if self._stack:
            return self._stack[-1]
        return self._in_backward if log.phase == "backward" else OUTSIDE

    def _phase_of_forward(self) -> Any:
        return "forward" if self._stack or self.books.log.phase != "resident" else "resident"

    @contextmanager
    def following(self) -> Iterator[None]:
        """Hook every module that runs."""
        with modules_followed(self._entered, self._left):
            try:
                yield
            finally:
                self._stack.clear()

    def optimizer_begins(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are all there; what comes now is the optimizer's."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.books.recategorise(parameter.grad, "gradients")
        self.books.log.phase = "optimizer_step"
        self._in_backward = OUTSIDE

    def optimizer_ended(self, optimizer: torch.optim.Optimizer) -> None:
        """What it keeps are its states."""
        for state in optimizer.state.values():
            for value in state.values() if isinstance(state, dict) else ():
                if isinstance(value, torch.Tensor):
                    self.books.recategorise(value, "optimizer states")
        self.books.log.phase = "backward" if in_backward() else "forward"

    def _entered(self, module: nn.Module, args: Any) -> None:
        del args
        if not self._stack and id(module) not in self._seen:
            self._name(module)
        self._stack.append(self._paths.get(id(module), type(module).__name__))

    def _name(self, root: nn.Module) -> None:
        """A model that is run for the first time: the paths of its modules, and whose its weights are."""
        self._seen.add(id(root))
        for path, module in root.named_modules():
            self._paths[id(module)] = _NUMBER.sub("*", path) or type(root).__name__
        for tensor in (*root.parameters(), *root.buffers()):
            self.books.recategorise(tensor, "trained weights" if tensor.requires_grad else "frozen weights")
        for module in root.modules():
            if isinstance(module, Linear4bit):
                for tensor in module.quantized.tensors():
                    self.books.recategorise(tensor, "frozen weights")

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        path = self._stack.pop()
        for tensor in _outputs(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda _, path=path: self._backward_of(path))

    def _backward_of(self, path: str) -> None:
        self._in_backward = path


def _outputs(output: Any) -> Iterator[torch.Tensor]:
    """The tensors that a module returns, alone, first in a tuple or by name."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        yield from (each for each in output if isinstance(each, torch.Tensor))
    elif isinstance(output, dict):
        yield from (each for each in output.values() if isinstance(each, torch.Tensor))
