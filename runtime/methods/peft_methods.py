"""Any method of the installed ``peft``, by its type and the fields of its own config.

Nothing of a method is written here: the config class checks its fields, ``get_peft_model`` attaches it.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from meft.planner.base.errors import MachineError, UsageError, unknown_name
from meft.planner.base.packages import require_packages
from meft.planner.records.peft_methods import NOT_ARGUMENTS, PEFT_PREFIX, PeftMethod

ALIASES: dict[str, PeftMethod] = {"dora": PeftMethod(peft_type="lora", arguments={"use_dora": True})}
"""Names that are in use for a type of another name with an argument."""
REFUSED = {
    "ADALORA": "its loop calls update_and_allocate, whose state peft does not save, so no run could go on",
    "ADAMSS": "its loop calls update_and_allocate between steps, which no other method's does",
    "MULTITASK_PROMPT_TUNING": "it trains on several tasks at once and wants task_ids with every batch",
    "POLY": "it trains on several tasks at once and wants task_ids with every batch",
    "XLORA": "it mixes LoRA adapters that are trained already",
    "CPT": "its loss weighs tokens by an input_type_mask, which no data here has",
    "CARTRIDGE": "it begins with a key-value cache of a text of its own, which peft's helper has to make first",
}
"""Types that the one training loop cannot run, and why."""


def known_types() -> list[str]:
    """Types of the installed ``peft`` as users write them."""
    return sorted(name.lower().replace("_", "-") for name in _config_classes())


def checked(method: PeftMethod) -> PeftMethod:
    """The method, which the installed ``peft`` knows; aliases are written out.

    Raises:
        UsageError: no such type or argument, a value that its config refuses, or a type that cannot run here.
    """
    method = _resolved(method)
    config_of(method)
    return method


def _resolved(method: PeftMethod) -> PeftMethod:
    """With its type's own name in the place of an alias."""
    alias = ALIASES.get(method.peft_type)
    if alias is None:
        return method
    return PeftMethod(peft_type=alias.peft_type, arguments=alias.arguments | method.arguments)


def config_of(method: PeftMethod) -> Any:
    """Its config, as ``peft`` makes it; see :func:`checked` for the errors."""
    require_packages("peft", purpose=f"--method {PEFT_PREFIX}{method.peft_type}")
    method = _resolved(method)
    classes = _config_classes()
    if method.enum_name not in classes:
        raise unknown_name("method of peft", method.peft_type, known_types())
    if method.enum_name in REFUSED:
        raise UsageError(f"--method {PEFT_PREFIX}{method.peft_type}: {REFUSED[method.enum_name]}")
    made = classes[method.enum_name]
    fields = {field.name for field in dataclasses.fields(made) if field.init} - NOT_ARGUMENTS
    for name in method.arguments:
        if name not in fields:
            raise unknown_name(f"argument of peft:{method.peft_type}", name, fields)
    with _in_one_line(method), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made(**_fresh(method.arguments), task_type="CAUSAL_LM")


def attach_peft(model: nn.Module, method: PeftMethod) -> nn.Module:
    """``get_peft_model``: the model with what is trained beside it, all else frozen.

    Raises:
        UsageError: ``peft`` refuses the config, or the config for this model.
    """
    from peft import get_peft_model

    config = config_of(method)
    with _in_one_line(method), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def with_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """A model with the adapter that ``peft`` saved in ``folder``, for inference.

    Raises:
        UsageError: ``peft`` cannot read it, or it does not fit the model.
    """
    require_packages("peft", purpose=f"--adapter {folder}")
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: nn.Module = PeftModel.from_pretrained(base, folder, local_files_only=True)
    except (ValueError, RuntimeError, TypeError, KeyError, OSError) as error:
        raise UsageError(f"--adapter {folder}: peft cannot use it with this model ({_first_line(error)})") from error
    return made


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    """What of a model is trained, in the order of its modules."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def _in_one_line(method: PeftMethod) -> Iterator[None]:
    """What ``peft`` raises for a config, which is of many types, as a line that names the method."""
    name = f"--method {PEFT_PREFIX}{method.peft_type}"
    try:
        yield
    except (torch.OutOfMemoryError, DataDependentOutputException, DynamicOutputShapeException):
        raise
    except ImportError as error:
        raise MachineError(f"{name}: {_first_line(error)}") from error
    except (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise UsageError(
            f"{name}: peft refuses it ({_first_line(error)}); its settings are given with --peft-arg name=value"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _fresh(arguments: dict[str, Any]) -> dict[str, Any]:
    """A config may change what it is given."""
    fresh: dict[str, Any] = json.loads(json.dumps(arguments))
    return fresh


def _config_classes() -> dict[str, Any]:
    require_packages("peft", purpose="--method peft:TYPE")
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value: made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
