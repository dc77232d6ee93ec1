"""The shape of whatever model: by closed form where that knows the family, else read from the real class.

What is read is kept in the cache, by a digest of the config, so that it is read once: after that no torch is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meft.planner.base.cache import writable_cache_folder
from meft.planner.base.errors import UsageError
from meft.planner.base.files import write_atomic
from meft.planner.base.schema import read_text
from meft.planner.base.version import VERSION
from meft.planner.models.architecture import ModelShape
from meft.planner.models.configs import COUNTED_MODEL_TYPES, NoClosedForm, shape_from_config
from meft.planner.models.stored import stored_weights

MODELS = "models"
"""Measured shapes and traced terms, in the cache folder."""


def shape_of(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """The shape of the model that a Hugging Face ``config.json`` describes; ``name`` names it.

    Raises:
        UsageError: a missing or invalid field, or a model that transformers does not build.
        MachineError: no closed form knows the family, it is not in the cache, and torch is not there to look.
    """
    stored = stored_weights(config, name=name)
    shape = _shape_of(config, name)
    if stored is None:
        return shape
    if shape.measured is not None and stored.method != "bitsandbytes-4bit":
        raise UsageError(
            f"model {name}: stored as {stored.title}, which is known for families with a closed form, and "
            f"{shape.model_type} has none; give a folder of 16-bit weights"
        )
    return shape.model_copy(update={"stored": stored})


def _shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type in COUNTED_MODEL_TYPES:
        try:
            return shape_from_config(config, name=name)
        except NoClosedForm:
            pass
    return _measured(config, name)


def config_digest(config: Mapping[str, Any]) -> str:
    """What is kept of a model is kept by this: its config, the release of transformers that builds it, and ours."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(f"{VERSION} {_transformers_version()} {text}".encode()).hexdigest()[:32]


def cache_file(name: str) -> Path:
    """A file among what is kept of models."""
    return writable_cache_folder() / MODELS / f"{name}.json"


def keep(path: Path, text: str) -> None:
    """Write a file of the cache; where that cannot be done it is read from the model again the next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError:
        return


def _measured(config: Mapping[str, Any], name: str) -> ModelShape:
    kept = cache_file(config_digest(config))
    if kept.is_file():
        try:
            content = json.loads(read_text(kept, kind="measured shape"))
            return ModelShape.model_validate(content | {"name": name})
        except (UsageError, ValueError, TypeError):
            kept.unlink(missing_ok=True)  # of another release, or damaged: measured again
    from meft.planner.base.tracers import tracer  # it asks the installation: slow to load

    purpose = f"model {name}: no closed form knows model_type {config['model_type']}, so its class is looked at once"
    shape: ModelShape = tracer("shape", purpose=purpose)(dict(config), name=name)
    keep(kept, json.dumps(shape.model_dump(mode="json")))
    return shape


def _transformers_version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to load

    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""
