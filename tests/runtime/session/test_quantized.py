"""MEFT beside an nf4 base on the emulated device: bitsandbytes' CPU backend computes, and the books have it all."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from meft.planner.base.errors import UsageError
from meft.planner.front.options import RequestOptions
from meft.planner.front.plan import find_plan
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.session.model_loading import check_model_folder, load_frozen_model, model_from_config
from meft.runtime.session.session import WindowEnd, open_session

pytest.importorskip("bitsandbytes")
BUDGET = 1 << 30


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model in 16 bits, and the same as its quantized form is saved."""
    from transformers import BitsAndBytesConfig

    parent = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(parent / "half")
    wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantized = AutoModelForCausalLM.from_pretrained(
        parent / "half", quantization_config=wanted, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    quantized.save_pretrained(parent / "stored")
    return parent


@pytest.mark.parametrize(("folder", "options"), [("half", {"weights_dtype": "nf4"}), ("stored", {})])
def test_a_run_beside_nf4_weights_takes_what_its_plan_says(folders, folder, options) -> None:
    chosen = {"batch_size": 2, "seq_len": 48, "grad_accum": 1, "adapter_width": 32, "top_k": 4, "routing": "exact"}
    limits = {"gpu": "emulated", "gpu_mem": BUDGET, "host_mem": BUDGET, "max_slowdown": 1000.0, "min_trainable": 0.0}
    plan = find_plan(RequestOptions(model=str(folders / folder), **chosen, **limits, **options)).plan
    assert (plan.request.weights_dtype, plan.request.double_quant) == ("nf4", folder == "stored")
    check_model_folder(plan, folders / folder)
    model = load_frozen_model(plan, folders / folder, device_kind="emulated")
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    session = open_session(plan, model, EmulatedDevice(BUDGET), seed=0, compiled=False)
    ids = torch.arange(96).view(2, 48)
    losses = []
    for _ in range(4):
        batch = Batch(ids.clone(), torch.ones_like(ids), ids.clone())
        losses.append(session.step(batch, loss_scale=1.0, window_end=WindowEnd(3e-2, 1.0)).loss)
        session.optimizer_step(learning_rate=3e-2, max_norm=1.0)
    session.drain()
    assert losses[-1] < losses[0]
    predicted = plan.prediction.device_memory.peak_allocated_bytes
    assert session.device.peaks().allocated_bytes == pytest.approx(predicted, rel=0.03)
    session.close()


def test_a_rehearsal_has_no_quantized_weights(folders) -> None:
    limits = {"gpu": "emulated", "gpu_mem": BUDGET, "host_mem": BUDGET, "max_slowdown": 1000.0, "min_trainable": 0.0}
    plan = find_plan(RequestOptions(model=str(folders / "stored"), seq_len=32, **limits)).plan
    with pytest.raises(UsageError, match="weights in bitsandbytes-4bit have no rehearsal"):
        model_from_config(plan, {})


def test_the_stored_config_is_what_the_plan_read(folders) -> None:
    stored = json.loads((folders / "stored" / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["bnb_4bit_use_double_quant"]) == ("bitsandbytes", True)
