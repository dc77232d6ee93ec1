"""What is made of position ids: a few KiB, which decide the peaks of tiny models only, and where large tensors lie.

As transformers makes it; ``counts_positions`` of the decoder asks for it.
"""

from __future__ import annotations

from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.autograd import Tape, Tensor
from meft.planner.simulation.operators import Operators
from meft.planner.terms.formats import BOOL, FP32, INT64


def positions_from_labels(tape: Tape, setup: TrainingSetup) -> Tensor | None:
    """Position ids ``[B, S]`` of packed documents, made before the model from the labels that tell where each begins
    (``runtime/session/documents.py``); None where each sequence is one."""
    if not setup.packed:
        return None
    starts, places = tape.new(setup.tokens, BOOL, "positions"), tape.new(setup.seq_len, INT64, "positions")
    zero = tape.new(1, INT64, "positions")
    begins = tape.new(setup.tokens, INT64, "positions")
    del zero
    first, indices = (tape.new(setup.tokens, INT64, "positions") for _ in range(2))
    del begins, indices
    positions = tape.new(setup.tokens, INT64, "positions")
    del starts, places, first
    return positions


def position_ids(tape: Tape, setup: TrainingSetup) -> Tensor:
    """Position ids ``[S]``. Nobody asks whether several sequences are packed in one: the runtime knows."""
    counted = tape.new(setup.seq_len, INT64, "positions")
    positions = tape.new(setup.seq_len, INT64, "positions")
    del counted
    return positions


def _whether_packed(tape: Tape, batch: int, length: int) -> Tensor:
    """The number of each token's sequence, and whether there is more than one."""
    first = tape.new(batch, INT64, "positions")
    prefixed = tape.new(batch * (length + 1), INT64, "positions")
    steps = tape.new(batch * length, INT64, "positions")
    del prefixed
    jumps = tape.new(batch * length, BOOL, "positions")
    sequences = tape.new(batch * length, INT64, "positions")
    del jumps
    alike = tape.new(batch, BOOL, "positions")
    answer = tape.new(1, BOOL, "positions")
    del alike
    del answer
    del first, steps
    return sequences


def block_mask(tape: Tape, setup: TrainingSetup, *, sliding: bool, added: int | None = None) -> Tensor:
    """Which key is of which query's document and not after it, nor too far before it where ``sliding``,
    ``[B, 1, S, S]``: a byte each, as sdpa is given it, or numbers of ``added`` bytes to add to scores."""
    category, numel = "attention_mask", setup.tokens * setup.seq_len
    sequences = _whether_packed(tape, setup.batch_size, setup.seq_len)
    ranges = _ranges(tape, setup.batch_size, setup.seq_len)
    everything = tape.new(1, BOOL, category)
    looked_up = _looked_up(tape, setup)
    alike = tape.new(numel, BOOL, category)
    del looked_up
    one_document = tape.new(numel, BOOL, category)
    del alike, everything
    looked_up = _looked_up(tape, setup)
    causal = _near_and_before(tape, setup) if sliding else tape.new(numel, BOOL, category)
    del looked_up
    mask = tape.new(numel, BOOL, category)
    del causal, one_document, ranges
    if added is not None:
        mask = _additive(tape, setup, mask, added)
    del sequences
    return mask


def _looked_up(tape: Tape, setup: TrainingSetup) -> tuple[Tensor, Tensor]:
    """A number of each query and of each key."""
    return tape.new(setup.tokens, INT64, "attention_mask"), tape.new(setup.tokens, INT64, "attention_mask")


def _near_and_before(tape: Tape, setup: TrainingSetup) -> Tensor:
    """Which key is within a query's window, and of those, which is not after it."""
    category, numel = "attention_mask", setup.tokens * setup.seq_len
    everything, differences = tape.new(1, BOOL, category), tape.new(setup.tokens, INT64, category)
    near = tape.new(numel, BOOL, category)
    del differences
    within = tape.new(numel, BOOL, category)
    del near, everything
    before = tape.new(numel, BOOL, category)
    both = tape.new(numel, BOOL, category)
    del before, within
    return both


def _ranges(tape: Tape, batch: int, length: int) -> tuple[Tensor, ...]:
    """Indices of sequences, heads, queries and keys."""
    category = "attention_mask"
    found = [tape.new(batch, INT64, category), tape.new(1, INT64, category)]
    for _ in range(2):
        counted = tape.new(length, INT64, category)
        found.append(tape.new(length, INT64, category))
        del counted
    return tuple(found)


def rotary_tables(ops: Operators, setup: TrainingSetup, numel: int, itemsize: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each of ``numel``, from the angles of every position."""
    tape, category = ops.tape, "rotary_tables"
    wide = tape.new(setup.positions, FP32, category)
    angles = tape.new(numel // 2, FP32, category)
    del wide
    both = tape.new(numel, FP32, category)
    with tape.no_grad():
        tables = []
        for _ in range(2):
            plain = tape.new(numel, FP32, category)
            tables.append(tape.new(numel, FP32, category))
            del plain
        cosines, sines = (ops.cast(table, itemsize, category) for table in tables)
    del angles, both, tables
    return cosines, sines


def eager_mask(tape: Tape, setup: TrainingSetup, itemsize: int, *, sliding: bool) -> Tensor:
    """Which key is not after which query, and from that what is added to scores. ``sliding``: nor too far before it,
    for a second mask."""
    if setup.packed:
        return block_mask(tape, setup, sliding=sliding, added=itemsize)
    length, category = setup.seq_len, "attention_mask"
    ranges = _ranges(tape, setup.batch_size, length)
    near = _within_window(tape, length) if sliding else None
    allowed = tape.new(length**2, BOOL, category)
    if near is not None:
        both = tape.new(length**2, BOOL, category)
        allowed = both
        del both, near
    del ranges
    return _additive(tape, setup, allowed, itemsize)


def _additive(tape: Tape, setup: TrainingSetup, allowed: Tensor, itemsize: int) -> Tensor:
    """What is added to scores, ``[B, 1, S, S]``."""
    zero, least = (tape.new(1, itemsize, "attention_mask") for _ in range(2))
    mask = tape.new(setup.batch_size * setup.seq_len**2, itemsize, "attention_mask")
    del allowed, zero, least
    return mask


def _within_window(tape: Tape, length: int) -> Tensor:
    """Which key is within the window of which query, out of a constant, differences and their comparison."""
    constant, differences = tape.new(1, BOOL, "attention_mask"), tape.new(length, INT64, "attention_mask")
    compared = tape.new(length**2, BOOL, "attention_mask")
    del differences
    near = tape.new(length**2, BOOL, "attention_mask")
    del compared, constant
    return near
