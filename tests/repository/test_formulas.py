"""docs/formulas.md names all that a plan prints, each function that it names exists, and its formulas are theirs."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from planner_records import decision_of, request_of

from meft.planner.memory import device, host
from meft.planner.models.catalogue import load_model, model_names
from meft.planner.predict import estimates
from meft.planner.predict.estimates import estimate_dense
from meft.planner.predict.prediction import ProfileSet, inputs_used, predict, simulated_tasks
from meft.planner.records.plan import Decision, Request
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity, sparsity_names
from meft.planner.records.setup import TrainingSetup
from meft.planner.timing.program import GpuSeconds, HostSeconds, LinkSeconds
from meft.planner.traffic import network, transfer

TEXT = (ROOT / "docs" / "formulas.md").read_text(encoding="utf-8")
SECTIONS = {
    part.partition("\n")[0]: part.partition("\n")[2] for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
}
LINK = re.compile(r"\[`([A-Za-z_0-9]+)`\]\(\.\./([a-z_/]+\.py)\)")
TRIES = 200
LETTERS = {
    "tokens": "T",
    "batch_size": "B",
    "seq_len": "S",
    "num_layers": "L",
    "hidden_size": "D",
    "intermediate_size": "I",
    "vocab_size": "V",
    "num_heads": "H",
    "num_kv_heads": "G",
    "head_dim": "d",
    "width": "w",
    "adapter_width": "R",
    "active_rows": "A",
    "active_rows_cap": "cap",
    "num_experts": "N",
    "num_probes": "P",
    "prefetch_depth": "p",
    "cached_rows": "C",
    "hot_rows": "hot",
    "compute_bytes": "q",
    "compute_dtype_bytes": "q",
    "adapter_dtype_bytes": "e",
    "num_weights": "n",
    "top_k": "K",
    "num_outputs": "outputs",
}
"""Arguments of term functions, and the letters that stand for them; other arguments stand for themselves."""
WIDTHS = ("q", "e", "element_bytes", "compute_bytes", "compute_dtype_bytes", "adapter_dtype_bytes")
PRICED = (
    *(
        "terms/activations",
        "terms/adapter",
        "terms/weights",
        "terms/ledger",
        "memory/device",
        "memory/host",
        "memory/disk",
    ),
    *(
        "traffic/transfer",
        "traffic/network",
        "traffic/owned",
        "traffic/hot_rows",
        "traffic/chunks",
        "traffic/sharding",
        "timing/step",
        "timing/gpu",
        "timing/dense",
        "timing/lanes",
        "timing/program",
    ),
)
"""Modules whose public functions of bytes, seconds and slots are the terms."""
MADE_OF_THEM = {
    "counted_bytes",
    "host_total_bytes",
    "peak_allocated_bytes",
    "step_bytes",
    "window_bytes",
    "expected_step_bytes",
}
"""Sums of terms for the search and the audit, no terms of their own."""


def code_spans(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def named(section: str) -> set[str]:
    return code_spans(SECTIONS[section])


@functools.cache
def definitions(path: Path) -> frozenset[str]:
    """Functions, classes and constants of a file."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


# --- every name is there ---------------------------------------------------------------------------------------------


def requests() -> Iterator[Request]:
    """Models and dtypes that differ in the lines of their ledgers."""
    for name, changes in (
        ("llama-7b", {}),
        ("llama-7b", {"weights_dtype": "nf4", "double_quant": True, "attention": "eager"}),
        ("gpt2", {"adapter_dtype": "fp32", "gpus": 2}),
        ("llama-7b", {"gpus": 2, "shard_base": True}),
        ("gpt2", {"nodes": 2, "interconnect_bytes_per_second": 1e9}),
        ("gemma-2-2b", {"attention": "eager", "weights_dtype": "fp32", "adapter_dtype": "fp32"}),
    ):
        yield request_of(model=load_model(name)[0], gpu="rtx-3090", link="pcie-4.0-x16", sparsity="smollm2", **changes)


def decisions() -> Iterator[Decision]:
    shared = {"adapter_width": 1024, "top_k": 16, "active_rows_cap": 800, "prefetch_depth": 1}
    experts = {"routing": "key-experts", "num_experts": 32, "num_probes": 4}
    centroids = experts | {"routing": "centroid"}
    window = {"cached_rows": 100, "gradients_on_device": True}
    rows = ({"rows_in_backward": "retained"}, {"rows_in_backward": "refetched"})
    kept = ({}, window, {"hot_rows": 64}, {**window, "hot_rows": 64})
    whether = ({"activation_checkpointing": False}, {"activation_checkpointing": True, "bf16_copy": True})
    for route, backward, cache, recompute in itertools.product(({}, experts, centroids), rows, kept, whether):
        exact = {"routing": "exact", "num_experts": 1, "num_probes": 1}
        yield decision_of(**{**shared, **exact, **route, **backward, **cache, **recompute})
    for route in (experts, centroids):
        yield decision_of(**{**shared, **route, "rows": "owned"})


def profiles(sparsity: str = "meft-paper", gpu: str = "rtx-3090") -> ProfileSet:
    return ProfileSet(load_gpu(gpu), load_link("pcie-4.0-x16"), load_host("small-2core"), load_sparsity(sparsity))


@functools.cache
def predictions() -> tuple[Any, ...]:
    every = itertools.product(requests(), decisions())
    return tuple(predict(request, decision, profiles(), replayed=False) for request, decision in every)


def test_every_line_of_the_device_ledger_is_there() -> None:
    seen = {entry.category for each in predictions() for entry in each.device_memory.entries}
    assert seen > {"hot_states", "router_moments", "attention_mask", "logit_softcap", "dequantized_weight"}
    assert (seen | device._BECAUSE.keys()) - named("Device memory") == set()


def test_every_line_of_the_host_ledger_is_there() -> None:
    seen = {entry.category for each in predictions() for entry in each.host_memory.entries}
    assert seen == host._BECAUSE.keys()
    assert seen - named("Host memory") == set()


def test_every_category_of_the_link_is_there() -> None:
    seen = {entry.category for each in predictions() for entry in each.transfer.entries}
    assert seen == transfer._BECAUSE.keys() | network.BECAUSE.keys()
    assert seen - named("Bytes over the link") == set()


def setups() -> Iterator[TrainingSetup]:
    """The dense methods as people run them, and what makes a category of its own."""
    llama, gpt2 = load_model("llama-3.2-1b")[0], load_model("gpt2")[0]
    for shape, changes in (
        (llama, {"method": "lora", "rank": 8, "target_modules": ("q_proj",)}),
        (llama, {"method": "qlora", "rank": 8, "target_modules": ("q_proj",), "weights_dtype": "nf4", "padded": True}),
        (llama, {"method": "full", "autocast": "bf16", "weights_dtype": "fp32", "optimizer": "adamw-8bit"}),
        (gpt2, {"method": "parallel-adapter", "adapter_width": 64, "activation_checkpointing": True}),
    ):
        yield TrainingSetup(model=shape, batch_size=1, seq_len=128, **changes)


def test_every_category_of_the_other_methods_is_there() -> None:
    card, link, host = load_gpu("rtx-3090"), load_link("pcie-4.0-x16"), load_host("workstation-32core")
    found = [estimate_dense(each, request=request_of(), gpu=card, link=link, host=host) for each in setups()]
    seen = {entry.category for each in found for entry in each.entries}
    assert seen > {"trainable_weights", "gradients", "autocast_weights", "dequantized_weight", "optimizer_moments"}
    assert (seen | estimates.BECAUSE.keys()) - named("Device memory of the other methods") == set()


def test_every_timing_term_and_every_task_of_a_trace_is_there() -> None:
    fields = {each.name for kind in (GpuSeconds, LinkSeconds, HostSeconds) for each in dataclasses.fields(kind)}
    request, seen = next(requests()), set()
    for decision, each in zip(decisions(), predictions(), strict=False):
        tasks = simulated_tasks(request, decision, profiles(), each.sparsity)
        seen |= {" ".join(re.sub(r"\d+", "", task.name).split()) for task in tasks}
    assert seen > {"head and loss", "gather again", "attention again", "hot adamw", "router norm", "accumulate"}
    assert (fields | seen) - named("Time") == set()


def test_every_number_of_a_profile_is_there() -> None:
    seen = set()
    for request, decision in itertools.product(requests(), decisions()):
        for sparsity, gpu in (("meft-paper", "rtx-3090"), ("smollm2-facts", "v100-16gb")):
            used = profiles(sparsity, gpu)
            seen |= {number.name for number in inputs_used(request, decision, used).numbers}
    assert {name for name in seen if "popularity" in name}
    seen = {re.sub(r"top_[\d.]+$", "top_X", name) for name in seen}
    assert "smollm2-facts" in sparsity_names()
    assert seen - named("The numbers that profiles bring") == set()


def test_every_term_function_is_there() -> None:
    linked = {name for name, _ in LINK.findall(TEXT)}
    for module in PRICED:
        public = {name for name in definitions(ROOT / "planner" / f"{module}.py") if re.match("[a-z]", name)}
        terms = {name for name in public if name.endswith(("_bytes", "_seconds", "_slots", "_flops"))}
        assert terms - linked - MADE_OF_THEM == set(), module


# --- every function is there, and computes what is written -----------------------------------------------------------


def test_every_function_that_is_named_exists() -> None:
    links = LINK.findall(TEXT)
    assert len(links) > 150
    assert [(name, path) for name, path in links if name not in definitions(ROOT / path)] == []
    files = set(re.findall(r"\]\(\.\./(planner/[^)]+)\)", TEXT))
    assert files == {path for _, path in links}  # no link to code has another form


def formulas() -> list[tuple[str, str, str]]:
    """Function, file and formula of every row of a table that has one, in the cell before the function's."""
    found = []
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        for before, cell in itertools.pairwise(cells):
            if link := LINK.match(cell):
                found += [(*link.groups(), span) for span in sorted(code_spans(before)) if re.search(r"[*(]", span)]
    return found


def drawn(name: str, chance: random.Random) -> Any:
    """A value for an argument."""
    if name == "activation":
        return "silu"
    if name == "routers":
        return chance.choice((1, 2))
    if name in WIDTHS:
        return chance.choice((2, 4))
    if name == "prefetch_depth":
        return chance.randint(0, 5)
    return chance.randint(0 if name in ("cached_rows", "hot_rows") and chance.random() < 0.3 else 1, 5000)


FLAGS = {"retained", "key_experts", "gradients_on_device", "layernorm", "gated", "fp32", "soft_capped", "active"}
FLAGS |= {"double_quant", "own_rows", "switch", "means"}


@pytest.mark.parametrize(("name", "path", "written"), formulas())
def test_a_formula_is_the_functions(name: str, path: str, written: str) -> None:
    module = importlib.import_module("meft." + path.removesuffix(".py").replace("/", "."))
    function: Callable[..., int] = getattr(module, name)
    arguments = list(inspect.signature(function).parameters)
    chance = random.Random(f"{name} {written}")
    values = set()
    for _ in range(TRIES):
        given = {each: chance.random() < 0.5 if each in FLAGS else drawn(each, chance) for each in arguments}
        letters = {LETTERS.get(each, each): value for each, value in given.items()}
        if arguments[0] == "shape":
            shape = given["shape"] = load_model(chance.choice(model_names()))[0]
            letters |= {"d": shape.head_dim, **dict(shape)}
        expected = function(**given)
        assert eval(written, {"ceil": math.ceil, "max": max, "min": min}, letters) == expected, given
        values.add(expected)
    assert len(values) > 1


def test_the_formulas_are_found() -> None:
    found = formulas()
    assert {"row_staging_bytes", "row_buffer_bytes", "adapter_backward_bytes"} <= {name for name, _, _ in found}
    assert len(found) > 45
