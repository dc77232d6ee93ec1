"""Key-Experts against exact top-K and, where faiss is installed, its IVF index: time, and recall of the exact choice.

    python benchmarks/routing.py [--json FILE] [--width 8192] [--hidden 4096] [--tokens 512] [--rounds 5]

Keys are drawn around cluster centres, queries around the same ones, so that there is something for experts to find;
the experts' centroids choose the probes. Recall is the share of each token's exact top K that the other finds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from meft.runtime.host.kernels import HostKernels, warm_up
from meft.runtime.host.router import TopKRouter

CLUSTERS, SPREAD = 64, 1.0


def clustered(count: int, hidden: int, centres: torch.Tensor) -> torch.Tensor:
    """Points around the centres."""
    chosen = centres[torch.randint(len(centres), (count,))]
    return chosen + SPREAD * torch.randn(count, hidden)


def by_expert(keys: torch.Tensor, num_experts: int, rounds: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys sorted into experts of equal size by a few rounds of balanced k-means, and the experts' centroids."""
    size = len(keys) // num_experts
    centroids = keys[torch.randperm(len(keys))[:num_experts]]
    for _ in range(rounds):
        order = (keys @ centroids.T).argmax(dim=1).argsort(stable=True)
        centroids = keys[order].reshape(num_experts, size, -1).mean(dim=1)
    return keys[order].contiguous(), centroids


def recall(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Share of each token's exact rows ``[T, K]`` among those found."""
    hits = (exact.unsqueeze(2) == found.unsqueeze(1)).any(dim=2)
    return float(hits.float().mean())


def faiss_search(keys: torch.Tensor, num_lists: int, num_probes: int) -> Callable[..., torch.Tensor] | None:
    """Search of a faiss IVF index over the keys by inner product; None where faiss is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(keys.shape[1]), keys.shape[1], num_lists, faiss.METRIC_INNER_PRODUCT)
    index.train(keys.numpy())
    index.add(keys.numpy())
    index.nprobe = num_probes
    return lambda queries, top_k: torch.from_numpy(index.search(queries.numpy(), top_k)[1])


def seconds_in_turn(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round, after one unmeasured round; in turn, so that a shared machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, call in work.items():
            started = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@click.command(context_settings={"show_default": True})
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--width", type=click.IntRange(min=64), default=8192)
@click.option("--hidden", type=click.IntRange(min=1), default=4096)
@click.option("--tokens", type=click.IntRange(min=1), default=512)
@click.option("--top-k", type=click.IntRange(min=1), default=64)
@click.option("--experts", type=click.IntRange(min=2), default=128)
@click.option("--probes", type=click.IntRange(min=1), default=4)
@click.option("--rounds", type=click.IntRange(min=1), default=5)
def main(
    path: Path | None, width: int, hidden: int, tokens: int, top_k: int, experts: int, probes: int, rounds: int
) -> None:
    """Measure."""
    torch.manual_seed(0)
    warm_up(click.echo)
    kernels = HostKernels(torch.get_num_threads())
    centres = torch.randn(CLUSTERS, hidden)
    keys, centroids = by_expert(clustered(width, hidden, centres), experts)
    queries = clustered(tokens, hidden, centres)
    weights = torch.cat([keys, torch.zeros_like(keys)], dim=1)
    keys = weights[:, :hidden]
    chosen = (queries @ centroids.T).topk(probes, dim=1).indices.int()
    exact_rows = (queries @ keys.T).topk(top_k, dim=1).indices
    scores = kernels.probed_scores(keys, queries, chosen, num_experts=experts)
    _, found = kernels.top_rows(scores, chosen, rows_per_expert=width // experts, top_k=top_k)
    fast, exact = TopKRouter(top_k, width, experts, kernels), TopKRouter(top_k, width, 1, kernels)
    work: dict[str, Callable[[], object]] = {
        "Key-Experts": lambda: fast.select(0, keys, queries, chosen),
        "exact top-K": lambda: exact.select(0, keys, queries, None),
        "exact top-K, torch": lambda: TopKRouter(top_k, width, 1).select(0, keys, queries, None),
    }
    recalls = {"Key-Experts": recall(found, exact_rows), "exact top-K": 1.0, "exact top-K, torch": 1.0}
    search = faiss_search(keys.contiguous(), experts, probes)
    if search is not None:
        work["faiss IVF"] = lambda: search(queries, top_k)
        recalls["faiss IVF"] = recall(search(queries, top_k), exact_rows)
    seconds = seconds_in_turn(work, rounds)
    own = seconds["Key-Experts"]
    figures = {
        name: {
            "ms": 1e3 * statistics.median(times),
            "recall": recalls[name],
            "times_key_experts": statistics.median(other / mine for other, mine in zip(times, own, strict=True)),
        }
        for name, times in seconds.items()
    }
    kernels.close()
    for name, figure in figures.items():
        ratio = f"{figure['times_key_experts']:.2f} x the time of Key-Experts"
        click.echo(f"{name:20} {figure['ms']:9.2f} ms, recall {figure['recall']:.3f}, {ratio}")
    if search is None:
        click.echo("faiss is not installed: pip install faiss-cpu to compare with its IVF index")
    if path is not None:
        sizes = {"width": width, "hidden": hidden, "tokens": tokens, "top_k": top_k, "threads": torch.get_num_threads()}
        path.write_text(json.dumps({**sizes, "experts": experts, "probes": probes, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
