"""What would train nothing, or something else than was planned, refused with a line that says what to do instead."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from meft.planner.base.errors import UsageError
from meft.planner.records.plan import Plan
from meft.runtime.session.model_loading import COMPUTE_DTYPES
from meft.runtime.use.row_optimizer import RowOptimizer

_CARRIED = "_meft_adapters"
"""Attribute of a base model that carries adapters: their names, None for one that has none."""

_SAVE = "model.save_pretrained(folder) writes the adapter; the base has files of its own"
_ONE = "this adapter is MEFT's own kind, which transformers' and PEFT's methods do not know: "
REFUSED_METHODS = {
    "push_to_hub": f"it would upload the base without the adapter: {_SAVE}, and huggingface_hub uploads a folder",
    "add_adapter": f"{_ONE}a plan makes one (AdapterModel.from_plan)",
    "load_adapter": f"{_ONE}AdapterModel.from_pretrained(base, folder) loads one",
    "set_adapter": f"{_ONE}detach() takes it off",
    "enable_adapters": f"{_ONE}it is active until detach()",
    "disable_adapters": f"{_ONE}detach() takes it off",
    "delete_adapter": f"{_ONE}detach() takes it off",
    "merge_and_unload": "a parallel adapter has no place in the base's weights; it stays beside the base: " + _SAVE,
    "merge_adapter": "a parallel adapter has no place in the base's weights; it stays beside the base: " + _SAVE,
    "unload": "detach() takes the adapter off and gives the base back",
    "resize_token_embeddings": "the plan is for the base as it is; resize it, save it, and plan for the new folder",
}
"""Methods of a base that know nothing of the adapter and would do half of what they say, and what to do instead."""


def refuse_method(name: str) -> None:
    """Raise :class:`UsageError` for a base's method that would do half."""
    if name in REFUSED_METHODS:
        raise UsageError(f"{name}: not on a model with an adapter of MEFT beside it; {REFUSED_METHODS[name]}")


def carry(base: nn.Module, name: str | None) -> Callable[[], None]:
    """Note on ``base`` that it carries an adapter; returns what takes the note away.

    Raises:
        UsageError: it carries one already, unless all have names of their own.
    """
    carried: list[str | None] = getattr(base, _CARRIED, [])
    if name is not None and name in carried:
        raise UsageError(f"adapter_name={name!r}: the base carries an adapter of this name already; give another name")
    if carried and (name is None or None in carried):
        shown = ", ".join("one without a name" if each is None else each for each in carried)
        raise UsageError(
            f"this base carries an adapter already ({shown}), as when a notebook's cell runs again: take it off first "
            f"(model.detach()), or load the base anew; several trained adapters on one base need each its own "
            f"adapter_name, in AdapterModel.from_pretrained"
        )
    setattr(base, _CARRIED, [*carried, name])

    def put_down() -> None:
        left = [each for each in getattr(base, _CARRIED, []) if each != name]
        if left:
            setattr(base, _CARRIED, left)
        elif hasattr(base, _CARRIED):
            delattr(base, _CARRIED)

    return put_down


def require_planned_dtype(plan: Plan, base: nn.Module) -> None:
    """Raise :class:`UsageError` unless the base's matrices are in the dtype that the plan's memory is for."""
    planned = plan.request.weights_dtype
    if planned not in COMPUTE_DTYPES:
        if not getattr(base, f"is_loaded_in_{'4bit' if planned == 'nf4' else '8bit'}", False):
            raise UsageError(
                f"the plan is for a base in {planned}, and this one is not quantized: load it so, or plan again with "
                f"--weights-dtype {_name_of(_matrix_dtypes(base))}"
            )
        return
    found = _matrix_dtypes(base)
    if found - {COMPUTE_DTYPES[planned]}:
        name = _name_of(found)
        raise UsageError(
            f"the plan is for a base in {planned}, and this one has weights in {name}: load it with "
            f"dtype={COMPUTE_DTYPES[planned]}, or plan again with --weights-dtype {name}"
        )


def _matrix_dtypes(base: nn.Module) -> set[torch.dtype]:
    return {each.dtype for each in base.parameters() if each.dim() > 1 and each.is_floating_point()}


def _name_of(dtypes: set[torch.dtype]) -> str:
    names = {dtype: name for name, dtype in COMPUTE_DTYPES.items()}
    return " and ".join(sorted(names.get(dtype, str(dtype)) for dtype in dtypes)) or "fp32"


def require_planned_size(plan: Plan, shape: torch.Size) -> None:
    """Raise :class:`UsageError` for a training batch ``[B, S]`` that is larger than what the plan's memory is for."""
    request = plan.request
    sequences, length = int(shape[0]), int(shape[1])
    if length > request.seq_len or sequences * length > request.batch_size * request.seq_len:
        raise UsageError(
            f"a batch of {sequences} x {length} tokens: the plan's memory is for {request.batch_size} x "
            f"{request.seq_len}; cut sequences to {request.seq_len} and batches to {request.batch_size}, or plan again "
            f"with --batch-size {max(sequences, 1)} --seq-len {max(length, 1)}"
        )


def require_placed(parameters: list[nn.Parameter], move: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Raise :class:`UsageError` if ``move`` would change where a model in training is, or its dtype."""
    for parameter in parameters[:1]:
        here = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        there = move(here)
        if there.device != here.device or there.dtype != here.dtype:
            raise UsageError(
                f"a model in training stays where its plan put it ({here.device}, {here.dtype}), and this would make "
                f'it {there.device}, {there.dtype}: choose with AdapterModel.from_plan(..., device="cuda" or '
                f'"emulated"), and for a Trainer on the emulated device TrainingArguments(use_cpu=True)'
            )


def watch_foreign_steps(model: nn.Module, own: object) -> Callable[[], None]:
    """Refuse the step of any optimizer that holds parameters of ``model`` and is not its own; returns what ends it.

    Such a step trains nothing: rows live on the host, where no other optimizer finds them, and the base is frozen.
    ``own`` is the optimizer that the row optimizer itself uses, for routers.
    """
    watched = weakref.ref(model)

    def before_step(optimizer: torch.optim.Optimizer, args: Any, options: Any) -> None:
        del args, options
        mine = watched()
        if mine is None or optimizer is own or isinstance(optimizer, RowOptimizer):
            return
        ids = {id(parameter) for parameter in mine.parameters()}
        if any(id(parameter) in ids for group in optimizer.param_groups for parameter in group["params"]):
            raise UsageError(
                f"{type(optimizer).__name__} would train nothing of this adapter, whose rows are on the host: in a "
                f"loop of your own step model.optimizer(learning_rate=...), and give a Trainer (or SFTTrainer) "
                f"**trainer_arguments(model, args) of meft.runtime.use.hf_trainer"
            )

    return register_optimizer_step_pre_hook(before_step).remove


class _Guided(Protocol):
    @property
    def bypassed(self) -> bool: ...


def refuse_bypass(model: _Guided, base_decoder: nn.Module) -> Callable[[], None]:
    """Refuse training forwards of the base alone, whose backward nobody would prepare; returns what ends it."""
    watched = weakref.ref(model)

    def before_forward(module: nn.Module, args: Any) -> None:
        del module, args
        mine = watched()
        if mine is not None and mine.bypassed:
            raise UsageError(
                "a training forward of the base itself: call the AdapterModel, which leads its gradients to the rows; "
                "or eval() or torch.no_grad() to ask it only"
            )

    return base_decoder.register_forward_pre_hook(before_forward, prepend=True).remove


def differentiable(outputs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What of a model's outputs a caller may go backward from, by name."""
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    items = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    for name, value in items:
        last = value[-1] if isinstance(value, tuple) and value else value
        if isinstance(last, torch.Tensor) and last.requires_grad:
            yield str(name), last


class BackwardOrder:
    """One forward, then its backward: a model in training holds the rows of one micro-batch at a time."""

    def __init__(self) -> None:
        self._forwards = 0
        self._begun: set[str] = set()

    @property
    def awaited(self) -> bool:
        """A forward has had no backward yet."""
        return self._forwards > 0 and not self._begun

    def forward(self) -> int:
        """A training forward begins; its number."""
        self._forwards += 1
        self._begun = set()
        return self._forwards

    def backward(self, number: int, anchor: str) -> bool:
        """The backward of a forward has reached ``anchor``; whether it has only begun.

        Raises:
            UsageError: another forward came in between, or this is its second backward.
        """
        if number != self._forwards:
            raise UsageError(
                "backward of a forward that is not the last: the rows of one micro-batch at a time are on the device. "
                "Call backward() after each forward (gradients add up until the optimizer steps), and zero_grad() now"
            )
        if anchor in self._begun:
            raise UsageError(
                "a second backward of one forward: its rows have left the device. Add the losses up and call "
                "backward() once, or run the forward again"
            )
        first = not self._begun
        self._begun.add(anchor)
        return first


class RowNorm(nn.Parameter):
    """A parameter without effect whose ``grad`` is the norm of the rows' gradients, as long as a step may use them.

    So whoever asks for the norm of a model's gradients, as the Trainer does for its log, gets that of the rows too,
    which are no parameters of the model.
    """

    ask: Callable[[], torch.Tensor | None]

    @staticmethod
    def of(ask: Callable[[], torch.Tensor | None]) -> RowNorm:
        """A handle that asks ``ask`` each time."""
        made = RowNorm(torch.zeros(()))
        made.ask = ask
        return made

    @property
    def grad(self) -> torch.Tensor | None:
        """The norm, a scalar; None while there is none."""
        ask = getattr(self, "ask", None)
        return None if ask is None else ask()

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        """Nothing is kept: the rows' gradients are forgotten by ``zero_grad``."""
