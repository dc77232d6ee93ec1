"""Tensors in safetensors files: written to the disk for good, read with errors that say which file it is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from meft.planner.base.errors import UsageError
from meft.planner.base.files import file_mode

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file to the disk for good.

    Raises :class:`OSError`, also where safetensors has an exception of its own.
    """
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(file_mode())  # safetensors lets nobody else read it
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
