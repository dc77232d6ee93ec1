"""The report: what a run of a plan observed, beside what the plan predicted."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from meft.planner.base.schema import Bytes, Count, File, Fraction, Index, Record, Seconds
from meft.planner.records.plan import Lane, MemoryEntry, TransferEntry
from meft.planner.records.usual import without_usual


def without_plain_loss(content: dict[str, Any]) -> dict[str, Any]:
    """Other reports stay as they were, byte for byte."""
    return {name: value for name, value in content.items() if (name, value) != ("known_token_weight", 1.0)}


class DeviceUsed(Record):
    """The device that ran the plan."""

    kind: Literal["cuda", "emulated"]
    name: str
    budget_bytes: Bytes
    """What the caching allocator was allowed to reserve."""


class ObservedDeviceMemory(Record):
    """Peaks over the training steps. ``process_bytes`` is NVML's figure, null where NVML cannot see the process."""

    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes
    process_bytes: Bytes | None
    process_bytes_source: str
    entries: tuple[MemoryEntry, ...] = ()
    """What was live at the allocated peak, by category."""


class ObservedHostMemory(Record):
    """Bytes of the adapter's own tables and staging, counted at allocation; and the process as the OS sees it."""

    entries: tuple[MemoryEntry, ...]
    total_bytes: Bytes
    process_rss_bytes: Bytes | None


class ObservedTransfer(Record):
    """Every byte that crossed, as counted by the transfer engine: means per step, rounded to whole bytes."""

    entries: tuple[TransferEntry, ...]
    h2d_bytes_per_step: Bytes
    d2h_bytes_per_step: Bytes
    h2d_bytes_per_optimizer_step: Bytes
    d2h_bytes_per_optimizer_step: Bytes
    h2d_bytes_total: Bytes
    d2h_bytes_total: Bytes
    """Totals over all training steps, optimizer steps left out."""
    nvml_rx_bytes: Bytes | None
    nvml_tx_bytes: Bytes | None
    nvml_source: str
    network_bytes_per_step: Bytes = 0
    network_bytes_per_optimizer_step: Bytes = 0
    network_bytes_total: Bytes = 0
    """Between machines, as counted where it was sent: as the others, of all ranks together."""
    cards_bytes_per_step: Bytes = 0
    cards_bytes_total: Bytes = 0
    """Between a machine's cards, as counted where it came; with what ranks gathered that had no step of their own."""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_usual(handler(self))


class ActiveRows(Record):
    """Active rows of one layer over all steps, after the cap."""

    layer: Index
    mean: float
    median: float | None = None
    p99: float | None = None
    """99 of 100 batches had no more; the largest where there were fewer than 100. Null in reports of older versions."""
    max: Index
    total: Index
    """Sum over steps: with it the transfer model gives the counted bytes exactly (see ``meft-plan audit``)."""
    missing_total: Index | None = None
    """With rows cached on the device: those that travelled, summed over steps; with token chunks: those that the chunk
    before did not have."""
    overflow_total: Index | None = None
    """Those that were not kept; with token chunks: those that travelled again in backward."""
    kept_total: Index | None = None
    """Rows kept at the end of each window, summed over windows."""
    hot_total: Index | None = None
    """With hot rows: active ones that were on the device for good, summed over steps."""
    foreign_total: Index | None = None
    """On several machines: rows whose gradients went to another one, to be added up there."""
    summed_total: Index | None = None
    """On several machines: rows touched in a window, summed over windows; their sums went to all."""
    asked_total: Index | None = None
    """With rows owned by machines: active rows that another one has and sent, forward and backward."""
    scored_total: Index | None = None
    """The same: pairs of a token and an expert whose rows another machine scored."""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_usual(handler(self))


class Observed(Record):
    """What the run measured and counted."""

    steps: Count
    """Steps that this process measured: fewer than ``training.steps`` when the run was resumed."""
    device_memory: ObservedDeviceMemory
    host_memory: ObservedHostMemory
    transfer: ObservedTransfer
    active_rows: tuple[ActiveRows, ...]
    hot_windows: Index = 0
    """Windows at whose end hot rows were updated on the device: all but those before they were chosen."""
    packed: bool | None = None
    """Whether a batch held several texts in a sequence, kept apart; null in reports of older versions."""
    dropped_rows: Index
    """Row selections lost to ``active_rows_cap``, summed over layers and steps."""
    prefetch_recall: Fraction | None
    """Share of the exact choice that look-ahead routing found, measured on one probe batch; null if not measured."""
    step_seconds: Seconds | None
    """Median over steps, null for a rehearsal (nothing was computed)."""
    busy_seconds: dict[Lane, Seconds]
    host_task_seconds: dict[str, Seconds] = Field(default_factory=dict)
    """Of the cpu lane's busy seconds, how many each kind of task takes."""
    waited_seconds: Seconds | None = None
    """Of several ranks: how long a rank waited for the others in a step, in the main thread or beside it."""


class Comparison(Record):
    """One quantity as predicted and as observed."""

    quantity: str
    predicted: float
    observed: float
    ratio: float | None
    """Predicted over observed; null when nothing was observed."""


class Training(Record):
    """What was trained, step by step."""

    steps: Index
    optimizer_steps: Index
    tokens: Index
    sequence_tokens: tuple[Count, ...] = ()
    """Lengths of the data's sequences before any was cut, at equal steps of their quantiles; empty where not known."""
    loss_per_step: tuple[float, ...]
    learning_rate_per_optimizer_step: tuple[float, ...]
    gradient_norm_per_optimizer_step: tuple[float, ...]
    seed: int
    key_init: Literal["random", "ffn"] = "random"
    known_token_weight: Fraction = 1.0
    """What tokens that the model knew already weighed in the losses; written where it is not 1."""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_plain_loss(handler(self))


class ExpertLoad(Record):
    """How a layer's rows and experts were used since training began: from how often each row was updated."""

    layer: Index
    num_experts: Count
    dead_experts: Index
    """Experts none of whose rows was ever active."""
    dead_rows: Index
    busiest_share: Fraction
    """Share of all row updates that went to the busiest expert; ``1 / num_experts`` is an even load."""


class Evaluation(Record):
    """A task's scores at one moment of a run, each the mean over the items, in [0, 1]."""

    task: str
    metric: Literal["em", "iou", "math"]
    optimizer_steps: Index
    """Optimizer steps that the run had done."""
    items: Count
    left_out: Index
    """Entries of the file without a usable gold answer."""
    scores: dict[str, Fraction]
    max_new_tokens: Count
    seconds: Seconds
    rows_per_token: Count | None = None
    """Rows of the adapter that a token met; null: those of training (in reports of older versions all)."""
    min_score: Annotated[float, Field(ge=0.0)] | None = None
    """The least score with which a token met a row; null: any above zero."""


class Report(File):
    """``report.json``."""

    kind: ClassVar[str] = "report"

    meft_version: str
    plan_digest: str
    rehearsal: bool
    device: DeviceUsed
    observed: Observed
    comparison: tuple[Comparison, ...]
    training: Training
    versions: dict[str, str]
    layers: Count
    evaluations: tuple[Evaluation, ...] = ()
    """What ``--eval`` found, during training and after it."""
    expert_load: tuple[ExpertLoad, ...] = ()
    """Per layer; empty for a rehearsal."""
    gpus: Count = 1
    """Ranks that trained together, on each machine."""
    ranks: tuple[Observed, ...] = ()
    """What each of several ranks observed; ``observed`` is then all of it together: bytes, rows and host memory summed,
    the tables that all share counted once (in the first), device memory that of the fullest; host memory of one
    machine."""
    nodes: Count = 1
    """Machines that trained together."""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_usual(handler(self))

    @property
    def num_ranks(self) -> int:
        """Of all machines."""
        return self.gpus * self.nodes
