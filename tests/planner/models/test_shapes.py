"""Shapes of families without a closed form: looked at once, then read from the cache, without torch."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from meft.planner.base import tracers
from meft.planner.base.errors import MachineError, UsageError
from meft.planner.models import shapes
from meft.planner.models.shapes import config_digest, shape_of

CONFIG = {"model_type": "mixtral", "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 4}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEFT_CACHE", str(tmp_path))


def without_torch(monkeypatch) -> None:
    points = [EntryPoint("shape", "a_module_that_is_not_there:shape", tracers.GROUP)]
    monkeypatch.setattr(tracers, "entry_points", lambda group: EntryPoints(points))


def test_what_was_looked_at_once_needs_no_torch_again(monkeypatch) -> None:
    pytest.importorskip("torch")
    found = shape_of(CONFIG, name="first")
    assert found.measured.class_name == "MixtralForCausalLM"
    without_torch(monkeypatch)
    again = shape_of(CONFIG, name="second")
    assert again.name == "second"
    assert again.differences(found) == {}


def test_without_torch_the_error_says_what_to_install(monkeypatch) -> None:
    without_torch(monkeypatch)
    with pytest.raises(MachineError, match=r"no closed form knows model_type mixtral, .* pip install 'meft\[run\]'"):
        shape_of(CONFIG, name="any")


def test_a_damaged_file_of_the_cache_is_made_again() -> None:
    pytest.importorskip("torch")
    path = shapes.cache_file(config_digest(CONFIG))
    path.parent.mkdir(parents=True)
    path.write_text('{"measured": 3}')
    assert shape_of(CONFIG, name="any").measured.experts == 4
    assert "MixtralForCausalLM" in path.read_text()


def test_a_variant_that_the_closed_form_does_not_know_is_looked_at() -> None:
    pytest.importorskip("torch")
    config = {"model_type": "opt", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 16}
    config |= {"vocab_size": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
    found = shape_of(config, name="projected")
    assert found.measured is not None
    assert "no FFN module of their own" in found.measured.without_ffn


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_hidden_layers": 1_000_000_000}, "num_hidden_layers = 1000000000 is not within 512"),
        ({"model_type": "nothing_like_it"}, "builds no causal LM of model_type 'nothing_like_it'"),
        ({"model_type": "of_its_own", "auto_map": {"AutoConfig": "x.Y"}}, r"code of its own to be run \(auto_map\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "mixtral has none; give a folder of 16-bit weights"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_with_the_reason(change, reason) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UsageError, match=reason):
        shape_of(CONFIG | change, name="any")
