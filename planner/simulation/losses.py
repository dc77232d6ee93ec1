"""Losses as people run them: what each makes, keeps and makes in backward, from the last hidden states on.

Letters: ``T`` tokens, ``D`` hidden size, ``V`` vocabulary. ``LOSS_KINDS`` says whose each is and what a logit costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from meft.planner.records.setup import LossName, TrainingSetup
from meft.planner.simulation.autograd import TEMPORARIES, Gradients, Tensor
from meft.planner.simulation.decoder import Decoder
from meft.planner.simulation.operators import Operators
from meft.planner.terms.formats import FP32

TORCHTUNE_CHUNKS = 8
TRL_TILE_TOKENS = 4096
TRL_TILE_VOCABULARY = 32_768
TRL_STATISTICS = 7
"""Numbers per token that TRL folds the tiles into: maxima, sums of exponentials, the target's logit."""


@dataclass(frozen=True)
class LossKind:
    """``logit_bytes``: bytes per token and entry of the vocabulary at the loss's largest moment, for bf16 logits that
    the loop lets go before backward; 0 where a tile or chunk of bounded size is all there ever is."""

    used_by: str
    logit_bytes: float


LOSS_KINDS: dict[LossName, LossKind] = {
    "hf": LossKind("transformers from 4.49 on: labels shifted, logits upcast", 12),
    "hf-shifted-logits": LossKind("transformers 4.45 to 4.48: logits upcast, shifted and copied", 14),
    "fused-ce": LossKind("Unsloth, foak or Liger's cross-entropy over bf16 logits, gradient in place", 2),
    "fused-ce-shifted": LossKind("such a kernel under transformers 4.45 to 4.48: upcast, shifted, in place", 10),
    "fused-ce-upcast": LossKind(
        "such a kernel before transformers 4.45, whose models upcast their logits; Mistral's up to 4.47", 8
    ),
    "fused-linear-ce": LossKind("Liger's fused head and loss", 0),
    "trl-chunked": LossKind("TRL from 1.0 on, its default: the head in tiles, computed again in backward", 0),
    "torchtune-chunked": LossKind("torchtune's CEWithChunkedOutputLoss, 8 chunks, not compiled", 6.5),
}


@dataclass
class Losses:
    """The loss of one model's last hidden states."""

    ops: Operators
    decoder: Decoder
    setup: TrainingSetup

    def of(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The loss, and the logits that the model returns with it, if there are any."""
        name = self.setup.loss
        if name == "fused-linear-ce":
            return self._fused_linear(hidden), None
        if name == "trl-chunked":
            return self._tiled(hidden), None
        if name == "torchtune-chunked":
            return self._chunked(hidden)
        logits = self.decoder.logits(hidden)
        if name == "fused-ce-upcast":  # the model's own forward upcasts, and lets the 16-bit logits go
            logits = self.ops.cast(logits, FP32, "logits")
            return self._in_place(self._shifted(logits)), logits
        if name == "fused-ce-shifted":
            return self._in_place(self._shifted(self.ops.cast(logits, FP32, "loss_chain"))), logits
        if name == "fused-ce":
            return self._in_place(logits), logits
        wide = self.ops.cast(logits, FP32, "loss_chain")
        if name == "hf":
            return self.ops.cross_entropy(wide), logits
        return self.ops.cross_entropy(self._shifted(wide)), logits

    def _shifted(self, wide: Tensor) -> Tensor:
        """Without each sequence's last token: a copy, but of a single sequence, which is without gaps as it is."""
        last_left_out = wide.numel // self.setup.seq_len * (self.setup.seq_len - 1)
        shifted = self.ops.slice(wide, last_left_out)
        return shifted if self.setup.batch_size == 1 else self.ops.copy(shifted, "loss_chain")

    def _in_place(self, logits: Tensor) -> Tensor:
        """A kernel that writes the logits' gradient over the logits."""
        tape, tokens = self.ops.tape, self.setup.tokens
        loss = tape.new(tokens, FP32, "loss_chain")
        log_sum_exp = tape.new(tokens, FP32, "loss_chain")
        kept = [tape.save(logits), tape.save(log_sum_exp)]
        return tape.connect(loss, (logits,), lambda _grad: (kept[0].detached(),))

    def _fused_linear(self, normalised: Tensor) -> Tensor:
        """Head and loss in chunks of tokens, gradients and all, while going forward; no more than a chunk's logits
        exist at once."""
        setup, shape, ops, tape = self.setup, self.setup.model, self.ops, self.ops.tape
        head = self.decoder.weights.head
        trained = head.weight.requires_grad
        gradient = tape.like(normalised, "loss_chain")
        of_head = tape.like(head.weight, "loss_chain") if trained else None
        loss = tape.new(setup.tokens, FP32, "loss_chain")
        rows = fused_linear_chunk(tokens=setup.tokens, vocab_size=shape.vocab_size, hidden_size=shape.hidden_size)
        weight = ops.autocast_weight(head.weight)
        for start in range(0, setup.tokens, rows):
            size = min(rows, setup.tokens - start)
            logits = tape.new(size * shape.vocab_size, weight.itemsize, "logits")
            if trained:  # the chunk's share of the head's gradient, and its copy in fp32
                product = tape.like(weight, "loss_chain")
                wide = tape.new(weight.numel, FP32, "loss_chain")
                del product, wide
            del logits
        made = (gradient, of_head)
        return tape.connect(
            loss,
            (normalised, head.weight),
            lambda _grad: tuple(None if each is None else each.detached() for each in made),
        )

    def _tiled(self, hidden: Tensor) -> Tensor:
        """TRL's ChunkedLogProbFunction: tiles of tokens and vocabulary through one buffer, forward and again backward,
        where the gradients are summed in fp32 and cast at the end."""
        setup, tape, head = self.setup, self.ops.tape, self.decoder.weights.head
        rows, trained = min(setup.tokens, TRL_TILE_TOKENS), head.weight.requires_grad
        compute = self.ops.autocast_bytes or hidden.itemsize
        tile_numel = rows * TRL_TILE_VOCABULARY
        selected = self.ops.copy(hidden, "loss_chain")  # the positions that have a label
        statistics = [tape.new(setup.tokens, FP32, "loss_chain") for _ in range(TRL_STATISTICS)]
        tile = tape.new(tile_numel, compute, "logits")
        del tile
        loss, log_z = tape.new(setup.tokens, FP32, "loss_chain"), tape.new(setup.tokens, FP32, "loss_chain")
        kept = (tape.save(selected), tape.save(log_z))
        del statistics
        numel, itemsize, weight = selected.numel, selected.itemsize, head.weight

        def backward(_grad: Tensor) -> Gradients:
            _ = kept
            of_hidden = tape.new(numel, FP32, TEMPORARIES)
            of_weight = tape.new(weight.numel, FP32, "gradients") if trained else None
            again = tape.new(tile_numel, compute, "logits")
            del again
            narrow = of_hidden if itemsize == FP32 else tape.new(numel, itemsize, TEMPORARIES)
            del of_hidden
            if of_weight is not None and weight.itemsize != FP32:
                of_weight = tape.like(weight, "gradients")
            return narrow, of_weight

        return tape.connect(loss, (selected, weight), backward)

    def _chunked(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """torchtune's: the head chunk by chunk, all chunks' logits held; each chunk upcast and its loss taken alone."""
        ops, setup = self.ops, self.setup
        chunks = min(TORCHTUNE_CHUNKS, setup.seq_len)
        parts = ops.split(hidden, (hidden.numel // chunks,) * chunks)
        logits = [ops.linear(part, self.decoder.weights.head, "logits") for part in parts]
        del parts
        total: Tensor | None = None
        for chunk in logits:
            loss = ops.cross_entropy(ops.cast(chunk, FP32, "loss_chain"))
            total = loss if total is None else ops.add(total, loss, "loss_chain")
        assert total is not None
        return total, None


def fused_linear_chunk(*, tokens: int, vocab_size: int, hidden_size: int) -> int:
    """Tokens per chunk of Liger's fused head and loss: so few that a chunk's logits are about as large as the hidden
    states (the next power of two)."""
    factor = -(-vocab_size // hidden_size)
    return int(1 << (-(-tokens // factor) - 1).bit_length())
