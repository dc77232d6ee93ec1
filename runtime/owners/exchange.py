"""The row exchange of machines that own rows: choice and fetching go through whoever has them.

A layer's rows are chosen and brought in four jobs, two of which exchange with the mates
(:mod:`meft.runtime.owners.asking`): scores, choice, rows, gathering. The first of the next layer waits for the last of
this one, since they share buffers. Every rank exchanges the same in the same order, layer by layer in forward, and in
backward behind each layer's gradients; one that has no micro-batch asks for nothing, and answers.

Letters: ``T`` tokens, ``L`` layers, ``p`` prefetch depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from meft.planner.records.plan import Decision
from meft.runtime.chunks import exchange as chunks
from meft.runtime.device.lanes import Job
from meft.runtime.exchange.exchange import RowExchange
from meft.runtime.exchange.fetching import RowFetcher, as_chosen
from meft.runtime.exchange.row_cache import Placement, RowCache
from meft.runtime.host.router import Selection
from meft.runtime.host.routers import top_k_of
from meft.runtime.owners.asking import Asked, Owners
from meft.runtime.owners.window import OwnedWindow
from meft.runtime.ranks.peers import Peers


@dataclass(frozen=True)
class Queries:
    """The hidden states of a micro-batch: ``T`` of them."""

    tokens: int
    dtype: torch.dtype


@dataclass
class OwnedFetcher(RowFetcher):
    """A :class:`RowFetcher` that asks the rows' owners."""

    owners: Owners = field(kw_only=True)

    def _choice(
        self,
        target: int,
        layer: int,
        tokens: slice = slice(None),
        *,
        then: Callable[[Selection], Any] = as_chosen,
    ) -> Job:
        queries, mask = self.host.existing("query_landing", self._landing_of(layer)), self.token_mask
        probes = self.host.existing("probes_landing", self._landing_of(target))
        assert queries is not None
        landings = [landing for landing in (queries, probes) if landing is not None]
        copies = [landing.copy for landing in landings]

        def ask() -> Asked:
            for copy in copies:
                copy.wait_on_host()
            self.owners.share_means(target)
            found = None if probes is None else probes.buffer
            asked = self.owners.asked(target, queries.buffer[tokens], found, mask)
            self.owners.ask_scores(target, asked)
            return asked

        def select() -> Any:
            return then(self.owners.select(target, asking.result()))

        after = (*(copy.job for copy in copies), self.state.updated[target], self._gathered)
        asking = self.host.job(f"ask for scores {target}", ask, after=after, lane="network")
        job = self.host.job(f"route {target}", select, after=(asking,))
        for landing in landings:
            landing.readers.append(job)
        return job

    def _reach(self, layer: int, route: Job, *, again: bool) -> Job:
        def ask() -> None:
            placement: Placement = route.result()
            self.owners.ask_rows(layer, placement.rows[placement.travelling(again=again)])

        after = (route, self.state.updated[layer], self._gathered)
        return self.host.job(f"ask for rows {layer}", ask, after=after, lane="network")

    def _gather(self, layer: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        self.owners.place(layer, rows, out)

    def answer_forward(self, layer: int) -> None:
        """For a rank without a micro-batch: what the others ask for a layer's rows."""

        def answer() -> None:
            self.owners.share_means(layer)
            self.owners.ask_scores(layer, None)
            self.owners.ask_rows(layer, torch.empty(0, dtype=torch.int64))

        jobs = (self.state.updated[layer], self._gathered)
        self.host.job(f"answer {layer}", answer, after=jobs, lane="network")

    def answer_again(self, layer: int) -> None:
        """The same for rows that are fetched again."""

        def answer() -> None:
            self.owners.ask_rows(layer, torch.empty(0, dtype=torch.int64))

        self.host.job(f"answer {layer} again", answer, after=(self.state.updated[layer],), lane="network")


@dataclass
class OwnedExchange(RowExchange):
    """A :class:`RowExchange` of several machines, each with its own rows."""

    queries: Queries = field(kw_only=True)

    def _make_fetcher(self, cache: RowCache) -> OwnedFetcher:
        assert self.peers is not None
        assert self.peers.network is not None
        self._owners = Owners(
            self.peers.network,
            self.store,
            self.decision,
            top_k_of(self.decision, self.store.kernels),
            tokens=self.queries.tokens,
            queries_dtype=self.queries.dtype,
            rows_dtype=self.adapter_dtype,
            ended=self.schedule.ended,
        )
        self._asking = OwnedFetcher(**self._fetcher_parts(cache), owners=self._owners)
        return self._asking

    def _window_class(self) -> type[OwnedWindow]:
        return OwnedWindow

    def sit_out(self, before: Callable[[int], None] | None = None) -> None:
        """See :class:`RowExchange`; it answers, too."""
        for layer in range(len(self.layers)):
            self._asking.answer_forward(layer)
        super().sit_out(before)

    def _sit_out_layer(self, layer: int) -> None:
        self._window.send_nothing(layer)
        again = layer - self.depth - 1
        if self.decision.rows_in_backward == "refetched" and again >= 0:
            self._asking.answer_again(again)

    def host_buffer_bytes(self) -> dict[str, int]:
        """See :class:`RowExchange`."""
        sizes = super().host_buffer_bytes()
        sizes["network_buffers"] += sum(table.numel() * table.element_size() for table in self._owners.tables())
        return sizes

    def network_rows(self) -> dict[str, list[int]]:
        """See :class:`RowExchange`; and what owners sent and scored."""
        owners = self._owners
        return super().network_rows() | {"asked_total": owners.asked_rows, "scored_total": owners.scored_pairs}


def exchange_of(decision: Decision, *, peers: Peers | None, queries: Queries, **parts: Any) -> RowExchange:
    """The exchange that a decision asks for, on so many machines; ``parts`` as in
    :func:`meft.runtime.chunks.exchange.exchange_of`."""
    if decision.rows == "owned" and peers is not None and peers.machines > 1:
        parts.pop("placer", None)  # of token chunks, which go with rows on every machine
        return OwnedExchange(decision=decision, peers=peers, queries=queries, **parts)
    return chunks.exchange_of(decision, peers=peers, **parts)
