"""What ranks of several machines wait for the network between them, and the cards of one for each other's weights.

A machine sends and receives at once, at the rate that was given, whichever of its ranks does; in a message and at a
window's end each rank exchanges three times with its mates (counts, rows' numbers, gradients or sums).

Where machines own rows, the host asks for scores before it chooses, and for rows before it gathers; it has nothing to
do meanwhile but to answer the others, so what that takes is in its own tasks, and the network's lane has the gradients
alone. What both send at once in backward is not taken to slow either.

Cards that share a base and have no link of their own send its weights over PCIe, through the host's memory: a ring's
all-gather, in which each receives ``(N - 1) / N`` of a layer and sends as much, both ways at once. It queues with the
rows, where the two in fact share the link.

Letters: ``M`` machines, ``N`` ranks on each, ``L`` layers, ``T`` tokens, ``P`` probes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.quantities import ADAPTER_DTYPE_BYTES, COMPUTE_DTYPE_BYTES, MASTER_BYTES, Floats, Ints
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Request
from meft.planner.records.profiles import LinkProfile
from meft.planner.timing.gpu import GpuRates
from meft.planner.traffic.network import foreign_row_bytes, foreign_share, summed_row_bytes
from meft.planner.traffic.owned import COUNT_BYTES, SQUARE_BYTES, asked_row_bytes, asked_token_bytes, pair_bytes
from meft.planner.traffic.sharding import layer_shard_bytes
from meft.planner.traffic.transfer import router_gradient_bytes

EXCHANGE_SECONDS = 100e-6
"""Of one exchange, whatever its size: assumed, a round trip over Ethernet (20 to 50 us) and both sides' waking."""
EXCHANGES = 3
COPIES_OF_A_GATHER = 2
"""Kernels, each for all of a layer's matrices."""
SCORE_EXCHANGES = 4
"""For scores: counts, hidden states, probes, and scores back."""


def exchange_between(request: Request, *, rows: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Row gradients ``[L, ...]`` of a micro-batch to the machines that add them up, all of a machine's ranks at once;
    None for one machine."""
    rate = request.interconnect_bytes_per_second
    if request.nodes == 1 or rate is None:
        return None
    ranks, others = request.gpus, request.nodes - 1
    row = foreign_row_bytes(
        hidden_size=request.model.hidden_size, adapter_dtype_bytes=ADAPTER_DTYPE_BYTES[request.adapter_dtype]
    )
    sent = ranks * (rows * foreign_share(request.nodes) * row + others * ranks * COUNT_BYTES)
    return np.asarray(EXCHANGES * EXCHANGE_SECONDS + sent / rate)


def sums_between(request: Request, candidates: Candidates, *, window_rows: Ints) -> Floats:
    """A step's share of the sums of ``window_rows`` (all layers' touched rows) that go to every other machine, and of
    what routers exchange in its round and at the window's end."""
    rate = request.interconnect_bytes_per_second
    if request.nodes == 1 or rate is None:
        return 0.0
    num_layers, hidden_size, share = request.model.num_layers, request.model.hidden_size, foreign_share(request.nodes)
    routers = router_gradient_bytes(
        num_layers=num_layers,
        num_experts=candidates.router_rows,
        hidden_size=hidden_size,
        key_experts=candidates.key_experts,
        ranks=request.ranks,
    )
    latency = EXCHANGES * EXCHANGE_SECONDS
    sums: Floats = num_layers * latency + window_rows * share * summed_row_bytes(hidden_size=hidden_size) / rate
    if candidates.owned:
        sums = num_layers * EXCHANGE_SECONDS + _owners_tell(request, candidates) / rate
    round_of_routers = (routers > 0) * latency + request.gpus * routers * share / rate
    window_of_routers = (routers > 0) * latency + routers * share / rate
    return round_of_routers + (sums + window_of_routers) / request.rounds


def _owners_tell(request: Request, candidates: Candidates) -> Ints:
    """Bytes that a machine sends at a window's end: squares of its rows, and its experts' means."""
    num_layers, nodes, others = request.model.num_layers, request.nodes, request.nodes - 1
    means = candidates.means * request.gpus * candidates.num_experts * request.model.hidden_size * MASTER_BYTES
    told: Ints = num_layers * others * (candidates.adapter_width * SQUARE_BYTES + means) // nodes
    return told


def scores_between(request: Request, candidates: Candidates) -> Floats:
    """What the host waits for scores of a layer's probed experts, where machines own rows: hidden states to all owners,
    and scores back, all of a machine's ranks at once."""
    rate = request.interconnect_bytes_per_second
    if not candidates.owned or request.nodes == 1 or rate is None:
        return 0.0
    tokens, share = request.tokens_per_step, foreign_share(request.nodes)
    token = asked_token_bytes(
        hidden_size=request.model.hidden_size,
        num_probes=candidates.num_probes,
        compute_dtype_bytes=COMPUTE_DTYPE_BYTES[request.weights_dtype],
    )
    scores = (
        candidates.num_probes * share * pair_bytes(rows_per_expert=candidates.adapter_width // candidates.num_experts)
    )
    sent = request.gpus * tokens * ((request.nodes - 1) * token + scores)
    return SCORE_EXCHANGES * EXCHANGE_SECONDS + sent / rate


def rows_between(request: Request, candidates: Candidates, *, rows: NDArray[np.int64]) -> NDArray[np.float64] | float:
    """What the host waits for those of a layer's ``rows`` ``[L, ...]`` that other machines own."""
    rate = request.interconnect_bytes_per_second
    if not candidates.owned or request.nodes == 1 or rate is None:
        return 0.0
    row = asked_row_bytes(
        hidden_size=request.model.hidden_size, adapter_dtype_bytes=ADAPTER_DTYPE_BYTES[request.adapter_dtype]
    )
    sent = request.gpus * rows * foreign_share(request.nodes) * row
    return np.asarray(EXCHANGES * EXCHANGE_SECONDS + sent / rate)


class WeightsSeconds(NamedTuple):
    """Of one layer of a sharded base: what comes to a card, what leaves it, and copying it to and from the buffer."""

    came: float
    sent: float
    unpack: float


def weights_between(request: Request, link: LinkProfile, rates: GpuRates) -> WeightsSeconds | None:
    """Gathering one layer, ``link`` being one card's share of it; None where each card has all of the base."""
    shards, shape, dtype = request.base_shards, request.model, request.weights_dtype
    if shards == 1:
        return None
    part = layer_shard_bytes(shape, dtype=dtype, shards=shards)
    latency = (shards - 1) * link.latency_seconds.value
    one_way = (shards - 1) * part
    copied = 2 * (shards + 1) * part  # read and written: this card's part into the buffer, all parts out of it
    return WeightsSeconds(
        came=latency + one_way / link.duplex_h2d_bytes_per_second.value,
        sent=latency + one_way / link.duplex_d2h_bytes_per_second.value,
        unpack=rates.frozen_seconds(flops=0.0, num_bytes=copied, launches=COPIES_OF_A_GATHER),
    )


def gathered_share(request: Request, candidates: Candidates) -> float:
    """Rows that a host's gathers copy, for each that travels to its device: others' are copied once more, from where
    they came; as many are gathered for others as by others."""
    return 1 + foreign_share(request.nodes) if candidates.owned and request.nodes > 1 else 1.0
