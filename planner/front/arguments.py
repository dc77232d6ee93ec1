"""Arguments of a call: the commands' options with underscores, checked before anything is computed."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, Signature
from typing import Any, Literal, ParamSpec, TypeAlias, TypedDict, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from meft.planner.base.dtypes import AdapterDtype, WeightsDtype
from meft.planner.base.errors import InfeasibleError, MeftError, UsageError, unknown_name
from meft.planner.base.schema import problems_of
from meft.planner.base.units import parse_bytes
from meft.planner.front.options import RequestOptions
from meft.planner.records.plan import Attention, Objective, RowsInBackward, RowsPolicy, TokensSee
from meft.planner.records.routing import Routing
from meft.planner.records.setup import Autocast, LossName, OffloadName, OptimizerName
from meft.planner.terms.lengths import Batching

Size: TypeAlias = int | str
"""Bytes, or a size as people write it: ``"24GB"``."""
Reference: TypeAlias = str | os.PathLike[str]
"""A built-in name, or the path of a file or folder."""

P = ParamSpec("P")
T = TypeVar("T")

SIZES = ("gpu_mem", "host_mem", "context_overhead")
REFERENCES = ("model", "gpu", "host", "link", "sparsity")


class PlanArguments(TypedDict, total=False):
    """The options of ``meft-plan`` and of ``meft-plan compare``."""

    model: Reference | None
    gpu: Reference | None
    gpu_mem: Size | None
    host_mem: Size | None
    host: Reference | None
    link: Reference | None
    sparsity: Reference | None
    batch_size: int | Literal["auto"]
    seq_len: int
    grad_accum: int
    weights_dtype: WeightsDtype | None
    double_quant: bool | None
    adapter_dtype: AdapterDtype | None
    attention: Attention | None
    packed: bool | None
    activation_checkpointing: bool | None
    objective: Objective
    max_slowdown: float | None
    min_trainable: float | None
    adapter_width: int | None
    top_k: int | None
    prefetch_depth: int | None
    routing: Routing | None
    capacity_factor: float | None
    router_jitter: float | None
    balance_loss: float | None
    first_stage: float | None
    rows_in_backward: RowsInBackward | None
    tokens_see: TokensSee | None
    token_chunks: int | None
    hot_rows: int | None
    bf16_copy: bool | None
    context_overhead: Size | None
    active_rows_quantile: float | None
    gpus: int
    gpus_per_link: int
    nodes: int
    rows: RowsPolicy
    shard_base: bool
    interconnect: str | None


class EstimateArguments(TypedDict, total=False):
    """The options of ``meft-plan estimate``, but for the method."""

    model: Reference | None
    gpu: Reference | None
    gpu_mem: Size | None
    host_mem: Size | None
    context_overhead: Size | None
    host: Reference | None
    link: Reference | None
    sparsity: Reference | None
    peft_arg: dict[str, Any] | tuple[str, ...] | None
    peft_config: Reference | None
    rank: int | None
    target_modules: tuple[str, ...] | list[str] | str | None
    lora_dropout: float | None
    adapter_width: int | None
    reduction: int | None
    dropped_layers: int | None
    top_k: int | None
    active_rows: int | None
    prefetch_depth: int | None
    routing: Routing | None
    capacity_factor: float | None
    router_jitter: float | None
    balance_loss: float | None
    first_stage: float | None
    rows_in_backward: RowsInBackward | None
    tokens_see: TokensSee | None
    token_chunks: int | None
    hot_rows: int | None
    bf16_copy: bool | None
    weights_dtype: WeightsDtype | None
    double_quant: bool | None
    kbit_preparation: bool | None
    autocast: Autocast | None
    adapter_dtype: AdapterDtype | None
    batch_size: int
    seq_len: int
    grad_accum: int | None
    activation_checkpointing: bool | None
    offload: OffloadName | None
    torch_compile: bool | None
    attention: Attention | None
    repeated_heads: bool | None
    packed: bool | None
    optimizer: OptimizerName | None
    trl_casts: bool | None
    reentrant: bool | None
    optimizer_in_backward: bool | None
    kernels: str | tuple[str, ...] | None
    master_weights: bool | None
    loss: LossName | None
    padding: bool | None
    lengths: str | None
    tokenizer: Reference | None
    batching: Batching | None
    keep_outputs: bool | None


def request_options(arguments: Mapping[str, Any]) -> RequestOptions:
    """The arguments of a plan or a comparison as options.

    Raises :class:`UsageError` for an unknown name and for a value of the wrong kind or out of its range.
    """
    content = plain(arguments, known=tuple(RequestOptions.__dataclass_fields__))
    try:
        return _options_adapter().validate_python(content)
    except ValidationError as error:
        raise UsageError(problems_of(error)) from None


def plain(arguments: Mapping[str, Any], *, known: tuple[str, ...]) -> dict[str, Any]:
    """What was given: sizes in bytes, paths as text, numbers of numpy's as Python's; ``None`` says nothing.

    Raises :class:`UsageError` for a name that is not known and for a size that is none.
    """
    for name in arguments:
        if name not in known:
            raise unknown_name("argument", name, known)
    return {name: _plain(name, value) for name, value in arguments.items() if value is not None}


def _plain(name: str, value: Any) -> Any:
    if name in SIZES:
        return parse_bytes(str(value), field=name)
    if name in REFERENCES and isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "__index__") and not isinstance(value, bool):
        return operator.index(value)
    return value


@cache
def _options_adapter() -> TypeAdapter[RequestOptions]:
    return TypeAdapter(RequestOptions)


# --- errors, in the words of a call ----------------------------------------------------------------------------------

_OPTION = re.compile(r"(?<![\w/.-])--(no-)?([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")


@contextmanager
def as_arguments() -> Iterator[None]:
    """Errors raised within name arguments (``seq_len``) where they named options (``--seq-len``)."""
    try:
        yield
    except InfeasibleError as error:
        raise InfeasibleError(argument_names(str(error)), error.verdict) from None
    except MeftError as error:
        raise type(error)(argument_names(str(error))) from None


def argument_names(text: str) -> str:
    """The text with the names of arguments in place of options.

    >>> argument_names("--seq-len 4096: give at most 2048, or --no-bf16-copy")
    'seq_len 4096: give at most 2048, or bf16_copy=False'
    """
    return _OPTION.sub(lambda found: found[2].replace("-", "_") + ("=False" if found[1] else ""), text)


def call_with(function: str, arguments: Mapping[str, Any], changes: Mapping[str, str]) -> str:
    """The call with options changed or added, as it can be typed; an empty value is a flag.

    >>> call_with("meft.plan", {"gpu_mem": "8GB"}, {"--top-k": "32", "--no-bf16-copy": ""})
    "meft.plan(gpu_mem='8GB', top_k=32, bf16_copy=False)"
    """
    changed = {name.removeprefix("no_"): value for name, value in _changes(changes)}
    given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in arguments.items()}
    return f"{function}({', '.join(f'{name}={value!r}' for name, value in (given | changed).items())})"


def _changes(changes: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for option, text in changes.items():
        name = option.removeprefix("--").replace("-", "_")
        yield name, _number(text) if text else not name.startswith("no_")


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# --- what help() and a notebook's completion show --------------------------------------------------------------------


def keywords_of(arguments: type, defaults: Mapping[str, Any]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a function that takes ``**options`` show the names of a :class:`TypedDict` in its signature."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        own = Signature.from_callable(function)
        named = [one for one in own.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        options = [
            Parameter(name, Parameter.KEYWORD_ONLY, annotation=hint, default=defaults[name])
            for name, hint in get_type_hints(arguments).items()
        ]
        function.__signature__ = own.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
        return function

    return decorate
