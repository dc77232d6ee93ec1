"""Host kernels: what the host does to rows, at the speed of its memory.

Compiled (:mod:`meft.runtime.host.compiled`); rows are independent, so a call splits them over a small pool of threads
and the result is the same for any number of them. numba's own ``prange`` is not used: of its threading layers only one
comes with every wheel, and that one must not be entered from two threads at once, which the runtime's lanes do.

Each kernel repeats a readable one in torch, which stays: :mod:`meft.runtime.host.optimizer` (AdamW),
:class:`~meft.runtime.host.store.HostStore` (gather, accumulate) and :mod:`meft.runtime.host.router` (top-K). Arithmetic
is in the tables' dtype. Sums of squares and inner products may be reordered and AdamW may fuse multiplications with
additions, as torch does elsewhere: results differ from torch's in the last bits at most. All else is in the order
written.

bf16 has no numpy type and travels as uint16. Letters: ``R`` rows, ``D`` hidden size, ``A`` active rows, ``T`` tokens,
``K`` rows per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from meft.runtime.host.compiled import cache_folder, compiled
from meft.runtime.host.cores import bind_thread
from meft.runtime.host.streaming_copy import can_stream, gather_streaming

INLINE_BYTES = 1 << 18
"""Each thread has as much to do at least: handing less over costs more than it saves."""
MEMORY_BOUND_THREADS = 8
"""No more work on memory at once: about as many fill a socket's channels (assumed)."""
STREAMED_BYTES = 1 << 22
"""A gather of this or more goes past the cache: a core's share of it would not stay there until it is sent."""
SHARES_PER_THREAD = 2
"""A thread that starts late, or that something else holds up, leaves its second share to another."""
BF16_NAN = 0x7FC0

Array = NDArray[Any]


# --- compiled --------------------------------------------------------------------------------------------------------
# Each works on positions first .. last-1 of its row list. A row view (``table[row, :]``; ``table[row]`` is slower code)
# with a plain inner loop becomes vector code; two-dimensional indexing in the inner loop does not.


@compiled()
def _gather(table: Array, rows: Array, out: Array, first: int, last: int) -> None:
    for place in range(first, last):
        source, target = table[rows[place], :], out[place, :]
        for column in range(target.shape[0]):
            target[column] = source[column]


@compiled(inline="always")
def _rounded_bf16(bits: Any) -> Any:
    """The upper half of an fp32's bits, rounded to nearest, ties to even; any NaN becomes the quiet one."""
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd) >> np.uint32(16))
    is_nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(BF16_NAN) if is_nan else rounded)


@compiled()
def _gather_rounded(bits: Array, rows: Array, out: Array, first: int, last: int) -> None:
    """``bits`` is an fp32 table as uint32, ``out`` bf16 as uint16."""
    for place in range(first, last):
        source, target = bits[rows[place], :], out[place, :]
        for column in range(target.shape[0]):
            target[column] = _rounded_bf16(source[column])


@compiled()
def _accumulate(sums: Array, touched: Array, rows: Array, gradients: Array, first: int, last: int) -> None:
    for place in range(first, last):
        row = rows[place]
        target, source = sums[row, :], gradients[place, :]
        for column in range(target.shape[0]):
            target[column] += source[column]
        touched[row] = True


@compiled()
def _accumulate_bf16(sums: Array, touched: Array, rows: Array, gradients: Array, first: int, last: int) -> None:
    """``gradients`` is bf16 as uint16."""
    for place in range(first, last):
        row = rows[place]
        target, source = sums[row, :], gradients[place, :]
        for column in range(target.shape[0]):
            target[column] += np.uint32(np.uint32(source[column]) << np.uint32(16)).view(np.float32)
        touched[row] = True


@compiled(fastmath={"reassoc", "nsz"})
def _squares(sums: Array, rows: Array, per_row: Array, first: int, last: int) -> None:
    """One sum in fp64 per row."""
    for place in range(first, last):
        source = sums[rows[place], :]
        total = 0.0
        for column in range(source.shape[0]):
            value = np.float64(source[column])
            total += value * value
        per_row[place] = total


@compiled(fastmath={"contract"})
def _adamw(
    weights: Array,
    first_moment: Array,
    second_moment: Array,
    gradients: Array,
    step_counts: Array,
    rows: Array,
    numbers: Array,
    betas: Array,
    clear: bool,
    first: int,
    last: int,
) -> None:
    """``numbers``, in the tables' dtype: gradient scale, 1 - beta1, beta2, 1 - beta2, eps, 1 - rate * decay. ``betas``,
    fp64: learning rate, beta1, beta2."""
    scale, rise1, keep2, rise2, eps, keep_weight = numbers
    constants = np.empty(2, weights.dtype)
    for place in range(first, last):
        row = rows[place]
        count = step_counts[row] + 1
        step_counts[row] = count
        constants[0] = betas[0] / (1.0 - betas[1] ** count)
        constants[1] = 1.0 / math.sqrt(1.0 - betas[2] ** count)
        step_size, inverse_root = constants[0], constants[1]  # one division per number, not two
        w, m, v, g = weights[row, :], first_moment[row, :], second_moment[row, :], gradients[row, :]
        for column in range(w.shape[0]):
            gradient = g[column] * scale
            mean = m[column] + (gradient - m[column]) * rise1
            square = v[column] * keep2 + rise2 * (gradient * gradient)
            m[column] = mean
            v[column] = square
            w[column] = w[column] * keep_weight - step_size * mean / (math.sqrt(square) * inverse_root + eps)
        if clear:
            g[:] = 0


@compiled()
def _round_rows(bits: Array, rows: Array, copy: Array, first: int, last: int) -> None:
    """Refresh the bf16 copy of rows whose fp32 lies in the cache."""
    for place in range(first, last):
        row = rows[place]
        source, target = bits[row, :], copy[row, :]
        for column in range(target.shape[0]):
            target[column] = _rounded_bf16(source[column])


@compiled()
def _adamw_with_copy(
    weights: Array,
    first_moment: Array,
    second_moment: Array,
    gradients: Array,
    step_counts: Array,
    rows: Array,
    numbers: Array,
    betas: Array,
    clear: bool,
    bits: Array,
    copy: Array,
    first: int,
    last: int,
) -> None:
    """AdamW row by row, each row's bf16 copy written while the row is in the cache: no second pass over memory."""
    for place in range(first, last):
        _adamw(
            weights,
            first_moment,
            second_moment,
            gradients,
            step_counts,
            rows,
            numbers,
            betas,
            clear,
            place,
            place + 1,
        )
        _round_rows(bits, rows, copy, place, place + 1)


@compiled(fastmath={"reassoc", "nsz", "contract"})  # without nsz the sums stay scalar: 20 GFLOPS, not 90
def _dots(query0: Array, query1: Array, query2: Array, query3: Array, key0: Array, key1: Array) -> tuple[Any, ...]:
    """Eight inner products: four queries with two keys, so that six loads feed eight multiplications."""
    zero = key0.dtype.type(0)  # ``key0[0] * 0`` would be fp64
    s00 = s01 = s10 = s11 = s20 = s21 = s30 = s31 = zero
    for column in range(key0.shape[0]):
        k0, k1 = key0[column], key1[column]
        a, b, c, d = query0[column], query1[column], query2[column], query3[column]
        s00 += a * k0
        s01 += a * k1
        s10 += b * k0
        s11 += b * k1
        s20 += c * k0
        s21 += c * k1
        s30 += d * k0
        s31 += d * k1
    return s00, s01, s10, s11, s20, s21, s30, s31


@compiled()
def _scores(
    keys: Array, queries: Array, places: Array, ends: Array, num_probes: int, out: Array, first: int, last: int
) -> None:
    """For experts ``first .. last-1``: inner products of their tokens with their rows, into ``out [T*P, R/N]``.

    ``keys`` is contiguous and may be wider than a query (a key with its value behind it).

    ``places`` lists token-probe pairs by expert; expert ``n`` has those up to ``ends[n]``. A last group of fewer than
    four tokens, or two rows, repeats its last one.
    """
    rows_per_expert, hidden_size = out.shape[1], queries.shape[1]
    for expert in range(first, last):
        start, end = 0 if expert == 0 else ends[expert - 1], ends[expert]
        for row in range(0, rows_per_expert, 2):
            other = min(row + 1, rows_per_expert - 1)
            key0 = keys[expert * rows_per_expert + row, :hidden_size]
            key1 = keys[expert * rows_per_expert + other, :hidden_size]
            for index in range(start, end, 4):
                p0, p1 = places[index], places[min(index + 1, end - 1)]
                p2, p3 = places[min(index + 2, end - 1)], places[min(index + 3, end - 1)]
                query0, query1 = queries[p0 // num_probes], queries[p1 // num_probes]
                query2, query3 = queries[p2 // num_probes], queries[p3 // num_probes]
                found = _dots(query0, query1, query2, query3, key0, key1)
                out[p0, row], out[p0, other], out[p1, row], out[p1, other] = found[0], found[1], found[2], found[3]
                out[p2, row], out[p2, other], out[p3, row], out[p3, other] = found[4], found[5], found[6], found[7]


@compiled()
def _sift_down(scores: Array, rows: Array, size: int) -> None:
    """Restore a heap (least score on top) whose top was replaced."""
    parent = 0
    score, row = scores[0], rows[0]
    while True:
        child = 2 * parent + 1
        if child >= size:
            break
        if child + 1 < size and scores[child + 1] < scores[child]:
            child += 1
        if scores[child] >= score:
            break
        scores[parent], rows[parent] = scores[child], rows[child]
        parent = child
    scores[parent], rows[parent] = score, row


@compiled()
def _top_rows(
    scores: Array, experts: Array, rows_per_expert: int, best: Array, best_rows: Array, first: int, last: int
) -> None:
    """For tokens ``first .. last-1``: the ``K`` best of ``scores [T, P*R/N]``, by a heap; ``experts`` is ``[T, P]``."""
    top_k = best.shape[1]
    for token in range(first, last):
        heap, heap_rows, own = best[token], best_rows[token], scores[token]
        heap[:] = -np.inf
        for probe in range(experts.shape[1]):
            start = probe * rows_per_expert
            row = experts[token, probe] * rows_per_expert
            for place in range(rows_per_expert):
                score = own[start + place]
                if score > heap[0]:
                    heap[0], heap_rows[0] = score, row + place
                    _sift_down(heap, heap_rows, top_k)


@compiled()
def _union(best: Array, best_rows: Array, sums: Array, chosen: Array) -> int:
    """Flag the rows that tokens chose and sum ``max(score, 0)`` per row, in the order of tokens; how many there are."""
    count = 0
    for token in range(best.shape[0]):
        for place in range(best.shape[1]):
            row = best_rows[token, place]
            if not chosen[row]:
                chosen[row] = True
                count += 1
            if best[token, place] > 0:
                sums[row] += best[token, place]
    return count


# --- the pool --------------------------------------------------------------------------------------------------------


class HostKernels:
    """The kernels on torch tensors, over ``num_threads`` threads (default: as many as torch uses), which are bound to
    ``cores`` where such are given and no more than those."""

    def __init__(self, num_threads: int | None = None, *, cores: frozenset[int] | None = None) -> None:
        threads = num_threads or torch.get_num_threads()
        self.num_threads = threads if cores is None else min(threads, len(cores))
        self._pool: ThreadPoolExecutor | None = None
        if self.num_threads > 1:
            bind = None if cores is None else partial(bind_thread, cores)
            self._pool = ThreadPoolExecutor(self.num_threads - 1, thread_name_prefix="meft-kernel", initializer=bind)

    def close(self) -> None:
        """End the pool's threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def gather(self, table: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Copy rows ``[A]`` of ``table [R, C]`` to ``out [A, C]``: the same dtype, or fp32 rounded to bf16.

        Raises :class:`TypeError` for other pairs of dtypes.
        """
        source, target = _bits(table), _bits(out)
        if table.dtype == out.dtype:
            large = out.numel() * out.element_size() >= STREAMED_BYTES
            streams = large and can_stream(_row_bytes(table), out.data_ptr())
            kernel = gather_streaming if streams else _gather
        elif (table.dtype, out.dtype) == (torch.float32, torch.bfloat16):
            kernel = _gather_rounded
        else:
            raise TypeError(f"gather from {table.dtype} to {out.dtype}: give the same dtype, or fp32 and bf16")
        self._split(rows, _row_bytes(table), kernel, source, rows.numpy(), target)

    def accumulate(
        self, sums: torch.Tensor, touched: torch.Tensor, rows: torch.Tensor, gradients: torch.Tensor
    ) -> None:
        """Add ``gradients [A, C]`` (the dtype of ``sums``, or bf16 to fp32) to rows of ``sums [R, C]``; flag the rows.

        No row may come twice. Raises :class:`TypeError` for other dtypes.
        """
        if sums.dtype == gradients.dtype:
            kernel, source = _accumulate, gradients.numpy()
        elif (sums.dtype, gradients.dtype) == (torch.float32, torch.bfloat16):
            kernel, source = _accumulate_bf16, _bits(gradients)
        else:
            raise TypeError(f"accumulate {gradients.dtype} into {sums.dtype}: give the same dtype, or bf16 and fp32")
        self._split(rows, _row_bytes(sums), kernel, sums.numpy(), touched.numpy(), rows.numpy(), source)

    def squared_norm(self, sums: torch.Tensor, rows: torch.Tensor) -> float:
        """Sum of squares of rows, in fp64: per row, then over the rows, rounded once."""
        return math.fsum(self.squares(sums, rows).numpy())

    def squares(self, sums: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Sum of squares of each of ``rows [A]``, fp64 ``[A]``."""
        per_row = np.empty(rows.shape[0])
        self._split(rows, _row_bytes(sums), _squares, sums.numpy(), rows.numpy(), per_row)
        return torch.from_numpy(per_row)

    def adamw(
        self,
        weights: torch.Tensor,
        first_moment: torch.Tensor,
        second_moment: torch.Tensor,
        gradients: torch.Tensor,
        step_counts: torch.Tensor,
        rows: torch.Tensor,
        *,
        learning_rate: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        gradient_scale: float = 1.0,
        clear_gradients: bool = False,
        bf16_copy: torch.Tensor | None = None,
    ) -> None:
        """One AdamW step of ``rows`` (no row twice), as :mod:`meft.runtime.host.optimizer` defines it.

        ``clear_gradients`` zeroes the rows' gradients in the same pass; ``bf16_copy [R, C]`` takes the new weights.
        """
        kept = 1 - learning_rate * weight_decay
        dtype = weights.numpy().dtype
        numbers = np.array([gradient_scale, 1 - beta1, beta2, 1 - beta2, eps, kept], dtype)
        tables = [table.numpy() for table in (weights, first_moment, second_moment, gradients, step_counts, rows)]
        arguments = (*tables, numbers, np.array([learning_rate, beta1, beta2]), clear_gradients)
        if bf16_copy is None:
            self._split(rows, _row_bytes(weights), _adamw, *arguments)
        else:
            copies = (_bits(weights), _bits(bf16_copy))
            self._split(rows, _row_bytes(weights), _adamw_with_copy, *arguments, *copies)

    def probed_scores(
        self, keys: torch.Tensor, queries: torch.Tensor, probes: torch.Tensor, *, num_experts: int
    ) -> torch.Tensor:
        """Scores ``[T, P * R/N]`` of ``queries [T, D]`` with the rows of their ``probes [T, P]``; ``keys [R, D]``.

        Same dtype throughout. An expert's rows are read once for all its tokens.
        """
        num_tokens, num_probes = probes.shape
        scores = torch.empty(num_tokens * num_probes, keys.shape[0] // num_experts, dtype=keys.dtype)
        experts = probes.numpy().reshape(-1)
        by_expert = np.argsort(experts, kind="stable")
        ends = np.cumsum(np.bincount(experts, minlength=num_experts))
        tables = (_whole_rows(keys).numpy(), queries.contiguous().numpy())
        arguments = (*tables, by_expert, ends, num_probes, scores.numpy())
        self._split_counted(num_experts, scores.numel() * keys.shape[1], _scores, *arguments)
        return scores.reshape(num_tokens, -1)

    def top_rows(
        self, scores: torch.Tensor, experts: torch.Tensor, *, rows_per_expert: int, top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``K`` best ``(scores, rows)`` per token, both ``[T, K]``, unsorted.

        ``scores [T, P * R/N]`` of the rows of ``experts [T, P]`` (int32 or int64). Of equal scores the first stay.
        """
        best = torch.empty(scores.shape[0], top_k, dtype=scores.dtype)
        rows = torch.zeros(scores.shape[0], top_k, dtype=torch.int64)
        arguments = (scores.numpy(), experts.numpy(), rows_per_expert, best.numpy(), rows.numpy())
        self._split_counted(scores.shape[0], scores.numel() * scores.element_size(), _top_rows, *arguments)
        return best, rows

    def union(self, best: torch.Tensor, rows: torch.Tensor, *, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The union of ``rows [T, K]``, int64 ascending, and its sums of ``max(score, 0)``, one each."""
        sums, chosen = torch.zeros(num_rows, dtype=best.dtype), torch.zeros(num_rows, dtype=torch.bool)
        _union(best.numpy(), rows.numpy(), sums.numpy(), chosen.numpy())
        union = torch.from_numpy(np.flatnonzero(chosen.numpy()))
        return union, sums.index_select(0, union)

    def _split(self, items: torch.Tensor, bytes_per_item: int, kernel: Any, *arguments: Any) -> None:
        """Run ``kernel(*arguments, first, last)``, which is bound by memory, over all items, a share per thread."""
        count = items.shape[0]
        self._split_counted(count, count * bytes_per_item, kernel, *arguments, most=MEMORY_BOUND_THREADS)

    def _split_counted(self, count: int, work: int, kernel: Any, *arguments: Any, most: int = 1 << 10) -> None:
        """Threads take shares of ``count`` items until none is left, this one with them; it does all of little work."""
        threads = min(self.num_threads, most, count, work // max(INLINE_BYTES, 1))
        if self._pool is None or threads <= 1:
            kernel(*arguments, 0, count)
            return
        num_shares = min(count, SHARES_PER_THREAD * threads)
        shares = iter(list(pairwise(count * share // num_shares for share in range(num_shares + 1))))

        def take() -> None:
            for share in shares:  # of a list: no two threads get the same
                kernel(*arguments, *share)

        others = [self._pool.submit(take) for _ in range(threads - 1)]
        take()
        for other in others:
            other.result()


def warm_up(say: Callable[[str], None]) -> None:
    """Compile the kernels that a run uses, or load them from the cache; ``say`` hears of it if it takes a while."""
    cached = any(cache_folder().rglob("kernels._adamw*.nbi"))
    if not cached:
        say(f"compiling the host kernels, once on this machine (about 10 s; kept in {cache_folder()})")
    kernels = HostKernels(1)
    table, rows = torch.zeros(2, 4), torch.arange(2)
    half, counts, touched = table.bfloat16(), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.bool)
    for staging in (table.clone(), half):
        kernels.gather(table, rows, staging)
        kernels.accumulate(table, touched, rows, staging)
    kernels.gather(half, rows, half.clone())
    for wide in (torch.zeros(2, 512), torch.zeros(2, 1024, dtype=torch.bfloat16)):  # what large gathers run
        gather_streaming(_bits(wide), rows.numpy(), _bits(wide.clone()), 0, 2)
    kernels.squared_norm(table, rows)
    moments = (torch.zeros(2, 4), torch.zeros(2, 4))
    rates: dict[str, Any] = {"learning_rate": 0.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    for copy in (None, half):
        kernels.adamw(table, *moments, table.clone(), counts, rows, **rates, bf16_copy=copy)
    probes = torch.zeros(2, 1, dtype=torch.int32)
    kernels.probed_scores(torch.zeros(4, 8)[:, :4], torch.zeros(2, 4), probes, num_experts=2)
    for experts in (torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int32)):
        best, found = kernels.top_rows(torch.zeros(2, 4), experts, rows_per_expert=4, top_k=2)
        kernels.union(best, found, num_rows=4)


def _bits(tensor: torch.Tensor) -> Array:
    """The tensor as numpy sees it: unsigned integers of its width."""
    width = tensor.element_size()
    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    return tensor.view(signed).numpy().view({2: np.uint16, 4: np.uint32, 8: np.uint64}[width])


def _whole_rows(view: torch.Tensor) -> torch.Tensor:
    """A contiguous matrix that begins with ``view``'s columns: the table it is the left part of, else a copy."""
    stride = view.stride(0)
    whole = view.storage_offset() == 0 and view.stride(1) == 1 and stride >= view.shape[1]
    if whole and view.untyped_storage().nbytes() >= view.shape[0] * stride * view.element_size():
        return view.as_strided((view.shape[0], stride), (stride, 1))
    return view.contiguous()


def _row_bytes(table: torch.Tensor) -> int:
    return table.shape[1] * table.element_size()
