"""The compiled kernels against the readable code they stand for, whatever the dtype and the number of threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meft.runtime.host import kernels as kernels_module
from meft.runtime.host.kernels import HostKernels
from meft.runtime.host.optimizer import AdamWSettings, update_layer, update_touched_rows
from meft.runtime.host.router import TopKRouter, capped_union
from meft.runtime.host.store import HostStore
from meft.runtime.host.streaming_copy import can_stream

SAME_FP32 = {"rtol": 1e-5, "atol": 1e-7}
"""Torch fuses a multiplication with an addition here and there; over a few steps that is a few units in the last
place, more where terms of the update cancel."""
SAME_FP64 = {"rtol": 1e-13, "atol": 1e-15}
WIDTH, HIDDEN = 37, 19


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def kernels(request, monkeypatch):
    monkeypatch.setattr(kernels_module, "INLINE_BYTES", 0)  # small arrays are split too
    made = HostKernels(request.param)
    yield made
    made.close()


def store_of(kernels: HostKernels | None, dtype: torch.dtype, **options: object) -> HostStore:
    store = HostStore(num_layers=1, adapter_width=WIDTH, hidden_size=HIDDEN, dtype=dtype, kernels=kernels, **options)
    for tables in store.layers:
        tables.weights.normal_(generator=torch.Generator().manual_seed(1))
    store.refresh_copies()
    return store


def some_rows(count: int = 20, *, seed: int = 0) -> torch.Tensor:
    return torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def train(store: HostStore, *, steps: int) -> None:
    chosen = AdamWSettings(weight_decay=0.1)
    for step in range(steps):
        rows = some_rows(seed=step)
        generator = torch.Generator().manual_seed(step)
        gradients = torch.randn(len(rows), 2 * HIDDEN, dtype=store.dtype, generator=generator)
        store.accumulate(0, rows, gradients)
        assert update_layer(store, 0, chosen, learning_rate=0.01, gradient_scale=0.5) == len(rows)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, SAME_FP32), (torch.float64, SAME_FP64)], ids=["fp32", "fp64"]
)
def test_adamw_equals_the_readable_optimizer(kernels, dtype, tolerance) -> None:
    fast, readable = store_of(kernels, dtype), store_of(None, dtype)
    train(fast, steps=6)
    train(readable, steps=6)
    for name in ("weights", "first_moment", "second_moment", "gradients", "step_counts", "touched"):
        torch.testing.assert_close(getattr(fast.layers[0], name), getattr(readable.layers[0], name), **tolerance)
    assert fast.layers[0].gradients.eq(0).all()
    assert not fast.layers[0].touched.any()


def test_the_readable_layer_update_is_the_readable_optimizer() -> None:
    by_layer, whole = store_of(None, torch.float64), store_of(None, torch.float64)
    for store in (by_layer, whole):
        store.accumulate(0, some_rows(), torch.ones(20, 2 * HIDDEN, dtype=torch.float64))
    update_layer(by_layer, 0, AdamWSettings(), learning_rate=0.1)
    update_touched_rows(whole, AdamWSettings(), learning_rate=0.1)
    torch.testing.assert_close(by_layer.layers[0].weights, whole.layers[0].weights, rtol=0, atol=0)


def test_any_number_of_threads_gives_the_same_bits(monkeypatch) -> None:
    monkeypatch.setattr(kernels_module, "INLINE_BYTES", 0)
    tables = []
    for threads in (1, 2, 5):
        pool = HostKernels(threads)
        store = store_of(pool, torch.float32)
        train(store, steps=3)
        tables.append((store.layers[0].weights, pool.squared_norm(store.layers[0].weights, some_rows())))
        pool.close()
    for weights, norm in tables[1:]:
        assert torch.equal(weights, tables[0][0])
        assert norm == tables[0][1]


def test_the_bf16_copy_follows_the_masters(kernels) -> None:
    store = store_of(kernels, torch.float32, bf16_copy=True)
    train(store, steps=4)
    assert torch.equal(store.copies[0], store.layers[0].weights.bfloat16())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_rounding_to_bf16_is_torchs(bits: int) -> None:
    number = torch.tensor([[bits - (1 << 32) if bits >= 1 << 31 else bits]], dtype=torch.int32).view(torch.float32)
    rounded = torch.empty(1, 1, dtype=torch.bfloat16)
    HostKernels(1).gather(number, torch.zeros(1, dtype=torch.int64), rounded)
    assert same_bits_or_nan(rounded, number.bfloat16())


def same_bits_or_nan(given: torch.Tensor, expected: torch.Tensor) -> bool:
    """Torch itself makes different NaNs in vector and in scalar code."""
    same = given.view(torch.int16) == expected.view(torch.int16)
    return bool((same | (given.isnan() & expected.isnan())).all())


def test_rounding_ties_infinities_and_nan() -> None:
    patterns = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x00000001, 0x80000000]
    numbers = torch.tensor([p - (1 << 32) if p >= 1 << 31 else p for p in patterns], dtype=torch.int32)
    numbers = numbers.view(torch.float32).reshape(1, -1)
    rounded = torch.empty(1, len(patterns), dtype=torch.bfloat16)
    HostKernels(1).gather(numbers, torch.zeros(1, dtype=torch.int64), rounded)
    assert same_bits_or_nan(rounded, numbers.bfloat16())


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_gather_is_index_select(kernels, source, target) -> None:
    table, rows = torch.randn(WIDTH, 2 * HIDDEN).to(source), some_rows()
    out = torch.empty(len(rows), 2 * HIDDEN, dtype=target)
    kernels.gather(table, rows, out)
    assert torch.equal(out, table.index_select(0, rows).to(target))


@pytest.mark.parametrize("columns", [512, 544, 96, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gather_past_the_cache_is_index_select(kernels, monkeypatch, columns, dtype) -> None:
    """Whatever is streamed: rows of whole units; others, and buffers out of line, take the plain kernel."""
    monkeypatch.setattr("meft.runtime.host.kernels.STREAMED_BYTES", 0)
    table, rows = torch.randn(WIDTH, columns).to(dtype), torch.randperm(WIDTH)[: WIDTH // 2]
    for offset in (0, 1):
        around = torch.full((len(rows) * columns + 64,), 7.0, dtype=dtype)
        out = around[offset : offset + len(rows) * columns].view(len(rows), columns)
        kernels.gather(table, rows, out)
        assert torch.equal(out, table.index_select(0, rows))
        assert (around[:offset] == 7).all()
        assert (around[offset + out.numel() :] == 7).all()


def test_nothing_is_left_to_compile_once_the_kernels_are_warm() -> None:
    """In a process of its own, where no other test has compiled anything."""
    script = """
import torch
from meft.runtime.host import kernels, streaming_copy
kernels.warm_up(lambda text: None)
compiled = list(streaming_copy.gather_streaming.signatures)
kernels.STREAMED_BYTES = 0
for dtype in (torch.float32, torch.bfloat16):
    table = torch.ones(4, 2048, dtype=dtype)
    kernels.HostKernels(1).gather(table, torch.arange(4), table.clone())
assert len(compiled) == 2, compiled
assert streaming_copy.gather_streaming.signatures == compiled
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_can_be_streamed() -> None:
    assert can_stream(2048, 64)
    assert not can_stream(2048 + 64, 64)  # no whole unit
    assert not can_stream(1024, 64)  # nothing left to copy before the prefetch of the next row
    assert not can_stream(2048, 16)  # vectors would be out of line


def test_pairs_of_dtypes_without_a_kernel_are_refused() -> None:
    table, rows = torch.zeros(2, 2, dtype=torch.float64), torch.arange(2)
    with pytest.raises(TypeError, match=r"gather from torch\.float64 to torch\.bfloat16"):
        HostKernels(1).gather(table, rows, torch.empty(2, 2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"accumulate torch\.float32 into torch\.float64"):
        HostKernels(1).accumulate(table, torch.zeros(2, dtype=torch.bool), rows, torch.empty(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulate_is_index_add(kernels, dtype) -> None:
    sums, touched, rows = torch.randn(WIDTH, 2 * HIDDEN), torch.zeros(WIDTH, dtype=torch.bool), some_rows()
    gradients = torch.randn(len(rows), 2 * HIDDEN).to(dtype)
    expected = sums.index_add(0, rows, gradients.float())
    kernels.accumulate(sums, touched, rows, gradients)
    assert torch.equal(sums, expected)
    assert torch.equal(touched.nonzero().flatten(), rows)


def test_squared_norm(kernels) -> None:
    table, rows = torch.randn(WIDTH, 2 * HIDDEN), some_rows()
    assert kernels.squared_norm(table, rows) == pytest.approx(float(table[rows].double().square().sum()), rel=1e-13)


# --- routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [96, 30])
@pytest.mark.parametrize("probes_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("experts", [1, 12])
def test_the_router_chooses_as_the_readable_one(kernels, experts, cap, probes_dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    keys, queries = torch.randn(96, 8, generator=generator), torch.randn(40, 8, generator=generator)
    probes = None
    if experts > 1:
        probes = torch.rand(40, experts, generator=generator).topk(4, dim=1).indices.to(probes_dtype)
    readable = TopKRouter(6, cap, experts).select(0, keys, queries, probes)
    fast = TopKRouter(6, cap, experts, kernels).select(0, keys, queries, probes)
    assert torch.equal(fast.rows, readable.rows)
    assert fast.dropped_rows == readable.dropped_rows
    assert (cap == 96) or fast.dropped_rows > 0


def test_top_rows_of_equal_scores_are_the_first(kernels) -> None:
    best, rows = kernels.top_rows(torch.zeros(2, 6), torch.zeros(2, 1, dtype=torch.int64), rows_per_expert=6, top_k=3)
    assert rows.sort(dim=1).values.tolist() == [[0, 1, 2]] * 2
    assert best.eq(0).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 10_000))
def test_top_rows_and_union_equal_torch(tokens: int, top_k: int, seed: int) -> None:
    scores = torch.randn(tokens, 9, generator=torch.Generator().manual_seed(seed))
    kernels = HostKernels(1)
    best, rows = kernels.top_rows(scores, torch.zeros(tokens, 1, dtype=torch.int64), rows_per_expert=9, top_k=top_k)
    expected, expected_rows = scores.topk(top_k, dim=1)
    torch.testing.assert_close(best.sort(dim=1, descending=True).values, expected, rtol=0, atol=0)
    union, sums = kernels.union(best, rows, num_rows=9)
    assert torch.equal(union, capped_union(expected_rows, expected, num_rows=9, cap=9).rows)
    activation = torch.zeros(9).index_add_(0, expected_rows.flatten(), expected.flatten().clamp(min=0))
    torch.testing.assert_close(sums, activation[union])


class Counting:
    """A pool that does at once what it is given, and counts."""

    def __init__(self) -> None:
        self.given = 0

    def submit(self, work: Callable[[], None]) -> Future[None]:
        self.given += 1
        work()
        done: Future[None] = Future()
        done.set_result(None)
        return done


@pytest.mark.parametrize(
    ("num_threads", "kib", "others"),
    # The calling thread takes part. A thread has 256 KiB at least, and no more than eight work on memory at once.
    [(16, 255, 0), (16, 256, 0), (16, 511, 0), (16, 512, 1), (16, 1024, 3), (16, 64 * 1024, 7), (2, 64 * 1024, 1)],
)
def test_threads_are_as_many_as_the_work_is_worth(num_threads: int, kib: int, others: int) -> None:
    kernels = HostKernels(num_threads)
    kernels.close()
    counting = Counting()
    kernels._pool = cast(Any, counting)
    rows = torch.arange(kib)
    table, out = torch.randn(kib, 256), torch.empty(kib, 256)  # a row is 1 KiB
    kernels.gather(table, rows, out)
    assert torch.equal(out, table)
    assert counting.given == others
