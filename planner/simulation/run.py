"""One training run, simulated: what is loaded, attached, and then made and freed in two steps, in order.

The second step is the one that repeats: the optimizer's states exist, the previous step's outputs are still held, and
autograd's thread has its cuBLAS workspace. No number is computed and nothing outside is asked; a 7B model takes some
tens of milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

from meft.planner.allocator.cublas import USUAL_BYTES
from meft.planner.base.dtypes import WeightsDtype
from meft.planner.models.architecture import ModelShape
from meft.planner.models.linears import Linear, is_stored, linear_layers
from meft.planner.records.plan import Phase
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.autograd import Tape, Tensor
from meft.planner.simulation.decoder import SCALED_EMBEDDINGS, BlockWeights, Decoder, ModelWeights
from meft.planner.simulation.ladder import Laddered, LadderWeights, load_ladder
from meft.planner.simulation.lora import Lora
from meft.planner.simulation.losses import Losses
from meft.planner.simulation.offloading import HostOffloader
from meft.planner.simulation.operators import Operators, QuantizedWeights, Weights
from meft.planner.simulation.optimizers import Optimizer, Parameter
from meft.planner.simulation.peft import FACTORS, PROMPT, factor_sizes, has_closed_form, running, trained_sizes
from meft.planner.simulation.stream import Stream, stream_peaks
from meft.planner.terms.activations import attention_used, masks_per_model
from meft.planner.terms.formats import BF16, FP32, INT64, STORED
from meft.planner.terms.lengths import BatchShape
from meft.planner.terms.offload import OFFLOADING
from meft.planner.terms.weights import DOUBLE_QUANT_BLOCK, NF4_BLOCK, linear_parameters, stored_tensors_bytes
from meft.planner.traffic.sharding import shard_bytes

NF4_CODE_NUMBERS = 16
DYNAMIC_CODE_NUMBERS = 256
NUM_STEPS = 2
MICRO_BATCHES_THAT_DIFFER = 2
"""The first of an accumulation window makes the gradients; in all others they are there. The first step, which is
there to make the optimizer's states, has one."""

_PARTS: dict[str, tuple[str, ...]] = {
    "gpt2": ("norm 0", "attention", "norm 1", "ffn"),
    "gpt_neox": ("norm 0", "norm 1", "attention", "ffn"),
    "opt": ("attention", "norm 0", "ffn", "norm 1"),
}
"""Order of a block's modules where it is not attention, FFN, norms."""


def simulate(
    setup: TrainingSetup,
    *,
    workspace_bytes: int = USUAL_BYTES,
    sums_in_place: bool = True,
    shapes: Sequence[BatchShape] = (),
    tape: Tape | None = None,
    operators: type[Operators] = Operators,
) -> Stream:
    """The stream of a run of any method but MEFT, whose rows the runtime manages itself.

    Two steps of the setup's own batch; or, with ``shapes``, as many as those micro-batches make. ``tape`` and
    ``operators`` are torch's own unless others are given; a tape is taken as it is, and new.

    Raises :class:`ValueError` for MEFT.
    """
    if setup.method == "meft":
        raise ValueError("the simulated step knows the dense methods; MEFT has its own ledger")
    if setup.method == "peft" and not has_closed_form(setup):
        raise ValueError("this method of peft, or this setting of it, has no closed form: its code is traced")
    if setup.emulated:
        sums_in_place, workspace_bytes = False, 0
    tape = tape or Tape(sums_in_place=sums_in_place)
    weights = Loader(tape, setup).load()
    offloader = None if setup.offload == "none" else HostOffloader(tape, OFFLOADING[setup.offload])
    tape.offloader = offloader
    autocast = None if setup.autocast == "none" else STORED[setup.autocast]
    make = partial(operators, autocast_bytes=autocast, workspace_bytes=workspace_bytes, cpu_kernels=setup.emulated)
    _Run(make(tape), setup, weights, offloader).steps(shapes)
    return Stream(tuple(tape.events), dict(tape.moments), None if offloader is None else offloader.traffic())


@cache
def loaded_rounding_bytes(shape: ModelShape, weights_dtype: WeightsDtype, double_quant: bool, shards: int = 1) -> int:
    """What the allocator's blocks hold above the frozen weights themselves, loaded in the order of the modules."""
    tape = Tape()
    setup = TrainingSetup(model=shape, method="meft", weights_dtype=weights_dtype, double_quant=double_quant)
    weights = Loader(tape, setup, shards=shards).load()
    loaded = stream_peaks(Stream(tuple(tape.events))).ledger["resident"]
    del weights
    return loaded.rounding_bytes


@dataclass
class Loader:
    """Puts the model on the device, prepares it as asked, and attaches what is trained."""

    tape: Tape
    setup: TrainingSetup
    shards: int = 1
    """Cards that each have their part of the layers' matrices."""

    def load(self) -> ModelWeights:
        """Everything that is on the device before the first step."""
        weights = self._model()
        if self.setup.kbit_preparation:
            self._widen(weights)
        self.tape.mark("loaded")
        self._attach(weights)
        if self.setup.trl_casts:
            self._cast_as_trl(weights)
        self.tape.mark("attached")
        return weights

    @property
    def _shape(self) -> ModelShape:
        return self.setup.model

    @property
    def _trains_model(self) -> bool:
        return self.setup.method == "full"

    def _model(self) -> ModelWeights:
        shape = self._shape
        self._warm_up()
        embedding = self._weight(shape.embedding_parameters)
        positions = self._weight(shape.position_parameters) if shape.learned_positions else None
        final_norm = self._norm() if shape.model_type == "opt" else None
        blocks = [self._block(number) for number in range(shape.num_layers)]
        final_norm = final_norm or self._norm()
        head_weight = embedding if shape.tied_embeddings else self._weight(shape.embedding_parameters)
        head_bias = self._weight(shape.vocab_size) if shape.head_bias else None
        if shape.model_type in SCALED_EMBEDDINGS:
            self._embedding_scale = self.tape.new(1, STORED[self.setup.weights_dtype], "embeddings")
        if not shape.learned_positions:
            rotated = int(shape.head_dim * shape.rotary_fraction)
            self._frequencies = [
                self.tape.new(rotated // 2, FP32, "rotary_frequencies") for _ in range(2 * shape.rotary_sets)
            ]
        head = Weights(shape.hidden_size, shape.vocab_size, head_weight, head_bias)
        return ModelWeights(embedding, positions, blocks, final_norm, head)

    def _warm_up(self) -> None:
        """transformers' ``caching_allocator_warmup``, with which every load with a device map begins, and 4-bit ones
        have one unasked: one block as large as all weights, a quantized one half a byte, comes and goes."""
        setup, shape = self.setup, self._shape
        if setup.weights_dtype == "nf4" and shape.stored is None and setup.method != "meft" and not setup.emulated:
            quantized = linear_parameters(shape)
            block = self.tape.new(quantized // 2 + (shape.num_parameters - quantized) * BF16, 1, "other_weights")
            del block

    def _block(self, number: int) -> BlockWeights:
        shape, block = self._shape, BlockWeights()
        num_norms = shape.norms_per_layer
        usual = ("attention", "ffn", *(f"norm {index}" for index in range(num_norms)))
        for part in _PARTS.get(shape.model_type, usual):
            if part.startswith("norm"):
                block.norms.append(self._norm())
                continue
            for layer in linear_layers(shape):
                if layer.place == part:
                    block.linears[layer.place, layer.name] = self._linear(layer, number)
            if part == "attention" and shape.head_norms_per_layer:
                joint = (shape.query_size, shape.kv_size)
                widths = joint if shape.joint_head_norms else (shape.head_dim,) * shape.head_norms_per_layer
                block.head_norms = [self._norm(width) for width in widths]
        return block

    def _norm(self, width: int | None = None) -> tuple[Tensor, Tensor | None]:
        width = width or self._shape.hidden_size
        weight = self._weight(width)
        return weight, self._weight(width) if self._shape.norm == "layernorm" else None

    def _weight(self, numel: int, category: str = "other_weights") -> Tensor:
        return self.tape.parameter(numel, STORED[self.setup.weights_dtype], category, trained=self._trains_model)

    def _linear(self, layer: Linear, block: int) -> Weights | QuantizedWeights:
        shape, nf4 = self._shape, self.setup.weights_dtype == "nf4"
        if not (is_stored(shape, layer, block=block) if shape.stored is not None else nf4):
            weight = self._weight(layer.num_weights, "linear_weights") if self.shards == 1 else self._shard(layer)
            bias = self._weight(layer.outputs) if layer.bias else None
            return Weights(layer.inputs, layer.outputs, weight, bias)
        stored = self._quantized(layer) if nf4 else self._as_stored(layer)
        bias = self._weight(layer.outputs) if layer.bias else None
        return QuantizedWeights(layer.inputs, layer.outputs, stored, BF16, bias)

    def _shard(self, layer: Linear) -> Tensor:
        """This card's part of a matrix, which stands for the whole: that is made when the layer is gathered."""
        dtype = self.setup.weights_dtype
        part = self.tape.new(shard_bytes(self._shape, layer, dtype=dtype, shards=self.shards), 1, "linear_weights")
        return Tensor(part.storage, layer.num_weights, STORED[dtype])

    def _quantized(self, layer: Linear) -> tuple[Tensor, ...]:
        """As bitsandbytes stores it: packed weights, scales per 64 (in 8 bits with scales of their own if doubly
        quantized, and a copy of the 256 numbers that those stand for), and the 16 numbers that a code stands for."""
        tape, category, num_weights = self.tape, "linear_weights", layer.num_weights
        written = tape.new(num_weights if self.shards == 1 else 0, BF16, category)  # a shard was quantized on the host
        num_scales = -(-num_weights // NF4_BLOCK)
        scales = tape.new(num_scales, FP32, category)
        packed = tape.new(-(-num_weights // 2), 1, category) if self.shards == 1 else self._shard(layer)
        code = tape.new(NF4_CODE_NUMBERS, FP32, category)
        del written
        if not self.setup.double_quant:
            return packed, scales, code
        offset = tape.new(1, FP32, category)
        outer = tape.new(-(-num_scales // DOUBLE_QUANT_BLOCK), FP32, category)
        dynamic = () if self.setup.emulated else (tape.new(DYNAMIC_CODE_NUMBERS, FP32, category),)
        return packed, tape.new(num_scales, 1, category), outer, *dynamic, offset, code

    def _as_stored(self, layer: Linear) -> tuple[Tensor, ...]:
        """As the folder has it: read, and no more."""
        sizes = stored_tensors_bytes(self._shape, layer, double_quant=self.setup.double_quant)
        return tuple(self.tape.new(size, 1, "linear_weights") for size in sizes)

    def _widen(self, weights: ModelWeights) -> None:
        """Every parameter that is not quantized becomes fp32, one after the other."""
        for tensor in (*self._tables(weights), *self._small_parameters(weights)):
            self._recast(tensor, FP32)

    def _cast_as_trl(self, weights: ModelWeights) -> None:
        """``peft_module_casting_to_bf16``: norms go to fp32, embeddings and head from fp32 to bf16."""
        for norm in self._norms(weights):
            for tensor in norm:
                if tensor is not None:
                    self._recast(tensor, FP32)
        for tensor in (*self._tables(weights), weights.positions, weights.head.bias):
            if tensor is not None and tensor.itemsize == FP32:
                self._recast(tensor, BF16)

    @staticmethod
    def _tables(weights: ModelWeights) -> list[Tensor]:
        """Embedding and head, which may be one."""
        head = weights.head.weight
        return [weights.embedding] if head is weights.embedding else [weights.embedding, head]

    @staticmethod
    def _norms(weights: ModelWeights) -> list[tuple[Tensor, Tensor | None]]:
        in_blocks = [norm for block in weights.blocks for norm in (*block.norms, *block.head_norms)]
        return [*in_blocks, weights.final_norm]

    def _small_parameters(self, weights: ModelWeights) -> list[Tensor]:
        found = [weights.positions, *weights.final_norm, weights.head.bias]
        for block in weights.blocks:
            for layer in block.linears.values():
                found += [layer.bias, layer.weight if isinstance(layer, Weights) else None]
            for norm in (*block.norms, *block.head_norms):
                found += norm
        return [tensor for tensor in found if tensor is not None]

    def _recast(self, tensor: Tensor, itemsize: int) -> None:
        if tensor.itemsize != itemsize:
            made = self.tape.new(tensor.numel, itemsize, "other_weights")
            tensor.storage, tensor.itemsize = made.storage, itemsize

    def _attach(self, weights: ModelWeights) -> None:
        setup = self.setup
        if setup.peft is not None:
            self._attach_peft(weights)
        for block in weights.blocks:
            if setup.method in ("lora", "qlora"):
                for layer in linear_layers(self._shape):
                    if layer.name in setup.target_modules:
                        block.lora[layer.place, layer.name] = self._lora(layer)
            elif setup.method == "parallel-adapter":
                hidden, width = self._shape.hidden_size, setup.adapter_width or 0
                block.adapter = (
                    Weights(hidden, width, self._trained(hidden * width)),
                    Weights(width, hidden, self._trained(hidden * width)),
                )

    def _attach_peft(self, weights: ModelWeights) -> None:
        assert self.setup.peft is not None
        kind, shape = self.setup.peft.enum_name, self._shape
        if kind == FACTORS:
            for block in weights.blocks:
                block.factors = {name: self._factor(numel) for name, numel in factor_sizes(shape).items()}
            return
        (numel,) = trained_sizes(self.setup)
        table = self._factor(numel)
        if kind == PROMPT:
            weights.prompt = table
        else:
            weights.prefix = table

    def _factor(self, numel: int) -> Tensor:
        """What ``peft`` makes in fp32 whatever the model's dtype."""
        return self.tape.parameter(numel, FP32, "trainable_weights")

    def _lora(self, layer: Linear) -> Lora:
        rank = self.setup.rank or 0
        down = Weights(layer.inputs, rank, self._trained(layer.inputs * rank))
        return Lora(down, Weights(rank, layer.outputs, self._trained(rank * layer.outputs)))

    def _trained(self, numel: int) -> Tensor:
        itemsize = STORED[self.setup.adapter_dtype]
        return self.tape.parameter(numel, itemsize, "trainable_weights")


@dataclass
class _Outputs:
    """What the model returns and a stock loop holds on to."""

    loss: Tensor
    logits: Tensor | None
    cache: list[tuple[Tensor, Tensor]] | None
    arguments: object = None
    """Of reentrant checkpoints; see :class:`Decoder`."""


class _Run:
    """The training loop."""

    def __init__(
        self,
        ops: Operators,
        setup: TrainingSetup,
        weights: ModelWeights,
        offloader: HostOffloader | None = None,
    ) -> None:
        self.offloader = offloader
        self.ops, self.tape = ops, ops.tape
        tape = ops.tape
        self.asked, self.setup = setup, running(setup)
        self.weights = weights
        self.ladder: LadderWeights | None = None
        self.decoder = self._new_decoder()
        self.trained = _trained(weights, setup)
        if setup.method == "lst":
            self.ladder = load_ladder(tape, setup)
            tape.mark("attached")
            self.decoder = self._new_decoder()
            self.trained = self.ladder.parameters()
        self.optimizer = Optimizer(tape, setup.optimizer, self.trained, master_weights=setup.master_weights)
        if setup.optimizer_in_backward:
            tape.on_gradient = self.optimizer.in_backward()

    def steps(self, shapes: Sequence[BatchShape]) -> None:
        """Optimizer steps of ``grad_accum`` micro-batches each."""
        outputs: _Outputs | None = None
        inputs: tuple[Tensor, ...] = ()
        for step, micro_batches in enumerate(self._planned(shapes), start=1):
            for shape in micro_batches:
                self._take(shape)
                self._phase("forward")
                if self.offloader is not None:
                    self.offloader.copies.start()
                num_inputs = 3 if self.setup.packed else 2
                inputs = tuple(self.tape.new(self.asked.tokens, INT64, "inputs") for _ in range(num_inputs))
                traced = self._mask_of_traced_code()
                outputs = self._forward()
                self.tape.mark(f"forward_{step}")
                if not self.setup.outputs_kept:
                    outputs = _Outputs(outputs.loss, None, None, outputs.arguments)
                self.tape.phase = "loss"
                self.tape.backward(outputs.loss, self.tape.new(1, FP32, "loss_chain"))
                del traced
                if not self.setup.outputs_kept:
                    outputs = None
            self.tape.mark(f"backward_{step}")
            self._phase("optimizer_step")
            if self.setup.emulated:
                self.optimizer.one_by_one()
            else:
                self.optimizer.step()
            self.tape.mark(f"updated_{step}")
            self._zero_gradients()
            self.tape.mark(f"optimizer_step_{step}")
        del outputs, inputs

    def _new_decoder(self) -> Decoder:
        if self.ladder is not None:
            return Laddered(self.ops, self.setup, self.weights, counts_positions=True, ladder=self.ladder)
        return Decoder(self.ops, self.setup, self.weights, counts_positions=True)

    def _planned(self, shapes: Sequence[BatchShape]) -> list[Sequence[BatchShape]]:
        """The shapes of each step's micro-batches."""
        accum, asked = self.asked.grad_accum, self.asked
        if shapes:
            return [shapes[start : start + accum] for start in range(0, len(shapes), accum)]
        own = BatchShape(asked.batch_size, asked.seq_len, asked.padded)
        return [[own], *([[own] * min(accum, MICRO_BATCHES_THAT_DIFFER)] * (NUM_STEPS - 1))]

    def _take(self, shape: BatchShape) -> None:
        """The next batch is of this shape."""
        asked = self.asked
        if shape != BatchShape(asked.batch_size, asked.seq_len, asked.padded):
            self.asked = asked.model_copy(update=vars(shape))
            self.setup = running(self.asked)
            self.decoder = self._new_decoder()

    def _forward(self) -> _Outputs:
        setup = self.setup
        no_cache = setup.activation_checkpointing or setup.emulated or setup.packed or setup.method == "lst"
        cache: list[tuple[Tensor, Tensor]] | None = None if no_cache else []
        longer = self.tape.new(setup.tokens, INT64, "inputs") if setup is not self.asked else None
        hidden = self.decoder.hidden_states(cache)
        self._phase("loss")
        padded = setup.batch_size if setup.emulated else 0
        labels = [self.tape.new(setup.tokens + padded, INT64, "inputs")]
        if setup.emulated and setup.batch_size > 1:
            labels.append(self.tape.new(setup.tokens, INT64, "inputs"))  # a view otherwise, contiguous as it is
        hidden = self.decoder.final_hidden(hidden)  # the model holds it until it returns
        loss, logits = Losses(self.ops, self.decoder, setup).of(hidden)
        self.ops.leave_autocast()
        del labels, longer
        if setup.emulated:
            loss = self.ops.scale(loss, "loss_chain")
        arguments, self.decoder.arguments = self.decoder.arguments, None
        return _Outputs(loss, logits, cache, arguments)

    def _mask_of_traced_code(self) -> Tensor | None:
        """Compiled code cannot look into position ids for packed documents, so transformers makes sdpa a mask to add,
        ``[B, 1, S, S]``, where it would have taken none."""
        setup, shape = self.asked, self.setup.model
        if not setup.compiled or setup.padded or setup.packed or attention_used(shape, setup.attention) != "sdpa":
            return None
        itemsize = self.ops.autocast_bytes or STORED[setup.weights_dtype]
        numel = masks_per_model(shape) * setup.batch_size * setup.seq_len**2
        return self.tape.new(numel, itemsize, "attention_mask")

    def _zero_gradients(self) -> None:
        for parameter in self.trained:
            parameter.drop_gradient()

    def _phase(self, phase: Phase) -> None:
        self.tape.phase = phase


def _trained(weights: ModelWeights, setup: TrainingSetup) -> list[Parameter]:
    """The trained parameters, in the order of the modules."""
    if setup.method == "full":
        return _all_parameters(weights, setup.model.hidden_size)
    found: list[Parameter] = []
    for block in weights.blocks:
        for lora in block.lora.values():
            found += [_matrix(lora.down), _matrix(lora.up)]
        found += [_matrix(layer) for layer in block.adapter or ()]
        found += _vectors(*block.factors.values())
    return [*found, *_vectors(weights.prompt, weights.prefix)]


def _matrix(layer: Weights) -> Parameter:
    return Parameter(layer.weight, (layer.outputs, layer.inputs), in_block=True)


def _vectors(*tensors: Tensor | None) -> list[Parameter]:
    return [Parameter(tensor, (tensor.numel,)) for tensor in tensors if tensor is not None]


def _all_parameters(weights: ModelWeights, width: int) -> list[Parameter]:
    def table(tensor: Tensor | None) -> list[Parameter]:
        return [] if tensor is None else [Parameter(tensor, (tensor.numel // width, width))]

    found = [*table(weights.embedding), *table(weights.positions)]
    for block in weights.blocks:
        for layer in block.linears.values():
            assert isinstance(layer, Weights)
            found += [_matrix(layer), *_vectors(layer.bias)]
        for norm in (*block.norms, *block.head_norms):
            found += _vectors(*norm)
    head = None if weights.head.weight is weights.embedding else weights.head.weight
    return [*found, *_vectors(*weights.final_norm), *table(head), *_vectors(weights.head.bias)]
