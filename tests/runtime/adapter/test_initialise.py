"""Keys from the model's own FFN, and the count of rows and experts that a run never used."""

from __future__ import annotations

import pytest
import torch
from sessions import EXPERTS, open_small, small_plan, small_trainer
from torch import nn
from transformers.pytorch_utils import Conv1D

from meft.planner.base.errors import UsageError
from meft.runtime.adapter.initialise import ffn_rows
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.session.expert_load import expert_load
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import open_session


@pytest.mark.parametrize("width", [128, 512])
def test_keys_are_rows_of_the_gate_each_once_while_there_are_enough(glass_folder, glass_model, width) -> None:
    plan = small_plan(glass_folder, choice={"adapter_width": width, "active_rows_cap": width})
    model = load_frozen_model(plan, glass_folder)
    session = open_session(plan, model, EmulatedDevice(1 << 32), seed=0, key_init="ffn")
    for tables, layer in zip(session.store.layers, glass_model.model.layers, strict=True):
        gate = layer.mlp.gate_proj.weight.detach()
        distance = torch.cdist(tables.keys.contiguous(), gate)
        nearest = distance.argmin(dim=1)
        assert torch.equal(gate[nearest], tables.keys)
        assert nearest.bincount(minlength=341).max() == -(-width // 341)
        assert not tables.values.any()
    assert session.key_init == "ffn"


def test_rows_of_other_ffns() -> None:
    class Block(nn.Module):
        def __init__(self, **parts: nn.Module) -> None:
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

    conv, fused = Conv1D(32, 8), nn.Linear(8, 64)
    assert torch.equal(ffn_rows(Block(c_fc=conv), hidden_size=8), conv.weight.T)
    assert torch.equal(ffn_rows(Block(gate_up_proj=fused), hidden_size=8), fused.weight[:32])
    square = Conv1D(8, 8)
    assert torch.equal(ffn_rows(Block(c_fc=square), hidden_size=8), square.weight.T)
    with pytest.raises(UsageError, match="--key-init ffn: Block has none of gate_proj"):
        ffn_rows(Block(other=conv), hidden_size=8)
    with pytest.raises(UsageError, match="no readable rows"):
        ffn_rows(Block(c_fc=conv), hidden_size=9)


def test_the_load_of_experts_is_counted_from_the_rows_updates(glass_folder) -> None:
    session = open_small(glass_folder, small_plan(glass_folder, choice=EXPERTS))
    assert all(load.dead_experts == 16 and load.busiest_share == 0 for load in expert_load(session))
    counts = session.store.layers[1].step_counts
    counts[:8] = 3  # the first expert's eight rows
    counts[8] = 1
    load = expert_load(session)[1]
    assert (load.dead_experts, load.dead_rows, load.busiest_share) == (14, 119, 24 / 25)


def test_a_trained_run_touches_experts(glass_folder) -> None:
    session = open_small(glass_folder, small_plan(glass_folder, choice=EXPERTS))
    small_trainer(session, steps=2).run()
    for load, tables in zip(expert_load(session), session.store.layers, strict=True):
        assert load.dead_rows == int((tables.step_counts == 0).sum()) < 128
