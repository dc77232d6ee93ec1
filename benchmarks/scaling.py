"""How does training scale over cards that share one host, and is the planner right about it?

    python benchmarks/scaling.py [--gpu rtx-3090] [--cards 1 --cards 8] [--planned-for 8] [--host-times 2] [--slower 20]
        [--windows 1] [--results FILE]

LLaMA-7B, 8 x 512 tokens a rank. As many processes as cards, each with the runtime's own lanes, exchange, autograd and
Python against a GPU, a link and host kernels that take the time a plan says and do nothing else
(``tests/helpers/timed_device.py``), and the runtime's own shared memory, sums in rank order, division of rows among
owners and waits between them. One decision, by default the planner's for the most cards, on every number of cards; an
accumulation window of 32 micro-batches is divided among them, and timed whole, from when all ranks begin it to when all
are through with it.

What is not measured: that ranks share a host. Each has its share of the host's rates all the time, which is what the
planner assumes. ``--host-times`` multiplies those rates, as a host with so many times the cores and memory channels
would have them.

Every rate is divided by ``--slower``, so a step is the same tasks in the same order so many times as long, and what a
busy machine and Python add counts that much less; seconds in the results are what was measured over ``--slower``.
Whether Python keeps up on a real machine such rows do not say: ``practicality.py`` does, for one card.

A rank that waits for a core holds up all others: run it on a machine with nothing else to do, or as ``nice -n -15``
(where the kernel groups processes by session, in a session of its own whose group has such a priority).

Committed: ``benchmarks/scaling_results.jsonl``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from practicality import GPUS, plan_of, profiles_at
from results_file import append
from timed_ranks import RankWindow, timed_windows

from meft.planner.predict.prediction import ProfileSet, predict, timing_of
from meft.planner.records.plan import Plan
from meft.planner.records.profiles import sourced_numbers

CARDS = (1, 2, 4, 8)
SIZE, GRAD_ACCUM, HOST_MEM = "8x512", 32, "256GB"
LONGEST_FACTOR = 3
"""Of what is predicted: a run that takes longer is given up."""


def on_cards(plan: Plan, cards: int, profiles: ProfileSet) -> Plan:
    """The plan's decision on another number of cards, predicted anew."""
    request = plan.request.model_copy(update={"gpus": cards})
    prediction = predict(request, plan.decision, profiles, replayed=False)
    return plan.model_copy(update={"request": request, "prediction": prediction})


def with_host(profiles: ProfileSet, times: float) -> ProfileSet:
    """The profiles with a host of so many times the rates."""
    rates = {
        name: number.model_copy(update={"value": number.value * times})
        for name, number in sourced_numbers(profiles.host)
        if name.endswith("_per_second")
    }
    return replace(profiles, host=profiles.host.model_copy(update=rates))


def row_of(plan: Plan, profiles: ProfileSet, *, windows: int, slower: float) -> dict[str, Any]:
    """What is predicted and measured of one number of cards; seconds as they would be at the profiles' own rates."""
    request, decision, sparsity = plan.request, plan.decision, plan.prediction.sparsity
    timing = timing_of(request, decision, profiles, sparsity)
    window_seconds = timing.step_seconds * request.rounds
    longest = LONGEST_FACTOR * (windows + 1) * window_seconds
    found = timed_windows(plan, profiles, windows=windows, seconds=60 + longest)
    measured = statistics.median(max(rank[turn].seconds for rank in found) for turn in range(windows))
    every = [window for rank in found for window in rank]
    return {
        "cards": request.gpus,
        "rounds": request.rounds,
        "tokens_per_rank": request.tokens_per_step,
        "slower": slower,
        "windows": windows,
        "adapter_width": decision.adapter_width,
        "top_k": decision.top_k,
        "num_experts": decision.num_experts,
        "num_probes": decision.num_probes,
        "cached_rows": decision.cached_rows,
        "activation_checkpointing": decision.activation_checkpointing,
        "predicted_step_seconds": timing.step_seconds / slower,
        "measured_step_seconds": measured / request.rounds / slower,
        "predicted_busy_seconds": {lane: busy / slower for lane, busy in timing.busy_seconds.items()},
        "given_seconds": {lane: _mean(every, lane) / request.rounds / slower for lane in every[0].given_seconds},
        "predicted_missing_rows": sum(sparsity.missing_rows_per_layer),
        "missing_rows": statistics.fmean(window.missing_rows for window in every) / request.rounds,
        "predicted_tokens_per_second": timing.tokens_per_second * slower,
        "measured_tokens_per_second": request.gpus * request.tokens_per_step * request.rounds * slower / measured,
    }


def _mean(windows: list[RankWindow], lane: str) -> float:
    return statistics.fmean(
        seconds for window in windows for name, seconds in window.given_seconds.items() if name == lane
    )


def rows(
    gpu: str, cards: tuple[int, ...], *, planned_for: int, host_times: float, windows: int, slower: float, **choice: int
) -> Iterator[dict[str, Any]]:
    """A line of the results for each number of cards."""
    plan = plan_of(gpu, SIZE, "p=1", grad_accum=GRAD_ACCUM, host_mem=HOST_MEM, gpus=planned_for, **choice)
    profiles = with_host(ProfileSet.of(plan.request), host_times)
    slowed = with_host(profiles_at(plan, slower), host_times)
    asked = {"gpu": gpu, "host": profiles.host.name, "host_times": host_times, "planned_for": planned_for}
    for each in cards:
        yield asked | row_of(on_cards(plan, each, profiles), slowed, windows=windows, slower=slower)


def said(row: dict[str, Any]) -> str:
    """For people."""
    predicted, measured = row["predicted_step_seconds"], row["measured_step_seconds"]
    busiest = max(row["predicted_busy_seconds"].items(), key=lambda item: item[1])
    return (
        f"{row['gpu']:10} {row['cards']} cards, host x {row['host_times']:g}: step {measured:.3f} s, predicted "
        f"{predicted:.3f} ({measured / predicted - 1:+.1%}); {row['measured_tokens_per_second']:,.0f} tokens/s; "
        f"busiest: {busiest[0]}, {busiest[1] / predicted:.0%} of the step"
    )


@click.command()
@click.option("--gpu", default="rtx-3090", show_default=True, type=click.Choice(sorted(GPUS)))
@click.option("--cards", multiple=True, type=int, default=CARDS, help="[default: 1, 2, 4, 8]")
@click.option("--planned-for", default=8, show_default=True, help="The number of cards that the decision is made for.")
@click.option("--host-times", default=1.0, show_default=True, help="Multiply the host's rates by this.")
@click.option("--width", default=6144, show_default=True)
@click.option("--top-k", default=64, show_default=True)
@click.option("--slower", default=20.0, show_default=True, help="Divide every rate by this.")
@click.option("--windows", default=1, show_default=True, help="Measured, after a short one.")
@click.option("--results", type=click.Path(path_type=Path), help="Append a JSON line for each row.")
def main(results: Path | None, **asked: Any) -> None:
    """Measure each number of cards."""
    for row in rows(**asked):
        click.echo(said(row))
        append(results, row)


if __name__ == "__main__":
    main()
