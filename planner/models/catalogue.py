"""Models by reference: a built-in name, a folder with a ``config.json``, or the file itself.

A built-in model is a file of :mod:`meft.profiles`: its name, where its config was published, other names it goes by,
and the fields of its ``config.json`` that make the architecture.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from meft.planner.base.errors import UsageError, unknown_name
from meft.planner.base.kinds import MODEL, refuse_other_kind, refuse_other_path
from meft.planner.base.names import PROFILES, find_name, looks_like_path, profile_text
from meft.planner.base.schema import Record, Text, parse_json, read_text, validated
from meft.planner.models.architecture import ModelShape
from meft.planner.models.shapes import shape_of

CONFIG_NAME = "config.json"
_WRAPPERS = {"gemma3": "gemma3_text"}
"""Model types of text and images, by that of the decoder in their ``text_config``."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelProfile(Record):
    """One public model. ``config`` is what ``transformers.AutoConfig.for_model(**config)`` builds it from."""

    name: Text
    source: Text
    aliases: tuple[str, ...] = ()
    config: dict[str, Any] = Field(min_length=1)


@cache
def model_names() -> tuple[str, ...]:
    """Keys of the built-in models, sorted."""
    return tuple(sorted(file.stem for file in (PROFILES / "models").glob("*.json")))


def load_model_profile(name: str) -> tuple[str, ModelProfile]:
    """Key and profile of a built-in model; raises :class:`UsageError` with the near names when there is none."""
    key = name if name in model_names() else _key_of_alias(name)
    content = json.loads(_profile_text(key))
    return key, validated(ModelProfile, content, source=f"built-in model {key}")


def load_model(reference: str) -> tuple[ModelShape, dict[str, Any], str | None]:
    """Shape, config and folder of a model; the folder is None for a built-in name.

    ``reference`` is a folder that holds a ``config.json``, a config file, or a built-in name in any spelling
    ("llama-7b", "meta-llama/Llama-2-7b-hf"). A folder wins over a name that is spelt like it. Raises
    :class:`UsageError` for a name that is not known and for a folder or file that is no model.
    """
    if not reference.strip():
        raise UsageError(f"model: the reference is empty; give {_EXPECTED}")
    path = Path(reference).expanduser()
    if is_hub_name(reference) and not _is_built_in(reference):
        raise _not_downloaded(reference)
    if path.is_dir() and ((path / CONFIG_NAME).is_file() or not _is_built_in(reference)):
        return _from_folder(path)
    if path.suffix == ".gguf":
        raise _convert_first(path.parent, path.name)
    if looks_like_path(reference) or reference.endswith("/"):
        if not path.exists():
            raise UsageError(f"model {reference}: no such file or folder; give {_EXPECTED}")
        return _from_file(path)
    key, profile = load_model_profile(reference)
    return shape_of(profile.config, name=key), profile.config, None


def is_hub_name(reference: str) -> bool:
    """Whether a reference is spelt like a model of the Hugging Face hub, ``org/name``, and is no path that is here."""
    spelt = _HUB_NAME.fullmatch(reference) is not None and not reference.endswith((".json", ".gguf"))
    return spelt and not Path(reference).exists()


def how_to_download(hub_name: str) -> str:
    """What to type to have a model of the hub in a folder; nothing here downloads anything.

    >>> how_to_download("Qwen/Qwen3-8B")
    'hf download Qwen/Qwen3-8B --local-dir Qwen3-8B, then give --model Qwen3-8B'
    """
    folder = hub_name.rsplit("/", 1)[-1]
    return f"hf download {hub_name} --local-dir {folder}, then give --model {folder}"


def hub_name_of(key: str) -> str | None:
    """The hub's name of a built-in model, where it was published."""
    if key not in model_names():
        return None
    return next((alias for alias in load_model_profile(key)[1].aliases if "/" in alias), None)


def _not_downloaded(reference: str) -> UsageError:
    import difflib  # only mistakes need it, and it is slow to load

    near = difflib.get_close_matches(reference.rsplit("/", 1)[-1].lower(), model_names(), n=2, cutoff=0.6)
    names = ", ".join(near) or "llama-7b"
    return UsageError(
        f"model {reference}: no such folder, and no built-in name (such as {names}); nothing is downloaded here, so "
        f"get it first: {how_to_download(reference)}"
    )


def read_config(path: Path) -> dict[str, Any]:
    """The object in a ``config.json``, or a :class:`UsageError` that names the file, or says what it is instead."""
    source = f"model config {path}"
    try:
        config = parse_json(read_text(path, kind="model config"), source=source)
    except UsageError:
        refuse_other_path(path, wanted=MODEL)
        raise
    if not isinstance(config, dict):
        raise UsageError(f"{source}: expected a JSON object, found {type(config).__name__}")
    refuse_other_kind(config, source=path, wanted=MODEL)
    return config


def _from_folder(folder: Path) -> tuple[ModelShape, dict[str, Any], str]:
    if (folder / CONFIG_NAME).is_file():
        return _from_file(folder / CONFIG_NAME)
    gguf = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf:
        raise _convert_first(folder, gguf[0])
    raise UsageError(f"model {folder}: the folder has no {CONFIG_NAME}; give {_EXPECTED}")


def _from_file(path: Path) -> tuple[ModelShape, dict[str, Any], str]:
    config = text_part(read_config(path))
    place = path.resolve()
    whole_folder = place.name == CONFIG_NAME
    name = place.parent.name if whole_folder else place.stem
    return shape_of(config, name=name or str(place)), config, str(place.parent if whole_folder else place)


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The text decoder's config of a model of text and images that is known here, any other config as it is."""
    text, model_type = config.get("text_config"), config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _WRAPPERS or not isinstance(text, dict):
        return config
    stored = {name: config[name] for name in ("quantization_config",) if config.get(name) is not None}
    return {"model_type": _WRAPPERS[model_type], **text, **stored}


def _convert_first(folder: Path, file: str) -> UsageError:
    return UsageError(
        f"model {folder}: its weights are only there as GGUF ({file}); convert them once with "
        f"AutoModelForCausalLM.from_pretrained('{folder}', gguf_file='{file}').save_pretrained('NEW_FOLDER') "
        f"of transformers, then give NEW_FOLDER"
    )


def _is_built_in(reference: str) -> bool:
    try:
        _key_of_alias(reference)
    except UsageError:
        return False
    return True


def _key_of_alias(name: str) -> str:
    try:
        return find_name("model", name, _aliases_by_key())
    except UsageError:
        known = unknown_name("model", name.rsplit("/", 1)[-1], model_names())
        raise UsageError(f"{known}; or give a Hugging Face model folder or its {CONFIG_NAME}") from None


@cache
def _aliases_by_key() -> dict[str, tuple[str, ...]]:
    """Other names of every built-in model; a hub name counts without its owner too."""
    aliases: dict[str, tuple[str, ...]] = {}
    for key in model_names():
        given = json.loads(_profile_text(key))["aliases"]
        aliases[key] = (*given, *(alias.rsplit("/", 1)[-1] for alias in given))
    return aliases


def _profile_text(key: str) -> str:
    return profile_text(f"models/{key}.json")


_EXPECTED = f"a Hugging Face model folder, its {CONFIG_NAME}, or a built-in name such as llama-7b"
