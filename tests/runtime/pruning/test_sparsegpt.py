"""SparseGPT on one layer: worked by hand, against least squares, and against what it must beat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meft.planner.base.errors import UsageError
from meft.runtime.pruning.sparsegpt import (
    COLUMNS_AT_ONCE,
    DAMPING,
    Hessian,
    Sparsity,
    objective,
    parse_sparsity,
    pruned,
    pruned_by_magnitude,
)

HALF, TWO_OF_FOUR = Sparsity(0.5), Sparsity(0.5, 2, 4)


def layer(rows: int, columns: int, *, seed: int = 0, tokens: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights, and the Hessian of inputs that go together, as a model's do: a few directions hold most."""
    chance = torch.Generator().manual_seed(seed)
    directions = torch.randn(columns // 4 or 1, columns, generator=chance)
    inputs = torch.randn(tokens, len(directions), generator=chance) @ directions
    inputs += torch.randn(tokens, columns, generator=chance)
    hessian = Hessian(columns, torch.device("cpu"))
    hessian.add(inputs)
    return torch.randn(rows, columns, generator=chance), hessian.matrix


def test_two_by_four_by_hand() -> None:
    """Inputs 0 and 1 are always equal, and so are 2 and 3: ``H`` is two blocks of ones, damped ``[[1.01, 1], [1,
    1.01]]``. Giving up the left of a pair costs ``w^2 / (1.01 / 0.0201)``, since the right one can stand in for it;
    giving up the right one, once the left is decided, ``w^2 / (1 / 1.01)``. So both left ones go, whatever the size of
    these weights, and each right one takes ``w / 1.01`` over."""
    pair = torch.ones(2, 2)
    hessian = torch.block_diag(pair, pair)
    weight = torch.tensor([[1.0, 4.0, 3.0, 8.0], [-2.0, 5.0, 1.0, -6.0]])
    expected = torch.tensor([[0.0, 4 + 1 / 1.01, 0.0, 8 + 3 / 1.01], [0.0, 5 - 2 / 1.01, 0.0, -6 + 1 / 1.01]])
    assert DAMPING == 0.01
    for sparsity in (TWO_OF_FOUR, HALF):
        torch.testing.assert_close(pruned(weight, hessian, sparsity), expected, rtol=1e-4, atol=1e-4)


def test_inputs_that_know_nothing_of_each_other_leave_nothing_to_make_up() -> None:
    weight, _ = layer(8, 16)
    assert torch.equal(pruned(weight, torch.eye(16), TWO_OF_FOUR), pruned_by_magnitude(weight, TWO_OF_FOUR))


def test_what_is_left_is_the_least_squares_answer() -> None:
    """Of one row the first weight is made to go; the others are what solves the damped normal equations without it."""
    weight, hessian = layer(1, 6)
    weight += 3 * weight.sign()
    weight[0, 0] = 0.2
    found = pruned(weight, hessian, Sparsity(1 / 6))
    assert (found[0] == 0).nonzero().tolist() == [[0]]
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(6)
    change = torch.linalg.solve(damped[1:, 1:], damped[1:, 0] * weight[0, 0])
    torch.testing.assert_close(found[0, 1:], weight[0, 1:] + change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR, Sparsity(0.5, 4, 8), Sparsity(0.8)], ids=str)
@pytest.mark.parametrize("columns", [64, COLUMNS_AT_ONCE + 64])
def test_it_leaves_as_many_zeros_as_asked_and_less_error_than_magnitude(sparsity: Sparsity, columns: int) -> None:
    weight, hessian = layer(48, columns)
    own, other = pruned(weight, hessian, sparsity), pruned_by_magnitude(weight, sparsity)
    for changed in (own, other):
        assert int((changed == 0).sum()) == pytest.approx(sparsity.fraction * weight.numel(), abs=2)
        if sparsity.is_structured:
            assert ((changed.view(48, -1, sparsity.group) == 0).sum(dim=-1) == sparsity.zeros).all()
    assert objective(weight, own, hessian) < 0.8 * objective(weight, other, hessian)


@given(parts=st.lists(st.integers(0, 40), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_a_hessian_is_the_same_however_its_tokens_come(parts: list[int]) -> None:
    inputs = torch.randn(sum(parts), 5, generator=torch.Generator().manual_seed(sum(parts)))
    hessian, first = Hessian(5, torch.device("cpu")), 0
    for part in parts:
        hessian.add(inputs[first : first + part].unsqueeze(0))
        first += part
    assert hessian.num_tokens == sum(parts)
    torch.testing.assert_close(hessian.matrix, inputs.t() @ inputs / max(sum(parts), 1), rtol=1e-4, atol=1e-5)


def test_inputs_that_are_always_zero_take_no_weight() -> None:
    weight, hessian = layer(4, 8)
    hessian[3] = hessian[:, 3] = 0.0
    found = pruned(weight, hessian, HALF)
    assert torch.isfinite(found).all()
    assert (found[:, 3] == 0).all()


@pytest.mark.parametrize("text", ["0", "1", "50%", "4:4", "0:4", "2:0", "nan", "", "2:4:8"])
def test_a_sparsity_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--sparsity"):
        parse_sparsity(text)


def test_sparsities_as_people_write_them() -> None:
    assert parse_sparsity("0.5") == HALF
    assert parse_sparsity("2:4") == TWO_OF_FOUR
    assert [str(each) for each in (HALF, TWO_OF_FOUR)] == ["0.5", "2:4"]


def test_groups_that_do_not_divide_a_layer_are_refused() -> None:
    with pytest.raises(UsageError, match="groups of 3"):
        pruned(torch.ones(2, 8), torch.eye(8), Sparsity(1 / 3, 1, 3))
