"""The sparse adapter beside an FFN, simulated: what its forward and backward make and free, as the runtime does.

Letters: ``T`` tokens, ``D`` hidden size, ``A`` rows at the cap, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meft.planner.base.quantities import INDEX_BYTES, chunk_tokens
from meft.planner.records.plan import Decision, Request
from meft.planner.simulation.autograd import GRADIENTS, TEMPORARIES, Gradients, Tape, Tensor
from meft.planner.simulation.decoder import BesideFfn
from meft.planner.simulation.operators import Operators
from meft.planner.terms.formats import BOOL, FP32, INT64, STORED
from meft.planner.traffic.chunks import chunk_ring_slots


@dataclass
class Exchange:
    """What the layers' adapters share: the hidden states that wait until the rows chosen from them are there (as the
    overlapped schedule has it), and the experts that each layer's tokens probe."""

    depth: int
    num_layers: int
    hot: bool = False
    """Hot rows have been chosen."""
    held: dict[int, Tensor] = field(default_factory=dict)
    probes: dict[int, Tensor] = field(default_factory=dict)

    def targets(self, layer: int) -> range:
        """Layers whose rows are chosen from this layer's hidden state."""
        if layer == 0:
            return range(self.depth + 1)
        return range(layer + self.depth, min(layer + self.depth + 1, self.num_layers))


@dataclass
class Adapter(BesideFfn):
    """The adapter beside one FFN. ``weights`` are the routers ``[N, D]``, or the numbers that start the graph."""

    ops: Operators
    request: Request
    decision: Decision
    index: int
    weights: list[Tensor]
    exchange: Exchange

    @property
    def weight(self) -> Tensor:
        """This layer's own."""
        return self.weights[self.index]

    # --- sizes -------------------------------------------------------------------------------------------------------

    @property
    def _tape(self) -> Tape:
        return self.ops.tape

    @property
    def _e(self) -> int:
        return STORED[self.request.adapter_dtype]

    @property
    def _gated(self) -> bool:
        return self.decision.needs.gated

    @property
    def _tokens(self) -> int:
        """``T``, or those of a chunk."""
        return chunk_tokens(self.request.tokens_per_step, self.decision.token_chunks)

    def _of_rows(self, category: str) -> Tensor:
        """``[T, A]``."""
        return self._tape.new(self._tokens * self.decision.active_rows_cap, self._e, category)

    def _of_experts(self, category: str) -> Tensor:
        """``[T, N]``."""
        return self._tape.new(self._tokens * self.decision.num_experts, self._e, category)

    def _probe_indices(self, category: str) -> Tensor:
        return self._tape.new(self._tokens * self.decision.num_probes, INT64, category)

    # --- forward -----------------------------------------------------------------------------------------------------

    def before(self, x: Tensor) -> None:
        """See :class:`BesideFfn`: in forward the hidden state leaves, and the experts are scored for other layers."""
        if self._tape.phase == "backward":
            return
        targets = self.exchange.targets(self.index)
        if targets:
            self.exchange.held[self.index] = x.detached()
        choose = {"switch": self._switch, "stable": self._one}.get(self.decision.routing, self._probe)
        for target in targets if self._gated else ():
            choose(x, target)

    def _probe(self, x: Tensor, target: int) -> None:
        """The best experts of each token, for the layer ``target``."""
        tape, tokens, probes = self._tape, self.request.tokens_per_step, self.decision.num_probes
        inputs = self._cast(x, self._e, "adapter")
        weight = self._cast(self.weights[target], self._e, "adapter")
        scores = tape.new(tokens * self.decision.num_experts, self._e, "adapter")
        del weight
        best = tape.new(tokens * probes, self._e, "adapter")
        indices = tape.new(tokens * probes, INT64, "adapter")
        del best
        self.exchange.probes[target] = tape.new(tokens * probes, INDEX_BYTES, "routing")
        del scores, indices, inputs

    def _switch(self, x: Tensor, target: int) -> None:
        """The one expert of each token, and which of them have no room for it."""
        inputs = self._cast(x, self._e, "adapter")
        read = self._read(inputs, "adapter")
        scores = self._fp32_of_experts("adapter")
        del read
        best = self._of_tokens(INT64, "adapter")
        counted = self._fp32_of_experts("adapter")  # int32, as large
        places = self._of_tokens(INDEX_BYTES, "adapter")
        del counted
        chosen, is_full = self._of_tokens(INDEX_BYTES, "adapter"), self._of_tokens(BOOL, "adapter")
        dropped = self._of_tokens(INDEX_BYTES, "adapter")
        self.exchange.probes[target] = self._of_tokens(INDEX_BYTES, "routing")
        del is_full, dropped, scores, best, places, chosen, inputs

    def _one(self, x: Tensor, target: int) -> None:
        """Stable: the one expert of each token."""
        inputs = self._cast(x, self._e, "adapter")
        read = self._read(inputs, "adapter")
        scores = self._fp32_of_experts("adapter")
        del read
        best = self._of_tokens(INT64, "adapter")
        self.exchange.probes[target] = self._of_tokens(INDEX_BYTES, "routing")
        del best, scores, inputs

    def _read(self, inputs: Tensor, category: str) -> Tensor:
        """What such a router reads ``[T, D]``: random numbers that are multiplied by the inputs, or these in fp32."""
        jitter = self.decision.switch is not None and self.decision.switch.jitter
        return self._tape.new(inputs.numel, FP32, category) if jitter else self._cast(inputs, FP32, category)

    def _of_tokens(self, itemsize: int, category: str) -> Tensor:
        return self._tape.new(self.request.tokens_per_step, itemsize, category)

    def _fp32_of_experts(self, category: str) -> Tensor:
        return self._tape.new(self.request.tokens_per_step * self.decision.num_experts, FP32, category)

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """See :class:`BesideFfn`."""
        return self.ops.add(output, self._adapter(x), "ffn")

    def _adapter(self, x: Tensor) -> Tensor:
        tape = self._tape
        self.exchange.held.pop(max(self.index - self.exchange.depth, 0), None)
        inputs = self._cast(x, self._e, "adapter")
        self.ops.use_workspace()
        activations = self._of_rows("adapter")
        gate = self._gate(inputs) if self._gated else None
        gate_of_row = None if gate is None else self._gate_of_row("adapter")
        if self.decision.tokens_see == "own":
            self._leave_own_rows()
        gated = activations if gate is None else self._of_rows("adapter")
        del gate_of_row
        product = tape.new(x.numel, self._e, "adapter")
        out = self._cast(product, x.itemsize, "adapter")
        kept = (tape.save(inputs), tape.save(activations), tape.save(self.weight), gate and tape.save(gate))
        del inputs, activations, gate, gated, product
        outer, needs_grad = x.itemsize, x.requires_grad

        def backward(grad: Tensor) -> Gradients:
            return self._backward(grad, kept, outer=outer, needs_grad=needs_grad)

        return tape.connect(out, (x, self.weight), backward)

    def _gate(self, inputs: Tensor) -> Tensor:
        """Scores ``[T, N]``, multiplied by the mask of the probed experts; of a switch router probabilities; of a
        stable one those of both routers, ``[T, 2N]``."""
        if self.decision.stable is not None:
            return self._of_both(inputs)
        if self.decision.switch is not None:
            read = self._read(inputs, "adapter")
            scores = self._fp32_of_experts("adapter")
            del read
            return self._fp32_of_experts("adapter")
        cast = self._cast(self.weight, self._e, "adapter")
        scores = self._of_experts("adapter")
        del cast
        mask = self._mask("adapter")
        del mask
        return scores

    def _of_both(self, inputs: Tensor) -> Tensor:
        """Stable, first stage: the scores, and beside them what the loss takes but for single numbers."""
        read = self._read(inputs, "adapter")
        scores = self._fp32_of_both("adapter")
        del read
        index = self._of_tokens(INT64, "adapter")
        light = self._fp32_of_experts("adapter")
        learnt = self._fp32_of_experts("adapter")
        del light
        of_chosen = self._of_tokens(FP32, "adapter")
        del learnt, of_chosen
        gates = self._of_tokens(FP32, "adapter")
        excess = self._excess("adapter")
        del excess, gates, index
        return scores

    def _fp32_of_both(self, category: str) -> Tensor:
        rows = self.decision.needs.router_rows(self.decision.num_experts)
        return self._tape.new(self.request.tokens_per_step * rows, FP32, category)

    def _excess(self, category: str) -> Tensor:
        """How far each token's expert is above its even share, from the tokens counted by expert."""
        is_dropped, inverted = self._of_tokens(BOOL, category), self._of_tokens(INDEX_BYTES, category)
        chosen = self._of_tokens(INDEX_BYTES, category)
        del is_dropped, inverted
        once = self._of_tokens(FP32, category)
        shares = self._tape.new(self.decision.needs.router_rows(self.decision.num_experts), FP32, category)
        del chosen, once
        index = self._of_tokens(INT64, category)
        excess = self._of_tokens(FP32, category)
        del shares, index
        return excess

    def _gate_of_row(self, category: str) -> Tensor:
        """The gate ``[T, A]``; one of an expert is made first, ``[T, N]``, and has the adapter's dtype in the end."""
        if not self.decision.needs.one_expert:
            return self._of_rows(category)
        index = self._of_tokens(INT64, category)
        taken = self._of_tokens(BOOL, category) if self.decision.switch is not None else None
        gate, chosen = self._fp32_of_experts(category), self._of_tokens(FP32, category)
        del chosen
        gate = self._cast(gate, self._e, category)
        del index, taken
        return self._of_rows(category)

    def _mask(self, category: str) -> Tensor:
        mask = self._of_experts(category)
        indices = self._probe_indices(category)
        del indices
        return mask

    def _leave_own_rows(self) -> None:
        """The mask of the others, and each token's best products with their places."""
        tokens, top_k, cap = self._tokens, self.decision.top_k, self.decision.active_rows_cap
        if cap > top_k:
            mask = self._tape.new(tokens * cap, BOOL, "adapter")
            best = self._tape.new(tokens * top_k, self._e, "adapter")
            places = self._tape.new(tokens * top_k, INT64, "adapter")
            del mask, best, places

    def _cast(self, x: Tensor, itemsize: int, category: str) -> Tensor:
        """Inside the adapter's own function nothing is differentiated."""
        return x.detached() if x.itemsize == itemsize else self._tape.new(x.numel, itemsize, category)

    # --- backward ----------------------------------------------------------------------------------------------------

    def _backward(self, grad: Tensor, kept: tuple[Tensor | None, ...], *, outer: int, needs_grad: bool) -> Gradients:
        tape = self._tape
        inputs = kept[0]
        assert inputs is not None
        grad = self._cast(grad, self._e, TEMPORARIES)
        self.ops.use_workspace(backward=True)
        of_products, of_scores, beside = self._of_products()
        self._send_gradients()
        of_hidden = of_weight = None
        if needs_grad:
            of_hidden = tape.new(inputs.numel, self._e, TEMPORARIES)
            if of_scores is not None:
                self._through_router(inputs)
            of_hidden = self._cast(of_hidden, outer, TEMPORARIES)
        if of_scores is not None:
            of_weight = self._of_weight(inputs)
        self.exchange.probes.pop(self.index, None)
        del of_products, beside, of_scores
        return of_hidden, of_weight

    def _of_products(self) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        """Gradients ``[T, A]`` of the products with the keys and ``[T, N]`` of the scores, and what lies beside."""
        of_scores = gate_of_row = None
        if not self._gated:
            of_activations = self._of_rows(TEMPORARIES)
        else:
            gate_of_row = self._gate_of_row(TEMPORARIES)
            product = self._of_rows(TEMPORARIES)
            of_activations = self._of_rows(TEMPORARIES)
            of_scores = self._of_scores()
            del product
        return self._of_rows(TEMPORARIES), of_scores, (of_activations, gate_of_row)

    def _through_router(self, inputs: Tensor) -> None:
        """To the input's gradient comes that through the router: added as it is computed, or fp32 and by itself."""
        if not self.decision.needs.one_expert:
            through = self._cast(self.weight, self._e, TEMPORARIES)
        else:
            through = self._tape.new(inputs.numel, FP32, TEMPORARIES)
            jitter = self.decision.switch is not None and self.decision.switch.jitter
            noise = self._tape.new(inputs.numel, FP32, TEMPORARIES) if jitter else None
            del noise
        del through

    def _of_weight(self, inputs: Tensor) -> Tensor:
        if not self.decision.needs.one_expert:
            return self._cast(self._tape.new(self.weight.numel, self._e, TEMPORARIES), FP32, GRADIENTS)
        read = self._read(inputs, TEMPORARIES)
        of_weight = self._tape.new(self.weight.numel, FP32, GRADIENTS)
        del read
        return of_weight

    def _of_scores(self) -> Tensor:
        """Sum over each expert's rows, by the membership matrix ``[A, N]``."""
        tape, rows = self._tape, self.decision.active_rows_cap
        experts = tape.new(rows, INT64, TEMPORARIES)
        membership = tape.new(rows * self.decision.num_experts, self._e, TEMPORARIES)
        scores = self._of_experts(TEMPORARIES)
        if self.decision.stable is not None:
            scores = self._of_both_scores(scores)
        elif self.decision.switch is not None:
            scores = self._of_probabilities(scores)
        else:
            mask = self._mask(TEMPORARIES)
            del mask
        del experts, membership
        return scores

    def _of_probabilities(self, of_gate: Tensor) -> Tensor:
        index, taken = self._of_tokens(INT64, TEMPORARIES), self._of_tokens(BOOL, TEMPORARIES)
        of_chosen = self._cast(self._of_tokens(self._e, TEMPORARIES), FP32, TEMPORARIES)
        inner = self._of_tokens(FP32, TEMPORARIES)
        scores = self._fp32_of_experts(TEMPORARIES)
        del index, taken, of_chosen, inner, of_gate
        return scores

    def _of_both_scores(self, of_gate: Tensor) -> Tensor:
        """Stable: from the gate's gradient and the loss's that of the scores ``[T, 2N]``."""
        index = self._of_tokens(INT64, TEMPORARIES)
        of_chosen = self._cast(self._of_tokens(self._e, TEMPORARIES), FP32, TEMPORARIES)
        scores = self._fp32_of_both(TEMPORARIES)
        excess = self._excess(TEMPORARIES)
        del excess
        light = self._fp32_of_experts(TEMPORARIES)
        likely = self._fp32_of_experts(TEMPORARIES)
        del light, likely
        minus = self._of_tokens(FP32, TEMPORARIES)
        del minus
        gates = self._of_tokens(FP32, TEMPORARIES)
        del index, of_chosen, gates, of_gate
        return scores

    def _send_gradients(self) -> None:
        if self.exchange.hot:
            once = self._tape.new(self.decision.active_rows_cap, INDEX_BYTES, TEMPORARIES)
            del once


@dataclass
class ChunkedAdapter(Adapter):
    """The same where tokens come in chunks. Its node keeps the hidden state alone, and keeps it first, so that where
    nothing behind keeps anything a recompute ends there; backward computes each chunk's activations again."""

    def _adapter(self, x: Tensor) -> Tensor:
        tape = self._tape
        out = tape.like(x, "adapter")
        kept = (tape.save(x), tape.save(self.weight))
        needs_grad = x.requires_grad

        def backward(grad: Tensor) -> Gradients:
            del grad
            return self._chunks_backward(kept[0], needs_grad=needs_grad)

        tape.connect(out, (x, self.weight), backward)
        self.exchange.held.pop(self.index, None)
        for _ in range(self.decision.token_chunks):
            self._chunk_output(x)
        return out

    def _cast_chunk(self, x: Tensor, category: str) -> Tensor:
        """A chunk of ``[T, D]`` in the adapter's dtype: a view where that is the model's own."""
        numel = self._tokens * self.request.model.hidden_size
        return x.detached() if x.itemsize == self._e else self._tape.new(numel, self._e, category)

    def _activated(self, category: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Activations, gate, and gate of each row."""
        activations = self._of_rows(category)
        gate = self._gate(self.weight) if self._gated else None
        gate_of_row = None if gate is None else self._of_rows(category)
        if self.decision.tokens_see == "own":
            self._leave_own_rows()
        return activations, gate, gate_of_row

    def _chunk_output(self, x: Tensor) -> None:
        inputs = self._cast_chunk(x, "adapter")
        self.ops.use_workspace()
        activations, gate, gate_of_row = self._activated("adapter")
        del inputs, gate, gate_of_row
        product = self._cast_chunk(x, "adapter")
        del activations, product

    def _chunks_backward(self, x: Tensor, *, needs_grad: bool) -> Gradients:
        tape, chunks = self._tape, self.decision.token_chunks
        of_hidden = tape.like(x, TEMPORARIES) if needs_grad else None
        of_weight = tape.like(self.weight, GRADIENTS) if self._gated else None
        num_layers = self.exchange.num_layers
        slots = chunk_ring_slots(prefetch_depth=self.decision.prefetch_depth, num_layers=num_layers)
        travelled = num_layers * chunks - int(slots)
        for chunk in reversed(range(chunks)):
            if self.index * chunks + chunk < travelled and chunk + 1 < chunks:
                targets = tape.new(self.decision.active_rows_cap, INT64, TEMPORARIES)
                del targets
            self._chunk_backward(x, needs_grad=needs_grad)
        self.exchange.probes.pop(self.index, None)
        return of_hidden, of_weight

    def _chunk_backward(self, x: Tensor, *, needs_grad: bool) -> None:
        tape = self._tape
        inputs = self._cast_chunk(x, TEMPORARIES)
        self.ops.use_workspace(backward=True)
        activations, gate, gate_of_row = self._activated(TEMPORARIES)
        del gate_of_row
        grad = self._cast_chunk(x, TEMPORARIES)
        of_products, of_scores, beside = self._of_products()
        del grad
        part = self._cast_chunk(x, TEMPORARIES) if needs_grad else None
        if of_scores is not None:
            if needs_grad:
                weight = self._cast(self.weight, self._e, TEMPORARIES)
                del weight
            of_weight = tape.new(self.weight.numel, self._e, TEMPORARIES)
            del of_weight
        del inputs, activations, gate, of_products, of_scores, beside, part
