"""Frequencies of rotary positions that a model would compute anew at a step: made while it is loaded instead.

transformers' *longrope* makes its second set of frequencies at the first step, from numbers of the config, where it
lies on no device that the books know of. It looks for one that is there first. *dynamic* frequencies change only for
sequences longer than the config's positions, which no plan has; asking for that needs numbers, which fake tensors lack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


def settle_rotary_frequencies(model: nn.Module) -> None:
    """Give every rotary module of ``model``, which is on the host still, the frequencies that it would make later."""
    for module in list(model.modules()):
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            _settle(module, kinds, layer_type=None)
        elif isinstance(kinds, dict):  # one for each kind of layers
            for layer_type in tuple(kinds):
                _settle(module, kinds[layer_type], layer_type=layer_type)


def _settle(module: Any, kind: str, *, layer_type: str | None) -> None:
    """Long frequencies become a buffer, which moves with the model; fake ones stop asking how long a sequence is."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    inverse = getattr(module, f"{prefix}inv_freq")
    if kind == "longrope" and getattr(module, f"{prefix}long_inv_freq", None) is None:
        name = f"{prefix}long_inv_freq"
        module.register_buffer(name, _long_frequencies(module.config, layer_type), persistent=False)
    if "dynamic" in kind and isinstance(inverse, FakeTensor):
        if layer_type is None:
            module.rope_type = "default"
        else:
            module.rope_type[layer_type] = "default"


def _long_frequencies(config: Any, layer_type: str | None) -> torch.Tensor:
    """For sequences longer than those that the model was first trained on."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    longer = parameters["original_max_position_embeddings"] + 1
    frequencies: torch.Tensor = ROPE_INIT_FUNCTIONS["longrope"](
        config, torch.device("cpu"), seq_len=longer, layer_type=layer_type
    )[0]
    return frequencies
