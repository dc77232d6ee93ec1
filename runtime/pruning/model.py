"""A model's blocks pruned one after the other, each on what the pruned blocks before it give.

The blocks' inputs are caught in one forward of the whole model. From there on a block at a time is on the device: its
linear layers' Hessians are added up from the calibration sequences, its weights pruned, and the sequences sent through
it again for the next block. Embedding, head and norms stay as they are, as in the SparseGPT paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from meft.planner.base.errors import UsageError
from meft.runtime.adapter.blocks import decoder_blocks
from meft.runtime.pruning.sparsegpt import Hessian, Sparsity, objective, pruned, pruned_by_magnitude

Method: TypeAlias = Literal["sparsegpt", "magnitude"]
METHODS: tuple[Method, ...] = ("sparsegpt", "magnitude")


@dataclass(frozen=True)
class PrunedLayer:
    """What pruning did to one linear layer."""

    name: str
    zeros: int
    numel: int
    error: float
    """``|| W X - W' X ||^2 / || W X ||^2`` on the calibration text."""


@dataclass
class _Sequence:
    """One calibration sequence between two blocks: the hidden states, and what each block is called with besides."""

    hidden: torch.Tensor
    others: list[tuple[tuple[Any, ...], dict[str, Any]]]


@torch.no_grad()
def prune_model(
    model: nn.Module,
    sequences: Sequence[torch.Tensor],
    sparsity: Sparsity,
    *,
    method: Method = "sparsegpt",
    device: torch.device | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> list[PrunedLayer]:
    """Prune the linear layers of every block of ``model`` in place.

    Args:
        model: a causal language model on the host, in eval mode.
        sequences: calibration token ids, int64 ``[1, S]`` each.
        sparsity: which share of each layer's weights goes.
        method: how; ``magnitude`` is what to compare with.
        device: where a block is pruned; the model's own by default.
        on_block: told after each block how many are done, and of how many.

    Raises:
        UsageError: groups that do not divide a layer's inputs.
    """
    blocks = decoder_blocks(model)
    home = next(model.parameters()).device
    device = device or home
    waiting = [_caught(model, blocks, ids.to(home)) for ids in sequences]
    found: list[PrunedLayer] = []
    for number, block in enumerate(blocks):
        block.to(device)
        layers = dict(_linears(block))
        hessians = {name: Hessian(_matrix(layer).shape[1], device) for name, layer in layers.items()}
        with _adding_up(layers, hessians):
            for sequence in waiting:
                _through(block, number, sequence, device)
        found += [
            _pruned_layer(f"{number}.{name}", layer, hessians[name].matrix, sparsity, method)
            for name, layer in layers.items()
        ]
        for sequence in waiting:
            sequence.hidden = _through(block, number, sequence, device).to(home)
        block.to(home)
        if on_block is not None:
            on_block(number + 1, len(blocks))
    return found


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def _matrix(layer: nn.Module) -> torch.Tensor:
    """The weights as ``[outputs, inputs]``; GPT-2's layers keep them the other way round."""
    weight: torch.Tensor = layer.weight.data  # type: ignore[assignment]
    return weight.t() if isinstance(layer, Conv1D) else weight


def _pruned_layer(
    name: str, layer: nn.Module, hessian: torch.Tensor, sparsity: Sparsity, method: Method
) -> PrunedLayer:
    before = _matrix(layer).clone()
    after = pruned_by_magnitude(before, sparsity) if method == "magnitude" else pruned(before, hessian, sparsity)
    _matrix(layer).copy_(after)
    whole = objective(before, torch.zeros_like(before), hessian)
    error = objective(before, after, hessian) / whole if whole else 0.0
    return PrunedLayer(name, int((after == 0).sum()), after.numel(), error)


@contextmanager
def _adding_up(layers: dict[str, nn.Module], hessians: dict[str, Hessian]) -> Iterator[None]:
    """Inside, what the layers are given goes into their Hessians."""

    def hook_of(hessian: Hessian) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: hessian.add(args[0])

    hooks = [layer.register_forward_pre_hook(hook_of(hessians[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _caught(model: nn.Module, blocks: nn.ModuleList, ids: torch.Tensor) -> _Sequence:
    """What the first block is given for some token ids, and what every block is called with besides."""
    first: list[torch.Tensor] = []
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001 - torch's
        hidden = args[0] if args else kwargs["hidden_states"]
        if not first:
            first.append(hidden)
        others.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    hooks = [block.register_forward_pre_hook(catch, with_kwargs=True) for block in blocks]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(others) != len(blocks):
        raise UsageError(
            f"the model calls its {len(blocks)} blocks {len(others)} times in a forward; blocks that are skipped or "
            f"shared cannot be pruned one after the other"
        )
    return _Sequence(first[0], others)


def _through(block: nn.Module, number: int, sequence: _Sequence, device: torch.device) -> torch.Tensor:
    """What a block makes of a sequence, on the device."""
    args, kwargs = sequence.others[number]
    output = block(sequence.hidden.to(device), *_placed(args, device), **_placed(kwargs, device))
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _placed(value: Any, device: torch.device) -> Any:
    """A block's other arguments on its device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _placed(each, device) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_placed(each, device) for each in value)
    return value
