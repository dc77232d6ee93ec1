"""A long sequence in the staging of a short one: SmolLM2 with 4,096 tokens in chunks of 512, against the oracle.

    python benchmarks/long_sequences.py [--tokens 4096] [--chunks 8]

One micro-batch forward and backward on the emulated device, rows of random weights, activation checkpointing, exact
routing, no look-ahead. Three comparisons, as largest differences:

- tokens that see their chunk's union, with the dense oracle in the same model, told the rows that were chosen
  (:meth:`~meft.runtime.adapter.oracle.DenseAdapter.by_chunks`): the loss and the row gradients of every layer;
- tokens that see their own rows, with the same plan without chunks: the same;
- the buffers for rows, with those of a plan for one chunk's tokens alone.
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import torch
from torch import nn

from meft.planner.front.options import RequestOptions
from meft.planner.front.request import planning
from meft.planner.records.plan import Plan, TokensSee
from meft.planner.search.search import make_plan
from meft.runtime.adapter.oracle import DenseAdapter
from meft.runtime.data.embedded import smollm2_folder
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import Session, open_session

WIDTH, TOP_K, STD = 1024, 8, 0.05
BUDGET_BYTES = 1 << 36


def plan_for(tokens: int, *, chunks: int, cap: int, see: TokensSee) -> Plan:
    """The planner's plan for the emulated device, with room for ``cap`` rows."""
    options = RequestOptions(
        model="smollm2-135m",
        gpu="emulated",
        gpu_mem=BUDGET_BYTES,
        host_mem=BUDGET_BYTES,
        batch_size=1,
        seq_len=tokens,
        grad_accum=1,
        adapter_width=WIDTH,
        top_k=TOP_K,
        prefetch_depth=0,
        routing="exact",
        rows_in_backward="refetched",
        activation_checkpointing=True,
        hot_rows=0,
        token_chunks=chunks,
        tokens_see=see,
        max_slowdown=1e3,
    )
    planned = planning(options)
    plan = make_plan(planned.request, planned.profiles, meft_version="0")
    assert isinstance(plan, Plan), plan
    return plan.model_copy(update={"decision": plan.decision.model_copy(update={"active_rows_cap": cap})})


def opened(plan: Plan, folder: Path) -> Session:
    """A session whose rows are the same random ones each time."""
    session = open_session(plan, load_frozen_model(plan, folder), EmulatedDevice(BUDGET_BYTES), seed=0)
    generator = torch.Generator().manual_seed(0)
    for tables in session.store.layers:
        tables.weights.normal_(std=STD, generator=generator)
    return session


def batch_of(tokens: int) -> Batch:
    """Random tokens that come in runs, so that neighbouring chunks differ."""
    generator = torch.Generator().manual_seed(1)
    base = torch.arange(tokens) // 64 * 97 % 40_000
    ids = (base + torch.randint(0, 200, (tokens,), generator=generator)).view(1, -1)
    return Batch(ids, torch.ones_like(ids), ids)


def step(session: Session, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    """Loss and each layer's row gradients ``[R, 2D]`` of one micro-batch."""
    result = session.step(batch, loss_scale=1.0)
    session.drain()
    return result.loss, [tables.gradients.clone() for tables in session.store.layers]


def oracle_step(session: Session, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    """The same of the dense oracle in the session's model, for the rows of the chunks of its last micro-batch."""
    exchange, chunks = session.exchange, session.plan.decision.token_chunks
    rows = exchange.unit_rows()  # type: ignore[attr-defined]
    dense = nn.ModuleList(DenseAdapter(tables.keys, tables.values) for tables in session.store.layers)

    def serve(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        adapter = dense[layer]
        assert isinstance(adapter, DenseAdapter)
        return adapter.by_chunks(hidden, rows[layer * chunks : (layer + 1) * chunks])

    session.adapter.serving = serve
    loss = session.model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
    loss.backward()
    session.adapter.serving = None
    return float(loss.detach()), [torch.cat([each.keys.grad, each.values.grad], dim=1) for each in dense]  # type: ignore[union-attr]


def difference(ours: tuple[float, list[torch.Tensor]], theirs: tuple[float, list[torch.Tensor]]) -> str:
    """Of losses, and the largest of gradients as a share of the largest gradient."""
    largest = max(float(each.abs().max()) for each in theirs[1])
    worst = max(float((a - b).abs().max()) for a, b in zip(ours[1], theirs[1], strict=True))
    return f"loss {ours[0]:.6f} against {theirs[0]:.6f}; row gradients differ by {worst / largest:.1e} of the largest"


@click.command()
@click.option("--tokens", default=4096)
@click.option("--chunks", default=8)
def main(tokens: int, chunks: int) -> None:
    """Compare, and print."""
    folder, batch, size = smollm2_folder(click.echo), batch_of(tokens), math.ceil(tokens / chunks)
    cap = WIDTH // 2
    union = opened(plan_for(tokens, chunks=chunks, cap=cap, see="union"), folder)
    found = step(union, batch)
    counters = union.exchange.counters
    largest = max(rows.shape[0] for rows in union.exchange.unit_rows())  # type: ignore[attr-defined]
    travelled = f"{sum(counters.missing_rows):,} of {sum(counters.active_rows):,} rows travelled in forward"
    click.echo(f"{tokens} tokens in {chunks} chunks of {size}: at most {largest} rows active in one, cap {cap}")
    click.echo(f"{counters.dropped_rows} rows dropped; {travelled}")
    click.echo(f"the chunks' union, against the oracle: {difference(found, oracle_step(union, batch))}")
    staging = union.exchange.host_buffer_bytes(pinned=False)
    union.close()
    short = opened(plan_for(size, chunks=1, cap=cap, see="union"), folder)
    alone = short.exchange.host_buffer_bytes(pinned=False)
    short.close()
    for name in ("row_staging", "gradient_landing"):
        click.echo(f"{name}: {staging[name]:,} bytes, of a plan for {size} tokens {alone[name]:,}")
    # no row may be dropped where every token is to have its own best
    own = opened(plan_for(tokens, chunks=chunks, cap=WIDTH, see="own"), folder)
    chunked = step(own, batch)
    own.close()
    whole = opened(plan_for(tokens, chunks=1, cap=WIDTH, see="own"), folder)
    click.echo(f"tokens' own rows, against no chunks: {difference(chunked, step(whole, batch))}")
    whole.close()


if __name__ == "__main__":
    main()
