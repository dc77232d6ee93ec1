"""What would a frozen base that is sharded over the cards (FSDP2's ``fully_shard``) take, and what would it cost?

    python benchmarks/sharded_base.py [--model llama-2-70b] [--results FILE]

Priced with the planner's own models; nothing is run, and ``meft-run`` does not shard. Of the replicated base's ledger
at its peak, every row at the cap,

- the layers' linear weights become each card's part of them, ``1/N``;
- three layers' whole weights come on top: the one that is computed, the next, which is gathered meanwhile, and the flat
  buffer that it arrives in before it is copied to its tensors;
- embedding, norms and head stay whole on every card, as FSDP2 leaves its root's after forward.

Every layer is gathered twice in a micro-batch, for forward and for backward. Cards without a link of their own (a 3090
or 4090 has none) send that over PCIe through the host's memory, ``(N - 1) / N`` of a layer each way, at the link's
rates for both ways at once, each card on a link of its own. The step is taken to be as long as what is longest: the
step as planned, or a direction of the link with its rows and the weights; and the first layer's gathering, which
nothing hides. So times are the least that they could be.

Committed: ``benchmarks/sharded_base_results.jsonl``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from meft.planner.base.units import GIB
from meft.planner.front.options import RequestOptions
from meft.planner.front.request import planning
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import Decision, Plan, Request
from meft.planner.records.setup import WeightsDtype
from meft.planner.search.search import make_plan
from meft.planner.terms.weights import linear_weights_bytes

SETUPS: tuple[tuple[str, int, WeightsDtype], ...] = (
    ("rtx-3090", 4, "nf4"),
    ("rtx-3090", 8, "bf16"),
    ("rtx-4090", 4, "nf4"),
    ("rtx-4090", 8, "bf16"),
)
"""Card, how many, and the base's weights."""
SIZES = ((1, 512), (1, 1024), (1, 2048), (2, 2048))
AMPLE_BYTES = 1 << 40
GATHERED_LAYERS = 3
GATHERS_PER_STEP = 2


def planned(
    gpu: str, cards: int, dtype: WeightsDtype, *, model: str, batch_size: int, seq_len: int
) -> tuple[Request, Decision, ProfileSet]:
    """Request, decision and profiles: the planner's choice on cards of ample memory, keeping no rows there."""
    options = RequestOptions(
        model=model,
        gpu=gpu,
        gpus=cards,
        host_mem=512 * GIB,
        weights_dtype=dtype,
        batch_size=batch_size,
        seq_len=seq_len,
        grad_accum=32,
        adapter_width=4096,
        top_k=64,
        prefetch_depth=1,
        rows_in_backward="refetched",
        activation_checkpointing=True,
        hot_rows=0,
        max_slowdown=100.0,
    )
    asked = planning(options)
    ample = asked.request.model_copy(update={"gpu_mem_bytes": AMPLE_BYTES})
    plan = make_plan(ample, asked.profiles, meft_version="0")
    assert isinstance(plan, Plan), plan
    few = {"cached_rows": 0, "gradients_on_device": False}
    return asked.request, Decision.model_validate(plan.decision.model_dump() | few), asked.profiles


def priced(request: Request, decision: Decision, profiles: ProfileSet) -> dict[str, Any]:
    """One line of the results."""
    prediction, shape, cards = predict(request, decision, profiles, replayed=False), request.model, request.gpus
    memory, timing, link = prediction.device_memory, prediction.timing, profiles.link
    linear = linear_weights_bytes(shape, dtype=request.weights_dtype, double_quant=request.double_quant)
    layer, replicated = linear // shape.num_layers, memory.peak_allocated_bytes_at_cap
    assert replicated is not None
    sharded = replicated - linear + linear // cards + GATHERED_LAYERS * layer
    one_way = GATHERS_PER_STEP * linear * (cards - 1) // cards
    rates = {"h2d": link.duplex_h2d_bytes_per_second.value, "d2h": link.duplex_d2h_bytes_per_second.value}
    gathering = {lane: one_way / rate for lane, rate in rates.items()}
    busy = max(timing.busy_seconds[lane] + seconds for lane, seconds in gathering.items())
    first = max(gathering.values()) / (GATHERS_PER_STEP * shape.num_layers)
    step = max(timing.step_seconds, busy) + first
    return {
        "gpu": profiles.gpu.name,
        "cards": cards,
        "weights": request.weights_dtype,
        "micro_batch": f"{request.batch_size}x{request.seq_len}",
        "adapter_width": decision.adapter_width,
        "active_rows_cap": decision.active_rows_cap,
        "budget_bytes": memory.allocator_budget_bytes,
        "replicated_bytes": replicated,
        "sharded_bytes": sharded,
        "shard_bytes": linear // cards,
        "gathered_bytes": GATHERED_LAYERS * layer,
        "fits": sharded <= memory.allocator_budget_bytes,
        "host_bytes": prediction.host_memory.total_bytes,
        "gathered_bytes_per_step_each_way": one_way,
        "gathering_seconds": max(gathering.values()),
        "replicated_step_seconds": timing.step_seconds,
        "sharded_step_seconds": step,
        "tokens_per_second": cards * request.tokens_per_step / step,
    }


def said(row: dict[str, Any]) -> str:
    """For people."""
    verdict, each_way = "fits" if row["fits"] else "does not fit", row["gathered_bytes_per_step_each_way"] / GIB
    return (
        f"{row['cards']} x {row['gpu']}, {row['weights']}, {row['micro_batch']}: {row['sharded_bytes'] / GIB:.1f} GiB "
        f"allocated of {row['budget_bytes'] / GIB:.1f}, {verdict} (replicated {row['replicated_bytes'] / GIB:.1f}); "
        f"{each_way:.0f} GiB of weights each way, {row['gathering_seconds']:.1f} s; "
        f"step {row['sharded_step_seconds']:.1f} s (replicated {row['replicated_step_seconds']:.1f}), "
        f"{row['tokens_per_second']:,.0f} tokens/s; host {row['host_bytes'] / GIB:.0f} GiB"
    )


@click.command()
@click.option("--model", default="llama-2-70b", show_default=True)
@click.option("--results", type=click.Path(path_type=Path), help="Append a JSON line for each row.")
def main(model: str, results: Path | None) -> None:
    """Price every setup and micro-batch."""
    for gpu, cards, dtype in SETUPS:
        for batch_size, seq_len in SIZES:
            row = priced(*planned(gpu, cards, dtype, model=model, batch_size=batch_size, seq_len=seq_len))
            click.echo(said(row))
            if results is not None:
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"model": model} | row) + "\n")


if __name__ == "__main__":
    main()
