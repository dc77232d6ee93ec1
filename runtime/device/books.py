"""The emulated device's books: every device storage is counted when it is allocated and when it is released.

A :class:`DeviceBooks` is a torch dispatch mode. While it is active, and outside :meth:`DeviceBooks.host`, whatever an
operator allocates lies on the device: its storage is entered, passed through the caching allocator model, and taken
out when torch frees it. A device operator that is handed a host tensor is refused, as CUDA would refuse it, so
nothing crosses the link except through the transfer engine.

A storage may also stay and its bytes go: FSDP2 empties and refills those of gathered weights with ``resize_``, which
is no operator. Of storages that they :meth:`~DeviceBooks.follow` the books look before each operator whether that
happened.

With an :class:`~meft.runtime.device.event_log.EventLog` the books also write down every storage that comes and goes, in
order.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from meft.planner.allocator.caching import CachingAllocator
from meft.planner.base.errors import MeftError
from meft.runtime.device.event_log import EventLog

DEFAULT_CATEGORY = "activations"
_DEVICE_OF = torch.ops.prim.device.default
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class WrongPlaceError(MeftError):
    """A device operator was handed a tensor that lies on the host."""


@dataclass(frozen=True)
class _Entry:
    handle: int
    num_bytes: int
    category: str
    watcher: weakref.ref[Any]
    logged: int | None = None
    """The storage's number in the log."""


class DeviceBooks(TorchDispatchMode):
    """Counts device storages by category and enforces a budget through the allocator model.

    ``capacity_bytes`` is what the allocator may reserve (``None``: no limit). Exceeding it raises
    :class:`~meft.planner.base.errors.DeviceOutOfMemory` from the operator that allocated.
    """

    def __init__(self, capacity_bytes: int | None = None, log: EventLog | None = None) -> None:
        super().__init__()
        self.log = log
        self.allocator = CachingAllocator(capacity_bytes)
        self._live: dict[int, _Entry] = {}
        self._departed: list[int] = []
        self._followed: dict[int, tuple[weakref.ref[Any], str]] = {}
        """Storages whose owner empties and refills them, with their category."""
        self._busy = False
        self._bytes_by_category: defaultdict[str, int] = defaultdict(int)
        self._peak_by_category: dict[str, int] = {}
        self._peak_bytes = 0
        self._category: str | None = None
        self._host_depth = 0
        self.takes_host_tensors = False
        """A library moves to the device what it makes of Python's numbers, which here is no move at all: such tensors
        are entered where they are first used, instead of refused."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while the books are open, so torch need not guard every operator against it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; on the device side check its inputs and enter its new storages."""
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):  # asked for at every turn
            return args[0].fake_device
        if self._host_depth or func.namespace == "prim":  # prim: other questions about a tensor
            return func(*args, **(kwargs or {}))
        if self._followed:
            self._note_emptied()
        if self._is_host_view(func, args, kwargs):
            return func(*args, **(kwargs or {}))
        return self.execute(func, args, kwargs or {})

    def execute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a device operator and enter its new storages."""
        output = func(*args, **kwargs)
        for tensor in _tensors((output,)):
            self._enter(tensor, func)
        return output

    @contextmanager
    def host(self) -> Iterator[None]:
        """Host work inside device code: nothing is entered and host tensors are welcome."""
        self._host_depth += 1
        try:
            yield
        finally:
            self._host_depth -= 1

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """Enter what is allocated inside under ``name``."""
        before, self._category = self._category, name
        try:
            yield
        finally:
            self._category = before

    def adopt(self, tensor: torch.Tensor) -> None:
        """Enter a tensor that was made outside the mode: it now lies on the device."""
        self._enter(tensor)

    def follow(self, tensor: torch.Tensor) -> None:
        """Mind from now on that the storage of a tensor, which is in the books or empty, may be emptied and refilled.

        It comes back under the category that is set now, when an operator first sees it.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        watcher = weakref.ref(storage, lambda _: self._followed.pop(key, None))
        self._followed[key] = (watcher, self._category or DEFAULT_CATEGORY)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage is in the books; of a sparse one those of its parts."""
        if tensor.layout is torch.sparse_coo:
            return all(part.untyped_storage()._cdata in self._live for part in _parts(tensor) if part.numel())
        return tensor.untyped_storage()._cdata in self._live

    @property
    def peak_by_category(self) -> dict[str, int]:
        """Bytes by category at the moment of the allocated peak."""
        return dict(self._peak_by_category)

    def reset_peaks(self) -> None:
        """Start a new measurement of the peaks from what is live now."""
        self.allocator.reset_peaks()
        self._peak_bytes, self._peak_by_category = 0, {}
        self._note_peak()

    def category_of(self, tensor: torch.Tensor, func: Any) -> str:
        """What a new storage is entered as; ``func`` is the operator that made it, None for one adopted."""
        del tensor, func
        return self._category or DEFAULT_CATEGORY

    def recategorise(self, tensor: torch.Tensor, category: str) -> None:
        """It has turned out what a tensor is: for the log."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        if entry is not None and entry.logged is not None and self.log is not None:
            self.log.recategorise(entry.logged, category)

    def _note_emptied(self) -> None:
        """Take out what is followed and was emptied since the last operator."""
        for key, (watcher, _) in list(self._followed.items()):
            storage = watcher()
            if key in self._live and storage is not None and storage.nbytes() == 0:
                self._leave(key)

    def _is_refilled(self, tensor: torch.Tensor) -> bool:
        """Whether it is followed, was empty and no longer is; it is entered then."""
        followed = self._followed.get(tensor.untyped_storage()._cdata)
        if followed is None or not tensor.untyped_storage().nbytes():
            return False
        with self.category(followed[1]):
            self._enter(tensor)
        return True

    def _enter(self, tensor: torch.Tensor, func: Any = None) -> None:
        if tensor.layout is torch.sparse_coo:
            for part in _parts(tensor):
                self._enter(part, func)
            return
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._live or num_bytes == 0:
            return
        category = self.category_of(tensor, func)
        before, self._busy = self.allocator.allocated_bytes, True
        try:
            handle = self.allocator.malloc(num_bytes)
            block_bytes = self.allocator.allocated_bytes - before
            watcher = weakref.ref(storage, lambda _: self._leave(key))
            logged = None if self.log is None else self.log.allocated(num_bytes, category, operator_label(func, tensor))
            self._live[key] = _Entry(handle, block_bytes, category, watcher, logged)
            self._bytes_by_category[category] += block_bytes
            self._note_peak()
        finally:
            self._busy = False
            self._release_departed()

    def _leave(self, key: int) -> None:
        """Torch frees a storage. The garbage collector may do so at any moment, even amid the books' own work."""
        self._departed.append(key)
        self._release_departed()

    def _release_departed(self) -> None:
        while self._departed and not self._busy:
            self._busy = True
            try:
                entry = self._live.pop(self._departed.pop())
                self.allocator.free(entry.handle)
                if self.log is not None and entry.logged is not None:
                    self.log.released(entry.logged)
                self._bytes_by_category[entry.category] -= entry.num_bytes
            finally:
                self._busy = False

    def _note_peak(self) -> None:
        if self.allocator.allocated_bytes > self._peak_bytes:
            self._peak_bytes = self.allocator.allocated_bytes
            self._peak_by_category = {name: size for name, size in self._bytes_by_category.items() if size}

    def _is_host_view(self, func: Any, args: Any, kwargs: Any) -> bool:
        """True for a view of a host tensor, which stays on the host; raises for any other use of a host tensor.

        Indices may lie on the host: CUDA takes them from there, as it does numbers.
        """
        looked_at = (args[:1], args[2:]) if func in _INDEXED else (args, kwargs)
        for tensor in _tensors(looked_at):
            if not tensor.dim() or not tensor.numel() or self.holds(tensor) or self._is_refilled(tensor):
                continue
            if func.is_view:
                return True
            if self.takes_host_tensors:
                self._enter(tensor)
                continue
            shape = tuple(tensor.shape)
            raise WrongPlaceError(
                f"{func} on the device was handed a host tensor of shape {shape}, dtype {tensor.dtype}; "
                f"move it through the transfer engine"
            )
        return False


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """All tensors in an operator's arguments or outcome; asked twice per operator, so torch's own walk is too slow."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
    return found


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A sparse tensor's places and numbers, which are storages of their own."""
    return tensor._indices(), tensor._values()


def operator_label(func: Any, tensor: torch.Tensor) -> str:
    """An operator and what it made, such as ``mm [512, 4096] bfloat16``."""
    name = "adopted" if func is None else str(func).removeprefix("aten.").partition(".")[0]
    return f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
