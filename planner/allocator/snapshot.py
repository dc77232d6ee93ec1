"""Reading pickles that others made, without running anything: plain containers and scalars, or a refusal.

A pickle is a program for a small stack machine, some of whose instructions import names and call what they find. The
machine here is the standard library's, left with only the instructions that build lists, dicts with text keys, tuples,
text, numbers, booleans and None. A pickle can do nothing else; a class in one is an error that names it.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar, NoReturn

from meft.planner.allocator.recording import shown
from meft.planner.base.errors import UsageError

_PLAIN = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT"),
)
_ASKS_FOR_A_CLASS = ("GLOBAL", "STACK_GLOBAL", "INST")
_NAMES = {ord(code.code): code.name for code in pickletools.opcodes}
_CODES = {name: code for code, name in _NAMES.items()}


class _Refused(Exception):
    """Something in a pickle that is not plain data."""


class _PlainUnpickler(pickle._Unpickler):
    """The unpickler in pure Python: the one in C reserves whatever memory a pickle claims to need.

    It reads some 4 MB a second.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}  # filled below

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse: plain data needs no class and no function."""
        raise _Refused(f"it asks for {shown(name)} of module {shown(module)}")


def _setitem(machine: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _store(machine.stack[-1], [key, value])


def _setitems(machine: Any) -> None:
    items = machine.pop_mark()
    _store(machine.stack[-1], items)


def _dict(machine: Any) -> None:
    items = machine.pop_mark()
    machine.append({})
    _store(machine.stack[-1], items)


def _store(target: object, items: list[Any]) -> None:
    """Store keys and values in a dict. Keys are text: hashing one that is nested without end would never be done."""
    if type(target) is not dict:
        raise _Refused(f"it stores items in {shown(target)}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise _Refused(f"it has the key {shown(key)}, where only text is expected")
        target[key] = value


_PlainUnpickler.dispatch = {
    _CODES[name]: pickle._Unpickler.dispatch[_CODES[name]] for name in (*_PLAIN, *_ASKS_FOR_A_CLASS)
} | {_CODES["SETITEM"]: _setitem, _CODES["SETITEMS"]: _setitems, _CODES["DICT"]: _dict}


def unpickle_plain(file: BinaryIO, *, source: str) -> object:
    """The plain data in a pickle.

    Raises :class:`UsageError`, naming ``source``, for anything else in it and for what is no whole pickle.
    """
    try:
        return _PlainUnpickler(file).load()
    except _Refused as refused:
        why = str(refused)
    except Exception as error:  # noqa: BLE001 - a damaged pickle can fail in any way that a program can
        name = _NAMES.get(error.args[0]) if isinstance(error, KeyError) and error.args else None
        if name is None:
            damage = f"({type(error).__name__}); is it truncated or damaged?"
            raise UsageError(f"{source}: not a whole pickle {damage}") from None
        why = f"it has the instruction {name}"
    raise UsageError(f"{source}: a pickle is read as plain data only, and never run: {why}")
