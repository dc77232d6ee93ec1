"""Of a folder with a model of text and images the text part is planned, loaded and trained, and no more."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from meft.planner.front.options import RequestOptions
from meft.planner.front.plan import find_plan
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.session.model_loading import check_model_folder, load_frozen_model
from meft.runtime.session.session import WindowEnd, open_session

BUDGET = 1 << 30
TEXT = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 32}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 28,
}


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3", text_config=TEXT, vision_config=VISION)
    model = AutoModelForCausalLM.from_config(config)
    folder = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(folder)
    return model.eval(), folder


def test_the_text_part_alone_is_loaded_with_its_own_weights(wrapper) -> None:
    whole, folder = wrapper
    options = {"gpu": "emulated", "gpu_mem": BUDGET, "host_mem": BUDGET, "seq_len": 16, "grad_accum": 1}
    plan = find_plan(RequestOptions(model=str(folder), adapter_width=32, top_k=4, max_slowdown=1000.0, **options)).plan
    check_model_folder(plan, folder)
    model = load_frozen_model(plan, folder, device_kind="emulated")
    assert not any("vision" in name for name, _ in model.named_parameters())
    assert model.num_parameters() == plan.request.model.num_parameters
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        expected = whole(input_ids=ids, use_cache=False).logits
        assert torch.equal(model.eval()(input_ids=ids, use_cache=False).logits, expected)
    session = open_session(plan, model.train(), EmulatedDevice(BUDGET), seed=0, compiled=False)
    session.step(Batch(ids.clone(), torch.ones_like(ids), ids.clone()), loss_scale=1.0, window_end=WindowEnd(1e-3, 1.0))
    session.optimizer_step(learning_rate=1e-3, max_norm=1.0)
    session.drain()
    predicted = plan.prediction.device_memory.peak_allocated_bytes
    assert session.device.peaks().allocated_bytes == pytest.approx(predicted, rel=0.03)
    session.close()
    session.adapter.detach()
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids, use_cache=False).logits, expected)
