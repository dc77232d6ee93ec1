"""Would all micro-batches of a window in one layer before the next layer (a vertical schedule) be worth building?

    python benchmarks/vertical.py [--gpu rtx-3090] [--batch-size 2] [--seq-len 256] [--results FILE]

Priced with the planner's own models for LLaMA-7B, K 64, nothing is run. Three ways through a window of ``M``
micro-batches of ``T`` tokens:

- *as planned*: one micro-batch after the other, with the cached rows and sums of gradients that the planner chooses.
- *vertical*, at its best: rows travel as for one micro-batch of ``M * T`` tokens (the window's union once forward and,
  as the ring holds few layers, once backward; gradients once), and every lane is taken to overlap with all others, so
  that a window takes as long as its busiest lane, and then the optimizer, which clips by the norm of all layers'
  gradients. Memory is a micro-batch's peak with the window's union in the ring, and for every other micro-batch what
  it keeps until backward: its layers' inputs, or all activations.
- *one batch*: the window as a single micro-batch, as planned.

Rows like these cannot say how fast a card is; they say how the three compare by the same models.
Committed: ``benchmarks/vertical_results.jsonl``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from results_file import append

import meft
from meft.planner.base.errors import Infeasible
from meft.planner.predict.prediction import ProfileSet, predict, simulated_tasks
from meft.planner.records.plan import LANES, Decision, Plan, Prediction, Request

WIDTHS = (2048, 4096, 6144, 8192, 12288, 16384)
WINDOWS = (4, 8)
TOP_K = 64
BF16_BYTES = 2


def planned(gpu: str, *, batch_size: int, seq_len: int, grad_accum: int, width: int) -> Plan | None:
    """The planner's own choice, whatever its time; None where nothing fits."""
    try:
        return meft.plan(
            model="llama-7b",
            gpu=gpu,
            host_mem="256GB",
            batch_size=batch_size,
            seq_len=seq_len,
            grad_accum=grad_accum,
            adapter_width=width,
            top_k=TOP_K,
            max_slowdown=100.0,
        )
    except Infeasible:
        return None


def of_plan(plan: Plan | None, micro_batches: int) -> dict[str, Any] | None:
    """A window of ``micro_batches`` parts as planned; ``plan`` may have it as fewer micro-batches of its own."""
    if plan is None:
        return None
    decision, request = plan.decision, plan.request
    return {
        "moved_bytes": plan.prediction.transfer.window_bytes(request.rounds),
        "seconds": plan.prediction.timing.step_seconds * request.rounds,
        "device_bytes": plan.prediction.device_memory.peak_allocated_bytes_at_cap,
        "seconds_per_part": plan.prediction.timing.step_seconds * request.rounds / micro_batches,
        "prefetch_depth": decision.prefetch_depth,
        "cached_rows": decision.cached_rows,
        "gradients_on_device": decision.gradients_on_device,
        "rows_in_backward": decision.rows_in_backward,
        "checkpointing": decision.activation_checkpointing,
    }


def vertical(plan: Plan, *, checkpointing: bool) -> dict[str, Any]:
    """The window of ``plan`` layer by layer, at its best."""
    request, profiles = plan.request, ProfileSet.of(plan.request)
    union = max(plan.prediction.sparsity.window_active_rows_per_layer)
    nothing_kept = {"cached_rows": 0, "gradients_on_device": False, "gather_chunks": 1, "prefetch_depth": 0}
    ring = {"rows_in_backward": "refetched", "active_rows_cap": union, "activation_checkpointing": checkpointing}
    decision = Decision.model_validate(plan.decision.model_dump() | nothing_kept | ring)
    together = request.model_copy(update={"batch_size": request.batch_size * request.grad_accum, "grad_accum": 1})
    window = predict(together, decision, profiles, replayed=False)
    one = _with_checkpointing(request, decision, profiles, checkpointing)
    shape = request.model
    kept = shape.num_layers * request.tokens_per_step * shape.hidden_size * BF16_BYTES
    if not checkpointing:
        kept += _peak(one) - _peak(_with_checkpointing(request, decision, profiles, True))
    tasks = simulated_tasks(together, decision, profiles, window.sparsity)
    update = sum(task.end_seconds - task.start_seconds for task in tasks if task.name == "adamw")
    busy = window.timing.busy_seconds
    seconds = max(*(busy[lane] for lane in LANES if lane != "cpu"), busy["cpu"] - update) + update
    return {
        "moved_bytes": window.transfer.window_bytes(1),
        "seconds": seconds,
        "device_bytes": _peak(one) + (request.grad_accum - 1) * kept,
        "seconds_per_part": seconds / request.grad_accum,
        "checkpointing": checkpointing,
    }


def _with_checkpointing(request: Request, decision: Decision, profiles: ProfileSet, on: bool) -> Prediction:
    chosen = decision.model_copy(update={"activation_checkpointing": on})
    return predict(request, chosen, profiles, replayed=False)


def _peak(prediction: Prediction) -> int:
    peak = prediction.device_memory.peak_allocated_bytes_at_cap
    assert peak is not None
    return peak


def said(row: dict[str, Any]) -> str:
    """For people."""
    ways = []
    for name in ("as planned", "vertical", "vertical, checkpointing", "one batch"):
        way = row[name]
        figures = "nothing fits"
        if way is not None:
            figures = (
                f"{way['moved_bytes'] / 2**30:5.2f} GiB moved, {1e3 * way['seconds_per_part']:5.0f} ms a micro-batch, "
                f"{way['device_bytes'] / 2**30:5.1f} GiB"
            )
        ways.append(f"  {name:24} {figures}")
    return "\n".join([f"window of {row['grad_accum']}, width {row['adapter_width']}", *ways])


@click.command(context_settings={"show_default": True})
@click.option("--gpu", default="rtx-3090")
@click.option("--batch-size", default=2)
@click.option("--seq-len", default=256)
@click.option("--results", type=click.Path(path_type=Path), help="Append a JSON line for each row.")
def main(gpu: str, batch_size: int, seq_len: int, results: Path | None) -> None:
    """Price every window and width."""
    for grad_accum in WINDOWS:
        for width in WIDTHS:
            sizes = {"seq_len": seq_len, "width": width}
            plan = planned(gpu, batch_size=batch_size, grad_accum=grad_accum, **sizes)
            if plan is None:
                click.echo(f"window of {grad_accum}, width {width}: nothing fits")
                continue
            together = planned(gpu, batch_size=batch_size * grad_accum, grad_accum=1, **sizes)
            row = {
                "gpu": gpu,
                "micro_batch": f"{batch_size}x{seq_len}",
                "grad_accum": grad_accum,
                "adapter_width": width,
                "as planned": of_plan(plan, grad_accum),
                "vertical": vertical(plan, checkpointing=False),
                "vertical, checkpointing": vertical(plan, checkpointing=True),
                "one batch": of_plan(together, grad_accum),
            }
            click.echo(said(row))
            append(results, row)


if __name__ == "__main__":
    main()
