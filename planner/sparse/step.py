"""MEFT's step, simulated: the frozen model with the sparse adapter beside every FFN, as the runtime makes and frees it.

What is made once (rings, sums, hot tables, routers) comes first, in the order in which a session opens; then the step
that repeats, a micro-batch or two and the optimizer step. Whatever is as large as the active rows lies in memory for
as many rows as there may ever be, so one stream stands for all steps.

The emulated device runs the CPU's operators under a dispatch mode: gradients that meet are summed out of place, there
is no cuBLAS workspace, and attention has one kernel for all.

Letters: ``T`` tokens, ``D`` hidden size, ``A`` rows at the cap, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from meft.planner.base.quantities import INDEX_BYTES, MASTER_BYTES
from meft.planner.models.linears import linear_layers
from meft.planner.records.plan import Decision, Request
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.autograd import Leaf, Tape, Tensor
from meft.planner.simulation.decoder import Decoder, ModelWeights
from meft.planner.simulation.operators import Operators
from meft.planner.simulation.optimizers import HotStep, squared_router_norm, update_routers
from meft.planner.simulation.positions import positions_from_labels
from meft.planner.simulation.run import Loader
from meft.planner.simulation.stream import StreamEvent
from meft.planner.sparse.adapter import Adapter, ChunkedAdapter, Exchange
from meft.planner.terms.adapter import CAST_ROWS
from meft.planner.terms.formats import FP32, INT64, STORED
from meft.planner.traffic.chunks import chunk_ring_slots
from meft.planner.traffic.sharding import shard_bytes

MICRO_BATCHES_THAT_DIFFER = 2
"""Within an accumulation window all after the first are alike."""


@dataclass(frozen=True)
class SparseStream:
    """What is made once, and the windows that repeat: each frees all that it makes.

    ``windows`` are those before hot rows are chosen and those after; or one, where there are none.
    """

    once: tuple[StreamEvent, ...]
    windows: tuple[tuple[StreamEvent, ...], ...]


def simulate_sparse(request: Request, decision: Decision, *, workspace_bytes: int, emulated: bool) -> SparseStream:
    """The stream of a run of ``decision``; ``workspace_bytes`` is what cuBLAS takes per thread, in the first window."""
    tape = Tape(sums_in_place=not emulated)
    run = _SparseRun(tape, request, decision, workspace_bytes=workspace_bytes, emulated=emulated)
    ends = [len(tape.events)]
    ends += [run.window(hot=hot) for hot in ((False, True) if decision.hot_rows else (False,))]
    events = tuple(tape.events)
    windows = [events[first:last] for first, last in itertools.pairwise(ends)]
    first = events[: ends[1]]
    return SparseStream(first, tuple(_repeating(window) for window in windows))


def _repeating(window: tuple[StreamEvent, ...]) -> tuple[StreamEvent, ...]:
    """A window without the tensors that stay for good once it has made them."""
    gone = {event.tensor for event in window if event.num_bytes < 0}
    return tuple(event for event in window if event.tensor in gone)


def setup_of(request: Request, decision: Decision) -> TrainingSetup:
    """What of a plan decides how its model is loaded and runs."""
    return TrainingSetup(
        model=request.model,
        method="meft",
        weights_dtype=request.weights_dtype,
        double_quant=request.double_quant,
        adapter_dtype=request.adapter_dtype,
        batch_size=request.batch_size,
        seq_len=request.seq_len,
        grad_accum=request.grad_accum,
        activation_checkpointing=decision.activation_checkpointing,
        attention=request.attention,
        packed=request.packed,
        outputs_kept=False,
    )


class _SparseRun:
    """A session opened, and its windows."""

    def __init__(
        self, tape: Tape, request: Request, decision: Decision, *, workspace_bytes: int, emulated: bool
    ) -> None:
        self.tape, self.request, self.decision = tape, request, decision
        self.setup = setup_of(request, decision)
        self.loader = Loader(tape, self.setup, shards=request.base_shards)
        weights = self.loader.load()
        self.ops = Operators(tape, workspace_bytes=workspace_bytes, cpu_kernels=emulated)
        self.decoder = self._decoder(weights)
        self.routers = self._router_weights()
        self.buffers = list(self._buffers())
        self.states = self._router_states(emulated=emulated)
        self._attach(weights)

    # --- what a session makes ----------------------------------------------------------------------------------------

    def _decoder(self, weights: ModelWeights) -> Decoder:
        shards, shape, dtype = self.request.base_shards, self.request.model, self.request.weights_dtype
        if shards == 1:
            return Decoder(self.ops, self.setup, weights, counts_positions=True)
        from meft.planner.simulation.gathering import Gathering, ShardedDecoder  # few plans need it

        layers = linear_layers(shape)
        sizes = [shards * shard_bytes(shape, layer, dtype=dtype, shards=shards) for layer in layers]
        first_again = 0 if self.decision.activation_checkpointing else 1
        gathering = Gathering(self.tape, [sizes] * shape.num_layers, first_again)
        gathering.gather_all()
        return ShardedDecoder(self.ops, self.setup, weights, counts_positions=True, gathering=gathering)

    @property
    def _gated(self) -> bool:
        return self.decision.needs.gated

    def _router_weights(self) -> list[Tensor]:
        shape = self.request.model
        numel = self.decision.needs.router_rows(self.decision.num_experts) * shape.hidden_size or 1
        weights = [self.tape.new(numel, FP32, "router_weights") for _ in range(shape.num_layers)]
        return [self.tape.as_leaf(weight) for weight in weights]

    def _buffers(self) -> list[Tensor]:
        tape, decision, num_layers = self.tape, self.decision, self.request.model.num_layers
        e, row = STORED[self.request.adapter_dtype], 2 * self.request.model.hidden_size
        cap, depth = decision.active_rows_cap, min(decision.prefetch_depth, num_layers - 1)
        made: list[Tensor] = []

        def make(count: int, numel: int, itemsize: int, category: str) -> None:
            made.extend(tape.new(numel, itemsize, category) for _ in range(count))

        chunks = decision.token_chunks
        slots = num_layers if decision.rows_in_backward == "retained" else depth + 1
        if chunks > 1:
            slots = int(chunk_ring_slots(prefetch_depth=depth, num_layers=num_layers))
        make(slots, cap * row, e, "row_staging")
        if decision.cached_rows:
            make(num_layers, decision.cached_rows * row, e, "kept_rows")
        if decision.gradients_on_device:
            make(num_layers, decision.cached_rows * row, MASTER_BYTES, "gradient_sums")
        for _ in range(num_layers if decision.hot_rows else 0):
            make(1, decision.hot_rows * row, e, "hot_rows")
            make(3 + (e != MASTER_BYTES), decision.hot_rows * row, MASTER_BYTES, "hot_states")
            make(2, decision.hot_rows, INDEX_BYTES, "hot_states")
        if decision.cached_rows or decision.hot_rows or chunks > 1:
            make(num_layers * chunks, cap, INDEX_BYTES, "row_indices")
        if (decision.gradients_on_device or decision.hot_rows) and e != MASTER_BYTES:
            make(1, CAST_ROWS * row, MASTER_BYTES, "gradient_sums")
        if self._gated:
            make(num_layers * chunks, cap, INDEX_BYTES, "row_indices")
        make(min(depth, 1) + 1, cap * row, e, "row_gradients")
        return made

    def _router_states(self, *, emulated: bool) -> list[Tensor]:
        made: list[Tensor] = []
        for weight in self.routers if self._gated else ():
            assert isinstance(weight.node, Leaf)
            weight.node.grad = self.tape.like(weight, "router_gradients")
            made += [self.tape.like(weight, "router_moments") for _ in range(2)]
            if emulated:
                made += [self.tape.new(1, FP32, "router_moments")]  # the count of steps, which CUDA leaves on the host
        return made

    def _attach(self, weights: ModelWeights) -> None:
        num_layers = self.request.model.num_layers
        depth = self.decision.prefetch_depth if self.decision.token_chunks == 1 else 0  # chunks look at their own layer
        self.exchange = Exchange(min(depth, num_layers - 1), num_layers)
        for index, block in enumerate(weights.blocks):
            kind = Adapter if self.decision.token_chunks == 1 else ChunkedAdapter
            block.beside_ffn = kind(self.ops, self.request, self.decision, index, self.routers, self.exchange)

    # --- a window ----------------------------------------------------------------------------------------------------

    def window(self, *, hot: bool) -> int:
        """Its micro-batches, as far as they differ, and the optimizer step; how many events there are then."""
        self.exchange.hot = hot
        for _ in range(min(self.request.grad_accum, MICRO_BATCHES_THAT_DIFFER)):
            self._micro_batch()
        self.tape.phase = "optimizer_step"
        self._optimizer_step()
        return len(self.tape.events)

    def _micro_batch(self) -> None:
        tape = self.tape
        tape.phase = "forward"
        loss = self._loss_of_batch()
        tape.phase = "loss"
        self.exchange.held.clear()
        scaled = self.ops.scale(loss, "loss_chain")
        start = tape.new(1, FP32, "loss_chain")
        tape.backward(scaled, start)

    def _loss_of_batch(self) -> Tensor:
        tape, tokens = self.tape, self.request.tokens_per_step
        inputs = tuple(tape.new(tokens, INT64, "inputs") for _ in range(2))
        positions = positions_from_labels(tape, self.setup)
        hidden = self.decoder.hidden_states(None, positions)
        tape.phase = "loss"
        hidden = self.decoder.final_hidden(hidden)
        logits = self.decoder.logits(hidden)
        wide = self.ops.cast(logits, FP32, "loss_chain")
        padded = tape.new(tokens + self.request.batch_size, INT64, "loss_chain")
        targets = padded  # a view, contiguous as it is, of a single sequence
        if self.request.batch_size > 1:
            targets = tape.new(tokens, INT64, "loss_chain")
        loss = self.ops.cross_entropy(wide, targets)
        del padded, wide, hidden, logits, inputs, positions
        return loss

    # --- the optimizer step ------------------------------------------------------------------------------------------

    def _optimizer_step(self) -> None:
        shape = self.request.model
        hot = HotStep(self.tape, shape.num_layers, 2 * shape.hidden_size, self.decision.hot_rows)
        if self._gated:
            squared_router_norm(self.tape, self.routers)
        if self.exchange.hot:
            hot.squared_norm()
        if self._gated:
            update_routers(self.tape, self.routers)
        if self.exchange.hot:
            hot.update()
