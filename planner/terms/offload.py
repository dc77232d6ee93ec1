"""Activations that wait on the host: whose way of it keeps what on the device, and what the host holds.

Three ways, read from their code:

- ``save-on-cpu``: ``torch.autograd.graph.save_on_cpu`` around the forward. Every tensor that a node keeps goes,
  weights and scalars too, once for each node that keeps it, to ordinary host memory; the step waits for each copy.
- ``trl``: ``OffloadActivations`` of TRL (``activation_offloading=True``) and torchtune, with streams. Tensors from 1
  KiB on that are no weights go to pinned memory, but for what the head keeps; the last five stay until later ones
  have gone, and a tensor that is still there is not sent again. In backward they come back on a stream of their own,
  whose blocks nothing else uses, and stay until the next node that needs some has run: two nodes' tensors are there
  at once. It is around backward too, so a reentrant checkpoint, which differentiates what it computes again by an
  engine of its own, sends that away as well; the other kind's own hooks come before.
- ``unsloth``: its gradient checkpointing: each layer's input goes to pinned memory, in the order of the computation,
  and comes back for that layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from meft.planner.records.setup import OffloadName


@dataclass(frozen=True)
class Offloading:
    """``stash``: how many of the last tensors stay on the device. ``overlaps``: copies run beside the computation."""

    least_bytes: int = 0
    takes_weights: bool = False
    takes_head: bool = True
    checkpoints_only: bool = False
    stash: int = 0
    in_backward: bool = False
    pinned: bool = True
    overlaps: bool = False


OFFLOADING: dict[OffloadName, Offloading] = {
    "save-on-cpu": Offloading(takes_weights=True, pinned=False),
    "trl": Offloading(least_bytes=1024, takes_head=False, stash=5, in_backward=True, overlaps=True),
    "unsloth": Offloading(checkpoints_only=True),
}


def host_block_bytes(num_bytes: int, *, pinned: bool) -> int:
    """What one copy takes on the host: pinned memory comes in powers of two.

    >>> host_block_bytes(5, pinned=False), host_block_bytes(5, pinned=True), host_block_bytes(8, pinned=True)
    (5, 8, 8)
    """
    return 1 << (num_bytes - 1).bit_length() if pinned else num_bytes


@dataclass
class HostCopies:
    """Bytes of copies on the host, and over the link since :meth:`start`."""

    pinned: bool
    live_bytes: int = 0
    peak_bytes: int = 0
    d2h_bytes: int = 0
    h2d_bytes: int = 0
    num_copies: int = 0

    def start(self) -> None:
        """A micro-batch begins."""
        self.d2h_bytes = self.h2d_bytes = self.num_copies = 0

    def sent(self, num_bytes: int) -> None:
        """One to the host."""
        self.d2h_bytes += num_bytes
        self.num_copies += 1
        self.live_bytes += host_block_bytes(num_bytes, pinned=self.pinned)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def returned(self, num_bytes: int, *, over_link: bool) -> None:
        """One is done with; ``over_link``: it was not on the device any more."""
        self.h2d_bytes += over_link * num_bytes
        self.num_copies += over_link
        self.live_bytes -= host_block_bytes(num_bytes, pinned=self.pinned)
