"""The device-memory ledger of MEFT: what lies on the device in each phase of a training step, and why.

The closed form that the search weighs candidates with; dense methods are simulated instead (``simulation.run``).

The phases of a step are ``forward`` (the layers), ``loss`` (head, logits and loss, both ways), ``backward`` (the
layers) and ``optimizer_step``; ``resident`` rows count in all of them. Peak allocated is the resident sum plus the
largest phase sum. Backward is taken at its worst moment: near its start everything that was kept is still there.

The same ledger is built from ints for a plan and from numpy int64 arrays for the search. Where layers differ in active
rows: what all keep is summed exactly; what one needs for a while is that of the layer with the most, an upper bound.
What kernels hold within one operation is left out, except cuBLAS workspaces.

Letters: ``B`` batch, ``S`` sequence length, ``T = B*S`` tokens, ``L`` layers, ``D`` hidden size, ``I`` intermediate
size, ``V`` vocabulary, ``R`` adapter rows per layer, ``A`` active rows of a layer, ``p`` prefetch depth, ``q`` bytes of
a hidden-state element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meft.planner.allocator.rounding import MIN_BLOCK_BYTES
from meft.planner.base.dtypes import WeightsDtype
from meft.planner.base.quantities import ADAPTER_DTYPE_BYTES, Flags, Ints
from meft.planner.memory.replayed import ReplayedPeaks, replayed_peaks
from meft.planner.memory.traced import traced_ledger
from meft.planner.models.architecture import ModelShape
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import ByteRange, Decision, DeviceMemory, MemoryEntry, Phase, Request
from meft.planner.records.profiles import GpuProfile
from meft.planner.terms import activations as act
from meft.planner.terms import weights as wts
from meft.planner.terms.activations import choose, largest
from meft.planner.terms.frozen import FrozenLayer, frozen_layer, masked_layers, norm_bytes
from meft.planner.terms.ledger import STEP_PHASES, Row, peak_bytes, phase_bytes
from meft.planner.terms.methods import SparseAdapter, Trained, Workload, trained_by
from meft.planner.traffic.sharding import GATHERED_AT_ONCE, gathered_layer_bytes, layer_shard_bytes, matrices_bytes
from meft.planner.traffic.transfer import input_bytes

CUBLAS_WORKSPACES = 2
"""One per handle and stream: the forward thread's and, once backward has run, the autograd thread's."""

SMALL_BYTES = 1 << 20
OWN_SEGMENT_BYTES, SEGMENT_STEP_BYTES = 10 << 20, 2 << 20
"""As the caching allocator has them (:mod:`meft.planner.allocator.caching`): small blocks are up to 1 MiB, and from 10
MiB on each has a segment of its own, a multiple of 2 MiB."""

_BECAUSE = {
    "linear_weights": "the blocks' linear layers, as stored",
    "other_weights": "embeddings, head, norms, biases: never below 16 bits",
    "rotary_frequencies": "two fp32 buffers of half a head",
    "block_rounding": "what the allocator's blocks hold above the frozen weights, and above the loss's large tensors",
    "inputs": "token ids and labels, int64",
    "norms": "inputs of the norms that backward needs (RMSNorm: in fp32)",
    "attention": "query, key, value, and output and log-sum-exp (fused) or probabilities (eager)",
    "ffn": "inputs of the FFN's activation and product; frozen linear layers keep nothing",
    "adapter": "what the trained part keeps: its inputs and activations",
    "layer_inputs": "activation checkpointing keeps each layer's input and recomputes the rest",
    "embeddings": "token embeddings before positions are added, which require a gradient when checkpointing",
    "rotary_tables": "cosines and sines [1, S, d], shared by all layers",
    "attention_mask": "[B, 1, S, S], additive, for eager attention",
    "routing": "Key-Experts: probes [T, P] of every layer, int32",
    "forward_temporaries": "the FFN's product and output, the residual, the adapter's output",
    "final_norm": "the input of the final norm",
    "loss_chain": "12 bytes per logit: fp32 log-probabilities and two gradients",
    "logit_softcap": "the tanh of the capped logits",
    "backward_temporaries": "gradients in flight at backward's worst moment, net of what is free by then",
    "gathered_weights": "sharded base: the weights of the layer that runs, and the buffer that the next one's come in",
    "dequantized_weight": "the largest quantized linear layer, written out to be multiplied",
    "block_remainders": "what the replayed step holds beyond these lines: whole blocks, whose remainders of up to 1 "
    "MiB are not split off, and tensors of a few KiB",
    "optimizer_temporary": "AdamW's step on the routers, or on some hot rows at a time",
}


# --- what the planner calls -----------------------------------------------------------------------------------------


def predict_device_memory(
    *, request: Request, decision: Decision, gpu: GpuProfile, replayed: bool = True
) -> DeviceMemory:
    """The ledger of a decision and its peaks: allocated, and reserved by replaying the step (see
    :mod:`meft.planner.memory.replayed`).

    It is the same whatever rows are active: what is as large as they are lies in memory for the cap. ``replayed=False``
    is for weighing: reserved is then what is allocated. No mask: the runtime pads on the right and sends none.
    """
    ledger = _decision_ledger(request, decision, gpu)
    counted = int(peak_bytes(ledger))
    peaks = replayed_peaks(request, decision, gpu) if replayed else ReplayedPeaks(counted, counted)
    return device_memory(ledger, peaks, gpu=gpu, gpu_mem_bytes=request.gpu_mem_bytes)


def counted_bytes(*, request: Request, decision: Decision, gpu: GpuProfile) -> int:
    """Peak allocated bytes of a decision by its ledger alone, without a replay."""
    return int(peak_bytes(_decision_ledger(request, decision, gpu)))


def _decision_ledger(request: Request, decision: Decision, gpu: GpuProfile) -> tuple[Row, ...]:
    at_cap = np.full(request.model.num_layers, decision.active_rows_cap, dtype=np.int64)
    return _request_ledger(request, gpu, at_cap, Candidates.of(decision))


def peak_allocated_bytes(
    *, request: Request, gpu: GpuProfile, active_rows: NDArray[np.int64], candidates: Candidates
) -> Ints:
    """Peak allocated bytes by the ledger; ``active_rows`` is int64 ``[L, ...]`` over the candidates' axes."""
    return peak_bytes(_request_ledger(request, gpu, active_rows, candidates))


def device_memory(ledger: Sequence[Row], peaks: ReplayedPeaks, *, gpu: GpuProfile, gpu_mem_bytes: int) -> DeviceMemory:
    """The record of a ledger of ints: its lines above zero, its peaks, and the process on this GPU.

    What the replayed step allocates beyond the lines is a line of its own in the largest phase; where the lines come
    to more, that is the peak: an upper bound.
    """
    totals = phase_bytes(ledger)
    peak_phase: Phase = max(STEP_PHASES, key=lambda phase: int(totals[phase]))
    beyond = peaks.allocated_bytes - int(peak_bytes(ledger))
    if beyond > 0:
        ledger = (*ledger, _row(peak_phase, "block_remainders", beyond))
    reserved = peaks.reserved_bytes
    low, high = gpu.context.low_bytes, gpu.context.high_bytes
    context = ByteRange(low_bytes=low, high_bytes=high, basis=gpu.context.basis, source=gpu.context.source)
    process = ByteRange(
        low_bytes=reserved + low,
        high_bytes=reserved + high,
        basis=gpu.context.basis,
        source="peak reserved and the context",
    )
    allocated = int(peak_bytes(ledger))
    return DeviceMemory(
        entries=tuple(_entry(row) for row in ledger if row.num_bytes),
        peak_phase=peak_phase,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        reserved_basis=peaks.basis,
        context_bytes=context,
        process_bytes=process,
        allocator_budget_bytes=max(gpu_mem_bytes - high, 0),
        peak_allocated_bytes_at_cap=allocated,
        peak_reserved_bytes_at_cap=reserved,
    )


def device_ledger(
    *, shape: ModelShape, workload: Workload, method: SparseAdapter, gpu: GpuProfile | None = None
) -> tuple[Row, ...]:
    """Every line of a step's device memory; ``gpu`` adds its cuBLAS workspaces."""
    if shape.measured is not None:
        return traced_ledger(shape, workload, method)
    step = _Step(shape, workload, frozen_layer(shape, workload), trained_by(shape, workload, method))
    workspaces = () if gpu is None else (workspace_row(gpu),)
    return (
        *_resident_rows(step),
        *workspaces,
        *step.trained.resident,
        *_forward_rows(step),
        *_loss_rows(step),
        *_backward_rows(step),
        *_optimizer_rows(step),
    )


def workspace_row(gpu: GpuProfile) -> Row:
    """The cuBLAS workspaces of a card."""
    num_bytes = CUBLAS_WORKSPACES * math.ceil(gpu.workspace_bytes.value)
    because = "cuBLAS workspaces: one per thread that multiplies, forward's and autograd's"
    return Row("resident", "cublas_workspaces", num_bytes, because, gpu.workspace_bytes.basis)


def _request_ledger(
    request: Request, gpu: GpuProfile, active_rows: NDArray[np.int64], candidates: Candidates
) -> tuple[Row, ...]:
    workload = Workload(
        batch_size=request.batch_size,
        seq_len=request.seq_len,
        weights_dtype=request.weights_dtype,
        double_quant=request.double_quant,
        attention=request.attention,
        packed=request.packed,
        activation_checkpointing=candidates.activation_checkpointing,
        shards=request.base_shards,
    )
    method = SparseAdapter(active_rows, candidates, ADAPTER_DTYPE_BYTES[request.adapter_dtype])
    return device_ledger(shape=request.model, workload=workload, method=method, gpu=gpu)


def _entry(row: Row) -> MemoryEntry:
    return MemoryEntry(
        place="device",
        phase=row.phase,
        category=row.category,
        num_bytes=int(row.num_bytes),
        basis=row.basis,
        because=row.because,
    )


# --- one step -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class _Step:
    """What a phase's rows are computed from."""

    shape: ModelShape
    workload: Workload
    frozen: FrozenLayer
    trained: Trained

    @property
    def whole_layers(self) -> int:
        """Without checkpointing, layers that keep everything: layer 0, where the gradient ends, keeps only what follows
        its FFN."""
        return self.shape.num_layers - 1

    @property
    def one_whole_layer(self) -> Ints:
        """1 if the last layer keeps everything; 0 if it is the first as well. With checkpointing transformers makes the
        embeddings' output require a gradient, so that every layer is whole."""
        return choose(self.checkpointing, 1, min(self.whole_layers, 1))

    @property
    def checkpointing(self) -> Flags:
        return self.workload.activation_checkpointing

    @property
    def hidden(self) -> Ints:
        """One ``[T, D]`` in the compute dtype."""
        return self.workload.tokens * self.shape.hidden_size * self.workload.compute_bytes

    @property
    def norm(self) -> Ints:
        """What one norm over ``[T, D]`` keeps."""
        return norm_bytes(self.shape, self.workload)

    @property
    def logits(self) -> Ints:
        return act.logits_bytes(
            tokens=self.workload.tokens,
            vocab_size=self.shape.vocab_size,
            compute_bytes=self.workload.compute_bytes,
        )


def _row(phase: Phase, category: str, num_bytes: Ints) -> Row:
    return Row(phase, category, num_bytes, _BECAUSE[category])


# --- rows by phase --------------------------------------------------------------------------------------------------


def _resident_rows(step: _Step) -> tuple[Row, ...]:
    shape, dtype, shards = step.shape, step.workload.weights_dtype, step.workload.shards
    linear = wts.linear_weights_bytes(shape, dtype=dtype, double_quant=step.workload.double_quant)
    if shards > 1:
        part = shape.num_layers * layer_shard_bytes(shape, dtype=dtype, shards=shards)
        linear += part - matrices_bytes(shape, dtype=dtype)
    return (
        _row("resident", "linear_weights", linear),
        _row("resident", "other_weights", wts.other_weights_bytes(shape, dtype=dtype)),
        _row("resident", "rotary_frequencies", wts.rotary_frequencies_bytes(shape)),
        _row("resident", "block_rounding", weights_rounding_bytes(shape, dtype, step.workload.double_quant, shards)),
        _row("resident", "inputs", input_bytes(tokens=step.workload.tokens)),
    )


def weights_rounding_bytes(shape: ModelShape, dtype: WeightsDtype, double_quant: bool, shards: int = 1) -> int:
    """What the allocator's blocks hold above the frozen weights: those of many models are all cut to measure, and of
    the others the loading is simulated."""
    if dtype != "nf4" and shape.stored is None and shards == 1:
        sizes = wts.tensor_sizes_bytes(shape, dtype=dtype)
        if all(map(_cut_to_measure, sizes)):
            return sum(-num_bytes % MIN_BLOCK_BYTES for num_bytes in sizes)
    from meft.planner.simulation.run import loaded_rounding_bytes  # slow to load, and often not needed

    return loaded_rounding_bytes(shape, dtype, double_quant, shards)


def _cut_to_measure(num_bytes: int) -> bool:
    """Whether a tensor's block is its size, rounded up to 512 bytes, whatever came before it: small ones are always cut
    off, and large ones get a segment of just their size when nothing is left over of another's."""
    return num_bytes <= SMALL_BYTES or (num_bytes >= OWN_SEGMENT_BYTES and num_bytes % SEGMENT_STEP_BYTES == 0)


def _forward_rows(step: _Step) -> tuple[Row, ...]:
    return (
        *_kept_rows("forward", step),
        *_shared_rows("forward", step, inputs=step.shape.num_layers),
        _row("forward", "forward_temporaries", _forward_temporaries(step)),
        _row("forward", "gathered_weights", _gathered(step)),
    )


def _forward_temporaries(step: _Step) -> Ints:
    """What the last layer has in flight: the product in its FFN, or its adapter, beside residual and output.

    Without checkpointing what the layer keeps is counted already, what it has not made yet comes off; with
    checkpointing the FFN's factors and the adapter's activations come on top.
    """
    inner = step.workload.tokens * step.shape.intermediate_size * step.workload.compute_bytes
    factors = 3 if step.shape.gated_mlp else 2
    ffn = 2 * step.hidden + choose(
        step.checkpointing, factors * inner + step.hidden, inner - step.frozen.norms_after_ffn - step.trained.kept_last
    )
    kept = choose(step.checkpointing, step.trained.kept_most, -step.frozen.norms_after_ffn)
    return largest(ffn, 2 * step.hidden + step.trained.forward + kept)


def _loss_rows(step: _Step) -> tuple[Row, ...]:
    tokens, vocab_size = step.workload.tokens, step.shape.vocab_size
    return (
        *_kept_rows("loss", step),
        *_shared_rows("loss", step, inputs=step.shape.num_layers),
        _row("loss", "final_norm", step.norm),
        _row("loss", "loss_chain", act.loss_chain_bytes(tokens=tokens, vocab_size=vocab_size)),
        _row("loss", "block_rounding", act.loss_chain_rounding_bytes(tokens=tokens, vocab_size=vocab_size)),
        _row("loss", "logit_softcap", step.logits if step.shape.logit_softcap else 0),
    )


def _backward_rows(step: _Step) -> tuple[Row, ...]:
    """The last layer goes backward; with checkpointing it has been recomputed."""
    trained = step.trained
    kept = _layer_rows(step, whole=step.whole_layers, layers=step.shape.num_layers, trained=trained.kept_all)
    one = _layer_rows(step, whole=1, layers=1, trained=trained.kept_most)
    held = tuple(
        _row("backward", first.category, choose(step.checkpointing, first.num_bytes, every.num_bytes))
        for first, every in zip(one, kept, strict=True)
    )
    shared = _shared_rows("backward", step, inputs=step.shape.num_layers - _inputs_kept_twice(step))
    dequantized = wts.dequantized_bytes(step.shape, dtype=step.workload.weights_dtype)
    return (
        *held,
        *shared,
        _row("backward", "backward_temporaries", _backward_temporaries(step)),
        _row("backward", "dequantized_weight", dequantized),
        _row("backward", "gathered_weights", _gathered(step)),
    )


def _gathered(step: _Step) -> int:
    """Of a sharded base the layer that runs, and the buffer in which the next one's weights come: ``2W``."""
    dtype, shards = step.workload.weights_dtype, step.workload.shards
    return GATHERED_AT_ONCE * gathered_layer_bytes(step.shape, dtype=dtype, shards=shards)


def _optimizer_rows(step: _Step) -> tuple[Row, ...]:
    return (_row("optimizer_step", "optimizer_temporary", step.trained.optimizer_temporary),)


def _kept_rows(phase: Phase, step: _Step) -> tuple[Row, ...]:
    """All that is kept for backward; with checkpointing nothing but the layers' inputs, which are shared rows."""
    rows = _layer_rows(step, whole=step.whole_layers, layers=step.shape.num_layers, trained=step.trained.kept_all)
    return tuple(_row(phase, row.category, choose(step.checkpointing, 0, row.num_bytes)) for row in rows)


def _layer_rows(step: _Step, *, whole: Ints, layers: int, trained: Ints) -> tuple[Row, ...]:
    """What ``layers`` layers keep, of which ``whole`` keep everything before their FFN and in it."""
    frozen = step.frozen
    masked = masked_layers(step.shape, whole, packed=step.workload.packed)
    return (
        _row("backward", "norms", whole * frozen.norms + layers * frozen.norms_after_ffn),
        _row("backward", "attention", whole * frozen.attention + masked * frozen.masked),
        _row("backward", "ffn", whole * frozen.ffn),
        _row("backward", "adapter", trained),
    )


def _shared_rows(phase: Phase, step: _Step, *, inputs: int) -> tuple[Row, ...]:
    """What layers share: rotary tables and masks; with checkpointing, layer inputs."""
    shape, workload = step.shape, step.workload
    q = workload.compute_bytes
    layer_inputs = act.layer_inputs_bytes(
        tokens=workload.tokens, num_layers=inputs, hidden_size=shape.hidden_size, compute_bytes=q
    )
    rotary: Ints = 0
    if not shape.learned_positions:
        positions = workload.tokens if workload.packed else workload.seq_len
        one_set = act.rotary_tables_bytes(positions=positions, head_dim=shape.head_dim, compute_bytes=q)
        rotary = shape.rotary_sets * one_set
    masks = act.masks_bytes(
        shape,
        batch_size=workload.batch_size,
        seq_len=workload.seq_len,
        compute_bytes=q,
        attention=workload.attention,
        packed=workload.packed,
    )
    return (
        _row(phase, "layer_inputs", choose(step.checkpointing, layer_inputs, 0)),
        _row(phase, "embeddings", choose(step.checkpointing, step.hidden if shape.learned_positions else 0, 0)),
        _row(phase, "rotary_tables", rotary),
        _row(phase, "attention_mask", masks if phase == "forward" else choose(step.checkpointing, masks, 0)),
        _row(phase, "routing", step.trained.held),
    )


def _inputs_kept_twice(step: _Step) -> int:
    """1 if a recomputed layer's first norm keeps the layer's own input, not a copy of it in fp32."""
    return int(step.shape.norm == "layernorm" or step.workload.compute_bytes == act.FP32_BYTES)


# --- the worst moment of backward -----------------------------------------------------------------------------------


def _backward_temporaries(step: _Step) -> Ints:
    """What backward adds at the worst of five moments near its start, each net of what is free by then."""
    moments = [_final_norm_moment(step), _adapter_moment(step), _ffn_moment(step), _attention_moment(step)]
    if act.norms_after_ffn(step.shape):
        moments.append(step.hidden + _norm_backward_bytes(step))
    return largest(*moments)


def _norm_backward_bytes(step: _Step) -> Ints:
    return act.norm_backward_bytes(
        tokens=step.workload.tokens,
        hidden_size=step.shape.hidden_size,
        layernorm=step.shape.norm == "layernorm",
        compute_bytes=step.workload.compute_bytes,
    )


def _final_norm_moment(step: _Step) -> Ints:
    """The final norm goes backward: all layers are whole, but with checkpointing none is recomputed yet; of a sharded
    base no weights are there."""
    one_layer = step.frozen.total + step.trained.kept_most
    return step.norm + _norm_backward_bytes(step) - choose(step.checkpointing, one_layer, 0) - _gathered(step)


def _adapter_moment(step: _Step) -> Ints:
    """What is trained in the last layer, beside the gradient of the layer's output."""
    return step.hidden + step.trained.backward - step.frozen.norms_after_ffn


def _free_before_ffn(step: _Step) -> Ints:
    free = choose(step.checkpointing, step.trained.free_most, step.trained.free_last)
    return step.frozen.norms_after_ffn + free


def _ffn_moment(step: _Step) -> Ints:
    """The FFN of the last layer, beside the gradient of its output."""
    ffn = act.mlp_backward_bytes(
        tokens=step.workload.tokens,
        intermediate_size=step.shape.intermediate_size,
        gated=step.shape.gated_mlp,
        activation=step.shape.activation,
        compute_bytes=step.workload.compute_bytes,
    )
    return step.hidden + ffn + step.trained.beside_ffn - _free_before_ffn(step)


def _attention_moment(step: _Step) -> Ints:
    """The attention of the last layer: its FFN is done, and unless the two are parallel the norm between them."""
    parallel = step.shape.parallel_blocks
    before: Ints = step.frozen.ffn if parallel else step.frozen.ffn + step.norm
    freed: Ints = step.one_whole_layer * before + _free_before_ffn(step)
    attention = act.attention_backward_bytes(
        step.shape,
        tokens=step.workload.tokens,
        seq_len=step.workload.seq_len,
        compute_bytes=step.workload.compute_bytes,
        attention=step.workload.attention,
    )
    return (2 if parallel else 1) * step.hidden + attention - freed
