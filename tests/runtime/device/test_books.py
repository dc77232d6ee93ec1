"""The emulated device's books: what is counted, when it is let go, and what is refused."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meft.planner.allocator.blocks import Pool
from meft.planner.allocator.caching import round_block
from meft.planner.base.errors import EXIT_MACHINE, DeviceOutOfMemory
from meft.runtime.device.books import DeviceBooks, WrongPlaceError

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # errors in a release

MIB = 1 << 20
KIB_OF_FLOATS = 256
"""Elements of a float32 tensor of 1 KiB, which is two of the allocator's blocks of 512 bytes."""


def allocated(books: DeviceBooks) -> int:
    return books.allocator.allocated_bytes


# --- what counts -----------------------------------------------------------------------------------------------------


def test_a_storage_counts_from_its_allocation_to_its_release() -> None:
    books = DeviceBooks()
    with books:
        first = torch.empty(KIB_OF_FLOATS)
        assert allocated(books) == 1024
        second = torch.ones(1)
        assert allocated(books) == 1024 + 512  # 4 bytes take a block of 512
        del first
        assert allocated(books) == 512
    del second
    assert allocated(books) == 0  # leaving the scope does not matter, only the storage's end does
    assert books.allocator.peak_allocated_bytes == 1536


def test_the_result_and_the_temporaries_of_an_expression_count() -> None:
    books = DeviceBooks()
    with books:
        x = torch.ones(KIB_OF_FLOATS)
        y = (x + 1) * 2  # x, the sum and the product are alive together; then the sum goes
        assert books.allocator.peak_allocated_bytes == 3 * 1024
        assert allocated(books) == 2 * 1024
        assert y.sum() == 4 * KIB_OF_FLOATS


@pytest.mark.parametrize(
    "view_of",
    [
        pytest.param(lambda x: x[10:20], id="slice"),
        pytest.param(lambda x: x.view(16, 16).T, id="view and transpose"),
        pytest.param(lambda x: x.detach(), id="detach"),
        pytest.param(lambda x: x.view(16, 16).expand(3, 16, 16), id="expand"),
        pytest.param(lambda x: x.add_(1), id="in place"),
        pytest.param(lambda x: torch.add(x, 1, out=x), id="out"),
    ],
)
def test_a_view_is_not_counted_again_and_keeps_its_storage(view_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    books = DeviceBooks()
    with books:
        x = torch.zeros(KIB_OF_FLOATS)
        view = view_of(x)
        assert allocated(books) == 1024
        del x
        gc.collect()
        assert allocated(books) == 1024
        del view
    assert allocated(books) == 0


def test_what_autograd_saves_counts_until_backward_has_used_it() -> None:
    books = DeviceBooks()
    with books:
        x = torch.ones(KIB_OF_FLOATS, requires_grad=True)
        y = x.exp()  # keeps its result for backward
        total = y.sum()
        del y
        gc.collect()
        assert allocated(books) == 1024 + 1024 + 512  # x, what exp saved, and the sum
        total.backward()
        del total
        assert x.grad is not None
        assert allocated(books) == 2 * 1024  # x and its gradient


def test_an_empty_tensor_takes_nothing() -> None:
    books = DeviceBooks()
    with books:
        empty = torch.empty(0)
        assert allocated(books) == 0
        assert empty.add(1).numel() == 0
        assert not books.holds(empty)


def test_a_tensor_made_elsewhere_can_be_adopted_once() -> None:
    books = DeviceBooks()
    tensor = torch.ones(KIB_OF_FLOATS)
    books.adopt(tensor)
    books.adopt(tensor.view(16, 16))
    assert books.holds(tensor)
    assert allocated(books) == 1024
    with books:
        assert (tensor * 2).shape == tensor.shape
    del tensor
    assert allocated(books) == 0


@given(st.lists(st.tuples(st.integers(1, 3 * MIB // 4), st.integers(0, 3)), max_size=20))
def test_live_blocks_are_what_is_counted(steps: list[tuple[int, int]]) -> None:
    books = DeviceBooks()
    live: list[torch.Tensor] = []
    with books:
        for num_bytes, releases in steps:
            live.append(torch.empty(num_bytes, dtype=torch.uint8))
            del live[:releases]
            # blocks up to 1 MiB are split exactly, so nothing is counted beyond the rounding to 512
            assert allocated(books) == sum(round_block(tensor.nbytes) for tensor in live)
    live.clear()
    assert allocated(books) == 0


# --- host and device -------------------------------------------------------------------------------------------------


def test_a_storage_that_its_owner_empties_and_refills_counts_while_it_is_full() -> None:
    """``resize_`` is no operator: the books see it when the next one comes, and the refill when one is given it."""
    books = DeviceBooks()
    with books:
        with books.category("gathered"):
            tensor = torch.empty(KIB_OF_FLOATS)
            books.follow(tensor)
        storage = tensor.untyped_storage()
        for _ in range(2):
            storage.resize_(0)
            other = torch.empty(KIB_OF_FLOATS)  # an operator
            assert allocated(books) == 1024
            del other
            storage.resize_(1024)
            tensor.zero_()
            assert allocated(books) == 1024
        books.reset_peaks()
        assert books.peak_by_category == {"gathered": 1024}
        storage.resize_(0)
        del tensor, storage
        assert torch.ones(1).numel() == 1
    assert allocated(books) == 0
    assert books._followed == {}


def test_host_work_inside_the_scope_is_not_counted() -> None:
    books = DeviceBooks()
    with books:
        with books.host():
            host = torch.ones(KIB_OF_FLOATS)
            host = host * 2
            with books.host():
                assert torch.equal(host, host.clone())
            assert torch.equal(host, host.clone())  # an inner end does not end the outer one
        assert allocated(books) == 0
        assert not books.holds(host)


def test_a_device_operator_refuses_a_host_tensor() -> None:
    books = DeviceBooks()
    host = torch.ones(2, 3)
    with books:
        device = torch.ones(2, 3)
        with pytest.raises(
            WrongPlaceError, match=r"aten\.add.*handed a host tensor of shape \(2, 3\), dtype torch.float32"
        ):
            device + host
        with pytest.raises(WrongPlaceError, match="move it through the transfer engine"):
            device.copy_(host)
        with pytest.raises(WrongPlaceError, match=r"shape \(3, 2\)"):
            torch.mm(device, host.T)  # its transposed view is still on the host
        with pytest.raises(WrongPlaceError, match=r"aten\.cat"):
            torch.cat([device, host])
        with pytest.raises(WrongPlaceError, match="host tensor"):
            host.sum()
        assert allocated(books) == 512


def test_a_view_of_a_host_tensor_stays_on_the_host() -> None:
    books = DeviceBooks()
    host = torch.ones(4, 4)
    with books:
        views = host[1:], host.T, host.detach(), host.view(16)
    assert allocated(books) == 0
    assert not any(books.holds(view) for view in views)


def test_a_host_number_is_welcome_as_on_cuda() -> None:
    books = DeviceBooks()
    number = torch.tensor(3.0)
    with books:
        tripled = torch.ones(4) * number
    assert tripled.tolist() == [3.0] * 4


def test_outside_the_scope_nothing_is_watched() -> None:
    books = DeviceBooks()
    with books:
        device = torch.ones(2)
    assert torch.equal(device + torch.ones(2), torch.full((2,), 2.0))
    assert allocated(books) == 512


# --- categories and peaks --------------------------------------------------------------------------------------------


def test_categories_are_those_at_the_peak() -> None:
    books = DeviceBooks()
    with books:
        with books.category("weights"):
            weights = torch.ones(KIB_OF_FLOATS)
            with books.category("staging"):
                staging = torch.ones(1)
            more_weights = torch.ones(1)
        activations = weights * 2
        at_peak = {"weights": 1024 + 512, "staging": 512, "activations": 1024}
        assert books.peak_by_category == at_peak
        del activations, staging
        gradients = weights[:128] * 2  # 512 bytes: below the peak
        assert books.peak_by_category == at_peak
        assert sum(at_peak.values()) == books.allocator.peak_allocated_bytes
    assert weights.sum() + more_weights + gradients.sum() == KIB_OF_FLOATS + 1 + 256


def test_categories_add_up_to_the_peak_though_a_block_may_be_larger_than_asked_for() -> None:
    # 21 MiB get a segment of 22 MiB, and a remainder of 1 MiB is not split off: 22 MiB count as allocated.
    books = DeviceBooks()
    with books, books.category("weights"):
        weights = torch.empty(21 * MIB, dtype=torch.uint8)
    assert books.allocator.peak_allocated_bytes == 22 * MIB
    assert books.peak_by_category == {"weights": 22 * MIB}
    del weights
    with books:
        small = torch.empty(1)
    assert allocated(books) == 512
    assert small.numel() == 1


def test_peaks_start_anew_from_what_is_live() -> None:
    books = DeviceBooks()
    with books, books.category("weights"):
        weights = torch.ones(KIB_OF_FLOATS)
        assert (weights * 2).sum() == 2 * KIB_OF_FLOATS
    assert books.allocator.peak_allocated_bytes > 1024
    books.reset_peaks()
    assert books.allocator.peak_allocated_bytes == 1024
    assert books.peak_by_category == {"weights": 1024}
    del weights
    books.reset_peaks()
    assert books.allocator.peak_allocated_bytes == 0
    assert books.peak_by_category == {}


# --- the budget ------------------------------------------------------------------------------------------------------


def test_more_than_the_budget_is_out_of_memory_and_the_books_stay_right() -> None:
    books = DeviceBooks(capacity_bytes=20 * MIB)  # one segment of the large pool and nothing else
    with books:
        half = torch.empty(8 * MIB, dtype=torch.uint8)
        with pytest.raises(
            DeviceOutOfMemory, match=r"16\.0 MiB requested.*8\.0 MiB allocated.*capacity 20\.0 MiB"
        ) as caught:
            torch.empty(16 * MIB, dtype=torch.uint8)
        assert allocated(books) == 8 * MIB
        assert books.allocator.peak_allocated_bytes == 8 * MIB
        rest = torch.empty(8 * MIB, dtype=torch.uint8)  # what fits is still there to be had
        assert allocated(books) == 16 * MIB
    assert caught.value.exit_code == EXIT_MACHINE
    del half, rest, caught
    assert allocated(books) == 0


def test_an_operator_that_fails_halfway_leaves_nothing_behind() -> None:
    # Two results of 9 MiB: the first fits beside nothing else in the segment of 20 MiB, its indices of 8 bytes do not.
    books = DeviceBooks(capacity_bytes=20 * MIB)
    with books:
        values = torch.zeros(9 * MIB, dtype=torch.uint8)
        with pytest.raises(DeviceOutOfMemory):
            values.sort()  # values of 9 MiB and int64 indices of 72 MiB
        gc.collect()
        assert allocated(books) == 9 * MIB
        again = values.clone()
        assert allocated(books) == 18 * MIB
    del values, again
    assert allocated(books) == 0


def test_the_budget_holds_for_the_reserved_memory_that_a_cache_keeps() -> None:
    # The small pool's segment of 2 MiB is in the way of a large one until the cache is flushed, which happens once.
    books = DeviceBooks(capacity_bytes=20 * MIB)
    with books:
        small = torch.empty(1)
        with pytest.raises(DeviceOutOfMemory, match="reserved"):
            torch.empty(8 * MIB, dtype=torch.uint8)
        del small
        large = torch.empty(8 * MIB, dtype=torch.uint8)
    assert large.nbytes == allocated(books)
    del large
    assert allocated(books) == 0


def test_garbage_collected_in_the_middle_of_an_allocation_is_released_after_it(monkeypatch) -> None:
    # The free block of 1 KiB that is being cut lies beside the one that the collector frees: merging them then and
    # there would hand out memory twice.
    cut = Pool.cut

    def collect_and_cut(pool, block, size):
        gc.collect()
        return cut(pool, block, size)

    books = DeviceBooks()
    with books:
        free_later, cyclic = torch.empty(KIB_OF_FLOATS), [torch.empty(1)]
        cyclic.append(cyclic)  # only the collector can free it
        del free_later, cyclic
        assert allocated(books) == 512
        monkeypatch.setattr(Pool, "cut", collect_and_cut)
        kept = torch.empty(1)
        assert allocated(books) == 512  # the new one; the cycle is gone
    del kept
    assert allocated(books) == 0
    whole = books.allocator.malloc(2 * MIB - 1024)  # large pool; the small segment is one free block again
    books.allocator.empty_cache()
    assert books.allocator.reserved_bytes == 20 * MIB
    books.allocator.free(whole)
