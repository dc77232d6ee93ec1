"""Whole models pruned: every layer better than by magnitude, whatever the family, and folders that load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from glass import load_glass_model
from trace_setups import config_of
from transformers import AutoConfig, AutoModelForCausalLM

from meft.planner.base.errors import MeftError
from meft.runtime.cli.run import command
from meft.runtime.pruning.model import METHODS, prune_model
from meft.runtime.pruning.sparsegpt import Sparsity

TWO_OF_FOUR = Sparsity(0.5, 2, 4)


def sequences(count: int = 6, *, length: int = 48, vocab: int = 1024) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    return list(torch.randint(4, vocab, (count, 1, length), generator=chance))


def test_every_layer_of_the_tiny_model_is_closer_than_by_magnitude() -> None:
    errors = {}
    for method in METHODS:
        model = load_glass_model()
        layers = prune_model(model, sequences(), Sparsity(0.5), method=method)
        errors[method] = {layer.name: layer.error for layer in layers}
        assert all(layer.zeros == pytest.approx(layer.numel / 2, abs=1) for layer in layers)
    assert len(errors["sparsegpt"]) == 4 * 7
    assert all(own < errors["magnitude"][name] for name, own in errors["sparsegpt"].items())


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "mistral", "gemma2"])
def test_what_reaches_a_block_is_what_the_pruned_model_gives_it(model_type: str) -> None:
    """Pruning again, to zeros that are there, must change nothing: unless a block was called otherwise than in the
    model, so that its inputs were others."""
    made = config_of(model_type)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(made.pop("model_type"), **made)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = sequences(3, length=24, vocab=60)
    layers = prune_model(model, given, TWO_OF_FOUR)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert len(changed) == len(layers) > 0
    assert not any(part in name for name in changed for part in ("norm", "ln_", "embed", "head", "wte"))
    errors = {layer.name: layer.error for layer in prune_model(model, given, TWO_OF_FOUR)}
    assert max(errors.values()) < 1e-9


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    lines = [
        {"text": f"the queen said to alice that the rabbit was late again, {number} times"} for number in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(
        command, [str(each) for each in arguments], catch_exceptions=False, standalone_mode=False
    )
    return result.stdout


def test_a_pruned_folder_is_a_model_as_any(glass_folder: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "pruned"
    said = run("prune", "--model", glass_folder, "--data", text, "--sparsity", "0.5", "-o", output, "--seq-len", 64)
    assert "(50.0%)" in said
    assert f"wrote {output}" in said
    assert run("generate", "the queen", "--model", output, "--raw", "--max-new-tokens", 2)
    record = json.loads((output / "pruning.json").read_text())
    assert (record["method"], record["sparsity"], len(record["layers"])) == ("sparsegpt", "0.5", 28)
    model = AutoModelForCausalLM.from_pretrained(output)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert (weight == 0).double().mean() == pytest.approx(0.5, abs=1e-4)


def test_what_is_there_is_not_replaced(glass_folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(MeftError, match="is there already"):
        run("prune", "--model", glass_folder, "--data", text, "--sparsity", "0.5", "-o", tmp_path)
