"""Tiny models and setups to trace: configs of every supported architecture, two layers of width 64, no dropout."""

from __future__ import annotations

from collections import Counter
from typing import Any

from meft.planner.models.configs import shape_from_config
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.stream import Stream, StreamEvent
from meft.runtime.trace.run import trace_training

_ROTARY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
_GROUPED = {"num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _ROTARY | _GROUPED,
    "mistral": _ROTARY | _GROUPED,
    "qwen2": _ROTARY | _GROUPED,
    "qwen3": _ROTARY | _GROUPED | {"head_dim": 16},
    "gemma": _ROTARY | _GROUPED | {"head_dim": 16},
    "gemma2": _ROTARY | _GROUPED | {"head_dim": 16},
    "phi": _ROTARY,
    "phi3": _ROTARY | _GROUPED,
    "gpt_neox": _ROTARY,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 192, "vocab_size": 256, "n_positions": 128}
    | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 192, "vocab_size": 256}
    | {"max_position_embeddings": 128, "dropout": 0.0, "word_embed_proj_dim": 64},
}
TARGETS = {"gpt2": ("c_attn",), "gpt_neox": ("query_key_value",), "phi3": ("qkv_proj",)}


def config_of(model_type: str, **changes: object) -> dict[str, Any]:
    """The tiny model's Hugging Face config."""
    return {"model_type": model_type} | CONFIGS[model_type] | changes


def setup_of(config: dict[str, Any], **changes: Any) -> TrainingSetup:
    """A setup for 2 x 32 tokens with what its method needs: rank 4, width 32, 16 active rows."""
    model_type = config["model_type"]
    usual: dict[str, Any] = {"method": "full", "batch_size": 2, "seq_len": 32}
    usual["attention"] = "eager" if model_type == "gemma2" else "sdpa"
    method = changes.get("method", "full")
    if method in ("lora", "qlora"):
        usual |= {"rank": 4, "target_modules": TARGETS.get(model_type, ("q_proj", "v_proj"))}
    if method == "qlora":
        usual["weights_dtype"] = "nf4"
    if method in ("parallel-adapter", "meft"):
        usual["adapter_width"] = 32
    if method == "meft":
        usual |= {"active_rows": 16, "top_k": 4, "outputs_kept": False}
    shape = shape_from_config(config, name=model_type)
    return TrainingSetup(model=shape, **(usual | changes))


def traced(
    model_type: str, *, config: dict[str, Any] | None = None, workspace_bytes: int = 0, **changes: Any
) -> Stream:
    """The trace of such a setup, without cuBLAS workspaces unless asked for."""
    config = config or config_of(model_type)
    return trace_training(setup_of(config, **changes), config, workspace_bytes=workspace_bytes)


def live_at(stream: Stream, moment: str) -> Counter[str]:
    """Requested bytes by category at a moment."""
    live: Counter[str] = Counter()
    for event in stream.events[: stream.moments[moment]]:
        live[event.category] += event.num_bytes
    return +live


def most_of(stream: Stream, category: str) -> int:
    """The most bytes of a category that are there at once."""
    live = most = 0
    for event in stream.events:
        live += event.num_bytes * (event.category == category)
        most = max(most, live)
    return most


def made_between(stream: Stream, first: str, last: str) -> list[StreamEvent]:
    """The allocations between two moments."""
    events = stream.events[stream.moments[first] : stream.moments[last]]
    return [event for event in events if event.num_bytes > 0]
