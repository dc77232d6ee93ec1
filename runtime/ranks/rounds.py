"""What ranks tell each other after each round of micro-batches: their losses, and whether one was asked to stop.

Letters: ``N`` ranks.
"""

from __future__ import annotations

import torch

from meft.runtime.ranks.peers import Peers


class Rounds:
    """A round is one micro-batch of each rank, but in a window's last, which may have less of them."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._losses = peers.zeros((2, peers.size), torch.float64)
        self._stops = peers.zeros((2, peers.size), torch.int64)
        self._done, self._told = peers.counts(), peers.counts()
        self._round = 0

    def tell(self, loss: float, *, stop: bool, taking_part: int) -> tuple[list[float], bool]:
        """This rank's loss, and what all have: the losses of those taking part, and whether any is to stop.

        The same in every rank. Two rows in turn: a rank may be one round ahead, but not two.
        """
        place, peers = self._round % 2, self._peers
        self._round += 1
        self._losses[place, peers.rank] = loss
        self._stops[place, peers.rank] = int(stop)
        self._done.publish(self._round)
        if peers.machines == 1 or peers.leaders is not None:
            peers.wait(lambda: self._done.reached(self._round))
        if peers.machines > 1:
            self._tell_machines(place)
        return self._losses[place, :taking_part].tolist(), bool(self._stops[place].any())

    def _tell_machines(self, place: int) -> None:
        """The leader brings what the other machines' ranks have said; the others wait for it."""
        peers = self._peers
        if peers.leaders is not None:
            here = slice(peers.rank, peers.rank + peers.here)
            said = torch.stack([self._losses[place, here], self._stops[place, here].double()])
            told = peers.leaders.gather(said)
            self._losses[place], self._stops[place] = told[:, 0].flatten(), told[:, 1].flatten().long()
            self._told.publish(self._round)
        peers.wait(lambda: self._told.of(0) >= self._round)
