"""A training step on the emulated device: schedules and policies against each other, and against what MEFT replaces.

    python benchmarks/step.py [--json FILE] [--link-gbps 3] [--layers 6] [--hidden 512] [--width 2048] ...

A LLaMA-shaped model of random weights learns random sequences. Measured, window by window and in turn so that a shared
machine slows all alike: MEFT in sequence and overlapped, with and without what a window keeps on the device; the same
adapter dense, its weights fetched and its gradients sent for every micro-batch (whole-adapter offload), or offloaded by
torch's FSDP2 (``benchmarks/offloaders.py``, which says why torchao and DeepSpeed have no row); and the same adapter
dense, all on the device. ``--link-gbps`` throttles each direction of the link.

*lane* ratio: the step over the busiest lane's time in it; 1.0 would be perfect overlap. The device computes with one
thread, so that the host's work has a core.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from offloaders import Sharded, unable

from meft.planner.models.architecture import ModelShape
from meft.planner.predict.prediction import ProfileSet, inputs_used, predict
from meft.planner.records.plan import Decision, Plan, Request, SearchSummary
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
from meft.runtime.adapter.blocks import ffn_modules
from meft.runtime.adapter.oracle import DenseAdapter
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.device.engine import TransferEngine
from meft.runtime.device.lanes import Overlapped, Sequential
from meft.runtime.host.kernels import warm_up
from meft.runtime.session.session import Session, WindowEnd, open_session

AMPLE_BYTES = 1 << 36
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """What is measured on."""

    layers: int
    hidden: int
    width: int
    top_k: int
    cap: int
    experts: int
    seq_len: int
    grad_accum: int
    depth: int
    link_gbps: float | None

    @property
    def shape(self) -> ModelShape:
        """A LLaMA of these sizes."""
        return ModelShape(
            name="benchmark",
            model_type="llama",
            num_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_heads=8,
            num_kv_heads=8,
            head_dim=self.hidden // 8,
            vocab_size=1024,
            max_positions=4096,
            tied_embeddings=True,
            gated_mlp=True,
            activation="silu",
            norm="rmsnorm",
            norms_per_layer=2,
            qkv_bias=False,
            output_bias=False,
            mlp_bias=False,
        )


def model_of(sizes: Sizes) -> torch.nn.Module:
    """Random weights, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = sizes.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def plan_of(sizes: Sizes, **choice: Any) -> Plan:
    """A plan for these sizes with the emulated device's profiles."""
    request = Request(
        model=sizes.shape,
        gpu="emulated",
        host="emulated",
        link="emulated",
        sparsity="meft-paper",
        gpu_mem_bytes=AMPLE_BYTES,
        host_mem_bytes=AMPLE_BYTES,
        host_mem_basis="given",
        batch_size=1,
        seq_len=sizes.seq_len,
        grad_accum=sizes.grad_accum,
        weights_dtype="fp32",
        adapter_dtype="fp32",
    )
    fields: dict[str, Any] = {
        "adapter_width": sizes.width,
        "top_k": sizes.top_k,
        "prefetch_depth": sizes.depth,
        "active_rows_cap": sizes.cap,
        "num_experts": sizes.experts,
        "num_probes": 4,
        "routing": "key-experts",
        "rows_in_backward": "retained",
        "activation_checkpointing": False,
    }
    decision = Decision.model_validate(fields | choice)
    profiles = ProfileSet(
        gpu=load_gpu("emulated"),
        link=load_link("emulated"),
        host=load_host("emulated"),
        sparsity=load_sparsity("meft-paper"),
    )
    return Plan(
        meft_version="benchmark",
        request=request,
        decision=decision,
        prediction=predict(request, decision, profiles),
        inputs=inputs_used(request, decision, profiles),
        search=SearchSummary(candidates=1, feasible=1, pareto=()),
    )


def batches(sizes: Sizes) -> list[Batch]:
    """One window of random sequences."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(sizes.grad_accum):
        ids = torch.randint(0, 1024, (1, sizes.seq_len), generator=generator)
        made.append(Batch(ids, ids.clone(), torch.ones_like(ids)))
    return made


class Meft:
    """MEFT under one schedule and policy."""

    def __init__(self, sizes: Sizes, *, overlapped: bool, max_norm: float | None = None, **choice: Any) -> None:
        self.max_norm = max_norm
        self.batches = batches(sizes)
        self.session: Session = open_session(
            plan_of(sizes, **choice),
            model_of(sizes),
            EmulatedDevice(AMPLE_BYTES),
            seed=0,
            schedule=Overlapped() if overlapped else Sequential(),
            link_gbps=sizes.link_gbps,
        )

    def window(self) -> None:
        """One accumulation window with its optimizer step."""
        end = WindowEnd(LEARNING_RATE, self.max_norm)
        for place, batch in enumerate(self.batches):
            last = place == len(self.batches) - 1
            self.session.step(batch, loss_scale=1 / len(self.batches), window_end=end if last else None)
        self.session.optimizer_step(learning_rate=LEARNING_RATE, max_norm=self.max_norm)
        self.session.drain()

    def busy_seconds(self) -> dict[str, float]:
        """Of each lane, so far."""
        clock = self.session.clock.busy_seconds
        return {**self.session.engine.busy_seconds(), "cpu": clock["cpu"], "gpu": clock["gpu"]}

    def moved_bytes(self) -> int:
        """Over the link, so far."""
        self.session.drain()
        return sum(self.session.engine.counted_bytes.values())

    def close(self) -> None:
        """End the threads."""
        self.session.close()


def with_adapters(sizes: Sizes) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """The frozen model with a dense adapter beside each FFN."""
    model = model_of(sizes).requires_grad_(False)
    adapters: list[torch.nn.Module] = []
    for block in ffn_modules(model):
        keys = torch.empty(sizes.width, sizes.hidden).uniform_(-1, 1) / sizes.hidden**0.5
        adapter = DenseAdapter(keys, torch.zeros_like(keys))
        adapters.append(adapter)
        block.register_forward_hook(
            lambda _, args, output, own=adapter: output + own(args[0].flatten(0, -2)).view_as(output)
        )
    return model, adapters


def fsdp_of(sizes: Sizes) -> Sharded:
    """The same adapters, offloaded by torch."""
    return Sharded(*with_adapters(sizes), batches(sizes), learning_rate=LEARNING_RATE)


class Dense:
    """The same adapter, dense. ``offloaded``: fetched whole, and its gradients sent, for every micro-batch."""

    def __init__(self, sizes: Sizes, *, offloaded: bool) -> None:
        self.offloaded, self.batches = offloaded, batches(sizes)
        self.model, self.adapters = with_adapters(sizes)
        self.engine = TransferEngine(EmulatedDevice(AMPLE_BYTES), link_gbps=sizes.link_gbps)
        self.parameters = [p for adapter in self.adapters for p in adapter.parameters()]
        self.host = [p.detach().clone() for p in self.parameters] if offloaded else []
        self.sums = [torch.zeros_like(p) for p in self.host]
        masters = [torch.nn.Parameter(p) for p in self.host] if offloaded else self.parameters
        self.masters = masters
        self.optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, fused=True)

    def window(self) -> None:
        """One accumulation window with its optimizer step."""
        landing = [torch.empty_like(p) for p in self.parameters] if self.offloaded else []
        for batch in self.batches:
            with torch.no_grad():
                for parameter, host in zip(self.parameters, self.host, strict=False):
                    self.engine.to_device(host, parameter.data, category="rows")
            loss = self.model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
            (loss / len(self.batches)).backward()
            if self.offloaded:
                for parameter, target, total in zip(self.parameters, landing, self.sums, strict=True):
                    assert parameter.grad is not None
                    self.engine.to_host(parameter.grad, target, category="row_gradients")
                    total.add_(target)
                    parameter.grad = None
        for master, total in zip(self.masters, self.sums, strict=False):
            master.grad = total
        self.optimizer.step()
        if self.offloaded:
            for total in self.sums:
                total.zero_()
        else:
            self.optimizer.zero_grad()

    def busy_seconds(self) -> dict[str, float]:
        """Of the link, so far."""
        return {**self.engine.busy_seconds()}

    def moved_bytes(self) -> int:
        """Over the link, so far."""
        return sum(self.engine.counted_bytes.values())

    def close(self) -> None:
        """Nothing to end."""


def competitors(sizes: Sizes, everything: bool) -> dict[str, Callable[[], Meft | Dense | Sharded]]:
    """What is measured, made when its turn comes."""
    kept = {"cached_rows": sizes.width, "gradients_on_device": True}
    chosen: dict[str, Callable[[], Meft | Dense | Sharded]] = {
        "MEFT, sequential": lambda: Meft(sizes, overlapped=False),
        "MEFT, overlapped": lambda: Meft(sizes, overlapped=True),
    }
    if not sizes.depth:
        chosen["MEFT, overlapped, rows in 4 parts"] = lambda: Meft(sizes, overlapped=True, gather_chunks=4)
    if everything:
        chosen |= {
            "MEFT, overlapped, rows refetched": lambda: Meft(sizes, overlapped=True, rows_in_backward="refetched"),
            "MEFT, overlapped, clipped": lambda: Meft(sizes, overlapped=True, max_norm=1.0),
            "MEFT, overlapped, kept for a window": lambda: Meft(sizes, overlapped=True, **kept),
            "dense adapter, offloaded whole": lambda: Dense(sizes, offloaded=True),
            "dense adapter, FSDP2 CPU offload": lambda: fsdp_of(sizes),
            "dense adapter, on the device": lambda: Dense(sizes, offloaded=False),
        }
    return chosen


def measure(made: dict[str, Meft | Dense | Sharded], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds per micro-batch and lane, medians over rounds in turn; bytes per micro-batch."""
    steps = len(next(iter(made.values())).batches)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    lanes: dict[str, list[dict[str, float]]] = {name: [] for name in made}
    for own in made.values():
        own.window()
    for _ in range(rounds):
        for name, own in made.items():
            before = own.busy_seconds()
            started = time.perf_counter()
            own.window()
            seconds[name].append((time.perf_counter() - started) / steps)
            lanes[name].append({lane: (busy - before[lane]) / steps for lane, busy in own.busy_seconds().items()})
    figures: dict[str, dict[str, Any]] = {}
    for name, own in made.items():
        busy = {lane: statistics.median(each[lane] for each in lanes[name]) for lane in lanes[name][0]}
        figures[name] = {
            "step_ms": 1e3 * statistics.median(seconds[name]),
            "busy_ms": {lane: 1e3 * value for lane, value in busy.items()},
            "moved_bytes_per_step": own.moved_bytes() // (steps * (rounds + 1)),
        }
        if isinstance(own, Meft):
            both = zip(seconds[name], lanes[name], strict=True)
            figures[name]["step_over_busiest_lane"] = statistics.median(
                step / max(each.values()) for step, each in both
            )
    own_times = seconds["MEFT, overlapped"]
    for name, times in seconds.items():
        ratio = statistics.median(other / mine for other, mine in zip(times, own_times, strict=True))
        figures[name]["over_overlapped"] = ratio
    return figures


@click.command(context_settings={"show_default": True})
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--layers", type=click.IntRange(min=2), default=6)
@click.option("--hidden", type=click.IntRange(min=64), default=512)
@click.option("--width", type=click.IntRange(min=64), default=2048)
@click.option("--top-k", type=click.IntRange(min=1), default=16)
@click.option("--experts", type=click.IntRange(min=4), default=32)
@click.option("--seq-len", type=click.IntRange(min=1), default=128)
@click.option("--grad-accum", type=click.IntRange(min=1), default=4)
@click.option("--depth", type=click.IntRange(min=0), default=1)
@click.option("--link-gbps", type=click.FloatRange(min=0, min_open=True))
@click.option("--rounds", type=click.IntRange(min=1), default=5)
@click.option("--schedules-only", is_flag=True, help="Leave out other policies and dense adapters.")
def main(path: Path | None, rounds: int, schedules_only: bool, **sizes: Any) -> None:
    """Measure."""
    torch.set_num_threads(1)
    chosen = Sizes(**sizes, cap=sizes["width"])
    warm_up(click.echo)
    made = {name: make() for name, make in competitors(chosen, not schedules_only).items()}
    try:
        figures = measure(made, rounds)
    finally:
        for own in made.values():
            own.close()
    for name, figure in figures.items():
        lanes = ", ".join(f"{lane} {busy:.1f}" for lane, busy in figure["busy_ms"].items())
        step = f"{figure['step_ms']:8.1f} ms ({figure['over_overlapped']:.2f} x)"
        if not figure["busy_ms"]:
            click.echo(f"{name:38} {step}, no link: torch's CPU is host and device")
            continue
        mib = figure["moved_bytes_per_step"] / (1 << 20)
        busiest = figure.get("step_over_busiest_lane")
        lane_ratio = "" if busiest is None else f"; {busiest:.2f} x the busiest lane"
        click.echo(f"{name:38} {step}, {mib:7.1f} MiB; busy ms: {lanes}{lane_ratio}")
    missing = {} if schedules_only else unable()
    for name, reason in missing.items():
        click.echo(f"{name:38} not measured: {reason}")
    if path is not None:
        path.write_text(json.dumps({**sizes, "rounds": rounds, **figures, "not measured": missing}, indent=1) + "\n")


if __name__ == "__main__":
    main()
