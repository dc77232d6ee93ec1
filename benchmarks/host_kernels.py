"""The host kernels against what else there is, on this machine: ``python benchmarks/host_kernels.py [--json FILE]``.

Every comparison runs its competitors in turn, round after round, so that a shared machine slows them alike; the figure
is the median over the rounds of each round's ratio. Rates count bytes read plus bytes written. DeepSpeed's CPUAdam is
dense: it updates as many rows as the sparse kernel does, those at the beginning of tables as large, in memory as torch
gives it (the kernel's tables lie on huge pages, as the runtime's do); where it is not installed torch's fused AdamW
stands in, and the output says so. Indexed torch code comes twice: all rows at once, and the runtime's readable form in
chunks of 4 MiB, whose temporaries the C library reuses instead of mapping new pages.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from meft.runtime.host.kernels import HostKernels, warm_up
from meft.runtime.host.optimizer import AdamWSettings, update_touched_rows
from meft.runtime.host.optimizer import adamw as update
from meft.runtime.host.router import TopKRouter
from meft.runtime.host.store import HostStore, LayerTables

ADAMW_BYTES = 7 * 4
"""Per number: weight and two moments read and written, gradient read."""


def seconds_in_turn(competitors: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each competitor in each round, after one unmeasured round.

    Each starts on a quiet machine: OpenMP's threads spin for milliseconds after torch's work, on another's core. Who
    begins is drawn for each round: the next finds in the cache what the one before has read.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    draw = random.Random(0)
    for round_ in range(rounds + 1):
        for name, work in draw.sample(list(competitors.items()), len(competitors)):
            time.sleep(0.02)
            started = time.perf_counter()
            work()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def figures(seconds: dict[str, list[float]], *, kernel: str, num_bytes: dict[str, int] | None = None) -> dict:
    """Median milliseconds, rates and the kernel's speed-up over each other competitor."""
    result: dict[str, object] = {name: {"ms": 1e3 * statistics.median(times)} for name, times in seconds.items()}
    for name, size in (num_bytes or {}).items():
        result[name]["gb_per_s"] = size / statistics.median(seconds[name]) / 1e9
    result["speedup_over"] = {
        name: statistics.median(other / own for other, own in zip(times, seconds[kernel], strict=True))
        for name, times in seconds.items()
        if name != kernel
    }
    return result


def adamw(kernels: HostKernels, *, width: int, hidden: int, rows: torch.Tensor, rounds: int) -> dict:
    """Sparse AdamW on ``rows`` of a table ``[width, 2 * hidden]``."""
    store = HostStore(num_layers=1, adapter_width=width, hidden_size=hidden)
    tables = store.layers[0]
    tables.weights.normal_()
    tables.gradients.index_fill_(0, rows, 0.5)
    tables.touched[rows] = True
    settings = AdamWSettings()
    fused = torch.optim.AdamW([leading_rows(width, len(rows), 2 * hidden)], fused=True)
    views = [torch.nn.Parameter(tables.weights[row]) for row in rows.tolist()]
    for view, row in zip(views, rows.tolist(), strict=True):
        view.grad = tables.gradients[row]
    fused_views = torch.optim.AdamW(views, fused=True)
    copy = tables.weights.bfloat16()

    def kernel(bf16_copy: torch.Tensor | None = None) -> None:
        kernels.adamw(
            tables.weights,
            tables.first_moment,
            tables.second_moment,
            tables.gradients,
            tables.step_counts,
            rows,
            learning_rate=1e-4,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            bf16_copy=bf16_copy,
        )

    competitors: dict[str, Callable[[], object]] = {
        "kernel": kernel,
        "kernel with bf16 copy": lambda: kernel(copy),
        "torch indexed": lambda: update_indexed(tables, rows, settings, learning_rate=1e-4),
        "torch indexed, in chunks": lambda: update_touched_rows(store, settings, learning_rate=1e-4),
        "torch fused, row views": fused_views.step,
        "torch fused, dense": fused.step,
    }
    deepspeed = deepspeed_adam(leading_rows(width, len(rows), 2 * hidden))
    if deepspeed is not None:
        competitors["DeepSpeed CPUAdam, dense"] = deepspeed
    seconds = seconds_in_turn(competitors, rounds)
    size = ADAMW_BYTES * len(rows) * 2 * hidden
    return figures(seconds, kernel="kernel", num_bytes={name: size for name in competitors if "copy" not in name})


def update_indexed(tables: LayerTables, rows: torch.Tensor, settings: AdamWSettings, *, learning_rate: float) -> None:
    """AdamW of ``rows``, as torch code says it: take them, update them, put them back."""
    weights, first, second = tables.weights[rows], tables.first_moment[rows], tables.second_moment[rows]
    counts = tables.step_counts[rows] + 1
    update(weights, first, second, tables.gradients[rows], counts, settings, learning_rate=learning_rate)
    tables.weights[rows], tables.first_moment[rows], tables.second_moment[rows] = weights, first, second
    tables.step_counts[rows] = counts


def leading_rows(width: int, num_rows: int, columns: int) -> torch.nn.Parameter:
    """The first rows of a table ``[width, columns]``, with gradients in a table like it, as a dense parameter."""
    parameter = torch.nn.Parameter(torch.randn(width, columns)[:num_rows])
    parameter.grad = torch.randn(width, columns)[:num_rows]
    return parameter


def deepspeed_adam(parameter: torch.nn.Parameter) -> Callable[[], object] | None:
    """A step of DeepSpeed's CPUAdam; None where it is not installed."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        return None
    step: Callable[[], object] = DeepSpeedCPUAdam([parameter], adamw_mode=True).step
    return step


def moves(kernels: HostKernels, *, width: int, hidden: int, rows: torch.Tensor, rounds: int) -> dict[str, dict]:
    """Gather (fp32, and fp32 to bf16, and from a bf16 copy), accumulate (fp32, and bf16 into fp32 sums), and a plain
    copy as large as the gather."""
    table, gradients = torch.randn(width, 2 * hidden), torch.randn(len(rows), 2 * hidden)
    wide, narrow = torch.empty_like(gradients), torch.empty_like(gradients, dtype=torch.bfloat16)
    half, touched = table.bfloat16(), torch.zeros(width, dtype=torch.bool)
    size = 2 * gradients.numel() * 4
    fp32 = seconds_in_turn(
        {
            "kernel": lambda: kernels.gather(table, rows, wide),
            "torch.index_select, out given": lambda: torch.index_select(table, 0, rows, out=wide),
            "torch.index_select, new tensor": lambda: torch.index_select(table, 0, rows),
            "torch copy, contiguous": lambda: wide.copy_(gradients),
        },
        rounds,
    )
    bf16 = seconds_in_turn(
        {
            "kernel": lambda: kernels.gather(table, rows, narrow),
            "kernel from a bf16 copy": lambda: kernels.gather(half, rows, narrow),
            "torch.index_select and convert": lambda: narrow.copy_(table.index_select(0, rows)),
        },
        rounds,
    )
    added = seconds_in_turn(
        {
            "kernel": lambda: kernels.accumulate(table, touched, rows, gradients),
            "torch.index_add": lambda: table.index_add_(0, rows, gradients),
        },
        rounds,
    )
    added_bf16 = seconds_in_turn(
        {
            "kernel": lambda: kernels.accumulate(table, touched, rows, narrow),
            "torch.index_add, converted": lambda: table.index_add_(0, rows, narrow.float()),
        },
        rounds,
    )
    return {
        "gather fp32": figures(fp32, kernel="kernel", num_bytes=dict.fromkeys(fp32, size)),
        "gather fp32 to bf16": figures(bf16, kernel="kernel"),
        "accumulate": figures(added, kernel="kernel", num_bytes=dict.fromkeys(added, size + size // 2)),
        "accumulate bf16 gradients": figures(added_bf16, kernel="kernel"),
    }


def routing(kernels: HostKernels, *, width: int, hidden: int, tokens: int, top_k: int, rounds: int) -> dict:
    """Key-Experts against exact top-K: ``sqrt`` experts, 4 probes; random keys and queries."""
    num_experts = 1 << (width.bit_length() // 2)
    weights = torch.randn(width, 2 * hidden)
    keys, queries = weights[:, :hidden], torch.randn(tokens, hidden)
    centroids = keys.reshape(num_experts, -1, hidden).mean(dim=1)
    probes = (queries @ centroids.T).topk(4, dim=1).indices.int()
    fast = TopKRouter(top_k, width, num_experts, kernels)
    exact = TopKRouter(top_k, width, 1, kernels)
    readable = TopKRouter(top_k, width, num_experts)
    seconds = seconds_in_turn(
        {
            "kernel": lambda: fast.select(0, keys, queries, probes),
            "Key-Experts, readable": lambda: readable.select(0, keys, queries, probes),
            "exact top-K": lambda: exact.select(0, keys, queries, None),
            "exact top-K, readable": lambda: TopKRouter(top_k, width, 1).select(0, keys, queries, None),
        },
        rounds,
    )
    return figures(seconds, kernel="kernel") | {"num_experts": num_experts, "num_probes": 4}


@click.command()
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Of the kernels and of torch [default: torch's own].")
def main(path: Path | None, rounds: int, threads: int | None) -> None:
    """Measure the kernels at the sizes of a 7B model's layer."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    warm_up(click.echo)
    kernels = HostKernels(torch.get_num_threads())
    rows = torch.randperm(8192)[:4096].sort().values
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "rounds": rounds,
        "adamw, 4096 rows of 4096": adamw(kernels, width=8192, hidden=2048, rows=rows, rounds=rounds),
        **moves(kernels, width=8192, hidden=2048, rows=rows, rounds=rounds),
        "routing, R=8192 D=4096 T=512 K=64": routing(
            kernels, width=8192, hidden=4096, tokens=512, top_k=64, rounds=rounds
        ),
    }
    kernels.close()
    show(result)
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


def show(result: dict) -> None:
    """The figures as text."""
    for name, section in result.items():
        if not isinstance(section, dict):
            click.echo(f"{name}: {section}")
            continue
        click.echo(name)
        for competitor, figure in section.items():
            if isinstance(figure, dict) and "ms" in figure:
                rate = f", {figure['gb_per_s']:.1f} GB/s" if "gb_per_s" in figure else ""
                ratio = section["speedup_over"].get(competitor)
                than = "" if ratio is None else f"  ({ratio:.2f} x the kernel's time)"
                click.echo(f"  {competitor:32} {figure['ms']:9.2f} ms{rate}{than}")
    deepspeed = any("DeepSpeed" in name for section in result.values() if isinstance(section, dict) for name in section)
    if not deepspeed:
        click.echo("DeepSpeed is not installed: torch's fused AdamW over a dense table stands in for its CPUAdam")


if __name__ == "__main__":
    main()
