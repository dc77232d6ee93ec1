"""Memory-only differentiation: lifetimes that can be followed by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from meft.planner.simulation.autograd import Leaf, Tape, Tensor
from meft.planner.simulation.operators import Operators, Weights
from meft.planner.terms.formats import FP32


def live(tape: Tape) -> int:
    return sum(event.num_bytes for event in tape.events)


def peak(tape: Tape) -> int:
    total = most = 0
    for event in tape.events:
        total += event.num_bytes
        most = max(most, total)
    return most


def leaf(tape: Tape, numel: int) -> Tensor:
    return tape.parameter(numel, FP32, "weights")


def gradient(tensor: Tensor) -> Tensor | None:
    assert isinstance(tensor.node, Leaf)
    return tensor.node.grad


def test_a_tensor_goes_with_its_last_reference() -> None:
    tape = Tape()
    x = tape.new(10, 4, "x")
    view = x.detached()
    del x
    assert live(tape) == 40
    del view
    assert live(tape) == 0


def test_what_backward_needs_stays_and_goes_once_it_has_run() -> None:
    tape = Tape()
    x = leaf(tape, 10)  # 40 bytes, kept by nobody else
    y = tape.unary(x, "y", saves=tape.new(100, 4, "saved"))
    assert live(tape) == 40 + 40 + 400
    tape.backward(y, tape.new(10, 4, "gradient"))
    assert live(tape) == 40 + 40 + 40  # weight, y, gradient of the weight
    assert gradient(x) is not None


def test_operators_without_a_trained_input_keep_nothing() -> None:
    tape = Tape()
    x = tape.parameter(10, 4, "frozen", trained=False)
    y = tape.unary(x, "y", saves=tape.new(100, 4, "saved"))
    assert live(tape) == 80
    with pytest.raises(ValueError, match="nothing is trained"):
        tape.backward(y, tape.new(10, 4, "gradient"))


def test_backward_runs_once() -> None:
    tape = Tape()
    y = tape.unary(leaf(tape, 10), "y")
    tape.backward(y, tape.new(10, 4, "gradient"))
    with pytest.raises(RuntimeError, match="second time"):
        tape.backward(y, tape.new(10, 4, "gradient"))


@pytest.mark.parametrize(("in_place", "sums"), [(True, 0), (False, 1)])
def test_gradients_that_meet_are_summed_in_place_where_nothing_else_holds_them(in_place: bool, sums: int) -> None:
    tape = Tape(sums_in_place=in_place)
    x = leaf(tape, 10)
    ops = Operators(tape)
    y = ops.add(ops.scale(x, "a"), ops.scale(x, "b"), "y")
    made = len([event for event in tape.events if event.num_bytes > 0])
    tape.backward(y, tape.new(10, 4, "gradient"))
    added = [event for event in tape.events if event.num_bytes > 0][made:]
    # the gradient given, one for each product, and the sum if it needs room of its own
    assert len(added) == 1 + 2 + sums


def test_a_gradient_that_two_share_is_not_summed_into() -> None:
    tape = Tape()
    x = leaf(tape, 10)
    ops = Operators(tape)
    doubled = ops.add(x, x, "y")  # both gradients are the incoming one
    before = len([event for event in tape.events if event.num_bytes > 0])
    tape.backward(doubled, tape.new(10, 4, "gradient"))
    assert len([event for event in tape.events if event.num_bytes > 0]) - before == 2


def test_a_second_backward_adds_to_the_gradient_that_is_there() -> None:
    tape = Tape()
    x = leaf(tape, 10)
    for _ in range(2):
        tape.backward(tape.unary(x, "y"), tape.new(10, 4, "gradient"))
    assert live(tape) == 80


def test_gradients_are_fitted_to_what_was_broadcast_and_cast() -> None:
    tape = Tape()
    ops = Operators(tape)
    bias = tape.parameter(5, 2, "bias")
    y = ops.add(tape.new(50, 4, "x"), bias, "y")
    assert (y.numel, y.itemsize) == (50, 4)
    tape.backward(y, tape.new(50, 4, "gradient"))
    grad = gradient(bias)
    assert grad is not None
    assert (grad.numel, grad.itemsize, grad.storage.num_bytes) == (5, 2, 10)


@pytest.mark.parametrize(("trained", "kept"), [(False, 0), (True, 48)])
def test_a_linear_layer_keeps_its_input_only_if_its_weight_is_trained(trained: bool, kept: int) -> None:
    # 4 tokens, 3 inputs, 5 outputs, fp32; the input is the product of a leaf, so a gradient flows through it
    tape = Tape()
    ops = Operators(tape)
    weight, start = tape.parameter(15, 4, "weight", trained=trained), leaf(tape, 12)
    x = ops.scale(start, "x")
    y = ops.linear(x, Weights(3, 5, weight), "y")
    del x
    assert live(tape) == 60 + 48 + 80 + kept
    tape.backward(y, tape.new(20, 4, "gradient"))
    assert live(tape) == 60 + 48 + 80 + 48 + (60 if trained else 0)


def chain(tape: Tape, depth: int, *, checkpointed: bool, reentrant: bool = False) -> tuple[int, int]:
    """Bytes kept after forward, and the peak, of ``depth`` blocks that keep two tensors each."""
    ops = Operators(tape)
    weight = leaf(tape, 10)
    x = ops.scale(weight, "embedded")

    def block(inner: Tensor) -> Tensor:
        hidden = ops.keeps_input(inner, "block")
        return ops.keeps_input(hidden, "block")

    for _ in range(depth):
        x = tape.checkpoint(block, x, reentrant=reentrant) if checkpointed else block(x)
    kept = live(tape)
    tape.backward(x, tape.new(10, 4, "gradient"))
    return kept, peak(tape)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_region_keeps_its_input_alone(reentrant: bool) -> None:
    plain, _ = chain(Tape(), 10, checkpointed=False)
    kept, most = chain(Tape(), 10, checkpointed=True, reentrant=reentrant)
    assert kept == 40 + 40 + 10 * 40  # weight, embedded, one output per block
    assert kept < plain
    assert most <= kept + 5 * 40  # one block's tensors and its gradients on top


def test_both_ways_of_checkpointing_give_the_same_gradients() -> None:
    for reentrant in (False, True):
        tape = Tape()
        x = leaf(tape, 10)
        ops = Operators(tape)
        weight = leaf(tape, 100)
        y = tape.checkpoint(
            lambda inner, ops=ops, weight=weight: ops.linear(inner, Weights(10, 10, weight), "y"),
            x,
            reentrant=reentrant,
        )
        tape.backward(y, tape.new(10, 4, "gradient"))
        assert [gradient(each) is not None for each in (x, weight)] == [True, True]


def test_every_tensor_comes_once_and_goes_at_most_once() -> None:
    tape = Tape()
    chain(tape, 3, checkpointed=True)
    counts = Counter((event.tensor, event.num_bytes > 0) for event in tape.events)
    assert max(counts.values()) == 1
    assert all((number, True) in counts for number, _ in counts)
