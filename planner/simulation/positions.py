"""What is made of position ids: a few KiB, which decide the peaks of tiny models only, and where large tensors lie.

As transformers makes it; ``counts_positions`` of the decoder asks for it.
"""

from __future__ import annotations

from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.autograd import Tape, Tensor
from meft.planner.simulation.formats import BOOL, FP32, INT64
from meft.planner.simulation.operators import Operators


def position_ids(tape: Tape, setup: TrainingSetup) -> Tensor:
    """Position ids, and the question whether several sequences are packed in one, which is answered on the way."""
    batch, length = setup.batch_size, setup.seq_len
    counted = tape.new(length, INT64, "positions")
    positions = tape.new(length, INT64, "positions")
    del counted
    if setup.model.learned_positions:
        return positions
    _whether_packed(tape, batch, length)
    return positions


def _whether_packed(tape: Tape, batch: int, length: int) -> None:
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
    del first, steps, sequences


def rotary_tables(ops: Operators, setup: TrainingSetup, numel: int, itemsize: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each of ``numel``, from the angles of every position."""
    tape, category = ops.tape, "rotary_tables"
    wide = tape.new(setup.seq_len, FP32, category)
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
    for a second mask, before which the question of packed sequences is asked again."""
    length, category = setup.seq_len, "attention_mask"
    if sliding:
        _whether_packed(tape, setup.batch_size, length)
    batches, heads = tape.new(setup.batch_size, INT64, category), tape.new(1, INT64, category)
    counted = tape.new(length, INT64, category)
    queries = tape.new(length, INT64, category)
    del counted
    counted = tape.new(length, INT64, category)
    keys = tape.new(length, INT64, category)
    del counted
    near = _within_window(tape, length) if sliding else None
    allowed = tape.new(length**2, BOOL, category)
    if near is not None:
        both = tape.new(length**2, BOOL, category)
        allowed = both
        del both, near
    del batches, heads, queries, keys
    zero, least = tape.new(1, itemsize, category), tape.new(1, itemsize, category)
    mask = tape.new(setup.batch_size * length**2, itemsize, category)
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
