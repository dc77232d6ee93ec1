"""A CUDA device that a script finds: what ``torch.cuda`` says of it, and how tensors come to it and go.

Its memory is that of the books: ``torch.cuda.max_memory_allocated()`` within a traced script is the trace's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.utils.data
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp import autocast_mode

from meft.runtime.fake.script_books import ScriptBooks, value_of

_CUDA = torch.device("cuda", 0)
_HOST = torch.device("cpu")
MAX_ANSWERED_BYTES = 1 << 20
"""A larger tensor that goes to the host has no content there either."""


@dataclass(frozen=True)
class PresentCard:
    """What a script can ask of a card."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    processors: int = 80


@contextmanager
def cuda_is_there(card: PresentCard, books: ScriptBooks) -> Iterator[None]:
    """Inside, ``cuda`` is a device like any other, whose tensors are in ``books``. For the whole process."""
    replaced = [
        *((torch.cuda, name, value) for name, value in _cuda_functions(card, books).items()),
        *((torch.Tensor, name, value) for name, value in _tensor_methods(books).items()),
        *((torch, name, _made_on_host(getattr(torch, name))) for name in ("tensor", "as_tensor", "asarray")),
        *_autocast_functions(),
        (FakeTensor, "device", property(_Device(books, FakeTensor.device))),
        (torch.version, "cuda", "12.8"),
        (nn.Module, "_apply", _apply),
        (
            sys.modules[torch.optim.Optimizer.__module__],
            "_foreach_supported_types",
            [torch.Tensor, nn.Parameter, FakeTensor],
        ),
        (torch.utils.data.DataLoader, "__init__", _without_pinning(torch.utils.data.DataLoader.__init__)),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        torch._C._ensureCUDADeviceGuardSet()
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        yield


class _Device:
    """The ``device`` of a tensor without content: where the script has it, or within the books where torch has it."""

    def __init__(self, books: ScriptBooks, own: Any) -> None:
        self.books, self.own = books, own.fget

    def __call__(self, tensor: FakeTensor) -> torch.device:
        if not self.books.at_work and self.books.holds(tensor):
            return _CUDA
        found: torch.device = self.own(tensor)
        return found


def _cuda_functions(card: PresentCard, books: ScriptBooks) -> dict[str, Any]:
    allocator = books.allocator

    def properties(device: Any = None) -> Any:
        del device
        major, minor = card.capability
        return SimpleNamespace(
            name=card.name,
            total_memory=card.memory_bytes,
            major=major,
            minor=minor,
            multi_processor_count=card.processors,
            is_integrated=False,
            warp_size=32,
        )

    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": card.name,
        "get_device_capability": card.capability,
        "is_bf16_supported": card.capability >= (8, 0),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": [torch.zeros(16, dtype=torch.uint8)],
        "initial_seed": 0,
        "get_arch_list": ["sm_{}{}".format(*card.capability)],
        "memory_summary": "",
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "is_current_stream_capturing": False,
    }
    silent = (
        *("_lazy_init", "init", "set_device", "synchronize", "manual_seed", "manual_seed_all", "seed", "seed_all"),
        *("set_rng_state", "set_rng_state_all", "ipc_collect", "set_per_process_memory_fraction", "set_stream"),
    )
    functions: dict[str, Any] = {name: _answering(value) for name, value in answers.items()}
    functions |= {name: _answering(None) for name in silent}
    functions |= {
        "get_device_properties": properties,
        "mem_get_info": lambda *_: (card.memory_bytes - allocator.reserved_bytes, card.memory_bytes),
        "memory_allocated": lambda *_: allocator.allocated_bytes,
        "max_memory_allocated": lambda *_: allocator.peak_allocated_bytes,
        "memory_reserved": lambda *_: allocator.reserved_bytes,
        "max_memory_reserved": lambda *_: allocator.peak_reserved_bytes,
        "memory_stats": lambda *_: _statistics(books),
        "reset_peak_memory_stats": lambda *_: allocator.reset_peaks(),
        "reset_accumulated_memory_stats": _answering(None),
        "empty_cache": books.empty_cache,
        "Event": _Timeless,
        "Stream": _Timeless,
        "current_stream": lambda *_: _Timeless(),
        "default_stream": lambda *_: _Timeless(),
        "stream": lambda *_: nullcontext(),
        "device": _Chosen,
        "device_of": _Chosen,
    }
    return functions


def _answering(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _statistics(books: ScriptBooks) -> dict[str, int]:
    """The counters of ``torch.cuda.memory_stats`` that are asked for."""
    allocator = books.allocator
    return {
        "allocated_bytes.all.current": allocator.allocated_bytes,
        "allocated_bytes.all.peak": allocator.peak_allocated_bytes,
        "active_bytes.all.current": allocator.allocated_bytes,
        "active_bytes.all.peak": allocator.peak_allocated_bytes,
        "reserved_bytes.all.current": allocator.reserved_bytes,
        "reserved_bytes.all.peak": allocator.peak_reserved_bytes,
        "num_alloc_retries": allocator.num_retries,
        "num_ooms": 0,
    }


class _Timeless:
    """An event or a stream where nothing takes time."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device, self.cuda_stream = _CUDA, 0

    def __enter__(self) -> _Timeless:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def elapsed_time(self, *_: Any) -> float:
        """Milliseconds: none."""
        return 0.0

    def query(self) -> bool:
        """All is done."""
        return True

    def record(self, *_: Any, **__: Any) -> _Timeless:
        """Nothing to be waited for."""
        return self

    wait = synchronize = record_event = wait_event = wait_stream = record


class _Chosen:
    """``with torch.cuda.device(0)``: there is one."""

    def __init__(self, *_: Any) -> None:
        self.idx = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


# --- tensors come and go -----------------------------------------------------------------------------------------


def _tensor_methods(books: ScriptBooks) -> dict[str, Any]:
    own_to, own_numpy, own_tolist = torch.Tensor.to, torch.Tensor.numpy, torch.Tensor.tolist
    own_type = torch.Tensor.type

    def on_device(tensor: torch.Tensor) -> bool:
        return isinstance(tensor, FakeTensor) and books.holds(tensor)

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        target, args, kwargs = _target(args, kwargs)
        if target is None:
            return own_to(self, *args, **kwargs)
        if target.type == "cuda" and not on_device(self):
            return own_to(self, _CUDA, *args, **kwargs)
        if target.type == "cpu" and on_device(self):
            return own_to(_on_host(self, books), *args, **kwargs)
        if target.type == "meta":
            return own_to(self, target, *args, **kwargs)
        kwargs.pop("non_blocking", None)
        copy_asked = kwargs.get("copy", False)
        args = tuple(each for each in args if not isinstance(each, bool))
        return own_to(self, *args, **kwargs) if args or kwargs.get("dtype") is not None or copy_asked else self

    def numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return own_numpy(_on_host(self, books) if isinstance(self, FakeTensor) else self, *args, **kwargs)

    def tolist(self: torch.Tensor) -> Any:
        return own_tolist(_on_host(self, books) if isinstance(self, FakeTensor) else self)

    def as_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        return own_type(self, dtype, *args, **kwargs)

    return {
        "to": to,
        "cuda": lambda self, *_, **__: to(self, _CUDA),
        "cpu": lambda self, *_, **__: to(self, _HOST),
        "pin_memory": lambda self, *_: self,
        "is_pinned": _answering(False),
        "numpy": numpy,
        "tolist": tolist,
        "type": as_type,
        "is_cuda": property(on_device),
        "is_cpu": property(lambda self: self.device.type == "cpu"),
        "get_device": lambda self: 0 if on_device(self) else -1,
        "record_stream": _answering(None),
    }


def _target(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.device | None, tuple[Any, ...], dict[str, Any]]:
    """Of the arguments of ``Tensor.to`` the device, and the others."""
    others = dict(kwargs)
    named = others.pop("device", None)
    if args and isinstance(args[0], (str, int, torch.device)) and not isinstance(args[0], bool):
        named, args = args[0], args[1:]
    elif args and args[0] is None:
        args = args[1:]
    elif args and isinstance(args[0], torch.Tensor):
        named, args = args[0].device, (args[0].dtype, *args[1:])
    if named is None:
        return None, args, others
    return torch.device("cuda", named) if isinstance(named, int) else torch.device(named), args, others


def _made_on_host(own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Numbers become a tensor on the host, which goes to the device then, as CUDA does it too."""

    def make(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> torch.Tensor:
        made = own(data, *args, **kwargs)
        if device is not None:
            made = made.to(device)
        return made.requires_grad_() if requires_grad else made

    return make


def _on_host(tensor: torch.Tensor, books: ScriptBooks) -> torch.Tensor:
    """A copy on the host: with the numbers that are followed, else zeros; a large one without content."""
    value = value_of(tensor)
    if value is not None:
        return value.clone()
    if tensor.numel() * tensor.element_size() > MAX_ANSWERED_BYTES:
        with books.host_only():
            return torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
    books.note_numbers()
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _apply(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply``: a parameter without content gets its new content in place; another is replaced, once for all
    the modules that share it."""
    if recurse:
        new_of: dict[int, nn.Parameter] = {}
        for each in module.modules():
            _convert(each, fn, new_of)
    else:
        _convert(module, fn, {})
    return module


def _convert(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], new_of: dict[int, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in new_of:
                new_of[id(parameter)] = _converted(parameter, fn)
            module._parameters[name] = new_of[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)


def _converted(parameter: nn.Parameter, fn: Callable[[torch.Tensor], torch.Tensor]) -> nn.Parameter:
    content = fn(parameter.detach())
    if isinstance(parameter, FakeTensor):
        parameter.data = content
        return parameter
    if not isinstance(content, FakeTensor):
        parameter.data = content
        return parameter
    new = nn.Parameter(content, parameter.requires_grad)
    new.__dict__.update({name: value for name, value in parameter.__dict__.items() if name != "meft_value"})
    return new


def _without_pinning(own: Callable[..., None]) -> Callable[..., None]:
    """Nothing is pinned where there is no driver; batches are made in this process, where the books see them."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"pin_memory": False, "num_workers": 0, "persistent_workers": False, "prefetch_factor": None}
        own(self, *args, **kwargs)

    return init


# --- autocast ------------------------------------------------------------------------------------------------------


def _autocast_functions() -> list[tuple[Any, str, Any]]:
    """CUDA's autocast is the CPU's underneath, with CUDA's lists."""
    own = autocast_mode.autocast.__init__
    enabled, dtype, set_enabled = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.set_autocast_enabled

    def init(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        if device_type == "cuda" and dtype is None:
            dtype = torch.float16
        own(self, "cpu" if device_type == "cuda" else device_type, dtype, enabled, cache_enabled)

    def of_cpu(device_type: str) -> str:
        return "cpu" if device_type == "cuda" else device_type

    return [
        (autocast_mode.autocast, "__init__", init),
        (torch, "is_autocast_enabled", lambda device_type="cuda": enabled(of_cpu(device_type))),
        (torch, "get_autocast_dtype", lambda device_type="cuda": dtype(of_cpu(device_type))),
        (torch, "set_autocast_enabled", lambda device_type, on: set_enabled(of_cpu(device_type), on)),
        (torch, "get_autocast_gpu_dtype", lambda: dtype("cpu")),
    ]
