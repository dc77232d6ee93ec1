"""The adapter sits beside the FFN of every supported family: fresh it changes nothing, then it learns, then it goes."""

from __future__ import annotations

import pytest
import torch
from make_plan import hand_plan
from sessions import EXPERTS, WIDE, small_trainer
from sparse_setup import AMPLE_BYTES, decision
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from meft.planner.base.errors import UsageError
from meft.planner.models.configs import shape_from_config
from meft.runtime.adapter.blocks import ffn_modules
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.session.session import open_session

COMMON = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": {**GATED, "head_dim": 8},
    "gemma2": {**GATED, "head_dim": 8},
    "gemma3_text": {**GATED, "head_dim": 8, "sliding_window_pattern": 3},
    "smollm3": {**GATED, "pad_token_id": 0, "no_rope_layer_interval": 2},
    "olmo2": GATED,
    "granite": GATED,
    "phi": {**COMMON, "intermediate_size": 64},
    "phi3": {**GATED, "pad_token_id": 0},
    "gpt_neox": {**COMMON, "intermediate_size": 64},
    "gpt2": {"vocab_size": 1024, "n_embd": 32, "n_layer": 3, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_fresh_adapter_changes_nothing_and_then_learns(model_type, checkpointing) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if model_type == "gemma2" else "sdpa")
    ids = torch.arange(4, 28).view(1, -1)
    with torch.no_grad():
        bare = model.eval()(input_ids=ids).logits
    chosen = {**WIDE, **EXPERTS, "prefetch_depth": 1, "rows_in_backward": "refetched"}
    shape = shape_from_config({"model_type": model_type, **config.to_dict()}, name=model_type)
    plan = hand_plan(shape, decision(**chosen, activation_checkpointing=checkpointing))
    session = open_session(plan, model, EmulatedDevice(AMPLE_BYTES), seed=0)
    session.device.books.adopt(ids)
    with session.device.scope(), torch.no_grad():
        fresh = session.model.eval()(input_ids=ids).logits
    assert torch.equal(fresh, bare)
    session.model.train()
    trainer = small_trainer(session, steps=16, learning_rate=3e-2)
    trainer.run()
    assert sum(trainer.history.losses[-4:]) < 0.99 * sum(trainer.history.losses[:4])
    session.adapter.detach()
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, bare)


def test_a_model_without_an_mlp_per_block_is_refused() -> None:
    with pytest.raises(UsageError, match="Sequential: no list of blocks with an FFN each"):
        ffn_modules(nn.Sequential(nn.Linear(2, 2)))
