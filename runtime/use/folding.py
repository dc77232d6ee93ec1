"""An adapter folded into its base: where the FFN is one of two layers with ReLU between them, it is a wider FFN.

    W2 ReLU(W1 h + b1) + b2 + V ReLU(K h)  =  [W2 V] ReLU([W1; K] h + [b1; 0]) + b2

So a model with a plain ReLU FFN (GPT-2, GPT-NeoX or Phi with ``relu``) and an adapter of exactly chosen rows become an
ordinary model of a larger intermediate size, which any library loads. Beside a gated FFN (LLaMA's ``down(silu(gate h) *
up h)``) or another activation there is no such FFN, nor for Key-Experts, whose rows are gated by each token's router:
those stay an adapter folder, which :class:`~meft.runtime.use.adapter_model.AdapterModel` loads without code of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from meft.planner.base.errors import MeftError, UsageError
from meft.planner.records.routing import ROUTINGS, Routing
from meft.runtime.adapter.blocks import ffn_modules
from meft.runtime.session.model_loading import load_tokenizer
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.inference import AS_TRAINED, LayerRows
from meft.runtime.use.saved import layer_rows, load_base, saved_adapter

ALL_ROWS = 0.99
"""Rows that were active in such a share of training's micro-batches are taken to be all."""
_WIDTH_FIELDS = ("intermediate_size", "n_inner", "ffn_dim")
_INSTEAD = "keep the adapter folder: meft.AdapterModel.from_pretrained loads it beside its base, without remote code"
_CARD = """\
---
library_name: transformers
base_model: {base}
tags: [meft]
---

{base} with a MEFT adapter of {width:,} rows per layer folded into its FFNs, whose intermediate size is {inner:,} now.
"""


def export_folded(base: Path, adapter: Path, output: Path) -> int:
    """Write the base with the adapter in its FFNs as an ordinary model folder; returns the new intermediate size.

    Raises:
        UsageError: the adapter does not fold, does not belong to this base, or ``output`` has files.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"-o {output}: is there already; name a folder that is not")
    config, tensors, source = saved_adapter(adapter)
    _require_foldable(config.base_model, config.routing)
    model: Any = load_base(base)
    AdapterModel.from_pretrained(model, adapter).detach()  # refuses a base that is not the adapter's
    layers = layer_rows(config, tensors, source, AS_TRAINED)
    _require_all_rows(layers)
    for module, rows in zip(ffn_modules(model), layers, strict=True):
        fold(module, rows)
    inner = config.base_model.intermediate_size + config.adapter_width
    field = next(name for name in _WIDTH_FIELDS if hasattr(model.config, name))
    setattr(model.config, field, inner)
    model.save_pretrained(output)
    load_tokenizer(base).save_pretrained(output)
    card = _CARD.format(base=base.name, width=config.adapter_width, inner=inner)
    (output / "README.md").write_text(card, encoding="utf-8")
    return inner


def _require_foldable(shape: Any, routing: Routing) -> None:
    if shape.gated_mlp:
        raise UsageError(f"{shape.name}: its FFN is gated, and ReLU rows beside it are no wider gated FFN; {_INSTEAD}")
    if shape.activation != "relu":
        raise UsageError(f"{shape.name}: its FFN has {shape.activation} where the adapter has ReLU; {_INSTEAD}")
    if ROUTINGS[routing].gated:
        raise UsageError(f"routing {routing}: each token's router gates its rows, which an FFN does not; {_INSTEAD}")


def _require_all_rows(layers: Sequence[LayerRows]) -> None:
    """An FFN has all of its neurons for every token: an adapter folds if that is what a token met in training."""
    width = len(layers[0].keys)
    shares = [rows.shares.mean().item() for rows in layers if rows.shares is not None]
    if layers[0].top_k >= width or not shares or min(shares) > ALL_ROWS:
        return
    met = sum(shares) / len(shares)
    raise UsageError(
        f"in training {met:.0%} of the {width:,} rows were active in a micro-batch, and in an FFN all would be, which "
        f"is another function than the trained one; {_INSTEAD}"
    )


def fold(module: nn.Module, rows: LayerRows) -> None:
    """Widen an FFN's two linear layers by an adapter's rows, in place, and check that it computes the sum."""
    linears = [each for each in module.modules() if isinstance(each, nn.Linear | Conv1D)]
    if len(linears) != 2:
        raise UsageError(f"{type(module).__name__}: {len(linears)} linear layers where an FFN has two; {_INSTEAD}")
    up, down = linears
    training = module.training
    module.eval()
    with torch.no_grad():
        hidden = torch.randn(4, rows.keys.shape[1], generator=torch.Generator().manual_seed(0)).to(up.weight)
        keys, values = rows.keys.to(up.weight), rows.values.to(up.weight)
        expected = module(hidden) + torch.relu(hidden @ keys.T) @ values
        _widen_outputs(up, keys)
        _widen_inputs(down, values)
        found = module(hidden)
    module.train(training)
    tolerance = 1e-4 if up.weight.dtype is torch.float32 else 5e-2
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        raise MeftError(f"{type(module).__name__}: the widened FFN does not compute the sum; {_INSTEAD}")


def _widen_outputs(linear: Any, keys: torch.Tensor) -> None:
    """More neurons: ``keys [R, D]`` after the layer's own."""
    conv = isinstance(linear, Conv1D)  # which keeps its weight as [inputs, outputs]
    weight = torch.cat([linear.weight, keys.T if conv else keys], dim=1 if conv else 0)
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(torch.cat([linear.bias, linear.bias.new_zeros(len(keys))]))
    _set_size(linear, "nf" if conv else "out_features", len(keys))


def _widen_inputs(linear: Any, values: torch.Tensor) -> None:
    """What more neurons give: ``values [R, D]`` after the layer's own."""
    conv = isinstance(linear, Conv1D)
    weight = torch.cat([linear.weight, values if conv else values.T], dim=0 if conv else 1)
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    _set_size(linear, "nx" if conv else "in_features", len(values))


def _set_size(linear: Any, name: str, more: int) -> None:
    setattr(linear, name, getattr(linear, name) + more)
