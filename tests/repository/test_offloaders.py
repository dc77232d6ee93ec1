"""The rows of benchmarks/step.py that are not ours: torch's FSDP2 trains the same adapter, and the rest say why not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import offloaders
import step

SIZES = step.Sizes(
    layers=2, hidden=64, width=128, top_k=8, cap=128, experts=8, seq_len=16, grad_accum=2, depth=1, link_gbps=None
)


def test_fsdp_offload_trains_the_dense_adapter_as_it_is_trained_on_the_device() -> None:
    made = []
    for make in (lambda: step.Dense(SIZES, offloaded=False), lambda: step.fsdp_of(SIZES)):
        torch.manual_seed(5)
        made.append(make())
    plain, sharded = made
    for _ in range(2):
        plain.window()
        sharded.window()
    try:
        for mine, theirs in zip(sharded.adapters, plain.adapters, strict=True):
            for got, expected in zip(mine.parameters(), theirs.parameters(), strict=True):
                assert type(got).__name__ == "DTensor"
                torch.testing.assert_close(got.detach().full_tensor(), expected.detach(), rtol=0, atol=1e-6)
                assert float(expected.detach().abs().max()) > 1e-4
    finally:
        sharded.close()


@pytest.mark.parametrize("module", ["torchao", "deepspeed"])
def test_what_is_not_installed_says_so(module, monkeypatch) -> None:
    monkeypatch.setattr(offloaders.importlib.util, "find_spec", lambda name: None)
    assert f"{module} is not installed" in " ".join(offloaders.unable().values())
