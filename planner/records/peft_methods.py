"""Methods of ``peft`` as users name them: on a command line, or by the config file that ``peft`` writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic import Field

from meft.planner.base.errors import UsageError
from meft.planner.base.schema import Record, Text, parse_json, read_text

PEFT_PREFIX = "peft:"
NOT_ARGUMENTS = frozenset(
    {"peft_type", "task_type", "base_model_name_or_path", "peft_version", "revision", "inference_mode", "auto_mapping"}
)
"""Fields of a config file that say what it is, not how it is trained."""


class PeftMethod(Record):
    """A method of the installed ``peft``: its type as users write it (``prompt-tuning``), and the fields of its config
    that are not at their defaults."""

    peft_type: Text
    arguments: dict[str, Any] = Field(default_factory=dict)

    @property
    def enum_name(self) -> str:
        """What ``peft`` calls the type.

        >>> PeftMethod(peft_type="prompt-tuning").enum_name
        'PROMPT_TUNING'
        """
        return self.peft_type.upper().replace("-", "_")


def split_method(text: str) -> tuple[str, str | None]:
    """A method as it is written: its name, and of ``peft:TYPE`` the type.

    >>> split_method("peft:prompt-tuning"), split_method("lora")
    (('peft', 'prompt-tuning'), ('lora', None))

    Raises:
        UsageError: ``peft`` without a type.
    """
    name, colon, peft_type = text.partition(":")
    if name != "peft":
        return text, None
    if not colon or not peft_type:
        raise UsageError("--method peft: which of its methods? Give --method peft:prompt-tuning, for example")
    return name, peft_type.lower().replace("_", "-")


def parsed_arguments(given: Iterable[str]) -> dict[str, Any]:
    """``name=value`` pairs; a value is JSON, and text where it is none.

    >>> parsed_arguments(["num_virtual_tokens=20", "init=pissa", 'targets=["q_proj"]'])
    {'num_virtual_tokens': 20, 'init': 'pissa', 'targets': ['q_proj']}

    Raises:
        UsageError: a pair without ``=``.
    """
    found: dict[str, Any] = {}
    for pair in given:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise UsageError(f"--peft-arg {pair}: give name=value, such as num_virtual_tokens=20")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def from_config_file(path: str) -> PeftMethod:
    """The method that an ``adapter_config.json`` describes.

    Raises:
        UsageError: no such file, no JSON object, or no config of ``peft``.
    """
    source = f"--peft-config {path}"
    content = parse_json(read_text(path, kind="--peft-config"), source=source)
    if not isinstance(content, dict) or not isinstance(content.get("peft_type"), str):
        raise UsageError(f"{source}: has no peft_type; give the adapter_config.json that peft writes")
    if content.get("task_type") not in (None, "CAUSAL_LM"):
        raise UsageError(f"{source}: task_type {content['task_type']}: only CAUSAL_LM is trained here")
    arguments = {name: value for name, value in content.items() if name not in NOT_ARGUMENTS and value is not None}
    return PeftMethod(peft_type=content["peft_type"].lower().replace("_", "-"), arguments=arguments)


def method_of(
    method: str | None, arguments: Iterable[str] | dict[str, Any] | None, config: object
) -> tuple[str | None, PeftMethod | None]:
    """The method's name, and of ``peft`` which method with which settings, from what a user may say of it.

    Raises:
        UsageError: they do not go together.
    """
    if config is not None:
        if arguments or method not in (None, "peft"):
            raise UsageError("--peft-config says method and settings; leave --method and --peft-arg out")
        return "peft", from_config_file(str(config))
    if method is None:
        return None, None
    name, peft_type = split_method(method)
    if peft_type is None:
        if arguments:
            first = next(iter(arguments))
            raise UsageError(f"--peft-arg {first}: is of {PEFT_PREFIX}TYPE; {name} has options of its own")
        return name, None
    given = arguments if isinstance(arguments, dict) else parsed_arguments(arguments or ())
    return name, PeftMethod(peft_type=peft_type, arguments=given)
