"""Tensors in safetensors files: written to the disk for good, read with errors that say which file it is."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from meft.planner.base.errors import UsageError
from meft.planner.base.files import file_mode

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


_DTYPES = {torch.float32: "F32", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8"}
"""What safetensors calls those that are written piece by piece."""


@dataclass(frozen=True)
class Pieces:
    """A tensor that is not there whole: ``each()`` gives it along its first axis, piece after piece."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    each: Callable[[], Iterator[torch.Tensor]]


def save_tensors(tensors: Mapping[str, torch.Tensor | Pieces], path: Path) -> None:
    """Write a safetensors file to the disk for good.

    Raises :class:`OSError`, also where safetensors has an exception of its own.
    """
    whole = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    if len(whole) < len(tensors):
        _write_pieces(tensors, path)
    else:
        _write_whole(whole, path)
    path.chmod(file_mode())  # safetensors lets nobody else read it
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _write_pieces(tensors: Mapping[str, torch.Tensor | Pieces], path: Path) -> None:
    """The format by hand: length of the header, header, and the tensors' bytes one after the other."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for piece in tensor.each() if isinstance(tensor, Pieces) else (tensor,):
                file.write(piece.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def load_tensors(path: Path, *, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, torch.Tensor]:
    """What is wanted of a safetensors file, on the host, or a :class:`UsageError`."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:  # the last ones: a dtype that torch has not
        raise UsageError(f"{path}: not a complete safetensors file ({str(error)[:300]})") from None
