"""The plan: what was asked, what was decided, what is predicted, and from which numbers.

Letters: ``B`` micro-batch, ``S`` sequence length, ``T = B*S`` tokens, ``L`` layers, ``D`` hidden size, ``R`` adapter
rows per layer (the adapter width), ``K`` rows per token, ``A`` active rows, ``N`` experts, ``P`` probes.
A *step* is one micro-batch forward and backward unless a name says ``optimizer_step``.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from meft.planner.base.dtypes import AdapterDtype, WeightsDtype
from meft.planner.base.schema import Basis, Bytes, Count, File, Fraction, Index, Rate, Record, Seconds
from meft.planner.models.architecture import ModelShape
from meft.planner.records.routing import ROUTINGS, Routing, RoutingNeeds, StableOptions, SwitchOptions, require_fitting
from meft.planner.records.usual import without_usual

Attention = Literal["sdpa", "flash", "eager"]
Objective = Literal["capacity", "speed", "traffic"]
RowsInBackward = Literal["retained", "refetched"]
TokensSee = Literal["union", "own"]
"""Of the rows that a micro-batch brings, each token's output uses all (as the MEFT paper has it), or its own best K."""
RowsPolicy = Literal["replicated", "owned"]
"""Of several machines: each has all rows, or each its part of them, which the others ask it for."""
Place = Literal["device", "host"]
Phase = Literal["resident", "forward", "loss", "backward", "optimizer_step"]
Direction = Literal["h2d", "d2h"]
Lane = Literal["gpu", "h2d", "d2h", "cpu", "network"]
LANES: tuple[Lane, ...] = ("gpu", "h2d", "d2h", "cpu")
"""Of one machine; several have ``network`` too."""
Way = Direction | Literal["cards", "network"]
"""Where bytes go: over a card's link, between a machine's cards, or between machines."""


class Request(Record):
    """What was asked. ``None`` leaves a choice to the planner."""

    model: ModelShape
    model_path: str | None = None
    """Where the model was read from when it is not a built-in name."""
    gpu: str
    host: str
    link: str
    sparsity: str
    gpu_mem_bytes: Annotated[Bytes, Field(gt=0)]
    host_mem_bytes: Annotated[Bytes, Field(gt=0)]
    host_mem_basis: Literal["given", "this machine"]
    batch_size: Count = 2
    seq_len: Count = 256
    grad_accum: Count = 32
    batch_size_basis: Literal["given", "planned"] = "given"
    """``planned``: only the product of ``batch_size`` and ``grad_accum`` was given, the planner split it."""
    weights_dtype: WeightsDtype = "bf16"
    double_quant: bool = False
    adapter_dtype: AdapterDtype = "bf16"
    attention: Attention = "sdpa"
    packed: bool = False
    """Sequences hold several texts that are kept apart: by a mask where attention has no other means."""
    activation_checkpointing: bool | None = None
    objective: Objective = "capacity"
    max_slowdown: Annotated[float, Field(ge=1.0)] = 1 / 0.63
    min_trainable_fraction: Fraction = 0.10
    active_rows_quantile: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.99
    """Share of micro-batches whose active rows no cap may cut: they vary from batch to batch."""
    adapter_width: Count | None = None
    top_k: Count | None = None
    prefetch_depth: Index | None = None
    routing: Routing | None = None
    switch: SwitchOptions | None = None
    """Of ``routing`` switch; ``None`` for the usual ones."""
    stable: StableOptions | None = None
    """Of ``routing`` stable, the same."""
    rows_in_backward: RowsInBackward | None = None
    hot_rows: Index | None = None
    bf16_copy: bool | None = None
    tokens_see: TokensSee = "union"
    token_chunks: Count | None = None
    """Parts of a micro-batch's tokens whose rows come one after the other; ``None``: one, unless only more fit."""
    gpus: Count = 1
    """Ranks on one machine, each with such a card, that share the host's rows and divide ``grad_accum``."""
    gpus_per_link: Count = 1
    """How many of the cards share one link's bandwidth: those behind one switch, or on one root port's lanes."""
    nodes: Count = 1
    """Machines with ``gpus`` each, and rows on each as ``rows`` says."""
    interconnect_bytes_per_second: Rate | None = None
    """What a machine sends to others, and at once receives; where there are several."""
    rows: RowsPolicy = "replicated"
    shard_base: bool = False
    """Each of a machine's cards has its part of the layers' linear weights, which are gathered layer by layer."""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_usual(handler(self), gpus=1, token_chunks=None)

    @model_validator(mode="after")
    def _divides(self) -> Request:
        if self.grad_accum % self.ranks:
            among = f"gpus {self.gpus}" + (f" x nodes {self.nodes}" if self.nodes > 1 else "")
            raise ValueError(f"grad_accum {self.grad_accum} does not divide among {among}")
        if self.nodes > 1 and self.interconnect_bytes_per_second is None:
            raise ValueError(f"nodes {self.nodes} need interconnect_bytes_per_second")
        if self.rows == "owned" and self.nodes == 1:
            raise ValueError("rows owned are divided among machines, and nodes is 1")
        if self.shard_base and self.gpus == 1:
            raise ValueError("shard_base divides the frozen base among a machine's cards, and gpus is 1")
        require_fitting(self.routing, always=False, switch=self.switch, stable=self.stable)
        return self

    @property
    def ranks(self) -> int:
        """Processes that train together, each with a card."""
        return self.gpus * self.nodes

    @property
    def rounds(self) -> int:
        """Micro-batches of an optimizer step that each rank has."""
        return self.grad_accum // self.ranks

    @property
    def base_shards(self) -> int:
        """Parts that the layers' linear weights are in, one on each card; 1: all are on every card."""
        return self.gpus if self.shard_base else 1

    @property
    def tokens_per_step(self) -> int:
        """``T = B * S``."""
        return self.batch_size * self.seq_len


class Decision(Record):
    """What the planner chose; with the request's workload and dtypes it is all that the runtime obeys."""

    adapter_width: Count
    top_k: Count
    prefetch_depth: Index
    active_rows_cap: Count
    num_experts: Count
    num_probes: Count
    routing: Routing
    rows_in_backward: RowsInBackward
    activation_checkpointing: bool
    cached_rows: Index = 0
    """Rows per layer that stay on the device through an accumulation window: the first that it activates."""
    gradients_on_device: bool = False
    """Gradients of cached rows are summed on the device and sent once per window."""
    bf16_copy: bool = False
    """The host keeps a bf16 copy of the rows to gather from (for a bf16 adapter)."""
    hot_rows: Index = 0
    """Rows per layer that live on the device with their optimizer state: the most often active ones."""
    hot_after_steps: Count = 32
    """Micro-batches that are counted before the hot rows are chosen, at the end of the window that completes them."""
    tokens_see: TokensSee = "union"
    gather_chunks: Count = 1
    """Without look-ahead: in forward a layer's rows are gathered and sent in so many parts, one travels while the next
    is gathered."""
    token_chunks: Count = 1
    """Parts of a micro-batch's tokens, each with a union of rows and a cap of its own, in every layer."""
    switch: SwitchOptions | None = None
    """Of ``routing`` switch, which has them always."""
    rows: RowsPolicy = "replicated"
    """Run on one machine all rows are its own, whatever this says."""
    stable: StableOptions | None = None
    """Of ``routing`` stable, the same."""
    bind_cores: bool = False
    """The host's kernels run on cores of their own, apart from Python and the copies."""

    @property
    def needs(self) -> RoutingNeeds:
        """What the routing takes."""
        return ROUTINGS[self.routing]

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_usual(handler(self), token_chunks=1, gather_chunks=1, bind_cores=False)

    @model_validator(mode="after")
    def _consistent(self) -> Decision:
        if self.top_k > self.adapter_width:
            raise ValueError(f"top_k {self.top_k} is above adapter_width {self.adapter_width}")
        if not self.top_k <= self.active_rows_cap <= self.adapter_width:
            limits = f"top_k {self.top_k} and adapter_width {self.adapter_width}"
            raise ValueError(f"active_rows_cap {self.active_rows_cap} is not between {limits}")
        if self.adapter_width % self.num_experts:
            raise ValueError(f"num_experts {self.num_experts} does not divide adapter_width {self.adapter_width}")
        if self.cached_rows > self.adapter_width:
            raise ValueError(f"cached_rows {self.cached_rows} is above adapter_width {self.adapter_width}")
        if self.gather_chunks > 1 and self.prefetch_depth:
            ahead = f"prefetch_depth {self.prefetch_depth} has rows gathered ahead of time"
            raise ValueError(f"gather_chunks {self.gather_chunks} is for prefetch_depth 0: {ahead}; give 1")
        if self.gradients_on_device and not self.cached_rows:
            raise ValueError("gradients_on_device sums the gradients of cached rows, but cached_rows is 0")
        if self.hot_rows + self.cached_rows > self.adapter_width:
            both = f"hot_rows {self.hot_rows} and cached_rows {self.cached_rows}"
            raise ValueError(f"{both} are more than adapter_width {self.adapter_width}: a hot row is never cached")
        if self.token_chunks > 1:
            self._chunks_consistent()
        if self.rows == "owned":
            self._owned_consistent()
        return self

    def _owned_consistent(self) -> None:
        """Rows that machines own are found expert by expert, and brought for a micro-batch at once."""
        if not self.needs.in_experts:
            many = f"rows owned by machines are scored where they lie, routing {self.routing} scores all in one product"
            raise ValueError(f"{many}: give key-experts, centroid or switch")
        for name, most in {"gather_chunks": 1, "token_chunks": 1, "hot_rows": 0}.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} {getattr(self, name)} beside rows owned by machines: give one of them")

    def _chunks_consistent(self) -> None:
        """A chunk's rows leave the device with it: but for the ring and its neighbour nothing of them is there."""
        if self.needs.means or self.needs.one_expert:
            raise ValueError(
                f"routing {self.routing} chooses for whole micro-batches, beside token_chunks {self.token_chunks}: "
                f"give exact or key-experts"
            )
        kept = {"cached_rows": self.cached_rows, "hot_rows": self.hot_rows}
        for name, rows in kept.items():
            if rows:
                raise ValueError(f"{name} {rows} beside token_chunks {self.token_chunks}: give one of them")
        if self.rows_in_backward == "retained":
            raise ValueError(
                f"token_chunks {self.token_chunks} bound the rows on the device, which rows_in_backward retained would "
                f"all keep: give refetched"
            )

    @model_validator(mode="after")
    def _routes(self) -> Decision:
        if self.num_probes > self.num_experts:
            raise ValueError(f"num_probes {self.num_probes} is above num_experts {self.num_experts}")
        if not self.needs.in_experts and (self.num_experts, self.num_probes) != (1, 1):
            raise ValueError(f"{self.routing} routing scores every row: num_experts and num_probes must be 1")
        if self.needs.one_expert and self.num_probes != 1:
            raise ValueError(f"{self.routing} routing sends a token to one expert: num_probes must be 1")
        require_fitting(self.routing, always=True, switch=self.switch, stable=self.stable)
        if self.num_probes * (self.adapter_width // self.num_experts) < self.top_k:
            raise ValueError(f"the {self.num_probes} probed experts hold fewer rows than top_k {self.top_k}")
        return self


class MemoryEntry(Record):
    """One line of the ledger. A ``resident`` entry counts in every phase, any other in its own phase only."""

    place: Place
    phase: Phase
    category: str
    num_bytes: Bytes
    basis: Basis
    because: str


class ByteRange(Record):
    """A figure that is only known as a range, both ends included."""

    low_bytes: Bytes
    high_bytes: Bytes
    basis: Basis
    source: str


class DeviceMemory(Record):
    """Predicted device memory. ``process_bytes`` is what NVML shows: reserved plus what lives outside the allocator."""

    entries: tuple[MemoryEntry, ...]
    peak_phase: Phase
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes
    reserved_basis: Basis
    context_bytes: ByteRange
    process_bytes: ByteRange
    allocator_budget_bytes: Bytes
    """What the caching allocator may reserve: the GPU memory asked for less the context's upper bound."""
    peak_allocated_bytes_at_cap: Bytes | None = None
    """The peak if every layer's active rows were at the cap, which no batch exceeds; null for methods without one."""
    peak_reserved_bytes_at_cap: Bytes | None = None
    """Reserved at that peak: what the search keeps within the budget."""


class HostPeak(Record):
    """The most that a phase of a run takes of the host's memory, the interpreter and its libraries left out."""

    phase: Literal["loading", "training", "checkpoint", "resume", "evaluation"]
    num_bytes: Bytes
    because: str


class HostBudget(Record):
    """What of the machine's RAM the plan may use, and what its run takes at most."""

    machine_bytes: Bytes
    """The RAM: the request's ``host_mem_bytes``."""
    reserve_bytes: Bytes
    """Of it, what is left to all else."""
    budget_bytes: Bytes
    peaks: tuple[HostPeak, ...]


class HostMemory(Record):
    """Predicted host memory of the adapter, its optimizer and the staging buffers."""

    entries: tuple[MemoryEntry, ...]
    total_bytes: Bytes
    machine: HostBudget | None = None
    """Null in plans of older versions, which might use all of the request's ``host_mem_bytes``."""


class TransferEntry(Record):
    """Bytes of one category in one direction, per step or per optimizer step."""

    direction: Way
    category: str
    per: Literal["step", "optimizer_step", "run"]
    """``run``: over the whole run, when there was need; never predicted."""
    num_bytes: Bytes
    because: str


class Transfer(Record):
    """Predicted traffic over the link, and between machines."""

    entries: tuple[TransferEntry, ...]
    h2d_bytes_per_step: Bytes
    d2h_bytes_per_step: Bytes
    h2d_bytes_per_optimizer_step: Bytes
    d2h_bytes_per_optimizer_step: Bytes
    whole_adapter_offload_ratio: Rate
    """Bytes that moving the whole adapter both ways would cost, over the bytes of this plan."""
    network_bytes_per_step: Bytes = 0
    """Between machines, for one micro-batch."""
    network_bytes_per_optimizer_step: Bytes = 0
    """Between all machines, once per window."""
    cards_bytes_per_step: Bytes = 0
    """From the machine's other cards to one, which sends as much."""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_usual(handler(self))

    def window_bytes(self, grad_accum: int) -> int:
        """Over the link in an accumulation window, both ways, its optimizer step included."""
        step = self.h2d_bytes_per_step + self.d2h_bytes_per_step
        return grad_accum * step + self.h2d_bytes_per_optimizer_step + self.d2h_bytes_per_optimizer_step


class Timing(Record):
    """Predicted time of one step, the optimizer's share of the accumulation window included."""

    step_seconds: Seconds
    baseline_step_seconds: Seconds
    slowdown: Rate
    busy_seconds: dict[Lane, Seconds]
    tokens_per_second: Rate


class Sparsity(Record):
    """Predicted active rows, per layer; with token chunks, sums over a micro-batch's chunks."""

    active_rows_per_layer: tuple[Index, ...]
    window_active_rows_per_layer: tuple[Index, ...]
    """Rows touched in one accumulation window: what the optimizer updates."""
    missing_rows_per_layer: tuple[Index, ...] = ()
    """With cached rows: those of a micro-batch that have to travel, the mean over the window; with token chunks: those
    that the chunk before does not have. Empty: all of them."""
    overflow_rows_per_layer: tuple[Index, ...] = ()
    """With cached rows: missing ones that there is no room to keep; with token chunks: those that travel again in
    backward."""
    kept_rows_per_layer: tuple[Index, ...] = ()
    """With cached rows: how many are on the device at the window's end."""
    hot_rows_per_layer: tuple[Index, ...] = ()
    """With hot rows: those of a micro-batch that are, once they are chosen; they do not travel. Empty: none."""
    quantile: Fraction | None = None
    quantile_rows_per_layer: tuple[Index, ...] = ()
    """Rows that this share of micro-batches does not exceed, as the sparsity profile's spread says."""
    prefetch_recall: Fraction
    basis: Basis


class Prediction(Record):
    """Everything the models say of the decision."""

    device_memory: DeviceMemory
    host_memory: HostMemory
    transfer: Transfer
    timing: Timing
    sparsity: Sparsity
    trainable_parameters: Count
    trainable_fraction: Rate
    """Trainable parameters over the frozen model's; above 1 for an adapter larger than the model."""


class ProfileUsed(Record):
    """A profile that the prediction rests on, by name and digest of its content."""

    kind: Literal["gpu", "link", "host", "sparsity", "model"]
    name: str
    digest: str


class NumberUsed(Record):
    """One profile number that the prediction rests on."""

    name: str
    value: float
    basis: Basis
    source: str


class Inputs(Record):
    """Where the prediction's numbers come from."""

    profiles: tuple[ProfileUsed, ...]
    numbers: tuple[NumberUsed, ...]


class ParetoPoint(Record):
    """A decision that no other beats in capacity, speed (for the objective ``traffic``: traffic, then speed) and device
    memory at once."""

    decision: Decision
    trainable_parameters: Count
    step_seconds: Seconds
    peak_reserved_bytes: Bytes
    host_bytes: Bytes
    moved_bytes_per_step: Bytes | None = None
    """Over the link, both ways, with the optimizer step's share; told where the objective is ``traffic``."""


class SearchSummary(Record):
    """How many decisions were weighed, how many fit, and the best of them."""

    candidates: Index
    feasible: Index
    pareto: tuple[ParetoPoint, ...]


class Verification(Record):
    """The plan's step, traced in the real model's code and replayed through the allocator.

    With the rows that the plan expects, and with those of every layer at the cap, which no batch exceeds.
    """

    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes
    peak_allocated_bytes_at_cap: Bytes
    peak_reserved_bytes_at_cap: Bytes
    cache_flushes_at_cap: Index
    """How often the allocator gives back what it caches to stay within its budget, in two steps."""


class Plan(File):
    """``plan.json``: the whole of it, with its digest."""

    kind: ClassVar[str] = "plan"

    meft_version: str
    request: Request
    decision: Decision
    prediction: Prediction
    inputs: Inputs
    search: SearchSummary
    verification: Verification | None = None
    """What ``--verify`` found; null where it was not asked for."""

    def _repr_html_(self) -> str:
        """What a notebook shows: the decision, and what it needs."""
        from meft.planner.base.html import html_table
        from meft.planner.base.units import format_bytes, format_seconds

        request, decision, predicted = self.request, self.decision, self.prediction
        memory, transfer, timing = predicted.device_memory, predicted.transfer, predicted.timing
        reserved = memory.peak_reserved_bytes_at_cap or memory.peak_reserved_bytes
        rows = [
            ("adapter width", f"{decision.adapter_width:,}"),
            ("K, rows per token", f"{decision.top_k:,}"),
            ("prefetch depth", f"{decision.prefetch_depth}"),
            ("routing", decision.routing),
            ("active rows cap", f"{decision.active_rows_cap:,}"),
            ("activation checkpointing", "on" if decision.activation_checkpointing else "off"),
            ("trainable", f"{predicted.trainable_parameters:,} ({predicted.trainable_fraction:.1%} of the model)"),
            ("device memory", f"{format_bytes(reserved)} of {format_bytes(memory.allocator_budget_bytes)}"),
            (
                "host memory",
                f"{format_bytes(predicted.host_memory.total_bytes)} of {format_bytes(host_budget_of(self))}",
            ),
            ("to the device, per step", format_bytes(transfer.h2d_bytes_per_step)),
            ("to the host, per step", format_bytes(transfer.d2h_bytes_per_step)),
            ("step", f"{format_seconds(timing.step_seconds)} ({timing.tokens_per_second:,.0f} tokens/s)"),
        ]
        title = f"{request.model.name}, {request.batch_size} x {request.seq_len} tokens on {request.gpu}"
        return html_table(f"Plan for {title}", ("", ""), rows)


def host_budget_of(plan: Plan) -> int:
    """What the plan may use of the host's memory."""
    machine = plan.prediction.host_memory.machine
    return plan.request.host_mem_bytes if machine is None else machine.budget_bytes
