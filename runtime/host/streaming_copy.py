"""Gather rows past the cache: non-temporal stores, and software prefetch across the edges of rows.

An ordinary store first reads the line that it is about to overwrite, so a copy moves three bytes over the memory bus
for every two that it counts; a non-temporal store writes only. Hardware prefetchers stop at a page's end and know
nothing of the next row in a list, so each row's copy asks for what lies :data:`AHEAD_BYTES` further on: its own, then
the next row's. numba has no word for either, hence the LLVM instructions here.

What is written is not in the cache afterwards. That is right for buffers larger than the cache, and for buffers that
the device reads; :mod:`meft.runtime.host.kernels` decides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic as _numba_intrinsic
from numpy.typing import NDArray

from meft.runtime.host.compiled import compiled

Array = NDArray[Any]
intrinsic: Any = _numba_intrinsic  # called without its first parameter, which no type checker can know

VECTOR_BYTES = 32
CACHE_LINE_BYTES = 64
UNIT_BYTES = 128
"""Rows are whole multiples of this, or are not streamed."""
AHEAD_BYTES = 1024


def can_stream(row_bytes: int, out_address: int) -> bool:
    """Whether rows of ``row_bytes`` can be streamed to ``out_address``."""
    return row_bytes % UNIT_BYTES == 0 and row_bytes > AHEAD_BYTES and out_address % VECTOR_BYTES == 0


@intrinsic  # type: ignore[untyped-decorator]
def _stream(typing_context: Any, target: Any, source: Any, ahead: Any, num_bytes: Any) -> Any:
    """Copy ``num_bytes`` (a multiple of 128) from ``source`` to ``target`` and prefetch as much from ``ahead``."""
    del typing_context, target, source, ahead, num_bytes

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature
        _emit_loop(builder, *arguments)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp, types.intp), generate


def _emit_loop(builder: Any, target: Any, source: Any, ahead: Any, num_bytes: Any) -> None:
    word = ir.IntType(64)
    place = builder.alloca(word)
    builder.store(word(0), place)
    head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    offset = builder.load(place)
    builder.cbranch(builder.icmp_signed("<", offset, num_bytes), body, done)
    builder.position_at_end(body)
    _emit_unit(builder, *(builder.add(start, offset) for start in (target, source, ahead)))
    builder.store(builder.add(offset, word(UNIT_BYTES)), place)
    builder.branch(head)
    builder.position_at_end(done)


def _emit_unit(builder: Any, target: Any, source: Any, ahead: Any) -> None:
    number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
    vector = ir.VectorType(ir.IntType(64), VECTOR_BYTES // 8)
    signature = ir.FunctionType(ir.VoidType(), (byte, number, number, number))
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", (byte,), signature)
    not_temporal = builder.module.add_metadata([number(1)])

    def at(address: Any, step: int, pointer: Any) -> Any:
        return builder.inttoptr(builder.add(address, address.type(step)), pointer)

    for step in range(0, UNIT_BYTES, CACHE_LINE_BYTES):
        builder.call(prefetch, (at(ahead, step, byte), number(0), number(0), number(1)))  # read, once, data
    for step in range(0, UNIT_BYTES, VECTOR_BYTES):
        value = builder.load(at(source, step, vector.as_pointer()))
        value.align = 1
        stored = builder.store(value, at(target, step, vector.as_pointer()))
        stored.align = VECTOR_BYTES
        stored.set_metadata("nontemporal", not_temporal)


@intrinsic  # type: ignore[untyped-decorator]
def _fence(typing_context: Any) -> Any:
    """Let no later access of memory, by any thread, come before the stores so far: they are weakly ordered."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature, arguments
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@compiled()
def gather_streaming(table: Array, rows: Array, out: Array, first: int, last: int) -> None:
    """``out[i] = table[rows[i]]`` for ``i`` from ``first`` to ``last - 1``; see :func:`can_stream`."""
    row_bytes = table.shape[1] * table.itemsize
    begin = row_bytes - AHEAD_BYTES
    table_address, out_address = np.uintp(table.ctypes.data), np.uintp(out.ctypes.data)
    for place in range(first, last):
        source = table_address + np.uintp(rows[place] * row_bytes)
        following = table_address + np.uintp(rows[min(place + 1, last - 1)] * row_bytes)
        target = out_address + np.uintp(place * row_bytes)
        _stream(target, source, source + np.uintp(AHEAD_BYTES), begin)
        _stream(target + np.uintp(begin), source + np.uintp(begin), following, AHEAD_BYTES)
    _fence()
