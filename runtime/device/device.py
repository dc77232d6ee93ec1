"""The two devices behind one small interface: a CUDA GPU, and an emulated one that runs the same code on the CPU.

Code that belongs to the device runs inside :meth:`Device.scope`; host work inside it runs in :meth:`Device.host`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from meft.planner.base.errors import DeviceOutOfMemory, MachineError
from meft.planner.base.units import format_bytes
from meft.runtime.device.books import DeviceBooks
from meft.runtime.device.streams import CudaStreams, Streams


@dataclass(frozen=True)
class MemoryPeaks:
    """Peaks since the last reset; ``by_category`` is what was live at the allocated peak, where it is known."""

    allocated_bytes: int
    reserved_bytes: int
    by_category: dict[str, int] = field(default_factory=dict)

    def larger(self, other: MemoryPeaks) -> MemoryPeaks:
        """The peaks of two measurements together."""
        by_category = max(self, other, key=lambda peaks: peaks.allocated_bytes).by_category
        allocated = max(self.allocated_bytes, other.allocated_bytes)
        return MemoryPeaks(allocated, max(self.reserved_bytes, other.reserved_bytes), by_category)


class Device(Protocol):
    """What the runtime needs of a device."""

    kind: Literal["cuda", "emulated"]
    name: str
    torch_device: torch.device
    budget_bytes: int
    streams: Streams | None
    """None where nothing runs behind the caller's back."""

    def scope(self) -> AbstractContextManager[object]:
        """Device code: allocations inside lie on the device."""
        ...

    def host(self) -> AbstractContextManager[object]:
        """Host work inside a scope."""
        ...

    def category(self, name: str) -> AbstractContextManager[object]:
        """Name what is allocated inside, for the books."""
        ...

    def adopt(self, module: torch.nn.Module) -> torch.nn.Module:
        """Put a module's parameters and buffers on the device."""
        ...

    def follow(self, tensor: torch.Tensor) -> None:
        """Tell the books that its owner empties and refills a tensor's storage."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""
        ...

    def empty_cache(self) -> None:
        """Let the caching allocator give back what it holds without use."""
        ...

    def reset_peaks(self) -> None:
        """Start measuring peaks anew."""
        ...

    def peaks(self) -> MemoryPeaks:
        """Peaks since the last reset."""
        ...


class EmulatedDevice:
    """The CPU with a device's books: same code, storages kept apart, budget enforced, transfers counted."""

    kind: Literal["cuda", "emulated"] = "emulated"
    name = "emulated device (this machine's CPU)"
    streams: Streams | None = None

    def __init__(self, budget_bytes: int, books: DeviceBooks | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.torch_device = torch.device("cpu")
        self.books = books or DeviceBooks(budget_bytes)

    def scope(self) -> AbstractContextManager[object]:
        """Activate the books."""
        return self.books

    def host(self) -> AbstractContextManager[object]:
        """Suspend the books."""
        return self.books.host()

    def category(self, name: str) -> AbstractContextManager[object]:
        """Name what is allocated inside."""
        return self.books.category(name)

    def adopt(self, module: torch.nn.Module) -> torch.nn.Module:
        """Enter the module's storages under ``frozen_weights``."""
        with self.books.category("frozen_weights"):
            for tensor in (*module.parameters(), *module.buffers(), *_quantization_tensors(module)):
                self.books.adopt(_own_part(tensor))
        return module

    def follow(self, tensor: torch.Tensor) -> None:
        """See :meth:`DeviceBooks.follow`."""
        self.books.follow(tensor)

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back on the CPU."""

    def empty_cache(self) -> None:
        """Give back the allocator model's unused segments."""
        self.books.allocator.empty_cache()

    def reset_peaks(self) -> None:
        """Start measuring peaks anew."""
        self.books.reset_peaks()

    def peaks(self) -> MemoryPeaks:
        """Peaks since the last reset, with their categories."""
        allocator = self.books.allocator
        by_category = self.books.peak_by_category
        return MemoryPeaks(allocator.peak_allocated_bytes, allocator.peak_reserved_bytes, by_category)


class _Unbooked:
    """Where nobody keeps books of whose memory is whose."""

    def host(self) -> AbstractContextManager[object]:
        """Nothing is booked."""
        return nullcontext()

    def category(self, name: str) -> AbstractContextManager[object]:
        """Nothing is booked."""
        del name
        return nullcontext()


class BareDevice(_Unbooked, EmulatedDevice):
    """The CPU without a device's books, where they would take longer than what they are about."""

    name = "this machine's CPU, nothing booked"

    def __init__(self) -> None:
        super().__init__(budget_bytes=1 << 50)

    def scope(self) -> AbstractContextManager[object]:
        """Nothing is booked."""
        return nullcontext()

    def adopt(self, module: torch.nn.Module) -> torch.nn.Module:
        """It is there."""
        return module


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor that is sharded over ranks (a ``DTensor``, which is slow to load) this rank's shard."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _quantization_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What bitsandbytes keeps beside a 4-bit weight: scales, code, and of double quantization the second ones; the
    layer has them too, and alone where the weight is sharded."""
    for holder in (*module.parameters(), *module.modules()):
        state = getattr(holder, "quant_state", None)
        while state is not None:
            for name in ("absmax", "code", "offset"):
                tensor = getattr(state, name, None)
                if isinstance(tensor, torch.Tensor):
                    yield tensor
            state = getattr(state, "state2", None)


class CudaDevice(_Unbooked):
    """A CUDA device, by default the current one, its caching allocator limited to the plan's budget. Its tensors name
    their device themselves, and the allocator keeps no categories."""

    kind: Literal["cuda", "emulated"] = "cuda"

    def __init__(self, budget_bytes: int, index: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise MachineError("--device cuda: torch sees no CUDA device here; use --device emulated, or install a GPU")
        self.budget_bytes = budget_bytes
        self.torch_device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.name = properties.name
        self.streams: Streams | None = CudaStreams(self.torch_device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / properties.total_memory), self.torch_device)

    def scope(self) -> AbstractContextManager[object]:
        """CUDA tensors name their device themselves."""
        return cuda_out_of_memory(self.budget_bytes)

    def adopt(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move the module to the GPU."""
        with self.scope():
            return module.to(self.torch_device)

    def follow(self, tensor: torch.Tensor) -> None:
        """The CUDA allocator sees to it itself."""
        del tensor

    def synchronize(self) -> None:
        """Wait for every stream."""
        torch.cuda.synchronize(self.torch_device)

    def empty_cache(self) -> None:
        """Give back torch's unused segments."""
        torch.cuda.empty_cache()

    def reset_peaks(self) -> None:
        """Start measuring peaks anew."""
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def peaks(self) -> MemoryPeaks:
        """Torch's own counters."""
        allocated = torch.cuda.max_memory_allocated(self.torch_device)
        return MemoryPeaks(allocated, torch.cuda.max_memory_reserved(self.torch_device))


@contextmanager
def cuda_out_of_memory(budget_bytes: int) -> Iterator[None]:
    """Say in one line, as :class:`DeviceOutOfMemory`, that CUDA has no more memory for what is done inside."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        raise DeviceOutOfMemory(
            f"the device ran out of its budget of {format_bytes(budget_bytes)}: {first_line} "
            f"Plan again with a smaller --batch-size or --seq-len, or raise --gpu-mem"
        ) from error
