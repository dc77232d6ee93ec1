"""Built-in profiles: complete, sourced, equal to the published figures; names found, bad files refused."""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import SHARED

from meft.planner.base import names
from meft.planner.base.errors import UsageError
from meft.planner.base.names import find_name
from meft.planner.base.schema import Record
from meft.planner.base.units import MIB
from meft.planner.models.catalogue import load_model, load_model_profile, model_names
from meft.planner.records.profile_catalogue import (
    gpu_names,
    host_names,
    link_names,
    load_defaults,
    load_gpu,
    load_host,
    load_link,
    load_sparsity,
    sparsity_names,
)
from meft.planner.records.profiles import GpuProfile, sourced_numbers

REFERENCE = SHARED / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference figures are not here")

LOADERS: list[tuple[Callable[[str], Record], str]] = [
    *((load_gpu, name) for name in gpu_names()),
    *((load_link, name) for name in link_names()),
    *((load_host, name) for name in host_names()),
    *((load_sparsity, name) for name in sparsity_names()),
]
CARDS = [name for name in gpu_names() if name != "emulated"]

GPU_OF_CSV = {
    "GeForce RTX 3060 12GB": "rtx-3060-12gb",
    "Tesla V100 16GB PCIe": "v100-16gb",
    "H200 SXM": "h200",
}


# --- what is built in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("load", "name"), LOADERS)
def test_every_profile_is_valid_and_sourced(load: Callable[[str], Record], name: str) -> None:
    profile = load(name)
    assert type(profile).model_validate_json(profile.canonical_json()) == profile
    for field, number in sourced_numbers(profile):
        assert len(number.source) >= 6, field
        if number.basis == "assumed":  # an assumption has a reason, not just a place
            assert len(number.source) >= 40, field


def test_no_profile_names_a_place_on_some_machine() -> None:
    collections = ("gpus.json", "links.json", "hosts.json", "sparsity.json", "defaults.json")
    texts = [names.profile_text(name) for name in collections]
    texts += [names.profile_text(f"models/{name}.json") for name in model_names()]
    for text in texts:
        assert not re.search(r"/(work|root|tmp|home)\b|shared/|from memory", text)


def test_the_25_cards_and_the_emulated_device() -> None:
    assert len(CARDS) == 25
    for name in CARDS:
        card = load_gpu(name)
        assert card.total_bytes > 7 << 30
        assert not card.shares_host_cores
        assert card.bf16_flops_per_second or card.fp16_flops_per_second
        assert 0 < card.context.low_bytes <= card.context.high_bytes < 2 << 30
        large_workspace = card.architecture.startswith(("Hopper", "Blackwell"))
        assert card.workspace_bytes.value == (33_554_432 if large_workspace else 8_519_680)
        assert card.link in link_names()


@pytest.mark.parametrize("name", ["t4", "v100-16gb"])
def test_cards_without_bf16(name: str) -> None:
    card = load_gpu(name)
    assert card.bf16_flops_per_second is None
    assert card.fp16_flops_per_second is not None


def test_the_emulated_device_has_no_memory_of_its_own() -> None:
    emulated = load_gpu("emulated")
    assert emulated.shares_host_cores
    assert (emulated.context.high_bytes, emulated.workspace_bytes.value) == (0, 0)
    assert load_link(emulated.link).key == "emulated"
    with pytest.raises(UsageError, match=r"GPU emulated has no memory of its own.* --gpu-mem"):
        _ = emulated.total_bytes


@pytest.mark.parametrize("name", link_names())
def test_links_lose_when_both_ways_are_busy_or_memory_is_pageable(name: str) -> None:
    link = load_link(name)
    assert link.duplex_h2d_bytes_per_second.value <= link.h2d_bytes_per_second.value
    assert link.duplex_d2h_bytes_per_second.value <= link.d2h_bytes_per_second.value
    if link.pageable_h2d_bytes_per_second and link.pageable_d2h_bytes_per_second:
        assert link.pageable_h2d_bytes_per_second.value <= link.h2d_bytes_per_second.value
        assert link.pageable_d2h_bytes_per_second.value <= link.d2h_bytes_per_second.value


def test_wider_and_newer_links_are_faster() -> None:
    order = ["pcie-3.0-x8", "pcie-3.0-x16", "pcie-4.0-x16", "pcie-5.0-x16"]
    rates = [load_link(name).h2d_bytes_per_second.value for name in order]
    assert rates == sorted(rates)
    # what a lane can carry, after 128b/130b coding: 0.985, 1.97, 3.94 GB/s
    for generation, lane in (("3.0", 0.985e9), ("4.0", 1.97e9), ("5.0", 3.94e9)):
        for lanes in (8, 16):
            link = load_link(f"pcie-{generation}-x{lanes}")
            assert link.h2d_bytes_per_second.value < lanes * lane
            assert link.d2h_bytes_per_second.value < lanes * lane


def test_default_sparsity_is_the_papers_traffic() -> None:
    profile = load_sparsity(load_defaults().sparsity)
    (layer,) = profile.layers
    active = 6144 * (1 - (1 - 64 / 6144) ** (512**layer.alpha))
    assert active == pytest.approx(1592, abs=1)
    assert profile.prefetch_recall_by_depth[0] == 1
    assert list(profile.prefetch_recall_by_depth) == sorted(profile.prefetch_recall_by_depth, reverse=True)


def test_defaults_exist() -> None:
    defaults = load_defaults()
    assert load_gpu(defaults.gpu).key == defaults.gpu
    assert load_host(defaults.host).key == defaults.host
    assert load_model(defaults.model)[0].name == defaults.model


def test_spellings_are_unambiguous() -> None:
    for keys, load in ((gpu_names(), load_gpu), (link_names(), load_link), (host_names(), load_host)):
        spellings: Counter[str] = Counter()
        for name in keys:
            profile = load(name)
            own = {spelling for given in (name, profile.name, *profile.aliases) for spelling in names._spellings(given)}
            spellings.update(own)
        assert [spelling for spelling, count in spellings.items() if count > 1] == []


# --- against the published figures -----------------------------------------------------------------------------------


def rows_of(file: str) -> list[dict[str, str]]:
    with (REFERENCE / file).open(newline="") as lines:
        return list(csv.DictReader(lines))


@needs_reference
def test_cards_equal_the_published_figures() -> None:
    rows = rows_of("gpus.csv")
    seen = set()
    for row in rows:
        card = load_gpu(GPU_OF_CSV.get(row["name"], row["name"]))
        seen.add(card.key)
        if row["nvml_total_MiB"]:
            assert card.total_bytes == int(row["nvml_total_MiB"]) * MIB
        assert card.memory_bytes_per_second.value == pytest.approx(float(row["mem_bw_GBs"]) * 1e9)
        assert card.fp32_flops_per_second.value == pytest.approx(float(row["fp32_tflops"]) * 1e12)
        stated = float(row["bf16_dense_tflops"]) * 1e12 if row["bf16_dense_tflops"] else None
        given = card.bf16_flops_per_second
        assert (given.value if given else None) == (pytest.approx(stated) if stated else None)
        assert card.link == f"pcie-{row['pcie'].replace(' ', '-')}"
    assert seen == set(CARDS)


LINK_ROWS = {
    "pcie-3.0-x8": {"Gen3 (x8-like rate)", "Gen3 laptop"},
    "pcie-3.0-x16": {"Gen3 x16", "Gen3 x16-like"},
    "pcie-4.0-x8": {
        "Gen4 x8",
        "Gen4 x8 (laptop)",
        "laptop x8",
        "x8-like rate",
        "card is Gen5 x8; slot gave Gen4-like rate",
        "same",
    },
    "pcie-4.0-x16": {"Gen4 x16"},
    "pcie-5.0-x16": {"Gen5 x16"},
    "thunderbolt-4": {"TB4"},
}


def published_value(text: str) -> float:
    """``25.7``, the middle of ``23.90-26.38``, or the median of ``57.06; 56.68``."""
    if ";" in text:
        return statistics.median(float(part) for part in text.split(";"))
    return statistics.mean(float(part) for part in text.split("-"))


def is_copy_engine_at_size(row: dict[str, str]) -> bool:
    """Large copies, near memory, by the copy engine that cudaMemcpyAsync uses, of quality A or B."""
    size = row["transfer_bytes"].strip()
    large = not size.isdigit() or 30_000_000 <= int(size) <= 2_000_000_000
    near = "far NUMA" not in row["platform"]
    return large and near and row["unit"] == "GB/s" and row["quality"] in {"A", "B"} and " SM" not in row["tool"]


@needs_reference
@pytest.mark.parametrize("name", LINK_ROWS)
def test_link_rates_are_medians_of_the_published_ones(name: str) -> None:
    rows = [row for row in rows_of("pcie.csv") if row["link"] in LINK_ROWS[name] and is_copy_engine_at_size(row)]
    link = load_link(name)
    for field, memory, directions in (
        ("h2d_bytes_per_second", "pinned", {"h2d", "h2d and d2h"}),
        ("d2h_bytes_per_second", "pinned", {"d2h", "h2d and d2h"}),
        ("duplex_h2d_bytes_per_second", "pinned", {"h2d while d2h runs"}),
        ("pageable_h2d_bytes_per_second", "pageable", {"h2d"}),
        ("pageable_d2h_bytes_per_second", "pageable", {"d2h"}),
    ):
        values = [
            published_value(row["value"]) for row in rows if row["memory"] == memory and row["direction"] in directions
        ]
        number = getattr(link, field)
        if not number or number.basis == "assumed":
            assert not values, field
        elif "times" in number.source:  # scaled from one card's own loss: see the next test
            assert len(values) == 1
        else:
            assert number.value == pytest.approx(statistics.median(values) * 1e9), field
            expected = f"median of {len(values)} measurements" if len(values) > 1 else "1 measurement"
            assert number.source.startswith(expected), field


def test_gen4_x8_loses_what_one_laptop_loses() -> None:
    link = load_link("pcie-4.0-x8")
    # RTX 3050 Laptop: h2d 12.98 GB/s alone and 12.66 while d2h runs, d2h 13.17 and 11.06
    kept_h2d = link.duplex_h2d_bytes_per_second.value / link.h2d_bytes_per_second.value
    kept_d2h = link.duplex_d2h_bytes_per_second.value / link.d2h_bytes_per_second.value
    assert kept_h2d == pytest.approx(12.66 / 12.98)
    assert kept_d2h == pytest.approx(11.06 / 13.17)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("rtx-3090", "rtx-3090"),
        ("RTX 3090", "rtx-3090"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("3090", "rtx-3090"),
        ("rtx3090", "rtx-3090"),
        ("GeForce RTX 4060 Ti 16GB", "rtx-4060-ti-16gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-sxm"),
        ("NVIDIA H100 PCIe", "h100-80gb-pcie"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("A6000", "rtx-a6000"),
        ("A10", "a10"),
        ("A10G", "a10g"),
    ],
)
def test_gpu_names_in_any_spelling(given: str, key: str) -> None:
    assert load_gpu(given).key == key


@pytest.mark.parametrize("given", ["PCIe 4.0 x16", "pcie4-x16", "gen4 x16"])
def test_link_names_in_any_spelling(given: str) -> None:
    assert load_link(given).key == "pcie-4.0-x16"


@given(name=st.sampled_from(gpu_names()), upper=st.booleans(), separator=st.sampled_from(["-", " ", "_"]))
def test_case_and_separators_do_not_matter(name: str, upper: bool, separator: str) -> None:
    spelt = name.replace("-", separator)
    assert load_gpu(spelt.upper() if upper else spelt).key == name


@pytest.mark.parametrize(
    ("load", "given", "message"),
    [
        (load_gpu, "rtx-3900", r"unknown GPU 'rtx-3900'; did you mean rtx-3090.*Known: a10, a100-40gb, "),
        (load_gpu, "", "unknown GPU ''"),
        (load_gpu, "a100", "unknown GPU 'a100'; did you mean .*a100-40gb"),
        (load_gpu, "llama", "unknown GPU 'llama'"),
        (load_link, "pcie-6.0-x16", r"unknown link .*did you mean pcie-\d.0-x16"),
        (load_host, "laptop", "unknown host 'laptop'.*Known: desktop-ddr4, desktop-ddr5, "),
        (load_sparsity, "meft", "unknown sparsity profile 'meft'; did you mean meft-paper"),
        (load_model, "lama-7b", "unknown model 'lama-7b'; did you mean llama-7b"),
        (load_model, "llama-27b", "unknown model 'llama-27b'"),
        (
            load_model,
            "meta-llama/Llama-4-7b",
            r"no such folder, and no built-in name \(such as llama-.*get it first: hf download meta-llama/Llama-4-7b "
            r"--local-dir Llama-4-7b, then give --model Llama-4-7b$",
        ),
        (load_model, " ", "model: the reference is empty"),
    ],
)
def test_misspelt_names(load: Callable[[str], object], given: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(given)


def test_strict_spelling_wins_over_a_loose_one() -> None:
    keys: dict[str, tuple[str, ...]] = {"rtx-1": (), "gtx-1": ()}
    assert find_name("GPU", "GTX 1", keys) == "gtx-1"
    assert find_name("GPU", "rtx_1", keys) == "rtx-1"


# --- a user's own files ----------------------------------------------------------------------------------------------


def write(path: Path, content: dict[str, Any] | str) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(("load", "name"), [LOADERS[0], (load_link, "pcie-4.0-x16"), (load_host, host_names()[0])])
def test_a_file_of_one_record_serves_like_a_name(load: Callable[[str], Record], name: str, tmp_path: Path) -> None:
    profile = load(name)
    assert load(write(tmp_path / "mine.json", profile.canonical_json())) == profile


def changed_gpu(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = load_gpu("rtx-3090").model_dump(mode="json") | changes
    return content


def number(value: float, source: str = "measured by me") -> dict[str, Any]:
    return {"value": value, "basis": "measured", "source": source}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed_gpu(memory_bytes_per_second=number(float("nan"))), "mine.json: NaN is not a finite number"),
        (changed_gpu(matmul_efficiency=number(float("inf"))), "mine.json: Infinity is not a finite number"),
        (changed_gpu(memory_bytes_per_second=number(0)), "memory_bytes_per_second: value is not above zero"),
        (changed_gpu(memory_bytes_per_second=number(-1)), "memory_bytes_per_second.value: .*greater than or equal"),
        (changed_gpu(matmul_efficiency=number(1.5)), "matmul_efficiency: value is above 1"),
        (changed_gpu(memory_efficiency=number(0)), "memory_efficiency: value is not above zero"),
        (changed_gpu(fp32_flops_per_second=number(1, "")), "fp32_flops_per_second.source: .*at least 1 character"),
        (changed_gpu(tflops=71), "tflops: unknown field"),
        ({"key": "mine"}, "name: missing; architecture: missing"),
        (changed_gpu(context={"low_bytes": 2, "high_bytes": 1, "basis": "assumed", "source": "x"}), "low_bytes 2 is"),
        ("[1]", "valid dictionary"),
        ('{"key": ', "not valid JSON .*truncated"),
    ],
)
def test_bad_gpu_files(content: dict[str, Any] | str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_gpu(write(tmp_path / "mine.json", content))
    assert "mine.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_profile_file() -> None:
    with pytest.raises(UsageError, match=r"GPU file no-such\.json: no such file"):
        load_gpu("./no-such.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "layers: .*at least 1 item"),
        ({"layers": [{"alpha": 0.0}]}, "layers.0.alpha: .*greater than 0"),
        ({"layers": [{"alpha": 1.1}]}, "layers.0.alpha: .*less than or equal to 1"),
        ({"prefetch_recall_by_depth": [0.9]}, "its recall is 1"),
        ({"spread_fraction": 2.0}, "spread_fraction"),
    ],
)
def test_bad_sparsity_files(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = load_sparsity("meft-paper").model_dump(mode="json") | change
    with pytest.raises(UsageError, match=message):
        load_sparsity(write(tmp_path / "mine.json", content))


def test_a_gpu_file_is_no_link(tmp_path: Path) -> None:
    path = write(tmp_path / "gpu.json", load_gpu("rtx-3090").canonical_json())
    with pytest.raises(UsageError, match=r"link file .*h2d_bytes_per_second: missing"):
        load_link(path)


def test_profiles_refuse_changes() -> None:
    card = load_gpu("rtx-3090")
    with pytest.raises(ValueError, match="frozen"):
        card.key = "other"  # type: ignore[misc]
    assert isinstance(card, GpuProfile)


# --- models by reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "key"),
    [
        ("llama-7b", "llama-7b"),
        ("LLaMA-7B", "llama-7b"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("Llama-2-7b-hf", "llama-2-7b"),
        ("Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b"),
        ("microsoft/phi-1_5", "phi-1.5"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("gpt2", "gpt2"),
    ],
)
def test_built_in_models_by_name(reference: str, key: str) -> None:
    shape, config, folder = load_model(reference)
    assert (shape.name, folder) == (key, None)
    assert config["model_type"] == shape.model_type


def test_model_aliases_are_unambiguous() -> None:
    names: Counter[str] = Counter()
    for key in model_names():
        aliases = load_model_profile(key)[1].aliases
        names.update({key, *(alias.rsplit("/", 1)[-1].lower() for alias in aliases)})
    assert [name for name, count in names.items() if count > 1] == []


def test_at_least_the_promised_models() -> None:
    promised = "llama-7b llama-2-7b llama-2-13b llama-2-70b llama-3-8b llama-3.2-1b llama-3.2-3b mistral-7b "
    promised += "qwen2.5-0.5b qwen2.5-1.5b qwen2.5-3b qwen2.5-7b gemma-2-2b phi-2 gpt2 gpt2-medium smollm2-135m"
    assert set(promised.split()) <= set(model_names())


def test_model_folder_and_config_file(tmp_path: Path) -> None:
    config = load_model("gpt2")[1]
    folder = tmp_path / "my-model"
    folder.mkdir()
    file = write(folder / "config.json", config)
    for reference in (str(folder), file, f"{folder}/"):
        shape, read, where = load_model(reference)
        assert (shape.name, read, where) == ("my-model", config, str(folder))
    other = write(tmp_path / "small.json", config)
    shape, _, where = load_model(other)
    assert (shape.name, where) == ("small", other)


def test_a_folder_wins_over_a_name_only_if_it_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    assert load_model("gpt2")[2] is None
    write(Path("gpt2/config.json"), load_model("smollm2-135m")[1])
    shape, _, where = load_model("gpt2")
    assert (shape.num_layers, where) == (30, str(tmp_path / "gpt2"))


@pytest.mark.parametrize("reference", ["{folder}", "{folder}/model.gguf"])
def test_gguf_must_be_converted_first(reference: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UsageError, match=r"only there as GGUF \(model.gguf\); convert .* then give NEW_FOLDER"):
        load_model(reference.format(folder=tmp_path))


def test_references_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the folder has no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(UsageError, match="no such file or folder"):
        load_model(f"{tmp_path}/none/")
    with pytest.raises(UsageError, match="no such file or folder"):
        load_model("none.json")
    with pytest.raises(UsageError, match="expected a JSON object, found list"):
        load_model(write(tmp_path / "list.json", "[]"))
    with pytest.raises(UsageError, match=r"not valid JSON .*truncated"):
        load_model(write(tmp_path / "cut.json", '{"model_type": "lla'))
    with pytest.raises(UsageError, match="NaN is not a finite number"):
        load_model(write(tmp_path / "nan.json", '{"model_type": "llama", "rms_norm_eps": NaN}'))


def test_configs_build_what_was_published() -> None:
    transformers = pytest.importorskip("transformers")

    def built(name: str) -> Any:
        return transformers.AutoConfig.for_model(**load_model(name)[1])

    assert built("llama-7b").rms_norm_eps == 1e-6
    assert built("llama-2-7b").rms_norm_eps == 1e-5
    assert built("llama-3-8b").rope_parameters["rope_theta"] == 500_000
    assert built("llama-3.2-1b").rope_parameters["rope_type"] == "llama3"
    assert built("llama-3.2-1b").rope_parameters["factor"] == 32
    assert built("qwen2.5-7b").rope_parameters["rope_theta"] == 1_000_000
    assert built("smollm2-135m").rope_parameters["rope_theta"] == 100_000
    assert built("phi-2").rope_parameters["partial_rotary_factor"] == 0.4
    assert built("pythia-1.4b").rope_parameters["partial_rotary_factor"] == 0.25
    assert built("gemma-2-2b").hidden_activation == "gelu_pytorch_tanh"
    assert built("mistral-7b").sliding_window == 4096
