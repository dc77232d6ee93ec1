"""The frozen base sharded over the ranks of one machine, by torch's own FSDP2 (``fully_shard``).

Each rank has its part of every layer's linear weights. Before a layer runs its weights are gathered from all ranks,
after it they are given up, and before its backward gathered once more (with activation checkpointing the forward that
is computed again uses those); the next layer's are on their way meanwhile. A gather copies, so no number changes.
Embeddings, norms, biases, head and the adapter's routers stay whole on every rank, and all are frozen but the routers,
which are no parameters of the model: FSDP2 has nothing to reduce.

Layers are sharded one after the other, so that loading holds on the device the shards, and one whole layer. In host
memory each rank has mapped the folder's files, which ranks share; what they hold in another dtype than the plan's each
rank converts (to nf4: quantizes) for itself, all of it, and gives up layer by layer.

FSDP2 gathers into a flat buffer and copies out of it into tensors that stay for good, whose storages it empties and
refills. The books of the emulated device follow those.

Letters: ``N`` ranks, ``W`` bytes of a layer's linear weights, each padded to rows that ``N`` divides.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meft.planner.base.errors import EXIT_UNEXPECTED, MachineError, MeftError, UsageError
from meft.planner.records.plan import Plan
from meft.runtime.device.device import Device
from meft.runtime.device.engine import Per
from meft.runtime.ranks.peers import LONGEST, Peers

GATHERED = "gathered_weights"
"""The books' category of a layer's weights, whole, and of the buffer that they come in."""
MATRIX_DIMS = 2
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Under its newer name, where torch has that."""
LEAST_TORCH = "2.8"
"""Whose FSDP2 lets a gather be counted where it is made."""


class RankLost(MeftError):
    """Weights could not be gathered, because a rank has ended."""

    exit_code = EXIT_UNEXPECTED

    def __init__(self) -> None:
        super().__init__("a rank has ended while weights were gathered from it; what was saved is whole: --resume")


def require_planned_ranks(plan: Plan, gpus: int, *, machines: int) -> None:
    """Raise :class:`UsageError` unless there are as many ranks as the plan shards its base over."""
    request = plan.request
    if request.shard_base and (gpus, machines) != (request.gpus, 1):
        found = f"{gpus} of each of {machines} machines" if machines > 1 else f"{gpus}"
        raise UsageError(
            f"--gpus {gpus}: the plan shards the base over {request.gpus} cards of one machine, and there are {found}; "
            f"run it on those (meft-run --gpus {request.gpus}), or plan again"
        )


def require_whole(plan: Plan) -> None:
    """Raise :class:`UsageError` where keys should begin as rows of weights that no rank has all of."""
    if plan.request.shard_base:
        raise UsageError("--key-init ffn: each rank has its part of the sharded base alone; use --key-init random")


class ShardedBase:
    """The layers of a model, sharded. Every rank makes one, and runs them in the same order."""

    def __init__(self, blocks: Iterable[nn.Module], device: Device, *, gathers_first_again: bool) -> None:
        self._blocks: list[Any] = list(blocks)
        self._device = device
        self._first_again = 0 if gathers_first_again else 1
        self.counted_bytes: Counter[tuple[str, Per]] = Counter()
        """Received from other ranks, by category and by what it belongs to; as much is sent."""
        self.per: Per = "step"

    @classmethod
    def of(cls, model: nn.Module, blocks: Iterable[nn.Module], device: Device, *, checkpointing: bool) -> ShardedBase:
        """Shard ``model``, which is in host memory, over all ranks.

        Without checkpointing the first layer has no backward: its input needs no gradient, and its weights are not
        gathered for it.

        Raises:
            MachineError: this version of torch has no FSDP2, or one that cannot be counted.
        """
        fully_shard = _fully_shard()
        from torch.distributed.device_mesh import DeviceMesh

        base = cls(blocks, device, gathers_first_again=checkpointing)
        model.requires_grad_(False)
        group = dist.new_group(timeout=LONGEST)
        mesh = DeviceMesh.from_group(group, device.torch_device.type)
        for block in base._blocks:
            whole = _prepared(block, device)
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()))  # one communication for all layers
        base._prefetch(model)
        return base

    def _prefetch(self, model: Any) -> None:
        """Let the next layer's weights be gathered while one is computed.

        Asynchronously, so that FSDP2 gives the flat buffer up as soon as it is copied out of. Its own way of gathering
        ahead keeps it until the next layer's is: a third ``W``, and the head's too.
        """
        counting = CountingGather(self, self._device)
        for place, block in enumerate(self._blocks):
            block.set_custom_all_gather(counting)
            block.set_modules_to_forward_prefetch(self._blocks[place + 1 : place + 2])
            if place > self._first_again:
                block.set_modules_to_backward_prefetch([self._blocks[place - 1]])
            if place < self._first_again:
                block.set_unshard_in_backward(False)
        model._set_unshard_async_op(True)

    def make_ready(self) -> None:
        """Gather each layer once, so that device memory is the same in the first step as in every later one. Inside the
        device's scope, when the shards are on the device."""
        self.per = "run"
        with self._device.category(GATHERED):
            for block in self._blocks:
                block.unshard()
                for weight in _gathered_weights(block):
                    self._device.follow(weight)
                block.reshard()
        self.per = "step"

    def take_part(self) -> Callable[[int], None]:
        """Others run the layers, and this rank has nothing to run: it gives its part of each, in forward at once, and
        in backward by a call for each layer, the last first. Inside the device's scope."""
        for block in self._blocks:
            _give(block)

        def before_backward(layer: int) -> None:
            if layer >= self._first_again:
                _give(self._blocks[layer])

        return before_backward


def _give(block: Any) -> None:
    block.unshard()
    block.reshard()


@contextmanager
def together(base: ShardedBase | None) -> Iterator[None]:
    """Layers run inside; where they are sharded, what is said of a connection that broke is :class:`RankLost`."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError is one
        if base is None or not any(name in str(error) for name in ("gloo", "NCCL")):
            raise
        raise RankLost from None


def placed(
    plan: Plan, model: nn.Module, blocks: Iterable[nn.Module], device: Device, peers: Peers | None
) -> tuple[nn.Module, ShardedBase | None]:
    """The model, whose layers are ``blocks``, on the device: whole, or where the plan says so this rank's part of it.

    Raises:
        UsageError: the plan is for another number of ranks.
    """
    if not plan.request.shard_base:
        return device.adopt(model), None
    require_planned_ranks(plan, 1 if peers is None else peers.here, machines=1 if peers is None else peers.machines)
    base = ShardedBase.of(model, blocks, device, checkpointing=plan.decision.activation_checkpointing)
    model = device.adopt(model)
    with device.scope(), together(base):
        base.make_ready()
    return model, base


def _fully_shard() -> Any:
    """FSDP2's, which is slow to load."""
    try:
        from torch.distributed.fsdp import FSDPModule, fully_shard
    except ImportError:
        found = False
    else:
        found = hasattr(FSDPModule, "set_custom_all_gather")
    if not found:
        raise MachineError(
            f"--shard-base: torch {torch.__version__} has no FSDP2 whose gathers can be counted; install torch "
            f"{LEAST_TORCH} or later, or plan without it"
        )
    return fully_shard


class CountingGather:
    """What FSDP2 gathers with (its ``AllGather``): the buffer is in the books, and what others send is counted."""

    def __init__(self, base: ShardedBase, device: Device) -> None:
        self._base, self._device = base, device

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The flat buffer, ``N`` parts of all weights one after the other."""
        with self._device.category(GATHERED):
            return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> Any:
        """Begin to fill it; ``input_tensor`` is this rank's part of it, already in its place."""
        received = output_tensor.numel() - input_tensor.numel()
        self._base.counted_bytes["weights", self._base.per] += received * output_tensor.element_size()
        with self._device.host():  # what gloo has for itself is no device's
            if self._device.kind == "emulated":
                output_tensor, input_tensor = _unowned(output_tensor), _unowned(input_tensor)
            return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


def _unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, which whoever has this does not keep: gloo's thread holds on to what it was given for a moment
    after it has said that it is done, and by the books' time that is long enough for the next layer's buffer to be
    made before this one goes. FSDP2 has the tensor itself until the gather is over."""
    size = tensor.numel() * tensor.element_size()
    memory = (ctypes.c_byte * size).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype)


def _prepared(block: nn.Module, device: Device) -> set[nn.Parameter]:
    """The parameters of a layer that stay whole: all but its matrices.

    Of bitsandbytes' 4-bit layers the packed weights become a plain tensor, and what they mean the layer's own, from
    which its forward takes it.
    """
    for module in block.modules():
        weight: Any = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            if device.kind == "cuda":
                state.to(device.torch_device)
            module.quant_state = state
            module.weight = nn.Parameter(weight.data.as_subclass(torch.Tensor), requires_grad=False)
    return {each for each in block.parameters() if each.dim() != MATRIX_DIMS}


def _gathered_weights(block: nn.Module) -> list[torch.Tensor]:
    """The block's matrices, while they are gathered."""
    return [each.detach() for each in block.parameters() if each.dim() == MATRIX_DIMS]
