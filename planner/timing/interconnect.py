"""What ranks of several machines wait for the network between them.

A machine sends and receives at once, at the rate that was given, whichever of its ranks does; in a message and at a
window's end each rank exchanges three times with its mates (counts, rows' numbers, gradients or sums).

Letters: ``M`` machines, ``N`` ranks on each, ``L`` layers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.quantities import ADAPTER_DTYPE_BYTES, Floats, Ints
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Request
from meft.planner.traffic.network import NUMBER_BYTES, foreign_row_bytes, foreign_share, summed_row_bytes
from meft.planner.traffic.transfer import router_gradient_bytes

EXCHANGE_SECONDS = 100e-6
"""Of one exchange, whatever its size: assumed, a round trip over Ethernet (20 to 50 us) and both sides' waking."""
EXCHANGES = 3


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
    sent = ranks * (rows * foreign_share(request.nodes) * row + others * ranks * NUMBER_BYTES)
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
    sums = num_layers * latency + window_rows * share * summed_row_bytes(hidden_size=hidden_size) / rate
    round_of_routers = (routers > 0) * latency + request.gpus * routers * share / rate
    window_of_routers = (routers > 0) * latency + routers * share / rate
    return round_of_routers + (sums + window_of_routers) / request.rounds
