"""How a decision scales over cards that share a host, and over such machines: the same window, divided among them."""

from __future__ import annotations

from meft.planner.base.schema import Bytes, Count, Rate, Record
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import Decision, Lane, Request

NUMBERS_OF_CARDS = (1, 2, 4, 8)


class Scaling(Record):
    """One number of cards, on one number of machines."""

    gpus: Count
    """On each machine."""
    nodes: Count = 1
    tokens_per_second: Rate
    """Of all together."""
    efficiency: Rate
    """Of ``gpus * nodes`` times what one card does."""
    host_bytes: Bytes
    """Of each machine."""
    busiest: Lane
    """What works longest in a step, and so binds if all else is hidden behind it."""


def scaling(request: Request, decision: Decision, profiles: ProfileSet) -> tuple[Scaling, ...]:
    """For the usual numbers of cards and the one asked for, of those that the window divides among; of several machines
    for one card, one machine, and the usual numbers of machines up to those asked for."""
    if request.nodes == 1:
        numbers = [(gpus, 1) for gpus in sorted({*NUMBERS_OF_CARDS, request.gpus})]
    else:
        machines = sorted({each for each in NUMBERS_OF_CARDS if each < request.nodes} | {request.nodes})
        numbers = sorted({(1, 1)} | {(request.gpus, nodes) for nodes in machines}, key=lambda each: each[0] * each[1])
    predicted = {
        (gpus, nodes): predict(
            request.model_copy(update={"gpus": gpus, "nodes": nodes}), decision, profiles, replayed=False
        )
        for gpus, nodes in numbers
        if request.grad_accum % (gpus * nodes) == 0 and not (decision.rows == "owned" and decision.num_experts % nodes)
    }
    of_one = predicted[1, 1].timing.tokens_per_second
    return tuple(
        Scaling(
            gpus=gpus,
            nodes=nodes,
            tokens_per_second=each.timing.tokens_per_second,
            efficiency=each.timing.tokens_per_second / (gpus * nodes * of_one),
            host_bytes=each.host_memory.total_bytes,
            busiest=max(each.timing.busy_seconds, key=lambda lane: each.timing.busy_seconds[lane]),
        )
        for (gpus, nodes), each in predicted.items()
    )
