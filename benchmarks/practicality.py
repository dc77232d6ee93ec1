"""How fast is training with offload, as a share of what it is without, and is the planner right about it?

    python benchmarks/practicality.py [--gpu rtx-3090 ...] [--sizes 2x256 ...] [--grad-accum 32] [--steps 8]
        [--decide gather_chunks=1 ...] [--results FILE]

The runtime's own lanes, exchange, autograd and Python run against a GPU, a link and host kernels that take the time a
plan says and do nothing else (``tests/helpers/timed_device.py``). So of what is measured the GPU's part is the plan's
own, and what scheduling, waiting and Python add to it is real; no card says how right the plan's rates are.

*Step* is an accumulation window's time over its micro-batches: the median of some in mid-window, and what the window's
end takes beyond that, with all the rows that the plan expects to be touched by then. *Practicality* is the time of the
same adapter all on the GPU, with as much recompute, over the step; *of unlimited memory*: without recompute.

``--decide`` changes what the planner decided, so that the same plan can be measured with something and without.

*Predicted* is the plan's step with this machine's Python in it: before each row the same session runs against a device
that takes no time, which tells what the thread that launches needs for each task, and the host's lane for each layer.
*The plan alone* leaves launching out, as plans do whose host's profile does not know it.

``--slower 20`` gives card, link and host a twentieth of their rates: a step is then the same tasks in the same order,
twenty times as long, and what a busy machine adds to it is a twentieth as much of it.

Run it on a machine with nothing else to do, or as ``nice -n -15``.
Committed: ``benchmarks/practicality_results.jsonl``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from results_file import append
from timed_device import TimedClock, small_batch, timed_session

import meft
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import Decision, Plan, Timing
from meft.planner.records.profiles import (
    GpuProfile,
    HostProfile,
    LinkProfile,
    Sourced,
    SparsityProfile,
    sourced_numbers,
)
from meft.planner.timing.step import step_timing
from meft.runtime.device.lanes import Overlapped, Schedule, Sequential
from meft.runtime.profiling.launching import WARM_UP_STEPS, seconds_by_task
from meft.runtime.session.session import Session, WindowEnd

GPUS = {"rtx-3090": "24GB", "rtx-4090": "24GB", "h100-80gb": "80GB"}
SIZES = ("2x256", "8x512", "16x256", "8x1024")
SCHEDULES = ("p=0", "p=1", "p=2", "sequential")
LEARNING_RATE = 1e-3
NO_TIME = 1e-6
"""Part of what everything else takes, where Python is measured."""
LAUNCHED_STEPS = 8
Profile = TypeVar("Profile", GpuProfile, LinkProfile, HostProfile, SparsityProfile)


def profiles_at(plan: Plan, slower: float) -> ProfileSet:
    """The plan's profiles, rates divided and times multiplied."""
    return ProfileSet(
        **{each.name: _slowed(getattr(ProfileSet.of(plan.request), each.name), slower) for each in fields(ProfileSet)}
    )


def _slowed(profile: Profile, by: float) -> Profile:
    factors = {"_per_second": 1 / by, "_seconds": by, "_per_layer": by, "_per_expert": by}
    if by == 1 or isinstance(profile, SparsityProfile):
        return profile
    changed = {
        name: number.model_copy(update={"value": number.value * factor})
        for name, number in sourced_numbers(profile)
        for ending, factor in factors.items()
        if name.endswith(ending)
    }
    return profile.model_copy(update=changed)


def plan_of(gpu: str, size: str, schedule: str, *, width: int, top_k: int, grad_accum: int = 32, **asked: Any) -> Plan:
    """LLaMA-7B with a given width and K, what else is ``asked``, and the rest as the planner chooses."""
    batch_size, seq_len = map(int, size.split("x"))
    depth = 0 if schedule == "sequential" else int(schedule.removeprefix("p="))
    options: dict[str, Any] = {
        "model": "llama-7b",
        "gpu": gpu,
        "gpu_mem": GPUS[gpu],
        "host_mem": "128GB",
        "batch_size": batch_size,
        "seq_len": seq_len,
        "adapter_width": width,
        "top_k": top_k,
        "prefetch_depth": depth,
        "grad_accum": grad_accum,
        "max_slowdown": 10.0,
    }
    return meft.plan(**options | asked)


def with_own_python(plan: Plan, host: HostProfile, schedule: Schedule) -> HostProfile:
    """The profile with what Python takes here: measured where neither card, link nor host take any time."""
    with timed_session(plan, profiles_at(plan, NO_TIME), schedule) as session:
        clock = session.clock
        assert isinstance(clock, TimedClock)
        launching = seconds_by_task(session, clock.launch, small_batch(plan), steps=LAUNCHED_STEPS)
        host_seconds = sum(clock.host_seconds[kind] for kind in ("route", "gather"))
    layers = plan.request.model.num_layers * (WARM_UP_STEPS + LAUNCHED_STEPS)
    own = {f"launch_{task.replace(' ', '_')}_seconds": statistics.median(found) for task, found in launching.items()}
    own |= {"overhead_seconds_per_layer": host_seconds / layers, "overhead_seconds_per_expert": 0.0}
    numbers = {
        name: Sourced(value=seconds, basis="measured", source="against a device that takes no time")
        for name, seconds in own.items()
    }
    return host.model_copy(update=numbers)


def decided(plan: Plan, choices: dict[str, Any]) -> Plan:
    """The plan with some of its decision changed, predicted anew."""
    decision = Decision.model_validate(plan.decision.model_dump() | choices)
    prediction = predict(plan.request, decision, ProfileSet.of(plan.request), replayed=False)
    return plan.model_copy(update={"decision": decision, "prediction": prediction})


def timing_of(plan: Plan, profiles: ProfileSet, *, overlapped: bool) -> Timing:
    """The plan's prediction under either schedule."""
    sparsity = plan.prediction.sparsity
    return step_timing(
        request=plan.request,
        decision=plan.decision,
        gpu=profiles.gpu,
        link=profiles.link,
        host=profiles.host,
        active_rows_per_layer=sparsity.active_rows_per_layer,
        window_active_rows_per_layer=sparsity.window_active_rows_per_layer,
        missing_rows_per_layer=sparsity.missing_rows_per_layer,
        overflow_rows_per_layer=sparsity.overflow_rows_per_layer,
        kept_rows_per_layer=sparsity.kept_rows_per_layer,
        overlapped=overlapped,
    )


def measure(plan: Plan, profiles: ProfileSet, schedule: Schedule, *, steps: int) -> dict[str, Any]:
    """Seconds of a step by the clock; see the module's text."""
    with timed_session(plan, profiles, schedule) as session:
        batch, grad_accum = small_batch(plan), plan.request.grad_accum
        mid = [_seconds(session, batch, grad_accum) for _ in range(steps + 2)][2:]  # two to get going
        step = statistics.median(mid)
        _touch(session, plan)
        started = time.perf_counter()
        session.step(batch, loss_scale=1 / grad_accum, window_end=WindowEnd(LEARNING_RATE, 1.0))
        session.optimizer_step(learning_rate=LEARNING_RATE, max_norm=1.0)
        session.step(batch, loss_scale=1 / grad_accum)
        session.device.synchronize()
        end = time.perf_counter() - started - 2 * step
    return {"mid_step_seconds": step, "window_end_seconds": end, "step_seconds": step + end / grad_accum}


def _seconds(session: Session, batch: Any, grad_accum: int) -> float:
    """Of one micro-batch in mid-window, until the device is through with it."""
    started = time.perf_counter()
    session.step(batch, loss_scale=1 / grad_accum)
    session.device.synchronize()
    return time.perf_counter() - started


def _touch(session: Session, plan: Plan) -> None:
    """As many rows as a window touches, though it was shorter."""
    session.drain()
    for tables, rows in zip(session.store.layers, plan.prediction.sparsity.window_active_rows_per_layer, strict=True):
        tables.touched.zero_()
        tables.touched[:rows] = True


def row_of(gpu: str, size: str, schedule: str, plan: Plan, *, steps: int, slower: float = 1) -> dict[str, Any]:
    """One line of the results."""
    sequential, profiles = schedule == "sequential", profiles_at(plan, slower)
    alone = timing_of(plan, profiles, overlapped=not sequential)
    python = [with_own_python(plan, profiles.host, Sequential() if sequential else Overlapped())]
    measured = measure(plan, profiles, Sequential() if sequential else Overlapped(), steps=steps)
    python.append(with_own_python(plan, profiles.host, Sequential() if sequential else Overlapped()))
    timings = [timing_of(plan, replace(profiles, host=host), overlapped=not sequential) for host in python]
    gpu_seconds = alone.busy_seconds["gpu"]
    return {
        "gpu": gpu,
        "micro_batch": size,
        "schedule": schedule,
        "adapter_width": plan.decision.adapter_width,
        "top_k": plan.decision.top_k,
        "grad_accum": plan.request.grad_accum,
        "cached_rows": plan.decision.cached_rows,
        "gather_chunks": plan.decision.gather_chunks,
        "activation_checkpointing": plan.decision.activation_checkpointing,
        "active_rows": plan.prediction.sparsity.active_rows_per_layer[0],
        "slower": slower,
        "predicted_step_seconds": statistics.fmean(timing.step_seconds for timing in timings),
        "predicted_by_plan_alone_seconds": alone.step_seconds,
        "launching_seconds": statistics.fmean(_launching(host) for host in python) * plan.request.model.num_layers,
        **measured,
        "practicality": gpu_seconds / measured["step_seconds"],
        "practicality_of_unlimited_memory": alone.baseline_step_seconds / measured["step_seconds"],
    }


def _launching(host: HostProfile) -> float:
    """Of one layer, forward and backward."""
    return sum(number.value for name, number in sourced_numbers(host) if name.startswith("launch_"))


def said(row: dict[str, Any]) -> str:
    """For people."""
    predicted, alone = row["predicted_step_seconds"], row["predicted_by_plan_alone_seconds"]
    checkpointing = ", checkpointing" if row["activation_checkpointing"] else ""
    return (
        f"{row['gpu']:10} {row['micro_batch']:7} {row['schedule']:10} window of {row['grad_accum']:2}, "
        f"{row['cached_rows']:4} rows kept, {row['gather_chunks']} parts: step {row['step_seconds']:.3f} s, "
        f"predicted {predicted:.3f} ({row['step_seconds'] / predicted - 1:+.1%}; the plan alone {alone:.3f}, launching "
        f"{row['launching_seconds']:.3f}); "
        f"practicality {row['practicality']:.1%}, of unlimited memory {row['practicality_of_unlimited_memory']:.1%}"
        f"{checkpointing}"
    )


@click.command()
@click.option("--gpu", "gpus", multiple=True, type=click.Choice(sorted(GPUS)), help="[default: all]")
@click.option("--sizes", multiple=True, default=SIZES, help="Micro-batches, as sequences x tokens.")
@click.option("--schedules", multiple=True, type=click.Choice(SCHEDULES), default=SCHEDULES)
@click.option("--grad-accum", default=32, show_default=True)
@click.option(
    "--decide", "choices", multiple=True, help="A field of the decision and its value in JSON, as name=value."
)
@click.option("--width", default=6144, show_default=True)
@click.option("--top-k", default=64, show_default=True)
@click.option("--slower", default=1.0, show_default=True, help="Divide every rate by this.")
@click.option("--steps", default=8, show_default=True, help="Measured in mid-window.")
@click.option("--results", type=click.Path(path_type=Path), help="Append a JSON line for each row.")
def main(
    gpus: tuple[str, ...],
    sizes: tuple[str, ...],
    schedules: tuple[str, ...],
    grad_accum: int,
    choices: tuple[str, ...],
    width: int,
    top_k: int,
    slower: float,
    steps: int,
    results: Path | None,
) -> None:
    """Measure every combination."""
    torch.set_num_threads(1)
    for gpu in gpus or GPUS:
        for size in sizes:
            for schedule in schedules:
                plan = plan_of(gpu, size, schedule, width=width, top_k=top_k, grad_accum=grad_accum)
                if choices:
                    changes = (choice.partition("=") for choice in choices)
                    plan = decided(plan, {name: json.loads(value) for name, _, value in changes})
                row = row_of(gpu, size, schedule, plan, steps=steps, slower=slower)
                click.echo(said(row))
                append(results, row)


if __name__ == "__main__":
    main()
