"""What may be asked for: the options of a plan, and the limits of their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meft.planner.base.dtypes import AdapterDtype, WeightsDtype
from meft.planner.records.plan import Attention, Objective, Routing, RowsInBackward

MAX_BATCH_SIZE = 1 << 14
MAX_SEQ_LEN = 1 << 20
MAX_GRAD_ACCUM = 1 << 16
MAX_WIDTH = 1 << 20
MAX_RANK = 1 << 16
RUNNABLE_WEIGHTS: tuple[WeightsDtype, ...] = ("fp32", "bf16", "nf4")
"""Weights that the runtime trains beside."""


@dataclass(frozen=True)
class RequestOptions:
    """What the options say of the workload, the budgets and the choices; ``None`` where an option was not given."""

    model: str | None
    gpu: str | None
    gpu_mem: int | None
    host_mem: int | None
    host: str | None
    link: str | None
    sparsity: str | None
    batch_size: int
    seq_len: int
    grad_accum: int
    weights_dtype: WeightsDtype | None
    double_quant: bool | None
    adapter_dtype: AdapterDtype | None
    attention: Attention | None
    activation_checkpointing: bool | None
    objective: Objective = "capacity"
    max_slowdown: float | None = None
    min_trainable: float | None = None
    adapter_width: int | None = None
    top_k: int | None = None
    prefetch_depth: int | None = None
    routing: Routing | None = None
    rows_in_backward: RowsInBackward | None = None
    hot_rows: int | None = None
    bf16_copy: bool | None = None
    context_overhead: int | None = None
    active_rows_quantile: float | None = None

    @classmethod
    def taken_from(cls, given: dict[str, Any]) -> RequestOptions:
        """Take this record's fields out of a command's arguments."""
        return cls(**{name: given.pop(name) for name in cls.__dataclass_fields__ if name in given})
