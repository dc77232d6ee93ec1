"""The simulated step against a trace of the real model, over a grid of configurations: allocated peaks.

    python benchmarks/memory_grid.py                  all 454, worst first (the error in the first column)
    python benchmarks/memory_grid.py --sample 12      twelve of them, evenly over the grid
    python benchmarks/memory_grid.py --results FILE   goes on where the file stands, a line for each configuration

Sixteen architectures at their real widths, cut to a few layers so that a trace takes a second or two (layers repeat).
Implementations that know nothing of each other are compared: :mod:`meft.planner.simulation.run` (for MEFT the closed
form of :mod:`meft.planner.memory.device`), which imports no torch, and :mod:`meft.runtime.trace.run`, which runs
transformers' own model under fake tensors. Committed:
``benchmarks/memory_grid_results.jsonl``, all of it: worst 0.50 %.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from results_file import append

from meft.planner.memory.device import predict_device_memory
from meft.planner.models.architecture import ModelShape
from meft.planner.models.catalogue import load_model
from meft.planner.models.configs import shape_from_config
from meft.planner.models.linears import resolve_targets
from meft.planner.records.profile_catalogue import load_gpu
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.run import simulate
from meft.planner.simulation.stream import stream_peaks

NUM_LAYERS = 3
MAX_WINDOW = 2048
"""Of longer ones the scores alone are larger than all else."""
CARD = "rtx-3090"
"""Any whose cuBLAS workspace is the usual one."""
MODELS = (
    "llama-7b",
    "mistral-7b",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "gemma-2b",
    "gemma-2-2b",
    "phi-1.5",
    "phi-3-mini-4k",
    "gpt2",
    "pythia-1.4b",
    "opt-1.3b",
    "smollm2-135m",
    "smollm3-3b",
    "olmo-2-1b",
    "granite-3.1-2b",
    "gemma-3-1b",
)
LORA = {"method": "lora", "rank": 8, "target_modules": "attention"}
QLORA = {"method": "qlora", "rank": 16, "target_modules": "all-linear", "weights_dtype": "nf4", "double_quant": True}
VARIANTS: tuple[dict[str, Any], ...] = (
    LORA | {"batch_size": 1, "seq_len": 256},
    LORA | {"batch_size": 2, "seq_len": 128, "attention": "eager", "outputs_kept": False},
    LORA | {"batch_size": 2, "seq_len": 128, "padded": True},
    LORA | {"batch_size": 2, "seq_len": 128, "padded": True, "attention": "eager"},
    LORA | {"batch_size": 1, "seq_len": 256, "autocast": "bf16", "loss": "fused-ce"},
    LORA | {"batch_size": 2, "seq_len": 128, "weights_dtype": "fp16", "autocast": "bf16"},
    QLORA | {"batch_size": 2, "seq_len": 128},
    QLORA | {"batch_size": 1, "seq_len": 256, "kbit_preparation": True, "autocast": "bf16"},
    {"method": "full", "batch_size": 2, "seq_len": 128},
    {"method": "full", "batch_size": 1, "seq_len": 256, "loss": "fused-linear-ce", "optimizer": "adamw-8bit"},
    {"method": "meft", "adapter_width": 1024, "top_k": 16, "active_rows": 256, "adapter_dtype": "bf16", "seq_len": 256},
    {"method": "parallel-adapter", "adapter_width": 512, "batch_size": 2, "seq_len": 128, "weights_dtype": "fp32"},
)
FULL = {"method": "full", "batch_size": 1, "seq_len": 128}
NEWER: tuple[dict[str, Any], ...] = (
    *(FULL | {"optimizer": name} for name in ("adafactor", "muon", "galore", "apollo", "lion-8bit")),
    FULL | {"optimizer_in_backward": True},
    FULL | {"master_weights": True, "optimizer": "adamw-fused"},
    *(LORA | {"seq_len": 256, "loss": loss} for loss in ("fused-ce-upcast", "trl-chunked", "torchtune-chunked")),
    LORA | {"batch_size": 2, "seq_len": 128, "reentrant": True},
    QLORA | {"seq_len": 128, "kbit_preparation": True, "trl_casts": True, "autocast": "bf16"},
    *(each | {"seq_len": 128, "offload": "save-on-cpu"} for each in (FULL, LORA, QLORA)),
    LORA | {"batch_size": 2, "seq_len": 128, "offload": "save-on-cpu", "reentrant": True},
)
"""Optimizers, losses, casts and activations on the host, each for two of the models."""


@dataclass(frozen=True)
class Result:
    """One configuration: allocated peaks of both, and how long the trace took."""

    configuration: str
    simulated_bytes: int
    traced_bytes: int
    simulated_reserved_bytes: int
    traced_reserved_bytes: int
    trace_seconds: float

    @property
    def error_fraction(self) -> float:
        """Simulated over traced, less one."""
        return self.simulated_bytes / self.traced_bytes - 1


def grid() -> Iterator[tuple[str, TrainingSetup, dict[str, Any]]]:
    """Every configuration: its name, its setup, and the model's config."""
    for model in MODELS:
        config = short_config(load_model(model)[1])
        shape = shape_from_config(config, name=model)
        for checkpointing in (False, True):
            for variant in (*VARIANTS, *_windowed(shape)):
                if variant["method"] == "meft" and shape.model_type == "opt":
                    continue  # its FFN is no module of its own, which the runtime needs
                yield _configuration(model, shape, config, variant, checkpointing=checkpointing)
    for number, variant in enumerate(NEWER):
        for model in (MODELS[number % len(MODELS)], MODELS[(number + 5) % len(MODELS)]):
            config = short_config(load_model(model)[1])
            shape = shape_from_config(config, name=model)
            for checkpointing in (False, True):
                yield _configuration(model, shape, config, variant, checkpointing=checkpointing)


def _configuration(
    model: str, shape: ModelShape, config: dict[str, Any], variant: dict[str, Any], *, checkpointing: bool
) -> tuple[str, TrainingSetup, dict[str, Any]]:
    fields = variant | {"activation_checkpointing": checkpointing}
    if "target_modules" in fields:
        fields["target_modules"] = resolve_targets(shape, [fields["target_modules"]])
    if shape.model_type == "gemma2":
        fields["attention"] = "eager"
    name = " ".join(f"{key}={value}" for key, value in variant.items() if key != "target_modules")
    return f"{model} {name} ckpt={int(checkpointing)}", TrainingSetup(model=shape, **fields), config


def _windowed(shape: ModelShape) -> Iterator[dict[str, Any]]:
    """A sequence longer than the window that a model's layers see."""
    if 0 < shape.window <= MAX_WINDOW:
        longer = {"batch_size": 2, "seq_len": shape.window + 1}
        yield LORA | longer
        yield {"method": "meft", "adapter_width": 1024, "top_k": 16, "active_rows": 256} | longer


def short_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same architecture with few layers."""
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    layers = NUM_LAYERS  # or as many as it takes to have a layer of each kind
    for name in ("no_rope_layer_interval", "sliding_window_pattern"):
        layers = max(layers, config.get(name, 0))
    short = dict(config) | {key: layers}
    return short | {name: short[name][:layers] for name in ("layer_types", "no_rope_layers") if name in short}


def compare(name: str, setup: TrainingSetup, config: dict[str, Any]) -> Result:
    """Simulate and trace one configuration, and replay both through the allocator."""
    from meft.runtime.trace.run import trace_training

    started = time.perf_counter()
    traced = stream_peaks(trace_training(setup, config))
    seconds = time.perf_counter() - started
    allocated, reserved = predicted(setup)
    return Result(name, allocated, traced.allocated_bytes, reserved, traced.reserved_bytes, seconds)


def predicted(setup: TrainingSetup) -> tuple[int, int]:
    """Allocated and reserved peaks without a trace: simulated, or for MEFT replayed, its rows at their cap."""
    if setup.method != "meft":
        peaks = stream_peaks(simulate(setup))
        return peaks.allocated_bytes, peaks.reserved_bytes
    from meft.runtime.trace.meft import plan_of_traced

    plan = plan_of_traced(setup)
    memory = predict_device_memory(request=plan.request, decision=plan.decision, gpu=load_gpu(CARD))
    return memory.peak_allocated_bytes, memory.peak_reserved_bytes


def read_results(path: Path | None) -> list[Result]:
    """Those that a file holds; none where there is none yet."""
    if path is None or not path.exists():
        return []
    return [Result(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def compare_rest(
    configurations: Iterable[tuple[str, TrainingSetup, dict[str, Any]]], path: Path | None
) -> Iterator[Result]:
    """Results of all of them: those of the file as they stand there, the others made, each written as it is found."""
    found = {each.configuration: each for each in read_results(path)}
    for name, setup, config in configurations:
        if name not in found:
            found[name] = compare(name, setup, config)
            append(path, asdict(found[name]))
        yield found[name]


@click.command()
@click.option("--sample", type=click.IntRange(1), help="So many configurations, evenly over the grid.")
@click.option("--only", help="Those whose name contains this.")
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False), help="JSON Lines, to be gone on with.")
@click.option("--json", "as_json", is_flag=True)
def main(sample: int | None, only: str | None, results: Path | None, as_json: bool) -> None:
    """Compare the grid and print the errors, worst first."""
    chosen = [each for each in grid() if only is None or only in each[0]]
    if sample is not None:
        chosen = chosen[:: max(len(chosen) // sample, 1)][:sample]
    compared = []
    for result in compare_rest(chosen, results):
        compared.append(result)
        if not as_json:
            click.echo(f"{result.error_fraction:+.3%}  {result.configuration}", err=True)
    compared.sort(key=lambda result: -abs(result.error_fraction))
    errors = [abs(result.error_fraction) for result in compared]
    summary = {
        "configurations": len(compared),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "within_one_percent": sum(error <= 0.01 for error in errors),
        "median_trace_seconds": statistics.median(result.trace_seconds for result in compared),
    }
    if as_json:
        click.echo(json.dumps({"summary": summary, "results": [asdict(result) for result in compared]}, indent=1))
        return
    for result in compared[:20]:
        reserved = result.simulated_reserved_bytes / result.traced_reserved_bytes - 1
        click.echo(f"{result.error_fraction:+.3%}  reserved {reserved:+.2%}  {result.configuration}")
    click.echo(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
