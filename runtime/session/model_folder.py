"""The boundary to model folders that others made: what loading one raises becomes one line that names the file.

Before a library reads a folder, what could make it run code or read elsewhere is refused; ``trust_remote_code`` is off
in every call besides. While it reads, whatever it raises is caught, and the files are looked at one by one to say which
of them is damaged. Only calls into transformers stand inside :func:`reading`, so an error of our own is none of these.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from meft.planner.base.errors import MachineError, MeftError, UsageError
from meft.planner.base.kinds import refuse_pointer
from meft.planner.base.schema import parse_json, read_text, shortened
from meft.planner.models.catalogue import CONFIG_NAME, read_config

SAFE = {"local_files_only": True, "trust_remote_code": False}
"""What every call that reads a folder is given: no download, and no code of the folder's."""

INDEX_NAME = "model.safetensors.index.json"
_JSON_FILES = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    INDEX_NAME,
    "pytorch_model.bin.index.json",
)
_AUTO_MAP_FILES = (CONFIG_NAME, "tokenizer_config.json")
_KERNEL_FIELDS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
MAX_SHOWN_WEIGHTS = 3


@contextmanager
def reading(folder: Path, what: str, *, said: str = "--model") -> Iterator[None]:
    """Let transformers read ``what`` ("model", "tokenizer") from a folder; ``said`` is how the user named it.

    Raises:
        UsageError: the folder wants code of its own to be run, names files outside itself, or cannot be read.
        MachineError: it is sound as far as can be told, and the host's memory does not hold it.
    """
    refuse_code(folder, said=said)
    try:
        yield
    except MeftError:
        raise
    except Exception as error:
        where = f"{said} {folder}"
        damage = first_damage(folder)
        if damage is not None:
            raise UsageError(f"{where}: the {what} cannot be loaded: {damage}") from error
        if _is_out_of_memory(error):
            raise MachineError(f"{where}: this machine's memory does not hold the {what}") from error
        raise UsageError(f"{where}: the {what} cannot be loaded; transformers: {_first_line(error)}") from error


def load_causal_lm(folder: Path, *, said: str = "--model", **options: Any) -> nn.Module:
    """The model in a folder, all of its weights there; :func:`reading` has the errors."""
    from transformers import AutoModelForCausalLM

    with reading(folder, "model", said=said):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, weights_only=True, **SAFE, **options
        )
    model: nn.Module = loaded[0]
    found: Mapping[str, Any] = loaded[1]
    missing = sorted(found.get("missing_keys", ()))
    if missing:
        shown = ", ".join(missing[:MAX_SHOWN_WEIGHTS]) + (", ..." if len(missing) > MAX_SHOWN_WEIGHTS else "")
        raise UsageError(
            f"{said} {folder}: {len(missing)} of the model's weights are in none of its files and would be random "
            f"({shown}); get the whole model"
        )
    return model


def stored_numbers(folder: Path) -> Counter[str]:
    """How many numbers of each dtype, as safetensors calls them, a folder's weights are; by the files' headers alone.

    Raises :class:`UsageError` for a file that is none.
    """
    from safetensors import safe_open

    _check_weights(folder)
    numbers: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_slice(name)
                numbers[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return numbers


def refuse_code(folder: Path, *, said: str = "--model") -> None:
    """Raise :class:`UsageError` for a folder that wants code to be run, or whose files name others outside of it."""
    for name in _AUTO_MAP_FILES:
        content = _json_or_none(folder / name)
        if isinstance(content, dict):
            _refuse_code_of_its_own(content, f"{said} {folder}: {name}")
    adapter = _json_or_none(folder / "adapter_config.json")
    if isinstance(adapter, dict) and adapter.get("base_model_name_or_path") is not None:
        raise UsageError(
            f"{said} {folder}: adapter_config.json makes it a PEFT adapter of another model; give the model's folder"
        )
    for index in (INDEX_NAME, "pytorch_model.bin.index.json"):
        content = _json_or_none(folder / index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        for shard in set(_texts(weight_map)):
            if PurePath(shard).name != shard:
                raise UsageError(
                    f"{said} {folder}: {index} names {shortened(repr(shard))}, which is no file of the folder itself"
                )


def _refuse_code_of_its_own(content: Mapping[str, Any], where: str) -> None:
    needed = content.get("auto_map")
    if needed:
        names = shortened(", ".join(sorted(set(_texts(needed)))) or "files")
        raise UsageError(
            f"{where} asks for code of its own to be run (auto_map: {names}), which is never done; "
            f"use a model whose type transformers knows, or take auto_map out if it does"
        )
    for field, value in _fields(content):
        if _KERNEL_FIELDS.fullmatch(field) and isinstance(value, str) and "/" in value:
            raise UsageError(
                f"{where} asks for code from a hub to be run ({field} = {shortened(repr(value))}), which is never done"
            )


def first_damage(folder: Path) -> str | None:
    """Which file of a model folder is missing, cut short or no file of its kind, and how; None when all look sound."""
    if not folder.is_dir():
        return "there is no such folder"
    checks: list[Callable[[Path], None]] = [
        _check_pointers,
        _check_json,
        _check_shards,
        _check_weights,
        _check_tokenizer,
    ]
    for check in checks:
        try:
            check(folder)
        except UsageError as error:
            return str(error)
    return None


def _check_pointers(folder: Path) -> None:
    for path in sorted(each for each in folder.iterdir() if each.is_file()):
        with path.open("rb") as file:
            refuse_pointer(file.read(64), path)


def _check_json(folder: Path) -> None:
    read_config(folder / CONFIG_NAME)
    for name in _JSON_FILES:
        path = folder / name
        if path.exists():
            content = parse_json(read_text(path, kind="file"), source=str(path))
            if not isinstance(content, dict):
                raise UsageError(f"{path}: expected a JSON object, found {type(content).__name__}")


def _check_shards(folder: Path) -> None:
    path = folder / INDEX_NAME
    if not path.exists() or (folder / "model.safetensors").exists():
        return
    weight_map = parse_json(read_text(path, kind="file"), source=str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UsageError(f"{path}: weight_map should say for each weight which file holds it")
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise UsageError(f"{folder / name}: no such file, but {INDEX_NAME} names it; is the download complete?")


def _check_weights(folder: Path) -> None:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except Exception as error:  # Rust's errors have several types, none of them documented
            raise UsageError(f"{path}: not a whole safetensors file ({_first_line(error)})") from error


def _check_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.exists():
        return
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UsageError(f"{path}: not a tokenizer that can be read ({_first_line(error)})") from error


def _json_or_none(path: Path) -> Any:
    """What a file holds; None where there is none, or none that can be read: whoever needs it will say so."""
    try:
        return parse_json(read_text(path, kind="file"), source=str(path))
    except UsageError:
        return None


def _fields(content: object) -> Iterator[tuple[str, object]]:
    """Every field of an object and of the objects in it."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield name, value
            yield from _fields(value)
    elif isinstance(content, list):
        for value in content:
            yield from _fields(value)


def _texts(content: object) -> Iterator[str]:
    """Every text in an object or list, keys left out."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _texts(value)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
