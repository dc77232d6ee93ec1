"""Adapters and base models from folders, for inference."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from meft.planner.base.errors import UsageError
from meft.planner.records.routing import ROUTINGS
from meft.runtime.session import checkpoint
from meft.runtime.session.checkpoint import AdapterConfig
from meft.runtime.session.model_folder import load_causal_lm
from meft.runtime.session.stages import ROUTING_STAGE
from meft.runtime.session.tensor_files import load_tensors
from meft.runtime.use.inference import LayerRows, Serving, found_by

EXTRA_STATE = "_extra_state"
"""Where torch keeps what a module has to say besides tensors; here the text of an adapter's config, as bytes."""

TRAINER_WEIGHTS = "model.safetensors"
"""What a Trainer calls the state of a model that is none of transformers' own."""


def saved_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, torch.Tensor], Path]:
    """What an adapter's folder holds, or one that a Trainer's ``save_model`` wrote, and the file of its tensors.

    Raises:
        UsageError: it is neither, or damaged.
    """
    state = folder / TRAINER_WEIGHTS
    if state.exists() and not checkpoint.holds_adapter(folder):
        tensors = load_tensors(state)
        if EXTRA_STATE not in tensors:
            raise UsageError(f"{state}: holds no adapter; give the folder that save_pretrained or save_model wrote")
        return description(tensors.pop(EXTRA_STATE), state), tensors, state
    config, path = checkpoint.load_config(folder), checkpoint.weights_path(folder)
    return config, load_tensors(path), path


def copy_adapter(source: Path, folder: Path) -> None:
    """Write the adapter of one folder into another as an adapter's folder, whole or not at all."""
    config, tensors, path = saved_adapter(source)
    card = path.with_name(checkpoint.MODEL_CARD)
    text = card.read_text(encoding="utf-8") if path.name != TRAINER_WEIGHTS and card.is_file() else None
    checkpoint.copy_adapter(config, tensors, folder, card=text)


def described(config: AdapterConfig) -> torch.Tensor:
    """An adapter's config as bytes, uint8."""
    return torch.frombuffer(bytearray(config.to_json().encode()), dtype=torch.uint8)


def description(extra: torch.Tensor, path: Path) -> AdapterConfig:
    """The inverse of :func:`described`; ``path`` names the origin in errors."""
    if not isinstance(extra, torch.Tensor) or extra.dtype is not torch.uint8 or extra.dim() != 1:
        raise UsageError(f"{path}: {EXTRA_STATE} is no adapter's config")
    try:
        text = bytes(extra.tolist()).decode()
    except UnicodeDecodeError:
        raise UsageError(f"{path}: {EXTRA_STATE} is no adapter's config") from None
    return AdapterConfig.from_json(text, source=f"{path} ({EXTRA_STATE})")


def load_base(folder: Path) -> nn.Module:
    """A model from a folder, in the dtype of its files."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"base model {folder}: no config.json there; give the folder of a Hugging Face model")
    return load_causal_lm(folder, said="base model", dtype="auto")


def layer_rows(
    config: checkpoint.AdapterConfig, tensors: dict[str, torch.Tensor], path: Path, how: Serving
) -> tuple[LayerRows, ...]:
    """The rows that an adapter's file holds, their shapes checked against its config."""
    shape, router_rows = config.base_model, ROUTINGS[config.routing].router_rows(config.num_experts)
    found = found_by(config.routing, config.num_experts, _stage(config, tensors, path))
    micro_batches, how = _micro_batches(tensors, path), how.after(config.tokens_see, config.top_k)
    layers = []
    for layer in range(shape.num_layers):
        rows = _tensor(tensors, f"layers.{layer}.rows", (config.adapter_width, 2 * shape.hidden_size), path)
        router = None
        if router_rows:
            router = _tensor(tensors, f"layers.{layer}.router", (router_rows, shape.hidden_size), path)
        keys, values = (half.contiguous() for half in rows.tensor_split(2, dim=1))
        share = None
        if micro_batches > 0:
            name = f"layers.{layer}.{checkpoint.ACTIVE_COUNTS}"
            counts = _tensor(tensors, name, (config.adapter_width,), path)
            share = (counts.to(torch.float32) / micro_batches).clamp(0, 1)
        layers.append(LayerRows(keys, values, router, config.num_probes, how, config.top_k, share, **found))
    return tuple(layers)


def _stage(config: AdapterConfig, tensors: dict[str, torch.Tensor], path: Path) -> int:
    """Of a routing that has stages; else 0."""
    if ROUTINGS[config.routing].routers == 1:
        return 0
    stage = int(_tensor(tensors, ROUTING_STAGE, (1,), path))
    if stage not in (1, 2):
        raise UsageError(f"{path}: {ROUTING_STAGE} {stage}: routing {config.routing} has stages 1 and 2")
    return stage


def _micro_batches(tensors: dict[str, torch.Tensor], path: Path) -> int:
    """In how many of training's micro-batches active rows were counted; 0 in a file of an older version."""
    if checkpoint.MICRO_BATCHES not in tensors:
        return 0
    return int(_tensor(tensors, checkpoint.MICRO_BATCHES, (1,), path))


def _tensor(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...], path: Path) -> torch.Tensor:
    found = tensors.get(name)
    if found is None or tuple(found.shape) != shape:
        seen = "nothing" if found is None else f"{tuple(found.shape)}"
        raise UsageError(f"{path}: {name} should be {shape}, found {seen}")
    return found
