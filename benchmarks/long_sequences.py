"""A long sequence in the staging of a short one: SmolLM2 with 4,096 tokens in chunks of 512, against the oracle.

    python benchmarks/long_sequences.py [--tokens 4096] [--chunks 8] [--compare union] [--compare own] [--dtype fp64]
        [--loss-only] [--results FILE]

One micro-batch forward and backward on the emulated device, rows of random weights, activation checkpointing, no
look-ahead. Comparisons, as largest differences of the loss and of every layer's gradients:

- *union*: tokens that see their chunk's union, exact routing, with the dense oracle in the same model, told the rows
  that were chosen (:meth:`~meft.runtime.adapter.oracle.DenseAdapter.by_chunks`);
- *own*: tokens that see their own rows, Key-Experts, with the same plan without chunks, routers' gradients too.

And the buffers for rows, with those of a plan for one chunk's tokens alone.

In fp64 the rows, the adapter and the model are, and the loss is taken of fp64 logits; transformers' norms take fp32
copies of what they are given. Without it a token's eighth and ninth row may change places where chunks round
otherwise, which is another function of that token.

In fp64 a pass of 4,096 tokens is two minutes of one core (five of a slower one), and two passes 12 GiB; in fp32 they
are 5. ``--loss-only`` leaves backward out. Committed: ``benchmarks/long_sequences_results.jsonl``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from results_file import append
from torch import nn

from meft.planner.front.options import RequestOptions
from meft.planner.front.request import planning
from meft.planner.records.plan import Plan, TokensSee
from meft.planner.search.search import make_plan
from meft.runtime.adapter.oracle import DenseAdapter
from meft.runtime.data.embedded import smollm2_folder
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.host.store import HostStore
from meft.runtime.session import session as session_module
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import Session, open_session

WIDTH, TOP_K, STD = 1024, 8, 0.05
BUDGET_BYTES = 1 << 36
ROUTINGS = {"union": "exact", "own": "key-experts"}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Gradients:
    """Of one micro-batch: the loss, and each layer's gradients: of rows ``[R, 2D]``, of its router ``[N, D]`` if it has
    one."""

    loss: float
    rows: list[torch.Tensor]
    routers: list[torch.Tensor]
    seconds: float
    """Of processors."""


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
        routing=ROUTINGS[see],
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
    decided = {"active_rows_cap": cap, "num_experts": 32 if see == "own" else 1, "num_probes": 4 if see == "own" else 1}
    return plan.model_copy(update={"decision": plan.decision.model_copy(update=decided)})


@contextmanager
def opened(plan: Plan, folder: Path, dtype: torch.dtype) -> Iterator[Session]:
    """A session whose rows are the same random ones each time; all in ``dtype``, the host's work by the readable code
    where the compiled is not for it."""
    model = load_frozen_model(plan, folder).to(dtype)
    model.loss_function = loss_of  # transformers' takes it of fp32 logits
    with (
        default_dtype(dtype),
        mock.patch.object(session_module, "HostStore", partial(HostStore, dtype=dtype)),
        mock.patch.dict(session_module.ADAPTER_DTYPES, {"fp32": dtype}),
    ):
        session = open_session(plan, model, EmulatedDevice(BUDGET_BYTES), seed=0, compiled=dtype == torch.float32)
    generator = torch.Generator().manual_seed(0)
    for tables in session.store.layers:
        tables.weights.normal_(std=STD, generator=generator)
    try:
        yield session
    finally:
        session.close()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What tensors are made of that do not say."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def loss_of(logits: torch.Tensor, labels: torch.Tensor, **_: object) -> torch.Tensor:
    """Mean cross-entropy of the next token, in the dtype of ``logits [B, S, V]``."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def batch_of(tokens: int) -> Batch:
    """Random tokens that come in runs, so that neighbouring chunks differ."""
    generator = torch.Generator().manual_seed(1)
    base = torch.arange(tokens) // 64 * 97 % 40_000
    ids = (base + torch.randint(0, 200, (tokens,), generator=generator)).view(1, -1)
    return Batch(ids, torch.ones_like(ids), ids)


def step(session: Session, batch: Batch) -> Gradients:
    """Of the runtime."""
    started = time.process_time()
    result = session.step(batch, loss_scale=1.0)
    session.drain()
    rows = [tables.gradients.clone() for tables in session.store.layers]
    routers = [weight.grad.clone() for weight in session.router_weights if weight.grad is not None]
    return Gradients(result.loss, rows, routers, time.process_time() - started)


def loss_alone(session: Session, batch: Batch) -> Gradients:
    """Of the runtime, without backward: no gradients."""
    started = time.process_time()
    session.exchange.expect_tokens(batch.attention_mask.flatten().bool())
    with session.device.scope(), torch.no_grad():
        loss = session.engine.read_scalar(session.loss(batch), category="loss")
    session.drain()
    return Gradients(loss, [], [], time.process_time() - started)


def oracle_step(session: Session, batch: Batch) -> Gradients:
    """Of the dense oracle in the session's model, for the rows of the chunks of its last micro-batch."""
    started, exchange, chunks = time.process_time(), session.exchange, session.plan.decision.token_chunks
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
    found = [torch.cat([each.keys.grad, each.values.grad], dim=1) for each in dense]  # type: ignore[union-attr]
    return Gradients(float(loss.detach()), found, [], time.process_time() - started)


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float | None:
    """The largest, as a share of the largest number; None where one has none."""
    if not (ours and theirs):
        return None
    largest = max(float(each.abs().max()) for each in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


@dataclass(frozen=True)
class Comparison:
    """One line of the results."""

    tokens_see: TokensSee
    against: str
    dtype: str
    tokens: int
    chunks: int
    active_rows_cap: int
    most_active_rows: int
    """In a chunk of a layer."""
    dropped_rows: int
    travelled_share: float
    """Of active rows, those that travelled in forward."""
    loss: float
    other_loss: float
    rows_differ_by: float | None
    """Of the largest gradient."""
    routers_differ_by: float | None
    staging_bytes: dict[str, int]
    short_staging_bytes: dict[str, int]
    """Of a plan for one chunk's tokens."""
    processor_seconds: tuple[float, float]


def compare(see: TokensSee, *, tokens: int, chunks: int, dtype: str, folder: Path, loss_only: bool) -> Comparison:
    """The chunked step and what it must equal; the oracle's always whole."""
    ours_of = loss_alone if loss_only else step
    batch, size = batch_of(tokens), math.ceil(tokens / chunks)
    cap = WIDTH // 2 if see == "union" else WIDTH  # no row may be dropped where every token is to have its own best
    with opened(plan_for(tokens, chunks=chunks, cap=cap, see=see), folder, DTYPES[dtype]) as session:
        ours = ours_of(session, batch)
        click.echo(f"{tokens} tokens in {chunks} chunks: {ours.seconds:.0f} s of processor, loss {ours.loss}")
        counters = session.exchange.counters
        most = max(rows.shape[0] for rows in session.exchange.unit_rows())  # type: ignore[attr-defined]
        dropped, travelled = counters.dropped_rows, sum(counters.missing_rows) / sum(counters.active_rows)
        staging = staging_of(session)
        theirs = oracle_step(session, batch) if see == "union" else None
        del session  # its model and tables, before there are others
    if theirs is None:
        with opened(plan_for(tokens, chunks=1, cap=cap, see=see), folder, DTYPES[dtype]) as session:
            theirs = ours_of(session, batch)
            del session
    with opened(plan_for(size, chunks=1, cap=cap, see=see), folder, DTYPES[dtype]) as session:
        short = staging_of(session)
    return Comparison(
        tokens_see=see,
        against="oracle" if see == "union" else "one chunk",
        dtype=dtype,
        tokens=tokens,
        chunks=chunks,
        active_rows_cap=cap,
        most_active_rows=most,
        dropped_rows=dropped,
        travelled_share=travelled,
        loss=ours.loss,
        other_loss=theirs.loss,
        rows_differ_by=difference(ours.rows, theirs.rows),
        routers_differ_by=difference(ours.routers, theirs.routers),
        staging_bytes=staging,
        short_staging_bytes=short,
        processor_seconds=(round(ours.seconds, 1), round(theirs.seconds, 1)),
    )


def staging_of(session: Session) -> dict[str, int]:
    """The host's buffers for rows and their gradients."""
    found = session.exchange.host_buffer_bytes()
    return {name: found[name] for name in ("row_staging", "gradient_landing")}


@click.command()
@click.option("--tokens", default=4096, show_default=True)
@click.option("--chunks", default=8, show_default=True)
@click.option("--compare", "compared", multiple=True, type=click.Choice(sorted(ROUTINGS)), default=("union", "own"))
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), default="fp64", show_default=True)
@click.option("--loss-only", is_flag=True, help="Forward alone, of a comparison with no chunks.")
@click.option("--results", type=click.Path(path_type=Path), help="Append a JSON line for each comparison.")
def main(results: Path | None, compared: tuple[TokensSee, ...], **asked: Any) -> None:
    """Compare, and print."""
    folder = smollm2_folder(click.echo)
    for see in compared:
        row = asdict(compare(see, folder=folder, **asked))
        click.echo(json.dumps(row))
        append(results, row)


if __name__ == "__main__":
    main()
