"""Model folders that others made: nothing of them is run, and what is damaged is one line that names the file."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from processes import BIN
from safetensors.torch import load_file, save_file
from sessions import small_plan
from transformers import PreTrainedTokenizerFast

from meft.planner.base.errors import MachineError, UsageError
from meft.planner.models.catalogue import load_model
from meft.runtime.session.model_folder import load_causal_lm, reading
from meft.runtime.session.model_loading import check_token_ids, load_frozen_model, load_tokenizer, model_from_config

CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class C(LlamaConfig): pass
class M(LlamaForCausalLM): pass
class T(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def folder(glass_folder, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(glass_folder, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    """Set fields of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


# --- code --------------------------------------------------------------------------------------------------------


@pytest.fixture
def armed(folder, tmp_path):
    """A folder whose config and tokenizer ask for a Python file that leaves a marker; and where the marker would be."""
    marker = tmp_path / "marker"
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}, tokenizer_class="T")
    return folder, marker


def asked_with_yes(*command: object) -> subprocess.CompletedProcess[str]:
    program, *arguments = map(str, command)
    return subprocess.run(
        [BIN / program, *arguments], input="y\n" * 20, capture_output=True, text=True, check=False, timeout=300
    )


def test_no_command_runs_a_folders_code_whatever_standard_input_says(armed, tmp_path, glass_folder) -> None:
    folder, marker = armed
    small_plan(glass_folder).save(tmp_path / "plan.json")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "Alice was beginning to get very tired"}\n')
    commands = [
        ("meft-run", tmp_path / "plan.json", "--data", data, "--steps", 1, "--output-dir", tmp_path / "out"),
        ("meft-run", "generate", "Alice"),
    ]
    for command in commands:
        done = asked_with_yes(*command, "--model", folder)
        assert done.returncode == 2, done.stderr
        assert "asks for code of its own to be run (auto_map: evil." in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not marker.exists()


def test_the_folder_is_armed(armed, tmp_path, monkeypatch) -> None:
    """With trust, transformers does run it: so the tests above can fail."""
    from transformers import AutoConfig

    folder, marker = armed
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


def test_a_plan_and_a_rehearsal_read_the_fields_alone(armed) -> None:
    folder, marker = armed
    shape, config, _ = load_model(str(folder))
    assert (shape.num_layers, "auto_map" in config) == (4, True)
    assert not marker.exists()


def test_a_config_that_transformers_cannot_build_is_one_line(glass_folder) -> None:
    config = json.loads((glass_folder / "config.json").read_text()) | {"rope_scaling": {"rope_type": "fancy"}}
    with pytest.raises(UsageError, match=r"model glass: transformers .* cannot build it from its config: KeyError: 'f"):
        model_from_config(small_plan(glass_folder), config)


class Armed:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickled_weights_are_read_as_tensors_alone(folder, tmp_path) -> None:
    marker = tmp_path / "marker"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load_causal_lm(folder).config.num_hidden_layers == 4
    torch.save(weights | {"evil": Armed(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"the model cannot be loaded; transformers: "):
        load_causal_lm(folder)
    assert not marker.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # it was armed


def test_attention_from_a_hub_is_refused(folder) -> None:
    edit(folder / "config.json", attn_implementation="somebody/kernels")
    with pytest.raises(UsageError, match=r"asks for code from a hub to be run \(attn_implementation = 'somebody/ker"):
        load_causal_lm(folder)


def test_shards_outside_the_folder_are_refused(folder, tmp_path) -> None:
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors").keys()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"names '../outside.safetensors', which is no file of the folder itself"):
        load_causal_lm(folder)


def test_a_peft_folder_is_no_model(folder) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(UsageError, match=r"adapter_config\.json makes it a PEFT adapter of another model"):
        load_causal_lm(folder)


# --- damage ------------------------------------------------------------------------------------------------------


def damage(folder: Path, kind: str) -> None:
    name, _, how = kind.partition(" ")
    path = folder / name
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    elif how == "zeros":
        path.write_bytes(bytes(path.stat().st_size))
    elif how == "list":
        path.write_text("[1, 2]")
    elif how == "deep":
        path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    elif how == "header":
        path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])
    elif how == "binary":
        path.write_bytes(b"\xff\xfe" + path.read_bytes())
    elif how == "object":
        path.write_text('{"model": {"type": "BPE", "vocab": 3}, "version": "1.0"}')


@pytest.mark.parametrize(
    "kind",
    [
        *("config.json gone", "config.json empty", "config.json cut", "config.json list", "config.json deep"),
        *("config.json binary", "model.safetensors empty", "model.safetensors cut", "model.safetensors zeros"),
        "model.safetensors header",
    ],
)
def test_a_damaged_model_names_its_file(folder, glass_folder, kind) -> None:
    damage(folder, kind)
    name = kind.partition(" ")[0].replace(".", r"\.")
    for load in (lambda: load_frozen_model(small_plan(glass_folder), folder), lambda: load_causal_lm(folder)):
        with pytest.raises(UsageError, match=rf"^--model {folder}: the model cannot be loaded: .*/{name}: ") as caught:
            load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        *("tokenizer.json empty", "tokenizer.json cut", "tokenizer.json list", "tokenizer.json deep"),
        *("tokenizer.json object", "tokenizer_config.json cut", "tokenizer_config.json list", "tokenizer.json binary"),
    ],
)
def test_a_damaged_tokenizer_names_its_file(folder, kind) -> None:
    damage(folder, kind)
    name = kind.partition(" ")[0].replace(".", r"\.")
    with pytest.raises(UsageError, match=rf"^--model {folder}: the tokenizer cannot be loaded: .*/{name}: "):
        load_tokenizer(folder)


def test_a_shard_that_was_not_downloaded_is_named(folder) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first, *others = weights
    save_file({first: weights[first]}, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    weight_map = {first: "model-00001-of-00002.safetensors"}
    weight_map |= dict.fromkeys(others, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(UsageError, match=r"model-00002-of-00002.safetensors: no such file, but .* names it"):
        load_causal_lm(folder)


def test_weights_that_are_in_no_file_are_not_made_up(folder) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.2.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"1 of the model's weights are in none of its files .*layers\.2\.mlp\.up_proj"
    ):
        load_causal_lm(folder)


def test_weights_of_another_size_are_one_line(folder) -> None:
    edit(folder / "config.json", intermediate_size=340)
    with pytest.raises(UsageError, match=r"the model cannot be loaded; transformers: .*") as caught:
        load_causal_lm(folder)
    assert "\n" not in str(caught.value)


def test_what_transformers_raises_for_a_sound_folder_is_its_own_first_line(folder) -> None:
    said = r"the model cannot be loaded; transformers: KeyError: 'no such thing'$"
    with pytest.raises(UsageError, match=said), reading(folder, "model"):
        raise KeyError("no such thing")
    with pytest.raises(MachineError, match="memory does not hold the model"), reading(folder, "model"):
        raise MemoryError
    with pytest.raises(UsageError, match=r"^ours$"), reading(folder, "model"):
        raise UsageError("ours")


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
@pytest.mark.parametrize("kind", ["config.json list", "model.safetensors cut", "tokenizer.json deep"])
def test_every_command_says_so_with_exit_code_2(folder, glass_folder, tmp_path, command, kind) -> None:
    from click.testing import CliRunner

    from meft.runtime.cli.run import command as meft_run

    damage(folder, kind)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Alice was", "completion": " tired"}\n')
    small_plan(glass_folder).save(tmp_path / "plan.json")
    plan, output = str(tmp_path / "plan.json"), str(tmp_path / "out")
    arguments = {
        "train": ["train", plan, "--data", str(data), "--steps", "1", "--output-dir", output],
        "generate": ["generate", "Alice"],
        "evaluate": ["evaluate", str(data), "--metric", "em"],
    }[command]
    result = CliRunner().invoke(meft_run, [*arguments, "--model", str(folder)], standalone_mode=False)
    assert isinstance(result.exception, UsageError), result.exception
    assert result.exception.exit_code == 2
    assert kind.partition(" ")[0] in str(result.exception)


# --- tokens ------------------------------------------------------------------------------------------------------


def test_tokens_beyond_the_vocabulary_are_refused_by_sequence() -> None:
    check_token_ids([[0, 9], [], [5]], 10, where="here")
    with pytest.raises(UsageError, match=r"^here, sequence 2: token 10, but the model's vocabulary has 10 tokens"):
        check_token_ids([[1], [3, 10]], 10, where="here")


@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_tokenizer_larger_than_the_model_is_refused_where_it_matters(folder, glass_folder, tmp_path, command) -> None:
    from click.testing import CliRunner

    from meft.runtime.cli.run import command as meft_run

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["Zebra"])
    tokenizer.save_pretrained(folder)
    small_plan(glass_folder).save(tmp_path / "plan.json")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "Alice was tired"}\n{"text": "Alice and the Zebra"}\n')
    arguments = {
        "train": ["train", str(tmp_path / "plan.json"), "--data", str(data), "--output-dir", str(tmp_path / "out")],
        "generate": ["generate", "the Zebra said"],
    }[command]
    result = CliRunner().invoke(meft_run, [*arguments, "--model", str(folder)], standalone_mode=False)
    assert isinstance(result.exception, UsageError), result.exception
    where = {"train": rf"--data {data}, sequence 1", "generate": "the prompts, sequence 1"}[command]
    assert str(result.exception).startswith(f"{where}: token 1024, but the model's vocabulary has 1,024 tokens")


def test_a_pickle_is_not_how_anything_is_read() -> None:
    """The one place that reads pickles reads plain data; :mod:`meft.planner.allocator.snapshot` has its own tests."""
    root = Path(__file__).parents[3]
    readers = [
        path.relative_to(root)
        for folder in ("planner", "runtime", "scripts")
        for path in (root / folder).rglob("*.py")
        if any(word in path.read_text() for word in ("pickle.load", "torch.load(", "weights_only=False", "joblib"))
    ]
    assert readers == []
    assert pickle.loads  # the name that is looked for exists
