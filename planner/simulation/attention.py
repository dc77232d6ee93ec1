"""Self-attention as torch and transformers run it: which kernel is taken, what it makes, keeps and makes in backward.

Sizes are elements; ``T`` tokens, ``S`` sequence length, ``H`` heads, ``G`` key-value heads, ``d`` head size.
"""

from __future__ import annotations

from dataclasses import dataclass

from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.autograd import TEMPORARIES, Gradients, Tensor
from meft.planner.simulation.operators import Operators
from meft.planner.simulation.peft import PREFIX, virtual_tokens
from meft.planner.terms import activations as act
from meft.planner.terms.formats import BOOL, FP32, STORED

LARGEST_FLASH_HEAD = 256
LOG_SUM_EXP_MULTIPLE = 32
"""The memory-efficient kernel rounds the queries of its log-sum-exp up to this."""
FLASH_QUERY_MULTIPLE = 128
"""Flash attention rounds the queries of its backward's fp32 buffers up to this."""
FLASH_HEAD_MULTIPLE = 32
"""... and the head size (to 64 above 128)."""


@dataclass
class SelfAttention:
    """Queries, keys and values to what the output projection is given."""

    ops: Operators
    setup: TrainingSetup

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, cached: bool
    ) -> tuple[Tensor, Tensor | None]:
        """By the attention that the setup asks for; eager attention's probabilities too, which its caller holds."""
        ops, shape, setup = self.ops, self.setup.model, self.setup
        if act.attention_used(shape, setup.attention) == "eager":
            return self._eager(q, k, v, mask, cached=cached)
        if ops.autocast_bytes is not None:
            q, k, v = (ops.cast(each, ops.autocast_bytes, "attention") for each in (q, k, v))
        if setup.repeated_heads:
            k, v = (repeat_heads(ops, each, shape.num_heads // shape.num_kv_heads) for each in (k, v))
        if setup.attention == "flash":  # transformers casts what is fp32, which the kernel does not take
            q, k, v = (self._in_16_bits(each) for each in (q, k, v))
        half = q.itemsize != FP32
        flash = mask is None and half and shape.head_dim <= LARGEST_FLASH_HEAD and not ops.cpu_kernels
        if setup.attention == "flash" or flash:
            return self._flash(q, k, v), None
        groups = 1 if setup.repeated_heads else shape.num_heads // shape.num_kv_heads
        if mask is not None:  # transformers writes grouped heads out beside a mask, but a single one
            repeat = expand_heads if shape.num_kv_heads == 1 < groups else repeat_heads
            k, v = repeat(ops, k, groups), repeat(ops, v, groups)
        if ops.cpu_kernels and shape.attention_dropout:
            return self._plain(q, k, v, mask), None
        if ops.cpu_kernels:
            rows = setup.tokens * shape.num_heads
            return cpu_attention(ops, q, k, v, num_rows=rows, additive_mask=self._additive(mask, q)), None
        if mask is None and groups > 1:
            return self._plain(q, k, v, mask), None
        sizes = {"batch_size": setup.batch_size, "seq_len": setup.seq_len, "num_heads": shape.num_heads}
        return efficient_attention(ops, q, k, v, additive_mask=self._additive(mask, q), **sizes), None

    def _flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape, setup = self.setup.model, self.setup
        return flash_attention(
            self.ops,
            q,
            k,
            v,
            batch_size=setup.batch_size,
            seq_len=setup.seq_len,
            num_heads=shape.num_heads,
            head_dim=shape.head_dim,
        )

    def _additive(self, mask: Tensor | None, q: Tensor) -> Tensor | None:
        """A mask of bytes as numbers to add, ``[B, 1, S, S]``, made anew by every layer."""
        if mask is None:
            return None
        if self.ops.cpu_kernels:
            _hidden, _seen = (self.ops.tape.new(1, q.itemsize, "attention") for _ in range(2))
        keys = self.setup.seq_len + virtual_tokens(self.setup, PREFIX)
        return self.ops.additive_mask(mask, self.setup.batch_size * self.setup.seq_len * keys, q.itemsize)

    def _causal(self) -> Tensor:
        """Numbers to add, ``[S, S]``, of a lower triangle of bytes that is made for it."""
        tape, numel, category = self.ops.tape, self.setup.seq_len**2, "attention_mask"
        ones = tape.new(numel, BOOL, category)
        lower = tape.new(numel, BOOL, category)
        del ones
        upper, _zero, _least = tape.new(numel, BOOL, category), *(tape.new(1, FP32, category) for _ in range(2))
        added = tape.new(numel, FP32, category)
        del upper, lower
        return added

    def _in_16_bits(self, x: Tensor) -> Tensor:
        return self.ops.cast(x, STORED[self.setup.weights_dtype], "attention") if x.itemsize == FP32 else x

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """torch's composite of plain products, in fp32: where no kernel takes grouped heads (fp32 without a mask), and
        on the CPU with dropout. Scores are added to the mask, one of its own where there is none."""
        ops, shape, setup = self.ops, self.setup.model, self.setup
        outer, groups = q.itemsize, q.numel // k.numel
        scores_numel = setup.tokens * shape.num_heads * setup.seq_len
        q, k, v = (ops.cast(each, FP32, "attention") for each in (q, k, v))
        query = ops.scale(q, "attention")
        added = self._additive(mask, q) or self._causal()
        keys, values = repeat_heads(ops, k, groups), repeat_heads(ops, v, groups)
        merged = setup.batch_size > 1  # heads that lie apart are copied to be merged with the batch
        scaled = ops.scale(keys, "attention")
        factor = ops.copy(query, "attention") if merged else query
        if merged and groups == 1:
            scaled, values = ops.copy(scaled, "attention"), ops.copy(values, "attention")
        scores = ops.batched_product(factor, scaled, scores_numel, "attention")
        del factor, scaled
        probabilities = ops.safe_softmax(scores, "attention")
        del scores
        probabilities = ops.dropout(probabilities, "attention", active=shape.attention_dropout)
        output = ops.batched_product(probabilities, values, q.numel, "attention")
        if outer != FP32:
            output = ops.cast(output, outer, "attention")
            rounded = ops.tape.new(scores_numel, outer, "attention")  # given back beside the output, and dropped
            del rounded
        del probabilities, added, keys, values, query
        return ops.copy(output, "attention")

    def _eager(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, cached: bool
    ) -> tuple[Tensor, Tensor | None]:
        ops, shape, setup = self.ops, self.setup.model, self.setup
        groups = shape.num_heads // shape.num_kv_heads
        expanded = groups > 1 and shape.num_kv_heads == 1
        written_out = not expanded and (groups > 1 or cached)
        repeat = expand_heads if expanded else repeat_heads
        scores_numel = setup.tokens * shape.num_heads * setup.seq_len
        keys, values = repeat(ops, k, groups), repeat(ops, v, groups)
        merged = setup.batch_size > 1 and shape.model_type not in act.PARTIAL_ROTARY
        product = self._bmm(
            ops.copy(q, "attention") if merged else q,  # strided heads, to be merged with the batch
            keys,
            scores_numel,
            merged=written_out,
        )
        scores = ops.scale(product, "attention")
        del product
        if act.soft_capped_attention(shape):
            scores = ops.scale(scores, "attention")
            scores = ops.keeps_output(scores, "attention")
            scores = ops.scale(scores, "attention")
        if mask is not None:
            scores = ops.add(scores, mask.detached(), "attention")
        outer = q.itemsize
        if shape.model_type not in act.EAGER_SOFTMAX_AS_COMPUTED or ops.autocast_bytes is not None:
            scores = ops.cast(ops.softmax_in_fp32(scores, "attention"), outer, "attention")
        else:
            scores = ops.keeps_output(scores, "attention")
        scores = ops.dropout(scores, "attention", active=shape.attention_dropout)
        output = self._bmm(scores, values, q.numel, merged=written_out)
        if setup.batch_size > 1:
            output = ops.heads_first(output, shape.num_heads)
        output = ops.copy(output, "attention")
        return output, scores

    def _bmm(self, a: Tensor, b: Tensor, numel: int, *, merged: bool) -> Tensor:
        """A product per batch and head: heads that are strided must be copied to be merged with the batch."""
        if self.setup.batch_size > 1 and not merged:
            b = self.ops.copy(b, "attention")
        return self.ops.batched_product(a, b, numel, "attention")


# --- kernels ---------------------------------------------------------------------------------------------------------


def flash_attention(
    ops: Operators, q: Tensor, k: Tensor, v: Tensor, *, batch_size: int, seq_len: int, num_heads: int, head_dim: int
) -> Tensor:
    """The flash kernel: keeps query, key, value, output and the log-sum-exp ``[B, H, S]``; heads may be grouped.

    Backward makes the three gradients, the fp32 accumulator of the query's, a row sum, and for grouped heads the
    key's and value's gradients of every head before they are summed.
    """
    tape = ops.tape
    out = tape.like(q, "attention")
    log_sum_exp = tape.new(batch_size * num_heads * seq_len, FP32, "attention")
    if not tape.differentiates(q, k, v):
        return out
    kept = tuple(tape.save(each) for each in (q, k, v, out, log_sum_exp))
    rounded_queries = -(-seq_len // FLASH_QUERY_MULTIPLE) * FLASH_QUERY_MULTIPLE
    head_multiple = FLASH_HEAD_MULTIPLE if head_dim <= 4 * FLASH_HEAD_MULTIPLE else 2 * FLASH_HEAD_MULTIPLE
    rounded_head = -(-head_dim // head_multiple) * head_multiple
    rows = batch_size * num_heads * rounded_queries

    def backward(_grad: Tensor) -> Gradients:
        query, key, value = kept[:3]
        of_q, of_k, of_v = (tape.like(each, TEMPORARIES) for each in (query, key, value))
        row_sums = tape.new(rows, FP32, TEMPORARIES)
        accumulator = tape.new(rows * rounded_head, FP32, TEMPORARIES)
        expanded = [tape.like(query, TEMPORARIES) for _ in range(2)] if key.numel != query.numel else []
        del row_sums, accumulator, expanded
        return of_q, of_k, of_v

    return tape.connect(out, (q, k, v), backward)


def efficient_attention(
    ops: Operators,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    batch_size: int,
    seq_len: int,
    num_heads: int,
    additive_mask: Tensor | None,
) -> Tensor:
    """The memory-efficient kernel (fp32, or a mask): as flash, with equal heads and the mask it adds.

    Its backward makes one fp32 ``[T, H d]`` beside the gradients: the query's accumulator of 16-bit inputs, or in
    fp32 the product of which the row sums are taken.
    """
    tape = ops.tape
    out = tape.like(q, "attention")
    rounded = -(-seq_len // LOG_SUM_EXP_MULTIPLE) * LOG_SUM_EXP_MULTIPLE
    log_sum_exp = tape.new(batch_size * num_heads * rounded, FP32, "attention")
    if not tape.differentiates(q, k, v):
        return out
    mask = () if additive_mask is None else (tape.save(additive_mask),)
    kept = (*(tape.save(each) for each in (q, k, v, out, log_sum_exp)), *mask)
    rows = batch_size * num_heads * seq_len

    def backward(_grad: Tensor) -> Gradients:
        row_sums = tape.new(rows, FP32, TEMPORARIES)
        beside = tape.new(kept[0].numel, FP32, TEMPORARIES)
        if kept[0].itemsize == FP32:
            del beside
        of_q, of_k, of_v = (tape.like(each, TEMPORARIES) for each in kept[:3])
        del row_sums
        return of_q, of_k, of_v

    return tape.connect(out, (q, k, v), backward)


def cpu_attention(
    ops: Operators, q: Tensor, k: Tensor, v: Tensor, *, num_rows: int, additive_mask: Tensor | None
) -> Tensor:
    """The CPU's flash kernel: grouped heads as they are, a log-sum-exp ``[B, H, S]`` in fp32, three gradients, and the
    mask that it adds."""
    tape = ops.tape
    out = tape.like(q, "attention")
    log_sum_exp = tape.new(num_rows, FP32, "attention")
    if not tape.differentiates(q, k, v):
        return out
    mask = () if additive_mask is None else (tape.save(additive_mask),)
    kept = (*(tape.save(each) for each in (q, k, v, out, log_sum_exp)), *mask)

    def backward(_grad: Tensor) -> Gradients:
        of_q, of_k, of_v = (tape.like(each, TEMPORARIES) for each in kept[:3])
        return of_q, of_k, of_v

    return tape.connect(out, (q, k, v), backward)


def repeat_heads(ops: Operators, x: Tensor, groups: int) -> Tensor:
    """Key or value heads written out once per query head of their group."""
    if groups == 1:
        return x
    out = ops.tape.new(x.numel * groups, x.itemsize, "attention")
    return ops.tape.connect(out, (x,), ops.tape.one_gradient(numel=x.numel))


def expand_heads(ops: Operators, x: Tensor, groups: int) -> Tensor:
    """The same for a single key or value head, where it is a view until a product needs it written out."""
    view = Tensor(x.storage, x.numel * groups, x.itemsize)
    return ops.tape.connect(view, (x,), ops.tape.one_gradient(numel=x.numel))
