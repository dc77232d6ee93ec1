"""The decoders of transformers as operators: embedding, blocks, head, in the order in which transformers runs them.

Local variables live as long as in the modelling code they follow, since they decide what is alive at a peak.
Letters: ``T`` tokens, ``S`` sequence length, ``D`` hidden size, ``H`` heads, ``G`` key-value heads, ``d`` head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from meft.planner.models.architecture import ModelShape
from meft.planner.models.kernels import NORM_OUT_OF_PLACE
from meft.planner.models.linears import Place
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.attention import SelfAttention
from meft.planner.simulation.autograd import Tensor
from meft.planner.simulation.lora import Adapted, FusedLora, Lora, lora_added, quantized_lora
from meft.planner.simulation.offloading import in_head
from meft.planner.simulation.operators import Operators, QuantizedWeights, Weights
from meft.planner.simulation.peft import PREFIX, prefixes, prompted, scaled, virtual_tokens
from meft.planner.simulation.positions import block_mask, eager_mask, position_ids, rotary_tables
from meft.planner.terms import activations as act
from meft.planner.terms.formats import BOOL, FP32, promoted

LayerKey = tuple[Place, str]


class BesideFfn(Protocol):
    """An adapter that looks at the FFN's input before the FFN runs, and adds to its output."""

    def before(self, x: Tensor) -> None:
        """The FFN's input is there."""
        ...

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """The FFN's output and what the adapter makes of the FFN's input."""
        ...


@dataclass
class BlockWeights:
    """Weights of one block. ``norms`` are in the order of use; each is (weight, bias or None)."""

    linears: dict[LayerKey, Weights | QuantizedWeights] = field(default_factory=dict)
    norms: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    head_norms: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    lora: dict[LayerKey, Lora] = field(default_factory=dict)
    adapter: tuple[Weights, Weights] | None = None
    beside_ffn: BesideFfn | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)
    """(IA)^3's, by the linear layer beside which they are."""
    slides: bool = False
    """Its tokens see a window of those before."""


@dataclass
class ModelWeights:
    """All weights of a model; a tied head is the embedding."""

    embedding: Tensor
    positions: Tensor | None
    blocks: list[BlockWeights]
    final_norm: tuple[Tensor, Tensor | None]
    head: Weights
    prompt: Tensor | None = None
    prefix: Tensor | None = None


@dataclass
class Shared:
    """What the blocks of one forward share: rotary tables, masks, and the cache that is kept alive."""

    rotary: tuple[Tensor, Tensor] | None
    masks: Masks
    cache: list[tuple[Tensor, Tensor]] | None
    positions: Tensor | None = None
    prefix: Iterator[tuple[Tensor, Tensor]] | None = None
    """Of the layers that are still to come."""


@dataclass(frozen=True)
class Masks:
    """Which token may see which: of layers that see the whole sequence, and of those that see a window."""

    full: Tensor | None
    sliding: Tensor | None


@dataclass
class Decoder:
    """One model on one tape."""

    ops: Operators
    setup: TrainingSetup
    weights: ModelWeights
    counts_positions: bool = False
    """Whether position ids and what is made of them exist: a few KiB, which no large model would notice."""
    arguments: object = None
    """What reentrant checkpoints keep of a forward for as long as its graph is there, freed or not: what they are given
    in tuples, which they do not save as tensors."""
    _named: tuple[object, ...] = ()
    """What has a name in the decoder's code, and so is there until that returns."""

    @property
    def shape(self) -> ModelShape:
        """The model."""
        return self.setup.model

    @property
    def _fused_lora(self) -> FusedLora:
        return FusedLora(self.ops, self.setup.lora_dropout)

    # --- the model --------------------------------------------------------------------------------------------------

    def hidden_states(self, cache: list[tuple[Tensor, Tensor]] | None, positions: Tensor | None = None) -> Tensor:
        """Everything up to the last block; ``cache`` receives keys and values when transformers makes one, and
        ``positions`` are those of packed documents."""
        before = self.weights.prefix and prefixes(self.ops, self.setup, self.weights.prefix)
        embedded = x = self._embedded()
        if self.counts_positions and positions is None:
            positions = position_ids(self.ops.tape, self.setup)
        masks = self._masks(x.itemsize)
        others = [self._rotary_tables(x.itemsize) for _ in range(1, self.shape.rotary_sets)]
        shared = Shared(self._rotary_tables(x.itemsize), masks, cache, positions, iter(before) if before else None)
        del before
        resting = Shared(None, masks, cache, positions)
        if self.setup.activation_checkpointing and self.setup.checkpoints_reentrantly:
            self.arguments = shared.rotary
        self._named = (*self._named, embedded, positions, others, shared.rotary, masks)
        return self.through_blocks(x, shared, resting)

    def through_blocks(self, x: Tensor, shared: Shared, resting: Shared) -> Tensor:
        """All blocks, one after the other; ``resting`` is for those that rotate nothing."""
        pause = self.shape.rotary_pause
        for number, block in enumerate(self.weights.blocks, start=1):
            block.slides = self.shape.slides(number - 1)
            x = self.block(x, block, resting if pause and number % pause == 0 else shared)
        return x

    def logits(self, normalised: Tensor) -> Tensor:
        """The head on :meth:`final_hidden`; a soft cap is three tensors more."""
        with in_head(self.ops.tape):
            logits = self.ops.linear(normalised, self.weights.head, "logits")
        if self.shape.model_type in SCALED_RESIDUALS:
            logits = self.ops.scale(logits, "logits")
        if not self.shape.logit_softcap:
            return logits
        logits = self.ops.scale(logits, "logits")
        logits = self.ops.keeps_output(logits, "logits")
        return self.ops.scale(logits, "logits")

    def final_hidden(self, x: Tensor) -> Tensor:
        """What the head is given; the decoder returns."""
        normalised = self._norm(x, self.weights.final_norm, self.shape.hidden_size)
        self._named = ()
        return normalised

    def _embedded(self) -> Tensor:
        ops, shape, setup = self.ops, self.shape, self.setup
        if self.weights.prompt is not None:
            return prompted(ops, setup, self.weights.embedding, self.weights.prompt)
        x = ops.embedding(self.weights.embedding, setup.tokens, shape.hidden_size)
        if shape.model_type in SCALED_EMBEDDINGS:
            x = ops.scale(x, "embeddings")
        if setup.activation_checkpointing and not x.requires_grad:
            x = ops.tape.as_leaf(x)  # transformers makes the embedding module's output require a gradient
        if shape.model_type in SCALED_RESIDUALS:
            x = ops.scale(x, "embeddings")
        if self.weights.positions is not None:
            positions = ops.embedding(self.weights.positions, setup.positions, shape.hidden_size)
            self._named = (x, positions)
            x = ops.add(x, positions, "layer_inputs")
        return ops.dropout(x, "layer_inputs", active=shape.embedding_dropout)

    def _rotary_tables(self, itemsize: int) -> tuple[Tensor, Tensor] | None:
        shape, tape = self.shape, self.ops.tape
        if shape.learned_positions:
            return None
        numel = self.setup.positions * int(shape.head_dim * shape.rotary_fraction)
        if self.counts_positions:
            return rotary_tables(self.ops, self.setup, numel, itemsize)
        cosines, sines = (tape.new(numel, FP32, "rotary_tables") for _ in range(2))
        with tape.no_grad():
            return self.ops.cast(cosines, itemsize, "rotary_tables"), self.ops.cast(sines, itemsize, "rotary_tables")

    def _masks(self, itemsize: int) -> Masks:
        """Additive for eager attention, one for each kind of layers; for sdpa of bytes, where a batch is padded or
        packed, or a window shorter than the sequence: of one sequence, which stands for all, in that case."""
        setup, shape, tape = self.setup, self.shape, self.ops.tape
        used = act.attention_used(shape, setup.attention)
        if used == "flash":
            return Masks(None, None)
        one, copies = setup.batch_size * setup.seq_len**2, act.masks_per_model(shape)
        if used == "eager":
            if not self.counts_positions:
                mask = tape.new(copies * one, itemsize, "attention_mask")
                return Masks(mask, mask)
            mask = eager_mask(tape, setup, itemsize, sliding=False)
            return Masks(mask, eager_mask(tape, setup, itemsize, sliding=True) if copies > 1 else mask)
        if setup.packed and self.counts_positions:
            first = block_mask(tape, setup, sliding=copies == 1 and shape.window > 0)
            return Masks(first, block_mask(tape, setup, sliding=True) if copies > 1 else first)
        if setup.padded or setup.packed:
            mask = tape.new(copies * one, BOOL, "attention_mask")
            return Masks(mask, mask)
        if virtual := virtual_tokens(setup, PREFIX):  # queries are fewer than keys
            mask = tape.new(setup.seq_len * (setup.seq_len + virtual), BOOL, "attention_mask")
            return Masks(mask, mask)
        windowed = act.window_masks(shape, seq_len=setup.seq_len, attention=setup.attention)
        return Masks(None, tape.new(setup.seq_len**2, BOOL, "attention_mask") if windowed else None)

    # --- one block --------------------------------------------------------------------------------------------------

    def block(self, x: Tensor, block: BlockWeights, shared: Shared) -> Tensor:
        """One block, which is computed again in backward where activations are checkpointed."""

        def region(inner: Tensor) -> Tensor:
            outer = self._layer(inner, block, shared)
            if self.ops.tape.phase == "backward":  # recomputed: an autocast of its own, now over
                self.ops.leave_autocast()
            return outer

        if not self.setup.activation_checkpointing:
            return region(x)
        shared.cache = None
        return self.ops.tape.checkpoint(region, x, reentrant=self.setup.checkpoints_reentrantly)

    def _layer(self, x: Tensor, block: BlockWeights, shared: Shared) -> Tensor:
        if self.shape.parallel_blocks:
            return self._parallel_layer(x, block, shared)
        if self.shape.norms_after:
            return self._layer_with_norms_after(x, block, shared)
        residual = x
        x = self._norm(x, block.norms[0], self.shape.hidden_size)
        x, _probabilities = self._attention(x, block, shared)
        if len(block.norms) == 4:
            x = self._norm(x, block.norms[1], self.shape.hidden_size)
        x = self._scaled(self._dropped(x))
        x = self.ops.add(residual, x, "layer_inputs")
        residual = x
        x = self._norm(x, block.norms[-2 if len(block.norms) == 4 else 1], self.shape.hidden_size)
        x = self._ffn_with_adapter(x, block)
        if len(block.norms) == 4:
            x = self._norm(x, block.norms[3], self.shape.hidden_size)
        x = self._scaled(x if self.shape.model_type in DROPS_IN_FFN else self._dropped(x))
        return self.ops.add(residual, x, "layer_inputs")

    def _layer_with_norms_after(self, x: Tensor, block: BlockWeights, shared: Shared) -> Tensor:
        residual, width = x, self.shape.hidden_size
        x, _probabilities = self._attention(x, block, shared)
        x = self._norm(x, block.norms[0], width)
        x = self.ops.add(residual, x, "layer_inputs")
        residual = x
        x = self._ffn_with_adapter(x, block)
        x = self._norm(x, block.norms[1], width)
        return self.ops.add(residual, x, "layer_inputs")

    def _scaled(self, x: Tensor) -> Tensor:
        return self.ops.scale(x, "layer_inputs") if self.shape.model_type in SCALED_RESIDUALS else x

    def _parallel_layer(self, x: Tensor, block: BlockWeights, shared: Shared) -> Tensor:
        """Phi norms once for both; GPT-NeoX norms for each, and adds in another order."""
        residual, width = x, self.shape.hidden_size
        normalised = self._norm(x, block.norms[0], width)
        if len(block.norms) == 1:
            attended, _probabilities = self._attention(normalised, block, shared)
            attended = self._dropped(attended)
            added = self._dropped(self._ffn_with_adapter(normalised, block))
        else:
            attended, _probabilities = self._attention(normalised, block, shared)
            del normalised
            attended = self._dropped(attended)
            added = self._dropped(self._ffn_with_adapter(self._norm(x, block.norms[1], width), block))
        return self.ops.add(self.ops.add(attended, added, "layer_inputs"), residual, "layer_inputs")

    def _dropped(self, x: Tensor) -> Tensor:
        return self.ops.dropout(x, "layer_inputs", active=self.shape.hidden_dropout)

    def _norm(self, x: Tensor, weights: tuple[Tensor, Tensor | None], width: int) -> Tensor:
        weight, bias = weights
        if bias is not None:
            return self.ops.layer_norm(x, weight, bias, width)
        if "rms-norm" in self.setup.kernels:
            in_place = self.shape.model_type not in NORM_OUT_OF_PLACE
            return self.ops.fused_rms_norm(x, weight, width, in_place=in_place)
        if self.shape.model_type in NORM_WEIGHT_BEFORE_CAST:
            return self.ops.rms_norm(x, weight, width, weight_before_cast=True)
        return self.ops.rms_norm(x, weight, width, weight_in_fp32=self.shape.model_type in SCALED_EMBEDDINGS)

    def _linear(self, x: Tensor, block: BlockWeights, key: LayerKey) -> Tensor:
        """A linear layer, with what LoRA adds to it."""
        layer, lora = block.linears[key], block.lora.get(key)
        if key[1] in block.factors:
            factor = block.factors[key[1]]
            if key[0] == "ffn":
                return self.ops.linear(scaled(self.ops, x, factor, before=True), layer, key[0])
            return scaled(self.ops, self.ops.linear(x, layer, key[0]), factor, before=False)
        if lora is None:
            return self.ops.linear(x, layer, key[0])
        dropout = self.setup.lora_dropout
        if isinstance(layer, QuantizedWeights):
            return quantized_lora(self.ops, x, layer, lora, key[0], dropout=dropout)
        result = self.ops.linear(x, layer, key[0])
        outer = result.itemsize
        x = self.ops.cast(x, lora.down.weight.itemsize, "adapter")
        result = self.ops.add(result, lora_added(self.ops, x, lora, dropout=dropout), key[0])
        return self.ops.cast(result, outer, key[0])

    def _fused(self, block: BlockWeights, place: Place, *names: str) -> list[Adapted]:
        """The layers, where one fused function has them and their LoRA; else none."""
        keys = [(place, name) for name in names]
        if "lora" not in self.setup.kernels or not all(key in block.lora for key in keys):
            return []
        return [Adapted(block.linears[key], block.lora[key]) for key in keys]

    # --- FFN --------------------------------------------------------------------------------------------------------

    def _ffn_with_adapter(self, x: Tensor, block: BlockWeights) -> Tensor:
        if block.beside_ffn is not None:
            block.beside_ffn.before(x)
            return block.beside_ffn.add_to(self._ffn(x, block), x)
        output = self._ffn(x, block)
        if block.adapter is None:
            return output
        keys, values = block.adapter
        wide = self.ops.cast(x, keys.weight.itemsize, "adapter")
        added = self.ops.linear(wide, keys, "adapter")
        del wide
        added = self.ops.keeps_output(added, "adapter")
        added = self.ops.linear(added, values, "adapter")
        added = self.ops.cast(added, x.itemsize, "adapter")
        return self.ops.add(output, added, "ffn")

    def _ffn(self, x: Tensor, block: BlockWeights) -> Tensor:
        names = [name for place, name in block.linears if place == "ffn"]
        if not self.shape.gated_mlp:
            up, down = names
            hidden = self._linear(x, block, ("ffn", up))
            hidden = self._linear(self._activation(hidden), block, ("ffn", down))
            return self._dropped(hidden) if self.shape.model_type in DROPS_IN_FFN else hidden
        if len(names) == 2:
            both = self._linear(x, block, ("ffn", names[0]))
            half = both.numel // 2
            gate, up_states = self.ops.split(both, (half, half))
            del both
            if "swiglu" in self.setup.kernels:
                up_states = self.ops.fused_gate(gate, up_states, "ffn")
            else:
                up_states = self.ops.multiply(up_states, self._activation(gate), "ffn")
            return self._linear(up_states, block, ("ffn", names[1]))
        gate_name, up, down = names
        if adapted := self._fused(block, "ffn", gate_name, up, down):
            return self._fused_lora.ffn(x, *adapted)
        if "swiglu" in self.setup.kernels:
            gate = self._linear(x, block, ("ffn", gate_name))
            product = self.ops.fused_gate(gate, self._linear(x, block, ("ffn", up)), "ffn")
            del gate
            return self._linear(product, block, ("ffn", down))
        product = self.ops.multiply(
            self._activation(self._linear(x, block, ("ffn", gate_name))), self._linear(x, block, ("ffn", up)), "ffn"
        )
        return self._linear(product, block, ("ffn", down))

    def _activation(self, x: Tensor) -> Tensor:
        ops, name = self.ops, self.shape.activation
        if name in ("gelu_new", "gelu_accurate"):
            half = ops.scale(x, "ffn")
            cube = ops.scale(ops.power(x, "ffn"), "ffn")
            inner = ops.scale(ops.add(x, cube, "ffn"), "ffn")
            del cube
            return ops.multiply(half, ops.shift(ops.keeps_output(inner, "ffn"), "ffn"), "ffn")
        if name == "gelu_fast":
            half = ops.scale(x, "ffn")
            slope = ops.scale(x, "ffn")
            bend = ops.shift(ops.multiply(ops.scale(x, "ffn"), x, "ffn"), "ffn")
            inner = ops.multiply(slope, bend, "ffn")
            del slope, bend
            return ops.multiply(half, ops.shift(ops.keeps_output(inner, "ffn"), "ffn"), "ffn")
        if name == "gelu_python":
            half = ops.scale(x, "ffn")
            error = ops.keeps_input(ops.scale(x, "ffn"), "ffn")
            return ops.multiply(half, ops.shift(error, "ffn"), "ffn")
        if name == "quick_gelu":
            return ops.multiply(x, ops.keeps_output(ops.scale(x, "ffn"), "ffn"), "ffn")
        if name == "relu2":
            return ops.power(ops.keeps_output(x, "ffn"), "ffn")
        return ops.keeps_output(x, "ffn") if name in KEEPS_OUTPUT else ops.keeps_input(x, "ffn")

    # --- attention --------------------------------------------------------------------------------------------------

    def _attention(self, x: Tensor, block: BlockWeights, shared: Shared) -> tuple[Tensor, Tensor | None]:
        mask = shared.masks.sliding if block.slides else shared.masks.full
        q, k, v = self._query_key_value(x, block, masked=mask is not None)
        if shared.rotary is not None:
            q, k = self._rotated(q, k, shared.rotary)
        if shared.prefix is not None:
            before_k, before_v = next(shared.prefix)
            k = self.ops.concatenate((before_k, k), "attention")
            v = self.ops.concatenate((before_v, v), "attention")
            self._named = (*self._named, k, v)  # in the cache
            del before_k, before_v
        elif shared.cache is not None:
            k, v = self._cached(k, k.itemsize), self._cached(v, k.itemsize)
        if shared.cache is not None:
            shared.cache.append((k, v))
        attention = SelfAttention(self.ops, self.setup)
        output, probabilities = attention.attend(q, k, v, mask=mask, cached=shared.cache is not None)
        name = next(name for place, name in block.linears if place == "attention" and name in OUTPUT_NAMES)
        if adapted := self._fused(block, "attention", name):
            return self._fused_lora.products(output, adapted, "attention", over_input=False)[0], probabilities
        return self._linear(output, block, ("attention", name)), probabilities

    def _cached(self, x: Tensor, of_keys: int) -> Tensor:
        """Put behind the cache's empty start, which has the keys' format."""
        wide = promoted(x.itemsize, of_keys)
        return self.ops.copy(x, "attention") if x.itemsize == wide else self.ops.cast(x, wide, "attention")

    def _query_key_value(self, x: Tensor, block: BlockWeights, *, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
        shape, setup = self.shape, self.setup
        queries, keys = setup.tokens * shape.query_size, setup.tokens * shape.kv_size
        if shape.model_type == "phi3":
            joint = self._linear(x, block, ("attention", "qkv_proj"))
            return self.ops.slice(joint, queries), self.ops.slice(joint, keys), self.ops.slice(joint, keys)
        joint_name = next((name for _, name in block.linears if name in ("c_attn", "query_key_value")), None)
        if joint_name is not None:
            joint = self._linear(x, block, ("attention", joint_name))
            q, k, v = self.ops.split(joint, (queries, keys, keys))
            return q, k, v
        products = self._products(x, block, ("q_proj", "k_proj", "v_proj"))
        q = self._heads(next(products), block, 0)
        if shape.model_type == "opt":
            q = self.ops.scale(q, "attention")
        k = self._heads(next(products), block, 1)
        v = next(products)
        written_out = masked and shape.num_heads > shape.num_kv_heads
        if written_out or act.attention_used(shape, setup.attention) == "eager":
            # kernels lay its gradient out as the product has it, sums over groups of heads do not
            v = self.ops.heads_first(v, shape.num_kv_heads)
        return q, k, v

    def _products(self, x: Tensor, block: BlockWeights, names: tuple[str, ...]) -> Iterator[Tensor]:
        """What each layer makes of ``x``, when it is asked for; fused all at once, and handed out."""
        if adapted := self._fused(block, "attention", *names):
            made = self._fused_lora.products(x, adapted, "attention", over_input=True)
            while made:
                yield made.pop(0)
            return
        for name in names:
            yield self._linear(x, block, ("attention", name))

    def _heads(self, x: Tensor, block: BlockWeights, index: int) -> Tensor:
        """Queries (0) or keys (1), heads first, with their norm; one of all heads together comes before."""
        shape = self.shape
        if block.head_norms and shape.joint_head_norms:
            x = self._norm(x, block.head_norms[index], (shape.query_size, shape.kv_size)[index])
        in_place = "rope" in self.setup.kernels and act.attention_used(shape, self.setup.attention) != "eager"
        if not shape.learned_positions and not in_place:
            x = self.ops.heads_first(x, (shape.num_heads, shape.num_kv_heads)[index])
        if block.head_norms and not shape.joint_head_norms:
            x = self._norm(x, block.head_norms[index], shape.head_dim)
        return x

    def _rotated(self, q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if "rope" in self.setup.kernels:
            if self.shape.model_type in act.FUSED_QKV_ROTARY:  # parts of one product are copied to lie by token
                q, k = self.ops.copy(q, "attention"), self.ops.copy(k, "attention")
            return self.ops.rotated_in_place(q, tables), self.ops.rotated_in_place(k, tables)
        fraction = self.shape.rotary_fraction
        if self.shape.model_type not in act.PARTIAL_ROTARY:
            q_rotated = self._rotate(q, tables)
            return q_rotated, self._rotate(k, tables)
        q_part, q_rest = (self.ops.slice(q, int(q.numel * part)) for part in (fraction, 1 - fraction))
        k_part, k_rest = (self.ops.slice(k, int(k.numel * part)) for part in (fraction, 1 - fraction))
        q_part, k_part = self._rotate(q_part, tables), self._rotate(k_part, tables)
        q = self.ops.concatenate((q_part, q_rest), "attention")
        return q, self.ops.concatenate((k_part, k_rest), "attention")

    def _rotate(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        cosines, sines = tables
        straight = self.ops.multiply(x, cosines, "attention")
        return self.ops.add(straight, self.ops.multiply(self._rotate_half(x), sines, "attention"), "attention")

    def _rotate_half(self, x: Tensor) -> Tensor:
        first, second = self.ops.slice(x, x.numel // 2), self.ops.slice(x, x.numel // 2)
        return self.ops.concatenate((self.ops.scale(second, "attention"), first), "attention")


KEEPS_OUTPUT = frozenset({"relu", "tanh", "sigmoid"})
SCALED_EMBEDDINGS = frozenset({"gemma", "gemma2", "gemma3_text"})
"""Model types that scale their embeddings and multiply by a norm's weight in fp32."""
SCALED_RESIDUALS = frozenset({"granite"})
"""Model types that scale embeddings, what attention and FFN add, and logits by numbers of their config."""
NORM_WEIGHT_BEFORE_CAST = frozenset({"olmo2"})
"""Model types that multiply by a norm's weight before the cast back from fp32."""
DROPS_IN_FFN = frozenset({"gpt2"})
"""Model types whose FFN drops out of its output itself, before an adapter is added."""
OUTPUT_NAMES = frozenset({"o_proj", "dense", "out_proj", "c_proj"})
