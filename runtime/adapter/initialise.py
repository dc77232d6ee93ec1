"""Where the adapter's keys begin: random, or rows of the model's own FFN.

A row of an FFN's first projection (the gate's where the FFN is gated) is a direction that the model already tells
apart, so a key that starts there answers to something from the first step. The MEFT authors call it
``init_weight_from_raw_model``. Values start at zero either way: an adapter begins as nothing.

Letters: ``R`` adapter rows, ``D`` hidden size, ``I`` rows of the FFN.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from meft.planner.base.errors import UsageError
from meft.runtime.adapter.blocks import ffn_modules
from meft.runtime.host.store import HostStore

KeyInit = Literal["random", "ffn"]
KEY_INITS: tuple[KeyInit, ...] = get_args(KeyInit)
_PROJECTIONS = ("gate_proj", "gate_up_proj", "up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in")
"""Names of the projection into the FFN, gated ones first; ``gate_up_proj`` holds the gate's rows, then the others."""


def keys_from_ffn(store: HostStore, model: nn.Module, *, seed: int) -> None:
    """Copy ``R`` rows of each layer's FFN into the keys, chosen by ``seed`` without repeats while there are enough.

    Raises:
        UsageError: an FFN without a projection of ``D`` columns that can be read, such as a quantized one.
    """
    generator = torch.Generator().manual_seed(seed)
    for tables, block in zip(store.layers, ffn_modules(model), strict=True):
        rows = ffn_rows(block, hidden_size=store.hidden_size)
        chosen = _choice(store.adapter_width, len(rows), generator)[store.held.start : store.held.stop]
        tables.keys.copy_(rows[chosen].to("cpu", tables.keys.dtype))
    store.refresh_copies()


def ffn_rows(block: nn.Module, *, hidden_size: int) -> torch.Tensor:
    """The rows ``[I, D]`` of an FFN's first projection, wherever the model is."""
    name = next((each for each in _PROJECTIONS if hasattr(block, each)), None)
    if name is None:
        known = ", ".join(_PROJECTIONS)
        raise UsageError(f"--key-init ffn: {type(block).__name__} has none of {known}; use --key-init random")
    weight: torch.Tensor = block.get_submodule(name).weight.detach()  # type: ignore[operator]
    if weight.dim() != 2 or not weight.is_floating_point() or hidden_size not in weight.shape:
        found = f"{tuple(weight.shape)} {weight.dtype}"
        raise UsageError(f"--key-init ffn: {name} is {found}, which has no readable rows; use --key-init random")
    rows = (
        weight.T if weight.shape[1] != hidden_size or type(block.get_submodule(name)).__name__ == "Conv1D" else weight
    )
    return rows.tensor_split(2)[0] if name == "gate_up_proj" else rows


def _choice(count: int, available: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` row numbers: whole permutations one after another, so that none comes twice before all came once."""
    rounds = -(-count // available)
    return torch.cat([torch.randperm(available, generator=generator) for _ in range(rounds)])[:count]
