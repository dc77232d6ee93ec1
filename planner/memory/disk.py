"""Disk that a run writes: the adapter's folder, and checkpoints, which are an adapter's folder and its optimizer's.

Sizes are the tensors' own; a file's header and the JSON beside it take some kilobytes more.

Letters: ``L`` layers, ``R`` adapter rows per layer, ``D`` hidden size, ``N`` experts.
"""

from __future__ import annotations

from meft.planner.base.quantities import MASTER_BYTES, Flags, Ints
from meft.planner.base.schema import Bytes, Record
from meft.planner.memory.host import hot_index_bytes, step_count_bytes, table_bytes
from meft.planner.records.plan import Decision, Request
from meft.planner.terms.activations import choose
from meft.planner.terms.adapter import router_weights_bytes

_MOMENTS = 2
_COUNTED_STEPS_BYTES = 8
"""One int64: in how many steps activations were counted."""
RNG_STATE_BYTES = 5056
"""The state of torch's CPU generator, a Mersenne twister."""


class Disk(Record):
    """What a run of a plan writes. A checkpoint replaces the one before it only once it is whole."""

    adapter_bytes: Bytes
    checkpoint_bytes: Bytes

    @property
    def most_bytes(self) -> int:
        """While one checkpoint takes the place of another."""
        return 2 * self.checkpoint_bytes


def adapter_file_bytes(
    *, num_layers: int, hidden_size: int, adapter_width: Ints, num_experts: Ints, key_experts: Flags
) -> Ints:
    """Keys and values of every row, fp32, ``L * R * 2D``, for Key-Experts the routers, fp32 ``L * N * D``; and in how
    many micro-batches each row was active, int32, and of how many."""
    weights = _weights_bytes(
        num_layers=num_layers,
        hidden_size=hidden_size,
        adapter_width=adapter_width,
        num_experts=num_experts,
        key_experts=key_experts,
    )
    return weights + step_count_bytes(num_layers=num_layers, adapter_width=adapter_width) + _COUNTED_STEPS_BYTES


def _weights_bytes(
    *, num_layers: int, hidden_size: int, adapter_width: Ints, num_experts: Ints, key_experts: Flags
) -> Ints:
    rows = table_bytes(num_layers=num_layers, adapter_width=adapter_width, hidden_size=hidden_size)
    return rows + router_weights_bytes(
        num_layers=num_layers, hidden_size=hidden_size, num_experts=num_experts, key_experts=key_experts
    )


def optimizer_file_bytes(
    *,
    num_layers: int,
    hidden_size: int,
    adapter_width: Ints,
    num_experts: Ints,
    key_experts: Flags,
    hot_rows: Ints = 0,
) -> Ints:
    """Two moments of every row and a count of its updates, which rows are hot, two moments and a count of each router,
    and the random state."""
    weights = _weights_bytes(
        num_layers=num_layers,
        hidden_size=hidden_size,
        adapter_width=adapter_width,
        num_experts=num_experts,
        key_experts=key_experts,
    )
    counts = step_count_bytes(num_layers=num_layers, adapter_width=adapter_width)
    router_counts = choose(key_experts, num_layers * MASTER_BYTES, 0)
    hot = hot_index_bytes(num_layers=num_layers, adapter_width=adapter_width, hot_rows=hot_rows)
    counted = choose(hot_rows > 0, _COUNTED_STEPS_BYTES, 0)
    return _MOMENTS * weights + counts + router_counts + hot + counted + RNG_STATE_BYTES


def disk(request: Request, decision: Decision) -> Disk:
    """Of one decision."""
    sizes = {
        "num_layers": request.model.num_layers,
        "hidden_size": request.model.hidden_size,
        "adapter_width": decision.adapter_width,
        "num_experts": decision.needs.router_rows(decision.num_experts),
    }
    key_experts = decision.needs.gated
    adapter = int(adapter_file_bytes(**sizes, key_experts=key_experts))
    state = int(optimizer_file_bytes(**sizes, key_experts=key_experts, hot_rows=decision.hot_rows))
    return Disk(adapter_bytes=adapter, checkpoint_bytes=adapter + state)
