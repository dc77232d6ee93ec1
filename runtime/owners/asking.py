"""What a rank asks the machines that own rows for, and what it answers its mates.

Machine ``m`` of ``M`` owns the ``m``-th part of every layer's rows, whole experts of them. Mates (the ranks with the
same place on all machines) exchange twice for the rows of a layer:

1. *Scores*. Each sends the others its hidden states and the experts that its tokens probe, and gets back the scores of
   those experts that they own. An expert's scores come of its own rows and tokens alone, so they are those of one rank
   to the bit, and so are the rows that are chosen from them.
2. *Rows*. Each sends the numbers of the rows that it wants, and gets them in the adapter's dtype, as they would have
   lain in its staging.

Sizes are exact: what is not known on both sides is told first. Buffers hold what the plan allows: all tokens, and
``active_rows_cap`` rows. With centroids the means of own experts go to the mates whenever rows were updated.

Letters: ``M`` machines, ``T`` tokens, ``D`` hidden size, ``R`` adapter rows per layer, ``N`` experts, ``P`` probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from meft.planner.records.plan import Decision
from meft.runtime.exchange.shared_window import parts_within
from meft.runtime.host.centroids import nearest_experts
from meft.runtime.host.router import Selection, TopKRouter
from meft.runtime.host.store import HostStore
from meft.runtime.ranks.machines import About, Network, Per

NOBODY = -1
"""The expert of padding, which looks for no rows; that of a token that a switch has dropped is negative, too."""


@dataclass(frozen=True)
class Asked:
    """What a micro-batch asks for a layer's rows: hidden states ``[T, D]``, and int32 probes ``[T, P]``."""

    queries: torch.Tensor
    probes: torch.Tensor


class Owners:
    """Both sides of it. What exchanges is called on the network's lane, in the same order in all mates."""

    def __init__(
        self,
        network: Network,
        store: HostStore,
        decision: Decision,
        scorer: TopKRouter,
        *,
        tokens: int,
        queries_dtype: torch.dtype,
        rows_dtype: torch.dtype,
        ended: Callable[[], bool],
    ) -> None:
        self._network, self._store, self._scorer, self._ended = network, store, scorer, ended
        self._num_probes = decision.num_probes
        machines, width = network.machines, store.adapter_width
        self.rows_of = [range(m * width // machines, (m + 1) * width // machines) for m in range(machines)]
        """By machine: the rows that it owns."""
        self._experts = decision.num_experts // machines
        """That a machine owns."""
        others, per_expert = machines - 1, width // decision.num_experts
        pairs, wanted = tokens * decision.num_probes, others * min(decision.active_rows_cap, width // machines)

        def both(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)

        self._queries = both((others * tokens, store.hidden_size), queries_dtype)
        self._probes = both((others * tokens, decision.num_probes), torch.int32)
        self._scores_out = torch.empty(others * pairs, per_expert, dtype=store.dtype)
        self._scores_in = torch.empty(pairs, per_expert, dtype=store.dtype)
        self._numbers_out = torch.empty(decision.active_rows_cap, dtype=torch.int64)
        self._numbers_in = torch.empty(wanted, dtype=torch.int64)
        self._rows_out = torch.empty(wanted, 2 * store.hidden_size, dtype=rows_dtype)
        self._rows_in = torch.empty(decision.active_rows_cap, 2 * store.hidden_size, dtype=rows_dtype)
        self._means = both((others * self._experts if store.means else 0, store.hidden_size), store.dtype)
        self.asked_rows, self.scored_pairs = [0] * store.num_layers, [0] * store.num_layers
        """By layer, so far: what other machines sent, and pairs of token and expert that they scored."""

    # --- scores ---------------------------------------------------------------------------------------------------

    def asked(self, layer: int, queries: torch.Tensor, probes: torch.Tensor | None, mask: torch.Tensor | None) -> Asked:
        """What a layer's tokens look for: ``probes`` as the device found them, else by means; ``mask`` bool ``[T]``."""
        if probes is None:
            means = self._store.means
            assert means is not None
            probes = nearest_experts(means.tables[layer], queries.to(self._store.dtype), num_probes=self._num_probes)
        return Asked(queries, probes if mask is None else probes.masked_fill(~mask[:, None], NOBODY))

    def ask_scores(self, layer: int, asked: Asked | None) -> None:
        """Get the scores of the probed experts that other machines own, and answer; None: this rank asks nothing."""
        network, (queries, queries_in), (probes, probes_in) = self._network, self._queries, self._probes
        tokens = 0 if asked is None else asked.queries.shape[0]
        there = network.tell(torch.full((network.machines, 1), tokens), self._about("queries")).flatten().tolist()
        counts = [tokens if machine != network.machine else 0 for machine in range(network.machines)]
        if asked is not None:
            for copy in range(len(network.others)):
                some = slice(copy * tokens, (copy + 1) * tokens)
                queries[some], probes[some] = asked.queries, asked.probes
        network.swap(queries, queries_in, self._about("queries"), counts=counts, expected=there)
        network.swap(probes, probes_in, self._about("queries"), counts=counts, expected=there)
        answered = self._answer_scores(layer, there)
        pairs = [0] * network.machines if asked is None else self._pairs(asked.probes)
        network.swap(self._scores_out, self._scores_in, self._about("scores"), counts=answered, expected=pairs)
        self.scored_pairs[layer] += sum(pairs)

    def _answer_scores(self, layer: int, there: list[int]) -> list[int]:
        """Score the mates' queries with own experts' rows; by machine how many pairs of token and expert."""
        counts, start, end = [0] * self._network.machines, 0, 0
        for machine in self._network.others:
            some = slice(start, start := start + there[machine])
            scores = self._own_scores(layer, Asked(self._queries[1][some], self._probes[1][some]))
            counts[machine] = scores.shape[0]
            self._scores_out[end : (end := end + scores.shape[0])] = scores
        return counts

    def _own_scores(self, layer: int, asked: Asked) -> torch.Tensor:
        """Of the pairs of a token and an expert that this machine owns, in the tokens' order, ``[n, R/N]``."""
        own = self._of_machine(asked.probes, self._network.machine)
        token = own.nonzero()[:, 0]
        if not len(token):
            return torch.empty(0, self._scores_out.shape[1], dtype=self._scores_out.dtype)
        experts = (asked.probes[own] - self._network.machine * self._experts).unsqueeze(1)
        keys = self._store.layers[layer].keys
        queries = asked.queries[token].to(keys.dtype)
        return self._scorer.scores(keys, queries, experts, num_experts=self._experts)

    def _of_machine(self, probes: torch.Tensor, machine: int) -> torch.Tensor:
        """Which of them are experts that a machine owns."""
        first = machine * self._experts
        return (probes >= first) & (probes < first + self._experts)

    def _pairs(self, probes: torch.Tensor) -> list[int]:
        """By machine: how many of them are its experts; of this one none."""
        machines, own = range(self._network.machines), self._network.machine
        return [int(self._of_machine(probes, machine).sum()) if machine != own else 0 for machine in machines]

    def select(self, layer: int, asked: Asked) -> Selection:
        """Choose the rows of what was last asked, from own scores and those that came."""
        looking = asked.probes[:, 0] >= 0
        if not looking.any():
            return Selection(torch.empty(0, dtype=torch.int64))
        queries, probes = asked.queries[looking], asked.probes[looking]
        scores = torch.empty(*probes.shape, self._scores_in.shape[1], dtype=self._scores_in.dtype)
        first = 0
        for machine in range(self._network.machines):
            pairs = self._of_machine(probes, machine)
            if machine == self._network.machine:
                scores[pairs] = self._own_scores(layer, Asked(queries, probes))
            else:
                scores[pairs] = self._scores_in[first : (first := first + int(pairs.sum()))]
        return self._scorer.best_of(scores.flatten(1), probes, num_rows=self._store.adapter_width)

    # --- means ----------------------------------------------------------------------------------------------------

    def share_means(self, layer: int) -> None:
        """Centroids: after an update, take the means of own experts' keys, and give them to the mates."""
        means, network = self._store.means, self._network
        if means is None or not means.is_stale(layer):
            return
        own, (sent, received) = network.machine * self._experts, self._means
        mine = means.take(layer, self._store.layers[layer].keys, slice(own, own + self._experts))
        sent.unflatten(0, (-1, self._experts))[:] = mine
        lengths = [self._experts if machine != network.machine else 0 for machine in range(network.machines)]
        about = self._about("router_means", "optimizer_step")
        network.swap(sent, received, about, counts=lengths, expected=lengths)
        for part, machine in zip(received.split(self._experts), network.others, strict=True):
            means.tables[layer][machine * self._experts : (machine + 1) * self._experts] = part

    # --- rows -----------------------------------------------------------------------------------------------------

    def ask_rows(self, layer: int, rows: torch.Tensor) -> None:
        """Get those of ``rows`` (int64, a few ascending runs) that other machines own, and answer."""
        network, end = self._network, 0
        counts = [0] * network.machines
        for machine in network.others:
            for part in parts_within(rows, self.rows_of[machine]):
                length = part.stop - part.start
                self._numbers_out[end : (end := end + length)] = rows[part]
                counts[machine] += length
        about = self._about("rows")
        there = network.tell(torch.tensor(counts).unsqueeze(1), about).flatten().tolist()
        network.swap(self._numbers_out, self._numbers_in, about, counts=counts, expected=there)
        wanted = self._numbers_in[: sum(there)]
        self._store.gather(layer, wanted, self._rows_out[: sum(there)])
        network.swap(self._rows_out, self._rows_in, about, counts=there, expected=counts)
        self.asked_rows[layer] += end

    def place(self, layer: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Write the rows that were last asked for into ``out [A, 2D]``: own ones from the tables, the others' as they
        came."""
        first = 0
        for machine, owned in enumerate(self.rows_of):
            for part in parts_within(rows, owned):
                if machine == self._network.machine:
                    self._store.gather(layer, rows[part], out[part])
                else:
                    out[part] = self._rows_in[first : (first := first + part.stop - part.start)]

    # --- what is asked beside the steps ---------------------------------------------------------------------------

    def tables(self) -> Iterator[torch.Tensor]:
        """Those that take memory."""
        yield from (*self._queries, *self._probes, self._scores_out, self._scores_in, *self._means)
        yield from (self._numbers_out, self._numbers_in, self._rows_out, self._rows_in)

    def _about(self, category: str, per: Per = "step") -> About:
        return About(category, per, self._ended)
