"""Books for a script that was not written for them: what it says lies on ``cuda`` is fake, all else is as it is.

On the device a tensor has no numbers, but for whole numbers that come from the host: token ids, masks, lengths and what
is computed of them are followed beside it, so that code that looks at them goes on as it would. Where a script asks for
any other number it is told 0 (or as many rows as there can be), and the books remember where.

Underneath every tensor is on torch's CPU: autograd takes that for granted. ``device`` says otherwise to the script.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from meft.planner.base.errors import UsageError
from meft.runtime.device.books import _tensors
from meft.runtime.fake.books import CudaBooks, in_backward

aten = torch.ops.aten
MAX_FOLLOWED_ELEMENTS = 1 << 22
"""Of larger tensors the numbers are not followed."""
MAX_HOST_BYTES = 16 << 20
"""A larger tensor made on the host has no content: it is weights."""
_HOST = torch.device("cpu")
_ASKS_FOR_NUMBERS = (aten._local_scalar_dense.default, aten.is_nonzero.default)
_BY_MASK = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
_UNDERNEATH = ("torch", "meft", "contextlib", "unittest", "functools")
_LIBRARIES = (*_UNDERNEATH, "transformers", "accelerate", "peft", "trl", "bitsandbytes")


class ScriptBooks(CudaBooks):
    """Books that tell device from host by what the script says; ``fake`` makes tensors without content."""

    def __init__(self, *, workspace_bytes: int, categorise: Callable[[], str], fake: FakeTensorMode) -> None:
        super().__init__(workspace_bytes=workspace_bytes, categorise=categorise)
        self.fake = fake
        self.at_work = False
        self.weights_are_fake = False
        """While set, whatever is made on the host has no content either."""
        self._all_on_device = False
        self.numbers_asked_for: Counter[str] = Counter()
        """By place in the script: numbers that there are none of."""
        self.rows_unknown: Counter[str] = Counter()
        """By place in the script: selections whose size depends on such numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` on the device, in the books, or on the host."""
        kwargs = dict(kwargs or {})
        if func.namespace == "prim":
            return self._quietly(func, args, kwargs)
        tensors = _tensors((args, kwargs))
        asked = kwargs.get("device")
        named = isinstance(asked, torch.device) and asked.type == "cuda"
        if named:
            kwargs["device"] = _HOST
        if (
            named
            or self._all_on_device
            or any(self.holds(tensor) for tensor in tensors if isinstance(tensor, FakeTensor))
        ):
            return self._on_device(func, args, kwargs, tensors)
        return self._on_host(func, args, kwargs, tensors)

    def _is_on_device(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, FakeTensor) and self.holds(tensor)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Inside, ``device`` of a tensor is where torch has it."""
        before, self.at_work = self.at_work, True
        try:
            yield
        finally:
            self.at_work = before

    @contextmanager
    def host_only(self) -> Iterator[None]:
        """Inside, whatever is made lies on the host, without content."""
        before, self.weights_are_fake = self.weights_are_fake, True
        try:
            yield
        finally:
            self.weights_are_fake = before

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, whatever is made lies on the device."""
        before, self._all_on_device = self._all_on_device, True
        try:
            yield
        finally:
            self._all_on_device = before

    def note_numbers(self) -> None:
        """The script looks at numbers that there are none of."""
        self.numbers_asked_for[place_in_script()] += 1

    def empty_cache(self) -> None:
        """Give what is cached back."""
        self.allocator.empty_cache()

    def _quietly(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        with self._working(), self.fake:
            return func(*args, **kwargs)

    # --- the host ------------------------------------------------------------------------------------------------

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return self._quietly(func, args, kwargs)
        if in_backward() and not tensors:
            return self._on_device(func, args, kwargs, tensors)  # autograd's own zeros: it names no other place
        if not tensors and (self.weights_are_fake or _num_bytes(args, kwargs) > MAX_HOST_BYTES):
            return self._quietly(func, args, kwargs)
        return func(*args, **kwargs)

    # --- the device ----------------------------------------------------------------------------------------------

    def _on_device(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
        if func in _ASKS_FOR_NUMBERS:
            return self._number(args[0])
        if func in _BY_MASK:
            args = (args[0], [rows for index in args[1] for rows in self._as_rows(index)], *args[2:])
        with self._working():
            output = self.execute(func, args, kwargs)
        self._follow(func, args, kwargs, tensors, output)
        return output

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Without content; selections whose size is not known are taken to select everything."""
        if func is aten.histc.default:  # torch knows its shape for floating numbers alone
            with self.fake:
                return torch.zeros(kwargs.get("bins", args[1] if len(args) > 1 else 100), dtype=args[0].dtype)
        try:
            with self.fake:
                return func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            known = _known(args)
            if known is not None:
                return self._made_fake(func(*known, **kwargs))
            self.rows_unknown[place_in_script()] += 1
            if func is aten.nonzero.default:
                with self.fake:
                    return torch.zeros((args[0].numel(), max(args[0].dim(), 1)), dtype=torch.int64)
            if func is aten.masked_select.default:
                with self.fake:
                    return torch.zeros_like(args[0]).reshape(-1)
            raise UsageError(
                f"{place_in_script()}: {func} gives as many rows as the numbers on the device say, and a trace has none"
            ) from error

    def _made_fake(self, values: Any) -> Any:
        with self.fake:
            return torch.utils._pytree.tree_map_only(torch.Tensor, lambda each: torch.empty_like(each), values)

    def _as_rows(self, index: Any) -> list[Any]:
        """A mask as the places that it selects, by dimension: of its numbers where they are known, else all."""
        if not isinstance(index, torch.Tensor) or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        value = value_of(index)
        if value is None:
            self.rows_unknown[place_in_script()] += 1
            value = torch.ones(index.shape, dtype=torch.bool)
        return list(value.nonzero(as_tuple=True))

    def _number(self, tensor: torch.Tensor) -> Any:
        value = value_of(tensor)
        if value is not None:
            return value.item()
        self.note_numbers()
        if tensor.dtype == torch.bool:
            return False
        return 0.0 if tensor.dtype.is_floating_point else 0

    def _follow(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor], output: Any) -> None:
        """Compute whole numbers beside the tensors without content, where all that they come of is known."""
        outputs = _tensors((output,))
        if not outputs or not all(_is_followed(each) for each in outputs):
            return
        if any(value_of(tensor) is None for tensor in tensors):
            for each in outputs:
                each.__dict__.pop("meft_value", None)
            return
        values = _known(args), _known(kwargs)
        with torch.no_grad():
            computed = _tensors((func(*values[0], **values[1]),))
        for each, value in zip(outputs, computed, strict=False):
            each.meft_value = value  # type: ignore[attr-defined]


def value_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Its numbers: its own on the host, those followed beside it on the device, else None."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    found: torch.Tensor | None = tensor.__dict__.get("meft_value")
    return found


def place_in_script() -> str:
    """File and line of the innermost frame that is the script's own, and of the library's that it is in."""
    frame: FrameType | None = sys._getframe(1)
    library = ""
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        here = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        if package not in _LIBRARIES:
            return here + library
        if not library and package not in _UNDERNEATH:
            library = f" ({package}, {here})"
        frame = frame.f_back
    return library.strip(" ()")


def _is_followed(tensor: torch.Tensor) -> bool:
    if tensor.numel() > MAX_FOLLOWED_ELEMENTS or not isinstance(tensor, FakeTensor):
        return False
    return not tensor.dtype.is_floating_point or tensor.dim() == 0


def _known(values: Any) -> Any:
    """Arguments with their numbers in place of the tensors; None if one has none."""
    unknown = False

    def known(tensor: torch.Tensor) -> torch.Tensor | None:
        nonlocal unknown
        value = value_of(tensor)
        unknown = unknown or value is None
        return value

    found = torch.utils._pytree.tree_map_only(torch.Tensor, known, values)
    return None if unknown else found


def _num_bytes(args: Any, kwargs: dict[str, Any]) -> int:
    """Of what a factory makes, by the size that it is given."""
    sizes = [value for value in args if isinstance(value, (list, tuple, torch.Size))]
    if not sizes or not all(isinstance(each, int) for each in sizes[0]):
        return 0
    count = 1
    for each in sizes[0]:
        count *= each
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return count * dtype.itemsize
