"""What may be asked for: the options of a plan, and the limits of their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator

from meft.planner.base.dtypes import AdapterDtype, WeightsDtype
from meft.planner.records.plan import Attention, Objective, RowsInBackward, RowsPolicy, TokensSee
from meft.planner.records.routing import BalanceLoss, CapacityFactor, FirstStage, Jitter, Routing

MAX_BATCH_SIZE = 1 << 14
USUAL_BATCH_SIZE = 2
MAX_SEQ_LEN = 1 << 20
MAX_GRAD_ACCUM = 1 << 16
MAX_GPUS = 64
MAX_NODES = 1024
MAX_WIDTH = 1 << 20
MAX_RANK = 1 << 16
MAX_SLOWDOWN = 1000.0
RUNNABLE_WEIGHTS: tuple[WeightsDtype, ...] = ("fp32", "bf16", "nf4")
"""Weights that the runtime trains beside."""

AUTO: Literal["auto"] = "auto"
"""A batch size that is left to the planner."""
BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE, strict=True)]


def _auto_or(value: Any, number: ValidatorFunctionWrapHandler) -> Any:
    return value if value == AUTO else number(value)


if TYPE_CHECKING:
    OpenBatchSize = int | Literal["auto"]
else:  # pydantic would tell of both members of a union where a number is wrong
    OpenBatchSize = Annotated[BatchSize, WrapValidator(_auto_or)]
SeqLen = Annotated[int, Field(ge=1, le=MAX_SEQ_LEN, strict=True)]
GradAccum = Annotated[int, Field(ge=1, le=MAX_GRAD_ACCUM, strict=True)]
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH, strict=True)]
Rows = Annotated[int, Field(ge=0, le=MAX_WIDTH, strict=True)]
Depth = Annotated[int, Field(ge=0, strict=True)]
Chunks = Annotated[int, Field(ge=1, strict=True)]


@dataclass(frozen=True)
class RequestOptions:
    """What the options say of the workload, the budgets and the choices; ``None`` where an option was not given.

    The limits are checked where the options are read: of a command by click, of a call in
    :mod:`meft.planner.front.arguments`.
    """

    model: str | None = None
    gpu: str | None = None
    gpu_mem: int | None = None
    host_mem: int | None = None
    host: str | None = None
    link: str | None = None
    sparsity: str | None = None
    batch_size: OpenBatchSize = USUAL_BATCH_SIZE
    """``auto``: the planner splits the sequences of an optimizer step, as many as usual times ``grad_accum``."""
    seq_len: SeqLen = 256
    grad_accum: GradAccum = 32
    weights_dtype: WeightsDtype | None = None
    double_quant: bool | None = None
    adapter_dtype: AdapterDtype | None = None
    attention: Attention | None = None
    packed: bool | None = None
    activation_checkpointing: bool | None = None
    objective: Objective = "capacity"
    max_slowdown: Annotated[float, Field(ge=1.0, le=MAX_SLOWDOWN)] | None = None
    min_trainable: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    adapter_width: Width | None = None
    top_k: Width | None = None
    prefetch_depth: Depth | None = None
    routing: Routing | None = None
    capacity_factor: CapacityFactor | None = None
    router_jitter: Jitter | None = None
    balance_loss: BalanceLoss | None = None
    first_stage: FirstStage | None = None
    rows_in_backward: RowsInBackward | None = None
    tokens_see: TokensSee | None = None
    token_chunks: Chunks | None = None
    hot_rows: Rows | None = None
    bf16_copy: bool | None = None
    context_overhead: int | None = None
    active_rows_quantile: Annotated[float, Field(gt=0.5, lt=1.0)] | None = None
    gpus: Annotated[int, Field(ge=1, le=MAX_GPUS, strict=True)] = 1
    gpus_per_link: Annotated[int, Field(ge=1, le=MAX_GPUS, strict=True)] = 1
    nodes: Annotated[int, Field(ge=1, le=MAX_NODES, strict=True)] = 1
    rows: RowsPolicy = "replicated"
    shard_base: bool = False
    interconnect: str | None = None

    @classmethod
    def taken_from(cls, given: dict[str, Any]) -> RequestOptions:
        """Take this record's fields out of a command's arguments."""
        return cls(**{name: given.pop(name) for name in cls.__dataclass_fields__ if name in given})
