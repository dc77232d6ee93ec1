"""How a decision scales over cards that share a host: the same window, divided among 1, 2, 4 and 8 of them."""

from __future__ import annotations

from meft.planner.base.schema import Bytes, Count, Rate, Record
from meft.planner.predict.prediction import ProfileSet, predict
from meft.planner.records.plan import Decision, Lane, Request

NUMBERS_OF_CARDS = (1, 2, 4, 8)


class Scaling(Record):
    """One number of cards."""

    gpus: Count
    tokens_per_second: Rate
    """Of all together."""
    efficiency: Rate
    """Of ``gpus`` times what one card does."""
    host_bytes: Bytes
    busiest: Lane
    """What works longest in a step, and so binds if all else is hidden behind it."""


def scaling(request: Request, decision: Decision, profiles: ProfileSet) -> tuple[Scaling, ...]:
    """For the usual numbers of cards and the one asked for, of those that the window divides among."""
    numbers = sorted({*NUMBERS_OF_CARDS, request.gpus})
    predicted = {
        gpus: predict(request.model_copy(update={"gpus": gpus}), decision, profiles, replayed=False)
        for gpus in numbers
        if request.grad_accum % gpus == 0
    }
    of_one = predicted[1].timing.tokens_per_second
    return tuple(
        Scaling(
            gpus=gpus,
            tokens_per_second=each.timing.tokens_per_second,
            efficiency=each.timing.tokens_per_second / (gpus * of_one),
            host_bytes=each.host_memory.total_bytes,
            busiest=max(each.timing.busy_seconds, key=lambda lane: each.timing.busy_seconds[lane]),
        )
        for gpus, each in predicted.items()
    )
